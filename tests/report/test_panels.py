import numpy as np
import pytest

from plasticity_probe.report.panels import drawable, scale_of


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], "linear"),
        ([np.nan, np.inf], "linear"),
        ([0.0, 0.0], "linear"),
        ([1.0, 2.0, 99.0], "linear"),
        ([1.0, 2.0, 101.0], "log"),
        ([1e-9, 1e9, np.nan], "log"),
        ([-1.0, 2.0, 3.0], "linear"),
        ([-1.0, 1.0, 1.0, 1.0, 1e4], "symlog"),
        ([0.0, 1.0, 1.0, 1.0, 1e4], "symlog"),
    ],
)
def test_the_scale_follows_the_values(values: list[float], kind: str) -> None:
    assert scale_of(np.array(values)).kind == kind


def test_the_scale_counts_all_arrays_and_leaves_out_none() -> None:
    assert scale_of(np.array([1.0]), None, np.array([[1000.0]])).kind == "log"


def test_what_no_axis_can_hold_is_a_gap() -> None:
    found = drawable(np.array([1.0, np.inf, -np.inf, np.nan, 1e300, 1e-310, -2.0]))
    np.testing.assert_array_equal(found, [1.0, np.nan, np.nan, np.nan, np.nan, 0.0, -2.0])
