"""Draw the comparison of DynaComm's paper from this library's cost model, and from measurements.

What it shows
    VGG-19, GoogLeNet, Inception-v4 and ResNet-152 as cost tables (their layers are defined in
    ``dynacomm_async.models``), and what every strategy makes of them: a step's time relative to
    sequential by network, batch and bandwidth; how many workers' worth of work N workers do when
    they share the server's link; and how long planning takes beside the dynamic programme that
    the paper describes (Cai et al., IEEE JSAC 40(2), 2022, arXiv 2101.07968). With ``--measure``
    two small networks train for real over an emulated link under every strategy.

Run it::

    python demos/paper.py                            # ten seconds, into the folder paper/
    python demos/paper.py --measure                  # a minute or two more: processes and links
    python demos/paper.py --flops 5e12 --bandwidth 10gbit --overhead 0.5ms -o elsewhere

What to look for
    Of the strategies with a barrier between steps DynaComm's line is nowhere above another: it is
    the optimum of each phase. What it gains is most where communication takes as long as
    computing, and little where either is small. Below it joint, which needs no barrier, comes close
    to the lower bound, below which no schedule can be. With
    ``--measure`` the loss curves lie on each other, bit for bit: a schedule changes when numbers
    travel, not what they are.

What it leaves out
    The paper's own figures: they were measured on other machines. The cost model takes operations
    as the only cost of computing, the same for all layers, and backward as twice the forward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dynacomm_async.cli import compare
from dynacomm_async.cli.links import fleet_from
from dynacomm_async.errors import ConfigError
from dynacomm_async.link.units import parse_duration, parse_rate
from dynacomm_async.models import build, costs_of
from dynacomm_async.nn import Network
from dynacomm_async.observe import Canvas, strategy_colours
from dynacomm_async.observe.canvas import format_rate
from dynacomm_async.schedule import PLANNERS, Costs, make_plan
from dynacomm_async.schedule.whatif import Verdict, judge, with_bandwidth, with_batch, with_workers
from dynacomm_async.testing import solve_forward_cubic, solve_push_cubic

NETWORKS = {
    "vgg19": "VGG-19",
    "googlenet": "GoogLeNet",
    "inception_v4": "Inception-v4",
    "resnet152": "ResNet-152",
}
BATCH = 32
BATCHES = (4, 8, 16, 32, 64, 128)
SPEEDS = (0.125, 0.25, 0.5, 1, 2, 4, 8)
WORKERS = (1, 2, 3, 4, 6, 8)
SHARED_SPEED = 10  # the server's link, relative to a worker's
COLOURS = strategy_colours(PLANNERS)

MEASURED = {
    "resnet20": ["--data", "synthetic:256:32", "--batch", "16", "--bandwidth", "200mbit"],
    "vgg_small": ["--data", "synthetic:256:32", "--batch", "16", "--bandwidth", "400mbit"],
}
MEASURED_LINK = ["--workers", "1", "--delay", "2ms", "--overhead", "2ms", "--rate", "0.003"]


@dataclass(frozen=True)
class Setting:
    """The machine and the link that all comparisons start from."""

    flops_per_s: float
    bytes_per_s: float
    overhead_ns: int

    def costs(self, network: Network) -> Costs:
        """Return the cost table of a network at this setting."""
        return costs_of(
            network,
            batch=BATCH,
            flops_per_s=self.flops_per_s,
            down_bytes_per_s=self.bytes_per_s,
            overhead_ns=self.overhead_ns,
        )


@dataclass(frozen=True)
class Planning:
    """How long one network's step takes to plan."""

    n_layers: int
    linear_s: float
    cubic_s: float

    @classmethod
    def of(cls, costs: Costs) -> Planning:
        """Measure both methods."""
        linear_s = clock_s(partial(make_plan, "dynacomm", costs))
        return cls(len(costs.layers), linear_s, clock_s(partial(solve_cubic, costs)))


def relative(verdict: Verdict) -> dict[str, float]:
    """Return each strategy's step, and the bound, relative to sequential's."""
    plainest_ns = verdict.steps_ns["sequential"]
    steps = {name: step_ns / plainest_ns for name, step_ns in verdict.steps_ns.items()}
    return {**steps, "lower bound": verdict.lower_bound_ns / plainest_ns}


