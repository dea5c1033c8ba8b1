import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from trace_rows import groups, row

from plasticity_probe.errors import TraceError
from plasticity_probe.trace.journal import MAGIC, START, framed, read_journal, row_payload, session_payload
from plasticity_probe.trace.layout import Row

PROVENANCE = '{"seed":0}'


def content(rows: list[Row]) -> bytes:
    return START + b"".join(map(framed, [session_payload(PROVENANCE), *map(row_payload, rows)]))


def kept(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "run.h5.journal"
    path.write_bytes(data)
    return path


@settings(max_examples=30, deadline=None)
@given(groups())
def test_rows_come_back_from_the_journal(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    data = content(rows)
    journal = read_journal(kept(tmp_path_factory.mktemp("journal"), data))
    assert list(journal.rows) == [row_with(one) for one in rows]
    assert (journal.end, journal.torn) == (len(data), 0)
    assert journal.holder.startswith("process ")


def row_with(one: Row) -> Row:
    return replace(one, provenance=PROVENANCE)


def test_every_prefix_is_a_journal_of_its_whole_records(tmp_path: Path) -> None:
    small = [row(step, labels={}, variables={}, conditions={}) for step in range(3)]
    data = content(small)
    ends = [len(content(small[:count])) for count in range(4)]
    ends = [0, len(START), *ends]
    near = {end + offset for end in ends for offset in (-1, 0, 1, 15, 16)}
    for size in (near | {*range(0, len(data), 11)}) & {*range(len(data) + 1)}:
        journal = read_journal(kept(tmp_path, data[:size]))
        whole = [end for end in ends if end <= size]
        assert len(journal.rows) == max(0, len(whole) - 3)
        assert journal.torn == size - whole[-1]


@pytest.mark.parametrize("zeros", [1, 20, 5000])
@pytest.mark.parametrize("cut", [0, 3, 17, 200])
def test_zeros_where_a_power_failure_kept_the_last_record_from_disk_are_dropped(
    tmp_path: Path, zeros: int, cut: int
) -> None:
    data = content([row(0)]) + framed(row_payload(row(1)))[:cut] + bytes(zeros)
    assert [one.step for one in read_journal(kept(tmp_path, data)).rows] == [0]


def test_a_flipped_bit_is_never_read_as_a_row_nor_passed_over(tmp_path: Path) -> None:
    rows = [row(step) for step in range(3)]
    data = content(rows)
    intact = read_journal(kept(tmp_path, data)).rows
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        bit = chance.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert read_journal(kept(tmp_path, bytes(flipped))).rows == intact
        except TraceError:
            refused += 1
    assert refused >= 295, "only the end marks are not covered, and they do not matter"


def test_damage_before_good_rows_is_an_error_that_counts_the_intact_ones(tmp_path: Path) -> None:
    data = bytearray(content([row(0), row(1), row(2)]))
    at = len(content([row(0)]))
    for offset in (0, 5, 9, 13, 100):
        broken = data.copy()
        broken[at + offset] ^= 4
        with pytest.raises(TraceError, match=rf"damaged at byte {at}; 1 rows before it are intact.*move it away"):
            read_journal(kept(tmp_path, bytes(broken)))


def test_other_files_and_newer_versions_are_refused(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none").rows == ()
    with pytest.raises(TraceError, match="another kind of file"):
        read_journal(kept(tmp_path, b"something else entirely"))
    with pytest.raises(TraceError, match="schema version 1, got 2"):
        read_journal(kept(tmp_path, MAGIC + struct.pack("<I", 2) + framed(session_payload("{}"))))
    with pytest.raises(TraceError, match="cannot read"):
        read_journal(tmp_path)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        struct.pack("<I", 2) + b"{}",
        struct.pack("<I", 4) + b'"ab"',
        struct.pack("<I", 100_000) + b"[" * 100_000,
    ],
)
def test_a_record_that_is_no_row_is_refused(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(TraceError, match="holds no row"):
        read_journal(kept(tmp_path, START + framed(payload)))


def test_a_record_is_laid_out_as_documented() -> None:
    payload = b"payload"
    record = framed(payload)
    marker, length, crc, check = struct.unpack_from("<4sIII", record)
    assert (marker, length, crc, check) == (b"\x1eREC", 7, zlib.crc32(payload), zlib.crc32(record[4:12]))
    assert record[16:] == payload + b"\n"
