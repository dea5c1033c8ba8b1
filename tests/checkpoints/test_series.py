from pathlib import Path

import pytest

from plasticity_probe.checkpoints.series import find_checkpoints, standing
from plasticity_probe.errors import CheckpointError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_folder_gives_its_checkpoints_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, "step10.pt", "step9.pt", "b/step1.safetensors", "notes.txt", "trace.h5")
    assert [p.relative_to(tmp_path).as_posix() for p in find_checkpoints([tmp_path])] == [
        "b/step1.safetensors",
        "step9.pt",
        "step10.pt",
    ]


def test_files_named_outright_may_have_any_name_and_come_once(tmp_path: Path) -> None:
    touch(tmp_path, "weights", "a.pt")
    assert find_checkpoints([tmp_path / "weights"]) == [tmp_path / "weights"]
    assert find_checkpoints([tmp_path, tmp_path / "a.pt"]) == [tmp_path / "a.pt"]


def test_missing_paths_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        find_checkpoints([tmp_path / "gone.pt"])
    with pytest.raises(CheckpointError, match="no file there ends in"):
        find_checkpoints([tmp_path])


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("x.pt", {"run": "r", "step": 7, "task": 2}, ("r", 7, 2)),
        ("step_12.pt", {"global_step": 5}, ("folder", 5, -1)),
        ("model-epoch=3-step=120.ckpt", {}, ("folder", 120, -1)),
        ("task3_step40.pt", {}, ("folder", 40, -1)),
        ("resnet20-12fca82f.th", {}, ("folder", 4, -1)),
        ("final.pt", {}, ("folder", 4, -1)),
        ("final.pt", {"epoch": 9}, ("folder", 9, -1)),
    ],
)
def test_where_a_checkpoint_stands(tmp_path: Path, name: str, metadata: dict, expected: tuple) -> None:
    assert standing(tmp_path / "folder" / name, metadata, 4) == expected
