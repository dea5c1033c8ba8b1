import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trace_rows import row

from plasticity_probe.trace.reader import read_rows
from plasticity_probe.trace.writer import open_for_append

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def killed(trace: Path, kills: int, writers: int = 1, way: str = "as is") -> dict[str, int]:
    program = Path(__file__).with_name("killing.py")
    command = [sys.executable, "-W", "error", str(program), str(trace), str(kills), str(writers), way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def clean(counts: dict[str, int]) -> bool:
    return counts["lost"] == counts["unasked"] == counts["unreadable"] == 0


def test_twenty_kills_lose_no_confirmed_row_and_leave_what_a_straight_run_writes(tmp_path: Path) -> None:
    counts = killed(tmp_path / "run.h5", 20)
    assert clean(counts)
    assert counts["acked"] > 20
    assert 0 < counts["while closing"] < 20, "both appending and closing were hit"
    rows = read_rows(tmp_path / "run.h5")
    assert [one.step for one in rows] == list(range(len(rows)))
    with open_for_append(tmp_path / "straight.h5", provenance={"seed": 0}) as trace:
        for step in range(len(rows)):
            trace.append(row(step))
    assert (tmp_path / "run.h5").read_bytes() == (tmp_path / "straight.h5").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["run.h5", "straight.h5"]


def test_a_writer_that_keeps_rows_in_memory_fails_this_test(tmp_path: Path) -> None:
    counts = killed(tmp_path / "run.h5", 4, way="buffered")
    assert counts["lost"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("writers", [1, 4])
def test_hundreds_of_kills_lose_no_confirmed_row(tmp_path: Path, writers: int) -> None:
    counts = killed(tmp_path / "run.h5", 240, writers)
    assert clean(counts)
