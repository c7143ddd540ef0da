"""Train while everything that can fail does, and end with the very parameters of a quiet run.

What it shows
    A server, its workers and a link before each of them run as processes. While they train, this
    program kills the server and the workers with ``kill -9`` and resets, cuts, stalls and takes
    down the links, at random. Whatever dies is started again with the command it had: the server
    goes on from its newest checkpoint, a new worker takes the place of the one that died, a broken
    connection resumes inside the step. At the end the same training runs once more in peace, and
    both must have come to the same parameters, bit for bit.

Run it::

    python demos/chaos.py                        # a minute or two
    python demos/chaos.py --minutes 10 --workers 4
    python demos/chaos.py --seed 7 --json        # the same dice again

What to look for
    A line for every blow, and one when training goes on: after a broken connection at once and in
    the same step, after the server's death a few steps back. The last lines: how often what was
    broken, and two hashes. If they differed the exit code would be 1.

    ``serve`` and ``work`` below are an ordinary server and worker; nothing in them is about
    failures but ``checkpoints=``, ``resume=True`` and ``retry_s=``. A worker sends each step's
    gradients in one message (``one_message``): its step then changes nothing before it is over, so
    whoever takes a dead worker's place can compute it anew.

What it leaves out
    A supervisor that starts things anew on real machines (systemd, Kubernetes or Ray do), and
    full disks. Which blow falls when follows from ``--seed``, where it hits is up to the moment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

# Before NumPy is loaded, here and in the children: one thread for each matrix product.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

import dynacomm_async as dc
from dynacomm_async.data import Batches, load
from dynacomm_async.link import LinkProcess, add_setting_arguments, settings_from
from dynacomm_async.models import build
from dynacomm_async.schedule import Estimator, Plan
from dynacomm_async.server import Checkpoints
from dynacomm_async.transport import parse_address, run
from dynacomm_async.wire.grid import Grid
from dynacomm_async.worker import FixedPlan, bind_engine, layer_specs, train

ENDLESS = 10**9
HEARTBEAT_S = 3.0
"""How long a connection may be silent before both of its ends give it up."""

# -- the server and a worker, each in a process of its own ---------------------------------------


async def serve(told: Mapping[str, Any]) -> None:
    """Serve the run, from where its newest checkpoint left it."""
    network = build(told["model"])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with Checkpoints(told["folder"]) as checkpoints:
        server = dc.ParameterServer(
            layer_specs(network),
            workers=told["workers"],
            steps=told["steps"] or ENDLESS,
            training=dc.Training(dc.SGD(0.9), dc.Constant(0.02), weight_decay=1e-4),
            initial=network.initialise(told["seed"]),
            initial_statistics=network.initial_statistics(),
            settings={name: told[name] for name in ("model", "data", "batch", "seed")},
            run="chaos",
            listen=told["listen"],
            on_step=lambda record: tell("step", index=record.index, loss=record.loss),
            heartbeat_s=HEARTBEAT_S,
            absence_s=600.0,
            checkpoints=checkpoints,
            checkpoint_every=20,
            resume=True,
        )
        async with server:
            tell("listening", address=str(server.address))
            finished = asyncio.ensure_future(server.finished())
            stopped = asyncio.ensure_future(stop.wait())
            await asyncio.wait([finished, stopped], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if finished.done():
                result = finished.result()
                tell("result", steps=result.steps, sha256=result.parameters_sha256)
                return
            finished.cancel()
            await server.drain()  # back to the last step boundary, which is saved
        state = checkpoints.load()
        assert state is not None
        tell("result", steps=state.step, sha256=dc.parameters_sha256(state.parameters))


def one_message(grid: Grid, estimator: Estimator) -> FixedPlan:
    """Pull and push all layers at once; see the module's docstring."""
    return FixedPlan(Plan.from_cuts("one message", len(grid.layers), [], []))


