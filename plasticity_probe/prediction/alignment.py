"""Lines up what was measured at the start of each task with what became of the task: from the rows of a trace to a panel."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from plasticity_probe.comparison import headline_values, quantity_of
from plasticity_probe.prediction.panel import Numbers, Panel
from plasticity_probe.prediction.sweeps import Sweep, swept
from plasticity_probe.trace.layout import Row
from plasticity_probe.trace.outcome_rows import OUTCOMES, outcomes_of_rows
from plasticity_probe.training.outcomes import OK, Outcome

REMEDIED = "_remedied"
"""How the name of a checkpoint ends that holds the weights after a remedy."""
Place = tuple[str, int]
SAME = 1e-9
"""Numbers that differ by less, relative to themselves, differ by rounding (our choice: that of float32 networks measured in other batches is
larger, and then both stay)."""
_DATA = re.compile(" on (next|current|noise)$")


@dataclass(frozen=True, eq=False)
class Aligned:
    """A panel and what was left out of it.

    Args:
        panel: Predictors and outcomes.
        meanings: For each predictor what it is, in words with its units.
        notes: What could not be used, in words.
        sweeps: Quantities with a threshold at other thresholds too.
    """

    panel: Panel
    meanings: Mapping[str, str]
    notes: tuple[str, ...]
    sweeps: tuple[Sweep, ...] = ()


def align(rows: Iterable[Row], *, layers: bool = False) -> Aligned:
    """Predictors from the weights that a task is learned from, and outcomes of that task.

    Of several checkpoints of a run and task the one at the task's first step counts, and of two at that step the one that a remedy made.
    Rows whose status is not ok, and infinite numbers, count as missing. A predictor is named "label.quantity", with " on current", " on
    next" or " on noise" behind it where the rows differ in the data they were measured on; one that is the same on several of them (features,
    where tasks share their inputs) counts once. What a probe measures layer by layer, or tensor by
    tensor, enters as the summary that its tables show, and with `layers` also as "label.quantity[layer]" for each.

    Args:
        rows: Rows of a trace, or of several.
        layers: Whether each layer counts as a predictor of its own. More predictors are more tests, and each becomes stricter.
    """
    rows = list(rows)
    found = outcomes_of_rows(rows)
    measured = [row for row in rows if row.probe != OUTCOMES and row.network == "checkpoint"]
    # Runs without outcomes still show that outcomes are what is missing.
    runs = tuple(dict.fromkeys([*found, *(row.run for row in measured)]))
    names, of_run = _configurations(rows, runs)
    ends = {(run, o.task): o for run, own in found.items() for o in own if o.network == "run"}
    starts, early = _starts(measured, ends)
    last = max((task for _, task in [*ends, *starts]), default=-1)
    at_run, several = {run: at for at, run in enumerate(runs)}, _several(measured)
    shape = (len(runs), last + 1)
    predictors: dict[str, Numbers] = {}
    meanings: dict[str, str] = {}
    infinite = 0
    for (run, task), own in starts.items():
        for row in own:
            for name, meaning, value in _numbers(row, several, layers):
                meanings.setdefault(name, meaning)
                infinite += math.isinf(value)
                predictors.setdefault(name, np.full(shape, np.nan))[at_run[run], task] = (
                    value if math.isfinite(value) else math.nan
                )
    outcomes = {name: _table(shape, at_run, read(found)) for name, read in OUTCOMES_OF.items()}
    outcomes = {name: values for name, values in outcomes.items() if not np.isnan(values).all()}
    same = _repeated(predictors)
    kept = {name: values for name, values in predictors.items() if name not in same}
    panel = Panel(names, of_run, runs, tuple(range(shape[1])), kept, outcomes)
    sweeps = _sweeps(starts, shape, at_run, several)
    twice = _repeated({sweep.quantity: sweep.values for sweep in sweeps})
    kept_sweeps = tuple(sweep for sweep in sweeps if sweep.quantity not in twice)
    return Aligned(panel, meanings, _notes(found, measured, early, infinite, same), kept_sweeps)


def oriented(outcomes: Sequence[Outcome], name: str) -> dict[int, float]:
    """By task, the outcomes of one network: an accuracy as it is, a loss with its sign turned, so that more is better.

    Args:
        outcomes: Outcomes of one network of one run.
        name: "accuracy", "loss", "test_accuracy" or "test_loss".
    """
    sign = -1 if name.endswith("loss") else 1
    return {o.task: sign * getattr(o, name) for o in outcomes if o.status == OK}


Reader = Callable[[Mapping[str, Sequence[Outcome]]], dict[Place, float]]


def _absolute(name: str) -> Reader:
    def read(found: Mapping[str, Sequence[Outcome]]) -> dict[Place, float]:
        return {
            (run, task): value
            for run, own in found.items()
            for task, value in oriented([o for o in own if o.network == "run"], name).items()
        }

    return read


def _against_fresh(name: str) -> Reader:
    def read(found: Mapping[str, Sequence[Outcome]]) -> dict[Place, float]:
        compared: dict[Place, float] = {}
        for run, own in found.items():
            fresh = oriented([o for o in own if o.network == "control"], name)
            for task, value in oriented([o for o in own if o.network == "run"], name).items():
                if task in fresh:
                    compared[run, task] = value - fresh[task]
        return compared

    return read


def _of_values(read_as: Callable[[str], Reader], accuracy: str, loss: str) -> tuple[Reader, Reader]:
    """Accuracies where tasks have classes, losses where they are learned to values: two outcomes, never one column of mixed units."""
    by_loss = read_as(loss)

    def values_only(found: Mapping[str, Sequence[Outcome]]) -> dict[Place, float]:
        runs = {run: own for run, own in found.items() if all(math.isnan(o.accuracy) for o in own)}
        return by_loss(runs)

    return read_as(accuracy), values_only


_TRAINED, _TRAINED_LOSS = _of_values(_absolute, "accuracy", "loss")
_TRAINED_FRESH, _TRAINED_FRESH_LOSS = _of_values(_against_fresh, "accuracy", "loss")
_TESTED, _TESTED_LOSS = _of_values(_absolute, "test_accuracy", "test_loss")
_TESTED_FRESH, _TESTED_FRESH_LOSS = _of_values(_against_fresh, "test_accuracy", "test_loss")

OUTCOMES_OF: Mapping[str, Reader] = {
    "trainability": _TRAINED,
    "trainability_against_fresh": _TRAINED_FRESH,
    "trainability_by_loss": _TRAINED_LOSS,
    "trainability_by_loss_against_fresh": _TRAINED_FRESH_LOSS,
    "generalisation": _TESTED,
    "generalisation_against_fresh": _TESTED_FRESH,
    "generalisation_by_loss": _TESTED_LOSS,
    "generalisation_by_loss_against_fresh": _TESTED_FRESH_LOSS,
}
"""The outcomes of docs/statistics.md; those "by_loss" are of tasks that are learned to values."""


def _configurations(rows: Sequence[Row], runs: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    identity: dict[str, tuple[str, str]] = {}
    for row in rows:
        own = row.probe == OUTCOMES
        if own or (row.network == "checkpoint" and row.run not in identity):
            settings = json.loads(row.settings)
            key = str(settings.get("run_sha256", ""))
            named = str(row.conditions.get("configuration", "")) or row.run.rsplit(" seed ", 1)[0]
            identity[row.run] = (key, named)
    keys = list(dict.fromkeys(identity[run] for run in runs))
    named = [name for _, name in keys]
    names = tuple(name if named.count(name) == 1 else f"{name} ({key[:8]})" for key, name in keys)
    return names, np.array([keys.index(identity[run]) for run in runs], dtype=np.int64)


def _starts(measured: Sequence[Row], ends: Mapping[Place, Outcome]) -> tuple[dict[Place, list[Row]], int]:
    """For each run and task the rows of the checkpoint that the task was learned from, and how many tasks lack one."""
    steps: dict[Place, int] = {}
    for row in measured:
        place = row.run, row.task
        steps[place] = min(row.step, steps.get(place, row.step))
    chosen: dict[tuple[str, int, str, str], Row] = {}
    lacking: set[Place] = set()
    for row in measured:
        place = row.run, row.task
        end = ends.get(place)
        if row.task < 0 or row.step != steps[place]:
            continue
        if end is not None and row.step != end.step - end.updates:
            # A checkpoint from inside the task has seen what it is to predict.
            lacking.add(place)
            continue
        key = (*place, row.probe, row.settings)
        if key not in chosen or _remedied(row) > _remedied(chosen[key]):
            chosen[key] = row
    found: dict[Place, list[Row]] = {}
    for (run, task, _, _), row in chosen.items():
        found.setdefault((run, task), []).append(row)
    return found, len(lacking)


def _remedied(row: Row) -> bool:
    return PurePosixPath(row.checkpoint).stem.endswith(REMEDIED)


def _on(row: Row) -> str:
    return str(json.loads(row.settings).get("on", ""))


def _several(measured: Sequence[Row]) -> bool:
    return len({row.settings for row in measured}) > 1 and len({_on(row) for row in measured}) > 1


def _behind(row: Row, several: bool) -> str:
    return f" on {_on(row)}" if several and _on(row) else ""


def _numbers(row: Row, several: bool, layers: bool) -> Iterable[tuple[str, str, float]]:
    on = _behind(row, several)
    headlines = headline_values(row)
    for name, variable in row.variables.items():
        quantity = quantity_of(variable.attrs)
        if quantity.role != "value":
            continue
        found = {"": headlines[name]} if name in headlines else {}
        if layers and quantity.shown and variable.kind == "number" and len(variable.dims) == 1:
            labelled = zip(row.labels.get(variable.dims[0], ()), variable.data.tolist(), strict=False)
            shown = {where for where, _ in found.values()}
            found |= {f"[{label}]": (label, value) for label, value in labelled if label not in shown}
        units = "" if quantity.units == "1" else f" [{quantity.units}]"
        for which, (where, value) in found.items():
            meaning = f"{quantity.meaning}{f' ({where})' if where else ''}{units}{on}"
            yield f"{row.probe}.{name}{which}{on}", meaning, value if row.status == "ok" else math.nan


def _repeated(predictors: Mapping[str, Numbers]) -> dict[str, str]:
    """Predictors that are the same numbers on other data, wherever both are known; for each the one kept, with most places, or on next."""
    by_quantity: dict[str, list[str]] = {}
    for name in predictors:
        by_quantity.setdefault(_DATA.sub("", name), []).append(name)
    found: dict[str, str] = {}
    for own in by_quantity.values():
        own.sort(key=lambda name: (-int(np.count_nonzero(~np.isnan(predictors[name]))), not name.endswith(" on next")))
        for at, name in enumerate(own):
            for kept in (other for other in own[:at] if other not in found):
                both = ~np.isnan(predictors[name]) & ~np.isnan(predictors[kept])
                if both.any() and np.allclose(predictors[name][both], predictors[kept][both], rtol=SAME, atol=0):
                    found[name] = kept
                    break
    return found


def _sweeps(
    starts: Mapping[Place, Sequence[Row]], shape: tuple[int, int], at_run: Mapping[str, int], several: bool
) -> tuple[Sweep, ...]:
    found: dict[tuple[str, str, float], dict[float, Numbers]] = {}
    for (run, task), own in starts.items():
        for row in own:
            for each in swept(row):
                at = found.setdefault((each.quantity + _behind(row, several), each.symbol, each.fixed), {})
                for threshold, value in each.values.items():
                    at.setdefault(threshold, np.full(shape, np.nan))[at_run[run], task] = value
    return tuple(
        Sweep(*named, thresholds := tuple(sorted(at)), np.stack([at[each] for each in thresholds]))
        for named, at in found.items()
    )


def _table(shape: tuple[int, int], at_run: Mapping[str, int], values: Mapping[Place, float]) -> Numbers:
    table = np.full(shape, np.nan)
    for (run, task), value in values.items():
        table[at_run[run], task] = value
    return table


def _notes(
    found: Mapping[str, Sequence[Outcome]],
    measured: Sequence[Row],
    lacking: int,
    infinite: int,
    same: Mapping[str, str],
) -> tuple[str, ...]:
    notes: list[str] = []
    if same:
        first, kept = next(iter(same.items()))
        notes.append(
            f"{len(same)} predictors are the same numbers as others, on other data, and count once ({first} is {kept}, for one)"
        )
    if without := {row.run for row in measured} - set(found):
        notes.append(
            f"{len(without)} runs have no outcomes; measure the run folders that `probe train` wrote, which keep theirs"
        )
    if lacking:
        notes.append(
            f"{lacking} tasks have no checkpoint from their start; later ones have seen what they would predict"
        )
    if bad := sum(row.status != "ok" for row in measured):
        notes.append(f"{bad} of {len(measured)} measurements did not end well and count as missing")
    if infinite:
        notes.append(f"infinite numbers, which count as missing: {infinite}")
    diverged = sum(o.status != OK for own in found.values() for o in own if o.network == "run")
    if diverged:
        notes.append(f"{diverged} tasks of runs that diverged have no outcome")
    return tuple(notes)
