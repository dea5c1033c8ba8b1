import math

import pytest
import torch

from plasticity_probe.linalg.completeness import Evidence, run_outside
from plasticity_probe.linalg.krylov_space import KrylovSpace
from plasticity_probe.linalg.lanczos import EigenStatus, eigenpairs_beyond
from plasticity_probe.linalg.operator import DenseOperator


def recurrence(nodes, weights, steps):
    """alpha and beta of a discrete measure by the Stieltjes procedure, with its orthonormal polynomials at the nodes."""
    before, now = torch.zeros_like(nodes), torch.ones_like(nodes)
    alphas, betas, polynomials, beta = [], [], [now], 0.0
    for _ in range(steps):
        alpha = float((weights * nodes * now * now).sum())
        after = (nodes - alpha) * now - beta * before
        beta = math.sqrt(float((weights * after * after).sum()))
        before, now = now, after / beta
        alphas.append(alpha)
        betas.append(beta)
        polynomials.append(now)
    return alphas, betas, polynomials


def test_the_sum_of_squares_is_that_of_the_orthonormal_polynomials():
    nodes = torch.linspace(-1, 1, 12, dtype=torch.float64)
    weights = torch.full_like(nodes, 1 / 12)
    alphas, betas, _ = recurrence(nodes, weights, 6)
    evidence = Evidence(2.0, 1.0)
    for alpha, beta in zip(alphas, betas, strict=True):
        evidence = evidence.after(alpha, beta)
    extended = torch.cat([nodes, torch.tensor([2.0]).double()])
    _, _, polynomials = recurrence(extended, torch.cat([weights, torch.zeros(1).double()]), 6)
    assert evidence.total == pytest.approx(sum(float(p[-1]) ** 2 for p in polynomials), rel=1e-10)
    assert not evidence.found


def test_no_measure_with_these_coefficients_holds_more_at_the_point():
    nodes = torch.cat([torch.linspace(-1, 1, 12), torch.tensor([1.5])]).double()
    for mass in (1e-2, 1e-5, 1e-9):
        weights = torch.cat([torch.full((12,), (1 - mass) / 12), torch.tensor([mass])]).double()
        alphas, betas, _ = recurrence(nodes, weights, 5)
        evidence = Evidence(1.5, 1.0)
        for alpha, beta in zip(alphas, betas, strict=True):
            evidence = evidence.after(alpha, beta)
            if evidence.found:
                break
            assert mass <= 1.0000001 / evidence.total


def test_a_ritz_value_beyond_the_point_is_found_at_either_end():
    assert Evidence(0.5, 1.0).after(0.7, 0.1).found
    assert Evidence(0.5, -1.0).after(-0.7, 0.1).found
    assert not Evidence(0.5, -1.0).after(0.7, 0.1).found
    two = Evidence(1.5, 1.0).after(0.0, 2.0).after(0.0, 1.0)
    assert two.found  # the Ritz values of [[0, 2], [2, 0]] are 2 and -2


def test_numbers_that_are_not_finite_are_never_evidence():
    assert Evidence(1.0, 1.0).after(math.nan, 0.1).found
    assert not Evidence(1.0, 1.0).after(0.0, math.nan).chance_overlooked(10) < 1.0


def empty_space(matrix, seed):
    return KrylovSpace(DenseOperator(matrix), 10, torch.Generator().manual_seed(seed))


def test_the_chance_holds_over_many_random_vectors():
    """An eigenvalue above a bulk is overlooked no more often than the bound says, and a bound of half its size would be broken."""
    size, seen, bound = 60, 0.0, 0.0
    diagonal = torch.cat([torch.tensor([1.06]), torch.linspace(-1, 1, size - 1)]).double()
    for seed in range(1500):
        evidence = Evidence(1.06, 1.0)
        run = run_outside(empty_space(torch.diag(diagonal), seed), torch.zeros(0, 0).double())
        for step, (alpha, beta) in enumerate(run, start=1):
            evidence = evidence.after(float(alpha), float(beta))
            if step == 8:
                break
        vector = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()
        share = float(vector[0].square() / vector.square().sum())
        # What a run cannot exclude is a mass of 1 / total at the point; how often a random vector holds less is what the chance bounds.
        seen += share <= 1e-4
        bound += Evidence(0.0, 1.0, total=1e4).chance_overlooked(size)
        assert share <= 1.0001 / evidence.total or evidence.found
    assert 0.5 * bound < seen < bound + 4 * math.sqrt(bound)


def test_a_run_stays_outside_of_the_space(symmetric_matrix):
    matrix = symmetric_matrix(torch.cat([torch.tensor([9.0, 8.0]), torch.linspace(0, 1, 58)]).double())
    space = KrylovSpace(DenseOperator(matrix), 50, torch.Generator().manual_seed(0))
    space.add_start()
    for _ in range(30):
        space.expand()
        space.settle()
    run = run_outside(space, torch.zeros(1, 1).double())
    assert all(abs(alpha) < 1.1 and beta < 1.1 for (alpha, beta), _ in zip(run, range(40), strict=False))


