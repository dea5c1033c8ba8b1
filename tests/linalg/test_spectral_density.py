import math

import pytest
import torch
from scipy.stats import wasserstein_distance

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.deflation import DeflatedOperator
from plasticity_probe.linalg.distribution import Estimate
from plasticity_probe.linalg.matrix_trace import hutchinson
from plasticity_probe.linalg.operator import CountingOperator, DenseOperator
from plasticity_probe.linalg.spectral_density import Accuracy, SpectralEstimate, estimate_spectrum

K = 3


def estimated(
    matrix: torch.Tensor, share: float, products: int, seed: int = 0, **settings
) -> tuple[SpectralEstimate, int]:
    """Measures a matrix with its three outermost eigenpairs known, and counts the products."""
    values, vectors = torch.linalg.eigh(matrix.double())
    operator = CountingOperator(DenseOperator(matrix))
    known = torch.cat([vectors[:, -K:].flip(1), vectors[:, :K]], 1).to(matrix)
    found = estimate_spectrum(
        operator,
        values[-K:].flip(0),
        values[:K],
        known,
        Accuracy(share, products),
        generator=torch.Generator().manual_seed(seed),
        ceiling=len(values),
        norm=float(values.abs().max()),
        **settings,
    )
    return found, operator.products


def distance(found: SpectralEstimate, values: torch.Tensor) -> float:
    rows = found.distribution
    return float(wasserstein_distance(rows.nodes.flatten(), values, rows.weights.flatten()))


@pytest.mark.parametrize("share", [0.2, 0.05, 0.02])
def test_as_many_products_as_the_accuracy_needs(symmetric_matrix, share):
    values = torch.cat([torch.linspace(-1, 1, 594), torch.tensor([-5.0, -4, -3, 6, 7, 8])]).double().sort()[0]
    matrix = symmetric_matrix(values)
    found, products = estimated(matrix, share, 2000)
    assert found.reached
    assert found.products == products < 2000
    spread = float(values[-K] - values[K - 1])
    assert distance(found, values) <= found.distribution.density_error() <= share * spread * 1.0001
    assert abs(found.trace.value - float(values.sum())) <= 4 * found.trace.standard_error
    assert found.trace.standard_error <= share * found.distribution.absolute_sum()
    _, fewer = estimated(matrix, 2 * share, 2000)
    assert fewer <= products


def test_what_was_not_reached_is_said_and_the_limit_is_kept(symmetric_matrix):
    values = torch.linspace(-1, 1, 600, dtype=torch.float64)
    matrix = symmetric_matrix(values)
    for limit in (4, 10, 33, 64):
        found, products = estimated(matrix, 1e-4, limit)
        assert not found.reached
        assert products <= limit
        assert distance(found, values) <= found.distribution.density_error()
        rank = found.distribution.rank("threshold_rank")
        assert rank.lower <= ranks.threshold_rank(values) <= rank.upper