def work(told: Mapping[str, Any]) -> None:
    """Train until the run ends; everything but the address comes from the server."""
    made: list[Any] = []

    def layers(settings: Mapping[str, Any]) -> tuple[dc.LayerSpec, ...]:
        network = build(settings["model"])
        height, width, channels = network.input_shape
        shape = (height, width, channels)
        learned, _ = load(settings["data"], input_shape=shape, classes=network.classes)
        made.extend([network, learned])
        return layer_specs(network)

    with dc.Session(told["server"], layers, retry_s=120.0, plans=one_message) as session:
        network, learned = made
        workers, slot = session.welcome.workers, session.welcome.slot
        size, seed = session.settings["batch"], session.settings["seed"]
        batches = Batches(len(learned), workers=workers, batch=size, seed=seed)

        def batch(step: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            chosen = batches.indices(slot, step)
            return learned.images[chosen], learned.labels[chosen]

        for _ in train(session, bind_engine(session, network, size), batch, seed=seed):
            pass


def tell(event: str, **fields: Any) -> None:
    """Tell the parent process: a line of JSON."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def be_a_child(role: str, told: Mapping[str, Any]) -> int:
    """Serve or work, for as long as the parent lives."""

    def end_with_parent() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        run(serve(told)) if role == "serve" else work(told)
    except dc.DynaCommError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


# -- what is shown -------------------------------------------------------------------------------


class Screen:
    """Lines for what happens and, at a terminal, one below them for how things stand."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._began = time.monotonic()
        self._width = 0

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *exc: object) -> None:
        self.wipe()

    def say(self, text: str) -> None:
        """Print a line, with the time since the beginning."""
        self.wipe()
        self._stream.write(f"{time.monotonic() - self._began:7.1f} s  {text}\n")
        self._stream.flush()

    def show(self, text: str) -> None:
        """Rewrite the line at the bottom."""
        if self._live:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)

    def wipe(self) -> None:
        """Take the line at the bottom away."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


# -- a run whose processes are started again whenever they die -----------------------------------


class Process:
    """A child that is started again until it has ended well."""

    def __init__(self, name: str, role: str, told: dict[str, Any], screen: Screen) -> None:
        self.name = name
        self.told = told
        self.up = False
        self._role = role
        self._screen = screen
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False

    async def live(self, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        """Run it to its good end; cancelled, kill it."""
        while True:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, __file__, f"--{self._role}={json.dumps(self.told)}"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the parent
            )
            self.up, self._killed = True, False
            words = asyncio.create_task(process.stderr.read())
            try:
                while line := await process.stdout.readline():
                    on_event(json.loads(line))
                code = await process.wait()
            finally:
                self.up = False
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await asyncio.gather(process.wait(), words, return_exceptions=True)
            if code == 0:
                return
            if not self._killed:
                last = words.result().decode(errors="replace").strip().rpartition("\n")[2]
                self._screen.say(f"{self.name} ends by itself and is started anew: {last}")

    def send(self, number: int) -> bool:
        """Send it a signal, if it runs."""
        if not self.up or self._process is None or self._process.returncode is not None:
            return False
        self._killed = self._killed or number == signal.SIGKILL
        self._process.send_signal(number)
        return True


class Run:
    """A server, workers and the links between them.

    Attributes:
        step: of the newest update.
        result: what the server ended with; set when it has.
        blows: how often what was broken, by kind.
        recovery_s: from each blow to the end of the second step after it: what is needed for the
            first may have been under way already.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, steps: int, screen: Screen) -> None:
        self._args = args
        self._screen = screen
        told = {name: getattr(args, name) for name in ("model", "data", "batch", "seed", "workers")}
        self._server = Process(
            "the server",
            "serve",
            {**told, "folder": str(folder), "steps": steps, "listen": "127.0.0.1:0"},
            screen,
        )
        self._steps = steps
        self._workers: list[Process] = []
        self._links: list[LinkProcess] = []
        self._loss: float | None = None
        self._hit: tuple[float, int] | None = None  # when the last blow fell, and in which step
        self._n_since = 0  # steps that have ended since
        self._listening = asyncio.Event()
        self._goes_on = asyncio.Event()
        self.step = -1
        self.result: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self.blows: Counter[str] = Counter()
        self.recovery_s: list[float] = []

    async def train(self, chaos: Callable[[Run], Any] | None) -> Mapping[str, Any]:
        """Run to the end, with ``chaos`` beside it; return the server's result."""
        async with contextlib.AsyncExitStack() as stack:
            tasks = [asyncio.create_task(self._server.live(self._hear))]
            stack.push_async_callback(_end, tasks)
            await self._until(self._listening.wait(), tasks)
            settings = settings_from(self._args)
            for number in range(self._args.workers):
                address = self._server.told["listen"]
                if chaos is not None:
                    link = LinkProcess(settings, parse_address(address), quiet=True)
                    self._links.append(await stack.enter_async_context(link))
                    address = str(link.address)
                worker = Process(f"worker {number}", "work", {"server": address}, self._screen)
                self._workers.append(worker)
                tasks.append(asyncio.create_task(worker.live(lambda event: None)))
            if chaos is not None:
                tasks.append(asyncio.create_task(chaos(self)))
            return await self._until(self.result, tasks)

    async def _until(self, awaited: Any, tasks: list[asyncio.Task[Any]]) -> Any:
        """Return what comes, unless a task fails before."""
        awaited = asyncio.ensure_future(awaited)
        pending: set[asyncio.Future[Any]] = {awaited, *tasks}
        while not awaited.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        return awaited.result()

    def _hear(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "listening":
            self._server.told["listen"] = event["address"]  # in every later life, too
            self._listening.set()
        elif event["event"] == "step":
            self._note_recovery(event["index"])
            self.step, self._loss = event["index"], event["loss"]
            self.show()
        else:
            self.result.set_result({key: event[key] for key in ("steps", "sha256")})

    def _note_recovery(self, step: int) -> None:
        self._n_since += 1
        if self._n_since < 2:
            return
        self._goes_on.set()
        if self._hit is not None:
            (at, before), self._hit = self._hit, None
            took_s = time.monotonic() - at
            self.recovery_s.append(took_s)
            back = f", from step {step - 1} on" if step - 1 <= before else ""
            self._screen.say(f"    training goes on after {took_s:.1f} s{back}")

    def show(self) -> None:
        """Say how things stand."""
        workers = "".join(".x"[not worker.up] for worker in self._workers)
        goal = f"/{self._steps}" if self._steps else ""
        loss = "" if self._loss is None else f"  loss {self._loss:.4f}"
        server = "up" if self._server.up else "DOWN"
        blows = sum(self.blows.values())
        self._screen.show(
            f"step {self.step + 1}{goal}{loss}  server {server}  workers {workers}  {blows} blows"
        )

    # -- what chaos does --

    async def strike(self, numbers: random.Random) -> None:
        """Deal one blow."""
        target = numbers.randrange(len(self._links))
        seconds = numbers.choice([0.2, 1.0, 4.0])
        kind = numbers.choice(["server", "worker", "worker", "reset", "cut", "stall", "down"])
        if kind == "server":
            done = self._server.send(signal.SIGKILL)
            text = "kill -9 the server"
        elif kind == "worker":
            done = self._workers[target].send(signal.SIGKILL)
            text = f"kill -9 worker {target}"
        else:
            lasts = f",for={seconds}s" if kind in ("stall", "down") else ""
            done = bool(await self._links[target].fire(kind + lasts))
            text = f"{kind} link {target}" + (f" for {seconds:g} s" if lasts else "")
        if done:
            self.blows[kind] += 1
            self._hit, self._n_since = (time.monotonic(), self.step), 0
            self._goes_on.clear()
            self._screen.say(f"step {self.step + 1}: {text}")
            self.show()

    async def goes_on(self) -> None:
        """Return when training has got over the last blow."""
        await self._goes_on.wait()

    def drain(self) -> None:
        """Have the server stop at the next step boundary."""
        self._server.send(signal.SIGTERM)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def rage(run: Run, args: argparse.Namespace) -> None:
    """Deal blows at random, each when training has got over the last, until it is time to end."""
    numbers = random.Random(args.seed)
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    while deadline is None or time.monotonic() < deadline:
        await run.goes_on()
        await asyncio.sleep(numbers.expovariate(1 / args.every))
        if args.steps is not None and run.step + 3 > args.steps:
            return  # the run is about to end
        if args.blows is not None and sum(run.blows.values()) >= args.blows:
            break
        await run.strike(numbers)
    if deadline is not None:
        await asyncio.sleep(deadline - time.monotonic())
        await run.goes_on()
        run.drain()


async def play(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Train through chaos and in peace; return what came of it."""
    with tempfile.TemporaryDirectory(prefix="dynacomm-chaos-") as folder, screen:
        screen.say(f"seed {args.seed}: {args.workers} workers train {args.model} on {args.data}")
        wild = Run(args, Path(folder, "wild"), args.steps or 0, screen)
        disturbed = await wild.train(lambda run: rage(run, args))
        screen.say(f"trained through {sum(wild.blows.values())} blows; now once more in peace")
        calm = Run(args, Path(folder, "calm"), disturbed["steps"], screen)
        undisturbed = await calm.train(None)
    return {
        "seed": args.seed,
        "blows": dict(wild.blows),
        "longest_recovery_s": max(wild.recovery_s, default=None),
        "disturbed": disturbed,
        "undisturbed": undisturbed,
        "identical": disturbed == undisturbed,
    }


def print_result(found: Mapping[str, Any]) -> None:
    """Say how often what was broken, and whether it made a difference."""
    blows = Counter(found["blows"])
    cuts = sum(blows[kind] for kind in ("reset", "cut", "stall", "down"))
    print(
        f"\nkilled the server {blows['server']} times and workers {blows['worker']} times, "
        f"broke or stalled links {cuts} times; training went on after "
        f"{found['longest_recovery_s'] or 0:.1f} s at most"
    )
    for name in ("disturbed", "undisturbed"):
        print(f"{name:>11}: {found[name]['steps']} steps, parameters {found[name]['sha256']}")
    print("identical, bit for bit" if found["identical"] else "NOT identical")


def main() -> int:
    """Read the options and play."""
    parser = argparse.ArgumentParser(
        description="Train while server, workers and links are killed at random; compare with an "
        "undisturbed run.",
        epilog="example: python demos/chaos.py --minutes 5 --workers 3 --seed 7",
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="of blows and model (default: random)"
    )
    parser.add_argument("--steps", type=int, metavar="K", help="train so long (default: 600)")
    parser.add_argument("--minutes", type=float, metavar="M", help="or rage for so long")
    parser.add_argument(
        "--every", type=float, default=1.5, metavar="SECONDS", help="between blows (default: 1.5)"
    )
    parser.add_argument("--blows", type=int, metavar="N", help="at most so many")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--model", default="lenet", help="see dynacomm models (default: lenet)")
    parser.add_argument("--data", default="digits", help="or synthetic (default: digits)")
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="(default: 32)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    add_setting_arguments(parser)
    parser.set_defaults(bandwidth="100mbit", delay="2ms")
    args = parser.parse_args()
    for role in ("serve", "work"):
        if getattr(args, role) is not None:
            return be_a_child(role, getattr(args, role))
    if args.steps is not None and args.minutes is not None:
        parser.error("--steps and --minutes: give one")
    if min(args.workers, args.batch, args.steps or 1) < 1 or not args.every > 0:
        parser.error("--workers, --batch, --steps and --every must be above 0")
    if args.steps is None and args.minutes is None:
        args.steps = 600
    if args.seed is None:
        args.seed = random.randrange(10**6)
    found = run(play(args, Screen(sys.stderr)))
    if args.json:
        print(json.dumps(found))
    else:
        print_result(found)
    return 0 if found["identical"] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except dc.DynaCommError as failure:
        sys.exit(f"error: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
