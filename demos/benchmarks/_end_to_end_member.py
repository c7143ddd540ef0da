"""One process of a system that ``end_to_end.py`` measures: a worker or a server, or the profile.

Reads one line of JSON that says what it is from standard input, then commands; writes lines of JSON
to standard output. A worker trains so many steps when it is told to, and waits in between while
other systems have their turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch and NumPy are loaded
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import torch
from _end_to_end_models import RATE, LayerTime, Task, build, imitate, measure

Spec = Mapping[str, Any]


def say(**event: Any) -> None:
    """Write a line of JSON."""
    print(json.dumps(event), flush=True)


def make_task(spec: Spec) -> Task:
    """Return the model and data that the specification names."""
    if spec["imitated"]:
        return imitate([LayerTime(*layer) for layer in spec["layers"]])
    return build(spec["model"], spec["batch"], quick=spec["quick"])


class Gate:
    """Lets a worker through as many steps as the one who measures wants, and reports on them.

    Attributes:
        explain: returns what more there is to say with each report.
    """

    def __init__(self) -> None:
        self.explain: Callable[[], str] = str
        self._begun: list[float] = []
        self._losses: list[float] = []
        self._left = 0

    def begin(self) -> None:
        """A step begins, or waits here until it is wanted."""
        self._begun.append(time.perf_counter())
        if not self._left:
            steps = [after - at for at, after in pairwise(self._begun)]
            say(steps_s=steps, losses=self._losses, explanation=self.explain())
            command = sys.stdin.readline()
            if not command:  # whoever measures is gone
                sys.exit(1)
            self._left = int(command)
            self._begun, self._losses = [time.perf_counter()], []
        self._left -= 1

    def take_loss(self, loss: torch.Tensor) -> None:
        """Note what the step's loss was."""
        self._losses.append(loss.item())


# -- ours ----------------------------------------------------------------------------------------


def serve_ours(spec: Spec) -> None:
    """Be our server."""
    import dynacomm_async as dc
    from dynacomm_async.transport import run

    async def main() -> None:
        training = dc.Training(dc.SGD(), dc.Constant(RATE))
        listen = f"{spec['host']}:{spec['port']}"
        async with dc.ParameterServer(
            None,
            workers=spec["workers"],
            steps=spec["steps"],
            training=training,
            listen=listen,
            insecure=True,
        ) as server:
            say(ready=True)
            await server.finished()

    run(main())


def work_ours(spec: Spec, task: Task, gate: Gate) -> None:
    """Train through the adapter."""
    from dynacomm_async.adapters.torch import TorchSession
    from dynacomm_async.observe import explain_worker

    address = f"{spec['host']}:{spec['port']}"
    model = task.model
    with TorchSession(address, model, task.sample, strategy=spec["variant"]) as session:
        for step in session.steps():
            if spec["explain"] and step.index == spec["steps"] - 1:
                gate.explain = lambda: explain_worker(session.session.describe())
            gate.begin()
            loss = task.loss(model, step.index, session.slot)
            step.report(loss, spec["batch"])
            loss.backward()
            gate.take_loss(loss)


# -- PyTorch's DistributedDataParallel -----------------------------------------------------------


def work_ddp(spec: Spec, task: Task, gate: Gate) -> None:
    """Train with all-reduce over gloo; variant: ``default``, or a number of MiB."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{spec['first_worker']}:{spec['port']}",
        rank=spec["rank"],
        world_size=spec["workers"],
    )
    cap = None if spec["variant"] == "default" else float(spec["variant"])
    model = DistributedDataParallel(
        task.model, bucket_cap_mb=cap, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(spec["steps"]):
        gate.begin()
        optimizer.zero_grad()
        loss = task.loss(model, step, spec["rank"])
        loss.backward()
        optimizer.step()
        gate.take_loss(loss)
    dist.destroy_process_group()


# -- Flower --------------------------------------------------------------------------------------


def serve_flower(spec: Spec) -> None:
    """Be Flower's server: federated averaging, one round a step."""
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerConfig, start_server
    from flwr.server.strategy import FedAvg

    values = [value.detach().numpy() for value in make_task(spec).model.parameters()]
    n_workers = spec["workers"]
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=n_workers,
        min_available_clients=n_workers,
        min_evaluate_clients=n_workers,
        accept_failures=False,
        initial_parameters=ndarrays_to_parameters(values),
        on_fit_config_fn=lambda number: {"step": number - 1},
    )
    say(ready=True)
    start_server(
        server_address=f"{spec['host']}:{spec['port']}",
        config=ServerConfig(num_rounds=spec["steps"]),
        strategy=strategy,
    )


def work_flower(spec: Spec, task: Task, gate: Gate) -> None:
    """Take one step on each round's parameters and send the result back."""
    from flwr.client import NumPyClient, start_client

    parameters = list(task.model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=RATE)

    class Client(NumPyClient):
        def fit(self, values: list[Any], config: dict[str, Any]) -> Any:
            gate.begin()
            with torch.no_grad():
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(torch.from_numpy(value))
            optimizer.zero_grad()
            loss = task.loss(task.model, int(config["step"]), spec["rank"])
            loss.backward()
            optimizer.step()
            gate.take_loss(loss)
            return [parameter.detach().numpy() for parameter in parameters], spec["batch"], {}

    start_client(server_address=f"{spec['host']}:{spec['port']}", client=Client().to_client())


def profile(spec: Spec) -> None:
    """Say how long each layer computes, and what a step without communication costs."""
    task = build(spec["model"], spec["batch"], quick=spec["quick"])
    layers = measure(task, spec["rounds"])
    if spec["imitated"]:
        task = imitate(layers)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=RATE)
    cpu_s = []
    for step in range(spec["rounds"]):
        began_s = time.process_time()
        optimizer.zero_grad()
        task.loss(task.model, step, 0).backward()
        cpu_s.append(time.process_time() - began_s)
    say(layers=layers, cpu_s=min(cpu_s))


SERVE = {"ours": serve_ours, "flower": serve_flower}
WORK = {"ours": work_ours, "ddp": work_ddp, "flower": work_flower}


def main() -> None:
    """Be what standard input says."""
    torch.set_num_threads(1)
    spec = json.loads(sys.stdin.readline())
    if spec["role"] == "profile":
        profile(spec)
    elif spec["role"] == "server":
        SERVE[spec["system"]](spec)
    else:
        WORK[spec["system"]](spec, make_task(spec), Gate())


if __name__ == "__main__":
    main()
