"""The verdict on each predictor, by the rules of docs/statistics.md; every threshold is a constant that was set before outcomes were seen."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256

import numpy as np
from scipy.stats import false_discovery_control, norm
from scipy.stats import t as student

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.association import (
    FEWEST_RUNS,
    FEWEST_TASKS,
    Association,
    at_equal_history,
    between_configurations,
    estimate_at_equal_history,
    moving_together,
)
from plasticity_probe.prediction.held_out import (
    Transfer,
    gain_on_configurations,
    gain_on_runs,
    ranking_accuracy,
    ranking_accuracy_at_equal_task,
)
from plasticity_probe.prediction.onset import LeadTime, lead_time
from plasticity_probe.prediction.panel import Numbers, Panel, history, led
from plasticity_probe.prediction.resampling import Interval

LEVEL = 0.05
"""Share of false discoveries, or of false rejections, that is accepted."""
SMALLEST = 0.2
"""Smallest association of interest (our choice): below it less than 4 % of what task and history leave open is explained."""
MISSING = 0.5
"""A predictor is not assessed that is missing at more than this share of the places with an outcome, of the configurations that have it at
all (our choice)."""
LEADS = tuple(range(-1, 6))
"""Leads that are shown; -1 measures the predictor after the outcome, as a control. The verdict uses 0 alone."""
POWER = 0.8
"""Power at which the runs that are still needed would settle a case (Cohen 1988, section 2.4)."""


class Verdict(StrEnum):
    """What a study says about one predictor of one outcome."""

    PREDICTS = "predicts"
    ACCOMPANIES = "accompanies only"
    DOES_NOT_PREDICT = "does not predict"
    REFUTED = "refuted (sign flips)"
    INCONCLUSIVE = "inconclusive"
    NOT_ASSESSED = "not assessed"


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything that was computed about one predictor of one outcome.

    Args:
        predictor: Its name.
        outcome: The outcome's name.
        places: Number of (run, task) places at which both are known.
        missing: Share of the places with an outcome at which the predictor is missing, among the configurations that have it anywhere; 1
            where none has.
        together: Question 1: do they move together?
        association: Question 2: the association at equal task and history.
        gain: Question 4: share of the squared error saved on left-out runs.
        transfer: The same on left-out configurations.
        ranking: Ranking accuracy within left-out runs.
        ranking_at_equal_task: Ranking accuracy between runs at the same task.
        between: Rank correlation between configurations, its p and their number.
        lead_time: By how many tasks the predictor changed before the outcome fell.
        leads: The association at other leads, by lead.
        reason: Why nothing could be computed; empty where it could.
    """

    predictor: str
    outcome: str
    places: int
    missing: float
    together: Association
    association: Association
    gain: Interval
    transfer: Transfer
    ranking: Interval
    ranking_at_equal_task: Interval
    between: tuple[float, float, int]
    lead_time: LeadTime
    leads: Mapping[int, Interval]
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Judged:
    """A verdict with the numbers it rests on.

    Args:
        evidence: What was computed.
        verdict: The verdict.
        q: p of the association after control of the false discovery rate over the predictors of this outcome.
        together_q: The same for moving together.
        flip_q: The same for both signs in the association.
        together_flip_q: The same for both signs in moving together.
        more_runs: How many more runs in each configuration would settle it; None where it is settled or cannot be told.
        text: The verdict in words, with its numbers.
    """

    evidence: Evidence
    verdict: Verdict
    q: float
    together_q: float
    flip_q: float
    together_flip_q: float
    more_runs: int | None
    text: str


def weigh(panel: Panel, predictor: str, outcome: str, seed: int = 0, *, full: bool = True) -> Evidence:
    """Computes all evidence about one predictor of one outcome.

    Args:
        panel: The study.
        predictor: Name of the predictor.
        outcome: Name of the outcome.
        seed: Seed of every random draw; each pair of names has draws of its own.
        full: Whether to compute also what is reported without being decisive.

    Raises:
        UsageError: No such predictor or outcome.
    """
    x, y = _named(panel.predictors, predictor, "predictor"), _named(panel.outcomes, outcome, "outcome")
    own = int.from_bytes(sha256(f"{seed} {predictor} {outcome}".encode()).digest()[:8], "little")
    known = history(y)
    places = ~np.isnan(y) & ~np.isnan(x)
    missing = _missing(panel, x, y)
    obstacle = _obstacle(panel, x, y, missing)
    used = np.full_like(x, np.nan) if obstacle else x
    told = used if full else np.full_like(x, np.nan)
    association = at_equal_history(panel, used, y, known, own)
    reason = obstacle
    if not obstacle and math.isnan(association.estimate.value):
        reason = "at equal task and history neither or only one of predictor and outcome varies between runs"
    leads: dict[int, Interval] = {}
    for lead in LEADS if full and not reason else ():
        # After the outcome, the history is that of before the outcome: the control asks what the outcome itself leaves behind.
        leads[lead] = estimate_at_equal_history(panel, led(x, lead), y, history(y, max(lead, 0)), own)
    return Evidence(
        predictor,
        outcome,
        int(places.sum()),
        missing,
        moving_together(panel, used, y, own),
        association,
        gain_on_runs(panel, used, y, known, own),
        gain_on_configurations(panel, told, y, known),
        ranking_accuracy(panel, told, y, own),
        ranking_accuracy_at_equal_task(panel, told, y, own),
        between_configurations(panel, told, y),
        lead_time(panel, told, y, own),
        leads,
        reason,
    )


