"""The examples that belong to each checkpoint of a training run: its current task, the next one, or random labels."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.errors import CheckpointError, DataError, UnknownNameError, UsageError
from plasticity_probe.material import Material
from plasticity_probe.network.examples import Examples, keep
from plasticity_probe.references import is_reference
from plasticity_probe.trace.layout import Row
from plasticity_probe.trace.outcome_rows import rows_of_outcomes
from plasticity_probe.training.run_folder import Manifest, checkpoint_path, read_manifest, stored_outcomes
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.settings import written
from plasticity_probe.training.sources import load_source, source_sha256
from plasticity_probe.training.standing import ON, On, Standing, run_folders, standing_of
from plasticity_probe.training.tasks import Source, Task

T = TypeVar("T")
WORDS: Mapping[On, str] = {
    "current": "the task under way or learned last",
    "next": "the task that comes next",
    "noise": "the inputs of the task under way or learned last, with random labels",
}


@dataclass(frozen=True, eq=False)
class RunTasks:
    """A training run as data for measurements: its tasks are rebuilt from its manifest.

    "current" is the task that is being learned or was learned last, at the start of a run the first one. "next" is the first task that no
    update was made on yet; a checkpoint at the start of a task holds the weights that the task before left, and Lewandowski et al. 2023 measure
    curvature there, at the beginning of each task. "noise" is the inputs of the current task with labels drawn uniformly and independently, as
    in the random-label tasks of Kumar et al. 2023, section 5: nothing learned before can help. To measure on it is our choice, and so is that
    targets that are values change places instead, which keeps their distribution.

    Of a large task a random subset is measured. Tasks of one size get the same one, whatever they are measured on, so that what differs
    between two measurements is never the subset (our choice).

    Args:
        folder: The run folder.
        manifest: What was trained.
        source: The examples that its tasks are made of.
        on: Which task each checkpoint is measured on.
        examples: Measure on at most this many of a task's examples.
        seed: Seed of their choice and of random labels.
        paths: The checkpoints in order, also those that cannot be read.
        standings: Where those of them that can be read stand, in order.
        left_out: Number of checkpoints left out, because the stream has no task for them.
    """

    folder: Path
    manifest: Manifest
    source: Source | None
    on: On
    examples: int
    seed: int
    paths: tuple[Path, ...]
    standings: Mapping[Path, Standing]
    left_out: int
    _latest: dict[str, tuple[tuple[int, ...], Any]] = field(default_factory=dict, repr=False)

    def material(self, path: Path) -> Material:
        """The examples that a checkpoint is measured on.

        Args:
            path: The checkpoint.

        Raises:
            DataError: It does not say where it stands in this run.
        """
        known = self._standing(path)
        index = known.task_for(self.on)
        return self._once("material", (known.seed, index), lambda: self._material(known.seed, index))

    def initial(self, path: Path) -> dict[str, Tensor] | None:
        """The weights at the start of the run that a checkpoint belongs to; None where they were not kept or cannot be read.

        Args:
            path: The checkpoint.

        Raises:
            DataError: It does not say where it stands in this run.
        """
        seed = self._standing(path).seed
        return self._once("initial", (seed,), lambda: _state(checkpoint_path(self.folder, seed, 0)))

    @property
    def last(self) -> Path:
        """The last checkpoint that can be read."""
        return list(self.standings)[-1]

    @property
    def description(self) -> str:
        """Where the examples come from, and how many checkpoints were left out."""
        text = f"{self.manifest.data}; stream {self.manifest.setting.stream.name}, each checkpoint on {WORDS[self.on]}"
        if not self.left_out:
            return text
        noun = "checkpoint" if self.left_out == 1 else "checkpoints"
        return f"{text}; {self.left_out} {noun} at the end of the stream left out, where no task comes next"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these examples from others, as settings of a measurement."""
        return {"on": self.on, **self.outcome_settings, "examples": self.examples}

    @property
    def outcome_settings(self) -> dict[str, Any]:
        """What is the same for the outcomes of all runs that differ in their seeds alone."""
        text = dumps([written(self.manifest.setting), self.manifest.source_sha256], sort_keys=True)
        return {"run_sha256": sha256(text.encode()).hexdigest()}

    def seed_of(self, path: Path) -> int:
        """The seed of the run that a checkpoint belongs to.

        Args:
            path: The checkpoint.

        Raises:
            DataError: It does not say where it stands in this run.
        """
        return self._standing(path).seed

    def outcomes(self, runs: Mapping[int, str]) -> list[Row]:
        """What became of the tasks of runs, as rows of a trace; none where the folder holds no outcomes.

        Args:
            runs: For each seed the name of its run.
        """
        setting = self.manifest.setting
        about = {
            "configuration": self.folder.resolve().name,
            "protocol": self.manifest.protocol,
            "stream": setting.stream.name,
            "network": str(setting.network.get("name", "")),
            "remedies": ", ".join(remedy.name for remedy in setting.remedies) or "none",
        }
        return rows_of_outcomes(stored_outcomes(self.folder), runs, self.outcome_settings, about)

    def _standing(self, path: Path) -> Standing:
        return self.standings.get(path) or standing_of(path, self.manifest)

    def _once(self, kind: str, key: tuple[int, ...], make: Callable[[], T]) -> T:
        """The latest result of a kind is kept: checkpoints of one seed and task follow one another, and tasks can be large."""
        if kind not in self._latest or self._latest[kind][0] != key:
            self._latest.pop(kind, None)
            self._latest[kind] = key, make()
        return self._latest[kind][1]

    def _material(self, seed: int, index: int) -> Material:
        task = self.manifest.setting.stream.task(self.source, index, seed)
        targets = self._random_targets(task, seed) if self.on == "noise" else task.targets
        chosen = self._subset(task.inputs, targets, seed)
        # Elsewhere the measured examples are not what was learned, so there is nothing that held-out ones could be compared with.
        learned = self.on == "current"
        unseen = None
        if learned and task.test_inputs is not None and task.test_targets is not None:
            unseen = self._subset(task.test_inputs, task.test_targets, seed)
        return Material(chosen, chosen if learned else None, unseen, None, self.description)

    def _subset(self, inputs: Tensor, targets: Tensor, seed: int) -> Examples:
        # Growing streams are ordered by arrival, others by class; probes take the first examples, so these must be a random sample.
        order = torch.randperm(len(targets), generator=generator(self.seed, "measured examples", seed))[: self.examples]
        return keep([(inputs[order], targets[order])])

    def _random_targets(self, task: Task, seed: int) -> Tensor:
        draws = generator(self.seed, "noise", seed, task.index)
        if task.targets.dtype != torch.int64:
            return task.targets[torch.randperm(len(task.targets), generator=draws)]
        classes = self.manifest.setting.stream.outputs(self.source)
        return torch.randint(classes, task.targets.shape, generator=draws)


