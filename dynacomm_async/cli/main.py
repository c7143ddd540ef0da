"""``dynacomm``: finds the command, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from dynacomm_async.cli.signals import end_at_once, exit_code
from dynacomm_async.errors import DynaCommError

__all__ = ["main", "run_child"]

_COMMANDS = {
    "demo": "train on this machine over an emulated slow link, and compare the strategies",
    "serve": "run the parameter server of a training run",
    "work": "run one worker of a training run",
    "launch": "be the server or a worker of a job on a cluster, by rank",
    "train": "run a server and workers on this machine",
    "compare": "train under several strategies in turn and compare measured with predicted steps",
    "trace": "join what the processes of a run have recorded into one trace",
    "plan": "plan a step from a cost table",
    "sweep": "compare the strategies on other links, batches and workers, without training",
    "export": "write trained weights as PyTorch reads them",
    "profile": "measure a model's layers and a link, write a cost table",
    "models": "list the models",
    "link": "imitate a slow link between workers and a server",
}


_CODES = (
    "exit codes: 0 success, 1 a failure that standard error explains in a line, 2 options that\n"
    "do not exist or are no numbers where they have to be, 130 after Ctrl-C, 143 after SIGTERM"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 only on success.

    ``dynacomm --help`` lists the codes. Signals are seen to only where this is the program,
    that is without ``argv``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--events" in arguments:
        _die_with_parent()
    elif argv is None:
        end_at_once()
    # One BLAS thread: more of them fight with the thread that sends and receives. This has to be
    # said before NumPy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    name = arguments[0] if arguments else ""
    if name not in _COMMANDS:
        return _without_command(name)
    module = importlib.import_module(f"dynacomm_async.cli.{name}")
    from dynacomm_async.cli.parser import Parser  # not before signals are seen to

    parser = Parser(
        prog=f"dynacomm {name}",
        description=_COMMANDS[name][0].upper() + _COMMANDS[name][1:] + ".",
        epilog=f"example: {module.EXAMPLE}",
    )
    module.add_arguments(parser)
    args = parser.parse_args(arguments[1:])
    return _run(name, partial(module.command, args))


def run_child(name: str, command: Callable[[], int]) -> int:
    """Run the command of a child process, which ends with its parent."""
    _die_with_parent()
    return _run(name, command)


def _die_with_parent() -> None:
    from dynacomm_async.cli.output import die_with_parent

    die_with_parent()


def _run(name: str, command: Callable[[], int]) -> int:
    try:
        return command()
    except KeyboardInterrupt:
        return exit_code()
    except (DynaCommError, OSError) as error:
        print(f"dynacomm {name}: error: {error}", file=sys.stderr)
        return 1


def _without_command(name: str) -> int:
    """Help, the version, or what was probably meant."""
    if name in ("-V", "--version"):
        from dynacomm_async import __version__

        print(f"dynacomm {__version__}")
        return 0
    if name in ("", "-h", "--help"):
        width = max(map(len, _COMMANDS))
        lines = [f"  {command.ljust(width)}  {what}" for command, what in _COMMANDS.items()]
        print("usage: dynacomm COMMAND [options]\n\ncommands:\n" + "\n".join(lines))
        print(
            f"\n`dynacomm COMMAND --help` explains a command.  example: dynacomm demo\n\n{_CODES}"
        )
        return 0 if name else 2
    from difflib import get_close_matches

    close = get_close_matches(name, _COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(_COMMANDS)}"
    print(f"dynacomm: error: no command {name!r}; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
