"""``python -m dynacomm_async.link``: a link as a process of its own."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from dynacomm_async.errors import DynaCommError
from dynacomm_async.link.options import add_arguments
from dynacomm_async.link.process import run_link


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dynacomm_async.link",
        description="Imitate a slow link between TCP clients and one server.",
        epilog="example: python -m dynacomm_async.link --listen 127.0.0.1:7071 "
        "--to 127.0.0.1:7070 --bandwidth 100mbit --bandwidth-up 20mbit --delay 5ms "
        "--fault reset:up@bytes=100000",
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run_link(args)
    except DynaCommError as error:
        print(f"link: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the link was up: then it ends in order
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
