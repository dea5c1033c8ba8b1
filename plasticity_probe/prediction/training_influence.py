"""Which training examples decide what is predicted elsewhere: influence from many models, each trained on a random subset."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.member_differences import Counts, Differences, checked, differences
from plasticity_probe.prediction.panel import Numbers
from plasticity_probe.prediction.plain import plain
from plasticity_probe.prediction.subset_memorization import HELD, MEMORISED, SLACK

INFLUENTIAL = 0.15
"""From so much on an example counts as deciding a prediction elsewhere (Feldman and Zhang 2020; known to us from secondary sources)."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Training examples that decide predictions of test examples, largest influence first, shape (pair,) each.

    Args:
        trained: Index of the training example.
        tested: Index of the test example.
        influence: Share of models that predict the test example's label among those trained on the training example, less that of the others.
        error: Its standard error over models.
        low: Lower end of its 95 % interval. Of very many pairs some reach a cut by chance; with few models only `low` tells.
        high: Upper end.
    """

    trained: Counts
    tested: Counts
    influence: Numbers
    error: Numbers
    low: Numbers
    high: Numbers

    def __len__(self) -> int:
        return len(self.influence)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {name: plain(values) for name, values in asdict(self).items()}

    def __repr__(self) -> str:
        lines = [
            f"  {trained} -> {tested}: {value:.2f} [{low:.2f}, {high:.2f}]"
            for trained, tested, value, low, high in zip(
                self.trained[:5], self.tested[:5], self.influence[:5], self.low[:5], self.high[:5], strict=True
            )
        ]
        return "\n".join([f"Pairs: {len(self)} of a training and a test example", *lines])


def influence(members: ArrayLike, correct: ArrayLike) -> Numbers:
    """How much each training example raises the chance that a test example is predicted rightly (Feldman and Zhang 2020).

    infl(i, j) = P[h(x'_j) = y'_j | i trained on] - P[h(x'_j) = y'_j | i not trained on]. For a test example that is a training example as
    well, infl(i, i) = mem(i).

    Args:
        members: Which model was trained on which training example, shape (model, example), bool.
        correct: Whether each model predicts each test example's label, or with what probability, shape (model, test example); NaN where unknown.

    Returns:
        Shape (example, test example); NaN where fewer than two models are on a side.

    Raises:
        UsageError: Different numbers of models, or values outside [0, 1].
    """
    return np.concatenate([found.value for _, found in influence_blocks(members, correct)])


def influence_blocks(
    members: ArrayLike, correct: ArrayLike, *, held: int = HELD
) -> Iterator[tuple[slice, Differences]]:
    """The influence of training examples with its errors, some training examples at a time, for matrices too large to hold.

    Args:
        members: Which model was trained on which training example, shape (model, example), bool.
        correct: Whether each model predicts each test example's label, or with what probability, shape (model, test example); NaN where unknown.
        held: Numbers that each array of a block holds at most.

    Yields:
        Which training examples, and their differences, shape (these examples, test example).

    Raises:
        UsageError: Different numbers of models, or values outside [0, 1].
    """
    inside, right = checked(members, correct, aligned=False)
    known = ~np.isnan(right)
    value = np.where(known, right, 0.0)
    powers = (known.astype(float), value, value**2)
    totals = [power.sum(axis=0) for power in powers]
    size = max(1, held // max(1, right.shape[1]))
    for start in range(0, inside.shape[1], size):
        rows = slice(start, min(start + size, inside.shape[1]))
        chosen = inside[:, rows].T.astype(float)
        with_ = [chosen @ power for power in powers]
        without = [total - part for total, part in zip(totals, with_, strict=True)]
        yield rows, differences(*with_, *without)


def influential_pairs(
    members: ArrayLike,
    correct: ArrayLike,
    memorization: ArrayLike,
    *,
    cut: float = INFLUENTIAL,
    memorised: float = MEMORISED,
) -> Pairs:
    """Pairs of a memorised training example and a test example that it decides (Feldman and Zhang 2020: the high-influence pairs).

    Args:
        members: Which model was trained on which training example, shape (model, example), bool.
        correct: Whether each model predicts each test example's label, or with what probability, shape (model, test example); NaN where unknown.
        memorization: Of each training example, shape (example,).
        cut: The least influence.
        memorised: The least memorization of the training example.

    Raises:
        UsageError: Shapes that differ, or values outside [0, 1].
    """
    inside, _ = checked(members, correct, aligned=False)
    scores = np.asarray(memorization, dtype=float)
    if scores.shape != inside.shape[1:]:
        raise UsageError(f"expected the memorization of {inside.shape[1]} examples, got shape {scores.shape}")
    kept = np.flatnonzero(scores >= memorised - SLACK)
    parts: list[tuple[NDArray[Any], ...]] = []
    for rows, found in influence_blocks(inside[:, kept], correct):
        at, tested = np.nonzero(found.value >= cut - SLACK)
        parts.append(
            (kept[rows][at], tested, *(part[at, tested] for part in (found.value, found.error, found.low, found.high)))
        )
    empty = (np.zeros(0, np.int64),) * 2 + (np.zeros(0),) * 4
    columns = [np.concatenate(column) for column in zip(empty, *parts, strict=True)]
    order = np.argsort(-columns[2], kind="stable")
    return Pairs(*(column[order] for column in columns))
