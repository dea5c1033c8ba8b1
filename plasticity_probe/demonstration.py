"""The whole way on data that is at hand: networks that lose their ability to learn, one remedy that keeps it, and what was measured before.

Small networks learn 600 scikit-learn digits with fresh random labels, task after task. The tasks are equally hard, so a network that fits them
worse and worse has lost trainability (Lyle et al. 2023; Kumar et al. 2023, section 5). There are four configurations, three activations and a
remedy, of ten seeds each: enough runs to ask whether anything measured at the start of a task tells how the task will go. Each checkpoint is
measured on the task that comes next, before any update on it, as Lewandowski et al. 2023 do. `plasticity_probe.report` judges the traces.
"""

import json
import math
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.stats import rankdata

from plasticity_probe.analysis import Report, analyze
from plasticity_probe.errors import BudgetError, TraceError, UsageError
from plasticity_probe.network.isolation import one_thread
from plasticity_probe.prediction.association import FEWEST_RUNS, FEWEST_TASKS
from plasticity_probe.probe import Probe
from plasticity_probe.probes.spectrum import HessianSpectrum
from plasticity_probe.study import resolve_probes
from plasticity_probe.training.loop import train
from plasticity_probe.training.outcomes import Outcome
from plasticity_probe.training.remedies.penalties import L2Init
from plasticity_probe.training.remedies.remedy import Remedy
from plasticity_probe.training.run_folder import checkpoint_path
from plasticity_probe.training.settings import Data, Setting, Training
from plasticity_probe.training.streams.shifting import RandomLabels
from plasticity_probe.training.summary import Mean, mean_of

SEEDS = 10
"""Runs of each configuration by default (our choice: with so many, docs/statistics.md finds a strong link nearly always)."""
TASKS = 20
"""Tasks by default (our choice: after so many a ReLU network hardly learns more than guessing)."""
EXAMPLES = 600
"""Digits in each task (our choice: a fresh ReLU network fits over four fifths of their labels in 40 epochs)."""
HIDDEN = (64, 64)
"""Units of the networks' hidden layers, two as in the networks of Kumar et al. 2023 (there 100 units)."""
TRAINING = Training(epochs=(40,), batch=60, learning_rate=3e-3)
"""Our choice: a setting in which small networks on the digits lose their trainability within 20 tasks, and forty of them within two minutes.
3e-3 is three times Adam's default (Kingma and Ba 2015), which speeds the loss up; Kumar et al. 2023 train for 400 epochs in batches of 16."""
PLAIN, REMEDIED = "relu", "relu-l2-init"
CONFIGURATIONS: Mapping[str, tuple[str, tuple[Remedy, ...]]] = MappingProxyType(
    {
        PLAIN: ("mlp-relu", ()),
        "leaky-relu": ("mlp-leaky_relu", ()),
        "tanh": ("mlp-tanh", ()),
        REMEDIED: ("mlp-relu", (L2Init(),)),
    }
)
"""Networks and remedies by name: three of the activations that Lewandowski et al. 2023 compare, and the remedy of Kumar et al. 2023."""
PROBES = ("performance", "fisher_rank", "feature_rank", "dead_units", "weight_norms", "readiness")
"""What is measured in every run (our choice: what takes less than a tenth of a second a checkpoint; searching eigenvalues takes four)."""
SPECTRUM = HessianSpectrum(k=5, tol=1e-2, max_products=1000)
"""Few eigenvalues, to a percent (our choice: enough to draw), with products enough for networks that stopped learning, whose eigenvalues lie
close together."""
NOTABLE = 0.05
"""A smaller change of accuracy is no change (our choice: over twice the standard error of a share of 600)."""

SCHEMA = "plasticity_probe.demo/3"
MARKER, RUNS = "probe-demo.json", "runs"
POLL = 0.2
"""Seconds between two looks at how far other processes are (our choice: what an eye takes for moving)."""