def scale_out(costs: Costs) -> dict[str, list[float]]:
    """Return the work that 1, 2, ... workers do on one shared link, under each strategy.

    One is what a single worker does that never waits for a link.
    """
    alone_ns = sum(layer.forward_ns + layer.backward_ns for layer in costs.layers)
    verdicts = {workers: judge(with_workers(costs, workers)) for workers in WORKERS}
    return {
        name: [workers * alone_ns / verdict.steps_ns[name] for workers, verdict in verdicts.items()]
        for name in PLANNERS
    }


def solve_cubic(costs: Costs) -> None:
    """Plan both directions as the paper does."""
    layers = costs.layers
    pulls, pushes = [layer.pull_ns for layer in layers], [layer.push_ns for layer in layers]
    solve_forward_cubic([layer.forward_ns for layer in layers], pulls, costs.overhead_down_ns)
    solve_push_cubic([layer.backward_ns for layer in layers], pushes, costs.overhead_up_ns)


def clock_s(function: Callable[[], object]) -> float:
    """Return the shortest of a few runs; of one run if that is long."""
    shortest_s, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.1:
        start = time.perf_counter()
        function()
        shortest_s = min(shortest_s, time.perf_counter() - start)
    return shortest_s


def draw_networks(verdicts: Mapping[str, Verdict], title: str, path: Path) -> None:
    """Bars by network; a dash at the lower bound."""
    canvas = Canvas(8.2, 3.6)
    axes = canvas.axes[0][0]
    width = 0.8 / len(PLANNERS)
    for place, verdict in enumerate(verdicts.values()):
        heights = relative(verdict)
        for index, name in enumerate(PLANNERS):
            x = place + (index - (len(PLANNERS) - 1) / 2) * width
            label = name if place == 0 else None
            axes.bar(x, heights[name], width=0.94 * width, color=COLOURS[name], label=label)
        axes.hlines(
            heights["lower bound"],
            place - 0.4,
            place + 0.4,
            color="black",
            linestyle=":",
            label="lower bound" if place == 0 else None,
        )
    axes.set_xticks(range(len(verdicts)), [NETWORKS[name] for name in verdicts])
    finish(canvas, title)
    canvas.save(path)


def draw_lines(
    verdicts: Mapping[str, Sequence[Verdict]],
    ticks: Sequence[str],
    setting: str,
    title: str,
    path: Path,
) -> None:
    """Lines over a setting, one panel for each network."""
    places = range(len(ticks))
    canvas = Canvas(8.2, 5.4, 2, 2, sharex=True, sharey=True)
    panels = [axes for line in canvas.axes for axes in line]
    for axes, (network, points) in zip(panels, verdicts.items(), strict=True):
        heights = [relative(verdict) for verdict in points]
        for index, name in enumerate(PLANNERS):
            draw_line(axes, places, [height[name] for height in heights], name, index)
        bound = [height["lower bound"] for height in heights]
        axes.plot(bound, color="black", linestyle=":", linewidth=1.2, label="lower bound")
        axes.set_title(NETWORKS[network], fontsize=10)
        axes.set_xticks(places, ticks)
    for axes in canvas.axes[-1]:
        axes.set_xlabel(setting, fontsize=9)
    finish(canvas, title)
    canvas.save(path)


def draw_line(
    axes: Any, places: Sequence[int], heights: Sequence[float], name: str, index: int
) -> None:
    """One strategy; those drawn first are wider, so that lines on each other can be told apart."""
    wider = len(PLANNERS) - 1 - index
    axes.plot(
        places,
        heights,
        color=COLOURS[name],
        linewidth=1.4 + 0.6 * wider,
        marker="o",
        markersize=3 + 0.9 * wider,
        label=name,
    )


def finish(canvas: Canvas, title: str, what: str = "step time relative to sequential") -> None:
    """Grid, limits, title and one legend for all panels."""
    for line in canvas.axes:
        for axes in line:
            if axes.get_yscale() == "linear":
                axes.set_ylim(bottom=0)
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=9)
    canvas.figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    canvas.figure.supylabel(what, fontsize=9)
    handles, labels = canvas.axes[0][0].get_legend_handles_labels()
    canvas.figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 4),
        fontsize=9,
        frameon=False,
    )


