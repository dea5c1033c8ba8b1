import math

import pytest
import torch

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.krylov import lanczos
from plasticity_probe.linalg.operator import DenseOperator
from plasticity_probe.linalg.quadrature import (
    Quadrature,
    cumulative,
    density,
    exact_quadrature,
    moment,
    quadrature_from_krylov,
)
from plasticity_probe.linalg.random_vectors import gaussian

DTYPES = [torch.float32, torch.float64]
SCALES = [1e-30, 1.0, 1e30]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def bulk():
    return torch.cat([torch.linspace(-1, 1, 190, dtype=torch.float64), torch.linspace(3, 4, 10, dtype=torch.float64)])


def test_a_draw_is_exact_for_polynomials_of_degree_below_twice_its_steps(symmetric_matrix, bulk, generator):
    matrix, steps = symmetric_matrix(bulk), 6
    start = torch.randn(200, dtype=torch.float64, generator=generator)
    draw = quadrature_from_krylov(lanczos(DenseOperator(matrix), start, steps))
    power, direction = start / start.norm(), start / start.norm()
    for degree in range(2 * steps + 1):
        exact = float(direction @ power)
        error = abs(moment(draw, degree) - exact) / max(1.0, abs(exact))
        assert (error < 1e-12) == (degree < 2 * steps), degree
        power = matrix @ power


def test_an_exhausted_space_gives_the_eigenvalues_it_saw(symmetric_matrix):
    matrix = symmetric_matrix(torch.arange(1.0, 11.0))
    eigenvectors = torch.linalg.eigh(matrix)[1]
    short = quadrature_from_krylov(lanczos(DenseOperator(matrix), eigenvectors[:, :2].sum(1), 10))
    assert short.nodes.shape == (1, 2)
    assert torch.allclose(short.nodes, f64(1, 2))
    assert torch.allclose(short.weights, f64(0.5, 0.5))


def test_what_came_after_a_breakdown_has_no_weight(symmetric_matrix, generator):
    matrix = symmetric_matrix(torch.arange(1.0, 11.0))
    start = torch.linalg.eigh(matrix)[1][:, :2].sum(1)
    krylov = lanczos(DenseOperator(matrix), start, 10, generator=generator)
    assert krylov.steps == 10
    assert torch.allclose(quadrature_from_krylov(krylov).nodes, f64(1, 2))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_shares_at_every_scale(symmetric_matrix, bulk, generator, dtype, scale):
    operator = DenseOperator(symmetric_matrix(bulk, dtype, scale))
    found = quadrature_from_krylov(lanczos(operator, gaussian(operator, generator), 20))
    assert found.nodes.shape == found.weights.shape == (1, 20)
    assert found.nodes.dtype == found.weights.dtype == torch.float64
    assert float(found.weights.sum()) == pytest.approx(1, rel=1e-13)
    assert bool((found.weights >= 0).all())
    assert found.nodes.max() <= 4 * scale * 1.00001
    assert found.nodes.min() >= -scale * 1.00001


def test_density_integrates_to_one_and_is_the_dense_one(symmetric_matrix, bulk, generator):
    operator = DenseOperator(symmetric_matrix(bulk))
    rules = [quadrature_from_krylov(lanczos(operator, gaussian(operator, generator), 60)) for _ in range(30)]
    found = Quadrature(torch.cat([rule.nodes for rule in rules]), torch.cat([rule.weights for rule in rules]))
    grid = torch.linspace(-3, 6, 400, dtype=torch.float64)
    truth = torch.exp(-0.5 * ((grid[:, None] - bulk) / 0.15) ** 2).mean(1) / (0.15 * math.sqrt(2 * math.pi))
    assert torch.allclose(density(exact_quadrature(bulk), grid, 0.15), truth, atol=1e-12)
    estimate = density(found, grid, 0.15)
    assert float(torch.trapezoid(estimate, grid)) == pytest.approx(1, rel=1e-9)
    single = torch.stack(
        [density(Quadrature(n[None], w[None]), grid, 0.15) for n, w in zip(found.nodes, found.weights, strict=True)]
    )
    error = single.std(0) / math.sqrt(30)
    inside = truth > 1e-2
    assert bool(((estimate - truth).abs() <= 4 * error + 1e-9)[inside].all())
    one_sided = density(Quadrature(found.nodes, torch.full_like(found.weights, 1 / 60)), grid, 0.15)
    assert not bool(((one_sided - truth).abs() <= 4 * error + 1e-9)[inside].all())


def test_cumulative_and_moments_of_the_exact_quadrature():
    exact = exact_quadrature(f64(1, 2, 2, 5))
    assert torch.allclose(cumulative(exact, f64(0, 1, 1.5, 2, 4.9, 5, 9)), f64(0, 0.25, 0.25, 0.75, 0.75, 1, 1))
    assert [moment(exact, power) for power in range(3)] == pytest.approx([1.0, 2.5, 34 / 4])


def test_impossible_requests_are_refused(symmetric_matrix, generator):
    operator = DenseOperator(symmetric_matrix(torch.arange(5.0)))
    with pytest.raises(UsageError, match="bandwidth"):
        density(exact_quadrature(f64(1)), f64(0), 0.0)
    with pytest.raises(UsageError, match="one shape"):
        Quadrature(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(UsageError, match="one shape"):
        exact_quadrature(torch.zeros(0))
    start = torch.randn(5, dtype=torch.float64)
    locked = torch.eye(5, dtype=torch.float64)[:, :1]
    with pytest.raises(UsageError, match="whole operator"):
        quadrature_from_krylov(lanczos(operator, start, 2, locked=locked))
