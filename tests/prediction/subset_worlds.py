"""Worlds of subset-trained models whose truth is known, and the estimates by loops."""

import math

import numpy as np

from plasticity_probe.prediction.member_differences import FEWEST_MODELS, Marks
from plasticity_probe.prediction.panel import Numbers

NAN = float("nan")


def random_members(rng: np.random.Generator, models: int, examples: int, share: float = 0.7) -> Marks:
    size = round(share * examples)
    return np.argsort(rng.random((models, examples)), axis=1).argsort(axis=1) < size


def drawn(rng: np.random.Generator, members: Marks, with_: Numbers, without: Numbers) -> Marks:
    """A world in which each model is right about example i with the probability with_[i] or without[i], independently."""
    return rng.random(members.shape) < np.where(members, with_, without)


def by_loops(members: Marks, correct: Numbers) -> list[tuple[float, float]]:
    found = []
    for i in range(members.shape[1]):
        sides = [
            [
                correct[m, i]
                for m in range(len(members))
                if bool(members[m, i]) == side and correct[m, i] == correct[m, i]
            ]
            for side in (True, False)
        ]
        if min(map(len, sides)) < FEWEST_MODELS:
            found.append((NAN, NAN))
            continue
        means = [sum(side) / len(side) for side in sides]
        variances = [sum((v - m) ** 2 for v in s) / (len(s) - 1) for s, m in zip(sides, means, strict=True)]
        error = math.sqrt(sum(v / len(s) for v, s in zip(variances, sides, strict=True)))
        found.append((means[0] - means[1], error))
    return found
