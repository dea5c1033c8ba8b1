import builtins
import io
import os
import pickle
import subprocess
import time
import zipfile

import pytest
import torch

from plasticity_probe.checkpoints import torch_files
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.errors import CheckpointError


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


PAYLOADS = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "exec": lambda canary: Call(exec, f"open({canary!r}, 'w').close()"),
    "eval": lambda canary: Call(eval, f"open({canary!r}, 'w').close()"),
    "open": lambda canary: Call(open, canary, "w"),
    "subprocess": lambda canary: Call(subprocess.check_output, ["touch", canary]),
    "import": lambda _canary: Call(builtins.__import__, "this"),
    "pickle": lambda canary: Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {canary}"))),
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_named_and_never_run(tmp_path, payload, zipped):
    canary = tmp_path / "canary"
    saved = {"state_dict": {"w": torch.ones(2)}, "extra": PAYLOADS[payload](str(canary))}
    torch.save(saved, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"names code to be run: .*--trust-pickle.*would run code.*sha256 [0-9a-f]{64}"
    ):
        read_checkpoint(tmp_path / "net.pt")
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_canary_sings_when_the_pickle_is_trusted(tmp_path, zipped):
    canary = tmp_path / "canary"
    saved = {"state_dict": {"w": torch.ones(2)}, "extra": PAYLOADS["os.system"](str(canary))}
    torch.save(saved, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    assert set(read_checkpoint(tmp_path / "net.pt", trust_pickle=True).state) == {"w"}
    assert canary.exists()


def test_every_foreign_global_of_a_zip_file_is_named(tmp_path):
    saved = {"w": torch.ones(2), "a": Call(os.system, "true"), "b": Call(os.getenv, "HOME")}
    torch.save(saved, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"os\.getenv, posix\.system"):
        read_checkpoint(tmp_path / "net.pt")


def with_pickle(path, pickled):
    """A torch zip file around any pickle."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, pickled if entry.filename.endswith("data.pkl") else old.read(entry))
    return path


def test_numpy_never_sees_what_the_file_says_about_objects(tmp_path):
    # A dtype of objects whose flags deny it, filled with raw bytes, would make NumPy follow invented pointers.
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87RK\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    dtype = dtype.replace(b"K\x03X", b"(K\x03X") + b"b"
    scalar = (
        b"cnumpy.core.multiarray\nscalar\n"
        + dtype
        + b"c_codecs\nencode\nX\x08\x00\x00\x00AAAAAAAAX\x06\x00\x00\x00latin1\x86R\x86R"
    )
    path = with_pickle(tmp_path / "net.pt", b"\x80\x02}X\x01\x00\x00\x00s" + scalar + b"s.")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(path)


def test_deflated_bomb_is_refused_before_it_unfolds(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("net/data.pkl", b"\x80\x02}.")
        with archive.open("net/data/0", "w", force_zip64=True) as entry:
            block = bytes(2**22)
            for _ in range(75):
                entry.write(block)
    assert path.stat().st_size < 2**21
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"unfold to .* max_bytes"):
        read_checkpoint(path)
    assert time.perf_counter() - start < 0.5


def test_max_bytes_bounds_any_file(tmp_path):
    torch.save({"w": torch.ones(1000)}, tmp_path / "net.pt")
    assert read_checkpoint(tmp_path / "net.pt", max_bytes=100_000).state
    with pytest.raises(CheckpointError, match="max_bytes"):
        read_checkpoint(tmp_path / "net.pt", max_bytes=1000)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensor_that_is_larger_than_its_memory_is_refused(tmp_path, zipped):
    huge = torch.ones(1).expand(2**40)
    torch.save({"w": huge, "b": torch.ones(2)}, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"w declares shape \(1099511627776,\) on 4 bytes"):
        read_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_expanded_tensor_that_fits_its_memory_is_read(tmp_path, zipped):
    positions = torch.arange(5).expand(1, -1)
    torch.save({"positions": positions}, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(tmp_path / "net.pt").state["positions"].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(2).to_sparse(), torch.empty(3, device="meta")],
    ids=["sparse", "meta"],
)
def test_tensors_without_dense_values_are_refused(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="w is no dense tensor"):
        read_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("levels", [100, 20_000])
def test_deep_lists_are_refused(tmp_path, levels):
    pickled = b"\x80\x02}X\x01\x00\x00\x00w" + b"]" * levels + b"a" * (levels - 1) + b"s."
    with pytest.raises(CheckpointError, match="nested deeper"):
        read_checkpoint(with_pickle(tmp_path / "net.pt", pickled))


def test_lists_that_hold_one_another_are_walked_once(tmp_path):
    shared = []
    for _ in range(50):
        shared = [shared, shared]
    torch.save({"w": torch.ones(2), "extra": shared}, tmp_path / "net.pt")
    assert set(read_checkpoint(tmp_path / "net.pt").state) == {"w"}


def test_too_many_entries_are_refused(tmp_path, monkeypatch):
    assert torch_files.MAX_ENTRIES == 1_000_000
    monkeypatch.setattr(torch_files, "MAX_ENTRIES", 1000)
    torch.save({"w": torch.ones(2), "extra": [[0] * 500, [0] * 500]}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="more than 1,000 entries"):
        read_checkpoint(tmp_path / "net.pt")


def test_tuples_whose_hash_would_exhaust_the_stack_or_the_time_are_refused(tmp_path):
    # The first ends the process in torch.load(weights_only=True), the second does not end within a lifetime.
    deep = b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns."
    wide = b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60)) + b"Ns."
    for pickled in (deep, wide):
        with pytest.raises(CheckpointError, match="tuple"):
            read_checkpoint(with_pickle(tmp_path / "net.pt", pickled))


def test_legacy_file_whose_storages_are_not_all_read_is_refused(tmp_path):
    path = tmp_path / "net.th"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(CheckpointError, match="8 bytes belong to no tensor"):
        read_checkpoint(path)


def test_entries_that_differ_by_case_only_are_refused(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("net/DATA.PKL", b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.")
    with pytest.raises(CheckpointError, match=r"exactly one data\.pkl"):
        read_checkpoint(path)


def test_legacy_storage_that_declares_more_than_the_file_holds_is_refused(tmp_path):
    path = tmp_path / "net.th"
    torch.save({"w": torch.ones(7)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"cpuq\x06K\x07") == 1
    path.write_bytes(data.replace(b"cpuq\x06K\x07", b"cpuq\x06J\xff\xff\xff\x7f"))
    with pytest.raises(CheckpointError, match="corrupt"):
        read_checkpoint(path)


def test_damaged_names_are_shown_without_control_characters(tmp_path):
    torch.save({"\x1b[31mred\n": "text"}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "net.pt")
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
