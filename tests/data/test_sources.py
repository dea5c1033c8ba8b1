import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official_formats import images, write_idx
from PIL import Image

from plasticity_probe.data.dataset import DataSet, Split, UserLoader
from plasticity_probe.data.sources import NAMED, data_roots, load_data
from plasticity_probe.errors import DataError, UnknownNameError

DATA = os.environ.get("PLASTICITY_PROBE_DATA")
TRAIN, TEST = images(7, (28, 28), 10, seed=1), images(3, (28, 28), 10, seed=2)


def load(*args, **kwargs) -> DataSet:
    data = load_data(*args, **kwargs)
    assert isinstance(data, DataSet)
    return data


def test_the_root_comes_from_the_argument_then_the_environment_then_the_usual_places(tmp_path, monkeypatch):
    home = Path.home()
    assert data_roots() == (home / ".cache/plasticity_probe", home / "data", Path("data"))
    monkeypatch.setenv("PLASTICITY_PROBE_DATA", "~/mine")
    assert data_roots() == (home / "mine",)
    assert data_roots(tmp_path) == (tmp_path,)
    monkeypatch.setenv("PLASTICITY_PROBE_DATA", "")
    assert len(data_roots()) == 3


def test_the_first_root_that_has_it_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_idx(Path("data/MNIST/raw"), TRAIN, TEST, zipped=True)
    assert load("mnist").source == "data/MNIST/raw"
    write_idx(Path.home() / ".cache/plasticity_probe/mnist", TRAIN, TEST, zipped=False)
    assert load("mnist").source == str(Path.home() / ".cache/plasticity_probe/mnist")


def test_missing_data_says_where_it_was_looked_for_and_what_to_do(tmp_path):
    with pytest.raises(DataError) as caught:
        load_data("cifar100")
    text = str(caught.value)
    for part in (
        ".cache/plasticity_probe (no such folder)",
        "/data (no",
        "--data-root",
        "$PLASTICITY_PROBE_DATA",
        "--download",
    ):
        assert part in text
    assert "cifar-100-binary.tar.gz" in text
    with pytest.raises(DataError, match=rf"'mnist' in {tmp_path}: .*MNIST/raw/t10k-labels-idx1-ubyte\.gz"):
        load_data("mnist", root=tmp_path)


def test_digits_need_no_root(tmp_path):
    assert load("digits", root=tmp_path / "nowhere").source == "sklearn.datasets.load_digits"


def test_files_folders_and_functions(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3), np.float32), y=np.arange(2))
    assert load(tmp_path / "a.npz").name == "a"
    assert load(str(tmp_path / "a.npz")).name == "a"
    (tmp_path / "pets/cat").mkdir(parents=True)
    Image.fromarray(TRAIN.pixels[0]).save(tmp_path / "pets/cat/0.png")
    assert load(tmp_path / "pets").classes == ("cat",)
    (tmp_path / "mine.py").write_text("def batches():\n    return [(1, 2)]\n")
    loader = load_data(f"{tmp_path}/mine.py:batches")
    assert isinstance(loader, UserLoader)
    assert loader.loader == [(1, 2)]


def test_a_name_goes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits/zero").mkdir(parents=True)
    Image.fromarray(TRAIN.pixels[0]).save(tmp_path / "digits/zero/0.png")
    assert load("digits").classes == tuple("0123456789")
    assert load("./digits").classes == ("zero",)


def test_an_unknown_name_has_a_near_miss():
    with pytest.raises(UnknownNameError, match=r"no data set named 'cifar-10'. Did you mean 'cifar10'"):
        load_data("cifar-10")


@pytest.mark.parametrize(
    "name", ["./mnist", "folder/mnist", "~/x", "images.npz", "images.npy", "mine.py", Path("mnist2")]
)
def test_a_path_that_does_not_exist_is_no_unknown_name(name):
    with pytest.raises(DataError, match="there is no file or folder"):
        load_data(name)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(DataError, match=r"name the function in it: .*mine\.py:factory"):
        load_data(tmp_path / "mine.py")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match=r"a\.csv is neither an \.npz file nor a folder"):
        load_data(tmp_path / "a.csv")


def test_more_names_can_be_merged_in(tmp_path):
    own = DataSet("own", {"train": Split(np.ones((1, 1), np.float32), np.zeros(1, np.int64))})
    named = {**NAMED, "own": lambda root: own if root == tmp_path else None}
    assert load_data("own", root=tmp_path, named=named) is own
    with pytest.raises(DataError, match="no complete data set 'own'"):
        load_data("own", named=named, download=True)


def test_importing_the_sources_imports_no_reader_s_library():
    code = "import plasticity_probe.data.sources, sys; print({'sklearn', 'PIL', 'torchvision', 'scipy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "set()"


@pytest.mark.skipif(DATA is None, reason="PLASTICITY_PROBE_DATA is not set")
def test_real_data_by_name_and_as_a_file(monkeypatch):
    monkeypatch.setenv("PLASTICITY_PROBE_DATA", str(DATA))
    assert len(load("mnist").splits["train"]) == 60000
    lossless = load(Path(str(DATA)) / "cifar10_lossless.npz")
    assert {name: split.inputs.shape for name, split in lossless.splits.items()} == {
        "train": (2048, 3, 32, 32),
        "test": (1017, 3, 32, 32),
    }
