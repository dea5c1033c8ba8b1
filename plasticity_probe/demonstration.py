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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from torch import nn

from plasticity_probe.analysis import Analysis, Report, run
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.comparison import headline_values, number, quantity_of
from plasticity_probe.data.dataset import DataSet, Split
from plasticity_probe.data.sources import load_data
from plasticity_probe.errors import TraceError, UsageError
from plasticity_probe.network.fresh import fresh_network
from plasticity_probe.network.isolation import one_thread
from plasticity_probe.probe import Probe
from plasticity_probe.probes.spectrum import HessianSpectrum
from plasticity_probe.study import resolve_probes, study
from plasticity_probe.trace.layout import Row
from plasticity_probe.training.loop import TaskOutcome, TrainingSettings, checkpoint_path, outcomes_in, train
from plasticity_probe.training.tasks import Task, reshuffled_labels

TASKS = 15
"""Tasks by default (our choice: after so many the network hardly learns more than guessing, with seeds 0 to 4)."""
EXAMPLES = 600
"""Digits in each task (our choice: a fresh network fits about four fifths of their labels in 40 epochs)."""
WIDTHS = (64, 64, 64, 10)
"""Of the network, two hidden layers as in the networks of Kumar et al. 2023 (there 100 units)."""
FEWEST_FOR_RANKS = 5
"""Correlations of fewer tasks are not computed (our choice: the ranks of four points agree by chance in one of 24 cases)."""
NOTABLE = 0.05
"""A smaller change of accuracy is no change (our choice: over twice the standard error of a share of 600)."""
PRODUCTS = 1000
"""Curvature products allowed to find eigenvalues (our choice: with seed 0 the default of 200 does not suffice at five checkpoints, 400 does)."""

SCHEMA = "plasticity_probe.demo/1"
MARKER, CHECKPOINTS, FRESH_START, TRACE = "probe-demo.json", "checkpoints", "fresh_start", "trace.h5"


@dataclass(frozen=True, eq=False)
class Demonstration:
    """What a demonstration found.

    Args:
        outcomes: How each task was learned, in order.
        fresh_start: How a newly initialised network learned the last task under the same settings.
        analysis: The measurements of the checkpoints, stored in `out / "trace.h5"`.
        findings: Plain sentences computed from these numbers.
    """

    outcomes: tuple[TaskOutcome, ...]
    fresh_start: TaskOutcome
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
    settings = TrainingSettings(seed=seed)
    claim(out, {"tasks": tasks, "examples": EXAMPLES, "widths": [*WIDTHS], "training": asdict(settings)})
    digits = load_data("digits")
    assert isinstance(digits, DataSet)
    split = digits.splits["train"]
    stream = list(reshuffled_labels(split, tasks + 1, EXAMPLES, seed, mean=digits.mean, std=digits.std))
    learned, unseen = stream[:-1], stream[-1]
    finished = _finished_step(tasks, settings)

    outcomes = _trained(learned, settings, out / CHECKPOINTS, f"demo seed {seed}", seed * 1000 + 1, progress)
    (fresh_start,) = _trained(
        learned[-1:], settings, out / FRESH_START, f"fresh start seed {seed}", seed * 1000 + 2, progress
    )
    wanted = study(
        [checkpoint_path(out / CHECKPOINTS, step) for step in range(0, finished + 1, finished // tasks)],
        _as_data(split.subset(EXAMPLES, seed), unseen, digits),
        mean=digits.mean,
        std=digits.std,
        probes=_measured() if probes is None else probes,
        seed=seed,
        initial=read_checkpoint(checkpoint_path(out / CHECKPOINTS, 0)).state,
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


def _trained(
    tasks: Sequence[Task], settings: TrainingSettings, out: Path, name: str, seed: int, progress: Report | None
) -> tuple[TaskOutcome, ...]:
    """The outcomes of a run, trained now or, where its last checkpoint is there, before."""
    last = checkpoint_path(out, _finished_step(len(tasks), settings))
    if last.exists():
        return outcomes_in(read_checkpoint(last).metadata)
    network = fresh_network(_network, seed)
    architecture = {"name": "mlp-relu", "widths": [*WIDTHS], "bias": True, "activation": "relu"}
    done: list[TaskOutcome] = []

    def report(outcome: TaskOutcome) -> None:
        done.append(outcome)
        if progress is not None:
            progress(len(done), len(tasks), f"training: {outcome.name}")

    return tuple(train(network, tasks, settings, out, {"run": name, "architecture": architecture}, report=report))


def _network() -> nn.Module:
    return MLP(WIDTHS, "relu")


def _finished_step(tasks: int, settings: TrainingSettings) -> int:
    return tasks * settings.epochs * math.ceil(EXAMPLES / settings.batch)


def _measured() -> dict[str, Probe[Any]]:
    probes = resolve_probes(None)
    # The eigenvalues of a network that stopped learning lie close together; telling them apart takes products, of a millisecond each here.
    probes = {**probes, "hessian_spectrum": HessianSpectrum(max_products=PRODUCTS)}
    return {label: probe for label, probe in probes.items() if label not in ("performance", "memorization")}


def _as_data(split: Split, task: Task, digits: DataSet) -> DataSet:
    # Not called "train": probes that compare training with held-out data must not take these labels for learned ones.
    relabelled = Split(split.inputs, task.targets.numpy())
    return DataSet("digits with random labels that no network learned", {"new task": relabelled}, digits.classes)


def _of_outcomes(outcomes: Sequence[TaskOutcome], fresh_start: TaskOutcome) -> list[str]:
    first, last = outcomes[0].accuracy, outcomes[-1].accuracy
    change = "fell" if first - last > NOTABLE else "rose" if last - first > NOTABLE else "stayed about the same"
    said = [
        f"The training accuracy reached on a task {change}: {first:.0%} on the first, {last:.0%} on task number {len(outcomes)} "
        f"(guessing: about {1 / WIDTHS[-1]:.0%})."
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


def _of_quantities(outcomes: Sequence[TaskOutcome], rows: Iterable[Row]) -> list[str]:
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


def closest_of_each_probe(outcomes: Sequence[TaskOutcome], rows: Iterable[Row]) -> list[Moved]:
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
