import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_traces import array, number, quadrature, row, tree, typical

from plasticity_probe.report.figures import figures, interval, label_figures, ratio_figures, series_figures
from plasticity_probe.report.panels import Dots, Figure, HeatMap, Lines
from plasticity_probe.report.quantities import Group, groups


def group(*rows) -> Group:
    return groups(tree(*rows))[0]


def series(values: Sequence[float], *, run: str = "run", name: str = "a", status: Sequence[str] = (), **more: float):
    extra = {f"{name}_{key}": number(value) for key, value in more.items()}
    return [
        row(
            "p",
            {name: number(value, "what it is"), **extra},
            run=run,
            step=10 * at,
            status=status[at] if status else "ok",
        )
        for at, value in enumerate(values)
    ]


def panel_of(figure: Figure, kind: type, at: int = 0):
    panel = figure.panels[at]
    assert isinstance(panel, kind)
    return panel


def test_one_run_is_one_line_with_the_fresh_networks_beside_it() -> None:
    rows = [*series([3, 5, 4], sem=1.0), row("p", {"a": number(1)}, fresh=0), row("p", {"a": number(2)}, fresh=1)]
    (figure,) = series_figures(group(*rows))
    panel = panel_of(figure, Lines)
    (curve,) = panel.curves
    np.testing.assert_array_equal(curve.x, [0, 10, 20])
    np.testing.assert_array_equal(curve.y, [3, 5, 4])
    np.testing.assert_allclose(curve.upper - curve.lower, 2 * 1.959964, rtol=1e-6)
    assert (panel.level.value, panel.level.lower, panel.level.upper) == (1.5, 1, 2)
    assert panel.level.label == "mean and range of 2 fresh networks"
    assert (panel.title, panel.x_label, panel.y_label) == ("what it is", "step", "a")
    assert "512 examples in eval mode" in figure.caption
    assert "Band of a: ± 1.96 standard errors." in figure.caption
    assert "Dashed: the mean of 2 fresh networks" in figure.caption
    assert figure.title == "p: 3 checkpoints"


def test_rows_are_ordered_by_step_not_by_measurement() -> None:
    rows = series([3, 5, 4])
    (figure,) = series_figures(group(rows[2], rows[0], rows[1]))
    np.testing.assert_array_equal(panel_of(figure, Lines).curves[0].y, [3, 5, 4])


def test_failed_rows_are_gaps_and_doubtful_ones_are_marked() -> None:
    (figure,) = series_figures(group(*series([3, 5, 4], status=["ok", "failed", "not_converged"])))
    (curve,) = panel_of(figure, Lines).curves
    np.testing.assert_array_equal(curve.y, [3, np.nan, 4])
    np.testing.assert_array_equal(curve.doubtful, [False, True, True])
    assert "2 of 3 measurements did not end well (1 failed, 1 not_converged); gaps or" in figure.caption


def test_several_runs_are_thin_lines_with_the_mean_and_its_t_interval() -> None:
    table = np.array([[1.0, 5.0], [2.0, 7.0], [4.0, 6.0]])
    rows = [entry for run, values in enumerate(table) for entry in series(values, run=f"r{run}")]
    (figure,) = series_figures(group(*rows))
    *runs, mean = panel_of(figure, Lines).curves
    assert [curve.role for curve in runs] == ["run"] * 3
    np.testing.assert_array_equal([curve.y for curve in runs], table)
    for at in range(2):
        low, high = scipy.stats.t.interval(0.95, 2, loc=table[:, at].mean(), scale=scipy.stats.sem(table[:, at]))
        np.testing.assert_allclose(
            [mean.y[at], mean.lower[at], mean.upper[at]], [table[:, at].mean(), low, high], rtol=1e-12
        )
    assert mean.label == "mean of 3 runs, 95 % interval"
    assert "Student-t" in figure.caption
    assert figure.title == "p: 3 runs, 2 steps"


def test_a_normal_interval_of_few_runs_would_be_too_narrow() -> None:
    _, low, high = interval(np.array([[1.0], [2.0], [4.0]]))
    normal = 2 * 1.96 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    assert (high - low)[0] > 2 * normal


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_missing_runs_do_not_count_in_the_interval(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(count, 1))
    padded = np.concatenate([values, np.full((3, 1), np.nan)])
    np.testing.assert_allclose(interval(padded), interval(values), rtol=1e-12)


def test_the_mean_is_drawn_where_more_than_half_of_the_runs_can_be_relied_on() -> None:
    rows = [
        *series([1, 2, 3], run="a"),
        *series([2, 3], run="b"),
        *series([3, 5], run="c", status=["ok", "not_converged"]),
    ]
    rows += series([4], run="d")
    (figure,) = series_figures(group(*rows))
    mean = panel_of(figure, Lines).curves[-1]
    np.testing.assert_array_equal(mean.y, [2.5, np.nan, np.nan])


