"""Kills a writer at random moments, again and again, and counts what was lost. Run as a program; prints a JSON object.

Arguments: the trace, the number of kills, the number of writers at a time, and how rows are written: "as is", or "buffered", a wrong way that
keeps rows in memory until the end.
"""

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import xarray as xr
from trace_rows import row

from plasticity_probe.errors import TraceError
from plasticity_probe.trace.reader import open_trace, read_rows
from plasticity_probe.trace.writer import TraceWriter, open_for_append

PROVENANCE = {"seed": 0}


def buffered(self: TraceWriter, one: object) -> None:
    self._changed = True
    self._memory.keep(self._memory.checked(one))  # type: ignore[arg-type]


def write_for_ever(trace: Path, acks: int, writer: int) -> None:
    """Appends rows and closes, in turn; tells each step that `append` has confirmed, and -1 when it begins to close."""
    while True:
        try:
            store = open_for_append(trace, provenance=PROVENANCE)
        except TraceError:
            time.sleep(0.001)
            continue
        begin = sum(one.replicate == writer for one in store.rows)
        for step in range(begin, begin + random.randint(1, 20)):
            store.append(row(step, replicate=writer))
            os.write(acks, step.to_bytes(4, "little", signed=True))
        os.write(acks, (-1).to_bytes(4, "little", signed=True))
        store.close()


def start(trace: Path, writer: int) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            random.seed(os.getpid())
            write_for_ever(trace, writing, writer)
        finally:
            os._exit(9)
    os.close(writing)
    return child, reading


def follow(pipes: list[int], told: list[list[int]], until: Callable[[int], bool]) -> None:
    """Reads what the writers tell until one of them tells what is waited for, or for some seconds at most."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        ready, _, _ = select.select(pipes, [], [], 0.1)
        for pipe in ready:
            news = numbers(os.read(pipe, 1 << 16))
            told[pipes.index(pipe)] += news
            if any(until(one) for one in news):
                return


def drained(acks: int) -> list[int]:
    data = b""
    while block := os.read(acks, 1 << 16):
        data += block
    os.close(acks)
    return numbers(data)


def numbers(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data) - 3, 4)]


def main(trace: Path, kills: int, writers: int, way: str) -> None:
    random.seed(0)
    if way == "buffered":
        TraceWriter.append = buffered  # type: ignore[method-assign,assignment]
    acked: dict[int, set[int]] = {writer: set() for writer in range(writers)}
    counts = {"kills": 0, "acked": 0, "lost": 0, "unasked": 0, "while closing": 0, "unreadable": 0}
    turn = 0
    while counts["kills"] < kills:
        children = [start(trace, writer) for writer in range(writers)]
        told: list[list[int]] = [[] for _ in children]
        # In turn: as soon as a row is confirmed, a moment after a writer begins to close, and at any moment.
        if turn % 3 < 2:
            follow(
                [acks for _, acks in children],
                told,
                (lambda one: one >= 0) if turn % 3 == 0 else (lambda one: one == -1),
            )
        time.sleep((0, random.uniform(0, 0.02), random.uniform(0.01, 0.15))[turn % 3])
        turn += 1
        for child, _ in children:
            os.kill(child, signal.SIGKILL)
        for writer, (child, acks) in enumerate(children):
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
            told[writer] += drained(acks)
            counts["while closing"] += bool(told[writer]) and told[writer][-1] == -1
            acked[writer] |= set(told[writer]) - {-1}
            counts["kills"] += 1
        try:
            rows = read_rows(trace) if any(acked.values()) else []
            if trace.exists():
                xr.open_datatree(trace, engine="h5netcdf").close()
                h5py.File(trace).close()
        except (TraceError, OSError) as error:
            print(error, file=sys.stderr)
            counts["unreadable"] += 1
            continue
        assert len({one.key for one in rows}) == len(rows)
        for writer, steps in acked.items():
            found = {one.step for one in rows if one.replicate == writer}
            counts["lost"] += len(steps - found)
            # The row in flight may be there although nobody was told.
            counts["unasked"] += max(0, len(found - steps) - 1)
            acked[writer] = steps | found
    counts["acked"] = sum(map(len, acked.values()))
    if way == "as is":
        open_for_append(trace, provenance=PROVENANCE).close()
        open_trace(trace)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
