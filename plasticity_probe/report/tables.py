"""The tables of a report, as data and as comma-separated values."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from plasticity_probe.prediction.assessment import Assessment
from plasticity_probe.prediction.verdict import Evidence
from plasticity_probe.report.verdicts import courses_of
from plasticity_probe.report.wording import plain
from plasticity_probe.training.summary import mean_of

Cell = str | int | float
FORMULA = ("=", "+", "-", "@")
"""Texts that start with one of these would be formulas to a spreadsheet."""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        name: Name of its file, without suffix.
        header: Names of the columns.
        rows: The rows; NaN where a number is unknown.
    """

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def as_csv(table: Table) -> bytes:
    """A table as comma-separated values in UTF-8: numbers in full, unknown ones empty.

    A text that a spreadsheet would take for a formula has an apostrophe before it; control characters are left out.

    Args:
        table: The table.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_cell, table.header))
    writer.writerows([_cell(cell) for cell in row] for row in table.rows)
    return out.getvalue().encode("utf-8")


def tables(assessment: Assessment) -> list[Table]:
    """All tables of an assessment; those without rows are left out.

    Args:
        assessment: The verdicts.
    """
    found = [
        verdicts(assessment),
        by_configuration(assessment),
        leads(assessment),
        thresholds(assessment),
        ranking(assessment),
        configurations(assessment),
        by_task(assessment),
        places(assessment),
    ]
    return [table for table in found if table.rows]


def verdicts(assessment: Assessment) -> Table:
    """One row for each predictor and outcome, with every number that the verdict rests on."""
    rows = list(assessment.rows())
    return Table("verdicts", tuple(rows[0]) if rows else (), tuple(tuple(row.values()) for row in rows))


def by_configuration(assessment: Assessment) -> Table:
    """How predictor and outcome go together in each configuration alone."""
    panel = assessment.aligned.panel
    return Table(
        "by-configuration",
        ("outcome", "predictor", "question", "configuration", "runs", "correlation", "standard_error"),
        tuple(
            (outcome, j.evidence.predictor, question, panel.configurations[at], int(runs), float(value), float(error))
            for outcome, judged in assessment.judged.items()
            for j in judged
            for question, found in (
                ("at equal task and history", j.evidence.association),
                ("moving together", j.evidence.together),
            )
            for at, runs, value, error in zip(found.configurations, found.runs, found.values, found.errors, strict=True)
        ),
    )


def leads(assessment: Assessment) -> Table:
    """The association at every lead."""
    return Table(
        "leads",
        ("outcome", "predictor", "lead", "association", "low", "high"),
        tuple(
            (outcome, j.evidence.predictor, lead, found.value, found.low, found.high)
            for outcome, judged in assessment.judged.items()
            for j in judged
            for lead, found in j.evidence.leads.items()
        ),
    )


def thresholds(assessment: Assessment) -> Table:
    """The association of every quantity with a threshold at each of them."""
    return Table(
        "thresholds",
        ("outcome", "quantity", "threshold", "value", "fixed", "association", "low", "high"),
        tuple(
            (outcome, sweep.quantity, sweep.symbol, at, sweep.fixed, found.value, found.low, found.high)
            for outcome, sweeps in assessment.sweeps.items()
            for sweep in sweeps
            for at, found in sweep.at.items()
        ),
    )


def ranking(assessment: Assessment) -> Table:
    """Ranking accuracy of predictors and of what is known without measuring."""
    return Table(
        "ranking",
        ("outcome", "predictor", "measured", "ranking_accuracy", "low", "high", "at_equal_task", "at_equal_task_low", "at_equal_task_high"),
        tuple(
            (outcome, e.predictor, measured, e.ranking.value, e.ranking.low, e.ranking.high, *_equal_task(e))
            for outcome, judged in assessment.judged.items()
            for measured, own in (("yes", [j.evidence for j in judged]), ("no", assessment.dull[outcome]))
            for e in own
        ),
    )  # fmt: skip


def configurations(assessment: Assessment) -> Table:
    """The outcome of each configuration at its first and at its last task, and the change."""
    header = ("outcome", "configuration", "runs", "first_task", "last_task")
    numbers = tuple(f"{what}{end}" for what in ("first", "last", "change") for end in ("", "_low", "_high"))
    return Table(
        "configurations",
        (*header, *numbers),
        tuple(
            (
                outcome,
                course.configuration,
                course.change.count,
                course.first_task,
                course.last_task,
                *(v for mean in (course.first, course.last, course.change) for v in (mean.value, mean.low, mean.high)),
            )
            for outcome in assessment.aligned.panel.outcomes
            for course in courses_of(assessment, outcome)
        ),
    )


def by_task(assessment: Assessment) -> Table:
    """Every outcome and every predictor by configuration and task: mean over runs with its 95 % interval."""
    return Table(
        "by-task",
        ("kind", "quantity", "meaning", "configuration", "task", "runs", "mean", "low", "high"),
        tuple(_by_task(assessment)),
    )


def places(assessment: Assessment) -> Table:
    """Every number that the statistics were computed from: one row for each run and task."""
    panel = assessment.aligned.panel
    columns = {**panel.outcomes, **panel.predictors}
    return Table(
        "places",
        ("configuration", "run", "task", *columns),
        tuple(
            (
                panel.configurations[int(panel.configuration_of[run])],
                name,
                task,
                *(float(values[run, at]) for values in columns.values()),
            )
            for run, name in enumerate(panel.runs)
            for at, task in enumerate(panel.tasks)
        ),
    )


def _by_task(assessment: Assessment) -> Iterator[tuple[Cell, ...]]:
    panel, meanings = assessment.aligned.panel, assessment.aligned.meanings
    kinds = (("outcome", panel.outcomes), ("predictor", panel.predictors))
    for kind, quantities in kinds:
        for name, values in quantities.items():
            for configuration, group in zip(panel.configurations, panel.groups, strict=True):
                for at, task in enumerate(panel.tasks):
                    mean = mean_of(values[group, at].tolist())
                    if mean.count:
                        told = meanings.get(name, "")
                        yield kind, name, told, configuration, task, mean.count, mean.value, mean.low, mean.high


def _equal_task(e: Evidence) -> Sequence[float]:
    found = e.ranking_at_equal_task
    return found.value, found.low, found.high


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        text = plain(cell)
        return f"'{text}" if text.startswith(FORMULA) else text
    if isinstance(cell, float | np.floating):
        return "" if math.isnan(cell) else repr(float(cell))
    return str(int(cell))