@dataclass(frozen=True)
class Course:
    """How one configuration learned its tasks: training accuracy at the end of a task.

    Args:
        name: Name of the configuration.
        by_task: Mean over runs, task by task.
        first: Mean over runs on the first task.
        last: Mean over runs on the last task.
        fresh: Mean over newly initialised networks, trained on the last task alone in the same way; unknown where there is only one task.
        gap: Fresh network less run on the last task, seed by seed.
        drift: Spearman's rank correlation of the accuracy with the number of the task, averaged over runs; NaN where it is not defined.
    """

    name: str
    by_task: tuple[float, ...]
    first: Mean
    last: Mean
    fresh: Mean
    gap: Mean
    drift: float

    @property
    def lost(self) -> bool:
        """Whether fresh networks are better on the last task, by a notable amount and, with several runs, surely so."""
        return self.gap.value > NOTABLE and not self.gap.low <= 0


@dataclass(frozen=True)
class Demonstration:
    """What a demonstration found.

    Args:
        courses: How each configuration learned its tasks.
        traces: The measurements, for `plasticity_probe.report.document.write_report`.
        ok: Whether every measurement ended well.
        findings: Plain sentences computed from these numbers.
    """

    courses: tuple[Course, ...]
    traces: tuple[Path, ...]
    ok: bool
    findings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Job:
    """One configuration: what to train and measure, and where."""

    out: Path
    name: str
    tasks: int
    seeds: range
    probes: Mapping[str, Probe[Any]]

    @property
    def setting(self) -> Setting:
        network, remedies = CONFIGURATIONS[self.name]
        return Setting(
            RandomLabels(tasks=self.tasks, examples=EXAMPLES),
            Data("digits"),
            {"name": network, "hidden": list(HIDDEN)},
            TRAINING,
            remedies,
            control_every=self.tasks,
        )

    @property
    def folder(self) -> Path:
        return self.out / RUNS / self.name

    @property
    def trace(self) -> Path:
        return self.out / f"{self.name}.h5"

    @property
    def spectrum_trace(self) -> Path | None:
        return self.out / f"{self.name}-spectrum.h5" if self.name == PLAIN else None


@dataclass(frozen=True, eq=False)
class _Done:
    """What became of a job."""

    outcomes: tuple[Outcome, ...]
    ok: bool


def demonstrate(
    out: Path,
    *,
    tasks: int = TASKS,
    seeds: int = SEEDS,
    first_seed: int = 0,
    probes: Sequence[str | Probe[Any]] | Mapping[str, Probe[Any]] | None = None,
    processes: int = 1,
    progress: Report | None = None,
) -> Demonstration:
    """Trains all configurations, measures every checkpoint at the start of every task, and says which networks lost their trainability.

    Run again on the same folder it goes on where it stopped: finished training is not repeated, stored rows are not measured again.

    Args:
        out: Folder of the runs and the traces: a new or empty one, or that of a demonstration with the same settings.
        tasks: Number of tasks.
        seeds: Number of runs of each configuration.
        first_seed: Seed of the first run: of its network, its labels and the order of its examples; the others follow it.
        probes: Names or probes, or probes by label, for every run; `PROBES` by default.
        processes: How many processes share the work, one thread each; with more than one, the caller's program must be one that may be
            imported. The numbers do not depend on it.
        progress: Called as progress(done, total, what is being done).

    Raises:
        UsageError: The folder holds something else, or numbers that cannot be.
        TraceError: The folder cannot be written.
        RunError: The same, or another process trains there.
        BudgetError: A process was killed.
    """
    if tasks < 1 or seeds < 1 or first_seed < 0 or processes < 1:
        raise UsageError(
            "a demonstration needs at least one task, one seed, a first seed from 0 on and one process, got "
            f"tasks = {tasks}, seeds = {seeds}, first_seed = {first_seed}, processes = {processes}"
        )
    claim(out, {"tasks": tasks, "seeds": seeds, "first_seed": first_seed})
    chosen = resolve_probes(PROBES if probes is None else probes)
    jobs = [_Job(out, name, tasks, range(first_seed, first_seed + seeds), chosen) for name in CONFIGURATIONS]
    done = _all_of(jobs, processes, progress or (lambda *_: None))
    courses = tuple(course_of(job.name, one.outcomes) for job, one in zip(jobs, done, strict=True))
    traces = tuple(trace for job in jobs for trace in (job.trace, job.spectrum_trace) if trace is not None)
    return Demonstration(courses, traces, all(one.ok for one in done), tuple(findings(courses, seeds, tasks)))


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