def draw_workers(tables: Mapping[str, Costs], title: str, path: Path) -> None:
    """How much work N workers do behind one link of the server's."""
    canvas = Canvas(8.2, 5.4, 2, 2, sharex=True, sharey=True)
    panels = [axes for line in canvas.axes for axes in line]
    for axes, (network, costs) in zip(panels, tables.items(), strict=True):
        for index, (name, work) in enumerate(scale_out(costs).items()):
            draw_line(axes, WORKERS, work, name, index)
        label = "without a network"
        axes.plot(WORKERS, WORKERS, color="black", linestyle=":", linewidth=1.2, label=label)
        axes.set_title(NETWORKS[network], fontsize=10)
        axes.set_xticks(WORKERS)
    for axes in canvas.axes[-1]:
        axes.set_xlabel("workers", fontsize=9)
    finish(canvas, title, "work, in workers that never wait")
    canvas.save(path)


def draw_planning(times: Mapping[str, Planning], path: Path) -> None:
    """What planning one step costs, on a logarithmic axis."""
    canvas = Canvas(8.2, 3.6)
    axes = canvas.axes[0][0]
    for shift, name, colour in ((-0.2, "linear_s", "#0072B2"), (0.2, "cubic_s", "#D55E00")):
        heights = [1e3 * getattr(planning, name) for planning in times.values()]
        places = [place + shift for place in range(len(times))]
        label = "this library, O(L)" if name == "linear_s" else "dynamic programme, O(L³)"
        bars = axes.bar(places, heights, width=0.38, color=colour, label=label)
        axes.bar_label(bars, [f"{height:,.3g} ms" for height in heights], fontsize=8)
    ticks = [f"{NETWORKS[name]}\n{planning.n_layers} layers" for name, planning in times.items()]
    axes.set_xticks(range(len(times)), ticks)
    axes.set_yscale("log")
    finish(canvas, "Planning one step, both directions, in pure Python", "ms")
    canvas.save(path)


def draw_measured(found: Mapping[str, compare.Comparison], path: Path) -> None:
    """Above: measured and predicted steps. Below: the loss of every strategy."""
    canvas = Canvas(8.2, 5.8, 2, len(found))
    for (network, comparison), bars, curves in zip(found.items(), *canvas.axes, strict=True):
        plainest_s = comparison.strategies["sequential"]["step_s"]
        for index, name in enumerate(PLANNERS):
            result = comparison.strategies[name]
            step, predicted = result["step_s"] / plainest_s, result["predicted_s"] / plainest_s
            bars.bar(index, step, color=COLOURS[name], label=name)
            bars.hlines(predicted, index - 0.4, index + 0.4, color="black", linewidth=2)
            # Every strategy draws its own dashes: where losses are equal, they make one line.
            dashes = (5 * index, (5, 5 * (len(PLANNERS) - 1)))
            curves.plot(result["loss"], color=COLOURS[name], linewidth=2.5, linestyle=dashes)
        bars.set_title(f"{network}: measured step; black: predicted", fontsize=10)
        bars.set_xticks([])
        bars.set_ylabel("relative to sequential", fontsize=9)
        curves.set_title(f"{network}: the loss of every strategy, on one line", fontsize=10)
        curves.set_xlabel("step", fontsize=9)
        curves.set_ylabel("loss", fontsize=9)
        curves.xaxis.get_major_locator().set_params(integer=True)
    finish(canvas, "", "")
    canvas.save(path)


def measure(network: str, steps: int) -> compare.Comparison:
    """Train under every strategy in turns, as ``dynacomm compare`` does."""
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    options = [*MEASURED[network], *MEASURED_LINK, "--steps", str(steps)]
    args = parser.parse_args(["--model", network, *options])
    return compare.compare(args, list(PLANNERS), fleet_from(args))


def describe(verdicts: Mapping[str, Verdict], times: Mapping[str, Planning]) -> str:
    """Return the comparison by network as a table."""
    names = [*PLANNERS, "lower bound"]
    lines = [f"{'':<14}{'sequential':>12}  " + "".join(f"{name:>12}" for name in names[1:])]
    lines[0] += f"{'plan':>11}{'O(L³)':>12}"
    for network, verdict in verdicts.items():
        heights, planning = relative(verdict), times[network]
        step_s = verdict.steps_ns["sequential"] / 1e9
        cells = "".join(f"{heights[name]:>12.3f}" for name in names[1:])
        costs = f"{1e3 * planning.linear_s:>8.3f} ms{1e3 * planning.cubic_s:>9,.0f} ms"
        lines.append(f"{NETWORKS[network]:<14}{step_s:>10.3f} s  {cells}{costs}")
    return "\n".join(lines)


