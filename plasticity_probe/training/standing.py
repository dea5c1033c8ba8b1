"""Where a checkpoint of a training run stands, and which of the run's tasks it is to be measured on."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from plasticity_probe.checkpoints.safetensors_files import read_metadata
from plasticity_probe.errors import CheckpointError, DataError
from plasticity_probe.training.run_folder import Manifest, is_run_folder

On = Literal["current", "next", "noise"]
ON: tuple[On, ...] = get_args(On)


@dataclass(frozen=True)
class Standing:
    """Where a checkpoint of a run stands.

    Args:
        seed: Its seed.
        task: The task under way, or about to begin.
        updates: Updates on that task.
    """

    seed: int
    task: int
    updates: int

    def task_for(self, on: On) -> int:
        """The task that it is measured on.

        Args:
            on: Which task; random labels replace those of the current one.
        """
        begun = self.updates > 0
        if on == "next":
            return self.task + begun
        return self.task if begun else max(0, self.task - 1)


def run_folders(paths: Iterable[str | Path]) -> set[Path | None]:
    """The run folders that checkpoints lie in; None among them where one lies in no run folder.

    Args:
        paths: Checkpoint files.
    """
    homes = {Path(path).resolve().parent for path in paths}
    return {next((place for place in (home, home.parent) if is_run_folder(place)), None) for home in homes}


def standing_of(path: Path, manifest: Manifest) -> Standing:
    """Where a checkpoint of a run stands, from its metadata; its weights are not read.

    Args:
        path: The checkpoint.
        manifest: The run.

    Raises:
        DataError: It does not say where it stands in this run.
    """
    try:
        known = read_metadata(path)
        found = Standing(*(int(known[name]) for name in ("seed", "task", "updates")))
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} does not say where it stands in its run; expected a checkpoint that the run wrote. Name data for it with --data"
        ) from error
    if found.seed not in manifest.seeds or not 0 <= found.task <= manifest.setting.stream.tasks or found.updates < 0:
        raise DataError(
            f"{path} says that it is of {found}, but its run has the seeds {', '.join(map(str, manifest.seeds))} and "
            f"{manifest.setting.stream.tasks} tasks; put it back where it was written, or name data for it with --data"
        )
    return found
