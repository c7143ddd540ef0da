"""A model trained here goes on in PyTorch and comes back: the same logits on every way."""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.data import load
from dynacomm_async.models import build, load_weights

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch")
nn, F = torch.nn, torch.nn.functional

pytestmark = [pytest.mark.peers, pytest.mark.slow]


class Block(nn.Module):
    def __init__(self, before, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.half = stride, (channels - before) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return (y + F.pad(shortcut, (0, 0, 0, 0, self.half, self.half))).relu()


class ResNet20(nn.Module):
    """As in the paper, for CIFAR: shortcuts without parameters."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def planes(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def assert_same_logits(path, twin, images):
    network = build("resnet20")
    parameters, statistics = load_weights(path, network)
    ours = network.bind(len(images), parameters, statistics=statistics).predict(images)
    with torch.no_grad():
        theirs = twin.eval()(planes(images)).numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def train_on(twin, images, labels):
    optimiser = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9)
    twin.train()
    for first in range(0, len(images), 16):
        part = slice(first, first + 16)
        loss = F.cross_entropy(twin(planes(images[part])), torch.from_numpy(labels[part]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_training_goes_on_in_pytorch_and_comes_back(run, call, tmp_path):
    learned, judged = load("synthetic:64:16", input_shape=(32, 32, 3), classes=10)
    options = ("--model", "resnet20", "--data", "synthetic:64:16", "--batch", "8", "--workers", "1")
    saved, out = tmp_path / "saved.npz", tmp_path / "out.safetensors"
    trained = run("train", *options, "--steps", "6", "--save", saved)
    assert trained.code == 0, trained.err
    assert call("export", saved, "-o", out).code == 0

    twin = ResNet20()
    twin.load_state_dict(safetensors_torch.load_file(out), strict=True)
    assert_same_logits(out, twin, judged.images)
    assert_same_logits(saved, twin, judged.images)

    train_on(twin, learned.images, learned.labels)
    theirs, back = tmp_path / "theirs.safetensors", tmp_path / "back.npz"
    safetensors_torch.save_file(twin.state_dict(), theirs)
    assert_same_logits(theirs, twin, judged.images)

    # A step that changes nothing: what it began with is what is saved.
    still = ("--steps", "1", "--rate", "0", "--weight-decay", "0", "--rule", "sgd")
    begun = run("train", *options, *still, "--init", theirs, "--save", back)
    assert begun.code == 0, begun.err
    parameters, _ = load_weights(back, build("resnet20"))
    assert np.array_equal(parameters, load_weights(theirs, build("resnet20"))[0])
