import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from plasticity_probe.training.outcomes import Outcome
from plasticity_probe.training.summary import Mean, as_rows, mean_of, scored_by_loss, sentences, summarise

NAN = math.nan


def outcome(
    seed: int,
    task: int,
    network: Literal["run", "control"] = "run",
    accuracy: float = NAN,
    loss: float = 0.5,
    **others: Any,
) -> Outcome:
    plain = {
        "name": "task", "status": "ok", "step": 1, "updates": 1, "epochs": 1, "online_loss": NAN, "online_accuracy": NAN,
        "first_epoch_loss": NAN, "updates_to_threshold": NAN, "test_loss": NAN, "test_accuracy": NAN,
    }  # fmt: skip
    return Outcome(seed=seed, task=task, network=network, loss=loss, accuracy=accuracy, **{**plain, **others})


def diverged(seed: int, task: int, network: Literal["run", "control"] = "run") -> Outcome:
    return outcome(seed, task, network, accuracy=NAN, loss=NAN, status="diverged")


def course(
    runs: Iterable[Iterable[float]], controls: Iterable[Iterable[float]] = (), name: str = "accuracy"
) -> list[Outcome]:
    """Outcomes of rows of values, one row a task and one column a seed; controls are of the last tasks."""
    runs, controls = [list(row) for row in runs], [list(row) for row in controls]
    found = [outcome(seed, task, "run", **{name: v}) for task, row in enumerate(runs) for seed, v in enumerate(row)]
    first = len(runs) - len(controls)
    return found + [
        outcome(seed, first + task, "control", **{name: v})
        for task, row in enumerate(controls)
        for seed, v in enumerate(row)
    ]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
def test_the_interval_of_a_mean_is_students(values: list[float]) -> None:
    mean = mean_of(values)
    # From 1e-6 on, so that rounding of equal values does not decide.
    spread = stats.sem(values)
    assert mean.count == len(values)
    assert mean.value == pytest.approx(np.mean(values), rel=1e-12, abs=1e-9)
    if spread > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=spread)
        assert mean.low == pytest.approx(low, rel=1e-9, abs=1e-9)
        assert mean.high == pytest.approx(high, rel=1e-9, abs=1e-9)
        normal = stats.norm.interval(0.95, loc=np.mean(values), scale=spread)
        assert mean.half_width > normal[1] - mean.value


def test_a_mean_by_hand() -> None:
    mean = mean_of([1.0, 2.0, 3.0])
    assert (mean.value, mean.count) == (2.0, 3)
    quantile = 0.95 / math.sqrt(2 * 0.975 * 0.025)  # Student's t with two degrees of freedom has a closed form
    assert mean.half_width == pytest.approx(quantile / math.sqrt(3), rel=1e-9)
    assert str(mean) == "2.000 ± 2.484"


def test_only_finite_values_count() -> None:
    assert mean_of([NAN, 1.0, math.inf, 2.0, -math.inf, 3.0]) == mean_of([1.0, 2.0, 3.0])
    one = mean_of([NAN, 0.25])
    assert (one.value, one.count, str(one)) == (0.25, 1, "0.250")
    assert math.isnan(one.half_width)
    for nothing in (mean_of([]), mean_of([NAN, math.inf])):
        assert (nothing.count, str(nothing)) == (0, "–")
        assert math.isnan(nothing.value)


def test_the_mean_of_values_without_spread_is_certain() -> None:
    assert mean_of(iter([0.5, 0.5, 0.5])) == Mean(0.5, 0.0, 3)


def test_gaps_are_paired_by_seed() -> None:
    # Seeds differ far more than run and control do, so only pairs show the gap.
    runs, controls = [0.1, 0.5, 0.9], [0.2, 0.61, 0.99]
    found = course([[0.9, 0.9, 0.9], runs], [controls])
    _, task = summarise(reversed_by_seed(found))
    assert task.gap == mean_of([c - r for c, r in zip(controls, runs, strict=True)])
    assert task.gap.low > 0
    unpaired = stats.ttest_ind(controls, runs).confidence_interval(0.95)
    assert unpaired.low < 0
    assert task.score == mean_of(runs)
    assert task.control == mean_of(controls)


def reversed_by_seed(found: list[Outcome]) -> list[Outcome]:
    """Controls in another order of seeds than the runs, so that pairing by place would fail."""
    return [o for o in found if o.network == "run"] + [o for o in reversed(found) if o.network == "control"]