def judge(evidence: Sequence[Evidence], panel: Panel) -> tuple[Judged, ...]:
    """The verdicts on all predictors of an outcome, with the false discovery rate controlled over them.

    Args:
        evidence: All predictors of one outcome that were looked at; leaving some out would hide how many were tried.
        panel: The study.

    Raises:
        UsageError: Evidence on several outcomes.
    """
    if len({e.outcome for e in evidence}) > 1:
        raise UsageError("judge takes the evidence on one outcome at a time, got several; call it for each outcome")
    q, together_q, flip_q, together_flip_q = (
        controlled(found)
        for found in (
            [e.association.p for e in evidence],
            [e.together.p for e in evidence],
            [e.association.flip_p for e in evidence],
            [e.together.flip_p for e in evidence],
        )
    )
    judged: list[Judged] = []
    for at, e in enumerate(evidence):
        levels = float(q[at]), float(together_q[at]), float(flip_q[at]), float(together_flip_q[at])
        verdict = _verdict(e, *levels)
        more = _more_runs(e, levels[0]) if verdict is Verdict.INCONCLUSIVE else None
        judged.append(Judged(e, verdict, *levels, more, _text(e, verdict, levels, more, panel)))
    return tuple(judged)


def assess(panel: Panel, outcome: str, predictors: Iterable[str] | None = None, seed: int = 0) -> tuple[Judged, ...]:
    """Verdicts on predictors of one outcome.

    Args:
        panel: The study.
        outcome: Name of the outcome.
        predictors: Names; all by default.
        seed: Seed of every random draw.
    """
    names = panel.predictors if predictors is None else predictors
    return judge([weigh(panel, name, outcome, seed) for name in names], panel)


def controlled(p: Sequence[float]) -> Numbers:
    """The p-values under control of the false discovery rate (Benjamini and Hochberg 1995); NaN stays NaN and does not count.

    Args:
        p: The p-values.
    """
    found = np.array(p, dtype=float)
    known = ~np.isnan(found)
    if known.any():
        found[known] = false_discovery_control(found[known])
    return found


def _named(values: Mapping[str, Numbers], name: str, kind: str) -> Numbers:
    if name not in values:
        raise UsageError(f"no {kind} {name!r}; there are: {', '.join(values) or 'none'}")
    return values[name]


def _missing(panel: Panel, x: Numbers, y: Numbers) -> float:
    there = ~np.isnan(y)
    places = there & ~np.isnan(x)
    having = [group for group in panel.groups if places[group].any()]
    return 1 - sum(int(places[g].sum()) for g in having) / sum(int(there[g].sum()) for g in having) if having else 1.0


def _obstacle(panel: Panel, x: Numbers, y: Numbers, missing: float) -> str:
    there = ~np.isnan(y)
    sizes = [int(there[group].any(axis=1).sum()) for group in panel.groups]
    if not there.any():
        return "there is no outcome"
    if max(sizes) < FEWEST_RUNS:
        return f"at least {FEWEST_RUNS} runs of a configuration are needed, there are at most {max(sizes)}"
    if (tasks := int(there.any(axis=0).sum())) < FEWEST_TASKS:
        return f"at least {FEWEST_TASKS} tasks with an outcome are needed, there are {tasks}"
    if missing > MISSING:
        return (
            f"the predictor is missing at {missing:.0%} of the places with an outcome, in the configurations that have it; at most "
            f"{MISSING:.0%} may be"
        )
    if np.ptp(y[there]) == 0:
        return "the outcome does not vary"
    if np.ptp(x[there & ~np.isnan(x)]) == 0:
        return "the predictor does not vary"
    return ""


