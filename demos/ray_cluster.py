"""Train on a Ray cluster that loses a worker, and then the node on which the server is.

What it shows
    ``dynacomm_async.adapters.ray.train`` places a parameter server and workers as actors on a Ray
    cluster: two functions of yours, one that makes the server and one that works, and how many
    workers there are. Ray starts anew what is lost. A worker comes back empty and takes the place
    of the lost one; the server goes on from its newest checkpoint, on another node if need be, and
    the workers' sessions ask for its new address.

Run it::

    python demos/ray_cluster.py                 # about a minute
    python demos/ray_cluster.py --workers 3 --steps 600

    The cluster is a real one on this machine: a head and three nodes, each with its own scheduler
    and object store, as ``ray.cluster_utils`` starts them for tests. On a cluster of yours the same
    is one command, and the folder one that all nodes share::

        dynacomm launch --on ray --workers 3 --checkpoint-dir /shared/run-1 --insecure

What to look for
    The same run twice: first nothing happens; then a worker's process is killed (``kill -9``), and
    later the server's node with everything that runs there. The second takes longer, by the time
    that Ray needs to notice and to start processes. The parameters are the same, bit for bit: each
    step is computed again from what it was computed from before.

What it leaves out
    Resources (``worker_options={"resources": {"edge": 1}}``), a limit to restarts, and resuming
    after the driver itself was stopped (``resume=True``): see ``help`` of the module. Without Ray
    it says so and ends; without scikit-learn, which brings the digits, it trains on synthetic
    images.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: one core computes, one talks
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError:
    print('Ray is not installed: pip install "dynacomm_async[ray]"; nothing to show without')
    sys.exit(0)

import dynacomm_async as dc
from dynacomm_async.adapters.ray import Placed, ServerPlace, train
from dynacomm_async.data import Batches, load
from dynacomm_async.models import build
from dynacomm_async.worker import bind_engine, layer_specs, train as train_engine

BATCH, SEED, NODES = 16, 0, 3
DATA = "digits" if find_spec("sklearn") else "synthetic"
SCREEN = sys.stdout


# -- what runs on the nodes: a server and workers of your own ------------------------------------


def make_server(steps: int, **options: Any) -> dc.ParameterServer:
    """Make the server; ``options`` are the adapter's: where it listens, its checkpoints and so on.

    Called again after a loss: whatever it does must come out the same.
    """
    network = build("lenet")
    return dc.ParameterServer(
        layer_specs(network),
        steps=steps,
        training=dc.Training(dc.SGD(0.9), dc.Constant(0.02), weight_decay=1e-4),
        initial=network.initialise(SEED),
        checkpoint_every=20,
        **options,
    )


def work(server: ServerPlace) -> None:
    """Work from joining to the end of the run; called again after a loss, here or elsewhere.

    PyTorch or your own code would do the same with ``TorchSession(server, model, sample)`` or
    ``dc.Session(server, layers)``.
    """
    network = build("lenet")
    learned, _ = load(DATA, input_shape=network.input_shape, classes=network.classes)
    with dc.Session(server, layer_specs(network)) as session:
        rank, workers = session.welcome.slot, session.welcome.workers
        batches = Batches(len(learned), workers=workers, batch=BATCH, seed=SEED)

        def batch(step: int) -> tuple[Any, Any]:  # of rank and step alone: a step may come again
            chosen = batches.indices(rank, step)
            return learned.images[chosen], learned.labels[chosen]

        for _ in train_engine(session, bind_engine(session, network, BATCH), batch):
            pass


# -- the driver ----------------------------------------------------------------------------------


def tell(text: str, end: str = "\n") -> None:
    """Print for people, beside what Ray prints (see ``main``)."""
    print(text, end=end, file=SCREEN, flush=True)


class Screen:
    """Lines of text, and below them one that is rewritten: how far the run is."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._began = time.monotonic()
        self._live = SCREEN.isatty()

    def say(self, text: object) -> None:
        """Add a line, after the seconds since the run began."""
        tell(f"{self._start}{time.monotonic() - self._began:6.1f} s  {text}")

    def show(self, record: dc.StepRecord) -> None:
        """Show a step, if anybody watches."""
        if self._live:
            line = f"{self._start}          step {record.index + 1}/{self._steps}"
            tell(f"{line}  loss {record.loss:.4f}", end="")

    @property
    def _start(self) -> str:
        return "\r\x1b[K" if self._live else ""


