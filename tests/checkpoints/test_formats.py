import argparse
import collections
import hashlib
import json
import pathlib
import random
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from plasticity_probe.checkpoints.formats import read_checkpoint, write_checkpoint
from plasticity_probe.errors import CheckpointError, UsageError


def network_state(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).state_dict()


def save_zip(saved, path):
    torch.save(saved, path)


def save_legacy(saved, path):
    torch.save(saved, path, _use_new_zipfile_serialization=False)


def same(found, expected):
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(params=[save_zip, save_legacy], ids=["zip", "legacy"])
def save(request):
    return request.param


@pytest.mark.parametrize(("save", "form"), [(save_zip, "torch-zip"), (save_legacy, "torch-legacy")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".h5", ""])
def test_format_is_known_by_content_whatever_the_name(tmp_path, save, form, suffix):
    path = tmp_path / f"net{suffix}"
    save(network_state(), path)
    file = read_checkpoint(path)
    assert (file.format, file.path, file.size) == (form, path, path.stat().st_size)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(file.state, network_state())
    assert file.metadata == {}


def test_foreign_safetensors_file(tmp_path):
    save_file(dict(network_state()), tmp_path / "net.pt", metadata={"format": "pt"})
    file = read_checkpoint(tmp_path / "net.pt")
    assert file.format == "safetensors"
    assert file.metadata == {"format": "pt"}
    assert all(torch.equal(file.state[name], value) for name, value in network_state().items())


@pytest.mark.parametrize(
    ("wrapped", "taken"),
    [
        ({"state_dict": 1}, "state_dict"),
        ({"model": 1}, "model"),
        ({"model_state_dict": 1}, "model_state_dict"),
        ({"net": 1}, "net"),
        ({"weights": 1}, "weights"),
        ({"model_ema": 2, "model": 1}, "model"),
        ({"state_dict_ema": 2, "state_dict": 1}, "state_dict"),
        ({"model": 2, "state_dict": 1}, "state_dict"),
        ({"ema": 1}, "ema"),
        ({"model": {"state_dict": 1}}, "model.state_dict"),
    ],
)
def test_wrapped_state_dicts(tmp_path, save, wrapped, taken):
    def filled(value):
        return {key: filled(item) for key, item in value.items()} if isinstance(value, dict) else network_state(value)

    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    save(filled(wrapped) | {"optimizer": optimizer, "epoch": 7, "best_acc1": torch.tensor(0.5)}, tmp_path / "net.pt")
    file = read_checkpoint(tmp_path / "net.pt")
    assert same(file.state, network_state(1))
    assert file.metadata == {"unwrapped": taken, "epoch": 7, "best_acc1": 0.5}


def test_lightning_checkpoint(tmp_path, save):
    lightning = {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": collections.OrderedDict((f"net.{name}", value) for name, value in network_state().items()),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x"}},
        "hyper_parameters": {"lr": 0.1},
    }
    save(lightning, tmp_path / "last.ckpt")
    file = read_checkpoint(tmp_path / "last.ckpt")
    assert file.metadata["epoch"] == 3
    assert file.metadata["global_step"] == 1200
    assert set(file.state) == {f"net.{name}" for name in network_state()}


def test_leftovers_of_a_state_dict_are_dropped_and_named(tmp_path, save):
    save({**network_state(), "_metadata": {"version": 1}, "version": 3, 5: torch.ones(1)}, tmp_path / "net.pt")
    file = read_checkpoint(tmp_path / "net.pt")
    assert same(file.state, network_state())
    assert file.metadata == {"dropped": ["_metadata", "version", "5"]}


def test_data_that_training_scripts_save_is_read_without_trust(tmp_path, save):
    factory = collections.defaultdict(int, {"a": 1})
    saved = {
        "state_dict": network_state(),
        "args": argparse.Namespace(lr=0.1, folder=pathlib.Path("runs")),
        "best_acc": np.float64(0.25),
        "step": np.int64(12),
        "done": np.bool_(True),
        "history": np.arange(3),
        "random": np.random.RandomState(0).get_state(),
        "folder": pathlib.Path("/runs/a"),
        "counts": factory,
        "lists": collections.defaultdict(list),
    }
    save(saved, tmp_path / "net.pt")
    before = set(map(str, torch.serialization.get_safe_globals()))
    file = read_checkpoint(tmp_path / "net.pt")
    assert same(file.state, network_state())
    assert file.metadata == {
        "unwrapped": "state_dict", "best_acc": 0.25, "step": 12, "done": True, "folder": "/runs/a"
    }  # fmt: skip
    assert type(file.metadata["best_acc"]) is float
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_whole_module_needs_trust(tmp_path, save):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"model": nn.Linear(2, 3)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*--trust-pickle"):
        read_checkpoint(tmp_path / "net.pt")
    assert set(read_checkpoint(tmp_path / "net.pt", trust_pickle=True).state) == {"weight", "bias"}


