"""Pictures: what is in them, and what is said where none can be drawn."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.observe import Canvas, TimelineEntry, plot_sweep, plot_timelines
from dynacomm_async.observe.canvas import (
    format_duration,
    format_rate,
    strategy_colours,
    text_colour,
)
from dynacomm_async.schedule import PLANNERS, Costs, LayerCosts, evaluate, make_plan

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

COSTS = Costs(
    tuple(
        LayerCosts(name, 10**6, 40_000_000, 30_000_000, 50_000_000, 40_000_000) for name in "abcd"
    ),
    overhead_up_ns=5_000_000,
    overhead_down_ns=5_000_000,
    latency_up_ns=10_000_000,
)


@pytest.fixture
def drawn(monkeypatch):
    """The canvases that were drawn, instead of their files."""
    canvases = []
    monkeypatch.setattr(Canvas, "save", lambda canvas, path: canvases.append(canvas))
    return canvases


def timeline(strategy):
    return evaluate(make_plan(strategy, COSTS), COSTS)


def make_rows(bandwidths=(1e6,), overheads=(0.0,), latencies=(0.0,), batches=(8,)):
    """The choice is sequential where bandwidth is lowest, else dynacomm."""
    return [
        {
            "down_bytes_per_s": rate,
            "up_bytes_per_s": rate,
            "overhead_s": overhead,
            "latency_s": latency,
            "batch": batch,
            "workers": 1,
            "link": "own",
            "step_s": {"sequential": 4.0, "dynacomm": 3.0},
            "best": ["dynacomm"],
            "choice": "sequential" if rate == min(bandwidths) else "dynacomm",
            "lower_bound_s": 2.0,
        }
        for rate in bandwidths
        for overhead in overheads
        for latency in latencies
        for batch in batches
    ]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_every_strategy_gets_a_panel_on_one_common_time_axis(drawn):
    plot_timelines([TimelineEntry(name, timeline(name)) for name in PLANNERS], Path("x.png"))

    panels = [line[0] for line in drawn[0].axes]
    for name, panel in zip(PLANNERS, panels, strict=True):
        assert panel.get_title(loc="left").startswith(f"{name}: {timeline(name).step_ns / 1e6:.4g}")
        lanes = [label.get_text() for label in panel.get_yticklabels()]
        assert lanes == ["pull", "compute", "push"]
    assert len({panel.get_xlim() for panel in panels}) == 1
    assert panels[0].get_xlim()[1] >= max(timeline(name).step_ns for name in PLANNERS) / 1e6


def test_bars_are_where_the_timeline_says_and_wide_ones_are_numbered(drawn):
    plot_timelines([TimelineEntry("sequential", timeline("sequential"))], Path("x.png"))

    (panel,) = (line[0] for line in drawn[0].axes)
    spans = [
        [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in lane.get_paths()]
        for lane in panel.collections
    ]
    assert spans[0] == [(0, 165)]
    assert spans[1] == [(165 + 30 * i, 195 + 30 * i) for i in range(4)]
    assert spans[2] == [(285 + 50 * i, 335 + 50 * i) for i in range(4)]
    assert spans[3] == [(485, 650)]
    # The processor waits in both transfers and for the latency, which also ends the step.
    assert spans[4] == [(0, 165), (485, 660)]
    assert spans[5] == [(650, 660)]
    assert texts(panel) == ["0–3", *"0123", *"3210", "0–3", "660.0 ms"]


def test_neighbours_differ_in_shade(drawn):
    plot_timelines([TimelineEntry("layerwise", timeline("layerwise"))], Path("x.png"))
    for lane in drawn[0].axes[0][0].collections[:4]:
        shades = [tuple(shade) for shade in lane.get_facecolors()]
        assert len(set(shades)) == 2
        assert all(a != b for a, b in pairwise(shades))


def test_a_measured_step_lies_below_the_predicted_one(drawn):
    entry = TimelineEntry("bucket", timeline("bucket"), measured=timeline("sequential"))
    plot_timelines([entry], Path("x.png"), title="a model on a link")
    ((panel,),) = drawn[0].axes
    assert panel.get_title(loc="left").startswith(
        "bucket: predicted 660.0 ms, measured 660.0 ms (±0.0%)"
    )
    places = {text.get_text(): text.get_position()[1] for text in panel.texts}
    low, high = sorted(panel.get_ylim())
    assert panel.yaxis_inverted()
    assert low < places["predicted"] < places["measured"] < high
    assert drawn[0].figure.get_suptitle() == "a model on a link"


def test_every_colour_is_explained(drawn):
    plot_timelines([TimelineEntry("layerwise", timeline("layerwise"))], Path("x.png"))
    (legend,) = drawn[0].figure.legends
    explained = {tuple(patch.get_facecolor()) for patch in legend.get_patches()}
    used = [tuple(lane.get_facecolors()[0]) for lane in drawn[0].axes[0][0].collections[:6]]
    assert set(used) == explained


def test_two_varied_settings_make_a_map_of_choices(drawn):
    plot_sweep(make_rows([1e6, 1e7, 1e8], [0.0, 0.005]), Path("x.png"))

    ((panel,),) = drawn[0].axes
    found = {tuple(map(round, text.get_position())): text.get_text() for text in panel.texts}
    assert found == {
        (x, y): "sequential\n±0%" if x == 0 else "dynacomm\n−25%" for x in range(3) for y in (0, 1)
    }
    ticks = [label.get_text() for label in panel.get_xticklabels()]
    assert ticks == ["8 Mbit/s", "80 Mbit/s", "800 Mbit/s"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0 ms", "5 ms"]


def test_more_varied_settings_make_a_map_for_each_combination(drawn):
    plot_sweep(make_rows([1e6, 1e7], [0.0, 0.005], [0.0, 0.1, 0.2]), Path("x.png"))
    panels = [axes for line in drawn[0].axes for axes in line]
    titles = [axes.get_title(loc="left") for axes in panels if axes.get_visible()]
    assert titles == ["latency 0 ms", "latency 100 ms", "latency 200 ms"]


def test_one_varied_setting_makes_curves_relative_to_the_plainest_strategy(drawn):
    plot_sweep(make_rows([1e6, 1e7, 1e8]), Path("x.png"))
    (curves,), (strip,) = drawn[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in curves.get_lines()}
    assert lines == {
        "sequential": [1, 1, 1],
        "dynacomm": [0.75, 0.75, 0.75],
        "lower bound": [0.5, 0.5, 0.5],
    }
    assert texts(strip) == ["sequential", "dynacomm", "dynacomm"]


def test_pictures_are_saved_and_need_no_global_state(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from tests_of_plots import COSTS, make_rows, timeline\n"
        "from dynacomm_async.observe import TimelineEntry, plot_sweep, plot_timelines\n"
        "plot_sweep(make_rows([1e6, 1e7]), Path('a.png'))\n"
        "plot_sweep(make_rows(), Path('b.svg'))\n"
        "plot_timelines([TimelineEntry('bucket', timeline('bucket'))], Path('c.png'))\n"
        "sys.exit('pyplot' if 'matplotlib.pyplot' in sys.modules else 0)\n"
    )
    (tmp_path / "tests_of_plots.py").write_text(Path(__file__).read_text())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "b.svg").read_text()
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_a_missing_matplotlib_is_one_sentence_that_says_what_to_install(monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'dynacomm_async\[plot\]'"):
        plot_sweep(make_rows(), tmp_path / "x.png")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plot_timelines([], path), "no timelines"),
        (lambda path: plot_sweep([], path), "nothing to draw"),
        (lambda path: plot_sweep(make_rows(), path.with_suffix(".doc")), "cannot draw .*doc"),
        (
            lambda path: plot_sweep(
                make_rows([1e6, 1e7], [0, 1], latencies=range(4), batches=range(1, 5)), path
            ),
            "16 maps, expected at most 12",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        draw(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_step_in_which_nothing_takes_time_can_be_drawn(tmp_path):
    layer = LayerCosts("a", 1, 0, 0, 0, 0)
    costs = Costs((layer,), overhead_up_ns=0, overhead_down_ns=0)
    entry = TimelineEntry("nothing", evaluate(make_plan("dynacomm", costs), costs))
    plot_timelines([entry], tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_strategies_keep_their_colours_whatever_is_drawn_beside_them():
    colours = strategy_colours(["mine", "dynacomm"])
    assert colours["dynacomm"] == strategy_colours(PLANNERS)["dynacomm"]
    assert len({colours[name] for name in [*PLANNERS, "mine"]}) == len(PLANNERS) + 1


def test_quantities_are_shown_with_a_unit_that_suits_them():
    assert [format_rate(rate) for rate in (125, 125e3, 124_999.9, 1.5e9 / 8, None)] == [
        *("1 kbit/s", "1 Mbit/s", "1 Mbit/s", "1.5 Gbit/s", "unlimited")
    ]
    assert [format_duration(value) for value in (0.0, 0.0005, 1.25)] == ["0 ms", "0.5 ms", "1.25 s"]
    assert (text_colour("#000000"), text_colour("#F0E442")) == ("white", "black")
