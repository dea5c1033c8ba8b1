"""What is to be measured: checkpoints, data and probes, resolved and checked before any work is done."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plasticity_probe import registry
from plasticity_probe.checkpoints.architectures import (
    Architecture,
    Loaded,
    architecture_named,
    identify,
    load_network,
    named_architectures,
)
from plasticity_probe.checkpoints.formats import CheckpointFile, read_checkpoint
from plasticity_probe.checkpoints.series import find_checkpoints, standing
from plasticity_probe.errors import PlanError, UnknownNameError, UsageError
from plasticity_probe.material import EXAMPLES, Material, Reading, material
from plasticity_probe.measurement import Measurement
from plasticity_probe.network.fresh import fresh_network, reinitialised, settle_batchnorm
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject
from plasticity_probe.probe import Probe, generator_for
from plasticity_probe.record import Checkpoint
from plasticity_probe.references import is_reference, resolve
from plasticity_probe.run_tasks import RunTasks, run_tasks
from plasticity_probe.trace.outcome_rows import OUTCOMES
from plasticity_probe.training.standing import run_folders

Model = nn.Module | str | Path | Sequence[str | Path]
Probes = Mapping[str, Probe[Measurement]]

DECISIVE = ("loss", "mode", "dtype", "parameters", "allow_tf32")
"""Options that change what a number means; the others change how fast it comes."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network that is to be measured.

    Args:
        checkpoint: Where it stands.
        model: The network with its weights.
        build: Makes a freshly initialised one of the same architecture; None where that is unknown.
        notes: What was identified, loaded, missing and unexpected.
        material: Examples of its own, where each checkpoint of a run has another task; None for those of the study.
        initial: Its weights at initialisation, where its run kept them.
    """

    checkpoint: Checkpoint
    model: nn.Module
    build: Callable[[], nn.Module] | None
    notes: tuple[str, ...]
    material: Material | None = None
    initial: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Study:
    """Everything that an analysis needs, resolved.

    Args:
        model: A module, or the paths of its checkpoints in order.
        architecture: Name, reference or function of the network for those paths; None to find it by names and shapes.
        material: The examples.
        probes: Probes by label.
        fresh: How many fresh networks serve as the yardstick.
        seed: Seed of every random draw.
        trust_pickle: Whether code in a checkpoint may run.
        options: What `plasticity_probe.network.subject.subject` takes besides: loss, mode, dtype, device, memory, initial, parameters,
            allow_tf32.
        tasks: The training run that the checkpoints belong to, where each is measured on a task of it.
    """

    model: nn.Module | tuple[Path, ...]
    architecture: str | Callable[[], nn.Module] | None
    material: Material
    probes: Probes
    fresh: int
    seed: int
    trust_pickle: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    tasks: RunTasks | None = None

    @property
    def size(self) -> int:
        """Number of networks that come as checkpoints."""
        return 1 if isinstance(self.model, nn.Module) else len(self.model)

    def networks(self) -> Iterator[Callable[[], Network]]:
        """For each checkpoint in order, a function that reads it; reading is left to the caller, so that one bad file stops none."""
        if isinstance(self.model, nn.Module):
            model = self.model
            yield lambda: _of_module(model)
            return
        for index, path in enumerate(self.model):
            yield lambda index=index, path=path: self._of_file(path, index)

    def subject(self, model: nn.Module) -> Subject:
        """The subject of a network: it with the study's loss, mode and examples."""
        m = self.material
        return subject(
            model, m.examples, seed=self.seed, training=m.training, held_out=m.held_out, noisy=m.noisy, **self.options
        )

    def subject_of(self, network: Network) -> Subject:
        """The subject of a checkpoint: its network with the examples and the initial weights that belong to it.

        Args:
            network: The network.
        """
        initial = self.options.get("initial") or network.initial
        own = replace(self, material=network.material or self.material, options={**self.options, "initial": initial})
        return own.subject(network.model)

    def fresh_subject(self, build: Callable[[], nn.Module], replicate: int) -> Subject:
        """The subject of a freshly initialised network whose BatchNorm statistics come from the study's examples."""
        with isolated():
            # A fresh network is its own initialisation; its distance from the checkpoint's would say nothing.
            without = replace(self, options={**self.options, "initial": None})
            made = without.subject(
                fresh_network(build, generator_for(self.seed, "fresh network", replicate).initial_seed())
            )
            settle_batchnorm(made)
        return made

    def settings(self, label: str) -> dict[str, Any]:
        """What makes two rows of a label comparable: the probe's settings and the conditions it runs under."""
        probe, m = self.probes[label], self.material
        data = {"examples": m.examples, "training": m.training, "held_out": m.held_out} if self.tasks is None else {}
        initial = self.options.get("initial")
        return {
            "probe": probe.name,
            **_plain(probe.settings()),
            **{key: _named(value) for key, value in self.options.items() if value is not None and key in DECISIVE},
            **{f"{key}_sha256": examples.sha256 for key, examples in data.items() if examples is not None},
            **(self.tasks.identity if self.tasks is not None else {}),
            **({"initial_sha256": tensors_sha256(initial)} if initial else {}),
            **({"noisy_sha256": tensors_sha256({"noisy": m.noisy})} if m.noisy is not None else {}),
            "seed": self.seed,
        }

    def _of_file(self, path: Path, index: int) -> Network:
        file = read_checkpoint(path, trust_pickle=self.trust_pickle)
        found = architecture_of(file, self.architecture)
        loaded = load_network(file.state, found.build())
        run, step, task = standing(path, file.metadata, index)
        notes = [f"network: {found.name}" + (" (found by its names and shapes)" if self.architecture is None else "")]
        notes.append(_loaded(loaded))
        place = Checkpoint(run, step, task, str(path), file.sha256)
        if self.tasks is None:
            return Network(place, loaded.model, found.build, tuple(notes))
        own, initial = self.tasks.material(path), self.tasks.initial(path)
        return Network(place, loaded.model, found.build, tuple(notes), own, initial)


