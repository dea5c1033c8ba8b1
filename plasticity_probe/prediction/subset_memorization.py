"""Which examples are memorised: from many models, each trained on a random subset.

An example is memorised as far as a model predicts its label because the example was trained on. Feldman and Zhang 2020 tell that from many
models at once: of each example some were trained on it and some were not, and the difference of their shares of right predictions is an
estimate. The models are what is random, so every error here is one over models.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr
from scipy.stats import norm

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.member_differences import (
    FEWEST_MODELS,
    Counts,
    Marks,
    checked,
    differences,
    moments,
    weighted_differences,
)
from plasticity_probe.prediction.panel import Numbers
from plasticity_probe.prediction.plain import plain
from plasticity_probe.prediction.proportions import LEVEL
from plasticity_probe.prediction.resampling import DRAWS

MEMORISED = 0.25
"""From so much on an example counts as memorised (Feldman and Zhang 2020; the number is known to us from secondary sources)."""
HALVES = 50
"""Random splits of the models into halves for the reliability (our choice: one split alone varies by as much as it is to tell)."""
HELD = 2**22
"""Numbers of an array of a block of work (our choice: 32 MB)."""
SLACK = 1e-9
"""A difference of two shares may miss a cut by rounding."""


@dataclass(frozen=True, eq=False)
class SubsetMemorization:
    """How much of each example is memorised, and how sure that is.

    Args:
        memorization: For each example the share of models that predict its label among those trained on it, less the share among the others,
            shape (example,); NaN where fewer than two models are on a side.
        error: Its standard error over models.
        low: Lower end of its 95 % interval.
        high: Upper end.
        accuracy_with: Share of right predictions of the models trained on the example.
        accuracy_without: Share of the others.
        models_with: Number of models trained on the example, of those whose prediction is known.
        models_without: Number of the others.
        models: Number of models.
        cut: From so much on an example counts as memorised.
        share: Share of the examples whose estimate reaches the cut. Where most examples lie below the cut, errors carry more of them over it
            than back, so this is too large with few models.
        share_corrected: The share less what errors add to it: twice `share` less its mean over bootstrap draws of the models, in which the
            errors are there twice (Efron and Tibshirani 1993, section 10.6), within [0, 1]. In our simulations a quarter of the
            bias is left with 100 models, and half of it with 40.
        share_error: Standard error of `share_corrected`: its standard deviation over bootstrap draws, the draws within each of them replaced by
            normal laws (our choice).
        share_low: `share_corrected` less 1.96 of its standard errors, within [0, 1]. In our simulations the interval holds the true share in
            94 % of studies of 200 models, 92 % of studies of 100 and 89 % of studies of 40, where `above` and `below` are the safer bounds.
        share_high: `share_corrected` and as much more. These four are NaN where most draws leave every example without models on a side.
        above: Number of examples whose whole interval lies at the cut or above.
        below: Number of examples whose whole interval lies below the cut.
        half_correlation: Correlation over examples of the estimates from two disjoint halves of the models, mean over random halves.
        reliability: What `half_correlation` r makes expected of the estimates from all models, ``2 r / (1 + r)`` (Spearman 1910; Brown 1910);
            0 where r is negative.
    """

    memorization: Numbers
    error: Numbers
    low: Numbers
    high: Numbers
    accuracy_with: Numbers
    accuracy_without: Numbers
    models_with: Counts
    models_without: Counts
    models: int
    cut: float
    share: float
    share_corrected: float
    share_error: float
    share_low: float
    share_high: float
    above: int
    below: int
    half_correlation: float
    reliability: float

    @property
    def examples(self) -> int:
        """Number of examples that there is an estimate of."""
        return int(np.sum(~np.isnan(self.memorization)))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data; what is not finite is None."""
        return {entry.name: plain(getattr(self, entry.name)) for entry in fields(self)}

    def __repr__(self) -> str:
        median = float(np.nanmedian(self.error))
        return (
            f"SubsetMemorization: {self.examples} examples, {self.models} models\n"
            f"  memorised (at least {self.cut:g}): {self.share:.1%} of the examples; {self.share_corrected:.1%} "
            f"[{self.share_low:.1%}, {self.share_high:.1%}] once their errors are allowed for\n"
            f"  surely memorised (interval at the cut or above): {self.above}; surely not: {self.below}\n"
            f"  median standard error {median:.3f}; reliability {self.reliability:.3f}"
        )