def _verdict(e: Evidence, q: float, together_q: float, flip_q: float, together_flip_q: float) -> Verdict:
    if e.reason:
        return Verdict.NOT_ASSESSED
    if flip_q <= LEVEL:
        return Verdict.REFUTED
    found = e.association.estimate
    small = found.narrow_low >= -SMALLEST and found.narrow_high <= SMALLEST
    if q <= LEVEL and e.gain.narrow_low > 0 and not small:
        return Verdict.PREDICTS
    if together_flip_q <= LEVEL:
        return Verdict.REFUTED
    if small:
        return Verdict.ACCOMPANIES if together_q <= LEVEL else Verdict.DOES_NOT_PREDICT
    return Verdict.INCONCLUSIVE


def _more_runs(e: Evidence, q: float) -> int | None:
    """Runs to add to each configuration, from the standard error that the nearest decision needs; errors shrink as 1/sqrt(runs).

    Against zero the test has the level that control of the false discovery rate leaves it, LEVEL p / q.
    """
    estimate, p, runs = e.association.estimate, e.association.p, float(np.mean(e.association.runs))
    level, power = max(LEVEL * p / q, 1e-12), float(norm.isf(1 - POWER))
    freedom = float(np.sum(e.association.runs - 1))
    error = estimate.error * float(student.isf(LEVEL / 2, freedom) / norm.isf(LEVEL / 2))
    wanted = [
        abs(estimate.value) / (float(norm.isf(level / 2)) + power),
        (SMALLEST - abs(estimate.value)) / (float(norm.isf(LEVEL)) + power),
    ]
    factors = [(error / w) ** 2 for w in wanted if w > 0]
    if q <= LEVEL and e.gain.value > 0:
        # Found, but not yet shown to help on left-out runs.
        factors = [(e.gain.error * (float(norm.isf(LEVEL)) + power) / e.gain.value) ** 2, *factors[1:]]
    if not factors or not math.isfinite(min(factors)):
        return None
    return max(1, math.ceil(runs * min(factors) - runs))


def _text(
    e: Evidence, verdict: Verdict, levels: tuple[float, float, float, float], more: int | None, panel: Panel
) -> str:
    if verdict is Verdict.NOT_ASSESSED:
        return f"{e.predictor} was not assessed as a predictor of {e.outcome}: {e.reason}."
    a, t = e.association, e.together
    runs, configurations = int(a.runs.sum()), len(a.configurations)
    said = [
        f"{e.predictor} {_claim(verdict)} {e.outcome}: at equal task and history their rank correlation is {_ends(a.estimate)} "
        f"(q = {_p(levels[0])}, {runs} runs of {_counted(configurations, 'configuration')})."
    ]
    if configurations < len(panel.configurations):
        without = len(panel.configurations) - configurations
        said.append(
            f"Configurations that do not count, because there it is missing or does not vary: {without} of {len(panel.configurations)}."
        )
    if verdict is Verdict.REFUTED:
        which, values = ("at equal task and history", a) if levels[2] <= LEVEL else ("over the tasks of a run", t)
        flip = levels[2] if levels[2] <= LEVEL else levels[3]
        low, high = int(np.argmin(values.values)), int(np.argmax(values.values))
        said.append(
            f"Its sign depends on the setting: {which} {values.values[low]:+.2f} in {panel.configurations[values.configurations[low]]} and "
            f"{values.values[high]:+.2f} in {panel.configurations[values.configurations[high]]} (q = {_p(flip)} of one sign)."
        )
    if not math.isnan(e.gain.value):
        said.append(f"On left-out runs it saves {_share(e.gain)} of the squared error that task and history leave.")
    if not math.isnan(e.transfer.mean):
        good = int((e.transfer.gains > 0).sum())
        said.append(
            f"On left-out configurations it saves {_percent(e.transfer.mean)}, and something on {good} of {len(e.transfer.gains)}."
        )
    if not math.isnan(t.estimate.value):
        said.append(f"Over the tasks of a run they go together with {_ends(t.estimate)} (q = {_p(levels[1])}).")
    if verdict is Verdict.INCONCLUSIVE:
        needed = (
            "the estimate lies so close to the smallest association of interest that no number of runs can be named"
            if more is None
            else f"about {more} more runs in each configuration would settle it if the estimate stayed where it is"
        )
        said.append(f"Too few runs to say more: {needed}.")
    return " ".join(said)


def _claim(verdict: Verdict) -> str:
    return {
        Verdict.PREDICTS: "predicts",
        Verdict.ACCOMPANIES: "accompanies but does not predict",
        Verdict.DOES_NOT_PREDICT: "does not predict",
        Verdict.REFUTED: "is refuted as an explanation of",
        Verdict.INCONCLUSIVE: "may or may not predict",
    }[verdict]


def _ends(found: Interval) -> str:
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _share(found: Interval) -> str:
    return f"{_percent(found.value)} [{_percent(found.low)}, {_percent(found.high)}]"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _p(value: float) -> str:
    return "unknown" if math.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