def test_seeds_without_a_partner_or_that_diverged_are_no_pair() -> None:
    found = [
        *course([[0.5, 0.6, 0.7]]),
        outcome(0, 1, accuracy=0.4), outcome(1, 1, accuracy=0.3), diverged(2, 1),
        outcome(0, 1, "control", accuracy=0.5), diverged(1, 1, "control"), outcome(2, 1, "control", accuracy=0.9),
        outcome(3, 1, "control", accuracy=0.1),
        outcome(4, 1, accuracy=0.2),
    ]  # fmt: skip
    first, second = summarise(found)
    assert first.gap.count == first.control.count == 0
    assert (second.gap.count, second.score.count, second.control.count) == (1, 3, 3)
    assert second.gap.value == pytest.approx(0.1)


def test_losses_turn_the_sign_of_the_gap() -> None:
    runs, controls = [0.3, 0.5], [0.1, 0.2]
    found = course([[0.1, 0.1], runs], [controls], "loss")
    assert scored_by_loss(found)
    task = summarise(found)[-1]
    assert task.gap == mean_of([0.3 - 0.1, 0.5 - 0.2])
    assert task.score == mean_of(runs)
    classified = [dataclasses.replace(o, accuracy=1 - o.loss) for o in found]
    assert not scored_by_loss(classified)
    assert summarise(classified)[-1].gap.value == pytest.approx(0.25)
    assert summarise(classified)[-1].score == mean_of([0.7, 0.5])


def test_online_and_test_results_are_summarised_like_the_score() -> None:
    values = {"online_accuracy": 0.1, "online_loss": 0.2, "test_accuracy": 0.3, "test_loss": 0.4}
    found = [
        outcome(0, 0, "run", 0.5, **values),
        outcome(0, 0, "control", accuracy=0.5, test_accuracy=0.8, test_loss=0.1),
    ]
    (task,) = summarise(found)
    assert [task.online.value, task.test.value, task.test_control.value] == [0.1, 0.3, 0.8]
    assert task.test_gap.value == pytest.approx(0.5)
    (by_loss,) = summarise([dataclasses.replace(o, accuracy=NAN) for o in found])
    assert [by_loss.online.value, by_loss.test.value, by_loss.test_control.value] == [0.2, 0.4, 0.1]
    assert by_loss.test_gap.value == pytest.approx(0.3)


def test_tasks_come_in_order() -> None:
    found = [outcome(seed, task, accuracy=task / 20) for seed in (1, 0) for task in (10, 2, 0)]
    assert [(task.task, task.score.value) for task in summarise(found)] == [(0, 0), (2, 0.1), (10, 0.5)]
    assert summarise([]) == ()


def test_a_run_that_all_diverged_is_not_taken_for_one_scored_by_loss() -> None:
    assert not scored_by_loss([diverged(0, 0), diverged(1, 0)])
    assert not scored_by_loss([diverged(0, 0), outcome(1, 0, accuracy=0.5)])
    assert scored_by_loss([diverged(0, 0), outcome(1, 0)])


def test_a_loss_of_trainability_is_said_with_its_interval() -> None:
    found = course([[0.9, 0.92, 0.94], [0.5, 0.52, 0.55]], [[0.9, 0.93, 0.93]])
    trend, gap = sentences(found)
    before, after = summarise(found)
    assert trend == (
        f"The accuracy reached at the end of a task fell from {before.score} on task 0 to {after.score} on task 1 "
        "(means over 3 seeds with 95 % intervals)."
    )
    assert gap == (
        f"On task 1 newly initialised networks do better on the examples of the task by {after.gap}: a loss of trainability."
    )


def test_what_was_kept_or_gained_is_no_loss() -> None:
    trend, gap = sentences(course([[0.5, 0.52, 0.55], [0.9, 0.92, 0.94]], [[0.5, 0.51, 0.56]]))
    assert " rose from 0.523" in trend
    assert gap.startswith("On task 1 newly initialised networks do worse on the examples of the task by 0.397 ±")
    assert gap.endswith("what was learned before helps.")


def test_what_is_not_told_apart_is_not_called_a_loss() -> None:
    trend, gap = sentences(course([[0.5, 0.9, 0.7], [0.9, 0.5, 0.8]], [[0.95, 0.4, 0.9]]))
    assert " went from 0.700" in trend
    assert trend.endswith("The two are not told apart.")
    assert "are not told apart on the examples of the task" in gap
    assert gap.endswith("no loss of trainability shows.")
    _, same = sentences(course([[0.5, 0.9], [0.9, 0.5]], [[0.9, 0.5]]))
    assert same.endswith("(gap 0.000 ± 0.000): no loss of trainability shows.")


