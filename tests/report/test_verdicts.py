"""What is drawn of an assessment, held against the numbers it is drawn from."""

import math

import numpy as np
import pytest
from scipy import stats
from studies import study, telling

from plasticity_probe.prediction.verdict import LEADS, SMALLEST, Verdict
from plasticity_probe.report import draw_verdicts
from plasticity_probe.report.panels import Cloud, Forest, SignMap
from plasticity_probe.report.verdicts import (
    CLOUDS,
    PREDICTORS,
    courses_of,
    forest_figure,
    lead_figure,
    number_of,
    percent,
    probability,
    ranked,
    ranking_figure,
    scatter_figure,
    side_by_side_figure,
)

RUNS, TASKS = 16, 8
OUTCOME = "trainability"


@pytest.fixture(scope="module")
def found():
    y, seeing, drifting = telling(RUNS, TASKS)
    noise = np.random.default_rng(1).standard_normal((RUNS, TASKS))
    constant = np.ones((RUNS, TASKS))
    x = {"fisher.rank": seeing, "norms.weight": drifting, "norms.noise": noise, "units.dead": constant}
    return study(x, y, configurations=2)


def forest(figure) -> Forest:
    (panel,) = figure.panels
    assert isinstance(panel, Forest)
    return panel


def test_the_forest_holds_every_assessed_predictor_once_under_its_verdict(found) -> None:
    figure = forest_figure(found, OUTCOME)
    panel = forest(figure)
    order = [j for j in ranked(found.judged[OUTCOME]) if j.verdict is not Verdict.NOT_ASSESSED]
    assert list(panel.labels) == [j.evidence.predictor for j in order]
    assert panel.labels[0] == "fisher.rank"
    assert panel.shaded == (-SMALLEST, SMALLEST)
    for line, j in enumerate(order):
        drawn = [e for e in panel.estimates if not np.isnan(e.values[line])]
        assert [e.look for e in drawn] == [j.verdict]
        interval = j.evidence.association.estimate
        assert (drawn[0].values[line], drawn[0].lower[line], drawn[0].upper[line]) == (
            interval.value,
            interval.low,
            interval.high,
        )
    assert panel.estimates[0].look == Verdict.PREDICTS
    for said in ("16 runs of 2 configurations, 8 tasks", "1 predictor could not be assessed", "95 % bootstrap", "[1]"):
        assert said in figure.caption + panel.x_label


def test_of_many_predictors_the_first_are_drawn_and_the_caption_says_so() -> None:
    y, _, _ = telling(5, 3)
    rng = np.random.default_rng(0)
    many = {f"p{at}.value": rng.standard_normal((5, 3)) for at in range(PREDICTORS + 3)}
    assessed = study(many, y)
    figure = forest_figure(assessed, OUTCOME)
    assert len(forest(figure).labels) == PREDICTORS
    assert f"The first {PREDICTORS} of {PREDICTORS + 3} predictors are drawn" in figure.caption


def test_the_map_of_leads_marks_cells_whose_interval_excludes_zero(found) -> None:
    figure = lead_figure(found, OUTCOME)
    (panel,) = figure.panels
    assert isinstance(panel, SignMap)
    assert panel.columns == ("after", *(str(lead) for lead in LEADS[1:]))
    evidence = {j.evidence.predictor: j.evidence for j in found.judged[OUTCOME]}
    for line, label in enumerate(panel.labels):
        for column, lead in enumerate(LEADS):
            own = evidence[label].leads[lead]
            assert panel.values[line, column] == pytest.approx(own.value, nan_ok=True)
            assert panel.marked[line, column] == (own.low > 0 or own.high < 0)
    at = panel.labels.index("fisher.rank")
    assert panel.marked[at, LEADS.index(0)]
    assert "units.dead" not in panel.labels


def test_leads_that_no_run_is_long_enough_for_have_no_column() -> None:
    y, seeing, _ = telling(8, 4)
    (panel,) = lead_figure(study({"a.b": seeing}, y), OUTCOME).panels
    assert isinstance(panel, SignMap)
    assert set(panel.columns) < {"after", "0", "1", "2", "3"}


