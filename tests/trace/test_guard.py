# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
# What h5py and xarray return by name has no useful type.

import errno
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import pytest
from trace_rows import row

from plasticity_probe.errors import TraceError
from plasticity_probe.trace import guard, reader
from plasticity_probe.trace.guard import MARK
from plasticity_probe.trace.reader import open_trace, read_rows
from plasticity_probe.trace.writer import open_for_append

SECRET = np.arange(9.0) + 1e6
Change = Callable[[h5py.File, Path], object]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("valid") / "run.h5"
    with open_for_append(path) as trace:
        for step in range(3):
            trace.append(row(step))
    return path


@pytest.fixture
def path(tmp_path: Path, valid: Path) -> Path:
    """A trace without its mark, as another program would leave it, and beside it a file that it must not read."""
    data = valid.read_bytes()
    copy = tmp_path / "foreign.h5"
    copy.write_bytes(data[: data.rindex(MARK)])
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["top"] = SECRET.reshape(3, 3)
    return copy


def sealed(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data + MARK + sha256(data).hexdigest().encode() + b"\n")


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((3, 3), dtype="f8")
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "top", (3, 3))
    file["spectrum"].create_virtual_dataset("top", layout)


def without(file: h5py.File, name: str) -> h5py.Group:
    del file[name]
    return file["spectrum"]


CHANGES: dict[str, tuple[Change, str]] = {
    "external link": (
        lambda f, p: f.__setitem__("spectrum/top", h5py.ExternalLink(p / "secret.h5", "/top")),
        "link to elsewhere",
    ),
    "external group": (
        lambda f, p: f.__setitem__("more", h5py.ExternalLink(p / "secret.h5", "/")),
        "link to elsewhere",
    ),
    "soft link": (lambda f, _: f.__setitem__("spectrum/top", h5py.SoftLink("/provenance")), "link to elsewhere"),
    "external storage": (
        lambda f, p: f["spectrum"].create_dataset("top", (3, 3), "f8", external=[(p / "secret.bin", 0, 72)]),
        "data from other files",
    ),
    "virtual dataset": (virtual, "data from other files"),
    "nested group": (lambda f, _: f["spectrum"].create_group("top"), "no place in a trace"),
    "circle": (lambda f, _: f.__setitem__("spectrum/top", f["/"]), "no place in a trace"),
    "stray dataset": (lambda f, _: f.__setitem__("more", 1.0), "no place in a trace"),
    "named type": (lambda f, _: f.__setitem__("spectrum/top", np.dtype("f8")), "no place in a trace"),
    "unknown filter": (
        lambda f, _: f["spectrum"].create_dataset("top", data=np.ones((3, 3)), compression="lzf"),
        "filters",
    ),
    "compound type": (lambda f, _: f["spectrum"].create_dataset("top", (3,), "f8,f8"), "holds"),
    "bytes": (lambda f, _: f["spectrum"].create_dataset("top", (3,), "S5"), "holds"),
    "references": (lambda f, _: f["spectrum"].create_dataset("top", (3,), h5py.ref_dtype), "holds"),
    "bomb": (lambda f, _: f["spectrum"].create_dataset("top", (2**40,), "f8", chunks=(1024,)), "declares"),
    "no dimensions": (lambda f, _: f["spectrum"].create_dataset("top", data=np.ones((3, 3))), "damaged or no trace"),
    "missing quantity": (lambda *_: None, "damaged or no trace"),
}


@pytest.mark.parametrize("mark", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_reaches_beyond_itself_or_holds_what_no_trace_holds_is_refused(
    path: Path, name: str, mark: bool
) -> None:
    change, words = CHANGES[name]
    with h5py.File(path, "r+") as file:
        del file["spectrum/top"]
        change(file, path.parent)
    if mark:
        sealed(path)
    with pytest.raises(TraceError, match=words):
        open_trace(path)


def attribute(name: str, value: object) -> Change:
    return lambda file, _: file.attrs.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (attribute("schema_version", 2), "schema version 1, got 2; upgrade"),
        (attribute("schema_version", 0), "schema version 1, got 0; read it with the version"),
        (attribute("schema_version", "x"), "damaged or no trace"),
        (attribute("schema_version", [1, 1]), "damaged or no trace"),
        (attribute("schema", "another"), "another HDF5 file"),
        (attribute("schema", 1), "another HDF5 file"),
        (lambda f, _: f.attrs.__delitem__("schema"), "another HDF5 file"),
        (lambda f, _: f.attrs.__delitem__("schema_version"), "another HDF5 file"),
        (lambda f, _: f.__delitem__("provenance"), "damaged or no trace"),
        (lambda f, _: f["spectrum"].__delitem__("sha256"), "lacks sha256"),
        (lambda f, _: f["spectrum"].attrs.__delitem__("quantities"), "damaged or no trace"),
        (lambda f, _: f["spectrum/session"].__setitem__(0, 7), "damaged or no trace"),
        (lambda f, _: f["spectrum/settings"].__setitem__(0, "no JSON"), "damaged or no trace"),
        (lambda f, _: f.move("spectrum", " bad"), "label"),
    ],
)
def test_a_file_that_does_not_follow_the_schema_is_refused(path: Path, change: Change, words: str) -> None:
    with h5py.File(path, "r+") as file:
        change(file, path.parent)
    with pytest.raises(TraceError, match=words):
        read_rows(path)


def test_the_foreign_copy_is_read_when_nothing_is_wrong_with_it(path: Path, valid: Path) -> None:
    assert read_rows(path) == read_rows(valid)
    sealed(path)
    assert path.read_bytes() == valid.read_bytes()


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    for data in (b"", b"\x89HDF", b"PK\x03\x04" + bytes(100), b"\x89HDF\r\n\x1a\n" + bytes(500)):
        other.write_bytes(data)
        with pytest.raises(TraceError):
            read_rows(other)
    with h5py.File(other, "w") as file:
        file["x"] = 1
    with pytest.raises(TraceError, match="another HDF5 file"):
        read_rows(other)
    with pytest.raises(TraceError, match="no regular file"):
        read_rows(tmp_path)
    with pytest.raises(TraceError, match="there is no trace at"):
        read_rows(tmp_path / "none.h5")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_a_cut_file_is_refused(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(TraceError):
        read_rows(path)


def test_texts_that_all_point_to_the_same_bytes_do_not_fill_the_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BYTES_LIMIT", 300)
    with pytest.raises(TraceError, match="texts are longer"):
        read_rows(path)


def test_more_declared_than_allowed_is_refused_before_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BYTES_LIMIT", 100)
    monkeypatch.setattr(reader, "rows_of", lambda _: pytest.fail("was read"))
    with pytest.raises(TraceError, match="declares"):
        read_rows(path)


def test_an_unreadable_file_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(TraceError, match="Input/output"):
        read_rows(path)


def test_a_copy_of_a_trace_is_a_trace(valid: Path, tmp_path: Path) -> None:
    shutil.copy(valid, tmp_path / "copy.h5")
    assert read_rows(tmp_path / "copy.h5") == read_rows(valid)