def test_runs_that_never_meet_have_no_mean() -> None:
    rows = [
        row("p", {"a": number(step)}, run=run, step=step)
        for run, steps in (("x", (0, 2)), ("y", (1, 3)))
        for step in steps
    ]
    (figure,) = series_figures(group(*rows))
    assert [curve.role for curve in panel_of(figure, Lines).curves] == ["run", "run"]


def test_tasks_come_before_steps() -> None:
    rows = [row("p", {"a": number(task)}, step=100 * task + 7, task=task) for task in range(3)]
    (figure,) = series_figures(group(*rows))
    assert panel_of(figure, Lines).x_label == "task"
    np.testing.assert_array_equal(panel_of(figure, Lines).curves[0].x, [0, 1, 2])


def test_many_quantities_go_to_several_figures() -> None:
    rows = [row("p", {f"a{n}": number(n + step) for n in range(26)}, step=step) for step in range(2)]
    found = series_figures(group(*rows))
    assert [len(figure.panels) for figure in found] == [9, 9, 8]
    assert [figure.title for figure in found] == [f"p: 2 checkpoints ({n} of 3)" for n in (1, 2, 3)]


def test_context_and_hidden_quantities_have_no_panel() -> None:
    rows = [
        row("p", {"a": number(1), "b": number(2, role="context"), "c": number(3, shown="False")}, step=n)
        for n in range(2)
    ]
    (figure,) = series_figures(group(*rows))
    assert [panel_of(figure, Lines, at).y_label for at in range(len(figure.panels))] == ["a"]


@pytest.mark.parametrize("values", [[np.nan, np.nan], [np.inf, -np.inf], [1e300, np.nan]])
def test_without_numbers_there_is_no_figure(values: list[float]) -> None:
    assert series_figures(group(*series(values))) == []


def test_a_third_partys_probe_has_a_series_and_a_heat_map() -> None:
    def made(step: int):
        values = {
            "novel": number(step, "a novel number", units="bit"),
            "each": array(("head",), [step, 2 * step, -1.0], "a number each head", units="bit"),
        }
        return row("my probe", values, step=step, labels={"head": ("h0", "h1", "h2")})

    line, heat = figures(tree(*(made(step) for step in (0, 5, 10))))
    assert panel_of(line, Lines).y_label == "novel [bit]"
    panel = panel_of(heat, HeatMap)
    assert (panel.labels, panel.columns, panel.value_label) == (("h0", "h1", "h2"), ("0", "5", "10"), "each [bit]")
    np.testing.assert_array_equal(panel.values, [[0, 5, 10], [0, 10, 20], [-1, -1, -1]])
    assert panel.fresh is None


def test_heat_maps_average_runs_and_set_the_fresh_networks_apart() -> None:
    def made(value: float, **place):
        return row("p", {"l2": array(("tensor",), [value, 2 * value], "norm")}, labels={"tensor": ("w", "b")}, **place)

    rows = [
        made(1, run="x", step=0),
        made(3, run="y", step=0),
        made(5, run="x", step=1),
        made(10, fresh=0),
        made(20, fresh=1),
    ]
    (figure,) = label_figures(group(*rows))
    panel = panel_of(figure, HeatMap)
    np.testing.assert_array_equal(panel.values, [[2, 5], [4, 10]])
    np.testing.assert_array_equal(panel.fresh, [15, 30])
    assert "mean of 2 fresh networks" in figure.caption
    assert "mean of up to 2 runs" in figure.caption


def test_one_checkpoint_has_dots_for_each_label_beside_the_fresh_networks() -> None:
    def made(values: list[float], fresh: int | None = None):
        bound = array(("tensor",), [0.5, 0.25], "bound", shown="False")
        return row(
            "p",
            {"l2": array(("tensor",), values, "norm"), "l2_error": bound},
            labels={"tensor": ("w", "b")},
            fresh=fresh,
        )

    (figure,) = label_figures(group(made([1, 2]), made([3, 4], 0), made([5, 4], 1)))
    fresh, own = panel_of(figure, Dots).points
    np.testing.assert_array_equal(own.values, [1, 2])
    np.testing.assert_array_equal([own.lower, own.upper], [[0.5, 1.75], [1.5, 2.25]])
    np.testing.assert_array_equal([fresh.values, fresh.lower, fresh.upper], [[4, 4], [3, 4], [5, 4]])
    assert "smallest to largest over fresh networks" in figure.caption
    assert "error bound" in figure.caption


def test_many_labels_go_to_several_figures_and_stay_different() -> None:
    names = tuple(f"module.encoder.blocks.{n}.attention.output_projection.weight" for n in range(250))
    rows = [
        row("p", {"l2": array(("tensor",), np.arange(250.0))}, step=step, labels={"tensor": names}) for step in range(2)
    ]
    found = label_figures(group(*rows))
    assert [len(panel_of(figure, HeatMap).labels) for figure in found] == [100, 100, 50]
    assert found[1].title == "p: each tensor 101 to 200 of 250"
    assert all(len({*panel_of(figure, HeatMap).labels}) == len(panel_of(figure, HeatMap).labels) for figure in found)
    assert max(len(label) for figure in found for label in panel_of(figure, HeatMap).labels) <= 40


