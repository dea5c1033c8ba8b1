from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from plasticity_probe.errors import DataError, SubjectError
from plasticity_probe.network.examples import batch_size, map_tensors, read_examples, tensors_of

X, Y = torch.arange(33.0).reshape(33, 1), torch.arange(33)


def ragged() -> list[tuple[Tensor, Tensor]]:
    return [(X[:32], Y[:32]), (X[32:], Y[32:])]


@given(st.integers(1, 40), st.integers(1, 40))
def test_chunks_cover_every_example_once_in_order(size: int, batch: int) -> None:
    examples = read_examples(DataLoader(TensorDataset(X, Y), batch_size=batch))
    chunks = list(examples.chunks(size))
    assert len(examples) == 33
    assert all(len(y) <= size for _, y in chunks)
    assert torch.equal(torch.cat([x for x, _ in chunks]), X)
    assert torch.equal(torch.cat([y for _, y in chunks]), Y)


def test_the_hash_depends_on_the_examples_and_not_on_the_batches() -> None:
    one, two = read_examples([(X, Y)]), read_examples(ragged())
    assert one.sha256 == two.sha256
    assert one.sha256 != read_examples([(X + 1, Y)]).sha256


def test_a_limit_cuts_within_a_batch() -> None:
    examples = read_examples(ragged(), limit=5)
    assert len(examples) == 5
    assert len(examples.take(3)) == 3
    assert examples.take(9) is examples


def test_a_shuffling_loader_is_read_once_and_then_fixed() -> None:
    examples = read_examples(DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True))
    first, second = ([y for _, y in examples.chunks(7)] for _ in range(2))
    assert torch.equal(torch.cat(first), torch.cat(second))


def test_examples_do_not_share_memory_with_the_loader() -> None:
    x = torch.ones(4, 1)
    examples = read_examples([(x, torch.zeros(4))])
    x.zero_()
    assert next(iter(examples.chunks(4)))[0].sum() == 4


@pytest.mark.parametrize("wrap", [dict, UserDict])
def test_mappings_and_nested_batches(wrap: type) -> None:
    batch = wrap({"a": X, "more": [Y, (X, Y)], "text": "kept"})
    assert len(tensors_of(batch)) == 4
    assert batch_size(batch) == 33
    assert map_tensors(lambda t: t[:2], batch)["text"] == "kept"
    cut = read_examples([wrap({"a": X, "b": np.arange(33)})])
    assert [len(piece["b"]) for piece in cut.chunks(20)] == [20, 13]


def test_batches_that_cannot_be_cut_are_kept_whole() -> None:
    examples = read_examples([{"x": X, "edges": torch.zeros(2, 7)}, {"x": X[:5], "edges": torch.zeros(2, 3)}])
    assert not examples.sliceable
    assert [len(batch["x"]) for batch in examples.chunks(4)] == [33, 5]
    assert len(examples.take(3)) == 33


def test_an_empty_loader_and_batches_without_tensors_are_refused() -> None:
    with pytest.raises(DataError, match="the loader is empty"):
        read_examples([])
    with pytest.raises(DataError, match="tensors with one row per example"):
        read_examples(["words"])


def test_examples_too_large_to_keep_are_read_again() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=8)
    kept, reread = read_examples(loader), read_examples(loader, memory=100)
    assert not reread.resident
    assert len(reread) == 33
    assert torch.equal(torch.cat([y for _, y in reread.chunks(5)]), Y)
    assert len(reread.take(10)) == 10
    assert reread.take(10).sha256 == kept.take(10).sha256


@pytest.mark.parametrize("change", ["order", "values", "length"])
def test_a_loader_that_differs_between_passes_is_refused(change: str) -> None:
    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            later = self.passes > 2
            if change == "length" and later:
                return iter(ragged()[:1])
            if change == "order" and later:
                return iter(ragged()[::-1])
            return iter([(x + (later and change == "values"), y) for x, y in ragged()])

    examples = read_examples(Loader(), memory=100)
    with pytest.raises(SubjectError, match="other examples at a second pass"):
        list(examples.chunks(8))


def test_a_generator_too_large_to_keep_is_refused() -> None:
    with pytest.raises(SubjectError, match="can be read only once"):
        read_examples(iter(ragged()), memory=100)


def test_floating_point_tensors_are_cast_and_integers_are_not() -> None:
    examples = read_examples(ragged()).handed_out_as(torch.float64, torch.device("cpu"))
    x, y = next(iter(examples.chunks(4)))
    assert (x.dtype, y.dtype) == (torch.float64, torch.int64)
