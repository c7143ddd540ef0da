"""What a run trains on what: the settings that a server tells its workers, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.data import Augmentation, Batches, Dataset, load, parse_augmentation
from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.models import build, load_weights
from dynacomm_async.nn import Network
from dynacomm_async.optim import parse_rule, parse_schedule
from dynacomm_async.schedule import PLANNERS, find_planner
from dynacomm_async.server import DEFAULT_MAX_GRADIENT, Training
from dynacomm_async.split import Split
from dynacomm_async.worker import DEFAULT_STRATEGY

__all__ = [
    "Batch",
    "Workload",
    "add_model_arguments",
    "add_run_arguments",
    "add_strategy_argument",
    "check_run",
    "load_workload",
    "number",
    "positive",
    "settings_of",
    "steps_of",
    "training_of",
    "training_options",
]

_EVALUATED_IMAGES, _EVALUATED_FLOATS = 256, 1 << 25
"""Images that are evaluated at a time, and activations at most: a server of little memory lives on
when a large network has been trained."""


Batch: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]
"""(N, H, W, C) images and their (N,) labels."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, its data, and who sees which of them when.

    Attributes:
        network: the model.
        train: what it learns from.
        test: what it is judged by.
        batches: how the training data are dealt out.
        seed: of weights, batches, augmentation and dropout.
        smoothing: of the labels in training.
        threads: that compute in each worker.
    """

    network: Network
    train: Dataset
    test: Dataset
    batches: Batches
    seed: int
    smoothing: float
    threads: int
    _augmentation: Augmentation

    def batch(self, slot: int, step: int, split: Split | None = None) -> Batch:
        """Return the images and labels of a worker's step, a pure function of the arguments.

        Args:
            slot: the worker's rank.
            step: from 0.
            split: among whom the data of the step are divided; None: all ranks.
        """
        indices = self.batches.indices(slot, step, split)
        epoch, _ = (split or self.batches.split).locate(step)
        images = self._augmentation.take(self.train.images, indices, seed=self.seed, epoch=epoch)
        return images, self.train.labels[indices]

    def initial(self, init: Path | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the parameters and statistics to begin with: a file's, or new ones.

        Raises:
            DynaCommError: the file cannot be read, or does not fit the model.
        """
        if init is not None:
            return load_weights(init, self.network)
        return self.network.initialise(self.seed), self.network.initial_statistics()

    def accuracy(self, parameters: NDArray[np.float32], statistics: NDArray[np.float32]) -> float:
        """Return the share of test images that are classified rightly."""
        fitting = _EVALUATED_FLOATS // sum(prod(node.output.shape) for node in self.network.nodes)
        batch = max(1, min(_EVALUATED_IMAGES, len(self.test), fitting))
        engine = self.network.bind(batch, parameters=parameters, statistics=statistics)
        correct = 0
        for start in range(0, len(self.test), batch):
            part = slice(start, start + batch)
            correct += engine.evaluate(self.test.images[part], self.test.labels[part])[1]
        return correct / len(self.test)


def positive(text: str) -> int:
    """Return a whole number from 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return number


def number(text: str) -> float:
    """Return a finite number from 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command with a model takes."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        default="lenet",
        metavar="M",
        help="a name that `dynacomm models` lists, or package.module:function for your own "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--data",
        default="digits",
        metavar="NAME",
        help="digits, mnist, cifar10, synthetic or synthetic:TRAIN:TEST (default: %(default)s)",
    )
    group.add_argument("--data-dir", type=Path, metavar="DIR", help="where mnist or cifar10 lie")
    group.add_argument(
        "--augment",
        metavar="HOW",
        help="none, or shift:PIXELS, crop:PIXELS and flip with commas between "
        "(default: shift:2 for digits, none otherwise)",
    )
    group.add_argument(
        "--batch",
        type=positive,
        default=32,
        metavar="B",
        help="images of one worker in one step (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="S",
        help="of weights, batches, augmentation and dropout (default: %(default)s)",
    )
    group.add_argument(
        "--threads",
        type=positive,
        default=1,
        metavar="T",
        help="in each worker, up to so many compute parts of a batch side by side, where the model "
        "is large enough; sending and receiving take a part of a core, too (default: %(default)s)",
    )


