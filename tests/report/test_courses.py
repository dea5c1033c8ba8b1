import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from scipy import stats

from plasticity_probe.errors import RunError, UsageError
from plasticity_probe.report.courses import BANDS, CONTROL, RUN, course_grid, courses, final_scores, run_figures
from plasticity_probe.report.panels import Dots
from plasticity_probe.training.outcomes import Outcome, as_json

NAN = math.nan


def outcome(
    seed: int,
    task: int,
    accuracy: float = NAN,
    network: Literal["run", "control"] = "run",
    loss: float = 0.5,
    test: float = NAN,
    status: Literal["ok", "diverged"] = "ok",
    test_loss: float = NAN,
) -> Outcome:
    rest = {"online_loss": NAN, "online_accuracy": NAN, "first_epoch_loss": NAN, "updates_to_threshold": NAN}
    return Outcome(
        seed, task, "task", network, status, 1, 1, 1, loss, accuracy, test_loss=test_loss, test_accuracy=test, **rest
    )


def runs(*tasks: Sequence[float], network: Literal["run", "control"] = "run", first: int = 0) -> list[Outcome]:
    """Accuracies: one sequence a task, one number a seed."""
    return [outcome(seed, first + at, v, network) for at, task in enumerate(tasks) for seed, v in enumerate(task)]


def losses(*tasks: Sequence[float]) -> list[Outcome]:
    return [outcome(seed, at, loss=v) for at, task in enumerate(tasks) for seed, v in enumerate(task)]


def dots(figure: Any) -> Dots:
    (panel,) = figure.panels
    assert isinstance(panel, Dots)
    return panel


def test_a_course_is_the_mean_over_seeds_with_students_interval() -> None:
    table = np.random.default_rng(0).uniform(0.2, 0.8, (4, 6))
    figure = courses({"relu": runs(*table.tolist())})
    (course,) = figure.panels[0].courses
    low, high = stats.t.interval(0.95, 5, loc=table.mean(1), scale=stats.sem(table, axis=1))
    assert course.label == "relu"
    assert course.control is None
    assert course.run.lower is not None
    assert course.run.upper is not None
    np.testing.assert_array_equal(course.run.x, [0, 1, 2, 3])
    np.testing.assert_allclose(course.run.y, table.mean(1), rtol=1e-12)
    np.testing.assert_allclose(course.run.lower, low, rtol=1e-12)
    np.testing.assert_allclose(course.run.upper, high, rtol=1e-12)
    # A normal quantile in place of Student's would be seen.
    assert (course.run.upper - course.run.y > 1.2 * 1.96 * stats.sem(table, axis=1)).all()


def test_controls_stand_on_the_tasks_that_have_them_and_never_mix_with_runs() -> None:
    own = runs([0.9, 0.7], [0.5, 0.3], [0.3, 0.1]) + runs([0.8, 0.9], network="control", first=2)
    (course,) = courses({"a": own}).panels[0].courses
    assert course.control is not None
    assert course.control.role == "fresh"
    np.testing.assert_array_equal(course.control.x, [2])
    np.testing.assert_allclose(course.control.y, [0.85])
    np.testing.assert_allclose(course.run.y, [0.8, 0.4, 0.2])


def test_a_task_whose_controls_all_diverged_is_a_gap_and_not_left_out() -> None:
    own = [
        *runs([0.9], [0.5], [0.3], [0.2]),
        outcome(0, 1, 0.8, "control"),
        outcome(0, 2, NAN, "control", status="diverged"),
        outcome(0, 3, 0.7, "control"),
    ]
    (course,) = courses({"a": own}).panels[0].courses
    assert course.control is not None
    np.testing.assert_array_equal(course.control.x, [1, 2, 3])
    np.testing.assert_array_equal(np.isnan(course.control.y), [False, True, False])


def test_one_seed_has_a_line_and_no_interval() -> None:
    figure = courses({"a": runs([0.9], [0.5])})
    (course,) = figure.panels[0].courses
    assert course.run.lower is not None
    assert np.isnan(course.run.lower).all()
    assert "One seed alone" in figure.caption


def test_seeds_that_diverged_are_named() -> None:
    own = [*runs([0.9, 0.8, 0.7], [0.5, 0.4]), outcome(2, 1, NAN, status="diverged")]
    figure = courses({"relu": own, "tanh": runs([0.9] * 3, [0.8] * 3)})
    assert "relu: 1 of 3 seeds" in figure.caption
    assert "tanh" not in figure.caption
    assert "means over 2 to 3 seeds" in figure.caption
    np.testing.assert_allclose(figure.panels[0].courses[0].run.y, [0.8, 0.45])


def test_each_newly_initialised_network_that_diverged_counts() -> None:
    own = runs([0.9], [0.5], [0.4]) + [outcome(0, at, NAN, "control", status="diverged") for at in (1, 2)]
    assert "a: 2 of 2 newly initialised networks" in courses({"a": own}).caption