def test_steps_outside_read_nothing_from_the_device(symmetric_matrix, monkeypatch):
    matrix = symmetric_matrix(torch.cat([torch.tensor([9.0, 8.0]), torch.linspace(0, 1, 58)]).double())
    runs = []
    for quiet in (False, True):
        monkeypatch.setattr(KrylovSpace, "waits_on_device", property(lambda self, quiet=quiet: quiet))
        space = KrylovSpace(DenseOperator(matrix), 50, torch.Generator().manual_seed(0))
        space.add_start()
        for _ in range(6):
            space.expand()
        space.settle()
        run = run_outside(space, torch.ones(1, 1).double())
        numbers = [next(run)]
        with monkeypatch.context() as patched:
            for name in ("item", "__float__", "__bool__", "tolist", "cpu", "numpy") if quiet else ():
                patched.setattr(torch.Tensor, name, refused)
            numbers += [next(run) for _ in range(6)]
        runs.append(torch.tensor([(float(alpha), float(beta)) for alpha, beta in numbers]))
    assert torch.allclose(runs[0], runs[1], rtol=1e-6)


def refused(*_):
    raise AssertionError("a number was read")


def test_the_steps_that_are_missing_are_foreseen():
    nodes = torch.linspace(-1, 1, 400, dtype=torch.float64)
    alphas, betas, _ = recurrence(nodes, torch.full_like(nodes, 1 / 400), 30)
    evidence, foreseen, needed = Evidence(1.3, 1.0), 0, 0
    for step, (alpha, beta) in enumerate(zip(alphas, betas, strict=True), start=1):
        evidence = evidence.after(alpha, beta)
        if step == 3:
            foreseen = 3 + evidence.steps_to(1e-4, 10**6)
        if evidence.chance_overlooked(10**6) <= 1e-4:
            needed = step
            break
    assert needed - 2 <= foreseen <= needed + 3
    assert evidence.steps_to(1e-4, 10**6) == 1
    assert Evidence(1.3, 1.0).steps_to(1e-4, 10) == 1


def test_the_tilt_is_what_makes_inertia_exact(symmetric_matrix):
    """A has beyond a limit as many eigenvalues as H and as the operator outside, tilted, together (Haynsworth 1968)."""
    matrix = symmetric_matrix(torch.linspace(-1, 1, 40).double())
    for steps in (3, 6, 9):
        space = KrylovSpace(DenseOperator(matrix), 40, torch.Generator().manual_seed(steps))
        space.add_start()
        for _ in range(steps):
            space.expand()
            space.settle()
        ritz = space.ritz()
        basis = space.vectors(torch.eye(steps, dtype=torch.float64))
        complement = torch.linalg.svd(basis, full_matrices=True)[0][:, steps:]
        limit = float(ritz.values[1] + 1e-3)
        leaks = space.leaks(ritz)
        tilt = (leaks / (limit - ritz.values)) @ leaks.T
        remainders = torch.stack(space.remainders, 1)
        outside = complement.T @ (matrix + remainders @ tilt @ remainders.T) @ complement
        beyond = int((ritz.values > limit).sum()) + int((torch.linalg.eigvalsh(outside) > limit).sum())
        assert beyond == int((torch.linalg.eigvalsh(matrix) > limit).sum())


@pytest.mark.parametrize("dense_below", [0, 512])
def test_all_eigenvalues_outside_of_a_window(symmetric_matrix, dense_below):
    spectrum = torch.cat([torch.tensor([5.0, 5.0, 4.0, -2.0, -3.0, -3.0, -3.0]), torch.linspace(-1, 1, 193)]).double()
    operator = DenseOperator(symmetric_matrix(1e-9 * spectrum))
    found = eigenpairs_beyond(
        operator, above=2e-9, below=-2.5e-9, generator=torch.Generator().manual_seed(1), dense_below=dense_below
    )
    assert found.top.status is found.bottom.status is EigenStatus.OK
    assert torch.allclose(found.top.values, 1e-9 * torch.tensor([5.0, 5.0, 4.0]).double(), rtol=1e-5)
    assert torch.allclose(found.bottom.values, torch.full((3,), -3e-9).double(), rtol=1e-5)


@pytest.mark.parametrize("dense_below", [0, 512])
def test_a_window_that_holds_everything_leaves_nothing_outside(symmetric_matrix, dense_below):
    operator = DenseOperator(symmetric_matrix(torch.linspace(-1, 1, 60).double()))
    found = eigenpairs_beyond(operator, above=2.0, generator=torch.Generator().manual_seed(1), dense_below=dense_below)
    assert found.top.values.shape == found.bottom.values.shape == (0,)
    assert found.top.status is EigenStatus.OK