def test_cuda_tagged_legacy_file_is_read_on_the_cpu(tmp_path):
    save_legacy(network_state(), tmp_path / "net.th")
    data = (tmp_path / "net.th").read_bytes()
    tagged = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert tagged != data
    (tmp_path / "net.th").write_bytes(tagged)
    file = read_checkpoint(tmp_path / "net.th")
    assert same(file.state, network_state())
    assert {value.device.type for value in file.state.values()} == {"cpu"}


def test_weights_that_are_not_finite_are_no_error(tmp_path, save):
    save({"weight": torch.tensor([float("nan"), float("inf")])}, tmp_path / "net.pt")
    assert not read_checkpoint(tmp_path / "net.pt").state["weight"].isfinite().any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x93NUMPY" + bytes(100), "NumPy"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
        (b"<!DOCTYPE html><html>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"\x80\x04\x95" + bytes(30), "plain pickle"),
        (b"a" * 1000, "unknown content"),
        (struct.pack("<Q", 20) + b"{" + bytes(40), "corrupt"),
    ],
)
def test_other_files_are_refused_with_what_they_are(tmp_path, content, message):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "net.pt")


def test_missing_file_folder_zip_and_torchscript(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="a folder"):
        read_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"data\.pkl"):
        read_checkpoint(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("net/constants.pkl", "")
        archive.writestr("net/data.pkl", "")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "script.pt", trust_pickle=True)


@pytest.mark.parametrize("saved", [[1, 2], {"epoch": 3}, {"optimizer": {"state": {}}}, torch.ones(2)])
def test_file_without_a_state_dict(tmp_path, save, saved):
    save(saved, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(tmp_path / "net.pt")


def test_own_format_round_trip_with_tied_weights_and_every_dtype(tmp_path):
    embedding = torch.randn(4, 3)
    whole = torch.arange(10.0)
    state = {
        "embed.weight": embedding,
        "head.weight": embedding,
        "half": torch.randn(5).to(torch.bfloat16),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "complex": torch.randn(2, dtype=torch.complex64),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 2).T,
        "front": whole[:5],
        "back": whole[5:],
        "nan": torch.tensor([float("nan")]),
    }
    metadata = {
        "run": "a",
        "step": 10,
        "task": 2,
        "seed": 0,
        "loss": 0.25,
        "architecture": {"name": "mlp-relu", "widths": [3, 2]},
    }
    path = tmp_path / "step10.safetensors"
    write_checkpoint(path, state, metadata)
    file = read_checkpoint(path)
    assert file.format == "plasticity_probe"
    assert file.metadata == metadata
    assert set(file.state) == set(state)
    for name, value in state.items():
        assert file.state[name].dtype == value.dtype
        assert torch.equal(file.state[name].nan_to_num(7.0), value.nan_to_num(7.0)), name
    assert file.state["embed.weight"] is file.state["head.weight"]
    assert file.state["front"].data_ptr() != file.state["back"].data_ptr()
    assert [item.name for item in tmp_path.iterdir()] == ["step10.safetensors"]


def test_own_format_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    write_checkpoint(path, {"w": torch.zeros(3)}, {"step": 1})
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(path, {"w": torch.ones(3)}, {"step": 2})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["net.safetensors"]


def test_metadata_that_is_no_json_is_refused(tmp_path):
    with pytest.raises(UsageError, match="JSON"):
        write_checkpoint(tmp_path / "net.safetensors", {"w": torch.zeros(3)}, {"device": torch.device("cpu")})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(tmp_path / "absent" / "net.safetensors", {"w": torch.zeros(3)}, {})


