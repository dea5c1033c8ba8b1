"""The whole way on data that is at hand: a network that loses its ability to learn, its checkpoints measured, and what that shows.

A small ReLU network learns 600 scikit-learn digits with fresh random labels, task after task, and fits them worse and worse although the
tasks are equally hard. Each checkpoint, the weights before a task, is measured on one and the same task: the digits with the labels that
would come after the last task, which no network was trained on. Lewandowski et al. 2023 measure each checkpoint on the task that starts
there. For random labels that are drawn independently these are tasks of one distribution; a fixed one keeps the draw of the labels from
showing in the series.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from plasticity_probe.analysis import Analysis, Report, run
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.comparison import headline_values, number, quantity_of
from plasticity_probe.data.dataset import DataSet, Split
from plasticity_probe.errors import TraceError, UsageError
from plasticity_probe.network.isolation import one_thread
from plasticity_probe.probe import Probe
from plasticity_probe.probes.spectrum import HessianSpectrum
from plasticity_probe.study import resolve_probes, study
from plasticity_probe.trace.layout import Row
from plasticity_probe.training.loop import train
from plasticity_probe.training.outcomes import Outcome
from plasticity_probe.training.run_folder import checkpoint_path
from plasticity_probe.training.settings import Data, Setting, Training, written
from plasticity_probe.training.sources import load_source
from plasticity_probe.training.streams.shifting import RandomLabels
from plasticity_probe.training.tasks import Task

TASKS = 15
"""Tasks by default (our choice: after so many the network hardly learns more than guessing, with seeds 0 to 4)."""
EXAMPLES = 600
"""Digits in each task (our choice: a fresh network fits about four fifths of their labels in 40 epochs)."""
HIDDEN = (64, 64)
"""Units of the network's hidden layers, two as in the networks of Kumar et al. 2023 (there 100 units)."""
TRAINING = Training(epochs=(40,), batch=60, learning_rate=3e-3)
"""Our choice: the smallest setting we found in which a small ReLU network on the digits loses its trainability within 15 tasks and a minute.
3e-3 is three times Adam's default (Kingma and Ba 2015), which speeds the loss up; Kumar et al. 2023 train for 400 epochs in batches of 16."""
CLASSES = 10
FEWEST_FOR_RANKS = 5
"""Correlations of fewer tasks are not computed (our choice: the ranks of four points agree by chance in one of 24 cases)."""
NOTABLE = 0.05
"""A smaller change of accuracy is no change (our choice: over twice the standard error of a share of 600)."""
PRODUCTS = 1000
"""Curvature products allowed to find eigenvalues (our choice: with seed 0 the default of 200 does not suffice at five checkpoints, 400 does)."""

SCHEMA = "plasticity_probe.demo/2"
MARKER, RUN, TRACE = "probe-demo.json", "run", "trace.h5"


@dataclass(frozen=True, eq=False)
class Demonstration:
    """What a demonstration found.

    Args:
        outcomes: How each task was learned, in order.
        fresh_start: How a newly initialised network learned the last task under the same settings.
        analysis: The measurements of the checkpoints, stored in `out / "trace.h5"`.
        findings: Plain sentences computed from these numbers.
    """

    outcomes: tuple[Outcome, ...]
    fresh_start: Outcome
    analysis: Analysis
    findings: tuple[str, ...]


