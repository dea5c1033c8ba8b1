import pytest
import torch

from plasticity_probe.linalg.krylov_space import KrylovSpace
from plasticity_probe.linalg.lanczos import EigenStatus, extreme_eigenpairs
from plasticity_probe.linalg.operator import DenseOperator

N = 80


@pytest.fixture
def matrix(symmetric_matrix):
    spectrum = torch.cat([torch.tensor([3.0, 3.0, 2.0, -1.0, -1.0]), torch.linspace(0.5, -0.5, N - 5)]).double()
    return symmetric_matrix(spectrum)


def space_of(matrix, capacity=40, seed=0):
    return KrylovSpace(DenseOperator(matrix), capacity, torch.Generator().manual_seed(seed))


def parts(space):
    basis = space.vectors(torch.eye(space.steps, dtype=torch.float64))
    ritz = space.ritz()
    projected = ritz.coordinates @ torch.diag(ritz.values) @ ritz.coordinates.T
    return basis, projected, space.residual_vectors(torch.eye(space.steps, dtype=torch.float64))


def check_decomposition(space, matrix):
    """A Q = Q H + F C, orthonormal Q, and F orthogonal to it."""
    basis, projected, outside = parts(space)
    assert torch.allclose(matrix @ basis, basis @ projected + outside, atol=1e-12)
    assert torch.allclose(basis.T @ basis, torch.eye(space.steps, dtype=torch.float64), atol=1e-13)
    assert (basis.T @ outside).abs().max() < 1e-13


def grown(space, steps):
    for _ in range(steps):
        space.expand()
        space.settle()


def test_one_start_gives_the_lanczos_recurrence(matrix):
    space = space_of(matrix)
    space.add_start()
    grown(space, 12)
    check_decomposition(space, matrix)
    projected = parts(space)[1]
    assert projected.triu(2).abs().max() < 1e-12
    assert space.products == space.steps == 12
    assert space.waiting == 1


def test_starts_that_join_later_and_restarts_keep_the_decomposition(matrix):
    space = space_of(matrix)
    space.add_start()
    grown(space, 9)
    space.add_start()
    space.add_start()
    grown(space, 10)
    check_decomposition(space, matrix)
    space.restart(space.ritz(), [0, 1, 2, 5, 17, 18])
    assert space.steps == 6
    check_decomposition(space, matrix)
    grown(space, 15)
    check_decomposition(space, matrix)
    assert space.waiting == 3


def test_residuals_of_the_decomposition_are_true(matrix):
    space = space_of(matrix)
    space.add_start()
    grown(space, 5)
    space.add_start()
    grown(space, 10)
    space.restart(space.ritz(), [0, 1, 2, 3, 13, 14])
    grown(space, 4)
    ritz = space.ritz()
    vectors = space.vectors(ritz.coordinates)
    true = (matrix @ vectors - vectors * ritz.values).norm(dim=0)
    assert torch.allclose(ritz.residuals, true, atol=1e-12)


def test_two_starts_see_a_double_eigenvalue_and_one_does_not(matrix):
    one, two = space_of(matrix), space_of(matrix)
    one.add_start()
    two.add_start()
    two.add_start()
    grown(one, 12)
    grown(two, 40)
    assert float(one.ritz().values[1]) < 2.1
    assert torch.allclose(two.ritz().values[:2], torch.tensor([3.0, 3.0]).double())


def test_an_invariant_space_leaves_no_remainder(symmetric_matrix):
    matrix = symmetric_matrix(torch.cat([torch.tensor([2.0, 1.0]), torch.zeros(58)]).double(), torch.float32)
    space = space_of(matrix)
    space.add_start()
    for _ in range(3):
        space.expand()
        space.settle()
    assert space.waiting == 0
    assert torch.allclose(space.ritz().values, torch.tensor([2.0, 1.0, 0.0]).double(), atol=1e-6)


def test_what_is_dropped_still_counts_in_the_residuals(symmetric_matrix):
    spectrum = torch.cat([torch.ones(1), 2e-6 / 10 * torch.randn(99, generator=torch.Generator().manual_seed(1))])
    matrix = symmetric_matrix(spectrum.double(), torch.float32)
    space = space_of(matrix)
    space.add_start()
    grown(space, 3)
    assert space.waiting == 0
    ritz = space.ritz()
    vectors = space.vectors(ritz.coordinates).double()
    true = (matrix.double() @ vectors - vectors * ritz.values).norm(dim=0)
    assert torch.allclose(ritz.residuals, true, rtol=0.3, atol=2e-7)
    assert float(ritz.residuals.max()) > 5e-8


def test_steps_beyond_rounding_are_taken_back(symmetric_matrix):
    matrix = symmetric_matrix(torch.cat([torch.tensor([2.0, 1.0]), torch.zeros(58)]).double())
    space = space_of(matrix)
    space.add_start()
    for _ in range(8):
        space.expand()
    space.settle()
    assert space.steps == 3
    assert space.waiting == 0
    assert torch.allclose(space.ritz().values, torch.tensor([2.0, 1.0, 0.0]).double(), atol=1e-12)


def test_steps_beyond_an_exact_zero_are_taken_back():
    space = space_of(torch.diag(torch.tensor([4.0, 0.0, 0.0, 0.0, 0.0])))
    space.add_start(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))
    for _ in range(4):
        space.expand()
    space.settle()
    assert space.finite
    assert space.steps == 1
    assert float(space.ritz().values[0]) == 4.0


def test_looking_rarely_gives_the_same_pairs(symmetric_matrix, monkeypatch):
    spectrum = torch.cat([torch.tensor([5.0, 5.0, 4.0, 3.0, 2.0]), torch.linspace(0, 1, 595)]).double()
    operator = DenseOperator(symmetric_matrix(spectrum))
    often = extreme_eigenpairs(operator, 5, 0, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(KrylovSpace, "waits_on_device", property(lambda self: True))
    rarely = extreme_eigenpairs(operator, 5, 0, generator=torch.Generator().manual_seed(0))
    assert often.top.status is rarely.top.status is EigenStatus.OK
    assert torch.allclose(often.top.values, rarely.top.values, rtol=1e-5)


def test_steps_between_looks_read_nothing_from_the_device(matrix, monkeypatch):
    monkeypatch.setattr(KrylovSpace, "waits_on_device", property(lambda self: True))
    space = space_of(matrix)
    space.add_start()
    space.expand()

    def refused(*_):
        raise AssertionError("a number was read")

    with monkeypatch.context() as patched:
        for name in ("item", "__float__", "__bool__", "tolist", "cpu", "numpy"):
            patched.setattr(torch.Tensor, name, refused)
        for _ in range(7):
            space.expand()
    space.settle()
    check_decomposition(space, matrix)


def test_asymmetry_is_the_deviation_from_what_symmetry_predicts(matrix):
    skew = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    operator = DenseOperator(matrix)
    operator.matrix = matrix + 0.01 * (skew - skew.T)
    space = KrylovSpace(operator, 40, torch.Generator().manual_seed(0))
    space.add_start()
    grown(space, 10)
    assert space.asymmetry > 0.01
    straight = space_of(matrix)
    straight.add_start()
    grown(straight, 10)
    assert straight.asymmetry < 1e-13