def run_tasks(
    paths: Sequence[Path],
    on: str,
    examples: int,
    *,
    seed: int = 0,
    data_root: str | Path | None = None,
    download: bool = False,
    trust_code: bool = False,
) -> RunTasks:
    """A training run as data.

    Args:
        paths: Checkpoints of one run, in order.
        on: "current", "next" or "noise".
        examples: Measure on at most this many examples of a task.
        seed: Seed of their choice and of random labels.
        data_root: Folder of the named data sets.
        download: Fetch a named data set that is not there.
        trust_code: Whether a function that the run folder names as its data may be called.

    Raises:
        UnknownNameError: A task that is none of the three.
        UsageError: Checkpoints of several runs or of none, or none that has such a task.
        DataError: The data is missing, would need code to run, or is not the one that the run was trained on.
        RunError: The run folder is damaged.
        CheckpointError: No checkpoint can be read.
    """
    if on not in ON:
        raise UnknownNameError("task to measure on", on, ON)
    folder = _only_folder(paths)
    manifest = read_manifest(folder)
    source = _source(folder, manifest, data_root, download, trust_code)
    standings: dict[Path, Standing] = {}
    for path in paths:
        # One bad file of a series becomes a status when its turn comes.
        with suppress(DataError):
            standings[path] = standing_of(path, manifest)
    if not standings:
        read_checkpoint(paths[0])
        standing_of(paths[0], manifest)
    last = manifest.setting.stream.tasks - 1
    beyond = {path for path, known in standings.items() if known.task_for(on) > last}
    if beyond and _goes_on(manifest, source):
        beyond = set()
    measured = {path: known for path, known in standings.items() if path not in beyond}
    if not measured:
        raise UsageError(
            "these checkpoints stand at the end of their stream, where no task comes next; measure on current"
        )
    kept = tuple(path for path in paths if path not in beyond)
    return RunTasks(folder, manifest, source, on, examples, seed, kept, measured, len(beyond))


def _only_folder(paths: Sequence[Path]) -> Path:
    folders = run_folders(paths)
    if folders == {None}:
        raise UsageError(
            "these checkpoints belong to no training run, so their data must be named (--data), such as mnist"
        )
    if len(folders) > 1:
        names = ", ".join(sorted(str(folder) if folder else "files of no run" for folder in folders))
        raise UsageError(
            f"checkpoints of several runs cannot be measured together ({names}); name one run, or data for all of them with --data"
        )
    (folder,) = (folder for folder in folders if folder is not None)
    return folder


def _source(
    folder: Path, manifest: Manifest, data_root: str | Path | None, download: bool, trust_code: bool
) -> Source | None:
    name = manifest.setting.data.name
    if is_reference(name) and not trust_code:
        raise DataError(
            f"{folder} was trained on data that the function {name} makes, and no code that a run folder names is run unasked; allow it with "
            "--trust-pickle if you made this run, or name data with --data"
        )
    try:
        source = load_source(manifest.setting.data, root=data_root, download=download)
    except (DataError, UnknownNameError) as error:
        raise DataError(
            f"the data that {folder} was trained on cannot be read: {error}; or name other data with --data"
        ) from error
    if source_sha256(source) != manifest.source_sha256:
        raise DataError(
            f"the data {name!r} found here is not what {folder} was trained on (other bytes); name its folder with --data-root, or measure on "
            "data of your own with --data"
        )
    return source


def _goes_on(manifest: Manifest, source: Source | None) -> bool:
    stream = manifest.setting.stream
    try:
        stream.task(source, stream.tasks, manifest.seeds[0])
    except UsageError:
        return False
    return True


def _state(path: Path) -> dict[str, Tensor] | None:
    try:
        return read_checkpoint(path).state
    except CheckpointError:
        return None
