"""``dynacomm export``: trained weights as PyTorch reads them."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynacomm_async.cli.output import check_writable, say
from dynacomm_async.errors import ConfigError
from dynacomm_async.models import build, read_run, save_weights

__all__ = ["add_arguments", "command"]

EXAMPLE = "dynacomm export model.npz -o model.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export``."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SAVED",
        help="what --save wrote, a checkpoint, or a directory of checkpoints (the newest counts)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE.safetensors",
        help="where tensors go, with the names and layouts of a state dict in PyTorch",
    )
    parser.add_argument("--model", metavar="M", help="what was trained (default: as the file says)")


def command(args: argparse.Namespace) -> int:
    """Convert."""
    check_writable(args.output)
    saved = read_run(args.source)
    model = args.model or saved.model
    if model is None:
        raise ConfigError(f"{args.source} does not say of which model it is: give --model")
    network = build(model)
    parameters, statistics = saved.fit(network)
    save_weights(args.output, network, parameters, statistics)
    say(f"{network.parameters:,} parameters of {model} written to {args.output}")
    return 0
