"""A run folder: what was trained, its weights, how every task went, and what it takes to go on after a kill.

    manifest.json            everything that decides the run; written first and never changed
    outcomes.jsonl           one line a seed, task and network (`plasticity_probe.training.outcomes`)
    seed_0/step_00000000.safetensors ...   weights, in the package's own format
    state/*.state            where training stands: weights, the optimizer's and the remedies' memory; gone when the run is finished

Every file is written beside its place, flushed and renamed, so a kill at any moment leaves each of them whole, old or new.
"""

import json
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from plasticity_probe.checkpoints.safetensors_files import read_safetensors, write_checkpoint
from plasticity_probe.errors import CheckpointError, RunError, UsageError
from plasticity_probe.locked_file import BusyError, LockedFile
from plasticity_probe.training.kinds import as_object, made
from plasticity_probe.training.outcomes import Outcome, as_json, in_order, read_outcomes
from plasticity_probe.training.settings import Setting, read, written
from plasticity_probe.whole_files import write_whole

SCHEMA = "plasticity_probe.run/1"
MANIFEST, OUTCOMES, STATE, LOCK = "manifest.json", "outcomes.jsonl", "state", "run.lock"
DECISIVE = ("schema", "setting", "seeds", "together", "source_sha256", "architecture", "device")
"""What must be the same for a run to go on; the rest is for the record."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """What was trained.

    Args:
        protocol: Name of the protocol, its variant and scale, for the record; empty for a setting of one's own.
        setting: Everything that decides the run but its seeds.
        seeds: The seeds.
        together: How many seeds were trained as one program.
        architecture: Name and settings of the network, as the checkpoints' metadata have them.
        data: Where the examples came from and what was done to them.
        source_sha256: Hash of the examples.
        device: Kind of device, such as "cpu".
    """

    protocol: str
    setting: Setting
    seeds: tuple[int, ...]
    together: int
    architecture: Mapping[str, Any]
    data: str
    source_sha256: str
    device: str

    def as_json(self) -> dict[str, Any]:
        """The manifest as JSON, with the versions that wrote it."""
        packages = ("plasticity_probe", "torch", "numpy")
        plain = {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "setting": written(self.setting),
            "seeds": list(self.seeds),
            "together": self.together,
            "architecture": dict(self.architecture),
            "data": self.data,
            "source_sha256": self.source_sha256,
            "device": self.device,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in packages},
            "python": platform.python_version(),
            "platform": platform.platform(),
        }
        return json.loads(json.dumps(plain))


def read_manifest(folder: str | Path) -> Manifest:
    """What was trained in a run folder.

    Args:
        folder: The folder.

    Raises:
        RunError: It holds no run.
    """
    entry = _manifest(Path(folder))
    parts = {part.name: entry[part.name] for part in fields(Manifest) if part.name in entry}
    try:
        return made(Manifest, "a manifest", {**parts, "setting": read(as_object(parts.get("setting"), "its setting"))})
    except UsageError as error:
        raise RunError(f"{Path(folder) / MANIFEST} was not written by this version of the package: {error}") from error


def is_run_folder(path: str | Path) -> bool:
    """Whether a path is a folder that a training run wrote.

    Args:
        path: Any path.
    """
    file = Path(path) / MANIFEST
    try:
        return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("schema") == SCHEMA
    except (OSError, ValueError, AttributeError):
        return False


def open_run(folder: Path, manifest: Manifest, *, resume: bool) -> None:
    """Makes a folder that of a run, or checks that it already is and may go on.

    Args:
        folder: The folder.
        manifest: What is to be trained.
        resume: Whether a run that is there may go on.

    Raises:
        UsageError: It holds something else, another run, or this one without `resume`.
        RunError: It cannot be written.
    """
    wanted = manifest.as_json()
    if (folder / MANIFEST).exists():
        found = _manifest(folder)
        other = [key for key in DECISIVE if found.get(key) != wanted[key]]
        if other:
            where = ", ".join(_difference(found.get(key), wanted[key], key) for key in other)
            raise UsageError(f"{folder} holds another run ({where}); choose a new folder with --out")
        if not resume:
            raise UsageError(f"{folder} holds this run already; go on with --resume, or choose a new folder with --out")
        return
    if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - set(leftovers(folder))):
        raise UsageError(f"{folder} is no empty folder and holds no run; choose a new one with --out")
    make_folder(folder)
    write_text(folder / MANIFEST, json.dumps(wanted, indent=1))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run folder; a killed process gives it up by itself.

    Args:
        folder: The run folder, which exists.

    Raises:
        RunError: Another process trains there, or the folder cannot be written.
    """
    try:
        lock = LockedFile(folder / LOCK)
    except BusyError as error:
        raise RunError(f"another process trains in {folder}: {error}; wait for it, or choose another folder") from error
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}; choose another folder with --out") from error
    try:
        yield
    finally:
        lock.release(remove=True)