def add_run_arguments(parser: argparse.ArgumentParser, *, steps: int = 200) -> None:
    """Add what every command that trains takes."""
    add_model_arguments(parser)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--workers", type=positive, default=2, metavar="N", help="ranks (default: 2)"
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=positive, metavar="K", help=f"updates of the model (default: {steps})"
    )
    length.add_argument("--epochs", type=positive, metavar="E", help="passes over the data")
    group.add_argument(
        "--rate", type=number, default=0.02, metavar="R", help="learning rate (default: 0.02)"
    )
    group.add_argument(
        "--rate-schedule",
        default="constant",
        metavar="HOW",
        help="constant, cosine, step:EVERY:FACTOR, each with ,warmup:STEPS (default: constant)",
    )
    group.add_argument(
        "--rule",
        default="momentum:0.9",
        metavar="RULE",
        help="sgd, momentum:M, nesterov:M, adam or adamw (default: %(default)s)",
    )
    group.add_argument(
        "--weight-decay", type=number, default=1e-4, metavar="D", help="(default: 0.0001)"
    )
    group.add_argument(
        "--label-smoothing",
        type=_share,
        default=0.0,
        metavar="E",
        help="share of a label that all classes get (default: 0)",
    )
    parser.set_defaults(default_steps=steps)


def add_strategy_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--strategy``."""
    parser.add_argument(
        "--strategy",
        default=DEFAULT_STRATEGY,
        metavar="NAME",
        help=f"{', '.join(PLANNERS)}; priority:256k sets its slices (default: %(default)s)",
    )


def settings_of(args: argparse.Namespace, strategy: str) -> dict[str, Any]:
    """Return what workers are told of the run.

    Raises:
        ConfigError: no such strategy or augmentation.
    """
    find_planner(strategy)
    augment = args.augment or ("shift:2" if args.data == "digits" else "none")
    parse_augmentation(augment)
    return {
        "model": args.model,
        "data": args.data,
        "data_dir": None if args.data_dir is None else str(args.data_dir.absolute()),
        "augment": augment,
        "label_smoothing": getattr(args, "label_smoothing", 0.0),
        "batch": args.batch,
        "threads": getattr(args, "threads", 1),
        "seed": args.seed,
        "workers": args.workers,
        "strategy": strategy,
    }


def load_workload(settings: Mapping[str, Any], data_dir: Path | None = None) -> Workload:
    """Build the model and read the data that settings name.

    Args:
        data_dir: replaces the folder in the settings.

    Raises:
        ConfigError: settings are missing (the server is embedded in something else), or one of
            them names what is not there.
    """
    try:
        model, data, batch = settings["model"], settings["data"], settings["batch"]
        seed, workers, augment = settings["seed"], settings["workers"], settings["augment"]
    except KeyError as error:
        raise ConfigError(
            f"the server does not say which {error.args[0]} to use: it was not started by "
            "`dynacomm serve`, so its own workers must be used"
        ) from None
    network = build(model)
    norm = next((node.name for node in network.nodes if node.layer.normalises), None)
    if norm is not None and batch < 2:
        raise ShapeError(
            f"model {model}, layer {norm}: a batch of {batch} image has no statistics for batch "
            "norm, expected --batch of at least 2"
        )
    height, width, channels = network.input_shape
    folder = data_dir or (Path(settings["data_dir"]) if settings.get("data_dir") else None)
    train, test = load(
        data,
        folder=folder,
        input_shape=(height, width, channels),
        classes=network.classes,
        seed=seed,
    )
    batches = Batches(len(train), workers=workers, batch=batch, seed=seed)
    smoothing, threads = settings.get("label_smoothing", 0.0), settings.get("threads", 1)
    how = parse_augmentation(augment)
    return Workload(network, train, test, batches, seed, smoothing, threads, how)


def steps_of(args: argparse.Namespace, workload: Workload) -> int:
    """Return how many steps the command line asks for."""
    if args.epochs is not None:
        return int(args.epochs * workload.batches.steps_per_epoch)
    return int(args.steps or args.default_steps)


def check_run(args: argparse.Namespace, strategy: str) -> tuple[dict[str, Any], int]:
    """Return what workers are told and the number of steps, once all of it has been tried.

    Raises:
        ConfigError: a setting is wrong, or names what is not there.
    """
    settings = settings_of(args, strategy)
    workload = load_workload(settings)
    workload.initial(getattr(args, "init", None))
    steps = steps_of(args, workload)
    training_of(training_options(args), steps)
    return settings, steps


def training_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that :func:`training_of` reads, as plain values."""
    names = ("rule", "rate_schedule", "rate", "weight_decay")
    options = {name: getattr(args, name) for name in names}
    if hasattr(args, "max_gradient"):
        options["max_gradient"] = args.max_gradient
    return options


def training_of(options: Mapping[str, Any], steps: int) -> Training:
    """Return how the server updates.

    Raises:
        ConfigError: no such rule or rate schedule.
    """
    return Training(
        parse_rule(options["rule"]),
        parse_schedule(options["rate_schedule"], base=options["rate"], steps=steps),
        options["weight_decay"],
        max_gradient=options.get("max_gradient", DEFAULT_MAX_GRADIENT),
    )
