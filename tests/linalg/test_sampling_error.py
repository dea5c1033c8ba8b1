"""The law of the weights of random directions is known, so 1000 repetitions are a matter of milliseconds."""

import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from plasticity_probe.linalg.sampling_error import sampling_offsets, standard_error

N = 120
INDEX = np.arange(1.0, N + 1)
SIGNS = np.where(INDEX % 2 == 0, 1.0, -1.0)
SPECTRA = {
    "flat": np.linspace(-1, 1, N),
    "positive": np.linspace(0, 1, N),
    "power law": INDEX**-1.5,
    "indefinite": SIGNS * INDEX**-1.5,
    "rank deficient": np.r_[5.0, 3, 2, np.zeros(N - 3)],
    "single": np.r_[1.0, np.zeros(N - 1)],
    "pair": np.r_[1.0, -1.0, np.zeros(N - 2)],
    "outliers": np.r_[np.ones(5), 1e-3 * np.ones(N - 5)],
    "clustered": np.r_[np.ones(30), np.full(50, 0.5), np.full(N - 80, -0.2)],
}


def weights(draws: int, repetitions: int = 1000, seed: int = 0) -> np.ndarray:
    """Squared components of unit vectors, a mean over draws for each repetition."""
    normal = np.random.default_rng(seed).standard_normal((repetitions, draws, N)) ** 2
    return normal / normal.sum(2, keepdims=True)


def covered(values: np.ndarray, draws: int) -> tuple[float, float]:
    """How often the interval holds the sum, and its mean length over that of a normal law with the true variance."""
    ends, hits, lengths = np.array([[values.min()], [values.max()]]), 0, []
    for each in weights(draws).mean(1):
        found = sampling_offsets(values[:, None], N * each, ends, draws)
        miss = values.sum() - N * each @ values
        hits += found.lower[0] <= miss <= found.upper[0]
        lengths.append(found.upper[0] - found.lower[0])
    ideal = 3.92 * math.sqrt(2 / draws * np.square(values - values.mean()).sum())
    return hits / 1000, float(np.mean(lengths)) / ideal


@pytest.mark.parametrize("draws", [1, 3, 10])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_interval_covers_as_often_as_it_says_over_1000_seeds(name, draws):
    share, length = covered(SPECTRA[name], draws)
    assert share >= 0.93
    assert 0.9 < length < 1.2


def test_a_students_interval_of_three_draws_and_a_normal_one_would_be_caught():
    values, each = SPECTRA["single"], weights(3)
    samples = N * each @ values
    error = samples.std(1, ddof=1) / math.sqrt(3)
    missed = np.abs(samples.mean(1) - values.sum())
    assert (missed <= student_t.ppf(0.975, 2) * error).mean() < 0.93, "Student"
    assert (missed <= 1.96 * error).mean() < 0.93, "normal"
    plain = 1.96 * np.sqrt(2 / 3 * N * each.mean(1) @ values**2)
    assert (missed <= plain).mean() < 0.93, "the variance alone, without its lean"


def test_the_interval_leans_towards_what_unlucky_draws_hide():
    values = SPECTRA["single"]
    counts = np.full(N, 1.0)
    found = sampling_offsets(values[:, None], counts, np.array([[0.0], [1.0]]), 3)
    assert found.upper[0] > -found.lower[0]
    turned = sampling_offsets(-values[:, None], counts, np.array([[-1.0], [0.0]]), 3)
    assert turned.lower[0] == pytest.approx(-found.upper[0])


def test_constants_are_known_and_several_functions_are_one_by_one():
    values = np.stack([np.full(N, 3.0), SPECTRA["flat"]], 1)
    found = sampling_offsets(values, np.ones(N), np.stack([values.min(0), values.max(0)]), 2)
    assert found.lower[0] == found.upper[0] == 0.0
    alone = sampling_offsets(values[:, 1:], np.ones(N), np.array([[-1.0], [1.0]]), 2)
    assert found.upper[1] == pytest.approx(alone.upper[0])


def test_more_draws_are_worth_their_square_root():
    values, ends = SPECTRA["flat"][:, None], np.array([[-1.0], [1.0]])
    few, many = (sampling_offsets(values, np.ones(N), ends, draws) for draws in (4, 400))
    assert few.upper[0] / many.upper[0] == pytest.approx(10, rel=0.1)


def test_the_standard_error_is_that_of_the_longer_side():
    assert standard_error((-1.959964, 0.5)) == pytest.approx(1.0, rel=1e-6)
    assert math.isnan(standard_error((math.nan, math.nan)))