@one_thread()
def demonstrate(
    out: Path,
    *,
    tasks: int = TASKS,
    seed: int = 0,
    probes: Sequence[str | Probe[Any]] | Mapping[str, Probe[Any]] | None = None,
    progress: Report | None = None,
) -> Demonstration:
    """Trains a network until it hardly learns any more, measures its checkpoints, and says what moved with the loss.

    Run again on the same folder it goes on where it stopped: finished training is not repeated, stored rows are not measured again.

    Args:
        out: Folder of the checkpoints and the trace: a new or empty one, or that of a demonstration with the same settings.
        tasks: Number of tasks.
        seed: Seed of the network, the labels, the order of the examples and the measurements.
        probes: Names or probes, or probes by label; by default every registered probe but performance and memorization, which ask how well
            learned data are known, while the task measured here was learned by no network.
        progress: Called as progress(done, total, what is being done).

    Raises:
        UsageError: The folder holds something else, or numbers that cannot be.
        TraceError: The folder cannot be written.
    """
    if tasks < 1:
        raise UsageError(f"a demonstration needs at least one task, got tasks = {tasks}")
    setting = Setting(
        RandomLabels(tasks=tasks, examples=EXAMPLES),
        Data("digits"),
        {"name": "mlp-relu", "hidden": list(HIDDEN)},
        TRAINING,
        control_every=tasks,
    )
    what = written(setting)
    claim(
        out, {"tasks": tasks, "seed": seed, "examples": EXAMPLES, **{key: what[key] for key in ("network", "training")}}
    )
    folder = out / RUN
    trained = train(setting, [seed], folder, resume=True, protocol="demo", report=progress)
    outcomes = tuple(outcome for outcome in trained.outcomes if outcome.network == "run")
    fresh_start = next((outcome for outcome in trained.outcomes if outcome.network == "control"), outcomes[0])
    source = load_source(setting.data)
    each = outcomes[0].updates
    wanted = study(
        [checkpoint_path(folder, seed, task * each) for task in range(tasks + 1)],
        _as_data(setting.stream.task(source, tasks, seed), trained.manifest.data),
        probes=_measured() if probes is None else probes,
        seed=seed,
        initial=read_checkpoint(checkpoint_path(folder, seed, 0)).state,
    )
    analysis = run(wanted, trace=out / TRACE, progress=progress)
    said = (*_of_outcomes(outcomes, fresh_start), *_of_quantities(outcomes, analysis.rows))
    return Demonstration(outcomes, fresh_start, analysis, said)


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder that of a demonstration, by a file that says so, or checks that it already is.

    Args:
        out: The folder.
        settings: What the demonstration is, as JSON.

    Raises:
        UsageError: The folder holds other files and no demonstration, or one with other settings.
        TraceError: It cannot be read or written.
    """
    marker, wanted = out / MARKER, {"schema": SCHEMA, **settings}
    try:
        if marker.is_file():
            _check_same(out, marker.read_text(encoding="utf-8"), wanted)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(
                f"{out} exists and is no folder of a demonstration: choose a new or an empty one with --out"
            )
        else:
            out.mkdir(parents=True, exist_ok=True)
            marker.write_text(json.dumps(wanted), encoding="utf-8")
    except OSError as error:
        raise TraceError(
            f"{out} cannot be used: {error.strerror}; choose a folder that can be written with --out"
        ) from error


def _check_same(out: Path, text: str, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UsageError(f"{out / MARKER} is not what a demonstration writes: choose a new folder with --out")
    other = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if other:
        both = "; ".join(f"{key}: {found.get(key)} there, {wanted.get(key)} now" for key in other)
        raise UsageError(f"{out} holds a demonstration with other settings ({both}): choose another folder with --out")


def _measured() -> dict[str, Probe[Any]]:
    probes = resolve_probes(None)
    # The eigenvalues of a network that stopped learning lie close together; telling them apart takes products, of a millisecond each here.
    probes = {**probes, "hessian_spectrum": HessianSpectrum(max_products=PRODUCTS)}
    return {label: probe for label, probe in probes.items() if label not in ("performance", "memorization")}


def _as_data(task: Task, description: str) -> DataSet:
    # Not called "train": probes that compare training with held-out data must not take these labels for learned ones.
    relabelled = Split(task.inputs.numpy(), task.targets.numpy())
    return DataSet(f"{description}; with random labels that no network learned", {"new task": relabelled})


def _of_outcomes(outcomes: Sequence[Outcome], fresh_start: Outcome) -> list[str]:
    first, last = outcomes[0].accuracy, outcomes[-1].accuracy
    change = "fell" if first - last > NOTABLE else "rose" if last - first > NOTABLE else "stayed about the same"
    said = [
        f"The training accuracy reached on a task {change}: {first:.0%} on the first, {last:.0%} on task number {len(outcomes)} "
        f"(guessing: about {1 / CLASSES:.0%})."
    ]
    gap = fresh_start.accuracy - last
    if gap > NOTABLE:
        said.append(
            f"The task is not to blame: a fresh network trained the same way on the same last task reached {fresh_start.accuracy:.0%}. "
            "The network lost its ability to fit new labels: a loss of trainability."
        )
    else:
        said.append(
            f"A fresh network trained the same way on the last task reached {fresh_start.accuracy:.0%}: no loss of trainability shows here."
        )
    return said


def _of_quantities(outcomes: Sequence[Outcome], rows: Iterable[Row]) -> list[str]:
    accuracies = [outcome.accuracy for outcome in outcomes]
    if len(outcomes) < FEWEST_FOR_RANKS:
        return [
            f"{len(outcomes)} tasks are too few to say what moved with the accuracy; at least {FEWEST_FOR_RANKS} are needed (--tasks)."
        ]
    drift = _rank_correlation(range(len(accuracies)), accuracies)
    if math.isnan(drift):
        return ["The accuracy reached did not vary, so nothing can be said to move with it."]
    return [
        f"Measured before each of the {len(accuracies)} tasks, these went most closely with the accuracy reached on it, one of each probe, with "
        "Spearman's rank correlation:",
        *(
            f"{moved.probe}: {moved.meaning}, from {number(moved.first)} before the first task to {number(moved.last)} before the last: "
            f"{moved.correlation:+.2f}"
            for moved in closest_of_each_probe(outcomes, rows)
        ),
        f"Correlation is not prediction: the mere number of the task has a rank correlation of {drift:+.2f} with the accuracy, so in one run "
        "everything that drifts looks like a cause. Many runs and remedies are needed to tell causes from bystanders.",
    ]


@dataclass(frozen=True)
class Moved:
    """How a quantity, measured before each task, went with the accuracy reached on that task.

    Args:
        probe: The probe's label.
        meaning: The quantity in words.
        first: Its value before the first task.
        last: Its value before the last task.
        correlation: Spearman's rank correlation with the accuracies.
    """

    probe: str
    meaning: str
    first: float
    last: float
    correlation: float


def closest_of_each_probe(outcomes: Sequence[Outcome], rows: Iterable[Row]) -> list[Moved]:
    """For each probe the quantity whose rank correlation with the accuracy is the largest in size, the closest probe first.

    Only quantities that were measured well before every task and changed at all; no ceilings, counts or standard errors, and not the
    performance on the data itself.

    Args:
        outcomes: How the tasks went.
        rows: Measurements of the checkpoints before them.
    """
    accuracy = {outcome.task: outcome.accuracy for outcome in outcomes}
    series: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row.network != "checkpoint" or row.task not in accuracy or row.status != "ok" or row.probe == "performance":
            continue
        for name, (where, value) in headline_values(row).items():
            quantity = quantity_of(row.variables[name].attrs)
            if quantity.role == "value":
                meaning = quantity.meaning + (f" ({where})" if where else "")
                series.setdefault((row.probe, meaning), {})[row.task] = value
    best: dict[str, Moved] = {}
    for (probe, meaning), values in series.items():
        known = [values.get(task, math.nan) for task in accuracy]
        correlation = _rank_correlation(known, list(accuracy.values()))
        if not math.isnan(correlation) and abs(correlation) > abs(best[probe].correlation if probe in best else 0):
            best[probe] = Moved(probe, meaning, known[0], known[-1], correlation)
    return sorted(best.values(), key=lambda moved: -abs(moved.correlation))


def _rank_correlation(values: Iterable[float], others: Iterable[float]) -> float:
    """Spearman's rank correlation; NaN where a value is unknown or one side does not vary."""
    x, y = np.array([*values], dtype=float), np.array([*others], dtype=float)
    if np.isnan(x).any() or np.isnan(y).any() or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
