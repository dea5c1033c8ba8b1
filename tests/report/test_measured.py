"""Quantities by configuration: means and bands over the runs of each, and the checkpoints that tasks were learned from alone."""

from dataclasses import replace

import numpy as np
from scipy import stats
from studies import UPDATES, rows_of, telling

from plasticity_probe.prediction.alignment import align
from plasticity_probe.report.measured import (
    IN_DETAIL,
    has_courses,
    in_detail_words,
    measured_figures,
    trajectory_figures,
)
from plasticity_probe.report.panels import HeatMap, Lines
from plasticity_probe.trace.tree import dataset_tree

RUNS, TASKS = 5, 4


def study(*names: str):
    rows, values = [], {}
    for at, name in enumerate(names):
        y, seeing, _ = telling(RUNS, TASKS, seed=at)
        values[name] = seeing
        rows += rows_of(name, y, {"fisher.rank": seeing})
    return rows, values


def test_a_line_for_each_configuration_with_students_interval_over_its_runs() -> None:
    rows, values = study("plain", "l2-init")
    (figure,) = trajectory_figures(align(rows))
    (panel,) = figure.panels
    assert isinstance(panel, Lines)
    assert [curve.label for curve in panel.curves] == ["plain", "l2-init"]
    assert [curve.hue for curve in panel.curves] == [0, 1]
    for curve in panel.curves:
        own = values[curve.label]
        low, high = stats.t.interval(0.95, RUNS - 1, loc=own.mean(0), scale=stats.sem(own, axis=0))
        np.testing.assert_allclose(curve.y, own.mean(0))
        np.testing.assert_allclose(np.stack([curve.lower, curve.upper]), np.stack([low, high]))
    assert "10 runs of 2 configurations, 4 tasks" in figure.caption


def test_single_runs_are_drawn_where_there_is_one_configuration() -> None:
    rows, _ = study("plain")
    (figure,) = trajectory_figures(align(rows))
    assert [curve.role for curve in figure.panels[0].curves] == ["run"] * RUNS + ["mean"]
    assert "Thin lines: single runs." in figure.caption


def test_layers_are_drawn_by_configuration_and_never_as_a_mean_over_several() -> None:
    rows, values = study("plain", "l2-init")
    found = [f for f in measured_figures(dataset_tree(rows), align(rows)) if isinstance(f.panels[0], HeatMap)]
    assert [f.title.rsplit(", ", 1)[1] for f in found] == ["plain", "l2-init"]
    for figure, own in zip(found, values.values(), strict=True):
        assert figure.panels[0].columns == tuple(map(str, range(TASKS)))
        np.testing.assert_allclose(figure.panels[0].values[0], own.mean(0))


def test_remedied_weights_and_checkpoints_inside_tasks_leave_the_columns_to_the_tasks() -> None:
    rows, values = study("plain")
    measured = [row for row in rows if row.probe == "fisher"]
    remedied = [
        replace(
            row,
            checkpoint=row.checkpoint.replace(".safetensors", "_remedied.safetensors"),
            sha256=f"{row.sha256} remedied",
            variables={name: replace(v, data=v.data + 100) for name, v in row.variables.items()},
        )
        for row in measured
        if row.task == 2
    ]
    inside = [replace(row, step=row.step + UPDATES // 2, sha256=f"{row.sha256} inside") for row in measured]
    every = [*rows, *inside, *remedied]
    (figure,) = measured_figures(dataset_tree(every), align(every))
    assert figure.panels[0].columns == tuple(map(str, range(TASKS)))
    expected = values["plain"].mean(0) + np.array([0, 0, 100, 0])
    np.testing.assert_allclose(figure.panels[0].values[0], expected)


def test_what_is_left_out_is_said() -> None:
    rows, _ = study(*(f"c{at}" for at in range(IN_DETAIL + 1)))
    aligned = align(rows)
    assert f"first {IN_DETAIL} of {IN_DETAIL + 1} configurations" in in_detail_words(aligned)
    assert len(measured_figures(dataset_tree(rows), aligned)) == IN_DETAIL


def test_without_tasks_the_figures_of_the_trace_are_drawn() -> None:
    rows = [replace(row, task=-1) for row in study("plain")[0] if row.probe == "fisher"]
    aligned = align(rows)
    assert not has_courses(aligned)
    assert {figure.name for figure in measured_figures(dataset_tree(rows), aligned)} == {
        "fisher-series",
        "fisher-layer",
    }
    assert trajectory_figures(aligned) == []
