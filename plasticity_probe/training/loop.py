"""Trains networks through a stream of tasks, keeps their weights, and records how every task went, beside a fresh network's.

One loop for every setting: what differs between settings is data (`plasticity_probe.training.settings.Setting`). Nothing random carries a state
from one epoch to the next (`plasticity_probe.training.seeding`), so a run that was killed goes on to the same weights, bit for bit on a CPU with
the same number of threads.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.training import run_folder
from plasticity_probe.training.batches import Resident, batches, log_spaced, resident, updates_of
from plasticity_probe.training.models import Blueprint, blueprint
from plasticity_probe.training.networks import ManyNetworks, Networks, OneNetwork, example_losses, hits, reproducible
from plasticity_probe.training.outcomes import DIVERGED, OK, Outcome, as_json, outcome_of
from plasticity_probe.training.remedies.remedy import Memory, Moment
from plasticity_probe.training.run_folder import Manifest
from plasticity_probe.training.seeding import derived_seed
from plasticity_probe.training.settings import Setting
from plasticity_probe.training.sources import load_source, source_sha256
from plasticity_probe.training.tasks import Source

EVALUATED_TOGETHER = 1024
"""Examples of each network in a pass that only evaluates (our choice: bounds the memory; the result does not depend on it)."""
SAVE_EVERY = 30.0
"""Seconds of training that a kill may cost (our choice); it decides no result."""
MOST_TOGETHER = 64
"""Seeds trained as one program at most (our choice: more fill memory and gain no speed)."""

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


@dataclass(frozen=True)
class Place:
    """Where a group of seeds stands: before the first update on a task, or after an epoch of it.

    Args:
        task: The task.
        phase: Whether the run itself or its control is being trained on it.
        epoch: Epochs of the task that are over.
        updates: Updates on the task.
        step: Updates of the run itself since it began.
    """

    task: int = 0
    phase: Literal["run", "control"] = "run"
    epoch: int = 0
    updates: int = 0
    step: int = 0


@dataclass(eq=False)
class Learner:
    """Networks under training and what the remedies remember of them."""

    networks: Networks
    memories: list[Memory]


@dataclass(eq=False)
class Tally:
    """What has been seen of the task under way, (S,) float64 each."""

    sums: dict[str, Tensor]
    reached: bool = False

    @classmethod
    def empty(cls, count: int, device: torch.device) -> "Tally":
        """Nothing seen yet."""
        names = ("seen", "right", "loss", "first_seen", "first_loss", "tests", "test_right", "test_loss")
        sums = {name: torch.zeros(count, dtype=torch.float64, device=device) for name in names}
        return cls({**sums, "threshold": torch.full((count,), math.nan, dtype=torch.float64, device=device)})


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
    chosen = tuple(dict.fromkeys(seeds))
    if not chosen or min(chosen) < 0:
        raise UsageError(f"a run needs at least one seed, each from 0 on; got {list(chosen)}")
    source = load_source(setting.data, root=data_root, download=download)
    drawn = _blueprint(setting, source, chosen[0])
    size = min(len(chosen), MOST_TOGETHER) if together is None and vectorised(setting, drawn) else together or 1
    where = torch.device(device)
    described = source.description if source is not None else f"examples of the stream {setting.stream.name} itself"
    manifest = Manifest(
        protocol, setting, chosen, size, drawn.architecture, described, source_sha256(source), where.type
    )
    folder = Path(out)
    run_folder.open_run(folder, manifest, resume=resume)
    with run_folder.alone(folder):
        for part in run_folder.leftovers(folder):
            part.unlink(missing_ok=True)
        run_folder.check_room(folder, announced_bytes(setting, drawn, len(chosen), size))
        groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        for number, group in enumerate(groups):
            progress = _Progress(setting, number, len(groups), report)
            _Course(folder, manifest, source, drawn, group, where, save_every, progress).carry_out()
    return Run(folder, manifest, run_folder.stored_outcomes(folder))


def vectorised(setting: Setting, drawn: Blueprint) -> bool:
    """Whether many seeds are trained as one program unless the caller says otherwise: small networks of linear layers, in tasks of one size.

    Args:
        setting: The setting.
        drawn: Its network.
    """
    training = setting.training
    small = str(drawn.architecture["name"]).startswith("mlp")
    return small and training.until is None and setting.stream.equal_sizes


def announced_bytes(setting: Setting, drawn: Blueprint, seeds: int, together: int) -> int:
    """The most that a run adds to the disk: its checkpoints, and the state of one group twice while it is being replaced.

    Args:
        setting: The setting.
        drawn: Its network.
        seeds: Number of seeds.
        together: Seeds in a group.
    """
    with torch.device("meta"):
        network = drawn.build()
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values()) + 4096
    starts = sum(setting.has_checkpoints(task) for task in range(setting.stream.tasks + 1))
    files = starts * (1 + setting.inside + bool(setting.remedies))
    # Weights, two moments, and for each remedy up to two copies of the weights; the same once more for a control under way.
    state = weights * (3 + 2 * len(setting.remedies)) * 2 * together
    return seeds * files * weights + 2 * state


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
    manifest: Manifest
    source: Source | None
    drawn: Blueprint
    seeds: tuple[int, ...]
    device: torch.device
    save_every: float
    progress: _Progress
    outcomes: list[Outcome] = field(default_factory=list)
    place: Place = Place()
    tally: Tally | None = None
    control: Learner | None = None
    saved: float = field(default_factory=time.monotonic)

    @property
    def setting(self) -> Setting:
        """What is trained."""
        return self.manifest.setting

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
        self.learner = _learner(self.setting, self.drawn, self.seeds, self.device)
        self._take_up()
        while self.place.task < self.setting.stream.tasks and len(self.lost) < len(self.seeds):
            task = self.place.task
            held = resident([self.setting.stream.task(self.source, task, seed) for seed in self.seeds], self.device)
            if self.place.phase == "run":
                self._run(held)
            if self.place.phase == "control":
                self._control(held)
        run_folder.drop_state(self.folder, self.name)

    def _run(self, held: Resident) -> None:
        task = self.place.task
        if self.place.updates == 0:
            self._save(unless_recent=True)
            self._begin(held)
        points = log_spaced(self._most_updates(held), self.setting.inside) if self.setting.has_checkpoints(task) else ()

        def after_update(place: Place) -> None:
            self.place = place
            if place.updates in points:
                self._checkpoint()

        tally = self.tally = self.tally or Tally.empty(len(self.seeds), self.device)
        self.place = fit(
            self.learner, held, self.setting, self.seeds, self.place, tally, after_update, self._after_epoch
        )
        self._record(held, self.learner, tally)
        self.tally = None
        controlled = self.setting.has_control(task)
        if controlled:
            self.place = Place(task, "control", step=self.place.step)
        else:
            self._finish_task()

    def _control(self, held: Resident) -> None:
        if self.control is None:
            alone = [derived_seed(seed, "control", self.place.task) for seed in self.seeds]
            self.control = _learner(self.setting, self.drawn, alone, self.device)
        tally = self.tally = self.tally or Tally.empty(len(self.seeds), self.device)
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

    def _most_updates(self, held: Resident) -> int:
        training = self.setting.training
        return training.epochs_of(self.place.task) * updates_of(held.size, training.batch)

    def _after_epoch(self, place: Place) -> None:
        self.place = place
        text = f"task {place.task}" + (" (control)" if place.phase == "control" else "")
        self.progress.show(place, self.setting.training.epochs_of(place.task), text)
        self._save(unless_recent=True)

    def _checkpoint(self, remedied: bool = False) -> None:
        """Keeps the weights of every seed that has not diverged."""
        networks, at = self.learner.networks, self.place
        sound = finite(networks).tolist()
        for index, seed in enumerate(self.seeds):
            if seed in self.lost or not sound[index]:
                continue
            metadata = {
                "run": run_folder.run_name(self.folder, seed),
                "protocol": self.manifest.protocol,
                "seed": seed,
                "step": at.step,
                "task": at.task,
                "updates": at.updates,
                "remedied": remedied,
                "architecture": dict(self.drawn.architecture),
            }
            path = run_folder.checkpoint_path(self.folder, seed, at.step, remedied)
            run_folder.save_weights(path, networks.state_of(index), metadata)

    def _record(self, held: Resident, learner: Learner, tally: Tally) -> None:
        found = _outcomes(held, learner, self.seeds, self.place, tally)
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

    def _save(self, *, unless_recent: bool) -> None:
        if unless_recent and time.monotonic() - self.saved < self.save_every:
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
        tensors, known = run_folder.to_device(found[0], self.device), found[1]
        self.outcomes = [outcome_of(entry) for entry in known.pop("outcomes")]
        reached = known.pop("reached")
        self.place = Place(**known)
        _remember(self.learner, tensors, "run")
        if any(name.startswith("control/") for name in tensors):
            alone = [derived_seed(seed, "control", self.place.task) for seed in self.seeds]
            self.control = _learner(self.setting, self.drawn, alone, self.device)
            _remember(self.control, tensors, "control")
        sums = {name.removeprefix("tally/"): t for name, t in tensors.items() if name.startswith("tally/")}
        self.tally = Tally(sums, reached) if sums else None


def fit(
    learner: Learner,
    held: Resident,
    setting: Setting,
    seeds: Sequence[int],
    place: Place,
    tally: Tally,
    after_update: Callable[[Place], None] | None = None,
    after_epoch: Callable[[Place], None] | None = None,
) -> Place:
    """Trains networks on one task from wherever they stand to its end.

    Args:
        learner: The networks, changed in place.
        held: The examples of the task.
        setting: How to train.
        seeds: Seeds of the order of the examples, one a network.
        place: Where training stands.
        tally: What has been seen of the task; changed in place.
        after_update: Called after every update.
        after_epoch: Called after every epoch.

    Returns:
        Where training stands then.
    """
    training, networks = setting.training, learner.networks
    acting = [*zip(setting.remedies, learner.memories, strict=True)]
    wanted = any(remedy.features for remedy in setting.remedies)
    epochs, each = training.epochs_of(place.task), updates_of(held.size, training.batch)
    own = int(place.phase == "run")
    while place.epoch < epochs and not tally.reached:
        losses: list[Tensor] = []
        right: list[Tensor] = []
        with reproducible(derived_seed(seeds[0], f"{place.phase} epoch", place.task, place.epoch)):
            epoch = batches(held, seeds, place.epoch, epochs, training.batch, training.augmentation)
            for number, (inputs, targets) in enumerate(epoch, start=1):
                learned = networks.learn(inputs, targets, features=wanted)
                for remedy, memory in acting:
                    remedy.add_gradient(networks, memory)
                if training.clip is not None:
                    clip(networks, training.clip)
                for group in networks.optimizer.param_groups:
                    group["lr"] = training.step_size(place.epoch, number / each)
                networks.optimizer.step()
                place = replace(place, updates=place.updates + 1, step=place.step + own)
                if acting:
                    at = Moment(
                        networks.seeds,
                        place.task,
                        place.epoch,
                        place.step if own else place.updates,
                        held.tasks,
                        training.batch,
                    )
                    for remedy, memory in acting:
                        remedy.after_step(networks, memory, at, learned.features)
                losses.append(learned.losses)
                right.append(hits(learned.outputs, targets))
                if after_update is not None:
                    after_update(place)
            place = replace(place, epoch=place.epoch + 1)
            for remedy, memory in acting:
                at = Moment(
                    networks.seeds,
                    place.task,
                    place.epoch,
                    place.step if own else place.updates,
                    held.tasks,
                    training.batch,
                )
                remedy.after_epoch(networks, memory, at)
        _count(tally, torch.cat(losses, 1), torch.cat(right, 1), place, training.threshold)
        score = tally.sums["epoch_right"]
        tally.reached = training.until is not None and bool((score >= training.until).all())
        if len(seeds) == 1 and not math.isfinite(float(tally.sums["loss"])):
            tally.reached = True
        if held.test_inputs is not None and (tally.reached or place.epoch > epochs - training.test_last):
            _test(networks, held, tally)
        if after_epoch is not None:
            after_epoch(place)
    return place


@torch.no_grad()
def clip(networks: Networks, largest: float) -> None:
    """Shortens each network's gradient to a largest norm.

    Args:
        networks: The networks, whose gradients are changed in place.
        largest: The norm that no gradient shall exceed.
    """
    gradients = networks.gradients
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients.values()])
    scale = (largest / squares.sum(0).sqrt().clamp(min=torch.finfo(squares.dtype).tiny)).clamp(max=1)
    for gradient in gradients.values():
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.ndim - 1)))


def finite(networks: Networks) -> Tensor:
    """Whether all weights of each network are finite, (S,) bool.

    Args:
        networks: The networks.
    """
    return torch.stack([weight.flatten(1).isfinite().all(1) for weight in networks.weights.values()]).all(0)


@torch.no_grad()
def evaluate(networks: Networks, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and share of examples predicted rightly of each network, in eval mode, (S,) float64 each.

    Args:
        networks: The networks.
        inputs: (S, N, ...).
        targets: (S, N, ...).
    """
    loss = right = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    for some, answers in zip(inputs.split(EVALUATED_TOGETHER, 1), targets.split(EVALUATED_TOGETHER, 1), strict=True):
        outputs = networks.outputs(some)
        each = [example_losses(output, answer) for output, answer in zip(outputs, answers, strict=True)]
        loss = loss + torch.stack(each).double().sum(1)
        right = right + hits(outputs, answers).double().sum(1)
    return loss / targets.shape[1], right / targets.shape[1]


