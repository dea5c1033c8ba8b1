import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from official_formats import (
    cifar10_binary,
    cifar10_python,
    cifar100_binary,
    cifar100_python,
    images,
    python3_pickle,
    write_archive,
    write_files,
)

from plasticity_probe.data import cifar
from plasticity_probe.data.cifar import CIFAR10, CIFAR100, read_cifar
from plasticity_probe.errors import DataError

DATA = os.environ.get("PLASTICITY_PROBE_DATA")
TRAIN, TEST = images(10, (3, 32, 32), 10, seed=1), images(3, (3, 32, 32), 10, seed=2)
TRAIN100, TEST100 = images(10, (3, 32, 32), 100, seed=3), images(3, (3, 32, 32), 100, seed=4)

FORMS = [
    (CIFAR10, 0, cifar10_binary(TRAIN, TEST), TRAIN, TEST),
    (CIFAR10, 1, cifar10_python(TRAIN, TEST), TRAIN, TEST),
    (CIFAR10, 1, cifar10_python(TRAIN, TEST, python3_pickle), TRAIN, TEST),
    (CIFAR100, 0, cifar100_binary(TRAIN100, TEST100), TRAIN100, TEST100),
    (CIFAR100, 1, cifar100_python(TRAIN100, TEST100), TRAIN100, TEST100),
    (CIFAR100, 1, cifar100_python(TRAIN100, TEST100, python3_pickle), TRAIN100, TEST100),
]
NAMES = ["10-binary", "10-python", "10-python3", "100-binary", "100-python", "100-python3"]


@pytest.mark.parametrize("place", ["folder", "archive", "itself"])
@pytest.mark.parametrize(("data", "version", "files", "train", "test"), FORMS, ids=NAMES)
def test_official_files_are_read_byte_for_byte(tmp_path, place, data, version, files, train, test):
    version = data.versions[version]
    if place == "archive":
        write_archive(tmp_path / version.archive, version.folder, files | {"readme.html": b"<html>"})
    else:
        write_files(tmp_path / version.folder, files)
    read = read_cifar(data, tmp_path / version.folder if place == "itself" else tmp_path)
    assert read is not None
    assert (read.name, read.mean, read.std) == (data.name, data.mean, data.std)
    assert read.classes == tuple(f"class{i}" for i in range(10 if data is CIFAR10 else 100))
    assert read.source == str(tmp_path / (version.archive if place == "archive" else version.folder))
    for split, written in (("train", train), ("test", test)):
        np.testing.assert_array_equal(read.splits[split].inputs, written.pixels)
        np.testing.assert_array_equal(read.splits[split].targets, written.labels)


def test_the_python_2_pickle_of_the_tests_is_one_that_numpy_reads():
    content = pickle.loads(cifar10_python(TRAIN, TEST)["test_batch"], encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], TEST.pixels.reshape(3, -1))
    assert content[b"labels"] == TEST.labels.tolist()


def test_arrays_in_fortran_order_keep_their_meaning(tmp_path):
    files = cifar10_python(TRAIN, TEST, lambda content: python3_pickle({k: _fortran(v) for k, v in content.items()}))
    write_files(tmp_path / "cifar-10-batches-py", files)
    read = read_cifar(CIFAR10, tmp_path)
    assert read is not None
    np.testing.assert_array_equal(read.splits["train"].inputs, TRAIN.pixels)


def _fortran(value):
    return np.asfortranarray(value) if isinstance(value, np.ndarray) else value


def test_a_root_without_every_file_has_no_data_set(tmp_path):
    assert read_cifar(CIFAR10, tmp_path) is None
    files = cifar10_binary(TRAIN, TEST)
    del files["data_batch_4.bin"]
    write_files(tmp_path / "cifar-10-batches-bin", files)
    assert read_cifar(CIFAR10, tmp_path) is None
    write_archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", cifar10_python(TRAIN, TEST))
    read = read_cifar(CIFAR10, tmp_path)
    assert read is not None
    assert read.source.endswith("cifar-10-python.tar.gz")


