import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_traces import array, number, quadrature, row, tree

from plasticity_probe.report.panels import Figure, Lines
from plasticity_probe.report.quantities import groups
from plasticity_probe.report.spectra import BANDWIDTH, density, density_figures

RNG = np.random.default_rng(0)


def only(*rows) -> Figure:
    (figure,) = density_figures(groups(tree(*rows))[0])
    return figure


def lines(figure: Figure) -> list[Lines]:
    return [panel for panel in figure.panels if isinstance(panel, Lines)]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=600), st.floats(0.5, 50.0))
def test_a_density_integrates_to_one(nodes: list[float], bandwidth: float) -> None:
    points = np.array(nodes)
    grid = np.linspace(points.min() - 10 * bandwidth, points.max() + 10 * bandwidth, 20_001)
    found = density(points, np.full(points.size, 1 / points.size), grid, bandwidth)
    assert np.trapezoid(found, grid) == pytest.approx(1, abs=1e-9)


def test_a_density_is_a_sum_of_normal_densities() -> None:
    grid = np.linspace(-3, 6, 50)
    normal = [np.exp(-0.5 * ((grid - node) / 0.7) ** 2) / (0.7 * np.sqrt(2 * np.pi)) for node in (0.0, 2.5)]
    np.testing.assert_allclose(
        density(np.array([0.0, 2.5]), np.array([0.9, 0.1]), grid, 0.7), 0.9 * normal[0] + 0.1 * normal[1], rtol=1e-13
    )


def test_counting_nodes_instead_of_weights_would_be_another_density() -> None:
    nodes, weights, grid = np.array([0.0, 2.0]), np.array([0.9, 0.1]), np.linspace(-5, 7, 2001)
    mass = density(nodes, weights, grid, 0.1)[grid > 1].sum() * (grid[1] - grid[0])
    assert mass == pytest.approx(0.1, rel=1e-6)
    assert abs(mass - 0.5) > 0.3


def test_the_drawn_curve_integrates_to_one_and_lies_in_its_band() -> None:
    figure = only(row("p", quadrature(RNG)))
    (curve,) = lines(figure)[0].curves
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(1, abs=1e-7)
    assert curve.lower is not None
    assert curve.upper is not None
    assert (curve.lower <= curve.y + 1e-15).all()
    assert (curve.y <= curve.upper + 1e-15).all()
    assert (curve.lower < curve.upper).any()
    assert lines(figure)[0].scale.kind == "log"
    assert lines(figure)[0].x_label == "eigenvalue [loss]"
    assert lines(figure)[0].y_label == "density [1/loss]"


def test_first_and_last_checkpoint_stand_beside_the_fresh_network() -> None:
    rows = [row("p", quadrature(RNG), step=step) for step in (20, 0, 10)]
    figure = only(*rows, row("p", quadrature(RNG), step=-1, fresh=0))
    labels = ["first checkpoint (step 0)", "last checkpoint (step 20)", "fresh network"]
    assert [curve.label for curve in lines(figure)[0].curves] == labels
    assert [curve.role for curve in lines(figure)[0].curves] == ["first", "last", "fresh"]
    assert "3 draws" in figure.caption
    assert "512 examples in eval mode" in figure.caption
    assert "standard deviation" in figure.caption
    assert "over the draws" in figure.caption


def test_the_bandwidth_in_the_caption_is_the_one_used() -> None:
    nodes, weights = array(("draw", "node"), [[0.0, 50.0, 100.0]]), array(("draw", "node"), [[0.25, 0.5, 0.25]])
    figure = only(row("p", {"nodes": nodes, "weights": weights}))
    (panel,) = lines(figure)
    assert "standard deviation 1 (1 % of the range)" in figure.caption
    assert panel.curves[0].y.max() == pytest.approx(0.5 / (100 * BANDWIDTH * np.sqrt(2 * np.pi)), rel=1e-3)
    assert panel.curves[0].lower is None
    assert "Band" not in figure.caption
    assert panel.x_label == "eigenvalue"


def test_the_bulk_has_a_view_of_its_own_where_outliers_hide_it() -> None:
    assert len(only(row("p", quadrature(RNG, outlier=50))).panels) == 2
    assert len(only(row("p", quadrature(RNG, outlier=1))).panels) == 1


def test_several_runs_are_averaged_and_the_band_is_over_them() -> None:
    rows = [row("p", quadrature(RNG), run=f"r{run}", step=step) for run in range(4) for step in (0, 1)]
    figure = only(*rows)
    assert [curve.label for curve in lines(figure)[0].curves] == [
        "first checkpoint (step 0), mean of 4 runs",
        "last checkpoint (step 1), mean of 4 runs",
    ]
    assert "over networks" in figure.caption


def test_padding_and_failed_rows_are_left_out() -> None:
    small = row("p", quadrature(RNG, draws=1, nodes=10), step=0)
    large = row("p", quadrature(RNG, draws=3, nodes=60), step=1)
    failed = row("p", quadrature(RNG), step=2, status="nonfinite")
    figure = only(small, large, failed)
    assert [curve.label for curve in lines(figure)[0].curves] == [
        "first checkpoint (step 0)",
        "last checkpoint (step 1)",
    ]
    assert "1 to 3 draws" in figure.caption
    for curve in lines(figure)[0].curves:
        assert np.trapezoid(curve.y, curve.x) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("node", [0.0, 3.0, -1e-30, 1e130])
def test_a_single_eigenvalue_has_a_density(node: float) -> None:
    variables = {"nodes": array(("draw", "node"), [[node, node]]), "weights": array(("draw", "node"), [[1.0, 0.0]])}
    (curve,) = lines(only(row("p", variables)))[0].curves
    assert np.isfinite(curve.y).all()
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("node", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_has_none(node: float) -> None:
    variables = {"nodes": array(("draw", "node"), [[node]]), "weights": array(("draw", "node"), [[1.0]])}
    assert density_figures(groups(tree(row("p", variables)))[0]) == []


def test_other_variables_of_these_names_are_no_quadrature() -> None:
    for variables in (
        {"nodes": number(1), "weights": number(1)},
        {"nodes": number(1)},
        {"nodes": array(("a", "b"), [[1.0]]), "weights": array(("b", "a"), [[1.0]])},
    ):
        assert density_figures(groups(tree(row("p", variables)))[0]) == []


def test_a_width_without_a_reciprocal_overflows_nothing() -> None:
    subnormal = 2.2250738585e-313
    heights = density(np.zeros(1), np.ones(1), np.array([0.0, subnormal]), subnormal)
    assert np.isfinite(heights).all()
