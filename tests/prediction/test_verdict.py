"""Verdicts on studies whose truth is known, and on what is no study."""

import math
from dataclasses import replace

import numpy as np
import pytest
from simulated_studies import (
    NULLS,
    as_panel,
    follows_last,
    linked,
    own_trends,
    shared_trends,
)

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.panel import Numbers, Panel
from plasticity_probe.prediction.resampling import Interval
from plasticity_probe.prediction.verdict import SMALLEST, Judged, Verdict, assess, controlled, judge, weigh

NAN = float("nan")


def judged(x: Numbers, y: Numbers, configurations: int = 4) -> Judged:
    return assess(as_panel(x, y, configurations), "y")[0]


def test_a_planted_link_predicts_and_the_text_quotes_its_numbers() -> None:
    x, y = linked(0.6)(np.random.default_rng(0), 4, 12, 20)
    found = judged(x, y)
    e = found.evidence
    assert found.verdict is Verdict.PREDICTS
    assert e.gain.low > 0
    assert e.transfer.mean > 0
    for quoted in (
        "x predicts y",
        f"{e.association.estimate.value:+.2f}",
        "48 runs of 4 configurations",
        f"{100 * e.gain.value:.1f} %",
    ):
        assert quoted in found.text
    assert set(e.leads) == {-1, 0, 1, 2, 3, 4, 5}
    assert e.leads[0].value == e.association.estimate.value
    # What it sees of a task fades with the outcome's memory.
    assert e.leads[0].value > e.leads[2].value > e.leads[5].value
    assert e.leads[2].low > 0


def test_a_link_without_memory_ends_with_its_task() -> None:
    x, y = linked(0.6, memory=0.0)(np.random.default_rng(0), 4, 12, 20)
    leads = judged(x, y).evidence.leads
    assert leads[0].value > 0.4
    for lead in (-1, 1, 2, 3):
        assert abs(leads[lead].value) < 4 * leads[lead].error


def test_curves_that_fall_together_accompany_only() -> None:
    x, y = shared_trends(np.random.default_rng(0), 4, 12, 20)
    found = judged(x, y)
    assert found.evidence.together.estimate.value > 0.5
    assert found.verdict is Verdict.ACCOMPANIES


def test_a_copy_of_earlier_outcomes_accompanies_only() -> None:
    x, y = follows_last(np.random.default_rng(3), 4, 12, 20)
    assert judged(x, y).verdict is Verdict.ACCOMPANIES


def test_a_link_too_small_to_be_of_use_is_no_prediction_however_sure_it_is() -> None:
    x, y = linked(0.1)(np.random.default_rng(0), 4, 60, 20)
    found = judged(x, y)
    assert found.q <= 0.001
    assert found.evidence.gain.narrow_low > 0
    assert found.evidence.association.estimate.narrow_high < SMALLEST
    assert found.verdict is Verdict.ACCOMPANIES


def test_unrelated_drifts_do_not_predict() -> None:
    x, y = own_trends(np.random.default_rng(1), 4, 12, 20)
    assert judged(x, y).verdict is Verdict.DOES_NOT_PREDICT


def test_planted_sign_flips_are_refuted() -> None:
    x, y = linked(np.array([0.5, 0.5, -0.5, -0.5]))(np.random.default_rng(0), 4, 12, 20)
    found = judged(x, y)
    assert found.verdict is Verdict.REFUTED
    assert "Its sign depends on the setting" in found.text
    low, high = found.evidence.association.values.min(), found.evidence.association.values.max()
    assert f"{low:+.2f}" in found.text
    assert f"{high:+.2f}" in found.text


def test_movements_of_both_signs_are_refuted() -> None:
    rng, t = np.random.default_rng(0), np.linspace(0, 4, 20)
    x = rng.standard_normal((24, 20)) + t
    y = rng.standard_normal((24, 20)) + np.repeat([1.0, -1.0], 12)[:, None] * t
    found = judged(x, y, 2)
    assert found.verdict is Verdict.REFUTED
    assert "over the tasks of a run" in found.text


def test_too_few_runs_are_inconclusive_and_say_how_many_more_it_takes() -> None:
    x, y = linked(0.3)(np.random.default_rng(2), 1, 5, 10)
    found = judged(x, y, 1)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.more_runs is not None
    assert f"about {found.more_runs} more runs" in found.text


def test_the_number_of_runs_asked_for_settles_it() -> None:
    """Studies of the size that inconclusive ones asked for are decided in most cases, as a power of .8 says."""
    rng, decided, asked = np.random.default_rng(5), [], []
    for _ in range(25):
        x, y = linked(0.0)(rng, 2, 6, 10)
        found = judge([weigh(as_panel(x, y, 2), "x", "y", full=False)], as_panel(x, y, 2))[0]
        if found.more_runs is None:
            continue
        asked.append(6 + found.more_runs)
    runs = int(np.median(asked))
    for _ in range(25):
        x, y = linked(0.0)(rng, 2, runs, 10)
        panel = as_panel(x, y, 2)
        decided.append(judge([weigh(panel, "x", "y", full=False)], panel)[0].verdict is not Verdict.INCONCLUSIVE)
    assert np.mean(decided) > 0.6


@pytest.mark.parametrize("name", NULLS)
def test_unrelated_quantities_do_not_predict(name: str) -> None:
    verdicts: list[Verdict] = []
    for seed in range(12):
        x, y = NULLS[name](np.random.default_rng(seed), 3, 8, 15)
        panel = as_panel(x, y, 3)
        verdicts.append(judge([weigh(panel, "x", "y", seed, full=False)], panel)[0].verdict)
    # With a rate of 5 %, three of twelve have a chance of 2 %.
    assert verdicts.count(Verdict.PREDICTS) <= 2


