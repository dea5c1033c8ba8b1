"""Every interval covers the truth as often as it says: 95 %, tested at 93 %, over 1000 seeds; a quick run takes fewer."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from scipy.stats import t as student_t
from spectra_cases import drawn, spectra, wasserstein
from torch import Tensor

from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.deflation import DeflatedOperator
from plasticity_probe.linalg.distribution import Distribution
from plasticity_probe.linalg.matrix_trace import TraceEstimate, hutch_plus_plus, hutchinson
from plasticity_probe.linalg.operator import DenseOperator

RANKS = (*(name for name in ranks.DEFINITIONS if name != "numerical_rank"),)
DELTA = EPSILON = 0.05
SEEDS, QUICK = 1000, 40
AT_LEAST = 0.93


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hits(made: Distribution, values: Tensor) -> Iterator[tuple[str, bool]]:
    """Each estimate of a distribution and whether its interval holds the truth."""
    for name in RANKS:
        truth = ranks.rank(values, name, delta=DELTA, epsilon=EPSILON)
        found = made.rank(name, DELTA, EPSILON)
        yield name, found.lower * (1 - 1e-9) <= truth <= found.upper * (1 + 1e-9)
    for name, function in (("trace", lambda x: x), ("exp", torch.exp), ("absolute", torch.abs)):
        truth = float(function(values).sum())
        found = made.matrix_function_trace(function)
        yield name, found.lower - 1e-9 <= truth <= found.upper + 1e-9
    yield "density", wasserstein(made, values) <= made.density_error() + 1e-12


def least_coverage(name: str, seeds: int, draws: int, steps: int, size: int) -> dict[str, float]:
    values, counted = spectra(size)[name], Counter()
    for seed in range(seeds):
        made = drawn(values, generator(seed), draws=draws, steps=steps)
        counted.update(estimate for estimate, hit in hits(made, values) if hit)
    return {estimate: counted[estimate] / seeds for estimate in (*RANKS, "trace", "exp", "absolute", "density")}


@pytest.mark.parametrize("name", spectra())
def test_quadrature_estimates_quickly(name):
    # Forty seeds know a share of 0.95 up to 0.034: three of those below it.
    coverage = least_coverage(name, QUICK, draws=1 + len(name) % 2, steps=6, size=60)
    assert min(coverage.values()) >= 0.84, coverage


@pytest.mark.slow
@pytest.mark.parametrize("name", spectra())
def test_quadrature_estimates(name):
    coverage = least_coverage(name, SEEDS, draws=1 + 2 * (len(name) % 2), steps=10, size=120)
    assert min(coverage.values()) >= AT_LEAST, coverage


def traces(values: Tensor, seed: int, products: int) -> Iterator[tuple[str, TraceEstimate]]:
    """Directions are uniform on the sphere, so the diagonal matrix stands for every one with these eigenvalues."""
    operator = DenseOperator(torch.diag(values))
    yield "hutchinson", hutchinson(operator, products, generator(seed))
    yield (
        "hutchinson, ends known",
        hutchinson(operator, products, generator(seed), ends=(float(values[0]), float(values[-1]))),
    )
    yield "hutch++", hutch_plus_plus(operator, 3 * products, generator(seed))
    known = torch.eye(len(values), dtype=torch.float64)[:, [0, 1, -2, -1]]
    rest = hutchinson(DeflatedOperator(operator, known), products, generator(seed))
    yield "deflated", rest.plus(float(values[[0, 1, -2, -1]].sum()), 0)


@pytest.mark.parametrize("products", [1, 3, 10])
@pytest.mark.parametrize("name", spectra())
def test_traces(name, products):
    values, counted, seeds = spectra(60)[name], Counter(), 200
    for seed in range(seeds):
        for estimator, found in traces(values, seed, products):
            counted[estimator] += found.lower - 1e-9 <= float(values.sum()) <= found.upper + 1e-9
    coverage = {estimator: count / seeds for estimator, count in counted.items()}
    # Two hundred seeds know a share of 0.95 up to 0.015.
    assert len(coverage) == 4
    assert min(coverage.values()) >= 0.905, coverage


@pytest.mark.slow
@pytest.mark.parametrize("products", [1, 2, 3, 10])
@pytest.mark.parametrize("name", spectra())
def test_traces_over_1000_seeds(name, products):
    values, counted = spectra(60)[name], Counter()
    for seed in range(SEEDS):
        for estimator, found in traces(values, seed, products):
            counted[estimator] += found.lower - 1e-9 <= float(values.sum()) <= found.upper + 1e-9
    assert min(counted.values()) >= AT_LEAST * SEEDS, counted


def test_wrong_intervals_would_be_caught():
    """Student's over three draws; a normal one with their deviation; that of the steps alone, without the draws."""
    values = spectra(60)["outliers"]
    student, normal, truth = 0, 0, float(values.sum())
    for seed in range(200):
        made = drawn(values, generator(seed), draws=3, steps=4)
        each = 60 * (made.nodes * made.weights).sum(1)
        error = float(each.std()) / 3**0.5
        student += abs(float(each.mean()) - truth) <= student_t.ppf(0.975, 2) * error
        normal += abs(float(each.mean()) - truth) <= 1.96 * error
    assert normal < student < AT_LEAST * 200
    steps, truth = 0, ranks.rank(spectra(60)["rank deficient"], "stable_rank")
    for seed in range(QUICK):
        found = drawn(spectra(60)["rank deficient"], generator(seed), draws=3, steps=6).rank("stable_rank")
        steps += found.steps[0] <= truth <= found.steps[1]
    assert steps < 0.5 * QUICK