def study(
    model: Model,
    data: Any = None,
    *,
    on: str = "current",
    architecture: str | Callable[[], nn.Module] | None = None,
    probes: Sequence[str | Probe[Any]] | Mapping[str, Probe[Any]] | None = None,
    fresh: int = 1,
    examples: int = EXAMPLES,
    split: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    held_out: Any = None,
    noisy: Tensor | None = None,
    data_root: str | Path | None = None,
    download: bool = False,
    seed: int = 0,
    trust_pickle: bool = False,
    **options: Any,
) -> Study:
    """Resolves names and paths, reads the data, and reports every problem of the request at once.

    Args:
        model: A module, a checkpoint file, a folder, or several of those.
        data: A name, a path or a reference (see `plasticity_probe.data.sources.load_data`), a loader, or a `DataSet`. None for the checkpoints
            of a training run, whose folder knows its tasks.
        on: For a training run: "current", "next" or "noise"; see `plasticity_probe.run_tasks.RunTasks`.
        architecture: Network of the checkpoint files: a name, a reference "pkg.module:factory" or "file.py:factory", or a function; None finds
            it by names and shapes.
        probes: Names or probes, or probes by label; by default every registered probe but those whose `default` is False.
        fresh: How many freshly initialised networks are measured beside.
        examples: Read at most this many examples of the split.
        split: Which split of a data set; "train" by default, as the papers measure curvature of the training loss.
        mean: Per-channel mean to subtract; none by default.
        std: Per-channel standard deviation to divide by.
        held_out: Loader of examples the network never saw; by default the data set's other split.
        noisy: Booleans per training example: True where the label is known to be wrong.
        data_root: Folder of the named data sets.
        download: Fetch a named data set that is not there.
        seed: Seed of every random draw.
        trust_pickle: Let code in a checkpoint run, and a function that a run folder names as its data; only for files whose origin is known.
        options: loss, mode, dtype, device, memory, initial, parameters, allow_tf32 (see `plasticity_probe.network.subject.subject`).

    Raises:
        PlanError: Unknown probes or settings that cannot be, all of them at once.
        InputError: Data or checkpoints that cannot be read.
    """
    problems: list[str] = []
    chosen = _attempt(problems, lambda: resolve_probes(probes), {})
    if OUTCOMES in chosen:
        problems.append(
            f"no probe can be labelled {OUTCOMES!r}: a trace holds the outcomes of tasks there; choose another label"
        )
    if fresh < 0 or examples < 1:
        problems.append(f"fresh must be at least 0 and examples at least 1, got {fresh} and {examples}")
    paths = _attempt(problems, lambda: _paths(model), ())
    _attempt(problems, lambda: _check_architecture(architecture), None)
    if data is not None and on != "current":
        problems.append(
            f"measuring on {on!r} needs the tasks of a training run, and here data is named (digits where no other is); leave out --on or --data"
        )
    if data is None and any(value is not None for value in (split, mean, std, held_out, noisy)):
        problems.append(
            "split, mean, std, held_out and noisy belong to data that is named; a run is measured on its own tasks as they were trained"
        )
    if problems:
        raise PlanError(problems)
    if data is None:
        if isinstance(paths, nn.Module):
            raise UsageError(
                "a module belongs to no training run, so its data must be named: a name such as mnist, a loader or a DataSet"
            )
        with isolated():
            run = run_tasks(
                paths, on, examples, seed=seed, data_root=data_root, download=download, trust_code=trust_pickle
            )
            # What stands for the study as a whole, such as the fresh network, is measured on the task of the last checkpoint.
            last = run.material(run.last)
        return Study(run.paths, architecture, last, chosen, fresh, seed, trust_pickle, options, run)
    how = Reading(split, mean, std, examples, seed, held_out, noisy, data_root, download)
    with isolated():
        read = material(data, how)
    return Study(paths, architecture, read, chosen, fresh, seed, trust_pickle, options)


