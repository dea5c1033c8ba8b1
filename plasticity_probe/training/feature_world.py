"""A world in which warm starting hurts, and why, can be counted: learning as a discrete choice of features (Shin et al. 2024, theory section).

No network is trained here. A datum is the set of features it contains, besides noise of its own; a learner picks up features one at a time,
always the one that most data with a gradient contain, as long as at least `learning_threshold` of them do. A datum with `tau` learned features
is explained and has no gradient any more. The data that no feature explains in the end are memorised through their noise.

Data arrive in experiments, and three learners differ in what they keep from one experiment to the next:

    start    learned features    memorised data
    cold     begins anew         begins anew
    warm     keeps               keeps: they never have a gradient again, so they can no longer show their features
    ideal    keeps               forgets

Where the paper leaves something open, the authors' notebook decides (Discrete_Feature_Learning.ipynb of their published code), here called
"the notebook". All its settings are the defaults of `FeatureWorld`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from plasticity_probe.errors import UnknownNameError, UsageError

Start = Literal["cold", "warm", "ideal"]
"""What a learner keeps from one experiment to the next."""

STARTS: tuple[Start, ...] = get_args(Start)
"""The three learners, in the order of every table."""

Bools = NDArray[np.bool_]

QUANTITIES = ("test_accuracy", "learned", "memorised", "active")
"""What is recorded of every experiment; `Course` says what each is."""

RECOMPUTED = "Shin et al. 2024, theory notebook: recomputed by a re-implementation of it, since the notebook only plots these numbers"

# Quantity, experiment (None: the mean over all), then means and, where they are known, standard deviations of cold, warm and ideal.
PUBLISHED: tuple[tuple[str, int | None, tuple[float, ...], tuple[float, ...] | None], ...] = (
    ("test_accuracy", 1, (0.666, 0.666, 0.666), None),
    ("test_accuracy", 10, (0.920, 0.734, 0.920), None),
    ("test_accuracy", 50, (0.943, 0.752, 0.943), (0.007, 0.015, 0.007)),
    ("test_accuracy", None, (0.923, 0.741, 0.923), None),
    ("learned", 1, (23.7, 23.7, 23.7), None),
    ("learned", 10, (69.1, 30.1, 69.2), None),
    ("learned", 50, (91.8, 32.0, 91.8), (2.2, 0.8, 2.2)),
    ("memorised", 50, (5790, 25_810, 5790), None),
    ("active", 10, (10_000, 532, 1667), None),
    ("active", 50, (50_000, 492, 5793), None),
)


@dataclass(frozen=True)
class FeatureWorld:
    """Settings of the world; the defaults are those of the notebook of Shin et al. 2024.

    Args:
        classes: Number of classes C. Each class has features of its own.
        features_per_class: Features K of a class, so there are C K in all.
        largest_probability: A feature is in a datum of its class with a probability that is drawn from U(0, largest_probability).
        examples: Data that arrive at each experiment, the same number of each class.
        experiments: Number of experiments.
        learning_threshold: gamma: a feature is learned only if at least so many data with a gradient contain it. A count, not a share.
        tau: Learned features that explain a datum.
        test_examples: Held-out data, the same number of each class.

    Raises:
        UsageError: Settings that cannot be.
    """

    classes: int = 2
    features_per_class: int = 50
    largest_probability: float = 0.2
    examples: int = 1000
    experiments: int = 50
    learning_threshold: int = 50
    tau: int = 3
    test_examples: int = 10_000

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, least = getattr(self, setting.name), 2 if setting.name == "classes" else 1
            if setting.name != "largest_probability" and value < least:
                raise UsageError(f"{setting.name} of a feature world must be at least {least}, got {value}")
        if not 0 < self.largest_probability <= 1:
            raise UsageError(f"largest_probability must be above 0 and at most 1, got {self.largest_probability}")
        for name in ("examples", "test_examples"):
            if (count := getattr(self, name)) % self.classes:
                near = count + self.classes - count % self.classes
                raise UsageError(
                    f"{name} must be the same number for each of {self.classes} classes, got {count}; {near} would do"
                )


@dataclass(frozen=True, eq=False)
class Draws:
    """What is random in a world, the same for the three learners of a seed.

    Args:
        probabilities: (C, K) how often a datum of the class contains each feature, largest first.
        presence: (C, J n, K) which datum contains which feature, where n data of the class arrive at each of J experiments, oldest first.
        test_presence: (C, n_test, K) the same of held-out data.
    """

    probabilities: NDArray[np.float64]
    presence: Bools
    test_presence: Bools


@dataclass(frozen=True, eq=False)
class Learning:
    """What one class's data taught.

    Args:
        learned: (K,) the features known afterwards.
        active: (N,) the data that had a gradient at the start.
        unexplained: (N,) the data among them that have one still; these are memorised next.
    """

    learned: Bools
    active: Bools
    unexplained: Bools


@dataclass(frozen=True, eq=False)
class Course:
    """What became of one learner, experiment by experiment.

    Args:
        world: The settings.
        start: What the learner kept from one experiment to the next.
        seed: Seed of the draws.
        features: (J, C, K) the features known after each experiment.
        active: (J,) data with a gradient at the start of each experiment, which stands for the time that training takes (Shin et al. 2024).
        memorised: (J,) data that are memorised through their noise after each experiment.
        test_accuracy: (J,) expected accuracy on the held-out data after each experiment.
    """

    world: FeatureWorld
    start: Start
    seed: int
    features: Bools
    active: NDArray[np.int64]
    memorised: NDArray[np.int64]
    test_accuracy: NDArray[np.float64]

    @property
    def learned(self) -> NDArray[np.int64]:
        """(J,) number of features known after each experiment, of C K."""
        return self.features.sum((1, 2))


@dataclass(frozen=True)
class Entry:
    """One number of a comparison of the three learners.

    Args:
        start: The learner.
        quantity: One of `QUANTITIES`, as `Course` defines them.
        experiment: Which experiment, counted from 1; None for the mean over all of them.
        mean: Mean over seeds.
        sd: Standard deviation over seeds, simulated ones with n - 1 in the denominator; None where it is not known.
        seeds: Number of seeds n.
        source: Where the number comes from.
    """

    start: Start
    quantity: str
    experiment: int | None
    mean: float
    sd: float | None
    seeds: int
    source: str


def draw(world: FeatureWorld, seed: int) -> Draws:
    """Everything random in a world. A world of more experiments begins with the data of one of fewer.

    Each class draws its own probabilities, and features fall into data independently (Shin et al. 2024, and the notebook). The streams are
    ours: PCG64 on SeedSequence(seed) with spawn key (0,) for the probabilities, (1, j) for the data of experiment j from 0 on, (2,) for the
    held-out data.

    Args:
        world: The settings.
        seed: From 0 on.

    Raises:
        UsageError: A negative seed.
    """
    if seed < 0:
        raise UsageError(f"a seed must be 0 or more, got {seed}")

    def uniform(size: tuple[int, ...], *purpose: int) -> NDArray[np.float64]:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=purpose))).random(size)

    c, k = world.classes, world.features_per_class
    probabilities = np.sort(world.largest_probability * uniform((c, k), 0))[:, ::-1]
    chances = probabilities[:, None]
    arrivals = [uniform((c, world.examples // c, k), 1, j) < chances for j in range(world.experiments)]
    test = uniform((c, world.test_examples // c, k), 2) < chances
    return Draws(probabilities, np.concatenate(arrivals, axis=1), test)


def learn_features(presence: Bools, learned: Bools, memorised: Bools, threshold: int, tau: int) -> Learning:
    """What a learner makes of the data of one class (Shin et al. 2024, theory section).

    A datum has a gradient if it is not memorised and holds fewer than tau learned features. Until no new feature is in `threshold` such
    data: the one that is in most of them is learned, and all are counted again. Of equally frequent ones that of lowest index comes first, as
    in the notebook. The notebook takes turns among all classes; since no class holds features of another, each ends where it would alone.

    Args:
        presence: (N, K) which datum contains which feature.
        learned: (K,) features known before.
        memorised: (N,) data memorised before.
        threshold: gamma, at least 1.
        tau: Learned features that explain a datum, at least 1.
    """
    learned = learned.copy()
    known = presence[:, learned].sum(1)
    start = (known < tau) & ~memorised
    active = start.copy()
    counts = presence[active].sum(0)
    while True:
        open_counts = np.where(learned, -1, counts)
        new = int(open_counts.argmax())
        if open_counts[new] < threshold:
            return Learning(learned, start, active)
        learned[new] = True
        known += presence[:, new]
        explained = active & (known >= tau)
        counts -= presence[explained].sum(0)
        active &= ~explained


def expected_accuracy(presence: Bools, features: Bools, tau: int) -> float:
    """Share of data that are classified rightly: those with tau learned features, and of the others 1/C, which a guess gets right.

    The notebook draws each guess; this is the expectation of that draw, and so varies less at the same mean (our choice).

    Args:
        presence: (C, N, K) which datum contains which feature.
        features: (C, K) the learned ones.
        tau: Learned features that explain a datum.
    """
    known = presence.astype(np.float32) @ features.astype(np.float32)[:, :, None]
    share = float((known >= tau).mean())
    return share + (1 - share) / len(features)


def simulate(world: FeatureWorld, start: Start, seed: int) -> Course:
    """Takes one learner through all experiments. Learners of the same seed meet the same data.

    Args:
        world: The settings.
        start: "cold", "warm" or "ideal".
        seed: From 0 on.

    Raises:
        UnknownNameError: No such start.
        UsageError: A negative seed.
    """
    if start not in STARTS:
        raise UnknownNameError("start", start, STARTS)
    draws = draw(world, seed)
    learned = np.zeros(draws.probabilities.shape, dtype=bool)
    memorised = np.zeros(draws.presence.shape[:2], dtype=bool)
    features, active, counted, accuracy = [], [], [], []
    for experiment in range(1, world.experiments + 1):
        if start == "cold":
            learned[:] = False
        if start != "warm":
            memorised[:] = False
        here = slice(experiment * world.examples // world.classes)
        active.append(0)
        for data, known, kept in zip(draws.presence[:, here], learned, memorised[:, here], strict=True):
            taught = learn_features(data, known, kept, world.learning_threshold, world.tau)
            known[:] = taught.learned
            kept |= taught.unexplained
            active[-1] += int(taught.active.sum())
        features.append(learned.copy())
        counted.append(int(memorised.sum()))
        accuracy.append(expected_accuracy(draws.test_presence, learned, world.tau))
    return Course(world, start, seed, np.array(features), np.array(active), np.array(counted), np.array(accuracy))


def compare(world: FeatureWorld, seeds: Iterable[int], experiments: Sequence[int] | None = None) -> tuple[Entry, ...]:
    """The three learners side by side, each on every seed.

    Args:
        world: The settings.
        seeds: At least one.
        experiments: As in `summary`.

    Raises:
        UsageError: No seed, or no such experiment.
    """
    return summary([simulate(world, start, seed) for seed in seeds for start in STARTS], experiments)


def summary(courses: Sequence[Course], experiments: Sequence[int] | None = None) -> tuple[Entry, ...]:
    """Mean and standard deviation over seeds of every quantity at chosen experiments, and of the test accuracy averaged over all of them.

    Args:
        courses: Of one world.
        experiments: Which, counted from 1; by default 1, 10 and the last, where the published numbers stand.

    Raises:
        UsageError: No courses, courses of several worlds, a course that came twice, or no such experiment.
    """
    if (worlds := len({course.world for course in courses})) != 1:
        raise UsageError(
            f"a comparison needs courses of one and the same world, got {len(courses)} courses of {worlds} worlds"
        )
    if len({(course.start, course.seed) for course in courses}) < len(courses):
        raise UsageError("each seed counts once in a comparison, but the same start and seed came twice")
    last = courses[0].world.experiments
    chosen = sorted({at for at in (1, 10, last) if at <= last}) if experiments is None else list(experiments)
    if wrong := [at for at in chosen if not 1 <= at <= last]:
        raise UsageError(f"this world has experiments 1 to {last}, got {wrong}")
    entries = []
    for start in STARTS:
        found = [course for course in courses if course.start == start]
        table: dict[tuple[str, int | None], list[float]] = {
            (name, at): [float(getattr(c, name)[at - 1]) for c in found] for name in QUANTITIES for at in chosen
        }
        table["test_accuracy", None] = [float(course.test_accuracy.mean()) for course in found]
        entries += [
            Entry(start, name, at, fmean(values), stdev(values) if len(values) > 1 else None, len(values), "simulated")
            for (name, at), values in table.items()
            if values
        ]
    return tuple(entries)


def published() -> tuple[Entry, ...]:
    """What the default world gave in a separate re-implementation of the notebook of Shin et al. 2024, with 10 seeds of the notebook's draws.

    The notebook only plots these curves. Learned features and active data of that re-implementation equalled those of the notebook's own code,
    run on two of the seeds for eight experiments. Its standard deviations have n in the denominator, and each guess was drawn.
    Given the notebook's draws, the functions of this module give the same counts to the digit; its own draws give other worlds of the kind.
    """
    return tuple(
        Entry(start, quantity, at, mean, sd, 10, RECOMPUTED)
        for quantity, at, means, sds in PUBLISHED
        for start, mean, sd in zip(STARTS, means, sds or (None,) * len(STARTS), strict=True)
    )


def rows(courses: Iterable[Course]) -> list[dict[str, Any]]:
    """Courses as plain dictionaries for JSON or a table, one per experiment; experiments count from 1.

    Args:
        courses: Any courses.
    """
    return [
        {
            "start": course.start,
            "seed": course.seed,
            "experiment": at + 1,
            "test_accuracy": float(course.test_accuracy[at]),
            "learned": int(course.learned[at]),
            "memorised": int(course.memorised[at]),
            "active": int(course.active[at]),
        }
        for course in courses
        for at in range(course.world.experiments)
    ]
