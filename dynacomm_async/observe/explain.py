"""Why a step takes as long as it does, as text for people who do not know the code.

Every number has a name and a unit. Nothing is measured or planned here: the values come from
:mod:`dynacomm_async.schedule`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from dynacomm_async.schedule.account import (
    Expectation,
    LinkObserved,
    Summary,
    WorkerReport,
)
from dynacomm_async.schedule.costs import Costs, LayerCosts
from dynacomm_async.schedule.dispatch import Policy
from dynacomm_async.schedule.plan import AnyPlan, PolicyPlan, Segment
from dynacomm_async.schedule.replan import Replan
from dynacomm_async.schedule.timeline import LowerBound, Timeline, Transfer

__all__ = [
    "describe_plan",
    "explain_layers",
    "explain_link",
    "explain_plan",
    "explain_steps",
    "explain_worker",
]

_MOST_LAYERS = 25
"""Rows of the table of layers; the smaller ones of a deeper net are one row together."""

_MOST_MESSAGES = 12
"""Rows of each direction in the table of messages; of more the middle is left out."""

_MOST_NAMED = 6
"""Messages of a direction that are named by their layers in one line."""

_MOST_CHANGES = 12
"""Changes of plan that are listed; of more the newest."""

_STRATEGIES = {
    "warm-up": "cuts that vary from step to step, to tell a message's overhead from the rate",
    "sequential": "one message each way: the least overhead, and nothing overlaps",
    "layerwise": "one message for each layer: the most overlap, and the most overhead",
    "ibatch": "each message takes what fits under the computing before it, from one end on",
    "bucket": "messages of up to 25 MiB, whatever they cost",
    "dynacomm": "the cuts that end each pass over the layers earliest, by the costs above",
    "priority": "slices of one size, the front layers' first, whatever they cost",
    "joint": "the sizes of messages that end the step earliest, by the costs above",
}

_BOUNDS = {
    "equal-rate": "proven for any cut and any order of messages, up and down equally fast",
    "any-rate": "proven for any cut and any order of messages, whatever the rates",
    "shared-link": "proven for the mean step of workers that share one link",
}


def explain_worker(report: WorkerReport, *, brief: bool = False) -> str:
    """Return the whole story of one worker, without a line break at its end.

    Args:
        brief: leave out the tables of layers and messages, which are alike at all workers.
    """
    title = f"Worker {report.slot} of {report.workers}: where the time of a step goes"
    sections = [f"{title}\n{'=' * len(title)}"]
    expectation = report.expectation
    if expectation is None:
        sections.append("No step has been computed, so there is nothing to explain.")
        return "\n\n".join(sections)
    names = [layer.name for layer in expectation.costs.layers]
    sections.append(explain_link(expectation.costs, report.link))
    if brief:
        plan = describe_plan(expectation.plan, names)
        sections.append("\n".join(_wrap(f"Plan in use: {plan}", "")))
    else:
        sections.append(explain_layers(expectation.costs))
        sections.append(explain_plan(expectation))
    sections.append(explain_steps(report.summary, expectation, slot=report.slot))
    sections.append(_explain_replans(report.replans, names))
    return "\n\n".join(sections)


_DUPLEX = {
    True: "Half duplex: both directions take turns, so a message takes about twice as long while "
    "the\nother direction is busy, and steps keep a barrier between them.",
    False: "Full duplex: a message takes no longer while the other direction is busy.",
}


def explain_link(costs: Costs, link: LinkObserved | None = None) -> str:
    """Return what a message costs each way, and what that is known from.

    Args:
        link: None where the table was not measured here.
    """
    header = ["Link", "rate", "overhead a message", "latency"]
    rows = [
        [
            "down (parameters)",
            _rate(costs, lambda layer: layer.pull_ns),
            _ms(costs.overhead_down_ns),
            _ms(costs.latency_down_ns),
        ],
        [
            "up (gradients)",
            _rate(costs, lambda layer: layer.push_ns),
            _ms(costs.overhead_up_ns),
            _ms(costs.latency_up_ns),
        ],
    ]
    if link is not None:
        header.append("observed")
        for row, n in zip(rows, (link.n_down, link.n_up), strict=True):
            row.append(f"{n} times")
    lines = [_table(header, rows)]
    if link is not None and not link.known:
        lines.append(
            "These are GUESSES: the link is too fast or too uneven to be measured, so overhead\n"
            "and rate cannot be told apart. Predictions that rest on them mean little."
        )
    half_duplex = costs.half_duplex or None if link is None else link.half_duplex
    if half_duplex is not None:
        lines.append(_DUPLEX[half_duplex])
    if costs.link_share > 1:
        lines.append(f"One link is shared by {costs.workers} workers: all times on it are theirs.")
    lines.append(f"The server takes {_ms(costs.server_ns)} to apply the gradients of a step.")
    return "\n".join(lines)


def explain_layers(costs: Costs) -> str:
    """Return the cost of each layer; of deep nets the biggest ones, and the rest as one."""
    layers = costs.layers
    shown = set(range(len(layers)))
    if len(layers) > _MOST_LAYERS:
        by_cost = sorted(shown, key=lambda index: _cost_ns(layers[index]), reverse=True)
        shown = set(by_cost[: _MOST_LAYERS - 1])
    rows = [[layers[index].name, *_layer_cells([layers[index]])] for index in sorted(shown)]
    rest = [layer for index, layer in enumerate(layers) if index not in shown]
    if rest:
        rows.append([f"{len(rest)} smaller ones", *_layer_cells(rest)])
    rows.append([f"all {len(layers)} layers", *_layer_cells(layers)])
    header = ["Layer, in forward order", "size", "pull", "forward", "backward", "push"]
    return (
        _table(header, rows, rule=True)
        + "\npull, push: time on the link, without overhead; forward, backward: computing"
    )


def explain_plan(expectation: Expectation) -> str:
    """Return the messages of a step, and when each is predicted to be on the link."""
    plan, costs, timeline = expectation.plan, expectation.costs, expectation.timeline
    latencies_ns = {"pull": costs.latency_down_ns, "push": costs.latency_up_ns}
    rows: list[list[str]] = []
    for direction in dict.fromkeys(transfer.direction for transfer in timeline.transfers):
        transfers = [each for each in timeline.transfers if each.direction == direction]
        cells = [
            [
                f"{direction} {number}",
                _layers_of(transfer, costs),
                _size(sum(nbytes for _, nbytes in transfer.ranges)),
                _ms(transfer.start_ns),
                _ms(transfer.end_ns),
                _ms(transfer.end_ns + latencies_ns[direction]),
            ]
            for number, transfer in enumerate(transfers, start=1)
        ]
        if len(cells) > _MOST_MESSAGES:
            half = _MOST_MESSAGES // 2
            left_out = f"... {len(cells) - 2 * half + 1} more"
            cells[half : len(cells) - half + 1] = [[left_out, "", "", "", "", ""]]
        rows += cells
    header = ["Message", "layers", "size", "begins", "has left", "arrives"]
    lines = _wrap(f"Plan in use: {describe_plan(plan)}", "")
    if plan.strategy in _STRATEGIES:
        lines.append(f"{plan.strategy}: {_STRATEGIES[plan.strategy]}")
    lines += [_table(header, rows, left=2), _about_times(timeline)]
    return "\n".join(lines)


def _about_times(timeline: Timeline) -> str:
    phase = timeline.computations[0].phase
    start = "the step's first pull" if phase == "forward" else "the backward pass"
    ends_ns = {each.phase: each.end_ns for each in timeline.computations}
    return (
        f"begins, has left, arrives: predicted, counted from the begin of {start}; the forward\n"
        f"pass ends at {_ms(ends_ns['forward'])}, the backward pass at {_ms(ends_ns['backward'])}"
    )


def explain_steps(summary: Summary | None, expectation: Expectation, *, slot: int) -> str:
    """Return the prediction, what was measured, where the time went, and the lower bound.

    Args:
        summary: None where nothing was measured.
        expectation: of the plan in use.
        slot: the worker's rank.
    """
    if summary is None:
        predicted = [("Predicted step", [_ms(expectation.timeline.step_ns)])]
        return _named_lines([*predicted, ("Lower bound", _bound_lines(expectation.bound))])
    named = [
        (
            "Measured step",
            [
                f"{_ms(summary.median_ns)} (median; half of the steps took "
                f"{_ms(summary.low_ns)} to {_ms(summary.high_ns)})",
                f"over {summary.n_steps} steps, {summary.first} to {summary.last}; the first "
                "step after a change of plan never counts",
            ],
        ),
        ("Predicted step", _prediction_lines(summary, expectation.timeline)),
        ("Lower bound", _bound_lines(summary.bound or expectation.bound, summary)),
    ]
    if summary.busy_ns:
        named.append(("Hidden share", _hidden_lines(summary, summary.busy_ns)))
    return f"{_named_lines(named)}\n\n{_parts_table(summary, slot)}"


def describe_plan(plan: AnyPlan, names: Sequence[str] = ()) -> str:
    """Return a plan in one line: who made it, and its messages each way, or the rule for them.

    Args:
        names: of the layers; with them a plan of few messages tells the layers of each.
    """
    if isinstance(plan, PolicyPlan):
        return (
            f"{plan.strategy}, front layers first and without a barrier between steps: "
            f"pushes {_describe_policy(plan.push)}, pulls {_describe_policy(plan.pull)}"
        )
    pulls = _describe_segments(plan.pull, "pull", names)
    pushes = _describe_segments(plan.push, "push", names)
    barrier = "" if plan.barrier else ", each pull as soon as it can be"
    return f"{plan.strategy}, {pulls} and {pushes} a step{barrier}"


def _describe_segments(segments: Sequence[Segment], word: str, names: Sequence[str]) -> str:
    text = _count(len(segments), word)
    if not names or len(segments) > _MOST_NAMED:
        return text
    runs = []
    for first, last in ((each.first, each.last) for each in segments):
        start, end = (first, last) if word == "pull" else (last, first)
        runs.append(names[start] if start == end else f"{names[start]}..{names[end]}")
    return f"{text} ({', '.join(runs)})"


def _describe_policy(policy: Policy) -> str:
    size = "of any size" if policy.cap_nbytes is None else f"of up to {_size(policy.cap_nbytes)}"
    if policy.threshold_nbytes:
        size += f" once {_size(policy.threshold_nbytes)} are ready"
    order = ", rear layers first until all are ready" if policy.rear_first else ""
    return f"{size}, {'whole layers' if policy.whole_layers else 'cut inside layers too'}{order}"


def _named_lines(named: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Put names into a margin, beside the lines that belong to them."""
    width = max(len(name) for name, _ in named) + 2
    return "\n".join(
        (name if place == 0 else "").ljust(width) + line
        for name, lines in named
        for place, line in enumerate(lines)
    )


