import math

import pytest
import torch

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.inspection import EigenStatus
from plasticity_probe.linalg.krylov import lanczos
from plasticity_probe.linalg.lanczos import extreme_eigenpairs
from plasticity_probe.linalg.operator import CountingOperator, DenseOperator
from plasticity_probe.linalg.quadrature import (
    Quadrature,
    cumulative,
    density,
    exact_quadrature,
    matrix_function_trace,
    moment,
    quadrature,
    quadrature_from_krylov,
)

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


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_shares(symmetric_matrix, bulk, generator, dtype, scale, distribution):
    operator = CountingOperator(DenseOperator(symmetric_matrix(bulk, dtype, scale)))
    found, run = quadrature(operator, draws=3, steps=20, generator=generator, distribution=distribution)
    assert run.status is EigenStatus.OK
    assert run.products == operator.products == 3 + 3 * 20
    assert run.steps == (20, 20, 20)
    assert found.nodes.shape == found.weights.shape == (3, 20)
    assert found.nodes.dtype == found.weights.dtype == torch.float64
    assert torch.allclose(found.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=1e-13)
    assert bool((found.weights >= 0).all())
    assert found.nodes.max() <= 4 * scale * 1.00001
    assert found.nodes.min() >= -scale * 1.00001


def test_few_eigenvalues_many_steps(symmetric_matrix, generator):
    """Rank three, sixty steps: no node beyond the largest eigenvalue and no mass but on the three and on 0."""
    matrix = symmetric_matrix(torch.cat([f64(3, 2, 1), torch.zeros(397)]), torch.float32)
    found, run = quadrature(DenseOperator(matrix), draws=4, steps=60, generator=generator)
    assert max(run.steps) <= 6
    assert float(found.nodes.max()) == pytest.approx(3, rel=1e-5)
    assert torch.allclose(found.weights.sum(1), torch.ones(4, dtype=torch.float64))
    mass = found.weights * (found.nodes > 0.5)
    near_zero = found.weights * (found.nodes.abs() < 1e-4)
    assert torch.allclose(mass.sum(1) + near_zero.sum(1), torch.ones(4, dtype=torch.float64))
    assert (mass.sum(1) * 400).mean() == pytest.approx(3, abs=4 * math.sqrt(2 * 3 / 4))


def test_counting_nodes_instead_of_weights_would_be_caught(symmetric_matrix, generator):
    matrix = symmetric_matrix(torch.cat([f64(3, 2, 1), torch.zeros(397)]))
    found, _ = quadrature(DenseOperator(matrix), draws=2, steps=60, generator=generator)
    unweighted = Quadrature(found.nodes, torch.full_like(found.weights, 1 / found.weights.shape[1]))
    assert 400 * moment(unweighted, 0) == pytest.approx(400)
    assert 400 * moment(unweighted, 1) > 10 * 400 * moment(found, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_and_zero(generator, dtype):
    one, run = quadrature(DenseOperator(torch.eye(50, dtype=dtype)), draws=2, steps=10, generator=generator)
    assert run.status is EigenStatus.OK
    assert run.steps == (1, 1)
    assert torch.allclose(one.nodes, torch.ones(2, 1, dtype=torch.float64), rtol=1e-6)
    assert torch.equal(one.weights, torch.ones(2, 1, dtype=torch.float64))
    zero, run = quadrature(DenseOperator(torch.zeros(50, 50, dtype=dtype)), draws=2, steps=10, generator=generator)
    assert run.status is EigenStatus.ZERO_OPERATOR
    assert torch.equal(zero.nodes, torch.zeros(2, 1, dtype=torch.float64))
    grid = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert float(torch.trapezoid(density(zero, grid, 0.05), grid)) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_small_sizes_end_with_the_space(symmetric_matrix, generator, size):
    spectrum = torch.arange(1.0, size + 1).double()
    found, run = quadrature(DenseOperator(symmetric_matrix(spectrum)), draws=3, steps=50, generator=generator)
    assert max(run.steps) == size
    full = found.weights[:, -1] > 0
    assert torch.allclose(found.nodes[full], spectrum.expand(int(full.sum()), size))


def test_shorter_draws_are_padded_with_weight_zero(symmetric_matrix):
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


def test_an_eigenpair_run_serves_as_a_draw(symmetric_matrix, bulk, generator):
    operator = DenseOperator(symmetric_matrix(bulk, torch.float32))
    krylov = extreme_eigenpairs(operator, 3, 3, generator=generator, dense_below=0).krylov
    assert krylov is not None
    draw = quadrature_from_krylov(krylov)
    deviation = math.sqrt(2 * float(bulk.square().sum())) / 200
    assert abs(moment(draw, 1) - float(bulk.mean())) < 4 * deviation
    assert float(draw.nodes[0, -1]) == pytest.approx(4, rel=1e-3)


def test_density_integrates_to_one_and_is_the_dense_one(symmetric_matrix, bulk, generator):
    found, _ = quadrature(DenseOperator(symmetric_matrix(bulk)), draws=30, steps=60, generator=generator)
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


def test_trace_of_a_function_with_an_honest_standard_error(symmetric_matrix):
    spectrum = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    operator = DenseOperator(symmetric_matrix(spectrum))
    truth, estimates = float(spectrum.log().sum()), []
    for seed in range(150):
        found, _ = quadrature(operator, draws=4, steps=15, generator=torch.Generator().manual_seed(seed))
        estimates.append(matrix_function_trace(found, torch.log, 40))
    values = torch.tensor([estimate.value for estimate in estimates])
    squares = torch.tensor([estimate.standard_error for estimate in estimates]).square()
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(150)
    assert float(squares.mean() / values.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / 149) * 1.5)
    assert math.isnan(matrix_function_trace(exact_quadrature(spectrum), torch.log, 40).standard_error)
    assert matrix_function_trace(exact_quadrature(spectrum), torch.log, 40).value == pytest.approx(truth)


