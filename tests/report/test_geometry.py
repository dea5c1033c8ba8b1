import numpy as np

from plasticity_probe.report.geometry import (
    colour_limits,
    grid_of,
    height_of_lines,
    positions_of,
    ratio_limits,
    spread,
    symlog_ticks,
)
from plasticity_probe.report.panels import LOG, Dots, HeatMap, Lines, Points


def heat_map(values: list[list[float]], fresh: list[float] | None = None) -> HeatMap:
    table = np.array(values)
    labels, columns = (tuple(map(str, range(size))) for size in table.shape)
    return HeatMap("", "", columns, labels, table, None if fresh is None else np.array(fresh), "")


def dots(values: list[float], groups: tuple[str, ...] = ()) -> Dots:
    points = Points("", "checkpoint", np.array(values))
    return Dots("", "", tuple(map(str, values)), (points,), LOG, groups, (), 1.0)


def test_panels_fill_a_grid() -> None:
    panel = Lines("", "", "", ())
    assert [grid_of([panel] * count)[:2] for count in (1, 2, 3, 4, 5, 12)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (2, 2),
        (3, 2),
        (3, 4),
    ]


def test_many_labels_make_a_panel_taller_and_stay_readable() -> None:
    heights = [height_of_lines(lines) for lines in range(1, 101)]
    assert min(height / lines for lines, height in enumerate(heights, 1)) >= 0.125
    assert heights[-1] < 13


def test_headings_take_a_line_of_their_own() -> None:
    positions, headings = positions_of(dots([1, 2, 3], ("a", "a", "b")))
    np.testing.assert_array_equal(positions, [1, 2, 4])
    assert headings == [(0, "a"), (3, "b")]
    np.testing.assert_array_equal(positions_of(dots([1, 2]))[0], [0, 1])


def test_colours_are_symmetric_around_zero_where_signs_differ() -> None:
    assert colour_limits(heat_map([[-1, 3]])) == (-3, 3)
    assert colour_limits(heat_map([[1, 3]])) == (1, 3)
    assert colour_limits(heat_map([[1, 3]], [-5])) == (-5, 5)
    assert colour_limits(heat_map([[0, 0]])) == (0, 0.1)
    assert colour_limits(heat_map([[np.nan]])) == (0, 1)
    low, high = colour_limits(heat_map([[2, 2]]))
    assert low < 2 < high


def test_a_ratio_of_one_is_in_the_middle() -> None:
    limits = ratio_limits(dots([0.1, 2]))
    assert limits is not None
    np.testing.assert_allclose(limits, (1 / 12.5, 12.5))
    assert ratio_limits(dots([1.0, np.nan])) == (0.4, 2.5)
    assert ratio_limits(dots([np.nan])) is None


def test_ticks_are_spread() -> None:
    assert spread(3, 8) == [0, 1, 2]
    assert spread(20, 8) == [0, 3, 6, 9, 12, 15, 18]


def test_symlog_ticks_stay_apart() -> None:
    assert symlog_ticks(-1e9, 5.0, 1.0) == [-1e9, -1e6, -1e3, 0]
    assert symlog_ticks(-20, 3000, 1.0) == [-10, 0, 10, 100, 1000]
    assert symlog_ticks(-1, 1, 1.0) == [0]
    assert symlog_ticks(2, 3, 1e-3) == []