def plain_study(**changes: object) -> Panel:
    x, y = linked(0.5)(np.random.default_rng(0), 2, 6, 8)
    return replace(as_panel(x, y, 2), **changes)  # pyright: ignore[reportArgumentType]


def with_predictor(values: Numbers) -> Panel:
    return plain_study(predictors={"x": values})


@pytest.mark.parametrize(
    ("panel", "reason"),
    [
        (plain_study(outcomes={"y": np.full((12, 8), NAN)}), "there is no outcome"),
        (with_predictor(np.full((12, 8), 7.0)), "the predictor does not vary"),
        (with_predictor(np.full((12, 8), NAN)), "missing at 100%"),
        (
            with_predictor(np.tile(np.arange(8.0), (12, 1))),
            "neither or only one of predictor and outcome varies between runs",
        ),
        (plain_study(outcomes={"y": np.ones((12, 8))}), "the outcome does not vary"),
        (
            Panel(
                ("a",), np.array([0]), ("r",), (0, 1, 2, 3), {"x": np.arange(4.0)[None]}, {"y": np.arange(4.0)[None]}
            ),
            "at least 5 runs of a configuration are needed, there are at most 1",
        ),
        (
            Panel(("a",), np.zeros(6, int), tuple("rstuvw"), (0, 1), {"x": np.eye(6)[:, :2]}, {"y": np.eye(6)[:, 1:3]}),
            "at least 3 tasks with an outcome are needed, there are 2",
        ),
    ],
)
def test_from_nothing_comes_no_verdict(panel: Panel, reason: str) -> None:
    found = assess(panel, "y")[0]
    assert found.verdict is Verdict.NOT_ASSESSED
    assert reason in found.text
    assert math.isnan(found.q)


def test_rows_that_are_missing_here_and_there_do_not_stop_it() -> None:
    x, y = linked(0.6)(np.random.default_rng(0), 4, 12, 20)
    x[np.random.default_rng(1).random(x.shape) < 0.2] = NAN
    found = judged(x, y)
    assert found.verdict is Verdict.PREDICTS
    assert found.evidence.missing == pytest.approx(0.2, abs=0.05)


def test_a_predictor_that_some_configurations_lack_is_judged_by_the_others() -> None:
    x, y = linked(0.6)(np.random.default_rng(0), 4, 12, 20)
    panel = as_panel(x, y, 4)
    having = panel.configuration_of % 2 == 0
    found = assess(replace(panel, predictors={"x": np.where(having[:, None], x, NAN)}), "y")[0]
    alone = assess(as_panel(x[having], y[having], 2), "y")[0]
    assert found.evidence.missing == 0
    assert found.evidence.association.configurations.tolist() == [0, 2]
    assert found.evidence.association.estimate == alone.evidence.association.estimate
    assert found.verdict is Verdict.PREDICTS
    assert "because there it is missing or does not vary: 2 of 4." in found.text


def test_a_predictor_of_one_run_alone_is_missing_in_its_configuration() -> None:
    x, y = linked(0.6)(np.random.default_rng(0), 4, 12, 20)
    x[1:] = NAN
    found = judged(x, y)
    assert found.verdict is Verdict.NOT_ASSESSED
    assert found.evidence.missing == pytest.approx(11 / 12)
    assert "missing at 92%" in found.text


def test_more_predictors_make_it_harder() -> None:
    x, y = linked(0.3)(np.random.default_rng(0), 4, 8, 20)
    panel = as_panel(x, y, 4)
    noise = {f"noise {i}": np.random.default_rng(i).standard_normal(x.shape) for i in range(20)}
    alone = assess(panel, "y")[0]
    among = assess(replace(panel, predictors={"x": x, **noise}), "y")
    assert among[0].q >= alone.q
    assert among[0].evidence.association.p == alone.evidence.association.p
    assert sum(j.verdict is Verdict.PREDICTS for j in among[1:]) <= 1


def test_the_same_seed_gives_the_same_numbers_whoever_is_beside() -> None:
    x, y = linked(0.3)(np.random.default_rng(0), 2, 8, 12)
    one = weigh(as_panel(x, y, 2), "x", "y", 7)
    panel = replace(as_panel(x, y, 2), predictors={"other": x[::-1], "x": x})
    assert weigh(panel, "x", "y", 7).gain == one.gain
    assert weigh(panel, "x", "y", 8).gain != one.gain


def test_control_of_the_false_discovery_rate_passes_over_what_is_unknown() -> None:
    found = controlled([0.01, NAN, 0.04, 0.03])
    assert found[[0, 2, 3]] == pytest.approx([0.03, 0.04, 0.04])
    assert math.isnan(found[1])
    assert controlled([]).size == 0


def test_unknown_names_and_mixed_outcomes_are_refused() -> None:
    panel = plain_study()
    with pytest.raises(UsageError, match="no predictor 'z'; there are: x"):
        weigh(panel, "z", "y")
    with pytest.raises(UsageError, match="no outcome 'z'; there are: y"):
        weigh(panel, "x", "z")
    one = weigh(panel, "x", "y")
    with pytest.raises(UsageError, match="one outcome at a time"):
        judge([one, replace(one, outcome="other")], panel)


def test_intervals_are_ordered() -> None:
    x, y = linked(0.3)(np.random.default_rng(0), 2, 8, 12)
    e = weigh(as_panel(x, y, 2), "x", "y")
    for found in (
        e.association.estimate,
        e.together.estimate,
        e.gain,
        e.ranking,
        e.ranking_at_equal_task,
        *e.leads.values(),
    ):
        assert isinstance(found, Interval)
        assert found.low <= found.narrow_low <= found.narrow_high <= found.high
