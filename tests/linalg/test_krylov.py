import pytest
import torch

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.krylov import extended, lanczos, ritz
from plasticity_probe.linalg.operator import CountingOperator, DenseOperator
from plasticity_probe.linalg.random_vectors import gaussian

DTYPES = [torch.float32, torch.float64]
SCALES = [1e-30, 1.0, 1e30]


def rank_five(symmetric_matrix, dtype=torch.float32, scale=1.0):
    return symmetric_matrix(torch.cat([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), torch.zeros(395)]), dtype, scale)


def start(size, dtype=torch.float64, seed=7):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def without_reorthogonalisation(matrix, vector, steps):
    """The textbook three-term recurrence, as a plausible wrong implementation."""
    previous, current, beta = torch.zeros_like(vector), vector / vector.norm(), 0.0
    diagonal, offdiagonal = [], []
    for _ in range(steps):
        product = matrix @ current - beta * previous
        alpha = product @ current
        product = product - alpha * current
        beta = product.norm()
        diagonal.append(alpha)
        offdiagonal.append(beta)
        previous, current = current, product / beta
    inner = torch.stack(offdiagonal[:-1]).double()
    return torch.linalg.eigvalsh(
        torch.diag(torch.stack(diagonal).double()) + torch.diag(inner, 1) + torch.diag(inner, -1)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_the_recurrence_holds_and_the_basis_is_orthonormal(symmetric_matrix, dtype, scale):
    matrix = symmetric_matrix(torch.linspace(-1, 2, 100), dtype, scale)
    krylov = lanczos(DenseOperator(matrix), start(100, dtype), 30)
    basis, eps = krylov.basis.double(), torch.finfo(dtype).eps
    assert krylov.steps == krylov.products == 30
    assert (basis.T @ basis - torch.eye(30)).abs().max() < 20 * eps
    defect = matrix.double() @ basis - basis @ krylov.tridiagonal()
    assert krylov.following is not None
    defect[:, -1] -= krylov.offdiagonal[-1] * krylov.following.double()
    assert defect.abs().max() < 50 * eps * 2 * scale
    assert krylov.asymmetry < 50 * eps * 2 * scale
    assert 0 < krylov.norm <= 2 * scale * (1 + 10 * eps)


def test_rank_five_has_five_ritz_values_and_no_ghosts(symmetric_matrix):
    matrix = rank_five(symmetric_matrix)
    krylov = lanczos(DenseOperator(matrix), start(400, torch.float32), 100, generator=torch.Generator().manual_seed(0))
    values, _, _ = ritz(krylov)
    assert krylov.steps == 100
    assert torch.allclose(values[:5], torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64), rtol=1e-5)
    assert values[5:].abs().max() < 1e-4


def test_the_check_for_ghosts_catches_a_recurrence_without_reorthogonalisation(symmetric_matrix):
    ghosts = without_reorthogonalisation(rank_five(symmetric_matrix), start(400, torch.float32), 100)
    assert int((ghosts > 0.5).sum()) > 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_breakdown_is_seen_and_continued(symmetric_matrix, dtype, scale):
    matrix = rank_five(symmetric_matrix, dtype, scale)
    krylov = lanczos(DenseOperator(matrix), start(400, dtype), 10, generator=torch.Generator().manual_seed(0))
    # Rank five and the null space make six dimensions; amplified rounding may pass for a seventh.
    assert krylov.starts[0] == krylov.first_block
    assert krylov.first_block in (6, 7)
    assert krylov.steps == 10
    assert (krylov.basis.double().T @ krylov.basis.double() - torch.eye(10)).abs().max() < 20 * torch.finfo(dtype).eps


def test_without_a_generator_it_ends_at_the_breakdown(symmetric_matrix):
    krylov = lanczos(DenseOperator(rank_five(symmetric_matrix)), start(400, torch.float32), 100)
    assert krylov.steps in (6, 7)
    assert krylov.following is None
    assert krylov.starts == ()


