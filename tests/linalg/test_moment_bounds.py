import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity_probe.linalg.krylov import lanczos
from plasticity_probe.linalg.moment_bounds import canonical_rule, jacobi_matrix, moment_bounds, rule_with_zero
from plasticity_probe.linalg.operator import DenseOperator
from plasticity_probe.linalg.quadrature import quadrature_from_krylov


def measured(seed: int, size: int, steps: int, power: float = 1.0):
    """Points and masses, and the Gauss quadrature that Lanczos makes of them."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(size, generator=generator, dtype=torch.float64)
    points = (points.sign() * points.abs() ** power).sort()[0]
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    rule = quadrature_from_krylov(lanczos(DenseOperator(torch.diag(points)), start, steps))
    masses = (start / start.norm()).square()
    return points.numpy(), masses.numpy(), rule.nodes[0].numpy(), rule.weights[0].numpy()


def bounds_of(nodes, weights, ends, **given):
    return moment_bounds(nodes, weights, ends, **{"exact": False, "resolution": 1e-9, **given})


@given(st.integers(0, 10_000), st.integers(2, 15), st.sampled_from([0.5, 1.0, 3.0]))
@settings(deadline=None, max_examples=25)
def test_the_measure_lies_between_the_bounds(seed, steps, power):
    points, masses, nodes, weights = measured(seed, 60, steps, power)
    bounds = bounds_of(nodes, weights, (points[0], points[-1]))
    assert (np.diff(bounds.edges) > 0).all()
    middle = (bounds.edges[:-1] + bounds.edges[1:]) / 2
    share = np.array([masses[points <= x].sum() for x in middle])
    assert (bounds.lower <= share + 1e-9).all()
    assert (share <= bounds.upper + 1e-9).all()
    for x in (-0.7, 0.0, 0.2, *points[[0, 10, 59]]):
        low, high = bounds.share_below(float(x))
        assert low - 1e-9 <= masses[points <= x].sum() <= high + 1e-9
    functions = np.stack([np.abs(bounds.edges), np.exp(-bounds.edges), bounds.edges**2], 1)
    truth = np.array([masses @ np.abs(points), masses @ np.exp(-points), masses @ points**2])
    for rounds in (0, 2):
        found = bounds.integrals(functions, rounds=rounds)
        assert (found.lower <= truth + 1e-9).all()
        assert (truth <= found.upper + 1e-9).all()
    reached = np.concatenate([[0.0], np.cumsum(weights)])
    gauss = np.array([reached[np.searchsorted(nodes, x, side="right")] for x in middle])
    assert np.abs(share - gauss) @ np.diff(bounds.edges) <= bounds.distance() + 1e-9


def test_bounds_that_take_each_node_for_known_would_be_caught():
    points, masses, nodes, weights = measured(0, 60, 8)
    bounds = bounds_of(nodes, weights, (points[0], points[-1]))
    middle = (bounds.edges[:-1] + bounds.edges[1:]) / 2
    share = np.array([masses[points <= x].sum() for x in middle])
    gauss = np.concatenate([[0.0], np.cumsum(weights)])[np.searchsorted(nodes, middle, side="right")]
    assert np.abs(share - gauss).max() > 0.02


def test_closer_than_the_bounds_at_the_gauss_nodes_alone():
    points, _, nodes, weights = measured(1, 300, 20)
    bounds = bounds_of(nodes, weights, (points[0], points[-1]))
    at_nodes = ((weights[:-1] + weights[1:]) * np.diff(nodes)).sum()
    assert bounds.distance() < 0.6 * at_nodes


def test_smooth_functions_are_known_far_better_than_the_distribution():
    points, masses, nodes, weights = measured(2, 300, 20)
    bounds = bounds_of(nodes, weights, (points[0], points[-1]))
    found = bounds.integrals(np.exp(bounds.edges)[:, None])
    truth = masses @ np.exp(points)
    assert found.lower[0] - 1e-9 <= truth <= found.upper[0] + 1e-9
    assert found.upper[0] - found.lower[0] < 1e-6 * truth
    assert bounds.distance() > 1e-3


def test_an_exhausted_space_leaves_nothing_open():
    nodes, weights = np.array([-1.0, 0.5, 2.0]), np.array([0.2, 0.5, 0.3])
    bounds = bounds_of(nodes, weights, (-1.0, 3.0), exact=True)
    assert bounds.exact
    assert bounds.distance() == 0.0
    found = bounds.integrals(np.abs(bounds.edges)[:, None])
    assert found.lower[0] == pytest.approx(1.05)
    assert found.upper[0] == pytest.approx(1.05)
    assert bounds.share_below(0.6) == (0.7, 0.7)
    assert bounds.share_below(-1.5) == (0.0, 0.0)
    assert bounds.share_below(3.0) == (1.0, 1.0)
    single = bounds_of(np.array([2.0]), np.array([1.0]), (2.0, 2.0))
    assert single.distance() == 0.0
    assert single.integrals(single.edges[:, None]).lower[0] == 2.0


def test_one_step_knows_nothing_but_the_mean():
    bounds = bounds_of(np.array([1.0]), np.array([1.0]), (-1.0, 3.0))
    assert (bounds.upper - bounds.lower > 0.99).all()
    found = bounds.integrals(np.stack([bounds.edges, np.abs(bounds.edges)], 1))
    assert found.lower[0] == pytest.approx(found.upper[0]) == pytest.approx(1.0)
    assert found.lower[1] <= 1.0
    assert found.upper[1] >= 1.5


def test_split_cells_say_the_same():
    points, _, nodes, weights = measured(3, 60, 6)
    bounds = bounds_of(nodes, weights, (points[0], points[-1]))
    finer = bounds.split(np.linspace(-5, 5, 101))
    assert len(finer.edges) > len(bounds.edges)
    assert finer.distance() == pytest.approx(bounds.distance(), rel=1e-12)
    assert finer.share_below(0.33) == bounds.share_below(0.33)


def test_the_tridiagonal_matrix_comes_back_from_nodes_and_weights():
    diagonal, coupling = np.array([1.0, -0.3, 0.7, 0.1]), np.array([0.5, 0.9, 0.2])
    nodes, weights = canonical_rule(diagonal[:-1], coupling, 0.1)
    found = jacobi_matrix(nodes, weights)
    np.testing.assert_allclose(found[0], diagonal[:-1], atol=1e-13)
    np.testing.assert_allclose(found[1], coupling, atol=1e-13)


@given(st.integers(0, 10_000), st.integers(2, 20))
@settings(deadline=None, max_examples=25)
def test_the_rule_with_a_node_at_zero_keeps_the_moments(seed, steps):
    _, _, nodes, weights = measured(seed, 60, steps)
    found, shares = rule_with_zero(nodes, weights, (-100.0, 100.0), 1e-12)
    assert (found == 0).any()
    assert shares.sum() == pytest.approx(1.0)
    if np.abs(found).max() < 10:
        for power in range(min(2 * steps - 2, 8) + 1):
            assert shares @ found**power == pytest.approx(weights @ nodes**power, rel=1e-7, abs=1e-7)
    assert len(found) == len(nodes)


def test_where_a_node_is_zero_already_nothing_changes():
    nodes, weights = np.array([-1.0, 0.0, 2.0]), np.array([0.2, 0.5, 0.3])
    assert rule_with_zero(nodes, weights, (-1.0, 2.0), 1e-9) == (nodes, weights)
