"""What to draw of where a link holds: in which configurations, and at which thresholds."""

import numpy as np
from scipy.stats import t as student

from plasticity_probe.prediction.assessment import Assessment
from plasticity_probe.prediction.association import Association
from plasticity_probe.prediction.verdict import SMALLEST, Judged, Verdict
from plasticity_probe.report.panels import Estimates, Forest, SignMap, VerdictFigure
from plasticity_probe.report.verdicts import (
    CONFIGURATIONS,
    PREDICTORS,
    columns,
    configuration_names,
    joined,
    left_out,
    names,
    ranked,
    said,
    studied,
    what,
)

MOST = 2 * CONFIGURATIONS
"""The most configurations of a map (our choice: what fits a page); the tables have them all."""
FIXED, OTHER = "the threshold of the verdict", "other thresholds"


def setting_figures(assessment: Assessment, outcome: str) -> list[VerdictFigure]:
    """In which configuration a predictor goes with the outcome: between its runs, and over the tasks of a run.

    Args:
        assessment: The verdicts.
        outcome: Name of the outcome.

    Returns:
        None of a kind that fewer than two configurations have.
    """
    assessed = [j for j in ranked(assessment.judged[outcome]) if j.verdict is not Verdict.NOT_ASSESSED]
    between = [j.evidence.association for j in assessed]
    within = [j.evidence.together for j in assessed]
    found = (
        _map(
            assessment,
            outcome,
            assessed,
            between,
            "settings",
            f"Where it holds: {said(outcome)}",
            f"Rank correlation with {what(outcome)} at equal task and history, in each configuration alone.",
        ),
        _map(
            assessment,
            outcome,
            assessed,
            within,
            "settings-together",
            f"Where they move together: {said(outcome)}",
            f"Spearman's rank correlation with {what(outcome)} over the tasks of a run, averaged over the runs of each configuration. What "
            "drifts goes together with what is lost; it says nothing about prediction.",
        ),
    )
    return [figure for figure in found if figure is not None]


def _map(
    assessment: Assessment,
    outcome: str,
    assessed: list[Judged],
    found: list[Association],
    name: str,
    title: str,
    meaning: str,
) -> VerdictFigure | None:
    used = sorted({int(at) for each in found[:PREDICTORS] for at in each.configurations})
    if len(used) < 2:
        return None
    shown, kept = assessed[:PREDICTORS], used[:MOST]
    values, errors = np.full((2, len(shown), len(kept)), np.nan)
    critical = np.ones((len(shown), len(kept)))
    for line, each in enumerate(found[:PREDICTORS]):
        for at, value, error, runs in zip(each.configurations, each.values, each.errors, each.runs, strict=True):
            if int(at) in kept:
                column = kept.index(int(at))
                values[line, column], errors[line, column] = value, error
                critical[line, column] = student.isf(0.025, max(int(runs) - 1, 1))
    labels = configuration_names(assessment)
    panel = SignMap(
        "",
        "configuration",
        tuple(labels[at] for at in kept),
        names([j.evidence.predictor for j in shown]),
        values,
        np.abs(values) > critical * errors,
        "rank correlation [1]",
    )
    caption = [
        studied(assessment, outcome),
        meaning,
        "Star: Student's 95 % interval over its runs excludes 0, without correction for the number of cells. Grey: missing, or without "
        "variation. "
        "In the order of the verdicts.",
        left_out(len(assessed), len(shown)),
        left_out(len(used), len(kept), "configurations"),
    ]
    return VerdictFigure(f"{outcome}-{name}", title, (panel,), joined(caption))


def sweep_figure(assessment: Assessment, outcome: str) -> VerdictFigure | None:
    """The association of quantities with a threshold at every threshold of the sweep.

    Args:
        assessment: The verdicts.
        outcome: Name of the outcome.

    Returns:
        None where no such quantity has an association.
    """
    lines = [
        (sweep.quantity, f"{sweep.symbol} = {at:g}", np.isclose(at, sweep.fixed), found)
        for sweep in assessment.sweeps[outcome]
        for at, found in sweep.at.items()
        if not np.isnan([each.value for each in sweep.at.values()]).all()
    ]
    if not lines:
        return None
    fixed = np.array([line[2] for line in lines])
    ends = columns([line[3] for line in lines])
    panel = Forest(
        "",
        "rank correlation at equal task and history [1]",
        tuple(line[1] for line in lines),
        (
            Estimates(FIXED, "last", *(np.where(fixed, v, np.nan) for v in ends)),
            Estimates(OTHER, "first", *(np.where(fixed, np.nan, v) for v in ends)),
        ),
        groups=tuple(line[0] for line in lines),
        reference=0.0,
        shaded=(-SMALLEST, SMALLEST),
    )
    caption = [
        studied(assessment, outcome),
        f"Rank correlation with {what(outcome)} at equal task and history, with its 95 % bootstrap interval over runs, by the threshold of the "
        "quantity: δ, the share that a threshold rank leaves out; ε, the cut-off of an epsilon rank; τ, the activity below which a unit is "
        "dormant. The verdict is about the threshold that the probe was set to before, whatever the others show. Ranks of a Hessian are "
        "here those of the quadrature's own nodes, without the probe's correction around zero.",
    ]
    return VerdictFigure(
        f"{outcome}-thresholds", f"Does it hang on a threshold? {said(outcome)}", (panel,), joined(caption)
    )