@pytest.mark.parametrize(("control", "word", "size"), [(0.75, "better", "0.250"), (0.25, "worse", "0.250")])
def test_one_seed_says_nothing_for_certain(control: float, word: str, size: str) -> None:
    trend, gap = sentences(course([[0.9], [0.5]], [[control]]))
    assert trend == (
        "The accuracy reached at the end of a task went from 0.900 on task 0 to 0.500 on task 1 "
        "(one seed alone: more are needed to say how certain this is)."
    )
    assert gap == (
        f"On task 1 a newly initialised network does {word} on the examples of the task by {size}, of one seed alone: more seeds are needed."
    )


def test_losses_that_rise_are_called_losses() -> None:
    trend, gap = sentences(course([[0.1, 0.11, 0.1], [0.4, 0.5, 0.45]], [[0.1, 0.1, 0.1]], "loss"))
    assert trend.startswith("The loss reached at the end of a task rose from 0.103")
    assert "do better on the examples of the task by 0.350 ±" in gap
    assert gap.endswith("a loss of trainability.")


def test_trainability_and_generalisation_are_said_apart() -> None:
    found = [
        dataclasses.replace(o, test_accuracy=0.9 if o.network == "control" else 0.6 + o.seed / 100)
        for o in course([[0.9, 0.91], [0.95, 0.96]], [[0.95, 0.96]])
    ]
    _, trained, tested = sentences(found)
    assert trained.endswith("no loss of trainability shows.")
    assert tested.startswith("On task 1 newly initialised networks do better on test examples by 0.295 ±")
    assert tested.endswith("a loss of generalisation.")


def test_without_controls_nothing_is_compared() -> None:
    (only,) = sentences(course([[0.9, 0.92], [0.5, 0.52]]))
    assert only.startswith("The accuracy reached at the end of a task fell")


def test_a_single_task_is_no_trend() -> None:
    (only,) = sentences(course([[0.5, 0.7]]))
    assert (
        only
        == f"The accuracy reached at the end of task 0, the only one, is {mean_of([0.5, 0.7])} (means over 2 seeds with 95 % intervals)."
    )
    assert sentences([]) == ["No task was finished."]


def test_seeds_that_diverged_are_named_and_do_not_move_the_trend() -> None:
    # The seed that diverged was the best one; among the others nothing changed.
    found = [*course([[0.2, 0.3, 0.98], [0.2, 0.3, NAN]])[:5], diverged(2, 1)]
    trend, lost = sentences(found)
    assert trend == (
        "The accuracy reached at the end of a task went from 0.250 ± 0.635 on task 0 to 0.250 ± 0.635 on task 1 "
        "(means over 2 seeds with 95 % intervals). The two are not told apart."
    )
    assert lost.startswith("Diverged, with weights or losses that are no longer finite: 1 of 3 seeds (2).")
    assert "learning rate" in lost


def test_a_trend_ends_with_the_last_task_that_a_seed_finished() -> None:
    found = [*course([[0.9, 0.91], [0.5, 0.51]]), diverged(0, 2), diverged(1, 2)]
    trend, lost = sentences(found)
    assert "on task 0 to 0.505" in trend
    assert "on task 1 (means over 2 seeds" in trend
    assert "2 of 2 seeds (0, 1)" in lost


def test_a_run_of_which_nothing_is_left_says_so() -> None:
    trend, lost = sentences([diverged(4, 0), diverged(7, 0)])
    assert trend == "No network finished a task with finite weights."
    assert "2 of 2 seeds (4, 7)" in lost


def test_controls_that_diverged_are_mentioned_and_are_no_diverged_seeds() -> None:
    found = [*course([[0.9, 0.9], [0.8, 0.8]], [[0.9, 0.9]])[:5], diverged(1, 1, "control")]
    *_, last = sentences(found)
    assert last == "Newly initialised networks diverged in 1 of 2 trainings; those do not count in the comparison."
    assert not any("seeds (" in sentence for sentence in sentences(found))


def test_rows_are_strict_json_with_none_for_what_is_unknown() -> None:
    rows = as_rows(summarise(course([[0.5, 0.7], [0.25, NAN]], [[0.75, 0.5]])))
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[0]["control"] == {"value": None, "half_width": None, "count": 0}
    assert rows[1]["score"] == {"value": 0.25, "half_width": None, "count": 1}
    assert rows[1]["gap"] == {"value": 0.5, "half_width": None, "count": 1}
    assert rows[0]["score"] == {"value": pytest.approx(0.6), "half_width": pytest.approx(1.2706204736), "count": 2}
    assert [row["task"] for row in rows] == [0, 1]


def test_a_long_run_is_not_gone_through_again_for_every_task() -> None:
    looks = 0

    class Counted(Outcome):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looks
            looks += name == "task"
            return super().__getattribute__(name)

    found = [Counted(**vars(outcome(seed, task, accuracy=0.5))) for task in range(50) for seed in range(4)]
    assert len(summarise(found)) == 50
    assert looks <= 2 * len(found)