def test_padding_does_not_reach_the_function():
    padded = Quadrature(f64(1, 0).reshape(1, 2), f64(1, 0).reshape(1, 2))
    assert matrix_function_trace(padded, torch.log, 3).value == 0.0


def test_rademacher_meets_the_trace_of_a_diagonal(generator):
    diagonal = torch.randn(100, dtype=torch.float64, generator=generator)
    found, _ = quadrature(DenseOperator(torch.diag(diagonal)), draws=2, steps=5, generator=generator)
    assert moment(found, 1) == pytest.approx(float(diagonal.mean()), abs=1e-14)


@pytest.mark.parametrize("good_calls", [0, 2, 3, 7, 15])
def test_not_finite_products_are_a_status(function_operator, generator, good_calls):
    diagonal = torch.linspace(1, 2, 30, dtype=torch.float64)
    operator = function_operator(30, lambda v, calls: diagonal * v * (math.nan if calls > good_calls else 1.0))
    found, run = quadrature(operator, draws=2, steps=10, generator=generator)
    assert run.status is EigenStatus.NONFINITE
    assert bool(found.nodes.isnan().all() & found.weights.isnan().all())


def test_noise_and_asymmetry_are_a_status(function_operator, generator):
    noise = torch.Generator().manual_seed(0)
    noisy = function_operator(99, lambda v, _: v * (1 + 1e-3 * torch.randn(99, dtype=torch.float64, generator=noise)))
    assert quadrature(noisy, draws=2, steps=9, generator=generator)[1].status is EigenStatus.NOT_REPEATABLE
    skewed = torch.diag(torch.linspace(0, 1, 400)) + torch.zeros(400, 400)
    skewed[0, 399], skewed[399, 0] = 0.05, -0.05
    hidden = function_operator(400, lambda v, _: skewed @ v, torch.float32)
    assert quadrature(hidden, draws=2, steps=30, generator=generator)[1].status is EigenStatus.ASYMMETRIC


def test_impossible_requests_are_refused(symmetric_matrix, generator):
    operator = DenseOperator(symmetric_matrix(torch.arange(5.0)))
    for draws, steps, distribution in ((0, 5, "gaussian"), (1, 0, "gaussian"), (1, 1, "uniform")):
        with pytest.raises(UsageError):
            quadrature(operator, draws=draws, steps=steps, generator=generator, distribution=distribution)
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
