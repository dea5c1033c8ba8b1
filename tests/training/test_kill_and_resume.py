import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from plasticity_probe.checkpoints.formats import read_checkpoint

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


def start(folder: Path, save_every: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "error", str(SCRIPT), str(folder), str(save_every)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def contents(folder: Path) -> dict[str, bytes]:
    kept = {
        str(path.relative_to(folder)): b"".join(t.numpy().tobytes() for t in read_checkpoint(path).state.values())
        for path in sorted(folder.rglob("*.safetensors"))
    }
    return kept | {"outcomes": (folder / "outcomes.jsonl").read_bytes()}


def killed_and_resumed(tmp_path: Path, kills: int, save_every: float) -> None:
    whole = start(tmp_path / "whole", save_every)
    begun = time.monotonic()
    assert whole.wait(timeout=300) == 0
    length = time.monotonic() - begun
    folder = tmp_path / "again" / "whole"
    draws, deaths = np.random.default_rng(0), 0
    while True:
        process = start(folder, save_every)
        try:
            # Anywhere from the import of torch to the end of the run.
            code = (
                process.wait(timeout=float(draws.uniform(0.2, 1.0)) * length)
                if deaths < kills
                else process.wait(timeout=300)
            )
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            deaths += 1
            for path in folder.rglob("*.safetensors"):
                read_checkpoint(path)
            continue
        assert code == 0
        if deaths >= kills:
            break
        # It finished before it could be killed: from the beginning, in another folder.
        folder = tmp_path / f"again{deaths}" / "whole"
    assert contents(folder) == contents(tmp_path / "whole")
    assert not list(folder.rglob("*.part"))
    assert not (folder / "state").exists()


def test_a_killed_run_goes_on_to_the_same_weights_and_outcomes(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, kills=1, save_every=0)


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [0.0, 0.5])
def test_twenty_kills_at_random_points_lose_nothing(tmp_path: Path, save_every: float) -> None:
    killed_and_resumed(tmp_path, kills=20, save_every=save_every)
