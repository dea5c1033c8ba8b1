"""Trains networks through a stream of tasks, keeps their weights, and records how every task went, beside a fresh network's.

One loop for every setting: what differs between settings is data (`plasticity_probe.training.settings.Setting`). Nothing random carries a state
from one epoch to the next (`plasticity_probe.training.seeding`), so a run that was killed goes on to the same weights, bit for bit on a CPU with
the same number of threads.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plasticity_probe.training import run_folder
from plasticity_probe.training.batches import Resident, log_spaced, resident, updates_of
from plasticity_probe.training.fitting import Learner, Place, Tally, finite, fit, new_learner, outcomes_of
from plasticity_probe.training.outcomes import DIVERGED, Outcome, as_json, outcome_of
from plasticity_probe.training.remedies.remedy import Moment
from plasticity_probe.training.run_folder import Manifest
from plasticity_probe.training.run_plan import RunPlan, plan_run
from plasticity_probe.training.seeding import derived_seed
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
    folder = Path(out)
    run_folder.open_run(folder, plan.manifest, resume=resume)
    with run_folder.alone(folder):
        for part in run_folder.leftovers(folder):
            part.unlink(missing_ok=True)
        run_folder.check_room(folder, plan.bytes)
        for number, group in enumerate(plan.groups):
            progress = _Progress(setting, number, len(plan.groups), report)
            _Course(folder, plan, group, save_every, progress).carry_out()
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
class _Course:
    """One group of seeds on its way through the stream."""

    folder: Path
    plan: RunPlan
    seeds: tuple[int, ...]
    save_every: float
    progress: _Progress
    outcomes: list[Outcome] = field(default_factory=list)
    place: Place = field(default_factory=Place)
    tally: Tally | None = None
    control: Learner | None = None
    saved: float = field(default_factory=time.monotonic)

    @property
    def setting(self) -> Setting:
        """What is trained."""
        return self.plan.setting

    @property
    def name(self) -> str:
        """Name of this group's state."""
        return run_folder.group_name(self.seeds)

    @property
    def lost(self) -> set[int]:
        """Seeds that have diverged."""
        return {o.seed for o in self.outcomes if o.status == DIVERGED and o.network == "run"}

    def carry_out(self) -> None:
        """Trains to the end of the stream."""
        stored = [o for o in run_folder.stored_outcomes(self.folder) if o.seed in self.seeds]
        if self._finished(stored):
            run_folder.drop_state(self.folder, self.name)
            return
        self.learner = new_learner(self.setting, self.plan.drawn, self.seeds, self.plan.device)
        self._take_up()
        while self.place.task < self.setting.stream.tasks and len(self.lost) < len(self.seeds):
            task = self.place.task
            held = resident(
                [self.setting.stream.task(self.plan.source, task, seed) for seed in self.seeds], self.plan.device
            )
            if self.place.phase == "run":
                self._run(held)
            if self.place.phase == "control":
                self._control(held)
        run_folder.drop_state(self.folder, self.name)

    def _run(self, held: Resident) -> None:
        task = self.place.task
        if self.place.updates == 0:
            self._save_if_due()
            self._begin(held)
        points = self._points(held)

        def after_update(place: Place) -> None:
            self.place = place
            if place.updates in points:
                self._checkpoint()

        tally = self.tally = self.tally or Tally.empty(len(self.seeds), self.plan.device)
        self.place = fit(
            self.learner, held, self.setting, self.seeds, self.place, tally, after_update, self._after_epoch
        )
        self._record(held, self.learner, tally)
        self.tally = None
        if self.setting.has_control(task):
            self.place = Place(task, "control", step=self.place.step)
        else:
            self._finish_task()

    def _control(self, held: Resident) -> None:
        if self.control is None:
            alone = [derived_seed(seed, "control", self.place.task) for seed in self.seeds]
            self.control = new_learner(self.setting, self.plan.drawn, alone, self.plan.device)
        tally = self.tally = self.tally or Tally.empty(len(self.seeds), self.plan.device)
        self.place = fit(self.control, held, self.setting, self.seeds, self.place, tally, None, self._after_epoch)
        self._record(held, self.control, tally)
        self.tally = self.control = None
        self._finish_task()

    def _finish_task(self) -> None:
        self.place = Place(self.place.task + 1, step=self.place.step)
        # The last weights come before the outcomes, so that a run whose outcomes are all there is whole.
        if self.place.task == self.setting.stream.tasks and self.setting.has_checkpoints(self.place.task):
            self._checkpoint()
        others = [o for o in run_folder.stored_outcomes(self.folder) if o.seed not in self.seeds]
        run_folder.store_outcomes(self.folder, [*others, *self.outcomes])

    def _begin(self, held: Resident) -> None:
        """Keeps the weights that the task before left, and lets the remedies act."""
        task, networks = self.place.task, self.learner.networks
        kept = self.setting.has_checkpoints(task)
        if kept:
            self._checkpoint()
        if task == 0 or not self.setting.remedies:
            return
        before = {name: weight.clone() for name, weight in networks.weights.items()} if kept else {}
        moment = self._moment(held)
        for remedy, memory in zip(self.setting.remedies, self.learner.memories, strict=True):
            remedy.before_task(networks, memory, moment)
        if any(not torch.equal(weight, networks.weights[name]) for name, weight in before.items()):
            self._checkpoint(remedied=True)

    def _moment(self, held: Resident) -> Moment:
        at = self.place
        return Moment(self.seeds, at.task, at.epoch, at.step, held.tasks, self.setting.training.batch)

    def _points(self, held: Resident) -> frozenset[int]:
        """The updates of this task after which weights are kept."""
        training, task = self.setting.training, self.place.task
        most = training.epochs_of(task) * updates_of(held.size, training.batch)
        return log_spaced(most, self.setting.inside) if self.setting.has_checkpoints(task) else frozenset()

    def _after_epoch(self, place: Place) -> None:
        self.place = place
        text = f"task {place.task}" + (" (control)" if place.phase == "control" else "")
        self.progress.show(place, self.setting.training.epochs_of(place.task), text)
        self._save_if_due()

    def _checkpoint(self, remedied: bool = False) -> None:
        """Keeps the weights of every seed that has not diverged."""
        networks, at = self.learner.networks, self.place
        sound = finite(networks).tolist()
        for index, seed in enumerate(self.seeds):
            if seed in self.lost or not sound[index]:
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

    def _record(self, held: Resident, learner: Learner, tally: Tally) -> None:
        found = outcomes_of(held, learner, self.seeds, self.place, tally)
        self.outcomes += [outcome for outcome in found if outcome.seed not in self.lost]

    def _finished(self, stored: Sequence[Outcome]) -> bool:
        last = self.setting.stream.tasks - 1
        wanted = {"run", "control"} if self.setting.has_control(last) else {"run"}
        for seed in self.seeds:
            own = [o for o in stored if o.seed == seed]
            lost = any(o.status == DIVERGED and o.network == "run" for o in own)
            if not lost and {o.network for o in own if o.task == last} != wanted:
                return False
        return True

    def _save_if_due(self) -> None:
        if time.monotonic() - self.saved < self.save_every:
            return
        tensors = _named(self.learner, "run")
        if self.control is not None:
            tensors |= _named(self.control, "control")
        tally = {} if self.tally is None else self.tally.sums
        place: dict[str, Any] = {
            **vars(self.place),
            "outcomes": [as_json(outcome) for outcome in self.outcomes],
            "reached": self.tally is not None and self.tally.reached,
        }
        run_folder.save_state(self.folder, self.name, tensors | {f"tally/{k}": v for k, v in tally.items()}, place)
        self.saved = time.monotonic()

    def _take_up(self) -> None:
        """Goes on from the state that an interrupted process left, if it did."""
        found = run_folder.load_state(self.folder, self.name)
        if found is None:
            return
        tensors, known = run_folder.to_device(found[0], self.plan.device), found[1]
        self.outcomes = [outcome_of(entry) for entry in known.pop("outcomes")]
        reached = known.pop("reached")
        self.place = Place(**known)
        _remember(self.learner, tensors, "run")
        if any(name.startswith("control/") for name in tensors):
            alone = [derived_seed(seed, "control", self.place.task) for seed in self.seeds]
            self.control = new_learner(self.setting, self.plan.drawn, alone, self.plan.device)
            _remember(self.control, tensors, "control")
        sums = {name.removeprefix("tally/"): t for name, t in tensors.items() if name.startswith("tally/")}
        self.tally = Tally(sums, reached) if sums else None


def _named(learner: Learner, prefix: str) -> dict[str, Tensor]:
    held = {f"{prefix}/networks/{name}": tensor for name, tensor in learner.networks.memory().items()}
    for number, memory in enumerate(learner.memories):
        held |= {f"{prefix}/remedies/{number}/{name}": tensor for name, tensor in memory.items()}
    return held


def _remember(learner: Learner, tensors: dict[str, Tensor], prefix: str) -> None:
    own = {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
    learner.networks.remember({n.removeprefix("networks/"): t for n, t in own.items() if n.startswith("networks/")})
    for number, memory in enumerate(learner.memories):
        start = f"remedies/{number}/"
        memory.update({name.removeprefix(start): t for name, t in own.items() if name.startswith(start)})