def _count(tally: Tally, losses: Tensor, right: Tensor, place: Place, threshold: float) -> None:
    sums, count = tally.sums, losses.shape[1]
    loss, hit = losses.double().sum(1), right.double().sum(1)
    sums["seen"] = sums["seen"] + count
    sums["loss"], sums["right"] = sums["loss"] + loss, sums["right"] + hit
    if place.epoch == 1:
        sums["first_loss"], sums["first_seen"] = loss, sums["seen"].clone()
    sums["epoch_right"] = hit / count
    learned = torch.where(hit.isnan(), loss / count <= threshold, hit / count >= threshold)
    now = learned & sums["threshold"].isnan()
    sums["threshold"] = torch.where(now, torch.full_like(loss, place.updates), sums["threshold"])


def _test(networks: Networks, held: Resident, tally: Tally) -> None:
    assert held.test_inputs is not None
    assert held.test_targets is not None
    loss, right = evaluate(networks, held.test_inputs, held.test_targets)
    for name, value in (("test_loss", loss), ("test_right", right), ("tests", torch.ones_like(loss))):
        tally.sums[name] = tally.sums[name] + value


def _outcomes(held: Resident, learner: Learner, seeds: Sequence[int], place: Place, tally: Tally) -> list[Outcome]:
    loss, right = evaluate(learner.networks, held.inputs, held.targets)
    sound = finite(learner.networks) & loss.isfinite()
    sums = tally.sums
    numbers = {
        "loss": loss,
        "accuracy": right,
        "online_loss": sums["loss"] / sums["seen"],
        "online_accuracy": sums["right"] / sums["seen"],
        "first_epoch_loss": sums["first_loss"] / sums["first_seen"],
        "updates_to_threshold": sums["threshold"],
        "test_loss": sums["test_loss"] / sums["tests"],
        "test_accuracy": sums["test_right"] / sums["tests"],
    }
    rows = {name: torch.where(sound, value, math.nan).tolist() for name, value in numbers.items()}
    return [
        Outcome(
            seed=seed,
            task=place.task,
            name=held.tasks[index].name,
            network=place.phase,
            status=OK if sound[index] else DIVERGED,
            step=place.step,
            updates=place.updates,
            epochs=place.epoch,
            **{name: values[index] for name, values in rows.items()},
        )
        for index, seed in enumerate(seeds)
    ]


def _blueprint(setting: Setting, source: Source | None, seed: int) -> Blueprint:
    task = setting.stream.task(source, 0, seed)
    return blueprint(setting.architecture, task.inputs[0], setting.stream.outputs(source))


def _learner(setting: Setting, drawn: Blueprint, seeds: Sequence[int], device: torch.device) -> Learner:
    training = setting.training
    if len(seeds) == 1:
        networks: Networks = OneNetwork(
            drawn.build,
            seeds[0],
            training.make_optimizer,
            device,
            bf16=training.bf16,
            channels_last=training.channels_last,
        )
    else:
        networks = ManyNetworks(drawn.build, seeds, training.make_optimizer, device)
    return Learner(networks, [remedy.start(networks) for remedy in setting.remedies])


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