def checkpoint_path(folder: Path, seed: int, step: int, remedied: bool = False) -> Path:
    """The file of the weights of one seed after `step` updates.

    Args:
        folder: The run folder.
        seed: The seed.
        step: Updates since the run began.
        remedied: Whether these are the weights that a remedy left at the start of a task, and not those that the task before left.
    """
    return folder / f"seed_{seed}" / f"step_{step:08d}{'_remedied' if remedied else ''}.safetensors"


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes one network's weights.

    Args:
        path: Where.
        state: Its state dict.
        metadata: Where it stands.

    Raises:
        RunError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, state, metadata)
    except (OSError, CheckpointError) as error:
        raise RunError(f"{error}; what was saved before is whole, and --resume goes on from there") from error


def save_state(folder: Path, name: str, tensors: Mapping[str, Tensor], place: Mapping[str, Any]) -> None:
    """Replaces the state of a group of seeds.

    Args:
        folder: The run folder.
        name: Name of the state.
        tensors: Everything that training changes.
        place: Where training stands, as JSON.

    Raises:
        RunError: It cannot be written.
    """
    # Views of one memory would be stored once and come back tied; each tensor here is its own.
    own = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    save_weights(folder / STATE / f"{name}.state", own, place)


def load_state(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state of a group of seeds; None where there is none.

    Args:
        folder: The run folder.
        name: Name of the state.

    Raises:
        RunError: It is damaged.
    """
    path = folder / STATE / f"{name}.state"
    if not path.is_file():
        return None
    try:
        tensors, place, own = read_safetensors(path)
    except CheckpointError as error:
        raise RunError(f"{error}. Remove it to begin these seeds anew") from error
    if not own:
        raise RunError(f"{path} is not what a training run writes. Remove it to begin these seeds anew")
    return tensors, place


def drop_state(folder: Path, name: str) -> None:
    """Removes the state of a group of seeds, which is finished.

    Args:
        folder: The run folder.
        name: Name of the state.
    """
    (folder / STATE / f"{name}.state").unlink(missing_ok=True)
    if (folder / STATE).is_dir() and not any((folder / STATE).iterdir()):
        (folder / STATE).rmdir()


def stored_outcomes(folder: Path) -> tuple[Outcome, ...]:
    """The outcomes stored so far.

    Args:
        folder: The run folder.

    Raises:
        RunError: They are damaged.
    """
    return read_outcomes(folder) if (folder / OUTCOMES).is_file() else ()


def store_outcomes(folder: Path, outcomes: Iterable[Outcome]) -> None:
    """Replaces the outcomes.

    Args:
        folder: The run folder.
        outcomes: All of them.

    Raises:
        RunError: They cannot be written.
    """
    lines = [json.dumps(as_json(outcome)) + "\n" for outcome in in_order(outcomes)]
    write_text(folder / OUTCOMES, "".join(lines))


def make_folder(folder: Path) -> None:
    """Makes a folder with its parents, unless it is there.

    Args:
        folder: The folder.

    Raises:
        RunError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the folder {folder} cannot be made: {error.strerror}; choose another with --out") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all.

    Args:
        path: Where; a file that is there is replaced.
        text: The text.

    Raises:
        RunError: It cannot be written.
    """
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; make room or choose another folder. What was saved before is whole."
        ) from error


def check_room(folder: Path, needed: int) -> None:
    """Refuses a run that the disk has no room for.

    Args:
        folder: The run folder, which exists.
        needed: Bytes that the run holds at most, those already there included.

    Raises:
        RunError: There is less room.
    """
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if needed - held > free:
        raise RunError(
            f"the run needs up to {needed / 1e6:,.1f} MB in {folder}, where {free / 1e6:,.1f} MB are free; make room, choose another folder, or "
            "keep fewer checkpoints (--set checkpoint_every=5, --set inside=0)"
        )


def run_name(folder: Path, seed: int) -> str:
    """Name of one seed's run, as traces and tables know it.

    Args:
        folder: The run folder.
        seed: The seed.
    """
    return f"{folder.resolve().name} seed {seed}"


def group_name(seeds: Sequence[int]) -> str:
    """Name of the state of some seeds that are trained together: short, and another one for every other list of seeds.

    Args:
        seeds: The seeds.
    """
    if len(seeds) < 4:
        return f"seeds_{'_'.join(map(str, seeds))}"
    span = f"seeds_{seeds[0]}_to_{seeds[-1]}"
    if list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return span
    return f"{span}_{blake2b(repr(list(seeds)).encode(), digest_size=8).hexdigest()}"


def leftovers(folder: Path) -> list[Path]:
    """Half-written files of a process that was killed.

    Args:
        folder: The run folder.
    """
    return [path for path in folder.rglob(".*.part") if path.is_file()]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        entry = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{folder} holds no training run: {MANIFEST} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RunError(f"{folder / MANIFEST} is damaged: {error}") from error
    if not isinstance(entry, dict) or entry.get("schema") != SCHEMA:
        came = repr(entry.get("schema"))[:120] if isinstance(entry, dict) else "no object"
        raise RunError(
            f"{folder / MANIFEST} is not what a training run of this version writes; expected the schema {SCHEMA}, got {came}"
        )
    return entry


def _difference(found: Any, wanted: Any, name: str) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        return ", ".join(_difference(found.get(key), wanted.get(key), f"{name}.{key}") for key in keys)
    return f"{name}: {found} there, {wanted} now"