def describe_measured(found: Mapping[str, compare.Comparison]) -> str:
    """Return measured and predicted steps relative to sequential's measured one."""
    lines = [f"{'measured / predicted':<22}" + "".join(f"{name:>15}" for name in PLANNERS)]
    for network, comparison in found.items():
        plainest_s = comparison.strategies["sequential"]["step_s"]
        cells = ""
        for result in comparison.strategies.values():
            pair = result["step_s"] / plainest_s, result["predicted_s"] / plainest_s
            cells += f"{'{:.3f} / {:.3f}'.format(*pair):>15}"
        hashes = {result["parameters_sha256"] for result in comparison.strategies.values()}
        same = "the same parameters and losses" if len(hashes) == 1 else "DIFFERENT parameters"
        lines.append(f"{network:<22}{cells}   {same}")
    return "\n".join(lines)


def draw_model(setting: Setting, folder: Path) -> str:
    """Draw everything that follows from the cost model; return the table."""
    tables = {name: setting.costs(build(name)) for name in NETWORKS}
    link = f"{format_rate(setting.bytes_per_s)}, {setting.overhead_ns / 1e6:g} ms a message"
    machine = f"{setting.flops_per_s / 1e12:g} TFLOP/s"
    verdicts = {name: judge(costs) for name, costs in tables.items()}
    draw_networks(verdicts, f"Batch {BATCH}, {machine}, {link}", folder / "networks.png")
    by_batch = {
        name: [judge(with_batch(costs, batch)) for batch in BATCHES]
        for name, costs in tables.items()
    }
    ticks = [str(batch) for batch in BATCHES]
    draw_lines(by_batch, ticks, "batch", f"By batch; {machine}, {link}", folder / "batch.png")
    rates = [speed * setting.bytes_per_s for speed in SPEEDS]
    by_rate = {
        name: [judge(with_bandwidth(costs, rate)) for rate in rates]
        for name, costs in tables.items()
    }
    title = f"By bandwidth; batch {BATCH}, {machine}, {setting.overhead_ns / 1e6:g} ms a message"
    ticks = [f"{8 * rate / 1e9:.3g}" for rate in rates]
    draw_lines(by_rate, ticks, "Gbit/s", title, folder / "bandwidth.png")
    rate = SHARED_SPEED * setting.bytes_per_s
    shared = {
        name: replace(with_bandwidth(costs, rate), shared_link=True)
        for name, costs in tables.items()
    }
    title = f"All workers share a link of {format_rate(rate)}; batch {BATCH}, {machine}"
    draw_workers(shared, title, folder / "workers.png")
    times = {name: Planning.of(costs) for name, costs in tables.items()}
    draw_planning(times, folder / "planning.png")
    return f"batch {BATCH}, {machine}, {link}; relative to sequential\n{describe(verdicts, times)}"


def main() -> None:
    """Draw, print, and measure if asked to."""
    parser = argparse.ArgumentParser(
        description="Draw the paper's comparison from the cost model and from measurements.",
        epilog="example: python demos/paper.py --measure -o paper",
    )
    parser.add_argument("--flops", type=float, default=1e12, metavar="N", help="a second: 1e12")
    parser.add_argument("--bandwidth", default="1gbit", metavar="RATE", help="each way: 1gbit")
    parser.add_argument("--overhead", default="2ms", metavar="TIME", help="of a message: 2ms")
    parser.add_argument("--measure", action="store_true", help="train small networks too")
    parser.add_argument("--steps", type=int, default=30, help="to train each for: %(default)s")
    parser.add_argument("-o", "--output", type=Path, default=Path("paper"), metavar="FOLDER")
    args = parser.parse_args()
    try:
        rate, overhead_s = parse_rate(args.bandwidth), parse_duration(args.overhead)
    except ConfigError as error:
        parser.error(str(error))
    if rate is None or not 0 < args.flops < float("inf"):
        parser.error("the comparison needs a machine and a link of finite speeds")
    setting = Setting(args.flops, rate, round(1e9 * overhead_s))
    args.output.mkdir(parents=True, exist_ok=True)
    text = draw_model(setting, args.output)
    print(text)
    if args.measure:
        found = {network: measure(network, args.steps) for network in MEASURED}
        draw_measured(found, args.output / "measured.png")
        print(f"\n{(measured := describe_measured(found))}")
        text += f"\n\n{measured}"
    (args.output / "table.txt").write_text(text + "\n")
    print(f"\npictures and table are in {args.output}/")


if __name__ == "__main__":
    main()
