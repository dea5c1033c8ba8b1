"""From the rows of traces to verdicts on every predictor of every outcome, as data for tables, figures and JSON."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from plasticity_probe.prediction.alignment import Aligned, align
from plasticity_probe.prediction.association import FEWEST_RUNS, FEWEST_TASKS, estimate_at_equal_history
from plasticity_probe.prediction.held_out import gain_on_runs
from plasticity_probe.prediction.panel import Numbers, Panel, history, led
from plasticity_probe.prediction.plain import plain
from plasticity_probe.prediction.resampling import DRAWS, EXCHANGES, UNKNOWN, Interval
from plasticity_probe.prediction.sweeps import Sweep
from plasticity_probe.prediction.verdict import LEADS, LEVEL, MISSING, SMALLEST, Evidence, Judged, judge, weigh
from plasticity_probe.trace.layout import Row

SCHEMA = "plasticity_probe.verdict/1"
TASK_NUMBER, PREVIOUS = "the number of the task", "the previous outcome"
"""The dull predictors: what any other must beat. They are what is held fixed, so they get no verdict of their own."""


@dataclass(frozen=True, eq=False)
class OverRival:
    """What a predictor adds when the best rival is known already.

    Args:
        rival: The predictor of another probe that alone saves the largest share of the squared error; empty where there is none.
        gain: Share of the squared error on left-out runs that the predictor saves beside it.
    """

    rival: str
    gain: Interval


@dataclass(frozen=True, eq=False)
class SweptAssociation:
    """The association at equal task and history of one quantity at several thresholds.

    Args:
        quantity: "label.quantity".
        symbol: The threshold's name.
        fixed: The threshold that the verdict is about.
        at: The association by threshold, ascending.
    """

    quantity: str
    symbol: str
    fixed: float
    at: Mapping[float, Interval]


@dataclass(frozen=True, eq=False)
class Assessment:
    """Everything that a study says about what predicts what.

    Args:
        aligned: The study: predictors, outcomes, and what could not be used.
        judged: For each outcome the verdicts on all predictors, in the order of measurement.
        dull: For each outcome the evidence on the number of the task and on the previous outcome.
        over_rivals: For each outcome, and each predictor that saves something, what it adds to the best rival.
        sweeps: For each outcome, and each quantity with a threshold, its association at every threshold; shown, and never chosen from.
        seed: Seed of every random draw.
    """

    aligned: Aligned
    judged: Mapping[str, tuple[Judged, ...]]
    dull: Mapping[str, tuple[Evidence, ...]]
    over_rivals: Mapping[str, Mapping[str, OverRival]]
    sweeps: Mapping[str, tuple[SweptAssociation, ...]]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The verdicts as plain data, as `verdict.json` holds them; what is not finite is None."""
        panel = self.aligned.panel
        return plain(
            {
                "schema": SCHEMA,
                "runs": len(panel.runs),
                "tasks": len(panel.tasks),
                "configurations": {
                    name: int(np.sum(panel.configuration_of == at)) for at, name in enumerate(panel.configurations)
                },
                "notes": list(self.aligned.notes),
                "rules": {
                    "level": LEVEL,
                    "smallest_association": SMALLEST,
                    "missing": MISSING,
                    "fewest_runs": FEWEST_RUNS,
                    "fewest_tasks": FEWEST_TASKS,
                    "bootstrap_draws": DRAWS,
                    "exchanges": EXCHANGES,
                    "leads": list(LEADS),
                    "seed": self.seed,
                },
                "outcomes": {
                    outcome: {
                        "verdicts": [self._entry(outcome, found) for found in judged],
                        "dull": [_evidence(e) for e in self.dull[outcome]],
                        "sweeps": [
                            {
                                "quantity": sweep.quantity,
                                "threshold": sweep.symbol,
                                "fixed": sweep.fixed,
                                "association": {f"{at:g}": asdict(found) for at, found in sweep.at.items()},
                            }
                            for sweep in self.sweeps[outcome]
                        ],
                    }
                    for outcome, judged in self.judged.items()
                },
            }
        )

    def rows(self) -> Iterator[dict[str, str | float]]:
        """One flat row for each predictor and outcome, for a table."""
        for outcome, judged in self.judged.items():
            for j in judged:
                e, over = j.evidence, self.over_rivals[outcome].get(j.evidence.predictor)
                yield {
                    "outcome": outcome,
                    "predictor": e.predictor,
                    "meaning": self.aligned.meanings.get(e.predictor, ""),
                    "verdict": str(j.verdict),
                    "association": e.association.estimate.value,
                    "association_low": e.association.estimate.low,
                    "association_high": e.association.estimate.high,
                    "q": j.q,
                    "sign_flip_q": j.flip_q,
                    "gain_on_runs": e.gain.value,
                    "gain_on_runs_low": e.gain.low,
                    "gain_on_runs_high": e.gain.high,
                    "gain_on_configurations": e.transfer.mean,
                    "rival": over.rival if over else "",
                    "gain_over_rival": over.gain.value if over else math.nan,
                    "gain_over_rival_low": over.gain.low if over else math.nan,
                    "gain_over_rival_high": over.gain.high if over else math.nan,
                    "moving_together": e.together.estimate.value,
                    "moving_together_low": e.together.estimate.low,
                    "moving_together_high": e.together.estimate.high,
                    "moving_together_q": j.together_q,
                    "ranking_accuracy": e.ranking.value,
                    "ranking_accuracy_at_equal_task": e.ranking_at_equal_task.value,
                    "between_configurations": e.between[0],
                    "between_configurations_p": e.between[1],
                    "lead_time": e.lead_time.mean.value,
                    "lead_time_low": e.lead_time.mean.low,
                    "lead_time_high": e.lead_time.mean.high,
                    "lead_time_runs": e.lead_time.events,
                    "runs": int(e.association.runs.sum()),
                    "places": e.places,
                    "missing": e.missing,
                    "more_runs": math.nan if j.more_runs is None else j.more_runs,
                }

    def _entry(self, outcome: str, found: Judged) -> dict[str, Any]:
        over = self.over_rivals[outcome].get(found.evidence.predictor)
        return {
            **_evidence(found.evidence),
            "meaning": self.aligned.meanings.get(found.evidence.predictor, ""),
            "verdict": str(found.verdict),
            "text": found.text,
            "q": found.q,
            "moving_together_q": found.together_q,
            "sign_flip_q": found.flip_q,
            "moving_together_sign_flip_q": found.together_flip_q,
            "more_runs": found.more_runs,
            "over_rival": {"rival": over.rival, **asdict(over.gain)} if over else None,
            "by_configuration": {
                self.aligned.panel.configurations[at]: {"association": value, "error": error}
                for at, value, error in zip(
                    found.evidence.association.configurations,
                    found.evidence.association.values,
                    found.evidence.association.errors,
                    strict=True,
                )
            },
        }


