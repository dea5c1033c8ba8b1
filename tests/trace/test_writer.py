# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
# What h5py and xarray return by name has no useful type.

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from trace_rows import HOSTILE, failed, groups, row

from plasticity_probe import locked_file
from plasticity_probe.errors import TraceError
from plasticity_probe.trace import writer
from plasticity_probe.trace.journal import journal_path, read_journal
from plasticity_probe.trace.layout import Row, Variable
from plasticity_probe.trace.memory import MemoryTrace
from plasticity_probe.trace.reader import open_trace, read_rows
from plasticity_probe.trace.writer import TraceWriter, file_image, open_for_append

PROVENANCE = {"versions": {"torch": "2.13"}, "seed": 0}
SETTINGS = {"spectrum": row().settings}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.h5"


def abandon(trace: TraceWriter) -> None:
    """What a kill leaves behind: the lock is gone, the journal stays."""
    trace._file.release(remove=False)
    trace._closed = True


def written(path: Path, rows: list[Row]) -> MemoryTrace:
    twin = MemoryTrace(provenance=PROVENANCE)
    with open_for_append(path, provenance=PROVENANCE) as trace:
        for one in rows:
            trace.append(one)
            twin.append(one)
    return twin


def same(path: Path, twin: MemoryTrace) -> None:
    assert read_rows(path) == twin.rows
    xr.testing.assert_identical(open_trace(path), twin.tree())


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups(), groups())
def test_file_and_memory_hold_the_same_before_and_after_closing_and_over_two_sessions(
    tmp_path_factory: pytest.TempPathFactory, first: list[Row], second: list[Row]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "run.h5"
    twin = MemoryTrace(provenance=PROVENANCE)
    for rows in (first, second):
        with open_for_append(path, provenance=PROVENANCE) as trace:
            for one in rows:
                trace.append(one)
                twin.append(one)
            same(path, twin)
            assert trace.rows == twin.rows
        same(path, twin)
        assert os.listdir(path.parent) == ["run.h5"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_survive(path: Path, text: str) -> None:
    one = row(
        run=text,
        checkpoint=text,
        message=text,
        conditions={text: text},
        labels={"layer": (text, "b", text + "c")},
        variables={"said": Variable((), np_text(text), {"long_name": text[:5000]})},
        provenance=json.dumps({text: text}),
    )
    twin = written(path, [one])
    same(path, twin)
    (found,) = read_rows(path)
    assert found.labels["layer"][0] == text
    assert sorted(os.listdir(path.parent)) == ["run.h5"]


def np_text(text: str) -> Any:
    import numpy as np

    made = np.empty((), dtype=object)
    made[()] = text
    return made


def test_a_killed_writers_rows_are_recovered_and_reported(path: Path) -> None:
    twin = written(path, [row(0)])
    trace = open_for_append(path, SETTINGS, PROVENANCE)
    for step in (1, 2):
        trace.append(row(step))
        twin.append(row(step))
    abandon(trace)
    before = path.read_bytes(), journal_path(path).read_bytes()
    same(path, twin)
    assert before == (path.read_bytes(), journal_path(path).read_bytes()), "reading changes nothing"
    with open_for_append(path, SETTINGS, PROVENANCE) as trace:
        assert trace.notes == ("2 rows recovered from a run that was interrupted",)
        assert trace.done(row(2).key)
        trace.append(row(3))
        twin.append(row(3))
    same(path, twin)
    assert not journal_path(path).exists()


def test_opening_and_closing_alone_finishes_an_interrupted_trace(path: Path) -> None:
    trace = open_for_append(path, provenance=PROVENANCE)
    trace.append(row(0))
    abandon(trace)
    assert not path.exists()
    open_for_append(path).close()
    assert read_rows(path) == [row(0, provenance=json.dumps(PROVENANCE))]
    assert not journal_path(path).exists()


@pytest.mark.parametrize("cut", [1, 5, 17, 40])
def test_an_unfinished_record_is_dropped_and_reported(path: Path, cut: int) -> None:
    trace = open_for_append(path, provenance=PROVENANCE)
    trace.append(row(0))
    whole = trace._end
    trace.append(row(1))
    abandon(trace)
    os.truncate(journal_path(path), whole + cut)
    assert [one.step for one in read_rows(path)] == [0]
    with open_for_append(path, provenance=PROVENANCE) as trace:
        assert f"one unfinished row ({cut} bytes) dropped" in trace.notes[1]
        trace.append(row(2))
    assert [one.step for one in read_rows(path)] == [0, 2]


def test_a_crash_between_renaming_and_removing_the_journal_duplicates_nothing(path: Path) -> None:
    twin = written(path, [row(0), failed(1)])
    trace = open_for_append(path, provenance=PROVENANCE, retry_failed=True)
    trace.append(row(1))
    twin.append(row(1))
    left = journal_path(path).read_bytes()
    trace.close()
    journal_path(path).write_bytes(left)
    same(path, twin)
    open_for_append(path, provenance=PROVENANCE).close()
    same(path, twin)


def test_a_half_written_new_file_is_cleared_away(path: Path) -> None:
    twin = written(path, [row(0)])
    part = path.with_name("run.h5.part")
    part.write_bytes(b"half")
    same(path, twin)
    open_for_append(path, provenance=PROVENANCE).close()
    assert not part.exists()
    same(path, twin)


def test_resumed_and_straight_runs_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(step, probe) for step in range(4) for probe in ("spectrum", "units")]
    written(tmp_path / "straight.h5", rows)
    for part in (rows[:3], rows[3:4], rows[4:]):
        written(tmp_path / "resumed.h5", part)
    assert (tmp_path / "straight.h5").read_bytes() == (tmp_path / "resumed.h5").read_bytes()


def test_nothing_is_rewritten_or_made_when_nothing_was_appended(path: Path) -> None:
    open_for_append(path).close()
    assert os.listdir(path.parent) == []
    written(path, [row(0)])
    before = path.stat().st_ino
    open_for_append(path).close()
    assert path.stat().st_ino == before


def test_a_second_writer_is_told_who_holds_the_trace(path: Path) -> None:
    with open_for_append(path) as trace:
        trace.append(row(0))
        with pytest.raises(TraceError, match=rf"run\.h5 is being written by process {os.getpid()} on ") as caught:
            open_for_append(path)
        assert caught.value.exit_code == 5
        trace.append(row(1))
    assert len(read_rows(path)) == 2


def test_a_writer_that_locked_a_removed_journal_tries_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(locked_file, "_same_file", lambda *_: next(answers))
    open_for_append(path).close()
    assert next(answers, None) is None


@pytest.mark.parametrize("how", ["windows", "cluster"])
def test_where_there_is_no_flock_a_note_stands_for_it(path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    if how == "windows":
        monkeypatch.setattr(locked_file, "fcntl", None)
    else:
        monkeypatch.setattr(locked_file.fcntl, "flock", unsupported)
    note = path.with_name("run.h5.journal.lock")
    with open_for_append(path) as trace:
        trace.append(row(0))
        with pytest.raises(TraceError, match=f"process {os.getpid()}.*remove"):
            open_for_append(path)
        assert note.exists()
    assert os.listdir(path.parent) == ["run.h5"]
    assert len(read_rows(path)) == 1


def test_other_settings_under_the_same_label_are_refused_before_any_work(path: Path) -> None:
    written(path, [row(0)])
    before = path.read_bytes()
    with pytest.raises(TraceError, match="k: 3 in the trace, 5 now"):
        open_for_append(path, {"spectrum": '{"k": 5, "loss": "cross-entropy"}'})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["run.h5"]
    with open_for_append(path, {"spectrum 5": '{"k": 5}'} | SETTINGS) as trace:
        assert trace.done(row(0).key)


def test_failures_count_as_done_unless_they_are_to_be_retried(path: Path) -> None:
    written(path, [failed(0)])
    with open_for_append(path) as trace:
        assert trace.done(failed(0).key)
    with open_for_append(path, provenance=PROVENANCE, retry_failed=True) as trace:
        assert not trace.done(failed(0).key)
        trace.append(row(0))
    assert [one.status for one in read_rows(path)] == ["ok"]


def test_a_row_from_elsewhere_keeps_its_provenance(path: Path) -> None:
    rows = [row(0), row(1, provenance='{"by":"another"}'), row(2)]
    trace = open_for_append(path, provenance=PROVENANCE)
    for one in rows:
        trace.append(one)
    known = [one.provenance for one in trace.rows]
    assert known[1] == '{"by":"another"}'
    assert [one.provenance for one in read_rows(path)] == known
    trace.close()
    assert [one.provenance for one in read_rows(path)] == known


def append_and_fail(trace: TraceWriter) -> None:
    with trace:
        trace.append(row(0))
        raise KeyError


def test_a_closed_trace_takes_no_rows_and_an_error_inside_with_still_closes(path: Path) -> None:
    trace = open_for_append(path)
    with pytest.raises(KeyError):
        append_and_fail(trace)
    assert path.exists()
    with pytest.raises(TraceError, match="closed"):
        trace.append(row(1))
    trace.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [("none/run.h5", "does not exist: make it"), (".", "is a folder"), ("file/run.h5", "cannot write|damaged")],
)
def test_a_place_that_cannot_be_written_to_is_refused_with_a_remedy(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=words):
        open_for_append(tmp_path / name)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_refuses_new_files_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    twin = written(path, [row(0)])

    def refused(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(locked_file.os, "open", refused)
        with pytest.raises(TraceError, match=rf"cannot write .*{os.strerror(number)}.*Nothing was written.*Make room"):
            open_for_append(path)
    same(path, twin)


def test_a_short_write_is_taken_back_and_the_next_row_follows_the_last_whole_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    trace = open_for_append(path, provenance=PROVENANCE)
    trace.append(row(0))

    def half(fd: int, data: Any) -> int:
        monkeypatch.setattr(writer.os, "write", full)
        return real(fd, data[: len(data) // 2])

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context():
        monkeypatch.setattr(writer.os, "write", half)
        with pytest.raises(TraceError, match="The 1 rows before it are safe"):
            trace.append(row(1))
        monkeypatch.setattr(writer.os, "write", real)
    assert read_journal(journal_path(path)).torn == 0
    assert not trace.done(row(1).key)
    trace.append(row(2))
    trace.close()
    assert [one.step for one in read_rows(path)] == [0, 2]


def test_a_file_that_cannot_be_replaced_leaves_the_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = written(path, [row(0)])

    def refused(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    trace = open_for_append(path, provenance=PROVENANCE)
    trace.append(row(1))
    twin.append(row(1))
    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "replace", refused)
        with pytest.raises(TraceError, match=r"quota.*All 2 rows are safe"):
            trace.close()
    assert sorted(os.listdir(path.parent)) == ["run.h5", "run.h5.journal"]
    same(path, twin)
    open_for_append(path, provenance=PROVENANCE).close()
    same(path, twin)


FULL_DISK = """
import resource, sys
from trace_rows import row
from plasticity_probe.errors import TraceError
from plasticity_probe.trace.writer import open_for_append
trace = open_for_append(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
count = 0
try:
    for step in range(1, 1000):
        trace.append(row(step))
        count += 1
except TraceError as error:
    print(error, file=sys.stderr)
for _ in range(2):
    try:
        trace.close()
    except TraceError as error:
        print(error, file=sys.stderr)
print(count)
"""


def test_on_a_full_disk_every_committed_row_is_kept_and_the_process_ends_well(path: Path) -> None:
    written(path, [row(0)])
    command = [sys.executable, "-W", "error", "-c", FULL_DISK, str(path), "20000"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr
    count = int(done.stdout)
    assert count > 3
    assert done.stderr.count("cannot write") == 2
    assert "rows before it are safe" in done.stderr
    assert "are safe in" in done.stderr
    assert [one.step for one in read_rows(path)] == list(range(count + 1))
    open_for_append(path).close()
    assert [one.step for one in read_rows(path)] == list(range(count + 1))
    assert os.listdir(path.parent) == ["run.h5"]


def test_a_foreign_file_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"precious")
    with pytest.raises(TraceError, match="another kind of file"):
        open_for_append(path)
    assert path.read_bytes() == b"precious"
    assert os.listdir(path.parent) == ["run.h5"]


def test_mode_and_symbolic_links_are_kept(tmp_path: Path) -> None:
    real = tmp_path / "real.h5"
    written(real, [row(0)])
    real.chmod(0o640)
    link = tmp_path / "link.h5"
    link.symlink_to(real)
    with open_for_append(link, provenance=PROVENANCE) as trace:
        trace.append(row(1))
        assert len(read_rows(real)) == 2
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert len(read_rows(link)) == 2


def test_an_existing_file_is_never_opened_for_writing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import h5py

    written(path, [row(0)])
    opened: list[tuple[Any, str]] = []
    real = h5py.File.__init__

    def spy(self: Any, name: Any, mode: str = "r", *args: Any, **kwargs: Any) -> None:
        opened.append((name, mode))
        assert kwargs.get("libver") is None
        assert not kwargs.get("swmr")
        real(self, name, mode, *args, **kwargs)

    monkeypatch.setattr(h5py.File, "__init__", spy)
    with open_for_append(path) as trace:
        trace.append(row(1))
    assert all(mode == "r" for name, mode in opened if isinstance(name, str | Path))
    assert any(mode == "r" for _, mode in opened)


def test_the_file_is_compressed_and_checksummed(path: Path) -> None:
    import h5py

    written(path, [row(step) for step in range(20)])
    with h5py.File(path) as file:
        packed = file["spectrum/overlap"]
        assert (packed.compression, packed.shuffle, packed.fletcher32) == ("gzip", True, True)
        assert file.libver == ("earliest", "v200") or file.libver[0] == "earliest"


def test_equal_trees_give_equal_bytes() -> None:
    twin = MemoryTrace()
    twin.append(row(0))
    assert file_image(twin.tree()) == file_image(twin.tree())
