"""What a run will be, before anything is trained: its network and data, its groups of seeds, and the room it needs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from plasticity_probe.errors import UsageError
from plasticity_probe.training.batches import updates_of
from plasticity_probe.training.models import Blueprint, blueprint
from plasticity_probe.training.run_folder import Manifest
from plasticity_probe.training.settings import Setting
from plasticity_probe.training.sources import load_source, source_sha256
from plasticity_probe.training.tasks import Source

MOST_TOGETHER = 64
"""Seeds trained as one program at most (our choice: more fill memory and gain no speed)."""


@dataclass(frozen=True, eq=False)
class RunPlan:
    """A run that can be carried out.

    Args:
        manifest: Everything that decides it.
        source: The examples.
        drawn: The network.
        device: Where it is trained.
    """

    manifest: Manifest
    source: Source | None
    drawn: Blueprint
    device: torch.device

    @property
    def setting(self) -> Setting:
        """What is trained."""
        return self.manifest.setting

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Seeds that are trained as one program, group after group."""
        seeds, size = self.manifest.seeds, self.manifest.together
        return [seeds[start : start + size] for start in range(0, len(seeds), size)]

    @property
    def parameters(self) -> int:
        """Parameters of a network."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.drawn.build().parameters())

    @property
    def updates(self) -> int:
        """Updates of the first seed, its controls included; the most where a task may end early."""
        stream, training = self.setting.stream, self.setting.training
        built = 1 if stream.steady else stream.tasks
        sizes = [len(stream.task(self.source, task, self.manifest.seeds[0]).targets) for task in range(built)]
        return sum(
            training.epochs_of(task)
            * updates_of(sizes[min(task, built - 1)], training.batch)
            * (1 + self.setting.has_control(task))
            for task in range(stream.tasks)
        )

    @property
    def checkpoints(self) -> int:
        """The most files of weights that the run keeps, those that remedies make at the start of tasks among them."""
        setting = self.setting
        starts = sum(setting.has_checkpoints(task) for task in range(setting.stream.tasks + 1))
        return len(self.manifest.seeds) * starts * (1 + setting.inside + bool(setting.remedies))

    @property
    def bytes(self) -> int:
        """The most that the run holds on disk: its checkpoints, and the state of one group twice while it is being replaced."""
        with torch.device("meta"):
            state = self.drawn.build().state_dict()
        weights = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) + 4096
        # Weights, two moments, and for each remedy up to two copies of the weights; the same once more for a control under way.
        group = weights * (3 + 2 * len(self.setting.remedies)) * 2 * self.manifest.together
        return self.checkpoints * weights + 2 * group


def plan_run(
    setting: Setting,
    seeds: Iterable[int],
    *,
    device: str | torch.device = "cpu",
    together: int | None = None,
    protocol: str = "",
    data_root: str | Path | None = None,
    download: bool = False,
) -> RunPlan:
    """Reads the data and decides everything about a run; nothing is trained or written.

    Args:
        setting: Everything that decides the run but its seeds.
        seeds: Seed of each run: of its network, its tasks and the order of its examples.
        device: Where to train.
        together: How many seeds to train as one program; None decides by the network.
        protocol: Name of the protocol, for the record.
        data_root: Folder of the named data sets.
        download: Fetch a named data set that is not there.

    Raises:
        UsageError: Settings that cannot be.
        DataError: Data that is missing or does not fit the stream.
    """
    chosen = tuple(dict.fromkeys(seeds))
    if not chosen or min(chosen) < 0:
        raise UsageError(f"a run needs at least one seed, each from 0 on; got {list(chosen)}")
    source = load_source(setting.data, root=data_root, download=download)
    first = setting.stream.task(source, 0, chosen[0])
    drawn = blueprint(setting.architecture, first.inputs[0], setting.stream.outputs(source))
    size = min(len(chosen), _group_size(setting, drawn, together))
    where = torch.device(device)
    described = source.description if source is not None else f"examples of the stream {setting.stream.name} itself"
    known = Manifest(protocol, setting, chosen, size, drawn.architecture, described, source_sha256(source), where.type)
    return RunPlan(known, source, drawn, where)


def _group_size(setting: Setting, drawn: Blueprint, together: int | None) -> int:
    """Seeds in one program: as many as the caller says, else all of a small network of linear layers where tasks have one size."""
    ends_early = setting.training.until is not None
    if together is None:
        small = str(drawn.architecture["name"]).startswith("mlp")
        return MOST_TOGETHER if small and not ends_early and setting.stream.equal_sizes else 1
    if together < 1 or (together > 1 and ends_early):
        raise UsageError(
            f"at least one seed is trained at a time, and one alone where a task ends when an accuracy is reached, because each seed reaches it "
            f"at another time; got together = {together}"
        )
    return together