def subset_memorization(
    members: ArrayLike, correct: ArrayLike, *, cut: float = MEMORISED, draws: int = DRAWS, seed: int = 0
) -> SubsetMemorization:
    """Estimates how much of each example is memorised (Feldman and Zhang 2020).

    The quantity is mem(i) = P[h(x_i) = y_i | i trained on] - P[h(x_i) = y_i | i not trained on], over models h that are trained on random
    subsets of one size. The definition of Feldman 2020, mem(i) = P[h_S(x_i) = y_i] - P[h_{S without i}(x_i) = y_i], is about one set S. Here S
    is a random subset, as in the paper's estimator, and models without the example were trained on as many examples as those with it.

    Models must be independent of each other: each with a subset and an initialisation of its own.

    Args:
        members: Which model was trained on which example, shape (model, example), bool.
        correct: Whether each model predicts each example's label, or with what probability, in [0, 1], same shape; NaN where that is unknown.
        cut: From so much on an example counts as memorised.
        draws: Bootstrap draws of the models.
        seed: Seed of the draws and of the halves.

    Raises:
        UsageError: Shapes that differ, values outside [0, 1], a cut outside (0, 1], fewer than two draws, or no example with two models on
            each side.
    """
    inside, right = checked(members, correct, aligned=True)
    if not 0 < cut <= 1 or draws < 2:
        raise UsageError(f"expected a cut in (0, 1] and at least two draws, got cut = {cut} and draws = {draws}")
    known = ~np.isnan(right)
    found = differences(*moments(inside & known, right), *moments(~inside & known, right))
    defined = ~np.isnan(found.value)
    if not defined.any():
        raise UsageError(
            f"an estimate takes {FEWEST_MODELS} models trained on an example and {FEWEST_MODELS} that were not, but of these "
            f"{len(inside)} models no example has so many; train more models, each on a random subset"
        )
    rng = np.random.default_rng(seed)
    inside, right = inside[:, defined], right[:, defined]
    weights = rng.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), size=draws).astype(float)
    reached, smooth = _shares(weights, inside, right, cut)
    share = float(np.mean(found.value[defined] >= cut - SLACK))
    corrected = 2 * share - _mean(reached)
    error = _spread(2 * reached - smooth)
    reach = float(norm.ppf((1 + LEVEL) / 2)) * error
    halves = _half_correlation(inside, right, rng)
    return SubsetMemorization(
        memorization=found.value,
        error=found.error,
        low=found.low,
        high=found.high,
        accuracy_with=found.mean_with,
        accuracy_without=found.mean_without,
        models_with=found.models_with,
        models_without=found.models_without,
        models=len(inside),
        cut=cut,
        share=share,
        share_corrected=_clipped(corrected),
        share_error=error,
        share_low=_clipped(corrected - reach),
        share_high=_clipped(corrected + reach),
        above=int(np.sum(found.low[defined] >= cut - SLACK)),
        below=int(np.sum(found.high[defined] < cut - SLACK)),
        half_correlation=halves,
        reliability=halves if math.isnan(halves) else spearman_brown(max(0.0, halves)),
    )


def spearman_brown(correlation: float) -> float:
    """Reliability of a whole from the correlation r of its halves, ``2 r / (1 + r)`` (Spearman 1910; Brown 1910).

    Args:
        correlation: r, above -1.
    """
    return 2 * correlation / (1 + correlation)


def _shares(weights: Numbers, inside: Marks, right: Numbers, cut: float) -> tuple[Numbers, Numbers]:
    """The share of examples that reach the cut under each draw of the models, and what another draw from that one would expect, (draw,) each.

    The second takes the place of a bootstrap inside the bootstrap: estimate and standard error of each example as those of a normal law.
    """
    reached, smooth, defined = (np.zeros(len(weights)) for _ in range(3))
    for value, error in _weighted(weights, inside, right):
        over = value >= cut - SLACK
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = np.where(error > 0, ndtr((value - cut) / error), over)
        known = ~np.isnan(value)
        reached += over.sum(axis=1)
        smooth += np.where(known, expected, 0.0).sum(axis=1)
        defined += known.sum(axis=1)
    # A draw in which every example lacks models on a side tells nothing.
    defined[defined == 0] = np.nan
    return reached / defined, smooth / defined


def _half_correlation(inside: Marks, right: Numbers, rng: np.random.Generator) -> float:
    """Mean correlation of the estimates from two disjoint halves of the models; NaN where no two halves can be correlated."""
    models = len(inside)
    size = models // 2
    weights = np.zeros((2 * HALVES, models))
    for split in range(HALVES):
        order = rng.permutation(models)
        weights[2 * split, order[:size]] = weights[2 * split + 1, order[size : 2 * size]] = 1
    values = np.concatenate([value for value, _ in _weighted(weights, inside, right)], axis=1)
    return _mean(np.array([_correlation(*values[2 * split : 2 * split + 2]) for split in range(HALVES)]))


def _weighted(weights: Numbers, inside: Marks, right: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """`weighted_differences` of some examples at a time."""
    size = max(1, HELD // max(weights.shape))
    for start in range(0, inside.shape[1], size):
        columns = slice(start, start + size)
        yield weighted_differences(weights, inside[:, columns], right[:, columns])


def _correlation(first: Numbers, second: Numbers) -> float:
    known = ~np.isnan(first) & ~np.isnan(second)
    first, second = first[known], second[known]
    if first.size < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def _mean(values: Numbers) -> float:
    """The mean of what is known; NaN where less than half is, as in `resampling.interval`."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size >= max(1, values.size / 2) else math.nan


def _spread(values: Numbers) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if known.size >= max(2, values.size / 2) else math.nan


def _clipped(value: float) -> float:
    return float(np.clip(value, 0.0, 1.0))
