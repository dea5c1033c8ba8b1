"""Panels: what was known when."""

import numpy as np
import pytest

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.panel import Panel, history, led

NAN = float("nan")


def test_led_moves_values_to_later_tasks() -> None:
    values = np.array([[1.0, 2.0, 3.0]])
    assert np.array_equal(led(values, 1), [[NAN, 1, 2]], equal_nan=True)
    assert np.array_equal(led(values, 0), values)
    assert np.array_equal(led(values, -1), [[2, 3, NAN]], equal_nan=True)
    assert np.isnan(led(values, 3)).all()
    assert np.isnan(led(values, -7)).all()


def test_history_is_the_last_outcome_and_the_mean_of_all_before() -> None:
    outcome = np.array([[1.0, 3.0, 8.0, 0.0]])
    last, mean = history(outcome)
    assert np.array_equal(last, [[NAN, 1, 3, 8]], equal_nan=True)
    assert np.array_equal(mean, [[NAN, 1, 2, 4]], equal_nan=True)
    last, mean = history(outcome, 2)
    assert np.array_equal(last, [[NAN, NAN, NAN, 1]], equal_nan=True)
    assert np.array_equal(mean, [[NAN, NAN, NAN, 1]], equal_nan=True)


def test_history_passes_over_tasks_without_an_outcome() -> None:
    last, mean = history(np.array([[2.0, NAN, 6.0, 1.0], [NAN, NAN, 3.0, 1.0]]))
    assert np.array_equal(last, [[NAN, 2, 2, 6], [NAN, NAN, NAN, 3]], equal_nan=True)
    assert np.array_equal(mean, [[NAN, 2, 2, 4], [NAN, NAN, NAN, 3]], equal_nan=True)


def test_history_never_looks_ahead() -> None:
    rng = np.random.default_rng(0)
    outcome = rng.standard_normal((4, 9))
    for lead in range(4):
        for task in range(9):
            changed = outcome.copy()
            changed[:, max(0, task - lead) :] = rng.standard_normal(changed[:, max(0, task - lead) :].shape)
            assert np.array_equal(
                history(outcome, lead)[:, :, task], history(changed, lead)[:, :, task], equal_nan=True
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictors": {"x": np.zeros((2, 2))}}, "shape"),
        ({"configuration_of": np.array([0, 5])}, "below 1"),
        ({"configuration_of": np.array([0])}, "configuration_of must have shape"),
        ({"tasks": (0, 1, 3)}, "consecutive"),
    ],
)
def test_panels_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    sound = {
        "configurations": ("a",),
        "configuration_of": np.array([0, 0]),
        "runs": ("r", "s"),
        "tasks": (0, 1, 2),
        "predictors": {"x": np.zeros((2, 3))},
        "outcomes": {},
    }
    Panel(**sound)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=message):
        Panel(**{**sound, **changes})  # pyright: ignore[reportArgumentType]


def test_negative_leads_have_no_history() -> None:
    with pytest.raises(UsageError, match="at least 0"):
        history(np.zeros((1, 3)), -1)