@pytest.mark.parametrize("matrix", [torch.zeros(20, 20), torch.eye(20)], ids=["zero", "identity"])
def test_zero_and_identity_break_down_at_every_step(matrix):
    krylov = lanczos(DenseOperator(matrix), start(20, torch.float32), 50, generator=torch.Generator().manual_seed(0))
    assert krylov.steps == 20
    assert krylov.starts == tuple(range(1, 20))
    assert krylov.following is None
    assert torch.allclose(krylov.tridiagonal(), matrix.double(), atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_a_full_space_gives_all_eigenvalues(symmetric_matrix, size):
    spectrum = torch.arange(1.0, size + 1).double()
    krylov = lanczos(
        DenseOperator(symmetric_matrix(spectrum)), start(size), 99, generator=torch.Generator().manual_seed(0)
    )
    values, _, residuals = ritz(krylov)
    assert torch.allclose(values, spectrum.flip(0), rtol=1e-12)
    assert torch.equal(residuals, torch.zeros(size, dtype=torch.float64))


def test_continuing_is_the_same_as_going_on(symmetric_matrix):
    operator = DenseOperator(symmetric_matrix(torch.linspace(0, 1, 60)))
    whole = lanczos(operator, start(60), 25)
    half = lanczos(operator, start(60), 11)
    rest = extended(operator, half, 14)
    assert half.steps == 11
    assert rest.products == 25
    assert torch.equal(rest.tridiagonal(), whole.tridiagonal())
    assert torch.equal(rest.basis, whole.basis)


def test_locked_vectors_stay_outside(symmetric_matrix):
    matrix = symmetric_matrix(torch.linspace(0, 1, 60, dtype=torch.float64))
    locked = torch.linalg.eigh(matrix)[1][:, -3:]
    krylov = lanczos(DenseOperator(matrix), start(60), 99, locked=locked, generator=torch.Generator().manual_seed(0))
    assert krylov.steps == 57
    assert (locked.T @ krylov.basis).abs().max() < 1e-14
    assert float(ritz(krylov)[0][0]) == pytest.approx(56 / 59, rel=1e-12)


def test_ritz_residuals_are_true_residuals(symmetric_matrix):
    matrix = symmetric_matrix(torch.linspace(-1, 1, 80))
    krylov = lanczos(DenseOperator(matrix), start(80), 20)
    values, coordinates, residuals = ritz(krylov)
    vectors = krylov.basis @ coordinates
    assert torch.allclose((matrix @ vectors - vectors * values).norm(dim=0), residuals, atol=1e-13)


def test_scaled_belongs_to_the_scaled_operator(symmetric_matrix):
    matrix = symmetric_matrix(torch.linspace(-1, 1, 30))
    one = lanczos(DenseOperator(matrix), start(30), 10).scaled(-4.0)
    two = lanczos(DenseOperator(-4.0 * matrix), start(30), 10)
    assert torch.allclose(ritz(one)[0], ritz(two)[0], atol=1e-13)
    assert one.norm == pytest.approx(two.norm)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_ends_it(function_operator, value):
    diagonal = torch.linspace(1, 2, 30, dtype=torch.float64)
    operator = function_operator(30, lambda vector, calls: diagonal * vector * (value if calls > 4 else 1.0))
    krylov = lanczos(operator, start(30), 20, generator=torch.Generator().manual_seed(0))
    assert not krylov.finite
    assert krylov.steps == 4
    assert krylov.products == 5
    assert bool(krylov.basis.isfinite().all())


def test_asymmetry_shows(function_operator):
    raw = torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = (raw + raw.T) / 2 + 0.01 * (raw - raw.T)
    krylov = lanczos(function_operator(50, lambda vector, _: matrix @ vector), start(50), 20)
    assert krylov.asymmetry > 1e-3 * krylov.norm


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.ones(3), torch.full((4,), float("nan")), torch.eye(4)[0]])
def test_a_start_vector_without_direction_is_refused(bad):
    with pytest.raises(UsageError):
        lanczos(DenseOperator(torch.eye(4)), bad, 2, locked=torch.eye(4)[:, :1])


def test_products_are_counted(symmetric_matrix, generator):
    operator = CountingOperator(DenseOperator(rank_five(symmetric_matrix)))
    krylov = lanczos(operator, gaussian(operator, generator), 30, generator=generator)
    assert krylov.products == operator.products == 30