@pytest.mark.parametrize("text", ["{", "[1]", "null", "[" * 100_000])
@pytest.mark.parametrize("forged", ["metadata", "tied"])
def test_own_metadata_is_untrusted(tmp_path, monkeypatch, text, forged):
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda value: text if ("step" in value) == (forged == "metadata") else "{}")
        write_checkpoint(tmp_path / "net.safetensors", {"w": torch.zeros(3)}, {"step": 1})
    with pytest.raises(CheckpointError, match="corrupt"):
        read_checkpoint(tmp_path / "net.safetensors")


@pytest.mark.parametrize("tied", [{"w": "w"}, {"v": "absent"}])
def test_list_of_tied_tensors_is_untrusted(tmp_path, monkeypatch, tied):
    dumps = json.dumps
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda value: dumps(value or tied))
        write_checkpoint(tmp_path / "net.safetensors", {"w": torch.zeros(3)}, {"step": 1})
    with pytest.raises(CheckpointError, match="tied"):
        read_checkpoint(tmp_path / "net.safetensors")


def test_json_in_a_foreign_header_is_only_text(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "net.safetensors", metadata={"config": "{broken"})
    file = read_checkpoint(tmp_path / "net.safetensors")
    assert (file.format, file.metadata) == ("safetensors", {"config": "{broken"})
    save_file({"w": torch.zeros(3)}, tmp_path / "forged.safetensors", metadata={"plasticity_probe": "{}"})
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(tmp_path / "forged.safetensors")


def test_flipped_bit_of_a_weight_is_found_in_our_own_format(tmp_path):
    path = tmp_path / "net.safetensors"
    write_checkpoint(path, {"w": torch.ones(30)}, {})
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)


def mutants(data, count, seed):
    source = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        changed[source.randrange(len(data))] ^= 1 << source.randrange(8)
        yield bytes(changed)


def save_own(saved, path):
    write_checkpoint(path, saved, {"step": 1, "architecture": {"name": "mlp-relu"}})


def save_safetensors(saved, path):
    save_file(dict(saved), path)


WRITERS = {"zip": save_zip, "legacy": save_legacy, "own": save_own, "safetensors": save_safetensors}


@pytest.mark.parametrize("form", WRITERS)
def test_bit_flips_give_a_refusal_or_a_state_dict_and_nothing_else(tmp_path, form):
    path = tmp_path / "net.pt"
    WRITERS[form](network_state(), path)
    refusals = 0
    for mutant in mutants(path.read_bytes(), 200, seed=1):
        path.write_bytes(mutant)
        try:
            state = read_checkpoint(path).state
            # The formats with checksums never give a wrong weight; what may flip there is padding and dates.
            assert same(dict(sorted(state.items())), dict(sorted(network_state().items()))) or form in (
                "legacy",
                "safetensors",
            )
        except CheckpointError:
            refusals += 1
    assert refusals > 0


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_truncated_files_are_refused(tmp_path, form, share):
    path = tmp_path / "net.pt"
    WRITERS[form](network_state(), path)
    data = path.read_bytes()
    path.write_bytes(data[: max(1, min(len(data) - 1, int(share * len(data))))])
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_entry_marked_as_a_folder_is_refused_where_torch_leaves_its_memory_unfilled(tmp_path):
    path = tmp_path / "net.pt"
    weights = torch.arange(1.0, 65.0)
    torch.save({"w": weights}, path)
    data = bytearray(path.read_bytes())
    entry = data.rindex(
        b"net/data/0"
    )  # its name ends the 46 bytes of its central header; the attributes are 8 bytes before
    assert data[entry - 46 : entry - 42] == b"PK\x01\x02"
    data[entry - 8] ^= 0x10
    path.write_bytes(data)
    # torch.load returns whatever that memory held before, which no test can state.
    assert torch.load(path, weights_only=True)["w"].shape == weights.shape
    with pytest.raises(CheckpointError, match="marked as a folder"):
        read_checkpoint(path)


def test_flipped_bits_of_weights_are_found_in_zip_files_where_torch_finds_none(tmp_path):
    path = tmp_path / "net.pt"
    weights = torch.arange(1.0, 65.0)
    torch.save({"w": weights}, path)
    data = path.read_bytes()
    start = data.index(weights.numpy().tobytes())
    unnoticed = 0
    for offset in range(0, 256, 5):
        changed = bytearray(data)
        changed[start + offset] ^= 16
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="checksum"):
            read_checkpoint(path)
        unnoticed += not torch.equal(torch.load(path, weights_only=True)["w"], weights)
    assert unnoticed == 52
