"""What many seeds of a setting say together: means with intervals, and plain sentences. Needs no torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from plasticity_probe.training.outcomes import OK, Outcome

CONFIDENCE = 0.95
"""As in the figures of Lewandowski et al. 2023: 95 % intervals of the mean over runs."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its interval.

    Args:
        value: The mean.
        half_width: Half of the 95 % interval, from Student's t; NaN with fewer than two seeds.
        count: Number of seeds.
    """

    value: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.half_width

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{self.value:.3f}" if math.isnan(self.half_width) else f"{self.value:.3f} ± {self.half_width:.3f}"


@dataclass(frozen=True)
class TaskSummary:
    """How a task went over all seeds.

    Args:
        task: The task's index.
        score: What was reached on its examples: accuracy, or for values the loss.
        control: The same of newly initialised networks.
        gap: Seed by seed, control less run (for losses run less control): positive where plasticity was lost.
        online: Online accuracy (for values, online loss).
        test: Test accuracy (for values, test loss).
        test_control: The same of newly initialised networks.
        test_gap: Seed by seed, as `gap`: the generalisation gap.
    """

    task: int
    score: Mean
    control: Mean
    gap: Mean
    online: Mean
    test: Mean
    test_control: Mean
    test_gap: Mean


def mean_of(values: Iterable[float]) -> Mean:
    """The mean of the finite ones of some values, with its 95 % interval x̄ ± t s/√n.

    Args:
        values: One value a seed.
    """
    finite = np.array([value for value in values if math.isfinite(value)], dtype=float)
    if finite.size == 0:
        return Mean(math.nan, math.nan, 0)
    if finite.size == 1:
        return Mean(float(finite[0]), math.nan, 1)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, finite.size - 1))
    return Mean(float(finite.mean()), quantile * float(finite.std(ddof=1)) / math.sqrt(finite.size), finite.size)


def summarise(outcomes: Sequence[Outcome]) -> tuple[TaskSummary, ...]:
    """Every task over all seeds, in order. Seeds that diverged do not count from then on.

    Args:
        outcomes: Outcomes of a run folder.
    """
    by_loss = scored_by_loss(outcomes)
    found: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.task, []).append(outcome)
    return tuple(_task(task, found[task], by_loss) for task in sorted(found))


def sentences(outcomes: Sequence[Outcome]) -> list[str]:
    """What the outcomes say, in words: trainability and generalisation apart, with intervals.

    Args:
        outcomes: Outcomes of a run folder.
    """
    tasks = summarise(outcomes)
    if not tasks:
        return ["No task was finished."]
    said = [_trend(outcomes)]
    controlled = [task for task in tasks if task.gap.count]
    if controlled:
        last = controlled[-1]
        said.append(_compared(last.gap, f"On task {last.task}", "the examples of the task", "trainability"))
        if last.test_gap.count:
            said.append(_compared(last.test_gap, f"On task {last.task}", "test examples", "generalisation"))
    seeds = {o.seed for o in outcomes}
    if lost := sorted({o.seed for o in outcomes if o.status != OK and o.network == "run"}):
        said.append(
            f"Diverged, with weights or losses that are no longer finite: {len(lost)} of {len(seeds)} seeds "
            f"({', '.join(map(str, lost))}). Lower the learning rate, or clip the gradient (--set training.clip=1)."
        )
    controls = [o for o in outcomes if o.network == "control"]
    if astray := [o for o in controls if o.status != OK]:
        said.append(
            f"Newly initialised networks diverged in {len(astray)} of {len(controls)} trainings; those do not count in the comparison."
        )
    return said


def as_rows(tasks: Iterable[TaskSummary]) -> list[dict[str, Any]]:
    """Summaries as plain numbers; what is unknown is None.

    Args:
        tasks: The summaries.
    """
    return [
        {"task": task.task}
        | {
            name: {key: None if math.isnan(v) else v for key, v in vars(getattr(task, name)).items()}
            for name in ("score", "control", "gap", "online", "test", "test_control", "test_gap")
        }
        for task in tasks
    ]


def scored_by_loss(outcomes: Iterable[Outcome]) -> bool:
    """Whether tasks are learned to values, so that the loss is what counts. Where all diverged nothing tells, and the answer is no.

    Args:
        outcomes: Outcomes of a run folder.
    """
    sound = [outcome.accuracy for outcome in outcomes if outcome.status == OK]
    return bool(sound) and all(map(math.isnan, sound))


def _task(task: int, outcomes: Sequence[Outcome], by_loss: bool) -> TaskSummary:
    score, test = ("loss", "test_loss") if by_loss else ("accuracy", "test_accuracy")
    run = {o.seed: o for o in outcomes if o.network == "run"}
    control = {o.seed: o for o in outcomes if o.network == "control"}
    sign = -1 if by_loss else 1

    def gap(name: str) -> Mean:
        return mean_of(sign * (getattr(control[s], name) - getattr(run[s], name)) for s in run if s in control)

    def over(found: dict[int, Outcome], name: str) -> Mean:
        return mean_of(getattr(outcome, name) for outcome in found.values())

    return TaskSummary(
        task,
        over(run, score),
        over(control, score),
        gap(score),
        over(run, "online_loss" if by_loss else "online_accuracy"),
        over(run, test),
        over(control, test),
        gap(test),
    )


def _trend(outcomes: Sequence[Outcome]) -> str:
    name = "loss" if scored_by_loss(outcomes) else "accuracy"
    found: dict[int, dict[int, float]] = {}
    for o in outcomes:
        if o.network == "run" and math.isfinite(value := getattr(o, name)):
            found.setdefault(o.task, {})[o.seed] = value
    if not found:
        return "No network finished a task with finite weights."
    first, last = min(found), max(found)
    # Seeds that diverged on the way would move the mean without any network having changed.
    seeds = [seed for seed in found[last] if seed in found[first]]
    before, after = (mean_of(found[task][seed] for seed in seeds) for task in (first, last))
    change = mean_of(found[last][seed] - found[first][seed] for seed in seeds)
    of = (
        f"means over {len(seeds)} seeds with 95 % intervals"
        if len(seeds) > 1
        else "one seed alone: more are needed to say how certain this is"
    )
    if first == last:
        return f"The {name} reached at the end of task {first}, the only one, is {before} ({of})."
    moved = ("rose" if change.value > 0 else "fell") if _certain(change) else "went"
    told = "" if _certain(change) or len(seeds) == 1 else " The two are not told apart."
    return f"The {name} reached at the end of a task {moved} from {before} on task {first} to {after} on task {last} ({of}).{told}"


def _compared(gap: Mean, where: str, what: str, kind: str) -> str:
    size = Mean(abs(gap.value), gap.half_width, gap.count)
    if math.isnan(gap.half_width):
        better = "better" if gap.value > 0 else "worse"
        return f"{where} a newly initialised network does {better} on {what} by {size}, of one seed alone: more seeds are needed."
    if not _certain(gap):
        return f"{where} the network and newly initialised ones are not told apart on {what} (gap {gap}): no loss of {kind} shows."
    if gap.value > 0:
        return f"{where} newly initialised networks do better on {what} by {size}: a loss of {kind}."
    return f"{where} newly initialised networks do worse on {what} by {size}: what was learned before helps."


def _certain(mean: Mean) -> bool:
    return not math.isnan(mean.half_width) and (mean.low > 0 or mean.high < 0)