def test_values_are_scored_by_loss_without_a_chance_level() -> None:
    figure = courses({"a": losses([2.0, 4.0], [1.0, 3.0])}, chance=0.1)
    np.testing.assert_allclose(figure.panels[0].courses[0].run.y, [3.0, 2.0])
    assert figure.y_label == "squared error at the end of the task"
    assert figure.chance is None
    assert "hance" not in figure.caption


def test_settings_scored_differently_are_refused() -> None:
    with pytest.raises(UsageError, match="'a' scored by accuracy and 'b' by loss"):
        courses({"a": runs([0.5]), "b": losses([0.5])})


def test_a_setting_that_diverged_wholly_does_not_decide_how_the_others_are_scored() -> None:
    gone = [outcome(0, 0, NAN, loss=NAN, status="diverged")]
    figure = courses({"gone": gone, "b": losses([0.5], [0.4])})
    np.testing.assert_allclose(figure.panels[0].courses[1].run.y, [0.5, 0.4])
    assert figure.name == "course-loss"
    with pytest.raises(UsageError, match="expected a finite accuracy"):
        courses({"gone": gone})


def test_test_scores_are_drawn_from_test_numbers() -> None:
    own = [outcome(0, 0, 0.9, test=0.6), outcome(0, 1, 0.8, test=0.5), outcome(0, 1, 0.9, "control", test=0.7)]
    figure = courses({"a": own}, examples="test")
    (course,) = figure.panels[0].courses
    np.testing.assert_allclose(course.run.y, [0.6, 0.5])
    assert course.control is not None
    np.testing.assert_allclose(course.control.y, [0.7])
    assert (figure.name, figure.units) == ("course-test-accuracy", "share of test examples")
    by_loss = courses({"a": [outcome(0, 0, loss=0.1, test_loss=0.4)]}, examples="test")
    np.testing.assert_allclose(by_loss.panels[0].courses[0].run.y, [0.4])