def is_run(model: Any) -> bool:
    """Whether checkpoints belong to training runs, so that their data need not be named.

    Args:
        model: What is to be measured: a checkpoint file, a folder, or several of those.

    Raises:
        CheckpointError: There is no such file, or no checkpoint in a folder.
    """
    paths = _paths(model)
    return not isinstance(paths, nn.Module) and run_folders(paths) != {None}


def resolve_probes(probes: Sequence[str | Probe[Any]] | Mapping[str, Probe[Any]] | None) -> Probes:
    """Probes by label: names are looked up among the registered ones, probes stand under their own name.

    Args:
        probes: Names or probes, or probes by label; None for every registered probe but those whose `default` is False.

    Raises:
        UnknownNameError: No such probe.
        UsageError: Two probes would have one label.
    """
    if isinstance(probes, Mapping):
        return dict(probes)
    if probes is None:
        found = {name: kind() for name, kind in registry.load_all(registry.PROBES).items() if kind.default}
        return dict(sorted(found.items(), key=lambda entry: ORDER.index(entry[0]) if entry[0] in ORDER else len(ORDER)))
    made = [registry.load(registry.PROBES, probe)() if isinstance(probe, str) else probe for probe in probes]
    labels = [probe.name for probe in made]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UsageError(f"the probe {twice[0]!r} is there twice; give labels: probes={{'label': probe, ...}}")
    return dict(zip(labels, made, strict=True))


ORDER = (
    "performance",
    "hessian_spectrum",
    "fisher_rank",
    "feature_rank",
    "dead_units",
    "weight_norms",
    "gradient_norms",
    "memorization",
    "readiness",
    "trainability",
)
"""Order of this package's probes in a table; others follow."""


def architecture_of(file: CheckpointFile, wanted: str | Callable[[], nn.Module] | None) -> Architecture:
    """The network that a checkpoint's weights belong to.

    Args:
        file: The checkpoint.
        wanted: A name, a reference or a function; None to find it by names and shapes.

    Raises:
        CheckpointError: No architecture fits, or several do.
        UnknownNameError: No model of that name.
    """
    if wanted is None:
        return identify(file)
    if callable(wanted):
        return Architecture(getattr(wanted, "__name__", "model"), {}, wanted)
    if is_reference(wanted):
        return Architecture(wanted, {}, resolve(wanted))
    if wanted in named_architectures():
        return architecture_named(wanted, file.state)
    return Architecture(wanted, {}, registry.load(registry.MODELS, wanted))


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """Hash of named tensors: names, shapes, types and bytes; what is no tensor does not count."""
    digest = sha256()
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _loaded(loaded: Loaded) -> str:
    # Files of old torch versions lack BatchNorm's counters, which play no part in eval mode.
    counters = [name for name in loaded.missing if name.endswith("num_batches_tracked")]
    missing = [name for name in loaded.missing if name not in counters]
    parts = [f"{len(loaded.loaded)} tensors loaded"]
    for kind, names in (("missing", missing), ("unexpected", loaded.unexpected)):
        parts.append(f"{len(names)} {kind}" + (f" ({', '.join(names[:8])})" if names else ""))
    return f"weights: {', '.join(parts)}" + (
        f"; {len(counters)} BatchNorm counters not in the file" if counters else ""
    )


def _of_module(model: nn.Module) -> Network:
    try:
        build, notes = reinitialised(model), ()
    except ValueError as error:
        build, notes = None, (str(error),)
    return Network(Checkpoint("model", 0, -1, "", tensors_sha256(model.state_dict())), model, build, notes)


def _paths(model: Model) -> nn.Module | tuple[Path, ...]:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str | Path):
        return tuple(find_checkpoints([model]))
    if isinstance(model, Sequence) and model:
        return tuple(find_checkpoints(model))
    raise UsageError(f"expected a module, a checkpoint file, a folder or several of those, got {type(model).__name__}")


def _check_architecture(wanted: str | Callable[[], nn.Module] | None) -> None:
    if isinstance(wanted, str) and not is_reference(wanted):
        known = {*named_architectures(), *registry.registered(registry.MODELS)}
        if wanted not in known:
            raise UnknownNameError("model", wanted, known)


def _attempt(problems: list[str], work: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return work()
    except UsageError as error:
        problems.append(str(error))
        return otherwise


def _named(value: Any) -> str:
    """An option as text that is the same in the next process, which the representation of a function is not."""
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else str(value)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))