class Misfortune:
    """Kills a worker's process after a third of the run, and the server's node after two.

    Called with each step in the driver's process, while the run goes on.
    """

    def __init__(self, cluster: Cluster, steps: int, screen: Screen) -> None:
        self._cluster = cluster
        self._steps = steps
        self._screen = screen
        self._placed: dict[str, Placed] = {}
        self._left = [self.kill_server_node, self.kill_worker]

    def note(self, news: Placed | str) -> None:
        """Keep who is where."""
        if isinstance(news, Placed):
            self._placed[news.who] = news

    def strike(self, record: dc.StepRecord) -> None:
        """Do what is due at this step."""
        if self._left and record.index >= self._steps * (3 - len(self._left)) // 3:
            self._left.pop()(record.index)

    def kill_worker(self, step: int) -> None:
        """End a worker's process as if it had crashed."""
        worker = self._placed["worker actor 0"]
        self._screen.say(f"step {step}: kill -9 of process {worker.pid}, {worker.who}")
        os.kill(worker.pid, signal.SIGKILL)

    def kill_server_node(self, step: int) -> None:
        """End everything on the server's node as if its power were gone."""
        lost = self._placed["server"].node_id
        also = [who for who, placed in self._placed.items() if placed.node_id == lost]
        self._screen.say(f"step {step}: node {lost[:8]} is lost, with {', '.join(sorted(also))}")
        (node,) = (node for node in self._cluster.worker_nodes if node.node_id == lost)
        self._cluster.remove_node(node, allow_graceful=False)


def start_cluster(workers: int) -> Cluster:
    """Start a head and nodes, each of which could take the whole run."""
    small = {"object_store_memory": 80 * 2**20}  # nothing large goes through Ray
    # By default a node is dead for Ray after some 20 seconds of silence.
    watch = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": watch, **small}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(NODES):
        cluster.add_node(num_cpus=workers + 1, **small)
    return cluster


def run_once(args: argparse.Namespace, cluster: Cluster, folder: Path, disturbed: bool) -> str:
    """Train once; return the hash of the parameters."""
    screen = Screen(args.steps)
    misfortune = Misfortune(cluster, args.steps, screen)

    def on_step(record: dc.StepRecord) -> None:
        screen.show(record)
        if disturbed:
            misfortune.strike(record)

    def on_news(news: Placed | str) -> None:
        screen.say(news)
        misfortune.note(news)

    result = train(
        partial(make_server, args.steps),
        work,
        workers=args.workers,
        checkpoint_dir=folder,
        insecure=True,  # the nodes are other machines, for all that the server knows
        on_step=on_step,
        on_news=on_news,
    )
    digest = result.parameters_sha256[:16]
    screen.say(f"{args.steps} steps, loss {result.losses[-1]:.4f}, parameters sha256 {digest}")
    return digest


def main() -> None:
    """Train twice, and compare."""
    parser = argparse.ArgumentParser(
        description="Train on a Ray cluster that loses a worker and a node.",
        epilog="example: python demos/ray_cluster.py --workers 3 --steps 600",
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--steps", type=int, default=300, metavar="K", help="(default: 300)")
    args = parser.parse_args()
    # Ray prints pages of its own about each loss; the adapter's news says it in a line.
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        calm, rough = run_twice(args)
    if calm != rough:
        sys.exit("\nthe parameters are NOT the same; please report this as a bug")
    tell("\nthe parameters are the same, bit for bit")


def run_twice(args: argparse.Namespace) -> tuple[str, str]:
    """Train without and with losses, on a cluster of our own; return the hashes."""
    tell(f"starting a Ray cluster of {NODES} nodes on this machine ...")
    cluster = start_cluster(args.workers)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        with tempfile.TemporaryDirectory() as folder:
            tell("\na run that nothing disturbs:")
            calm = run_once(args, cluster, Path(folder, "calm"), disturbed=False)
            tell("\nthe same, while a worker is killed and a node is lost:")
            rough = run_once(args, cluster, Path(folder, "rough"), disturbed=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return calm, rough


if __name__ == "__main__":
    try:
        main()
    except dc.DynaCommError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