def test_a_thousand_labels_are_cut_and_the_caption_says_so() -> None:
    names = tuple(map(str, range(1000)))
    (*_, last) = found = label_figures(
        group(row("p", {"l2": array(("tensor",), np.ones(1000))}, labels={"tensor": names}))
    )
    assert len(found) == 5
    assert "first 500 of 1000" in last.caption


def test_ratios_compare_a_checkpoint_with_fresh_networks() -> None:
    def values(a: float, b: float, c: float):
        return {"a": number(a, "first"), "b": number(b, "second"), "c": number(c, "third"), "top": number(-a)}

    rows = [row("p", values(8, 0.5, 1)), row("p", values(1, 1, 0), fresh=0), row("p", values(3, 1, 0), fresh=1)]
    rows += [row("q", {"d": number(3, "fourth")}), row("q", {"d": number(3)}, fresh=0)]
    (figure,) = ratio_figures(groups(tree(*rows)))
    panel = panel_of(figure, Dots)
    fresh, own = panel.points
    np.testing.assert_allclose(own.values, [4, 0.5, np.nan, 4, 1])
    np.testing.assert_allclose(fresh.lower, [0.5, 1, np.nan, 0.5, 1])
    np.testing.assert_allclose(fresh.upper, [1.5, 1, np.nan, 1.5, 1])
    assert panel.labels == ("first", "second", "third", "a number", "fourth")
    assert panel.groups == ("p", "p", "p", "p", "q")
    assert panel.notes[2] == "1 : 0"
    assert (panel.scale.kind, panel.reference) == ("log", 1.0)
    assert "512 examples in eval mode" in figure.caption


def test_without_fresh_networks_there_are_no_ratios() -> None:
    assert figures(tree(row("p", {"a": number(1)}))) == []
    assert figures(tree(row("p", {"a": number(1)}, fresh=0))) == []


def test_a_typical_trace_has_a_figure_of_every_kind() -> None:
    one = figures(typical([("run", 10, -1)], fresh=2))
    assert [figure.name for figure in one] == [
        "checkpoint-and-fresh",
        "hessian_spectrum-density",
        "weight_norms-tensor",
        "dead_units-layer",
    ]
    many = figures(typical([(f"r{run}", 100 * task, task) for run in range(10) for task in range(20)], fresh=3))
    assert [figure.name for figure in many] == [
        "hessian_spectrum-series",
        "hessian_spectrum-density",
        "fisher_rank-series",
        "weight_norms-series",
        "weight_norms-tensor",
        "dead_units-series",
        "dead_units-layer",
        "performance-series",
    ]
    assert all("512 examples" in figure.caption and "eval mode" in figure.caption for figure in one + many)


def test_an_empty_trace_has_no_figures() -> None:
    assert figures(tree()) == []
    assert figures(tree(row("p", {}, status="failed"), row("p", {}, status="failed", step=1))) == []


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)


@example([(0, 0, 0.0, 0.0, 2.2250738585e-313, False)])
@example([(0, 0, 0.0, 0.0, 5e-324, False), (0, 1, 1e-308, 0.0, -3e-310, True)])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 3), NUMBERS, NUMBERS, NUMBERS, st.booleans()), max_size=8))
def test_no_numbers_break_a_figure(entries: list[tuple[int, int, float, float, float, bool]]) -> None:
    rows = []
    for at, (run, step, a, sem, b, fresh) in enumerate(entries):
        values = {"a": number(a), "a_sem": number(sem), "b": array(("layer",), [b, a], summary="max")}
        values |= {"nodes": array(("draw", "node"), [[a, b]]), "weights": array(("draw", "node"), [[0.5, 0.5]])}
        rows.append(
            row("p", values, run=f"r{run}", step=step, labels={"layer": ("x", "y")}, fresh=at if fresh else None)
        )
    for figure in figures(tree(*rows)):
        assert figure.panels
        for panel in figure.panels:
            if isinstance(panel, Lines):
                assert all(not np.isinf(curve.y).any() for curve in panel.curves)


def test_torch_is_not_imported() -> None:
    code = "import sys, plasticity_probe.report.figures, plasticity_probe.report.draw; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_matplotlib_is_imported_by_draw_alone() -> None:
    code = "import sys, plasticity_probe.report.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_quadrature_of_another_probe_has_its_density() -> None:
    rng = np.random.default_rng(0)
    (figure,) = figures(tree(row("my_curvature", quadrature(rng, outlier=1.0))))
    assert figure.title == "Spectral density: my_curvature"
