# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
# What h5py and xarray return by name has no useful type.

import json
import random
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from trace_rows import failed, row

from plasticity_probe.errors import TraceError
from plasticity_probe.trace.guard import MARK
from plasticity_probe.trace.layout import COLUMNS, Row
from plasticity_probe.trace.reader import joined_rows, open_trace, read_rows, unescaped
from plasticity_probe.trace.writer import escaped, open_for_append


def written(path: Path, *rows: Row) -> Path:
    with open_for_append(path, provenance={"seed": 0}) as trace:
        for one in rows:
            trace.append(one)
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    return written(folder / "run.h5", *(row(step, probe) for step in range(5) for probe in ("b", "a")), failed(5, "b"))


def test_plain_xarray_reads_the_same_tree(trace: Path) -> None:
    ours = open_trace(trace)
    with xr.open_datatree(trace, engine="h5netcdf") as plain:
        xr.testing.assert_identical(plain["b"].to_dataset(), ours["b"].to_dataset())
        np.testing.assert_array_equal(plain["provenance"], ours["provenance"])
        assert plain.attrs == ours.attrs


def test_plain_h5py_reads_it(trace: Path) -> None:
    with h5py.File(trace) as file:
        assert set(file) - {"provenance", "sessions"} == {"a", "b"}
        group = file["b"]
        assert group["step"][:].tolist() == [0, 1, 2, 3, 4, 5]
        assert group["status"].asstr()[:].tolist() == ["ok"] * 5 + ["failed"]
        assert group["layer"].asstr()[:].tolist() == ["fc1", "fc2", "head"]
        assert group["top"][:, 2][:5].tolist() == [0, 1, 2, 3, 4]
        assert np.isnan(group["top"][5]).all()
        assert group["top"].attrs["long_name"] == "largest eigenvalues"
        assert group["top"].attrs["units"] == "loss"
        assert [group["overlap"].dims[at][0].name for at in range(3)] == ["/b/row", "/b/layer", "/b/pair"]
        assert json.loads(group["settings"].asstr()[0])["k"] == 3
        assert json.loads(file["provenance"].asstr()[0]) == {"seed": 0}
        assert set(COLUMNS) <= set(group)


def test_groups_and_rows_come_in_the_order_of_measurement(trace: Path) -> None:
    assert list(open_trace(trace).children) == ["b", "a"]
    assert [(one.step, one.probe) for one in read_rows(trace)][:3] == [(0, "b"), (0, "a"), (1, "b")]


def test_a_flipped_bit_anywhere_is_detected(trace: Path, tmp_path: Path) -> None:
    data, intact = trace.read_bytes(), read_rows(trace)
    copy, chance, refused = tmp_path / "flipped.h5", random.Random(0), 0
    for _ in range(100):
        bit = chance.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(flipped)
        try:
            assert read_rows(copy) == intact
        except TraceError:
            refused += 1
    assert refused >= 99, "a flip in the words of the mark alone leaves the data as they are"


def chunk(path: Path, name: str) -> tuple[int, int]:
    with h5py.File(path) as file:
        info = file[name].id.get_chunk_info(0)
        return info.byte_offset, info.size


def test_a_flipped_number_is_detected_even_where_the_mark_is_gone(trace: Path, tmp_path: Path) -> None:
    data = trace.read_bytes()
    copy = tmp_path / "unmarked.h5"
    begin, size = chunk(trace, "b/overlap")
    for bit in random.Random(0).sample(range(8 * size), 15):
        flipped = bytearray(data[: data.rindex(MARK)])
        flipped[begin + bit // 8] ^= 1 << bit % 8
        copy.write_bytes(flipped)
        with pytest.raises(TraceError, match="damaged"):
            read_rows(copy)


def test_without_mark_and_checksums_a_flipped_number_would_be_read_as_another(trace: Path, tmp_path: Path) -> None:
    copy = tmp_path / "plain.h5"
    with xr.open_datatree(trace, engine="h5netcdf") as tree:
        tree.load()
    for node in tree.subtree:
        for variable in node.variables.values():
            variable.encoding = {}
    tree.to_netcdf(copy, engine="h5netcdf")
    before = read_rows(copy)
    with h5py.File(copy) as file:
        at = file["b/overlap"].id.get_offset()
    flipped = bytearray(copy.read_bytes())
    flipped[at + 8 * 12 + 7] ^= 0x80
    copy.write_bytes(flipped)
    assert before == read_rows(trace)
    assert read_rows(copy) != before


def test_a_subset_saved_with_xarray_is_a_trace(trace: Path, tmp_path: Path) -> None:
    tree = open_trace(trace)
    group = tree["b"].to_dataset(inherit=False).isel(row=slice(1, 3))
    part = xr.DataTree.from_dict({"/": tree.to_dataset(inherit=False), "/b": group})
    part.to_netcdf(tmp_path / "part.h5", engine="h5netcdf")
    assert read_rows(tmp_path / "part.h5") == [
        one for one in read_rows(trace) if one.probe == "b" and one.step in (1, 2)
    ]


def test_rows_still_in_the_journal_are_read_with_those_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "run.h5", row(0))
    with open_for_append(path) as store:
        store.append(row(1))
        assert open_trace(path)["spectrum"]["step"].values.tolist() == [0, 1]
    assert open_trace(str(path))["spectrum"]["step"].values.tolist() == [0, 1]