def test_without_test_numbers_there_is_no_figure_of_them() -> None:
    with pytest.raises(UsageError, match="expected a finite test accuracy"):
        courses({"a": runs([0.5])}, examples="test")
    with pytest.raises(UsageError, match='"task" or "test", got \'all\''):
        courses({"a": runs([0.5])}, examples="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [{}, {"g": {}}, {"g": {"a": []}}])
def test_nothing_to_draw_is_refused(groups: Any) -> None:
    with pytest.raises(UsageError, match="expected a finite accuracy"):
        course_grid(groups)
    with pytest.raises(UsageError, match="expected a finite accuracy"):
        final_scores(groups)


def test_a_label_has_one_hue_in_all_panels() -> None:
    figure = course_grid(
        {"relu": {"none": runs([0.5]), "l2": runs([0.6])}, "tanh": {"l2": runs([0.7]), "redo": runs([0.8])}}
    )
    hues = [{course.label: course.hue for course in panel.courses} for panel in figure.panels]
    assert hues == [{"none": 0, "l2": 1}, {"l2": 1, "redo": 2}]
    assert [panel.title for panel in figure.panels] == ["relu", "tanh"]


@pytest.mark.parametrize(
    ("lowest", "within"),
    [(0.15, True), (0.49, True), (0.51, False), (0.05, True)],
    ids=["near", "just in the lower half", "just in the upper half", "below chance"],
)
def test_the_chance_level_is_drawn_where_data_use_half_of_the_axis(lowest: float, within: bool) -> None:
    figure = courses({"a": runs([0.9], [lowest])}, chance=0.1)
    assert (figure.chance == 0.1) is within
    assert ("Chance level, 0.1, lies below the axis." in figure.caption) is not within
    assert (figure.limits[0] < 0.1) is within
    (points,) = dots(final_scores({"": {"a": runs([0.9]), "b": runs([lowest])}}, chance=0.1)).points
    np.testing.assert_allclose(points.values, [0.9, lowest])
    assert (dots(final_scores({"": {"a": runs([0.9]), "b": runs([lowest])}}, chance=0.1)).reference == 0.1) is within


def test_a_level_course_close_to_chance_is_drawn_beside_it() -> None:
    assert courses({"a": runs([0.15], [0.15])}, chance=0.1).chance == 0.1
    assert courses({"a": runs([0.21], [0.21])}, chance=0.1).chance is None


def test_limits_hold_means_and_intervals_but_no_accuracy_beyond_one() -> None:
    figure = courses({"a": runs([0.99, 0.5], [0.99, 0.98])})
    low, high = figure.limits
    (course,) = figure.panels[0].courses
    assert course.run.upper is not None
    assert course.run.upper[0] > 1.5
    assert low < 0 < 1 < high < 1.06
    left, right = figure.x_limits
    assert left < 0 < 1 < right


def test_losses_of_many_sizes_have_a_logarithmic_axis_with_a_floor_above_zero() -> None:
    figure = courses({"a": losses([100.0, 300.0], [1.0, 1.2], [1e-3, 3e-3])})
    assert figure.scale.kind == "log"
    assert 1e-5 < figure.limits[0] < 1e-3
    (course,) = figure.panels[0].courses
    assert course.run.lower is not None
    assert course.run.lower[0] < 0  # it ends at the axis


def test_many_courses_and_two_tasks_have_whiskers() -> None:
    three = runs([0.5, 0.6], [0.4, 0.5], [0.3, 0.4])
    assert courses({str(n): three for n in range(BANDS)}).banded
    many = courses({str(n): three for n in range(BANDS + 1)})
    assert not many.banded
    assert many.caption.startswith("Lines and whiskers: means over 2 seeds")
    assert not courses({"a": runs([0.5, 0.6], [0.4, 0.5])}).banded


def test_final_scores_are_those_of_the_last_task_beside_its_control() -> None:
    relu = runs([0.9, 0.9], [0.1, 0.3]) + runs([0.8, 0.9], network="control", first=1)
    tanh = runs([0.9, 0.9], [0.6, 0.7])
    figure = final_scores({"no remedy": {"relu": relu}, "l2-init": {"tanh": tanh}})
    panel = dots(figure)
    control, run = panel.points
    assert (control.label, control.role, run.label) == (CONTROL, "fresh", RUN)
    np.testing.assert_allclose(run.values, [0.2, 0.65])
    np.testing.assert_allclose(control.values, [0.85, NAN])
    half = stats.t.ppf(0.975, 1) * stats.sem([0.1, 0.3])
    assert run.lower is not None
    np.testing.assert_allclose(run.lower[0], 0.2 - half)
    assert (panel.labels, panel.groups, panel.notes) == (("relu", "tanh"), ("no remedy", "l2-init"), ())
    assert "Last task: 1." in figure.caption


def test_settings_that_ended_elsewhere_say_so() -> None:
    figure = final_scores({"": {"a": runs([0.5, 0.6], [0.4, 0.5]), "b": runs([0.3]), "c": []}})
    assert dots(figure).notes == ("task 1, 2 seeds", "task 0, 1 seed", "no task, 0 seeds")
    assert dots(figure).groups == ()
    assert "Last task" not in figure.caption


def folder_of(path: Path, outcomes: Sequence[Outcome], **changes: Any) -> Path:
    manifest = {
        "protocol": "digits full",
        "setting": {"remedies": [{"name": "l2-init"}], "stream": {"name": "random-labels"}},
        "architecture": {"name": "mlp-relu", "widths": [64, 10]},
    }
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    (path / "outcomes.jsonl").write_text("".join(json.dumps(as_json(one)) + "\n" for one in outcomes))
    return path


def test_a_run_folder_has_a_figure_of_each_score_it_knows(tmp_path: Path) -> None:
    own = [outcome(seed, task, 0.25, test=0.15) for seed in range(2) for task in range(2)]
    first, second = run_figures(folder_of(tmp_path / "a", own))
    assert first.title == "digits full, l2-init: accuracy by task"
    assert second.title == "digits full, l2-init: test accuracy by task"
    assert (first.chance, second.chance) == (None, 0.1)
    assert [figure.name for figure in run_figures(folder_of(tmp_path / "b", runs([0.5])))] == ["course-accuracy"]
    assert [figure.name for figure in run_figures(folder_of(tmp_path / "c", losses([0.5])))] == ["course-loss"]


@pytest.mark.parametrize(
    ("stream", "architecture", "chance"),
    [
        ("random-labels", {"widths": [64, 4]}, 0.25),
        ("two-stage", {"classes": 5}, 0.2),
        ("class-incremental", {"classes": 5}, None),
        ("permuted-alphabet", {"vocabulary": 5}, None),
        ("random-labels", {"widths": [64, 1]}, None),
    ],
)
def test_the_chance_level_is_known_where_each_task_has_all_classes(
    stream: str, architecture: dict[str, Any], chance: float | None, tmp_path: Path
) -> None:
    setting = {"remedies": [], "stream": {"name": stream}}
    folder = folder_of(tmp_path / "a", runs([0.9], [0.1]), setting=setting, architecture=architecture)
    (figure,) = run_figures(folder)
    assert figure.chance == chance


def test_a_run_without_a_finite_score_has_no_figures(tmp_path: Path) -> None:
    assert run_figures(folder_of(tmp_path / "a", [])) == []
    assert run_figures(folder_of(tmp_path / "b", [outcome(0, 0, NAN, loss=NAN, status="diverged")])) == []


def test_a_folder_without_a_run_or_with_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        run_figures(tmp_path)
    with pytest.raises(RunError, match="is not what `probe train` writes"):
        run_figures(folder_of(tmp_path / "a", runs([0.5]), setting={"remedies": []}))
    (folder_of(tmp_path / "b", runs([0.5])) / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"manifest\.json cannot be read"):
        run_figures(tmp_path / "b")


def test_every_stream_named_here_exists() -> None:
    from plasticity_probe.report.courses import EVERY_CLASS
    from plasticity_probe.training.streams import STREAMS

    assert set(STREAMS) > EVERY_CLASS


def test_neither_torch_nor_matplotlib_is_needed() -> None:
    code = (
        "import sys, plasticity_probe.report.courses; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
