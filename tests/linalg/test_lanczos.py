import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.krylov import lanczos, ritz
from plasticity_probe.linalg.krylov_space import KrylovSpace
from plasticity_probe.linalg.lanczos import EigenStatus, extreme_eigenpairs
from plasticity_probe.linalg.operator import CountingOperator, DenseOperator
from plasticity_probe.linalg.search import MISSED

DTYPES = [torch.float32, torch.float64]
SCALES = [1e-30, 1.0, 1e30]
TOL = 1e-3


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def spread(low, high, count):
    return torch.linspace(low, high, count, dtype=torch.float64)


def logspread(low, high, count):
    return torch.logspace(low, high, count, dtype=torch.float64)


N = 600
SPECTRA = {
    "identity": torch.ones(N).double(),
    "minus identity": -torch.ones(N).double(),
    "rank one": torch.cat([f64(3.0), torch.zeros(N - 1)]),
    "rank one negative": torch.cat([f64(-3.0), torch.zeros(N - 1)]),
    "rank five": torch.cat([f64(5, 4, 3, 2, 1), torch.zeros(N - 5)]),
    "signs": torch.cat([torch.ones(N // 2), -torch.ones(N // 2)]).double(),
    "triple": torch.cat([f64(5, 5, 5, 4, 3, 2), spread(0, 1, N - 6)]),
    "triple at both ends": torch.cat([f64(5, 5, 5, -5, -5, -5), spread(-1, 1, N - 6)]),
    "cluster": torch.cat([1 + 1e-6 * torch.arange(8.0).double(), spread(-0.5, 0.5, N - 8)]),
    "uniform": spread(-1, 1, N),
    "bulk and outliers": torch.cat([f64(10, 9, 7, 4, -2), 0.2 * spread(-1, 1, N - 5) ** 3]),
    "tie": torch.cat([f64(1, -1, 0.1), spread(-0.05, 0.05, N - 3)]),
    "graded": torch.cat([logspread(0, -12, N // 2), -logspread(0, -12, N // 2)]),
}


def check(end, truth, norm, dtype):
    """Status ok, residuals within the contract, and every value right, none missing."""
    eps = torch.finfo(dtype).eps
    allowed = (TOL * truth.abs()).clamp(min=64 * eps * norm)
    assert end.status is EigenStatus.OK
    assert bool((end.residuals <= (TOL * end.values.abs()).clamp(min=64 * eps * norm)).all())
    assert bool(((end.values - truth).abs() <= 1.1 * allowed).all()), (end.values, truth)


def check_both(found, matrix, k_top, k_bottom):
    values = torch.linalg.eigvalsh(matrix.double())
    norm = float(values.abs().max())
    check(found.top, values.flip(0)[:k_top], norm, matrix.dtype)
    check(found.bottom, values[:k_bottom], norm, matrix.dtype)
    for end in found[:2]:
        vectors = end.vectors.double()
        assert vectors.dtype == torch.float64
        assert end.vectors.dtype == matrix.dtype
        identity = torch.eye(vectors.shape[1], dtype=torch.float64)
        assert (vectors.T @ vectors - identity).abs().sum() < 100 * torch.finfo(matrix.dtype).eps
        true_residuals = (matrix.double() @ vectors / norm - vectors * (end.values / norm)).norm(dim=0)
        rounding = torch.finfo(matrix.dtype).eps
        assert bool((true_residuals <= 1.001 * end.residuals / norm + 64 * rounding).all())
        assert bool((end.residuals / norm <= 1.001 * true_residuals + 64 * rounding).all())
    assert found.top.norm == pytest.approx(norm, rel=2e-3)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_battery(symmetric_matrix, generator, name, dtype, scale):
    matrix = symmetric_matrix(SPECTRA[name], dtype, scale)
    operator = CountingOperator(DenseOperator(matrix))
    found = extreme_eigenpairs(operator, 5, 5, generator=generator)
    check_both(found, matrix, 5, 5)
    assert found.top.products == found.bottom.products == operator.products < 2 * N


@pytest.mark.parametrize("dense_below", [0, 512])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_small_sizes(symmetric_matrix, generator, size, dtype, dense_below):
    matrix = symmetric_matrix(torch.arange(size) - 1.0, dtype, 1e-20) + 1e-21 * torch.eye(size, dtype=dtype)
    found = extreme_eigenpairs(DenseOperator(matrix), 4, 3, generator=generator, dense_below=dense_below)
    assert found.top.values.numel() == min(4, size)
    assert found.bottom.values.numel() == min(3, size)
    check_both(found, matrix, min(4, size), min(3, size))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    levels=st.lists(
        st.tuples(st.integers(-9, 9), st.integers(1, 12)), min_size=1, max_size=6, unique_by=lambda pair: pair[0]
    ),
    k_top=st.integers(1, 5),
    k_bottom=st.integers(0, 5),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_every_multiplicity_comes_out(symmetric_matrix, levels, k_top, k_bottom, exponent, dtype, seed):
    spectrum = torch.tensor([float(level) for level, count in levels for _ in range(count)])
    if not bool(spectrum.any()):
        return
    matrix = symmetric_matrix(spectrum, dtype, 10.0**exponent, seed=seed % 1000)
    generator = torch.Generator().manual_seed(seed)
    found = extreme_eigenpairs(DenseOperator(matrix), k_top, k_bottom, generator=generator, dense_below=0)
    size = spectrum.numel()
    check_both(found, matrix, min(k_top, size), min(k_bottom, size))


def test_planted_multiplicity_in_a_continuous_spectrum(symmetric_matrix, generator):
    matrix = symmetric_matrix(torch.cat([f64(5, 5, 5), spread(0, 1, 797)]), torch.float32)
    found = extreme_eigenpairs(DenseOperator(matrix), 3, 0, generator=generator)
    assert torch.allclose(found.top.values, f64(5, 5, 5), rtol=1e-4)
    assert found.top.status == found.bottom.status == "ok"
    assert found.bottom.values.numel() == 0


def test_a_single_krylov_space_would_miss_it(symmetric_matrix, generator):
    matrix = symmetric_matrix(torch.cat([f64(5, 5, 5), spread(0, 1, 797)]))
    values, _, residuals = ritz(lanczos(DenseOperator(matrix), torch.randn(800, generator=generator).double(), 12))
    assert float(values[0]) == pytest.approx(5)
    assert float(residuals[0]) < 1e-6
    assert float(values[1]) < 1.01


@pytest.mark.parametrize("bulk", [0.0, 0.1])
def test_dead_layer_spectrum_with_a_value_sixteen_times(symmetric_matrix, generator, bulk):
    spectrum = torch.cat([f64(0.337, 0.320, 0.246, 0.239), f64(*[0.161] * 16), bulk * spread(0, 1, 780)])
    found = extreme_eigenpairs(DenseOperator(symmetric_matrix(spectrum, torch.float32)), 20, 0, generator=generator)
    assert found.top.status is EigenStatus.OK
    assert torch.allclose(found.top.values, spectrum[:20], rtol=1e-4)


def test_rank_five_in_single_precision_has_five_values(symmetric_matrix, generator):
    matrix = symmetric_matrix(torch.cat([f64(5, 4, 3, 2, 1), torch.zeros(395)]), torch.float32)
    found = extreme_eigenpairs(DenseOperator(matrix), 20, 0, generator=generator, dense_below=0)
    assert found.top.status is EigenStatus.OK
    assert int((found.top.values > 0.5).sum()) == 5
    assert torch.allclose(found.top.values[:5], f64(5, 4, 3, 2, 1), rtol=1e-5)
    assert found.top.values[5:].abs().max() < 5 * 64 * torch.finfo(torch.float32).eps


def test_magnitude_tie(symmetric_matrix, generator):
    matrix = symmetric_matrix(torch.cat([f64(1, -1, 0.1), torch.zeros(597)]))
    found = extreme_eigenpairs(DenseOperator(matrix), 2, 1, generator=generator)
    assert torch.allclose(found.top.values, f64(1, 0.1), atol=1e-12)
    assert torch.allclose(found.bottom.values, f64(-1), atol=1e-12)


@pytest.mark.parametrize("dense_below", [0, 512])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_zero_operator(generator, size, dense_below):
    found = extreme_eigenpairs(
        DenseOperator(torch.zeros(size, size)), 2, 2, generator=generator, dense_below=dense_below
    )
    for end in found[:2]:
        count = min(2, size)
        assert end.status is EigenStatus.ZERO_OPERATOR
        assert torch.equal(end.values, torch.zeros(count, dtype=torch.float64))
        assert torch.equal(end.residuals, torch.zeros(count, dtype=torch.float64))
        assert torch.equal(end.vectors.T @ end.vectors, torch.eye(count))


def test_powers_of_two_change_nothing_but_the_scale(symmetric_matrix):
    matrix = symmetric_matrix(SPECTRA["bulk and outliers"], torch.float32)
    one, other = (
        extreme_eigenpairs(DenseOperator(matrix * scale), 4, 2, generator=torch.Generator().manual_seed(1))
        for scale in (1.0, 2.0**-90)
    )
    assert torch.equal(one.top.values * 2.0**-90, other.top.values)
    assert torch.equal(one.top.vectors, other.top.vectors)
    assert one.top.products == other.top.products


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("good_calls", [0, 1, 3, 10, 25, 30])
@pytest.mark.parametrize("dense_below", [0, 512])
def test_not_finite_products_are_a_status_and_no_endless_loop(
    function_operator, generator, value, good_calls, dense_below
):
    diagonal = torch.cat([f64(5, 5, 5), spread(0, 1, 57)])

    def product(vectors, calls):
        image = torch.diag(diagonal) @ vectors
        return image if calls <= good_calls else image * value

    operator = function_operator(60, product)
    found = extreme_eigenpairs(operator, 3, 0, generator=generator, dense_below=dense_below)
    if operator.calls > good_calls:
        assert found.top.status is EigenStatus.NONFINITE
        assert bool(found.top.values.isnan().all())
        assert bool(found.top.residuals.isnan().all())
    assert operator.calls < 200


@pytest.mark.parametrize("dense_below", [0, 512])
@pytest.mark.parametrize("share", [0.015, 0.5, 1.0])
def test_an_asymmetric_operator_gives_no_values(function_operator, generator, share, dense_below):
    raw = torch.randn(200, 200, dtype=torch.float64, generator=generator)
    matrix = (raw + raw.T) / 2 + share * (raw - raw.T) / 2
    operator = function_operator(200, lambda vectors, _: matrix @ vectors)
    found = extreme_eigenpairs(operator, 3, 3, generator=generator, dense_below=dense_below)
    assert found.top.status is found.bottom.status is EigenStatus.ASYMMETRIC
    assert bool(found.top.values.isnan().all() & found.bottom.values.isnan().all())


@pytest.mark.parametrize("dense_below", [0, 512])
def test_an_asymmetry_hidden_from_the_first_look_is_seen_later(function_operator, generator, dense_below):
    diagonal = spread(0, 1, 400).float()
    skew = torch.zeros(400, 400)
    skew[0, 399], skew[399, 0] = 0.05, -0.05
    operator = function_operator(400, lambda vectors, _: (torch.diag(diagonal) + skew) @ vectors, torch.float32)
    found = extreme_eigenpairs(operator, 3, 3, generator=generator, dense_below=dense_below)
    assert found.top.status is EigenStatus.ASYMMETRIC


@pytest.mark.parametrize("dense_below", [0, 512])
def test_a_noisy_operator_gives_no_values(function_operator, generator, dense_below):
    noise = torch.Generator().manual_seed(5)
    diagonal = spread(0, 1, 300)

    def product(vectors, calls):
        image = torch.diag(diagonal) @ vectors
        return image * (1 + 1e-3 * torch.randn(image.shape, dtype=torch.float64, generator=noise))

    found = extreme_eigenpairs(function_operator(300, product), 3, 3, generator=generator, dense_below=dense_below)
    assert found.top.status is EigenStatus.NOT_REPEATABLE
    assert bool(found.top.values.isnan().all())


def test_too_few_steps_are_said_and_the_residuals_are_true(symmetric_matrix, generator):
    matrix = symmetric_matrix(SPECTRA["uniform"])
    found = extreme_eigenpairs(DenseOperator(matrix), 5, 5, generator=generator, max_steps=20)
    exact = torch.linalg.eigvalsh(matrix)
    for end in found[:2]:
        assert end.status is EigenStatus.NOT_CONVERGED
        assert end.steps <= 20
        nearest = (end.values.unsqueeze(1) - exact).abs().min(1).values
        assert bool((nearest <= end.residuals * 1.0001).all())


def test_one_end_may_be_reached_without_the_other(symmetric_matrix, generator):
    spectrum = torch.cat([f64(100, 90, 80), logspread(0, -9, N - 3)])
    found = extreme_eigenpairs(DenseOperator(symmetric_matrix(spectrum)), 3, 3, generator=generator, max_steps=60)
    assert found.top.status is EigenStatus.OK
    assert found.bottom.status is EigenStatus.NOT_CONVERGED


@pytest.mark.parametrize("max_products", [20, 40, 80])
def test_products_stay_within_their_bound(symmetric_matrix, generator, max_products):
    operator = CountingOperator(DenseOperator(symmetric_matrix(SPECTRA["triple"])))
    found = extreme_eigenpairs(operator, 5, 5, generator=generator, max_products=max_products)
    assert operator.products == found.top.products <= max_products + 5
    assert found.bottom.status is EigenStatus.NOT_CONVERGED


def test_an_unfinished_search_for_copies_is_not_ok(symmetric_matrix, generator):
    matrix = symmetric_matrix(torch.cat([torch.full((8,), 5.0).double(), spread(0, 1, N - 8)]))
    for max_products in range(25, 100, 15):
        found = extreme_eigenpairs(DenseOperator(matrix), 8, 0, generator=generator, max_products=max_products)
        right = torch.allclose(found.top.values, torch.full((8,), 5.0).double(), rtol=TOL)
        assert right or found.top.status is EigenStatus.NOT_CONVERGED


@pytest.mark.parametrize("asked_rarely", [False, True])
def test_an_end_that_was_not_looked_at_is_not_ok(symmetric_matrix, generator, monkeypatch, asked_rarely):
    """However the products end: where an end is ok its chance of having missed something was computed, and small."""
    monkeypatch.setattr(KrylovSpace, "waits_on_device", property(lambda self: asked_rarely))
    matrix = symmetric_matrix(torch.cat([f64(9, 8, 7), spread(-0.1, 0.1, N - 6), f64(-7, -8, -9)]))
    complete = 0
    for max_products in range(10, 70):
        found = extreme_eigenpairs(DenseOperator(matrix), 3, 3, generator=generator, max_products=max_products)
        for end in found:
            complete += end.status is EigenStatus.OK
            assert (end.status is EigenStatus.OK) == (0 < end.overlooked <= MISSED)
    assert 20 <= complete < 120


def test_same_seed_same_numbers_and_the_global_state_is_left_alone(symmetric_matrix):
    operator = DenseOperator(symmetric_matrix(SPECTRA["bulk and outliers"]))
    before = torch.get_rng_state()
    one, two = (extreme_eigenpairs(operator, 3, 1, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one.top.values, two.top.values)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "request_",
    [
        {"k_top": 0, "k_bottom": 0},
        {"k_top": -1, "k_bottom": 2},
        {"k_top": 2, "k_bottom": 2, "tol": 0.0},
        {"k_top": 2, "k_bottom": 2, "tol": math.nan},
        {"k_top": 2, "k_bottom": 2, "max_steps": 5},
        {"k_top": 2, "k_bottom": 2, "max_products": 5},
    ],
)
def test_impossible_requests_are_refused(generator, request_):
    with pytest.raises(UsageError):
        extreme_eigenpairs(DenseOperator(torch.eye(50)), **request_, generator=generator, dense_below=0)


def test_half_precision_and_empty_operators_are_refused(function_operator, generator):
    with pytest.raises(UsageError, match="float32 or float64"):
        extreme_eigenpairs(function_operator(5, lambda v, _: v, torch.bfloat16), 1, 1, generator=generator)
    with pytest.raises(UsageError, match="at least one row"):
        extreme_eigenpairs(function_operator(0, lambda v, _: v), 1, 1, generator=generator)