def course_of(name: str, outcomes: Iterable[Outcome]) -> Course:
    """How a configuration learned its tasks.

    Args:
        name: Its name.
        outcomes: Outcomes of all its runs.
    """
    runs: dict[int, dict[int, float]] = {}
    fresh: dict[int, float] = {}
    for o in outcomes:
        if o.network == "run":
            runs.setdefault(o.seed, {})[o.task] = o.accuracy
        else:
            fresh[o.seed] = o.accuracy
    tasks = sorted({task for own in runs.values() for task in own})
    series = {seed: [own.get(task, math.nan) for task in tasks] for seed, own in runs.items()}
    means = [mean_of(accuracies) for accuracies in zip(*series.values(), strict=True)]
    return Course(
        name,
        tuple(mean.value for mean in means),
        means[0],
        means[-1],
        mean_of(fresh.values()),
        mean_of(fresh[seed] - own[-1] for seed, own in series.items() if seed in fresh),
        mean_of(rank_correlation(tasks, own) for own in series.values()).value,
    )


def findings(courses: Sequence[Course], seeds: int, tasks: int) -> list[str]:
    """What the courses say, in words.

    Args:
        courses: How each configuration learned its tasks.
        seeds: Number of runs of each.
        tasks: Number of tasks.
    """
    said = (
        [_losses(courses, tasks)]
        if tasks > 1
        else ["One task is no sequence: a loss of trainability takes at least two."]
    )
    by_name = {course.name: course for course in courses}
    plain, helped = by_name[PLAIN], by_name[REMEDIED]
    if plain.lost and not helped.lost:
        price = plain.first.value - helped.first.value
        costs = f"; on the first task it fits {100 * price:.0f} points less than without it" if price > NOTABLE else ""
        said.append(
            f"The remedy l2-init, a penalty on the distance from the initial weights, keeps a ReLU network learning{costs}."
        )
    drifting = max(courses, key=lambda course: abs(course.drift) if math.isfinite(course.drift) else -1)
    if seeds < FEWEST_RUNS or tasks < FEWEST_TASKS:
        said.append(
            f"Too few runs to judge what predicts it: a verdict takes at least {FEWEST_RUNS} runs of a configuration and {FEWEST_TASKS} tasks "
            f"(--seeds, --tasks), here are {seeds} and {tasks}."
        )
    elif drifting.lost:
        drift = f"{drifting.drift:+.2f}".replace("-", "−")
        said.append(
            f"In the runs of {drifting.name} the mere number of the task has a rank correlation of {drift} with the accuracy, so "
            "within a run everything that drifts looks like a cause. The verdicts ask what tells more than the number of the task and earlier "
            "outcomes do."
        )
    said.append(
        f"The spectrum of the Hessian was measured in one run alone, the first of {PLAIN}, to show its course; one run is not judged."
    )
    return said


def rank_correlation(values: Iterable[float], others: Iterable[float]) -> float:
    """Spearman's rank correlation; NaN where a value is unknown or one side does not vary.

    Args:
        values: Some numbers.
        others: As many others.
    """
    x, y = np.array([*values], dtype=float), np.array([*others], dtype=float)
    if np.isnan(x).any() or np.isnan(y).any() or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def _losses(courses: Sequence[Course], tasks: int) -> str:
    lost = [f"{c.name} {_percent(c.last)} (fresh {_percent(c.fresh)})" for c in courses if c.lost]
    kept = [f"{c.name} {_percent(c.last)} (fresh {_percent(c.fresh)})" for c in courses if not c.lost]
    if not lost:
        return (
            f"No loss of trainability shows: fresh networks are not notably better on task {tasks}: {', '.join(kept)}."
        )
    said = (
        f"On task {tasks} fresh networks do better than those that learned the tasks before, and the tasks are equally hard: a loss of "
        f"trainability. {', '.join(lost)}."
    )
    return f"{said} None shows in {', '.join(kept)}." if kept else said


