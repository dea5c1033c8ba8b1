"""Memorization from subset-trained models, against loops, exact enumeration and worlds whose truth is known."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subset_worlds import NAN, by_loops, drawn, random_members

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.member_differences import Marks
from plasticity_probe.prediction.panel import Numbers
from plasticity_probe.prediction.subset_memorization import SubsetMemorization, spearman_brown, subset_memorization

FEW = 50
"""Bootstrap draws where the interval of the share is not what is looked at."""


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), models=st.integers(4, 12), examples=st.integers(1, 6), graded=st.booleans())
def test_estimates_and_errors_are_those_of_loops(seed: int, models: int, examples: int, graded: bool) -> None:
    rng = np.random.default_rng(seed)
    members = rng.random((models, examples)) < 0.6
    correct = rng.random((models, examples)) if graded else (rng.random((models, examples)) < 0.5).astype(float)
    correct[rng.random((models, examples)) < 0.1] = NAN
    expected = by_loops(members, correct)
    if all(math.isnan(value) for value, _ in expected):
        with pytest.raises(UsageError, match="train more models"):
            subset_memorization(members, correct, draws=2)
        return
    found = subset_memorization(members, correct, draws=2)
    np.testing.assert_allclose(found.memorization, [value for value, _ in expected], atol=1e-12)
    np.testing.assert_allclose(found.error, [error for _, error in expected], atol=1e-7)
    known = ~np.isnan(correct)
    assert found.models_with.tolist() == (members & known).sum(0).tolist()
    assert found.models_without.tolist() == (~members & known).sum(0).tolist()
    counted = found.memorization[~np.isnan(found.memorization)]
    assert found.share == pytest.approx(np.mean(counted >= 0.25 - 1e-9))


PLACES = np.array([0.0, 0.11, 0.25, 0.6, 0.93, 1.4])
CLASSES = np.array([0, 0, 1, 1, 0, 1])
"""Six points on a line, all distances different."""


def nearest_neighbour(members: Marks) -> Marks:
    """Whether a 1-nearest-neighbour learner of each subset predicts the label of each point."""
    distances = np.abs(PLACES[:, None] - PLACES)
    return np.array(
        [[CLASSES[np.where(m, distances[i], np.inf).argmin()] == CLASSES[i] for i in range(6)] for m in members]
    )


def exact_memorization(size: int) -> Numbers:
    """In a subset without i the r-th nearest of the others is the nearest with probability C(5 - r, size - 1) / C(5, size)."""
    found = []
    for i in range(6):
        others = sorted((j for j in range(6) if j != i), key=lambda j: abs(PLACES[j] - PLACES[i]))
        chances = [math.comb(5 - r, size - 1) / math.comb(5, size) for r in range(1, 6)]
        found.append(1 - sum(p for p, j in zip(chances, others, strict=True) if CLASSES[j] == CLASSES[i]))
    return np.array(found)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_subsets_of_a_nearest_neighbour_learner_give_its_exact_memorization(size: int) -> None:
    members = np.array([np.isin(np.arange(6), chosen) for chosen in combinations(range(6), size)])
    found = subset_memorization(members, nearest_neighbour(members), draws=FEW)
    np.testing.assert_allclose(found.memorization, exact_memorization(size), atol=1e-12)
    assert (found.accuracy_with == 1).all()


def test_random_subsets_come_as_close_to_it_as_their_errors_say() -> None:
    members = random_members(np.random.default_rng(0), 4000, 6, 4 / 6)
    found = subset_memorization(members, nearest_neighbour(members), draws=FEW)
    exact = exact_memorization(4)
    assert (np.abs(found.memorization - exact) <= 4 * found.error + 1e-12).all()
    # Were accuracy on trained examples taken for memorization, nearly every example would be off.
    assert (np.abs(found.accuracy_with - exact) > 4 * found.error).sum() >= 4


def test_errors_are_the_spread_over_repetitions() -> None:
    rng = np.random.default_rng(1)
    members = random_members(rng, 40, 30)
    with_, without = rng.uniform(0.3, 1, 30), rng.uniform(0, 0.7, 30)
    repeats = [subset_memorization(members, drawn(rng, members, with_, without), draws=2) for _ in range(400)]
    values = np.array([found.memorization for found in repeats])
    errors = np.sqrt(np.mean([found.error**2 for found in repeats], axis=0))
    # The variance of 400 repetitions is known to 1 / sqrt(200) of itself, its root to half of that.
    assert np.abs(values.std(axis=0, ddof=1) / errors - 1).max() < 4 * 0.5 / math.sqrt(200)
    assert np.abs(values.mean(axis=0) - (with_ - without)).max() < 4 * errors.max() / math.sqrt(400)


def coverage(with_: float, without: float, models: int, *, normal: bool = False) -> float:
    """Share of 20 000 studies of one example whose interval holds the truth."""
    rng = np.random.default_rng(round(1e6 * with_ + 1e3 * without))
    many = 20_000
    members = np.repeat((np.arange(models) < round(0.7 * models))[:, None], many, axis=1)
    found = subset_memorization(members, drawn(rng, members, np.full(many, with_), np.full(many, without)), draws=2)
    low, high = found.low, found.high
    if normal:
        low, high = found.memorization - 1.96 * found.error, found.memorization + 1.96 * found.error
    return float(np.mean((low <= with_ - without) & (with_ - without <= high)))


@pytest.mark.parametrize(
    ("with_", "without"), [(1.0, 0.0), (1.0, 0.97), (0.99, 0.9), (0.95, 0.5), (0.9, 0.65), (0.5, 0.5)]
)
def test_intervals_cover_for_any_probabilities(with_: float, without: float) -> None:
    assert coverage(with_, without, 60) >= 0.93


def test_intervals_by_the_standard_error_would_not() -> None:
    assert coverage(1.0, 0.97, 60, normal=True) < 0.6


def test_agreeing_models_have_no_spread_but_an_interval() -> None:
    members = np.arange(20)[:, None] < 14
    found = subset_memorization(members, members, draws=FEW)
    assert (found.memorization.item(), found.error.item()) == (1, 0)
    assert 0.5 < found.low.item() < 0.8
    assert found.high.item() == 1
    assert (found.above, found.below) == (1, 0)


def population(rng: np.random.Generator, examples: int) -> tuple[Numbers, Numbers]:
    """Most examples are hardly memorised, some wholly: the shape that is found in data."""
    memorization = np.where(rng.random(examples) < 0.8, rng.beta(0.6, 6, examples), rng.beta(5, 2, examples))
    with_ = 1 - 0.02 * rng.random(examples)
    return with_, np.clip(with_ - memorization, 0, 1)


def share_studies(studies: int, models: int) -> tuple[list[SubsetMemorization], list[float]]:
    found, truths = [], []
    for study in range(studies):
        rng = np.random.default_rng([7, study])
        with_, without = population(rng, 300)
        members = random_members(rng, models, 300)
        found.append(subset_memorization(members, drawn(rng, members, with_, without), draws=300, seed=study))
        truths.append(float(np.mean(with_ - without >= 0.25)))
    return found, truths


def test_the_interval_of_the_share_covers_though_the_share_itself_is_biased() -> None:
    studies = 120
    found, truths = share_studies(studies, 100)
    truth = np.array(truths)
    covered = np.mean([each.share_low <= t <= each.share_high for each, t in zip(found, truths, strict=True)])
    missed = np.array([each.share for each in found]) - truth
    corrected = np.array([each.share_corrected for each in found]) - truth
    spread = corrected.std(ddof=1)
    assert covered >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / studies)
    assert missed.mean() > 4 * missed.std(ddof=1) / math.sqrt(studies)
    assert abs(corrected.mean()) < 0.5 * missed.mean()
    # The standard error is that of the corrected share; its root of a variance of 120 studies is known to 1 / sqrt(240) of itself.
    assert np.mean([each.share_error for each in found]) == pytest.approx(spread, rel=4 / math.sqrt(2 * studies))


def test_an_interval_of_the_uncorrected_share_would_miss() -> None:
    found, truths = share_studies(120, 100)
    # The spread of the share itself over studies, which is the best that its own bootstrap can know.
    spread = np.std([each.share - t for each, t in zip(found, truths, strict=True)])
    naive = np.mean([abs(each.share - t) <= 1.96 * spread for each, t in zip(found, truths, strict=True)])
    assert naive < 0.9


def test_sure_examples_are_rarely_wrong_and_do_not_exceed_the_truth() -> None:
    rng = np.random.default_rng(8)
    with_, without = population(rng, 3000)
    members = random_members(rng, 60, 3000)
    found = subset_memorization(members, drawn(rng, members, with_, without), draws=FEW)
    truth = with_ - without >= 0.25
    sure = found.low >= 0.25
    assert found.above == sure.sum() > 200
    assert found.below == (found.high < 0.25).sum()
    assert (sure & ~truth).sum() <= 0.01 * sure.sum()
    assert found.above < truth.sum() < np.sum(found.memorization >= 0.25)


@pytest.mark.parametrize("models", [40, 80, 160])
def test_reliability_is_the_squared_correlation_with_the_truth(models: int) -> None:
    rng = np.random.default_rng(9)
    with_, without = population(rng, 3000)
    members = random_members(rng, models, 3000)
    found = subset_memorization(members, drawn(rng, members, with_, without), draws=2)
    assert found.reliability == pytest.approx(np.corrcoef(found.memorization, with_ - without)[0, 1] ** 2, abs=0.02)
    # Uncorrected, the halves tell the reliability of half as many models.
    assert found.half_correlation < found.reliability - 0.01


def test_pure_noise_has_no_reliability_and_a_constant_none_that_is_known() -> None:
    rng = np.random.default_rng(10)
    members = random_members(rng, 40, 2000)
    noise = subset_memorization(members, rng.random(members.shape) < 0.5, draws=2)
    assert noise.reliability < 4 * 2 / math.sqrt(2000)
    assert math.isnan(subset_memorization(members, np.ones_like(members), draws=2).reliability)
    assert spearman_brown(0.5) == pytest.approx(2 / 3)


def test_a_result_is_reproducible_json_and_readable() -> None:
    rng = np.random.default_rng(15)
    members = random_members(rng, 30, 20)
    members[:, 0] = True
    correct = rng.random((30, 20)) < 0.7
    one, two = (subset_memorization(members, correct, draws=FEW, seed=3).to_dict() for _ in range(2))
    assert one == two
    assert one["memorization"][0] is None
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    text = repr(subset_memorization(members, correct, draws=FEW))
    assert "19 examples, 30 models" in text
    assert "reliability" in text


def test_what_cannot_be_is_refused() -> None:
    members, correct = np.ones((4, 3), bool), np.ones((4, 3))
    with pytest.raises(UsageError, match=r"shape \(model, example\).*\(4, 3\) and \(4, 2\)"):
        subset_memorization(members, correct[:, :2])
    with pytest.raises(UsageError, match="values from 2 to 2"):
        subset_memorization(members, 2 * correct)
    with pytest.raises(UsageError, match="true and false"):
        subset_memorization(0.5 * correct, correct)
    with pytest.raises(UsageError, match="train more models"):
        subset_memorization(members, correct)
    with pytest.raises(UsageError, match="cut"):
        subset_memorization(members, correct, cut=0)