def test_several_traces_join_along_the_rows_and_say_where_each_came_from(tmp_path: Path) -> None:
    one = written(tmp_path / "a.h5", row(0), row(1))
    other = written(tmp_path / "b.h5", row(2, run="seed 1"), row(2, "units", run="seed 1"))
    tree = open_trace([one, other])
    assert tree["spectrum"]["run"].values.tolist() == ["seed 0", "seed 0", "seed 1"]
    assert tree["spectrum"]["trace"].values.tolist() == [str(one)] * 2 + [str(other)]
    assert tree["units"]["trace"].values.tolist() == [str(other)]
    assert tree["provenance"].values.tolist() == ['{"seed":0}']


def test_two_runs_of_one_name_are_kept_apart_when_their_checkpoints_show_it(tmp_path: Path) -> None:
    shared = row(0)
    one = written(tmp_path / "a.h5", shared, row(1, sha256="a1"), row(1, "units", sha256="a1", run="other"))
    two = written(tmp_path / "b.h5", shared, row(1, sha256="b1"))
    tree = open_trace([one, two])
    assert tree["spectrum"]["run"].values.tolist() == [f"{one}:seed 0"] * 2 + [f"{two}:seed 0"] * 2
    assert tree["units"]["run"].values.tolist() == ["other"]


def test_rows_of_several_traces_are_those_of_the_joined_trace(tmp_path: Path) -> None:
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for at, path in enumerate(paths):
        with open_for_append(path) as writer:
            writer.append(row(run=f"run {at}"))
    rows, sources = joined_rows(paths)
    assert sources == [str(path) for path in paths]
    assert [r.run for r in rows] == open_trace(paths)[rows[0].probe]["run"].values.tolist() == ["run 0", "run 1"]
    assert joined_rows([paths[0], paths[0]]) == (read_rows(paths[0]), [str(paths[0])])


def test_one_run_in_several_files_stays_one_run(tmp_path: Path) -> None:
    early = written(tmp_path / "early.h5", row(0), row(1))
    late = written(tmp_path / "late.h5", row(1), row(2))
    probe = written(tmp_path / "probe.h5", row(0, "units"), row(1, "units"))
    tree = open_trace([early, late, probe])
    assert tree["spectrum"]["step"].values.tolist() == [0, 1, 2]
    assert {str(name) for node in tree.children.values() for name in node["run"].values} == {"seed 0"}


def test_settings_that_differ_between_files_are_kept_row_by_row(tmp_path: Path) -> None:
    one = written(tmp_path / "a.h5", row(0))
    other = written(tmp_path / "b.h5", row(0, settings='{"k": 9, "loss": "cross-entropy"}'))
    group = open_trace([one, other])["spectrum"]
    assert [json.loads(text)["k"] for text in group["settings"].values] == [3, 9]
    assert json.loads(group.attrs["settings"]) == {"loss": "cross-entropy"}


def test_the_same_trace_twice_is_one(trace: Path) -> None:
    assert open_trace([trace, trace])["b"]["step"].size == 6


@pytest.mark.parametrize("text", ["", "plain", "\x00", "\x1a", "\x1a0000", "\ud800x\udfff", "a\x1a001a\x00b"])
def test_escaping_is_undone_and_leaves_only_what_hdf5_can_hold(text: str) -> None:
    stored = escaped(text)
    assert unescaped(stored) == text
    assert "\x00" not in stored
    stored.encode("utf-8")


def test_reading_and_writing_need_no_torch(trace: Path) -> None:
    code = """
import sys
from plasticity_probe.trace import guard, journal, layout, memory, reader, tree, writer
reader.open_trace(sys.argv[1])
writer.open_for_append(sys.argv[1]).close()
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code, str(trace)], check=False).returncode == 0
