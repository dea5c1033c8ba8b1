"""A whole study judged: every predictor of every outcome, beside the dull ones and the best rival."""

import json
import math

import numpy as np
import pytest
from simulated_studies import linked, shared_trends

from plasticity_probe.prediction.alignment import Aligned
from plasticity_probe.prediction.assessment import PREVIOUS, TASK_NUMBER, Assessment, assess_aligned
from plasticity_probe.prediction.panel import Panel
from plasticity_probe.prediction.verdict import LEVEL, SMALLEST, Verdict


@pytest.fixture(scope="module")
def found() -> Assessment:
    x, y = linked(0.6)(np.random.default_rng(0), 3, 10, 15)
    drifting, _ = shared_trends(np.random.default_rng(1), 3, 10, 15)
    noisy = x + 0.7 * np.random.default_rng(2).standard_normal(x.shape)
    panel = Panel(
        ("relu", "tanh", "<b>identity</b>"),
        np.repeat(np.arange(3), 10),
        tuple(f"run {r}" for r in range(30)),
        tuple(range(15)),
        {
            "rank.value": x,
            "rank.same again": x,
            "noisy.value": noisy,
            "drift.value": drifting,
            "still.value": np.ones_like(x),
        },
        {"trainability": y, "generalisation": -y},
    )
    return assess_aligned(Aligned(panel, {"rank.value": "a rank"}, ("a note",)))


def test_every_predictor_of_every_outcome_has_a_verdict(found: Assessment) -> None:
    verdicts = {(o, j.evidence.predictor): j.verdict for o, own in found.judged.items() for j in own}
    for outcome in ("trainability", "generalisation"):
        assert verdicts[outcome, "rank.value"] is Verdict.PREDICTS
        assert verdicts[outcome, "drift.value"] is not Verdict.PREDICTS
        assert verdicts[outcome, "still.value"] is Verdict.NOT_ASSESSED
    signs = [found.judged[o][0].evidence.association.estimate.value for o in ("trainability", "generalisation")]
    assert signs[0] == pytest.approx(-signs[1])


def test_dull_predictors_rank_but_get_no_association(found: Assessment) -> None:
    number, previous = found.dull["trainability"]
    assert (number.predictor, previous.predictor) == (TASK_NUMBER, PREVIOUS)
    for dull in (number, previous):
        assert math.isnan(dull.association.estimate.value)
        assert 0.5 < dull.ranking.value <= 1


def test_a_rival_of_another_probe_takes_what_it_knows(found: Assessment) -> None:
    over = found.over_rivals["trainability"]
    gains = {j.evidence.predictor: j.evidence.gain.value for j in found.judged["trainability"]}
    assert over["noisy.value"].rival in ("rank.value", "rank.same again")
    assert over["noisy.value"].gain.value < gains["noisy.value"] / 4
    # Another quantity of the same probe is no rival: it would leave nothing to itself.
    assert over["rank.value"].rival == "noisy.value"
    assert 0 < over["rank.value"].gain.value < gains["rank.value"]


def test_a_predictor_that_lives_elsewhere_is_no_rival() -> None:
    x, y = linked(0.6)(np.random.default_rng(0), 2, 10, 15)
    first = np.arange(20)[:, None] < 10
    noisy = x + 2 * np.random.default_rng(2).standard_normal(x.shape)
    panel = Panel(
        ("relu", "tanh"),
        np.repeat(np.arange(2), 10),
        tuple(f"run {r}" for r in range(20)),
        tuple(range(15)),
        {"here.value": np.where(first, x, np.nan), "there.value": np.where(first, np.nan, x), "both.value": noisy},
        {"trainability": y},
    )
    over = assess_aligned(Aligned(panel, {}, ())).over_rivals["trainability"]
    assert over["here.value"].rival == "both.value"
    assert over["there.value"].rival == "both.value"
    assert over["both.value"].rival in ("here.value", "there.value")


def test_the_dictionary_is_plain_json_with_the_rules(found: Assessment) -> None:
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["schema"] == "plasticity_probe.verdict/1"
    assert told["configurations"] == {"relu": 10, "tanh": 10, "<b>identity</b>": 10}
    assert (told["rules"]["level"], told["rules"]["smallest_association"]) == (LEVEL, SMALLEST)
    first = told["outcomes"]["trainability"]["verdicts"][0]
    assert (first["predictor"], first["meaning"], first["verdict"]) == ("rank.value", "a rank", "predicts")
    assert first["association"]["value"] == found.judged["trainability"][0].evidence.association.estimate.value
    assert set(first["by_configuration"]) == {"relu", "tanh", "<b>identity</b>"}
    assert told["outcomes"]["trainability"]["verdicts"][-1]["association"]["value"] is None
    assert told["notes"] == ["a note"]


def test_rows_are_flat_and_complete(found: Assessment) -> None:
    rows = list(found.rows())
    assert len(rows) == 10
    assert len({tuple(row) for row in rows}) == 1
    assert all(isinstance(value, str | int | float) for row in rows for value in row.values())
    assert rows[0]["rival"] == "noisy.value"


def test_a_study_without_outcomes_has_no_verdict() -> None:
    x, _ = linked(0.6)(np.random.default_rng(0), 1, 6, 5)
    panel = Panel(("a",), np.zeros(6, int), tuple("rstuvw"), (0, 1, 2, 3, 4), {"x": x}, {})
    empty = assess_aligned(Aligned(panel, {}, ()))
    assert empty.judged == {}
    assert empty.to_dict()["outcomes"] == {}
