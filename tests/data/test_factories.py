import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from plasticity_probe.data.dataset import DataSet, Split, UserLoader
from plasticity_probe.data.factories import as_data, read_factory
from plasticity_probe.errors import DataError

X, Y = np.arange(12, dtype=np.float32).reshape(6, 2), np.array([0, 1, 2, 0, 1, 2])
SPLIT = Split(X, Y)


@pytest.mark.parametrize(
    "made",
    [
        (X, Y),
        (X.astype(np.float64), Y.astype(np.int32)),
        (torch.from_numpy(X), torch.from_numpy(Y)),
        (torch.from_numpy(X).requires_grad_(), Y),
        (torch.from_numpy(X).bfloat16(), Y),
        SPLIT,
        {"train": (X, Y)},
        {"train": SPLIT},
    ],
)
def test_arrays_of_any_form_are_a_data_set(made):
    data = as_data(made, "mine")
    assert isinstance(data, DataSet)
    assert (data.name, data.source, list(data.splits)) == ("mine", "mine", ["train"])
    np.testing.assert_array_equal(data.splits["train"].inputs, X)
    np.testing.assert_array_equal(data.splits["train"].targets, Y)


def test_a_dict_keeps_its_splits():
    data = as_data({"train": (X, Y), "test": (X[:2], Y[:2])}, "mine")
    assert isinstance(data, DataSet)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 6, "test": 2}


def test_data_sets_and_loaders_are_handed_on_untouched():
    data = DataSet("own", {"train": SPLIT})
    assert as_data(data, "mine") is data
    tensors = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    pair = [torch.from_numpy(X), torch.from_numpy(Y)]
    generator = ((X, Y) for _ in range(1))
    for loader in (DataLoader(tensors, 2), [(X, Y)], pair, ((X, Y), (X, Y)), generator):
        wrapped = as_data(loader, "mine")
        assert isinstance(wrapped, UserLoader)
        assert wrapped.loader is loader
        assert wrapped.name == "mine"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "gave a NoneType"),
        (3, "gave a int"),
        (TensorDataset(torch.zeros(2, 1)), r"TensorDataset, .*DataLoader\(dataset"),
        ({"train": 3}, "split 'train' is a int"),
        ({}, "no split"),
        ((X, Y[:3]), "mine, split 'train': .*6 inputs, 3 targets"),
    ],
)
def test_other_things_are_refused(made, message):
    with pytest.raises(DataError, match=message):
        as_data(made, "mine")


SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np

@dataclass
class Settings:
    n: int = 4

def tiny():
    return np.ones((Settings().n, 2), np.float32), np.arange(4)

def broken():
    raise RuntimeError("no luck")

constant = 3
"""


def test_a_function_in_a_file(tmp_path):
    path = tmp_path / "my data.py"
    path.write_text(SOURCE)
    data = read_factory(f"{path}:tiny")
    assert isinstance(data, DataSet)
    assert data.splits["train"].targets.tolist() == [0, 1, 2, 3]
    assert data.source == f"{path}:tiny"


def test_a_function_in_a_module(tmp_path, monkeypatch):
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package/tables.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    data = read_factory("some_package.tables:tiny")
    assert isinstance(data, DataSet)
    assert len(data.splits["train"]) == 4


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{}:broken", "raised RuntimeError: no luck; it is called without arguments"),
        ("{}:missing", "no function 'missing' there; found: Settings, broken, dataclass, tiny"),
        ("{}:constant", "no function 'constant'"),
        ("{}x.py:tiny", "there is no file"),
        ("no_such_package.data:tiny", "importing no_such_package.data failed with ModuleNotFoundError"),
        ("nonsense", "no reference"),
    ],
)
def test_what_cannot_be_called_is_refused(tmp_path, reference, message):
    path = tmp_path / "data.py"
    path.write_text(SOURCE)
    with pytest.raises(DataError, match=message) as caught:
        read_factory(reference.format(path))
    assert caught.value.__cause__ is None or "Error" in type(caught.value.__cause__).__name__


def test_a_file_that_fails_is_refused_and_leaves_no_module(tmp_path):
    (tmp_path / "half.py").write_text("import no_such_module\n")
    with pytest.raises(DataError, match="No module named 'no_such_module'"):
        read_factory(f"{tmp_path / 'half.py'}:tiny")
    assert "plasticity_probe_user_half" not in sys.modules