def assess_rows(rows: Iterable[Row], seed: int = 0, *, layers: bool = False) -> Assessment:
    """Judges every predictor of every outcome that traces hold.

    Args:
        rows: Rows of a trace, or of several.
        seed: Seed of every random draw.
        layers: Whether each layer counts as a predictor of its own.
    """
    return assess_aligned(align(rows, layers=layers), seed)


def assess_aligned(aligned: Aligned, seed: int = 0) -> Assessment:
    """Judges every predictor of every outcome of a study.

    Args:
        aligned: The study.
        seed: Seed of every random draw.
    """
    panel = aligned.panel
    judged: dict[str, tuple[Judged, ...]] = {}
    dull: dict[str, tuple[Evidence, ...]] = {}
    over: dict[str, Mapping[str, OverRival]] = {}
    sweeps: dict[str, tuple[SweptAssociation, ...]] = {}
    for outcome, values in panel.outcomes.items():
        judged[outcome] = judge([weigh(panel, name, outcome, seed) for name in panel.predictors], panel)
        ours = {
            TASK_NUMBER: np.broadcast_to(np.array(panel.tasks, dtype=float), values.shape).copy(),
            PREVIOUS: led(values, 1),
        }
        plain = replace(panel, predictors=ours)
        dull[outcome] = tuple(weigh(plain, name, outcome, seed) for name in ours)
        over[outcome] = _over_rivals(aligned, outcome, judged[outcome], seed)
        sweeps[outcome] = tuple(_swept(panel, values, sweep, seed) for sweep in aligned.sweeps)
    return Assessment(aligned, judged, dull, over, sweeps, seed)


def _swept(panel: Panel, outcome: Numbers, sweep: Sweep, seed: int) -> SweptAssociation:
    known = history(outcome)
    found = {
        threshold: estimate_at_equal_history(panel, values, outcome, known, seed)
        for threshold, values in zip(sweep.thresholds, sweep.values, strict=True)
    }
    return SweptAssociation(sweep.quantity, sweep.symbol, sweep.fixed, found)


def _over_rivals(aligned: Aligned, outcome: str, judged: Sequence[Judged], seed: int) -> dict[str, OverRival]:
    panel = aligned.panel
    gains = {j.evidence.predictor: j.evidence.gain.value for j in judged if not math.isnan(j.evidence.gain.value)}
    values = panel.outcomes[outcome]
    found: dict[str, OverRival] = {}
    for name, gain in gains.items():
        if gain <= 0:
            continue
        own = panel.predictors[name]
        rivals = {
            other: value
            for other, value in gains.items()
            if _probe(other) != _probe(name) and _shared(own, panel.predictors[other]) >= 1 - MISSING
        }
        if not rivals:
            found[name] = OverRival("", UNKNOWN)
            continue
        best = max(rivals, key=lambda other: rivals[other])
        known = np.concatenate([history(values), panel.predictors[best][None]])
        found[name] = OverRival(best, gain_on_runs(panel, own, values, known, seed))
    return found


def _shared(predictor: Numbers, rival: Numbers) -> float:
    """Share of a predictor's places at which a rival is known too; one that lives elsewhere is no rival."""
    known = ~np.isnan(predictor)
    return float(np.mean(~np.isnan(rival[known]))) if known.any() else 0.0


def _probe(predictor: str) -> str:
    return predictor.split(".", 1)[0]


def _evidence(e: Evidence) -> dict[str, Any]:
    return {
        "predictor": e.predictor,
        "reason": e.reason,
        "places": e.places,
        "missing": e.missing,
        "runs": int(e.association.runs.sum()),
        "association": {**asdict(e.association.estimate), "p": e.association.p},
        "moving_together": {**asdict(e.together.estimate), "p": e.together.p},
        "gain_on_runs": asdict(e.gain),
        "gain_on_configurations": {"mean": e.transfer.mean, "each": e.transfer.gains.tolist()},
        "ranking_accuracy": asdict(e.ranking),
        "ranking_accuracy_at_equal_task": asdict(e.ranking_at_equal_task),
        "between_configurations": dict(zip(("correlation", "p", "configurations"), e.between, strict=True)),
        "lead_time": {**asdict(e.lead_time.mean), "runs": e.lead_time.events, "predictor_first": e.lead_time.first},
        "leads": {str(lead): asdict(found) for lead, found in e.leads.items()},
    }
