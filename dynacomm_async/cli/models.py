"""``dynacomm models``: the models that can be trained by name."""

from __future__ import annotations

import argparse

from dynacomm_async.cli.output import print_json, table
from dynacomm_async.models import MODELS, build

__all__ = ["add_arguments", "command"]

EXAMPLE = "dynacomm models --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``models``."""
    parser.add_argument("--json", action="store_true", help="print as JSON")


def command(args: argparse.Namespace) -> int:
    """List the models."""
    networks = {name: build(name) for name in MODELS}
    rows = [
        {
            "name": name,
            "layers": len(network.layers),
            "parameters": network.parameters,
            "forward_flops": network.forward_flops,
            "input_shape": list(network.input_shape),
        }
        for name, network in networks.items()
    ]
    if args.json:
        print_json(rows)
        return 0
    cells = [
        [
            str(row["name"]),
            str(row["layers"]),
            f"{row['parameters']:,}",
            f"{int(str(row['forward_flops'])) / 1e6:,.1f}",
            " x ".join(map(str, networks[str(row["name"])].input_shape)),
        ]
        for row in rows
    ]
    header = ["model", "layers", "parameters", "forward MFLOP an image", "input H x W x C"]
    print(table(header, cells))
    return 0
