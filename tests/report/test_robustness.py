"""Where a link holds, as it is drawn: each cell and dot is the number that was assessed."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student
from studies import study, telling

from plasticity_probe.prediction.assessment import assess_aligned
from plasticity_probe.prediction.sweeps import Sweep
from plasticity_probe.report import draw_verdicts
from plasticity_probe.report.panels import Forest, SignMap
from plasticity_probe.report.robustness import FIXED, OTHER, setting_figures, sweep_figure
from plasticity_probe.report.tables import by_configuration, thresholds

RUNS, TASKS = 16, 8
OUTCOME = "trainability"


@pytest.fixture(scope="module")
def found():
    y, seeing, drifting = telling(RUNS, TASKS)
    alone = np.where(np.arange(RUNS)[:, None] < RUNS // 2, seeing, np.nan)
    aligned = study(
        {"fisher.rank": seeing, "norms.weight": drifting, "units.alone": alone}, y, configurations=2
    ).aligned
    values = np.stack([seeing, drifting, -seeing])
    swept = Sweep("fisher.rank", "δ", 0.01, (0.001, 0.01, 0.1), values)
    empty = Sweep("units.share", "τ", 0.1, (0.1,), np.full((1, RUNS, TASKS), np.nan))
    return assess_aligned(replace(aligned, sweeps=(swept, empty)))


def test_a_map_holds_the_association_of_each_configuration_and_stars_what_its_interval_tells_from_zero(found) -> None:
    between, within = setting_figures(found, OUTCOME)
    by_name = {j.evidence.predictor: j.evidence for j in found.judged[OUTCOME]}
    for figure, kind in ((between, "association"), (within, "together")):
        (panel,) = figure.panels
        assert isinstance(panel, SignMap)
        assert panel.columns == ("configuration 0", "configuration 1")
        for line, label in enumerate(panel.labels):
            own = getattr(by_name[label], kind)
            for column in range(2):
                at = np.flatnonzero(own.configurations == column)
                if not at.size:
                    assert np.isnan(panel.values[line, column])
                    assert not panel.marked[line, column]
                    continue
                value, error, runs = own.values[at[0]], own.errors[at[0]], own.runs[at[0]]
                assert panel.values[line, column] == value
                assert panel.marked[line, column] == (abs(value) > student.ppf(0.975, runs - 1) * error)
    assert not np.isnan(between.panels[0].values[0]).any()  # pyright: ignore[reportAttributeAccessIssue]
    assert "no correction" in between.caption or "without correction" in between.caption
    draw_verdicts.render(between)


def test_a_single_configuration_has_no_map() -> None:
    y, seeing, _ = telling(8, TASKS)
    assert setting_figures(study({"fisher.rank": seeing}, y), OUTCOME) == []


def test_a_sweep_shows_every_threshold_and_marks_the_one_that_was_fixed(found) -> None:
    figure = sweep_figure(found, OUTCOME)
    assert figure is not None
    (panel,) = figure.panels
    assert isinstance(panel, Forest)
    assert panel.labels == ("δ = 0.001", "δ = 0.01", "δ = 0.1")
    assert set(panel.groups) == {"fisher.rank"}
    fixed, other = panel.estimates
    assert (fixed.label, other.label) == (FIXED, OTHER)
    assert np.isnan(fixed.values).tolist() == [True, False, True]
    assert np.isnan(other.values).tolist() == [False, True, False]
    at = found.sweeps[OUTCOME][0].at
    assert other.values[0] == at[0.001].value
    assert other.values[0] == pytest.approx(-other.values[2], abs=1e-12)
    assert fixed.lower[1] == at[0.01].low
    draw_verdicts.render(figure)


def test_the_sweep_at_the_fixed_threshold_is_the_association_of_the_verdict() -> None:
    y, seeing, _ = telling(RUNS, TASKS)
    aligned = study({"fisher.rank": seeing}, y, configurations=2).aligned
    found = assess_aligned(replace(aligned, sweeps=(Sweep("fisher.rank", "δ", 0.01, (0.01,), seeing[None]),)))
    swept, judged = found.sweeps[OUTCOME][0].at[0.01], found.judged[OUTCOME][0]
    assert swept.value == judged.evidence.association.estimate.value


def test_without_sweeps_nothing_is_drawn(found) -> None:
    y, seeing, _ = telling(RUNS, TASKS)
    assert sweep_figure(study({"fisher.rank": seeing}, y), OUTCOME) is None


def test_the_tables_hold_both_questions_and_every_threshold(found) -> None:
    rows = by_configuration(found).rows
    assert {row[2] for row in rows} == {"at equal task and history", "moving together"}
    assert len(rows) == 2 * (2 + 2 + 1)
    table = thresholds(found)
    assert [(row[1], row[3]) for row in table.rows if row[1] == "fisher.rank"] == [
        ("fisher.rank", 0.001),
        ("fisher.rank", 0.01),
        ("fisher.rank", 0.1),
    ]
