"""LeNet-5 and a smooth variant of it."""

from __future__ import annotations

from dynacomm_async.nn import AvgPool, Conv2d, Dense, Flatten, MaxPool, Network, ReLU, Tanh

__all__ = ["lenet", "lenet_smooth"]


def lenet(input_shape: tuple[int, ...] = (28, 28, 1), classes: int = 10) -> Network:
    """LeNet-5 as used today: ReLU and max pooling, every map of conv1 feeds every map of conv2.

    LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition",
    1998. The 28 x 28 digits are bordered to the paper's 32 x 32.

    Max pooling raises the mean square of what it passes on by as much as He's initial weights
    make up for the ReLU, so convolutions in front of it start with Xavier's.
    """
    parts = [
        Conv2d(6, 5, padding=2, initialiser="xavier"),
        ReLU(),
        MaxPool(2),
        Conv2d(16, 5, initialiser="xavier"),
        ReLU(),
        MaxPool(2),
        Flatten(),
        Dense(120),
        ReLU(),
        Dense(84),
        ReLU(),
        Dense(classes, initialiser="xavier"),
    ]
    return Network("lenet", parts, input_shape, classes)


def lenet_smooth(input_shape: tuple[int, ...] = (28, 28, 1), classes: int = 10) -> Network:
    """LeNet-5 with tanh and average pooling, closer to the paper's.

    Nothing in it has a kink, so a rounding error stays a rounding error: two ways to compute the
    same step can be compared to within float32 precision.
    """
    parts = [
        Conv2d(6, 5, padding=2, initialiser="xavier"),
        Tanh(),
        AvgPool(2),
        Conv2d(16, 5, initialiser="xavier"),
        Tanh(),
        AvgPool(2),
        Flatten(),
        Dense(120, initialiser="xavier"),
        Tanh(),
        Dense(84, initialiser="xavier"),
        Tanh(),
        Dense(classes, initialiser="xavier"),
    ]
    return Network("lenet_smooth", parts, input_shape, classes)
