"""Rows of a trace become a panel: the weights that a task was learned from, beside what became of the task."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hand_made_rows import ATTRS, NAN, measured, outcome, told

from plasticity_probe.prediction.alignment import align
from plasticity_probe.prediction.verdict import assess
from plasticity_probe.trace.layout import Row, Variable


def test_what_was_measured_before_a_task_stands_beside_its_outcome() -> None:
    rows = [measured(0, t, 10.0 - t) for t in range(4)] + told([outcome(0, t, 0.9 - 0.1 * t) for t in range(3)])
    found = align(rows)
    assert found.panel.tasks == (0, 1, 2, 3)
    assert found.panel.configurations == ("labels",)
    assert list(found.panel.predictors) == ["fisher_rank.rank"]
    assert found.panel.predictors["fisher_rank.rank"].tolist() == [[10, 9, 8, 7]]
    assert found.panel.outcomes["trainability"] == pytest.approx(np.array([[0.9, 0.8, 0.7, NAN]]), nan_ok=True)
    assert set(found.panel.outcomes) == {"trainability"}
    assert found.meanings["fisher_rank.rank"] == "a rank"
    assert found.notes == ()


def test_checkpoints_from_inside_a_task_never_count() -> None:
    rows = [measured(0, 0, 1.0), measured(0, 0, 99.0, step=50), measured(0, 1, 98.0, step=150)]
    found = align(rows + told([outcome(0, 0), outcome(0, 1)]))
    assert found.panel.predictors["fisher_rank.rank"] == pytest.approx(np.array([[1, NAN]]), nan_ok=True)
    assert any("no checkpoint from their start" in note for note in found.notes)


def test_of_two_at_the_start_the_weights_that_the_remedy_made_count() -> None:
    remedied = measured(0, 1, 5.0, checkpoint="seed_0/step_00000100_remedied.safetensors")
    for rows in ([measured(0, 1, 3.0), remedied], [remedied, measured(0, 1, 3.0)]):
        found = align([measured(0, 0, 1.0), *rows, *told([outcome(0, 0), outcome(0, 1)])])
        assert found.panel.predictors["fisher_rank.rank"].tolist() == [[1, 5]]


def test_gaps_against_fresh_networks_are_negative_where_plasticity_was_lost() -> None:
    own = [outcome(0, 0, 0.9), outcome(0, 1, 0.6), outcome(0, 1, 0.8, network="control")]
    found = align([measured(0, 0, 1.0), *told(own)])
    assert found.panel.outcomes["trainability_against_fresh"] == pytest.approx(np.array([[NAN, -0.2]]), nan_ok=True)


def test_tasks_learned_to_values_are_outcomes_of_their_own_and_less_loss_is_more() -> None:
    own = [outcome(0, t, accuracy=NAN, loss=1.0 + t, test_loss=2.0 + t) for t in range(2)]
    found = align([measured(0, 0, 1.0), *told(own)])
    assert set(found.panel.outcomes) == {"trainability_by_loss", "generalisation_by_loss"}
    assert found.panel.outcomes["trainability_by_loss"].tolist() == [[-1, -2]]
    assert found.panel.outcomes["generalisation_by_loss"].tolist() == [[-2, -3]]


def test_configurations_are_told_apart_by_their_setting_and_named_by_their_folder() -> None:
    other = told([outcome(7, 0)], "other", "t")
    same_name = [replace(row, run="again") for row in told([outcome(8, 0)], "labels", "u")]
    found = align([*told([outcome(0, 0), outcome(1, 0)]), *other, *same_name])
    assert found.panel.configurations == ("labels (s)", "other", "labels (u)")
    assert found.panel.configuration_of.tolist() == [0, 0, 1, 2]


def test_each_layer_is_a_predictor_where_asked_for_and_none_stands_twice() -> None:
    def layered(task: int, values: list[float]) -> Row:
        attrs = {**ATTRS, "summary": "last"}
        unsummed = {**ATTRS, "summary": "none"}
        variables = {
            "rank": Variable(("layer",), np.array(values), attrs),
            "width": Variable(("layer",), np.array(values) + 1, unsummed),
            "sweep": Variable(("layer", "tau"), np.array([values, values]), unsummed),
        }
        return replace(measured(0, task, 0.0), variables=variables, labels={"layer": ("first", "last")})

    rows = [layered(0, [3.0, 4.0]), layered(1, [5.0, 6.0]), *told([outcome(0, 0), outcome(0, 1)])]
    assert list(align(rows).panel.predictors) == ["fisher_rank.rank"]
    found = align(rows, layers=True)
    assert {name: values.tolist() for name, values in found.panel.predictors.items()} == {
        "fisher_rank.rank": [[4, 6]],
        "fisher_rank.rank[first]": [[3, 5]],
        "fisher_rank.width[first]": [[4, 6]],
        "fisher_rank.width[last]": [[5, 7]],
    }
    assert found.meanings["fisher_rank.width[last]"] == "a rank (last)"


def test_what_is_the_same_on_other_data_counts_once() -> None:
    def on(data: str, task: int, same: float, other: float) -> Row:
        variables = {name: Variable((), np.array(value), ATTRS) for name, value in (("same", same), ("other", other))}
        settings = json.dumps({"run_sha256": "s", "on": data})
        return replace(measured(0, task, 0.0), variables=variables, settings=settings)

    rows = [on("current", 1, 5.0, 8.0), on("next", 0, 4.0, 6.0), on("next", 1, 5.0, 7.0)]
    found = align(rows + told([outcome(0, 0), outcome(0, 1)]))
    assert {name: values.tolist()[0] for name, values in found.panel.predictors.items()} == {
        "fisher_rank.other on current": pytest.approx([NAN, 8], nan_ok=True),
        "fisher_rank.same on next": [4, 5],
        "fisher_rank.other on next": [6, 7],
    }
    assert found.notes == (
        "1 predictors are the same numbers as others, on other data, and count once "
        "(fisher_rank.same on current is fisher_rank.same on next, for one)",
    )


def test_measurements_that_did_not_end_well_are_missing() -> None:
    rows = [measured(0, 0, 1.0), measured(0, 1, 2.0, status="not_converged", message="why")]
    found = align(rows + told([outcome(0, 0), outcome(0, 1)]))
    assert found.panel.predictors["fisher_rank.rank"] == pytest.approx(np.array([[1, NAN]]), nan_ok=True)
    assert any("1 of 2 measurements did not end well" in note for note in found.notes)


def test_infinite_numbers_are_missing() -> None:
    found = align([measured(0, 0, 1.0), measured(0, 1, float("inf")), *told([outcome(0, 0), outcome(0, 1)])])
    assert found.panel.predictors["fisher_rank.rank"] == pytest.approx(np.array([[1, NAN]]), nan_ok=True)
    assert found.notes == ("infinite numbers, which count as missing: 1",)


def test_a_run_of_controls_alone_has_its_place() -> None:
    found = align(told([outcome(0, 0, network="control")]))
    assert found.panel.configurations == ("labels",)
    assert found.panel.outcomes == {}


def test_diverged_tasks_have_no_outcome() -> None:
    found = align([measured(0, 0, 1.0), *told([outcome(0, 0), outcome(0, 1, NAN, status="diverged")])])
    assert math.isnan(found.panel.outcomes["trainability"][0, 1])
    assert any("diverged" in note for note in found.notes)


def test_series_on_several_data_are_several_predictors() -> None:
    current = measured(0, 0, 7.0, settings=json.dumps({"run_sha256": "s", "on": "current"}))
    found = align([measured(0, 0, 1.0), current, *told([outcome(0, 0)])])
    assert found.panel.predictors["fisher_rank.rank on next"].tolist() == [[1]]
    assert found.panel.predictors["fisher_rank.rank on current"].tolist() == [[7]]


def test_a_trace_without_outcomes_says_so() -> None:
    found = align([measured(0, t, float(t)) for t in range(3)])
    assert found.panel.outcomes == {}
    assert any("have no outcomes" in note for note in found.notes)


def test_nothing_gives_nothing() -> None:
    assert align([]).panel.runs == ()


def test_the_future_changes_no_number() -> None:
    """Everything from task 5 on is replaced; what is said of the outcomes up to task 4 stays as it was."""

    def rows(late: float) -> list[Row]:
        noise = np.random.default_rng(1).random((6, 8))
        late_noise = noise + late * np.random.default_rng(2).random((6, 8))
        value = np.where(np.arange(8) < 5, noise, late_noise)
        own = [measured(s, t, value[s, t]) for s in range(6) for t in range(8)]
        return own + told([outcome(s, t, float(value[s - 1, t])) for s in range(6) for t in range(8)])

    def upto(late: float) -> object:
        panel = align(rows(late)).panel
        cut = replace(
            panel,
            outcomes={name: np.where(np.arange(8) < 5, v, NAN) for name, v in panel.outcomes.items()},
        )
        judged = assess(cut, "trainability")[0]
        e = judged.evidence
        return (
            judged.text,
            e.association.values.tolist(),
            e.gain,
            e.transfer.mean,
            [v.value for lead, v in e.leads.items() if lead >= 0],
        )

    assert str(upto(0.0)) == str(upto(5.0))
