"""Trains networks through a stream of tasks, keeps their weights, and records how every task went, beside a fresh network's.

One loop for every setting: what differs between settings is data (`plasticity_probe.training.settings.Setting`). Nothing random carries a state
from one epoch to the next (`plasticity_probe.training.seeding`), so a run that was killed goes on to the same weights, bit for bit on a CPU with
the same number of threads.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from plasticity_probe.training import run_folder
from plasticity_probe.training.batches import Resident, log_spaced, resident, updates_of
from plasticity_probe.training.course import Course, as_saved, new_control, new_course, take_up
from plasticity_probe.training.fitting import Learner, Place, Tally, finite, fit, outcomes_of
from plasticity_probe.training.outcomes import DIVERGED, Outcome
from plasticity_probe.training.remedies.remedy import Moment
from plasticity_probe.training.run_folder import Manifest
from plasticity_probe.training.run_plan import RunPlan, plan_run
from plasticity_probe.training.settings import Setting

SAVE_EVERY = 30.0
"""Seconds of training that a kill may cost (our choice); it decides no result."""
Report = Callable[[int, int, str], None]
"""report(done, total, what is being done)."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Args:
        folder: Where it is.
        manifest: What was trained.
        outcomes: How every task went, by seed, task and network.
    """

    folder: Path
    manifest: Manifest
    outcomes: tuple[Outcome, ...]

    @property
    def diverged(self) -> tuple[int, ...]:
        """Seeds whose weights or losses did not stay finite."""
        return tuple(sorted({o.seed for o in self.outcomes if o.status == DIVERGED and o.network == "run"}))


def train(
    setting: Setting,
    seeds: Iterable[int],
    out: str | Path,
    *,
    resume: bool = False,
    device: str | torch.device = "cpu",
    together: int | None = None,
    protocol: str = "",
    data_root: str | Path | None = None,
    download: bool = False,
    save_every: float = SAVE_EVERY,
    report: Report | None = None,
) -> Run:
    """Carries out a setting for some seeds, in a run folder.

    Before the first update on a task, after the last task, and at logarithmically spaced updates inside tasks the weights are kept, one file
    a seed. After each task an outcome is recorded for the run and for its control: a newly initialised network with the same architecture,
    remedies, budget and order of examples that learns this task alone.

    Small fully connected networks of all seeds train as one vectorised program; others one seed after the other.

    Args:
        setting: Everything that decides the run but its seeds.
        seeds: Seed of each run: of its network, its tasks and the order of its examples.
        out: The run folder: a new or empty one, or that of the same run with `resume`.
        resume: Go on with a run that was interrupted; a finished one is returned as it is.
        device: Where to train.
        together: How many seeds to train as one program; None decides by the network. The results of a seed depend on it by rounding.
        protocol: Name of the protocol, for the record.
        data_root: Folder of the named data sets.
        download: Fetch a named data set that is not there.
        save_every: Seconds of training that a kill may cost.
        report: Called as report(done, total, what is being done).

    Raises:
        UsageError: Settings that cannot be, or a folder that holds something else.
        DataError: Data that is missing or does not fit the stream.
        RunError: The folder cannot be written, lacks the room, or another process trains there.
    """
    plan = plan_run(
        setting, seeds, device=device, together=together, protocol=protocol, data_root=data_root, download=download
    )
    return carry_out(plan, out, resume=resume, save_every=save_every, report=report)


def carry_out(
    plan: RunPlan,
    out: str | Path,
    *,
    resume: bool = False,
    save_every: float = SAVE_EVERY,
    report: Report | None = None,
) -> Run:
    """Carries out a planned run, as `train` does.

    Args:
        plan: The run.
        out: The run folder: a new or empty one, or that of the same run with `resume`.
        resume: Go on with a run that was interrupted; a finished one is returned as it is.
        save_every: Seconds of training that a kill may cost.
        report: Called as report(done, total, what is being done).

    Raises:
        UsageError: The folder holds something else.
        RunError: The folder cannot be written, lacks the room, or another process trains there.
    """
    folder = Path(out)
    run_folder.open_run(folder, plan.manifest, resume=resume)
    with run_folder.alone(folder):
        for part in run_folder.leftovers(folder):
            part.unlink(missing_ok=True)
        run_folder.check_room(folder, plan.bytes)
        for number, group in enumerate(plan.groups):
            progress = _Progress(plan.setting, number, len(plan.groups), report)
            _Group(folder, plan, group, save_every, progress).carry_out()
    return Run(folder, plan.manifest, run_folder.stored_outcomes(folder))


class _Progress:
    """Progress of a run in hundredths of a task."""

    def __init__(self, setting: Setting, group: int, groups: int, report: Report | None) -> None:
        tasks = range(setting.stream.tasks)
        self.setting, self.report, self.latest = setting, report, 0.0
        self.before = [0]
        for task in tasks:
            self.before.append(self.before[-1] + 100 * (1 + setting.has_control(task)))
        self.offset, self.total = group * self.before[-1], groups * self.before[-1]

    def show(self, place: Place, epochs: int, text: str) -> None:
        """Reports, at most five times a second."""
        if self.report is None or time.monotonic() - self.latest < 0.2:
            return
        self.latest = time.monotonic()
        phase = 100 if place.phase == "control" else 0
        self.report(self.offset + self.before[place.task] + phase + 100 * place.epoch // epochs, self.total, text)


@dataclass(eq=False)
class _Group:
    """Trains one group of seeds in a run folder."""

    folder: Path
    plan: RunPlan
    seeds: tuple[int, ...]
    save_every: float
    progress: _Progress
    saved: float = field(default_factory=time.monotonic)

    @property
    def setting(self) -> Setting:
        """What is trained."""
        return self.plan.setting

    @property
    def name(self) -> str:
        """Name of this group's state."""
        return run_folder.group_name(self.seeds)

    def carry_out(self) -> None:
        """Trains to the end of the stream, from the state that an interrupted process left where there is one."""
        stored = [o for o in run_folder.stored_outcomes(self.folder) if o.seed in self.seeds]
        if not _finished(self.setting, self.seeds, stored):
            self._train()
        run_folder.drop_state(self.folder, self.name)

    def _train(self) -> None:
        stream = self.setting.stream
        course = new_course(self.plan, self.seeds)
        if (found := run_folder.load_state(self.folder, self.name)) is not None:
            take_up(course, self.plan, *found)
        while course.place.task < stream.tasks and course.alive:
            tasks = [stream.task(self.plan.source, course.place.task, seed) for seed in self.seeds]
            held = resident(tasks, self.plan.device)
            if course.place.phase == "run":
                self._run(course, held)
            if course.place.phase == "control":
                self._control(course, held)

    def _run(self, course: Course, held: Resident) -> None:
        task = course.place.task
        if course.place.updates == 0:
            self._save_if_due(course)
            self._begin(course, held)
        points = self._points(task, held)

        def after_update(place: Place) -> None:
            course.place = place
            if place.updates in points:
                self._checkpoint(course)

        self._fit(course, course.learner, held, after_update)
        if self.setting.has_control(task):
            course.place = Place(task, "control", step=course.place.step)
        else:
            self._finish_task(course)

    def _control(self, course: Course, held: Resident) -> None:
        course.control = course.control or new_control(self.plan, course)
        self._fit(course, course.control, held, None)
        course.control = None
        self._finish_task(course)

    def _fit(
        self, course: Course, learner: Learner, held: Resident, after_update: Callable[[Place], None] | None
    ) -> None:
        """Trains networks to the end of the task and records how it went."""
        tally = course.tally = course.tally or Tally.empty(len(self.seeds), self.plan.device)
        epochs = self.setting.training.epochs_of(course.place.task)

        def after_epoch(place: Place) -> None:
            course.place = place
            text = f"task {place.task}" + (" (control)" if place.phase == "control" else "")
            self.progress.show(place, epochs, text)
            self._save_if_due(course)

        course.place = fit(learner, held, self.setting, self.seeds, course.place, tally, after_update, after_epoch)
        found = outcomes_of(held, learner, self.seeds, course.place, tally)
        course.outcomes += [outcome for outcome in found if outcome.seed not in course.lost]
        course.tally = None

    def _finish_task(self, course: Course) -> None:
        course.place = Place(course.place.task + 1, step=course.place.step)
        # The last weights come before the outcomes, so that a run whose outcomes are all there is whole.
        if course.place.task == self.setting.stream.tasks and self.setting.has_checkpoints(course.place.task):
            self._checkpoint(course)
        others = [o for o in run_folder.stored_outcomes(self.folder) if o.seed not in self.seeds]
        run_folder.store_outcomes(self.folder, [*others, *course.outcomes])

    def _begin(self, course: Course, held: Resident) -> None:
        """Keeps the weights that the task before left, and lets the remedies act."""
        at, networks = course.place, course.learner.networks
        kept = self.setting.has_checkpoints(at.task)
        if kept:
            self._checkpoint(course)
        if at.task == 0 or not self.setting.remedies:
            return
        before = {name: weight.clone() for name, weight in networks.weights.items()} if kept else {}
        moment = Moment(self.seeds, at.task, at.epoch, at.step, held.tasks, self.setting.training.batch)
        for remedy, memory in zip(self.setting.remedies, course.learner.memories, strict=True):
            remedy.before_task(networks, memory, moment)
        if any(not torch.equal(weight, networks.weights[name]) for name, weight in before.items()):
            self._checkpoint(course, remedied=True)

    def _points(self, task: int, held: Resident) -> frozenset[int]:
        """The updates of a task after which weights are kept."""
        training = self.setting.training
        most = training.epochs_of(task) * updates_of(held.size, training.batch)
        return log_spaced(most, self.setting.inside) if self.setting.has_checkpoints(task) else frozenset()

    def _checkpoint(self, course: Course, remedied: bool = False) -> None:
        """Keeps the weights of every seed that has not diverged."""
        networks, at = course.learner.networks, course.place
        sound = finite(networks).tolist()
        for index, seed in enumerate(self.seeds):
            if seed in course.lost or not sound[index]:
                continue
            metadata = {
                "run": run_folder.run_name(self.folder, seed),
                "protocol": self.plan.manifest.protocol,
                "seed": seed,
                "step": at.step,
                "task": at.task,
                "updates": at.updates,
                "remedied": remedied,
                "architecture": dict(self.plan.drawn.architecture),
            }
            path = run_folder.checkpoint_path(self.folder, seed, at.step, remedied)
            run_folder.save_weights(path, networks.state_of(index), metadata)

    def _save_if_due(self, course: Course) -> None:
        if time.monotonic() - self.saved >= self.save_every:
            run_folder.save_state(self.folder, self.name, *as_saved(course))
            self.saved = time.monotonic()


def _finished(setting: Setting, seeds: Sequence[int], stored: Sequence[Outcome]) -> bool:
    """Whether every seed has the outcomes of the last task, or has diverged."""
    last = setting.stream.tasks - 1
    wanted = {"run", "control"} if setting.has_control(last) else {"run"}
    for seed in seeds:
        own = [o for o in stored if o.seed == seed]
        lost = any(o.status == DIVERGED and o.network == "run" for o in own)
        if not lost and {o.network for o in own if o.task == last} != wanted:
            return False
    return True
