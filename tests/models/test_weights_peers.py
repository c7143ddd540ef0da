"""Weights from and for PyTorch: the same logits there and here, both ways.

The definitions are written here from the papers, with the names that torchvision gives the modules
(torchvision itself is not needed); GoogLeNet and Inception-v4 have the names of this package.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dynacomm_async.models import build, load_weights, save_weights
from dynacomm_async.nn import from_tensors, to_tensors

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch")
nn, F = torch.nn, torch.nn.functional

pytestmark = [pytest.mark.peers, pytest.mark.slow]


class VGG11(nn.Module):
    def __init__(self, classes):
        super().__init__()
        parts, before = [], 3
        for channels in (64, "P", 128, "P", 256, 256, "P", 512, 512, "P", 512, 512, "P"):
            if channels == "P":
                parts.append(nn.MaxPool2d(2, 2))
            else:
                parts += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
        self.features = nn.Sequential(*parts)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            *(nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
            nn.Linear(4096, classes),
        )

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class Block(nn.Module):
    def __init__(self, before, channels, stride, deep):
        super().__init__()
        after = 4 * channels if deep else channels
        kernels = (1, 3, 1) if deep else (3, 3)
        widths = (before, channels, channels, after) if deep else (before, channels, after)
        strides = (1, stride, 1) if deep else (stride, 1)
        self.depth = len(kernels)
        for i, kernel in enumerate(kernels):
            convolution = nn.Conv2d(
                widths[i], widths[i + 1], kernel, strides[i], kernel // 2, bias=False
            )
            self.add_module(f"conv{i + 1}", convolution)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.downsample = None
        if before != after or stride > 1:
            convolution = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(after))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.depth else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self, stages, deep, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        before = 64
        for number, blocks in enumerate(stages, start=1):
            channels = 32 * 2**number
            stage = []
            for index in range(blocks):
                stride = 2 if number > 1 and index == 0 else 1
                stage.append(Block(before, channels, stride, deep))
                before = 4 * channels if deep else channels
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


def convolve6(before, channels, kernel, stride=1, groups=1):
    convolution = nn.Conv2d(
        before, channels, kernel, stride, kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU6())


class Inverted(nn.Module):
    def __init__(self, before, channels, stride, expansion):
        super().__init__()
        wide = before * expansion
        parts = [convolve6(before, wide, 1)] if expansion > 1 else []
        parts += [convolve6(wide, wide, 3, stride, wide)]
        parts += [nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.conv = nn.Sequential(*parts)
        self.adds = stride == 1 and before == channels

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes):
        super().__init__()
        parts, before = [convolve6(3, 32, 3, 2)], 32
        for t, c, n, s in [
            *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        ]:
            for index in range(n):
                parts.append(Inverted(before, c, s if index == 0 else 1, t))
                before = c
        parts.append(convolve6(before, 1280, 1))
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class Inception(nn.Module):
    def __init__(self, before, one, reduced3, three, reduced5, five, pooled):
        super().__init__()
        for name, source, channels, kernel in [
            *(("1x1", before, one, 1), ("3x3_reduce", before, reduced3, 1)),
            *(("3x3", reduced3, three, 3), ("5x5_reduce", before, reduced5, 1)),
            *(("5x5", reduced5, five, 5), ("pool_proj", before, pooled, 1)),
        ]:
            self.add_module(name, nn.Conv2d(source, channels, kernel, padding=kernel // 2))

    def forward(self, x):
        def run(name, value):
            return getattr(self, name)(value).relu()

        pooled = F.max_pool2d(x, 3, 1, 1)
        branches = [run("1x1", x), run("3x3", run("3x3_reduce", x))]
        branches += [run("5x5", run("5x5_reduce", x)), run("pool_proj", pooled)]
        return torch.cat(branches, 1)


class GoogLeNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
        self.conv2_reduce = nn.Conv2d(64, 64, 1)
        self.conv2 = nn.Conv2d(64, 192, 3, padding=1)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)
        self.fc1 = nn.Linear(1024, classes)

    def forward(self, x):
        def halve(value):
            return F.max_pool2d(value, 3, 2, ceil_mode=True)

        x = F.local_response_norm(halve(self.conv1(x).relu()), 5)
        x = self.conv2(self.conv2_reduce(x).relu()).relu()
        x = halve(F.local_response_norm(x, 5))
        for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
            x = getattr(self, f"inception{name}")(x)
            x = halve(x) if name in ("3b", "4e") else x
        return self.fc1(x.mean((2, 3)))


class InceptionV4(nn.Module):
    """Table and figures 3 to 9 of the paper; modules are made while the first image runs."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.scopes, self.counts = classes, [self], Counter()

    def conv(self, x, channels, kernel, stride=1, same=True):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        scope = self.scopes[-1]
        self.counts[id(scope)] += 1
        number, padding = self.counts[id(scope)], tuple(k // 2 if same else 0 for k in kernel)
        if not hasattr(scope, f"conv{number}"):
            made = nn.Conv2d(x.shape[1], channels, kernel, stride, padding, bias=False)
            scope.add_module(f"conv{number}", made)
            scope.add_module(f"norm{number}", nn.BatchNorm2d(channels, 1e-3))
        y = getattr(scope, f"conv{number}")(x)
        return getattr(scope, f"norm{number}")(y).relu()

    def inside(self, name, function, x):
        outer = self.scopes[-1]
        if not hasattr(outer, name):
            outer.add_module(name, nn.Module())
        self.scopes.append(getattr(outer, name))
        y = torch.cat(function(x), 1)
        self.scopes.pop()
        return y

    def valid(self, x, channels, kernel, stride=1):
        return self.conv(x, channels, kernel, stride, same=False)

    def chain(self, x, *steps):
        for channels, kernel in steps:
            x = self.conv(x, channels, kernel)
        return x

    def module_a(self, x):
        return [
            self.chain(x, (96, 1)),
            self.chain(x, (64, 1), (96, 3)),
            self.chain(x, (64, 1), (96, 3), (96, 3)),
            self.chain(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), (96, 1)),
        ]

    def module_b(self, x):
        a, b = (7, 1), (1, 7)
        return [
            self.chain(x, (384, 1)),
            self.chain(x, (192, 1), (224, b), (256, a)),
            self.chain(x, (192, 1), (192, a), (224, b), (224, a), (256, b)),
            self.chain(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), (128, 1)),
        ]

    def fork(self, x):
        return [self.conv(x, 256, (1, 3)), self.conv(x, 256, (3, 1))]

    def module_c(self, x):
        return [
            self.chain(x, (256, 1)),
            self.inside("branches1", self.fork, self.chain(x, (384, 1))),
            self.inside(
                "branches2", self.fork, self.chain(x, (384, 1), (448, (3, 1)), (512, (1, 3)))
            ),
            self.chain(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), (256, 1)),
        ]

    def second_stem(self, x):
        first = self.valid(self.conv(x, 64, 1), 96, 3)
        return [first, self.valid(self.chain(x, (64, 1), (64, (7, 1)), (64, (1, 7))), 96, 3)]

    def shrink_a(self, x):
        first = self.valid(x, 384, 3, 2)
        second = self.valid(self.chain(x, (192, 1), (224, 3)), 256, 3, 2)
        return [first, second, F.max_pool2d(x, 3, 2)]

    def shrink_b(self, x):
        first = self.valid(self.conv(x, 192, 1), 192, 3, 2)
        second = self.chain(x, (256, 1), (256, (1, 7)), (320, (7, 1)))
        return [first, self.valid(second, 320, 3, 2), F.max_pool2d(x, 3, 2)]

    def forward(self, x):
        self.counts.clear()
        x = self.conv(self.valid(self.valid(x, 32, 3, 2), 32, 3), 64, 3)
        x = self.inside("stem1", lambda x: [F.max_pool2d(x, 3, 2), self.valid(x, 96, 3, 2)], x)
        x = self.inside("stem2", self.second_stem, x)
        x = self.inside("stem3", lambda x: [self.valid(x, 192, 3, 2), F.max_pool2d(x, 3, 2)], x)
        for number in range(1, 5):
            x = self.inside(f"a{number}", self.module_a, x)
        x = self.inside("reduction_a", self.shrink_a, x)
        for number in range(1, 8):
            x = self.inside(f"b{number}", self.module_b, x)
        x = self.inside("reduction_b", self.shrink_b, x)
        for number in range(1, 4):
            x = self.inside(f"c{number}", self.module_c, x)
        if not hasattr(self, "fc1"):
            self.fc1 = nn.Linear(x.shape[1], self.classes)
        return self.fc1(x.mean((2, 3)))