def _prediction_lines(summary: Summary, timeline: Timeline) -> list[str]:
    predicted_ns, note = summary.predicted_ns, ""
    if predicted_ns is None:
        predicted_ns, note = timeline.step_ns, " (made afterwards, by the costs above)"
    lines = [f"{_ms(predicted_ns)}, {_apart(predicted_ns, summary.median_ns)}{note}"]
    if summary.waited_ns > predicted_ns / 100:
        together_ns = predicted_ns + summary.waited_ns
        lines.append(
            f"with {_ms(summary.waited_ns)} of waiting for other workers {_ms(together_ns)}, "
            f"{_apart(together_ns, summary.median_ns)}"
        )
    return lines


def _bound_lines(bound: LowerBound, summary: Summary | None = None) -> list[str]:
    line = _ms(bound.step_ns)
    if summary is not None and summary.certificate is not None:
        over_ns = summary.median_ns - bound.step_ns
        line += (
            f", the measured step is {summary.certificate - 1:.0%} ({_ms(over_ns)}) above it"
            if over_ns >= 0
            else ", more than the measured step: the costs above are not right"
        )
    return [
        line,
        "if the costs above are right, no plan is faster, other workers left aside;",
        f'bound "{bound.name}": {_BOUNDS[bound.name]}',
    ]