class Attack:
    """A pickle that makes a file when it is loaded by pickle itself."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def attack_forms(canary: Path) -> list[bytes]:
    plain = pickle.dumps({"data": Attack(canary)}, 2)
    by_opcode = f"cos\nmkdir\n(V{canary}\ntR.".encode()
    by_inst = f"(V{canary}\nios\nmkdir\n.".encode()
    by_builtins = f"cbuiltins\nexec\n(Vimport os; os.mkdir({str(canary)!r})\ntR.".encode()
    by_dotted = b"\x80\x04\x8c\x05numpy\x8c\x13ctypeslib.os.system\x93\x8c\x04true\x85R."
    by_stack_global = pickle.dumps(Attack(canary), 4)
    by_codec = b"c_codecs\nencode\n(Vx\nVhex\ntR."
    by_numpy_load = f"cnumpy\nmemmap\n(V{canary}\nVuint8\nVw+\ntR.".encode()
    return [plain, by_opcode, by_inst, by_builtins, by_dotted, by_stack_global, by_codec, by_numpy_load]


@pytest.mark.parametrize("form", range(8))
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, form):
    canary = tmp_path / "canary"
    files = cifar10_python(TRAIN, TEST) | {"data_batch_2": attack_forms(canary)[form]}
    write_files(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(DataError, match=r"data_batch_2.*(nothing was run|codec)"):
        read_cifar(CIFAR10, tmp_path)
    assert not canary.exists()


def test_the_attack_would_work_on_pickle_itself(tmp_path):
    for form in (0, 1, 2, 3, 5):
        canary = tmp_path / f"canary{form}"
        pickle.loads(attack_forms(canary)[form])
        assert canary.exists()


def test_mutated_pickles_end_in_a_data_error_or_in_data():
    content = cifar10_python(TRAIN, TEST)["batches.meta"]
    generator = np.random.default_rng(5)
    for _ in range(300):
        mutated = bytearray(content)
        for place in generator.integers(0, len(mutated), 3):
            mutated[place] = generator.integers(0, 256)
        try:
            cifar.read_pickle(bytes(mutated), "it")
        except DataError as error:
            assert str(error).startswith("it")  # noqa: PT017


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"junk", "damaged"),
        (pickle.dumps([1], 2), "holds a list"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, 2), "not uint8"),
        (pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, 2), "no array 'data' of N × 3072"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, 2), "2 images, but 1 labels"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 0.5]}, 2), "no list 'labels' of integers"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]}, 2), "found: data, fine_labels"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, 2), "1 of .* labels"),
        (pickle.dumps({"data": np.array([None]), "labels": [0]}, 2), "not uint8"),
    ],
)
def test_other_pickles_are_refused(tmp_path, content, message):
    write_files(tmp_path / "cifar-10-batches-py", cifar10_python(TRAIN, TEST) | {"test_batch": content})
    with pytest.raises(DataError, match=message):
        read_cifar(CIFAR10, tmp_path)


def test_a_truncated_binary_file_is_refused(tmp_path):
    files = cifar10_binary(TRAIN, TEST)
    files["data_batch_3.bin"] = files["data_batch_3.bin"][:-1]
    write_files(tmp_path / "cifar-10-batches-bin", files)
    with pytest.raises(
        DataError, match=r"data_batch_3\.bin has 6145 bytes, which is no whole number of 3073-byte records"
    ):
        read_cifar(CIFAR10, tmp_path)


def test_class_names_must_be_text(tmp_path):
    write_files(tmp_path / "cifar-10-batches-bin", cifar10_binary(TRAIN, TEST) | {"batches.meta.txt": b"\xff\xfe"})
    with pytest.raises(DataError, match="no list of class names"):
        read_cifar(CIFAR10, tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_archive_is_refused(tmp_path, keep):
    path = tmp_path / "cifar-10-binary.tar.gz"
    write_archive(path, "cifar-10-batches-bin", cifar10_binary(TRAIN, TEST))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz (is damaged|lacks)"):
        read_cifar(CIFAR10, tmp_path)


def test_an_archive_without_a_file_names_it(tmp_path):
    files = cifar10_binary(TRAIN, TEST)
    del files["test_batch.bin"]
    write_archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files)
    with pytest.raises(DataError, match=r"lacks cifar-10-batches-bin/test_batch\.bin"):
        read_cifar(CIFAR10, tmp_path)


def test_an_archive_writes_nothing_and_follows_no_link(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 3073)
    files = cifar10_binary(TRAIN, TEST)
    del files["test_batch.bin"]
    path = tmp_path / "root/cifar-10-binary.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (files | {"../../../escaped": b"x", "/absolute": b"x"}).items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="lacks"):
        read_cifar(CIFAR10, tmp_path / "root")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_that_is_far_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "LARGEST_FILE", 4000)
    write_archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", cifar10_binary(TRAIN, TEST))
    with pytest.raises(DataError, match="lacks"):
        read_cifar(CIFAR10, tmp_path)


@pytest.mark.skipif(DATA is None, reason="PLASTICITY_PROBE_DATA is not set")
def test_the_real_cifar10():
    read = read_cifar(CIFAR10, Path(str(DATA)))
    assert read is not None
    train, test = read.splits["train"], read.splits["test"]
    assert train.inputs.shape == (50000, 3, 32, 32)
    assert np.bincount(train.targets).tolist() == [5000] * 10
    assert np.bincount(test.targets).tolist() == [1000] * 10
    assert train.targets[:5].tolist() == [6, 9, 9, 4, 1]
    assert read.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    # This copy may have been through JPEG, which moves the moments a little.
    assert read.mean is not None
    assert read.std is not None
    for channel in range(3):
        pixels = train.inputs[:, channel] / np.float32(255)
        assert abs(pixels.mean(dtype=np.float64) - read.mean[channel]) < 1e-3
        assert abs(pixels.std(dtype=np.float64) - read.std[channel]) < 3e-3