# VGG takes one size only; that of the others is small enough for a quick test. The deepest, with
# random weights and statistics that fit these, multiply rounding errors: PyTorch in float32 is 4e-4
# to 2e-3 away from PyTorch in float64. For ResNet-50 it is 5e-5 to 8e-5, and we, by Winograd's
# tiles, are 1.1e-4 to 1.5e-4 away. With such weights they are compared in float64, and in float32
# with weights that do not: see the end of this file.
DEEPEST = ("inception_v4", "resnet50", "resnet152")
TWINS = {
    "vgg11": (VGG11, (224, 224, 3)),
    "resnet18": (lambda classes: ResNet((2, 2, 2, 2), False, classes), (96, 64, 3)),
    "resnet50": (lambda classes: ResNet((3, 4, 6, 3), True, classes), (64, 96, 3)),
    "resnet152": (lambda classes: ResNet((3, 8, 36, 3), True, classes), (64, 64, 3)),
    "mobilenet_v2": (MobileNetV2, (96, 96, 3)),
    "googlenet": (GoogLeNet, (96, 64, 3)),
    "inception_v4": (InceptionV4, (107, 99, 3)),
}
CLASSES = 20


def pair(name, seed=0):
    """Network, twin with random weights, and images (N, H, W, C)."""
    make, shape = TWINS[name]
    torch.manual_seed(seed)
    network, twin = build(name, input_shape=shape, classes=CLASSES), make(CLASSES)
    images = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    if isinstance(twin, InceptionV4):
        twin(planes(images))
    return network, twin.eval(), images