def _hidden_lines(summary: Summary, busy_ns: int) -> list[str]:
    idle_ns = summary.idle_ns
    saved_ns = busy_ns - idle_ns
    balance = (
        f"{_ms(saved_ns)} of that cost no time"
        if saved_ns >= 0
        else f"latency and other pauses cost {_ms(-saved_ns)} more than overlap saves"
    )
    return [
        f"{_percent(1 - idle_ns / busy_ns)}: messages occupy the links {_ms(busy_ns)} a step, both "
        "directions together;",
        f"{balance}, for the step is",
        f"{_ms(idle_ns)} longer than its computing (waiting for other workers left out)",
    ]


def _parts_table(summary: Summary, slot: int) -> str:
    parts = [
        ("computing the layers", summary.compute_ns, ""),
        ("waiting for the link", summary.exposed_ns, "exposed communication, latency included"),
        ("waiting for other workers", summary.waited_ns, _who_is_last(summary, slot)),
        ("waiting for the server", summary.server_ns, "it applies the gradients"),
        ("other work of this worker", summary.own_ns, "the next batch, handing gradients over"),
        ("a typical step", summary.step_ns, "mean of the middle half of the steps"),
    ]
    whole_ns = max(summary.step_ns, 1)
    rows = [[name, _ms(ns), f"{ns / whole_ns:.0%}", note] for name, ns, note in parts]
    return _table(["Where the time goes", "time", "share", ""], rows, last_left=True)


