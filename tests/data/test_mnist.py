import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from official_formats import idx_bytes, images, md5, write_idx

from plasticity_probe.data import mnist
from plasticity_probe.data.mnist import FASHION_MNIST, IDX_SETS, KMNIST, MNIST, read_idx, read_idx_set
from plasticity_probe.errors import DataError

DATA = os.environ.get("PLASTICITY_PROBE_DATA")
TRAIN, TEST = images(7, (28, 28), 10, seed=1), images(3, (28, 28), 10, seed=2)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("data", "folder"),
    [
        (MNIST, "MNIST/raw"),
        (MNIST, "mnist"),
        (MNIST, "."),
        (FASHION_MNIST, "FashionMNIST/raw"),
        (KMNIST, "KMNIST/raw"),
        (KMNIST, "."),
    ],
)
def test_official_files_are_read_byte_for_byte(tmp_path, data, folder, zipped):
    write_idx(tmp_path / folder, TRAIN, TEST, zipped=zipped)
    read = read_idx_set(data, tmp_path)
    assert read is not None
    assert (read.name, read.classes) == (data.name, data.classes)
    assert read.source == str(tmp_path / folder)
    for split, written in (("train", TRAIN), ("test", TEST)):
        np.testing.assert_array_equal(read.splits[split].inputs, written.pixels[:, None])
        np.testing.assert_array_equal(read.splits[split].targets, written.labels)
        assert read.splits[split].inputs.dtype == np.uint8


def test_a_root_without_all_four_files_has_no_data_set(tmp_path):
    assert read_idx_set(MNIST, tmp_path) is None
    write_idx(tmp_path / "MNIST/raw", TRAIN, TEST, zipped=True)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    assert read_idx_set(MNIST, tmp_path) is None


def test_one_set_is_not_taken_for_another_that_shares_its_file_names(tmp_path, monkeypatch):
    write_idx(tmp_path / "FashionMNIST/raw", TRAIN, TEST, zipped=False)
    assert read_idx_set(MNIST, tmp_path / "FashionMNIST/raw") is None
    assert read_idx_set(FASHION_MNIST, tmp_path / "FashionMNIST/raw") is not None
    write_idx(tmp_path / "files", TRAIN, TEST, zipped=True)
    assert read_idx_set(MNIST, tmp_path / "files") is not None
    labels = "train-labels-idx1-ubyte.gz"
    known = mnist.IdxSet("other", (), (), 0, 1, {labels: md5((tmp_path / "files" / labels).read_bytes())})
    monkeypatch.setattr(mnist, "IDX_SETS", (MNIST, known))
    assert read_idx_set(MNIST, tmp_path / "files") is None


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (1, 1, 1, 1)])
def test_idx_of_any_shape(tmp_path, shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    (tmp_path / "a").write_bytes(idx_bytes(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), array)


GOOD = idx_bytes(np.arange(6, dtype=np.uint8).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], r"declares \(2, 3\), 6 values, but holds 5"),
        (GOOD + b"\0", "but holds 7"),
        (GOOD[:9], "no idx file"),
        (b"", "starts with nothing"),
        (b"\x00\x00\x0d" + GOOD[3:], "starts with 00 00 0d"),
        (b"<html>", "no idx file"),
        (gzip.compress(GOOD)[:-9], "cannot be read"),
        (gzip.compress(GOOD)[:-8] + bytes(8), "CRC"),
    ],
)
def test_damaged_idx_is_refused(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "a")


def test_labels_beyond_the_classes_are_refused(tmp_path):
    wrong = images(7, (28, 28), 10, seed=1)
    wrong.labels[:2] = 10
    write_idx(tmp_path, wrong, TEST, zipped=False)
    with pytest.raises(DataError, match=r"2 of 7 labels .* 0 to 9"):
        read_idx_set(MNIST, tmp_path)


@pytest.mark.skipif(DATA is None, reason="PLASTICITY_PROBE_DATA is not set")
def test_the_real_mnist():
    read = read_idx_set(MNIST, Path(str(DATA)))
    assert read is not None
    train, test = read.splits["train"], read.splits["test"]
    assert np.bincount(train.targets).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert len(test) == 10000
    # Published to four digits.
    pixels = train.inputs / np.float32(255)
    assert read.mean is not None
    assert read.std is not None
    assert abs(pixels.mean(dtype=np.float64) - read.mean[0]) < 5e-5
    assert abs(pixels.std(dtype=np.float64) - read.std[0]) < 5e-5


@pytest.mark.skipif(DATA is None, reason="PLASTICITY_PROBE_DATA is not set")
def test_the_checksums_are_those_of_the_real_files():
    folder = Path(str(DATA)) / MNIST.folders[0]
    assert {name: md5((folder / name).read_bytes()) for name in MNIST.md5} == MNIST.md5


def test_no_checksum_appears_twice():
    digests = [digest for data in IDX_SETS for digest in data.md5.values()]
    assert len(set(digests)) == 12
    assert all(len(digest) == 32 for digest in digests)