def planes(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def arrays(twin):
    """The state dict in NumPy."""
    return {name: tensor.numpy() for name, tensor in twin.state_dict().items()}


def randomise(twin, images):
    """Statistics that fit the weights, and gammas and betas that could be trained ones."""
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            twin.train()(planes(images))
        twin.eval()


def assert_equal_logits(network, parameters, statistics, twin, images):
    kind = np.float64 if network.name in DEEPEST else np.float32
    engine = network.bind(2, parameters.astype(kind), statistics=statistics.astype(kind))
    with torch.no_grad():
        dtype = torch.float64 if kind is np.float64 else torch.float32
        theirs = twin.to(dtype)(planes(images).to(dtype)).numpy()
    ours = engine.predict(images.astype(kind))
    twin.float()
    assert theirs.std() > 1e-3
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


@pytest.mark.parametrize("name", TWINS)
def test_weights_from_pytorch_give_its_logits_and_come_back(name, tmp_path):
    network, twin, images = pair(name)
    randomise(twin, images)
    path = tmp_path / "theirs.safetensors"
    safetensors_torch.save_file(twin.state_dict(), path)
    parameters, statistics = load_weights(path, network)
    assert parameters.size == sum(each.numel() for each in twin.parameters())
    assert_equal_logits(network, parameters, statistics, twin, images)

    back = tmp_path / "back.safetensors"
    save_weights(back, network, parameters, statistics)
    for name, tensor in safetensors_torch.load_file(back).items():
        if "tracked" not in name:
            assert torch.equal(tensor, twin.state_dict()[name]), name


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet"])
def test_weights_of_ours_give_the_same_logits_in_pytorch(name, tmp_path):
    network, twin, images = pair(name)
    parameters = network.initialise(1)
    engine = network.bind(2, parameters)
    if network.statistics:
        engine.forward(images, draw=(0, 0, 0))
        engine.move_statistics(1.0)
    path = tmp_path / "ours.safetensors"
    save_weights(path, network, parameters, engine.statistics)
    twin.load_state_dict(safetensors_torch.load_file(path), strict=True)
    assert_equal_logits(network, parameters, engine.statistics, twin, images)


def float32_and_float64(twin, images):
    """PyTorch's logits in both."""
    with torch.no_grad():
        single = twin(planes(images)).numpy()
        double = twin.double()(planes(images).double()).numpy()
    twin.float()
    return single, double


def distance(logits, truth):
    return np.abs(logits - truth).max() / np.abs(truth).max()


@pytest.mark.parametrize("name", DEEPEST)
def test_new_weights_of_the_deepest_networks_give_the_same_logits_in_float32(name):
    network, twin, images = pair(name)
    parameters, statistics = network.initialise(1), network.initial_statistics()
    tensors = to_tensors(network, parameters, statistics)
    twin.load_state_dict({key: torch.from_numpy(array) for key, array in tensors.items()})
    ours = network.bind(2, parameters, statistics=statistics).predict(images)
    theirs, truth = float32_and_float64(twin, images)
    assert truth.std() / np.abs(truth).max() > 1e-2
    assert distance(ours, theirs) < 1e-4
    assert distance(ours, truth) < 1e-4


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_resnet152_with_branches_as_small_as_trained_ones_agrees_in_float32(seed):
    network, twin, images = pair("resnet152", seed)
    randomise(twin, images)
    for name, module in twin.named_modules():
        if name.endswith("bn3"):
            nn.init.uniform_(module.weight, 0, 0.2)
    with torch.no_grad():
        twin.train()(planes(images))
    parameters, statistics = from_tensors(network, arrays(twin.eval()))
    ours = network.bind(2, parameters, statistics=statistics).predict(images)
    theirs, truth = float32_and_float64(twin, images)
    assert truth.std() > 1e-2
    assert distance(ours, theirs) < 1e-4


# ResNet-152 is not in here: its 3x3 convolutions round more, by Winograd's tiles, and with one seed
# of three its float32 was 3.2 times as far from float64 as PyTorch's (3.2e-3 and 1.0e-3).
@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_where_inception_v4_multiplies_rounding_errors_ours_are_like_pytorchs(seed):
    network, twin, images = pair("inception_v4", seed)
    randomise(twin, images)
    parameters, statistics = from_tensors(network, arrays(twin))
    ours = network.bind(2, parameters, statistics=statistics).predict(images)
    theirs, truth = float32_and_float64(twin, images)
    # Which of two sums of rounding errors is the larger is chance; thrice is not.
    assert distance(ours, truth) < 3 * distance(theirs, truth)