def _who_is_last(summary: Summary, slot: int) -> str:
    if not summary.last_slots or summary.last_slots[0][0] == slot:
        own = dict(summary.last_slots).get(slot, 0)
        return f"this one was last in {own} of {summary.n_steps} steps" if own else ""
    last, n = summary.last_slots[0]
    return f"worker {last} was last in {n} of {summary.n_steps} steps"


def _explain_replans(replans: Sequence[Replan], names: Sequence[str]) -> str:
    if not replans:
        return "Changes of plan: none"
    shown = replans[-_MOST_CHANGES:]
    title = f"Changes of plan: {len(replans)}"
    lines = [title if len(shown) == len(replans) else f"{title}, the last {len(shown)}:"]
    for replan in shown:
        before, after = describe_plan(replan.before, names), describe_plan(replan.after, names)
        gain = 1 - replan.after_ns / max(replan.before_ns, 1)
        lines += [
            *_wrap(f"from step {replan.step} on ({replan.reason}):", "  "),
            *_wrap(f"old plan: {before}, predicted step {_ms(replan.before_ns)}", "    "),
            *_wrap(
                f"new plan: {after}, predicted step {_ms(replan.after_ns)} ({_percent(gain)} less)",
                "    ",
            ),
        ]
    return "\n".join(lines)


# -- cells of tables -----------------------------------------------------------------------------


def _layer_cells(layers: Sequence[LayerCosts]) -> list[str]:
    return [
        _size(sum(layer.nbytes for layer in layers)),
        _ms(sum(layer.pull_ns for layer in layers)),
        _ms(sum(layer.forward_ns for layer in layers)),
        _ms(sum(layer.backward_ns for layer in layers)),
        _ms(sum(layer.push_ns for layer in layers)),
    ]


def _cost_ns(layer: LayerCosts) -> int:
    return layer.pull_ns + layer.forward_ns + layer.backward_ns + layer.push_ns


def _layers_of(transfer: Transfer, costs: Costs) -> str:
    segment = transfer.segment
    names = [costs.layers[segment.first].name, costs.layers[segment.last].name]
    whole_nbytes = sum(costs.layers[index].nbytes for index in segment.layers)
    part = "part of " if sum(nbytes for _, nbytes in transfer.ranges) < whole_nbytes else ""
    if segment.first == segment.last:
        return part + names[0]
    if transfer.direction == "push":
        names.reverse()
    return f"{part}{names[0]} to {names[1]} ({len(segment.layers)} layers)"


def _rate(costs: Costs, transfer_ns: Callable[[LayerCosts], int]) -> str:
    total_ns = sum(map(transfer_ns, costs.layers))
    if not total_ns:
        return "beyond measure"
    mbit_per_s = sum(layer.nbytes for layer in costs.layers) * 8e3 / total_ns
    return f"{mbit_per_s:,.0f} Mbit/s" if mbit_per_s >= 1000 else f"{mbit_per_s:.4g} Mbit/s"


def _ms(value_ns: int) -> str:
    return f"{value_ns / 1e6:,.2f} ms"


def _percent(share: float) -> str:
    """Return whole percents; none of them is -0."""
    return f"{round(100 * share)}%"


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=f"{indent}  ")


def _size(nbytes: int) -> str:
    if nbytes < 1 << 10:
        return f"{nbytes} B"
    return f"{nbytes / 2**10:.1f} KiB" if nbytes < 1 << 20 else f"{nbytes / 2**20:.2f} MiB"


def _count(number: int, word: str) -> str:
    plural = "es" if word.endswith("sh") else "s"
    return f"{number} {word}{plural if number != 1 else ''}"


def _apart(value_ns: int, measured_ns: int) -> str:
    share = value_ns / measured_ns - 1 if measured_ns else 0.0
    if abs(share) < 0.0005:
        return "as measured"
    return f"{abs(share):.1%} {'more' if share > 0 else 'less'} than measured"


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    last_left: bool = False,
    rule: bool = False,
) -> str:
    """Return aligned columns, the first ``left`` of them (and the last) left-aligned.

    Args:
        rule: draw a line above the last row, which is a sum.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width)
            if place < left or (last_left and place == len(cells) - 1)
            else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    lines = [line(header), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)]
    if rule:
        lines.insert(-1, lines[1])
    return "\n".join(lines)
