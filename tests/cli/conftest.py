import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from plasticity_probe.checkpoints.formats import write_checkpoint
from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.cli import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, re.sub(r"\s+", " ", captured.err))

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "step_3.safetensors"
    path.parent.mkdir()
    write_checkpoint(
        path,
        MLP([4, 5, 3]).state_dict(),
        {"run": "r", "step": 3, "architecture": {"name": "mlp-relu", "widths": [4, 5, 3]}},
    )
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, train_x=random.normal(size=(40, 4)).astype(np.float32), train_y=random.integers(0, 3, 40))
    return path