def _percent(mean: Mean) -> str:
    return f"{100 * mean.value:.0f} %"


def _check_same(out: Path, text: str, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UsageError(
            f"{out / MARKER} is not what a demonstration of this version writes: choose a new folder with --out"
        )
    other = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if other:
        both = "; ".join(f"{key}: {found.get(key)} there, {wanted.get(key)} now" for key in other)
        raise UsageError(f"{out} holds a demonstration with other settings ({both}): choose another folder with --out")


@one_thread()
def _carry_out(job: _Job, advance: Callable[[float], None]) -> _Done:
    """Trains and measures one configuration; `advance` is told which share of it is done."""
    stages = 2 + (job.spectrum_trace is not None)

    def stage(number: int) -> Report:
        return lambda done, total, _: advance((number + done / max(total, 1)) / stages)

    outcomes = train(job.setting, job.seeds, job.folder, resume=True, protocol="demo", report=stage(0)).outcomes
    starts = {
        seed: [checkpoint_path(job.folder, seed, o.step - o.updates) for o in outcomes if _is_run(o, seed)]
        for seed in job.seeds
    }
    every = [path for own in starts.values() for path in own]
    ok = analyze(every, on="next", fresh=0, probes=dict(job.probes), trace=job.trace, progress=stage(1)).ok
    if job.spectrum_trace is not None:
        one = starts[job.seeds[0]]
        ok &= analyze(one, on="next", fresh=0, probes=[SPECTRUM], trace=job.spectrum_trace, progress=stage(2)).ok
    advance(1.0)
    return _Done(outcomes, ok)


def _is_run(outcome: Outcome, seed: int) -> bool:
    return outcome.network == "run" and outcome.seed == seed


def _all_of(jobs: Sequence[_Job], processes: int, progress: Report) -> list[_Done]:
    """Carries out all jobs, in this process or in several."""

    def show(shares: Iterable[float]) -> None:
        progress(int(100 * sum(shares)), 100 * len(jobs), f"training and measuring {len(jobs)} configurations")

    if processes == 1:
        shares = [0.0] * len(jobs)

        def advance(at: int, share: float) -> None:
            shares[at] = share
            show(shares)

        return [_carry_out(job, lambda share, at=at: advance(at, share)) for at, job in enumerate(jobs)]
    # A fork of a process with threads may hang; one that is started anew needs nothing of them.
    context = get_context("spawn")
    shared, stop = context.Array("d", len(jobs)), context.Event()
    with ProcessPoolExecutor(min(processes, len(jobs)), context, _begin, (shared, stop)) as pool:
        try:
            futures = [pool.submit(_carry_out_there, job, at) for at, job in enumerate(jobs)]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=POLL)
                show(shared[:])
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise BudgetError(
                "a process that trained or measured networks was killed, most likely for want of memory; free some, or share the work among "
                "fewer processes (--jobs 1). The same command goes on from there"
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


_shares: Any = []
_stop: Event | None = None
"""In a process that shares the work: how far each job is, in shared memory, and whether to leave off."""


def _begin(shares: Any, stop: Event) -> None:
    global _shares, _stop  # the one way to hand shared memory to a process of a pool
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one tells it to stop
    _shares, _stop = shares, stop


def _carry_out_there(job: _Job, at: int) -> _Done:
    def advance(share: float) -> None:
        if _stop is not None and _stop.is_set():
            raise KeyboardInterrupt
        _shares[at] = share

    return _carry_out(job, advance)
