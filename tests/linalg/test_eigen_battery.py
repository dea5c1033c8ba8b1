"""A part of the eigen battery in every run, and that its judge lets no wrong answer pass."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from eigen_families import FAMILIES, FAULTY, LAPACK, SCALES
from eigen_judge import Result, judge, solve
from eigen_problems import DTYPES, SIZES, Problem, problems, quick_problems, truth_of
from eigen_spectra import first_draws, levels, network, rotated, spread, triples, wilkinson
from scipy.sparse.linalg import eigsh

from plasticity_probe.linalg.dense import symmetric_eigenpairs
from plasticity_probe.linalg.lanczos import Eigenpairs, EigenStatus

TOL = 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_no_silent_error_in_a_part_of_the_battery(name):
    results = [solve(problem) for problem in quick_problems(name)]
    wrong = [(result.problem, result.exception, result.complaints) for result in results]
    assert not [case for case in wrong if case[1] or case[2]]
    if name not in FAULTY:
        refusals = Counter(result.refusal for result in results)
        assert refusals[None] + refusals["not_converged"] + refusals["zero_operator"] == len(results)


def test_the_battery_is_as_large_as_it_says_and_no_problem_stands_twice():
    battery = list(problems())
    assert len(battery) == len(set(battery)) >= 2000
    assert len(LAPACK) == 21
    assert {problem.family for problem in battery} == set(FAMILIES)
    assert {problem.size for problem in battery} == set(SIZES)
    assert {problem.dtype for problem in battery} == set(DTYPES)
    assert {problem.scale for problem in battery} >= set(SCALES)
    assert sum(problem.matrix_free for problem in battery) >= 2000


def test_a_part_of_the_families_gives_the_same_problems():
    name = "rank 3"
    assert list(problems((name,))) == [problem for problem in problems() if problem.family == name]


def problem(family, size, dtype="float64", scale=1.0, **changes):
    return replace(Problem(family, size, dtype, scale, 3, 3, TOL, 0, 0), **changes)


def true_values(*arguments, **changes):
    truth = problem(*arguments, **changes).truth()
    return truth.values * truth.unit


# The truth


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "spectrum"),
    [("network", network), ("triples across every cut", triples), ("uniform", spread(-1, 1))],
)
def test_the_truth_is_the_spectrum_that_the_matrix_was_built_from(family, spectrum, dtype, scale):
    eps = torch.finfo(DTYPES[dtype]).eps
    chosen = spectrum(100, eps, 0).sort().values
    assert torch.allclose(true_values(family, 100, dtype, scale) / scale, chosen, rtol=0, atol=100 * eps)


def test_the_truth_of_closed_forms():
    angles = 2 * torch.pi * torch.arange(33, dtype=torch.float64) / 33
    assert torch.allclose(true_values("Laplacian of a cycle", 33), (2 - 2 * angles.cos()).sort().values, atol=1e-14)
    assert float(true_values("Hilbert", 10)[-1]) == pytest.approx(1.7519196702651775, rel=1e-14)
    assert true_values("+1 and -1, half each", 10).tolist() == [-1.0] * 5 + [1.0] * 5
    pair = torch.linalg.eigvalsh(wilkinson(21, 0.0, 0))[-2:]
    assert pair.tolist() == pytest.approx([10.746194182903322, 10.746194182903393], abs=1e-13)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_truth_of_an_asymmetric_operator_is_its_symmetric_part(scale):
    truth = problem("Jordan block", 3, scale=scale).truth()
    assert not truth.healthy
    assert (truth.values * truth.unit / scale).tolist() == pytest.approx([0.5 - 0.5**0.5, 0.5, 0.5 + 0.5**0.5])


def test_the_first_draws_of_the_solver_see_nothing_of_what_is_hidden():
    draws = first_draws(100, 0, 1)
    assert float((problem("start in the null space", 100).matrix() @ draws[:, 0]).norm()) < 1e-14
    matrix = problem("invisible values", 100).matrix()
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, [0, 1, -3, -2, -1]]
    assert float((draws.T @ vectors).abs().max()) < 1e-14
    assert float((matrix @ draws).norm()) > 0.1


def test_operators_have_the_faults_that_their_names_say():
    def products(family, calls=30):
        operator = problem(family, 10).operator()
        return [operator @ torch.ones(10, dtype=torch.float64) for _ in range(calls)]

    honest = products("network", 1)[0]
    later = products("NaN after five products")
    assert all(torch.allclose(product, honest) for product in later[:5])
    assert all(bool(product.isnan().any()) for product in later[5:])
    noisy = torch.stack(products("noise of 1e-3")) - honest
    assert float(noisy.norm(dim=1).mean() / honest.norm()) == pytest.approx(1e-3, rel=0.2)
    assert torch.allclose(products("one product 5 % too long")[6], 1.05 * honest)


# The judge

SPECTRUM = levels(1.0, 1.0, 1.0, 0.8, 0.6, rest=spread(-0.4, 0.4))


def truth_and_answer(dtype="float64", scale=1.0, spectrum=SPECTRUM, size=60, count=5):
    """A truth and the right answer to it."""
    truth = truth_of((rotated(spectrum)(size, 0.0, 0) * scale).to(DTYPES[dtype]))
    values, vectors = symmetric_eigenpairs(truth.matrix)
    return truth, answer(truth, values[:count] * truth.unit, vectors[:, :count], DTYPES[dtype])


def answer(truth, values, vectors, dtype=torch.float64, status=EigenStatus.OK):
    """What a solver that believes in these pairs would say, with true residuals."""
    vectors = vectors.to(dtype)
    residuals = (truth.matrix @ vectors.double() - vectors.double() * (values / truth.unit)).norm(dim=0) * truth.unit
    return Eigenpairs(values, vectors, residuals, status, 0, 0, truth.norm * truth.unit)


def complaints(truth, pairs, tol=TOL, count=5):
    return judge(pairs, truth, count, tol, largest=True)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_right_answer_passes(dtype, scale):
    assert complaints(*truth_and_answer(dtype, scale)) == ()
    truth, pairs = truth_and_answer(dtype, scale)
    assert complaints(truth, pairs, tol=1e-9) == ()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ghost_copy_is_caught(dtype, scale):
    truth, pairs = truth_and_answer(dtype, scale)
    places = [0, 1, 2, 3, 3]
    ghost = answer(truth, pairs.values[places], pairs.vectors[:, places], DTYPES[dtype])
    found = complaints(truth, ghost)
    assert any("value 4" in complaint for complaint in found)
    assert any("orthonormal" in complaint for complaint in found)


def test_a_ghost_copy_beside_a_vector_of_another_pair_is_caught():
    truth, pairs = truth_and_answer()
    ghost = replace(pairs, values=pairs.values[[0, 1, 2, 3, 3]])
    assert any("value 4 is 0.8" in complaint for complaint in complaints(truth, ghost))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_missed_pair_is_caught(scale):
    truth, _ = truth_and_answer(scale=scale)
    values, vectors = symmetric_eigenpairs(truth.matrix)
    places = [0, 1, 2, 4, 5]
    found = complaints(truth, answer(truth, values[places] * truth.unit, vectors[:, places]))
    assert len(found) == 2
    assert "value 3" in found[0]


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_wrong_multiplicity_is_caught(copies):
    truth, _ = truth_and_answer()
    values, vectors = symmetric_eigenpairs(truth.matrix)
    places = [*range(min(copies, 3)), *range(3, 8)][:5] if copies < 4 else [0, 1, 2, 2, 3]
    found = complaints(truth, answer(truth, values[places] * truth.unit, vectors[:, places]))
    assert any(f"value {min(copies, 3)}" in complaint for complaint in found)


def test_one_end_is_not_taken_for_the_other():
    truth, pairs = truth_and_answer()
    assert judge(pairs, truth, 5, TOL, largest=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unconverged_pair_is_caught_by_its_true_residual(dtype):
    truth, pairs = truth_and_answer(dtype)
    vectors = pairs.vectors.clone()
    other = symmetric_eigenpairs(truth.matrix)[1][:, 30].to(vectors)
    vectors[:, 4] = 0.99 * vectors[:, 4] + math.sqrt(1 - 0.99**2) * other
    value = vectors[:, 4].double() @ truth.matrix @ vectors[:, 4].double() * truth.unit
    unconverged = answer(truth, torch.cat([pairs.values[:4], value[None]]), vectors, DTYPES[dtype])
    assert any("times what is allowed" in complaint for complaint in complaints(truth, unconverged))
    assert complaints(truth, replace(unconverged, status=EigenStatus.NOT_CONVERGED)) == ()


def test_residuals_that_are_not_those_of_the_vectors_are_caught_whatever_the_status():
    truth, pairs = truth_and_answer()
    flattered = replace(pairs, values=pairs.values * 1.01, residuals=pairs.residuals)
    for status in (EigenStatus.OK, EigenStatus.NOT_CONVERGED):
        assert any("is said to be" in complaint for complaint in complaints(truth, replace(flattered, status=status)))


@pytest.mark.parametrize("field", ["values", "vectors", "residuals"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_caught(field, number):
    truth, pairs = truth_and_answer()
    spoilt = getattr(pairs, field).clone()
    spoilt[..., -1] = number
    assert complaints(truth, replace(pairs, **{field: spoilt})) == ("ok beside numbers that are not finite",)


def test_an_order_and_a_number_of_values_that_were_not_asked_for_are_caught():
    truth, pairs = truth_and_answer()
    backwards = answer(truth, pairs.values.flip(0), pairs.vectors.flip(1))
    assert "the values are not in order" in complaints(truth, backwards)
    assert "instead of" in complaints(truth, pairs, count=4)[0]


@pytest.mark.parametrize("scale", [1e-30, 1.0])
def test_only_zero_is_zero(scale):
    truth, pairs = truth_and_answer(scale=scale)
    zeros = replace(pairs, values=0 * pairs.values, residuals=0 * pairs.residuals, status=EigenStatus.ZERO_OPERATOR)
    assert complaints(truth, zeros) == ("an operator is called zero and is not",)
    nothing = problem("LAPACK 1: zero", 60).truth()
    assert complaints(nothing, zeros) == ()
    assert complaints(nothing, replace(zeros, values=zeros.values + 1e-300)) == (
        "the eigenvalues of zero are not zero",
    )
    assert complaints(nothing, replace(zeros, status=EigenStatus.OK)) == ("the zero operator is not called so",)


@pytest.mark.parametrize("status", [EigenStatus.NONFINITE, EigenStatus.ASYMMETRIC, EigenStatus.NOT_REPEATABLE])
def test_a_refusal_gives_no_numbers(status):
    truth, pairs = truth_and_answer()
    assert complaints(truth, replace(pairs, status=status)) == (f"numbers beside the status {status}",)
    assert complaints(truth, replace(pairs, status=status, values=pairs.values * math.nan)) == ()


def test_zero_is_judged_by_the_rounding_of_the_norm():
    truth, pairs = truth_and_answer("float32", spectrum=levels(1.0, 0.5))
    assert complaints(truth, pairs) == ()
    for value, right in ((5e-6, True), (5e-5, False)):
        values = torch.cat([pairs.values[:2], torch.full((3,), value, dtype=torch.float64)])
        assert (complaints(truth, answer(truth, values, pairs.vectors, torch.float32)) == ()) is right


def test_a_solver_that_forgets_the_scale_is_caught():
    """ARPACK (Lehoucq, Sorensen & Yang 1998) compares residuals with eps^(2/3) instead of the norm, and says nothing."""
    request = problem("uniform", 400, "float32", 1e-30)
    matrix, truth = request.matrix(), request.truth()
    start = np.random.default_rng(0).standard_normal(400).astype("f")
    values, vectors = eigsh(matrix.numpy(), k=5, which="LA", tol=TOL, v0=start)  # pyright: ignore[reportArgumentType]
    order = values.argsort()[::-1].copy()
    wrong = answer(truth, torch.from_numpy(values[order]).double(), torch.from_numpy(vectors[:, order]), torch.float32)
    assert any("value 0" in complaint for complaint in complaints(truth, wrong))


def test_a_result_says_what_it_is():
    request = problem("uniform", 10)
    right = Result(request, (EigenStatus.OK, EigenStatus.OK), (), 10)
    assert (right.refusal, right.silent) == (None, False)
    assert Result(request, (EigenStatus.OK, EigenStatus.NOT_CONVERGED), (), 10).refusal == "not_converged"
    assert Result(request, (EigenStatus.OK,), ("top: wrong",), 10).silent
    assert Result(request, (), (), 10, "ValueError: no").refusal == "raised"