def test_clouds_hold_the_strongest_predictor_and_one_of_each_other_probe(found) -> None:
    figure = scatter_figure(found, OUTCOME)
    names = [panel.x_label for panel in figure.panels]
    assert names[0] == "fisher.rank"
    assert {name.split(".")[0] for name in names[:3]} == {"fisher", "norms", "units"}
    assert len(names) <= CLOUDS
    (cloud, *_) = figure.panels
    assert isinstance(cloud, Cloud)
    assert len(cloud.trails) == RUNS
    assert [trail.hue for trail in cloud.trails] == [0] * 8 + [1] * 8
    panel = found.aligned.panel
    np.testing.assert_array_equal(cloud.trails[3].x, panel.predictors["fisher.rank"][3])
    np.testing.assert_array_equal(cloud.trails[3].y, panel.outcomes[OUTCOME][3])


def test_ranking_stands_beside_what_is_known_without_measuring(found) -> None:
    panel = forest(ranking_figure(found, OUTCOME))
    assert panel.reference == 0.5
    assert panel.groups[-2:] == ("known without measuring",) * 2
    assert panel.labels[-2:] == ("the number of the task", "the previous outcome")
    within = panel.estimates[0].values
    assert list(within[:-2]) == sorted(within[:-2], reverse=True)


def test_configurations_side_by_side_are_paired_run_by_run() -> None:
    y = np.array(
        [[0.9, 0.5, 0.4], [0.8, 0.5, 0.2], [0.7, 0.5, np.nan], [0.9, 0.9, 0.9], [0.9, 0.9, 1.0], [0.8, 0.9, 0.9]]
    )
    assessed = study({"a.b": np.zeros_like(y)}, y, configurations=2)
    kept, lost = courses_of(assessed, OUTCOME)
    assert kept.configuration == "configuration 1"
    assert lost.change.count == 2, "a run without the last outcome is in none of the means"
    assert (lost.first.value, lost.last.value, lost.change.value) == pytest.approx((0.85, 0.3, -0.55))
    changes = [0.0, 0.1, 0.1]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(changes), scale=stats.sem(changes))
    assert (kept.change.low, kept.change.high) == pytest.approx((low, high))
    figure = side_by_side_figure(assessed, OUTCOME)
    assert [panel.title for panel in figure.panels] == ["at the first and the last task", "change from first to last"]
    assert "First task: 0, last task: 2" in figure.caption


def test_nothing_is_drawn_of_nothing() -> None:
    y, seeing, _ = telling(1, 5)
    alone = study({"a.b": seeing}, y)
    assert forest_figure(alone, OUTCOME) is None
    assert lead_figure(alone, OUTCOME) is None
    assert scatter_figure(study({"a.b": np.full_like(y, np.nan)}, y), OUTCOME) is None
    assert side_by_side_figure(study({"a.b": seeing[:, :1]}, y[:, :1]), OUTCOME) is None


def test_every_verdict_has_a_colour_and_a_marker_of_its_own() -> None:
    looks = [draw_verdicts.LOOKS[verdict] for verdict in Verdict if verdict is not Verdict.NOT_ASSESSED]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)


@pytest.mark.parametrize("make", [forest_figure, lead_figure, scatter_figure, ranking_figure, side_by_side_figure])
def test_figures_are_drawn_the_same_every_time(make, found) -> None:
    figure = make(found, OUTCOME)
    once, again = draw_verdicts.render(figure), draw_verdicts.render(figure)
    assert once.png == again.png
    assert once.pdf == again.pdf
    assert once.png.startswith(b"\x89PNG")
    assert once.pdf.startswith(b"%PDF")
    assert 0 < once.foot < 400


def test_hostile_and_long_names_are_drawn() -> None:
    y, seeing, drifting = telling(6, 4)
    names = ("<script>.$\\frac{1}$", "a" * 300 + ".b", "\u202e\x00.~^_{}", "probe.q" + "ü" * 90)
    assessed = study({name: seeing + at * drifting for at, name in enumerate(names)}, y)
    for make in (forest_figure, lead_figure, scatter_figure, ranking_figure):
        figure = make(assessed, OUTCOME)
        labels = [label for panel in figure.panels for label in getattr(panel, "labels", ())]
        assert all(len(label) <= 60 for label in labels)
        assert draw_verdicts.render(figure).png


def test_numbers_are_printed_with_real_minus_signs_and_dashes_for_none() -> None:
    assert percent(-0.1234) == "−12.3 %"
    assert percent(math.nan) == probability(math.nan) == "–"
    assert probability(0.0004) == "< .001"
    assert probability(0.05) == ".050"
    y, seeing, _ = telling(8, 4)
    interval = study({"a.b": -seeing}, y).judged[OUTCOME][0].evidence.association.estimate
    assert number_of(interval).startswith("−")