def test_draws_are_added_where_they_are_what_is_missing(symmetric_matrix):
    values = torch.cat(
        [torch.full((100,), -1.0), torch.full((200,), 1.0), torch.tensor([-3.0, -2, -2, 2, 2, 3])]
    ).double()
    matrix = symmetric_matrix(values.sort()[0])
    found, _ = estimated(matrix, 0.03, 400)
    assert len(found.distribution.nodes) > 1
    assert found.distribution.exact.all()
    assert found.reached
    alone, _ = estimated(matrix, 0.03, 8)
    assert not alone.reached
    assert len(alone.distribution.nodes) < len(found.distribution.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_low_rank_is_exact_without_knowing_it(symmetric_matrix, dtype):
    values = torch.cat([torch.linspace(-2, 3, 20), torch.zeros(380)]).double().sort()[0]
    found, products = estimated(symmetric_matrix(values, dtype), 0.01, 64)
    assert products < 40
    made = found.distribution
    assert made.whole
    assert found.reached
    for name in ("threshold_rank", "effective_rank", "stable_rank", "participation_ratio"):
        exact = made.rank(name)
        assert exact == Estimate.exact(exact.value)
        assert exact.value == pytest.approx(ranks.rank(values, name), rel=1e-4)
    assert made.rank("epsilon_rank", epsilon=1e-3).value == float((values.abs() > 1e-3).sum())
    assert found.trace.value == pytest.approx(10.0, rel=1e-4)
    assert found.trace.lower == found.trace.upper


def test_copies_that_one_space_cannot_show_are_not_overlooked(symmetric_matrix):
    """Each eigenvalue twice: the space is exhausted at half of them, and a product outside of it says so."""
    values = torch.cat([torch.linspace(-2, 3, 12).repeat(2), torch.zeros(376)]).double().sort()[0]
    for seed in range(5):
        found, _ = estimated(symmetric_matrix(values), 0.01, 64, seed)
        assert not found.distribution.whole
        rank = found.distribution.rank("threshold_rank")
        assert rank.lower <= ranks.threshold_rank(values) <= rank.upper
        assert found.trace.lower <= 12.0 <= found.trace.upper


def test_inactive_coordinates_are_zeros_and_are_not_sampled(symmetric_matrix):
    inner = torch.linspace(-1, 2, 150, dtype=torch.float64)
    matrix = torch.zeros(500, 500, dtype=torch.float64)
    matrix[:150, :150] = symmetric_matrix(inner)
    found, _ = estimated(matrix, 0.05, 200)
    made = found.distribution
    assert made.zeros == 350
    assert made.ceiling == 150
    assert float(made.nodes[0, K]) == 0.0
    assert float(made.weights[0, K]) == pytest.approx(350 / 500)
    assert float(made.weights[0].sum()) == pytest.approx(1.0)
    rank = made.rank("threshold_rank")
    assert rank.lower <= ranks.threshold_rank(inner) <= rank.upper <= 150
    assert distance(found, torch.linalg.eigvalsh(matrix)) <= made.density_error()
    assert abs(found.trace.value - float(inner.sum())) <= 4 * found.trace.standard_error


def test_the_trace_outside_of_the_krylov_space_costs_fewer_products(symmetric_matrix):
    """The same error by plain draws on the complement of the known pairs takes several times the products, as its variance says."""
    values = (torch.arange(1.0, 501) ** -0.7).double().sort()[0]
    matrix = symmetric_matrix(values)
    runs = [estimated(matrix, 0.003, 80, seed)[0] for seed in range(8)]
    for run in runs:
        assert abs(run.trace.value - float(values.sum())) <= 4 * run.trace.standard_error
    vectors = torch.linalg.eigh(matrix)[1]
    known = DeflatedOperator(DenseOperator(matrix), vectors[:, [0, 1, 2, -3, -2, -1]])
    ends = float(values[2]), float(values[-3])
    plain = [hutchinson(known, runs[0].trace.draws, torch.Generator().manual_seed(s), ends=ends) for s in range(8)]
    ours, theirs = (sum(t.standard_error**2 for t in group) / 8 for group in ([r.trace for r in runs], plain))
    assert runs[0].trace.products == runs[0].trace.draws > 0
    assert theirs > 3 * ours


def test_a_product_that_is_not_finite_gives_nan(function_operator):
    diagonal = torch.linspace(1, 2, 50, dtype=torch.float64)
    vectors = torch.eye(50, dtype=torch.float64)
    for good in (0, 1, 5, 20, 26):
        operator = function_operator(50, lambda v, calls, good=good: diagonal * v * (math.nan if calls > good else 1.0))
        found = estimate_spectrum(
            operator,
            diagonal[[-1]],
            diagonal[[0]],
            vectors[:, [-1, 0]],
            Accuracy(1e-6, 30),
            generator=torch.Generator().manual_seed(0),
            ceiling=50,
            norm=2.0,
        )
        assert math.isnan(found.trace.value)
        assert math.isnan(found.distribution.rank("threshold_rank").value)
        assert not found.reached


def test_impossible_requests_are_refused(symmetric_matrix):
    matrix = symmetric_matrix(torch.linspace(-1, 1, 40))
    for share, products in ((0.0, 20), (0.1, 3)):
        with pytest.raises(UsageError, match="max_products"):
            estimated(matrix, share, products)
