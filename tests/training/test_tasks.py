import numpy as np
import pytest
import torch

from plasticity_probe.data.dataset import Split
from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.training.tasks import reshuffled_labels


def split_of(count: int, classes: int = 10) -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 2, 2)).astype(np.uint8)
    return Split(pixels, np.arange(count) % classes)


def test_all_tasks_have_the_same_inputs_and_labels_of_their_own() -> None:
    split = split_of(200)
    first, second, third = reshuffled_labels(split, tasks=3, examples=50, seed=1)
    torch.testing.assert_close(first.inputs, split.subset(50, 1).tensors()[0])
    assert first.inputs is second.inputs is third.inputs
    assert [task.index for task in (first, second, third)] == [0, 1, 2]
    assert len({task.name for task in (first, second, third)}) == 3
    assert not torch.equal(first.targets, second.targets)
    assert not torch.equal(second.targets, third.targets)


def test_labels_are_uniform_and_know_nothing_of_the_true_ones_or_of_each_other() -> None:
    count, classes = 20_000, 10
    one, two = reshuffled_labels(split := split_of(count), tasks=2, examples=count, seed=0)
    standard_error = (count * 0.1 * 0.9) ** 0.5
    for task in (one, two):
        assert (task.targets.bincount(minlength=classes) - count / classes).abs().max() < 4 * standard_error
    for other in (torch.from_numpy(split.targets), two.targets):
        assert abs(int((one.targets == other).sum()) - count / classes) < 4 * standard_error


def test_labels_are_drawn_not_permuted() -> None:
    one, two = reshuffled_labels(split_of(600), tasks=2, examples=600, seed=0)
    assert not torch.equal(one.targets.bincount(), two.targets.bincount())


def test_a_stream_depends_on_its_seed_alone_and_a_longer_one_begins_with_the_shorter() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    short = [task.targets for task in reshuffled_labels(split_of(40), 2, 30, seed=5)]
    long = [task.targets for task in reshuffled_labels(split_of(40), 4, 30, seed=5)]
    other = next(iter(reshuffled_labels(split_of(40), 1, 30, seed=6)))
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))
    assert not torch.equal(short[0], other.targets)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))


def test_labels_are_the_promised_stream() -> None:
    raw = np.random.PCG64(np.random.SeedSequence(7, spawn_key=(2,))).random_raw(12)
    *_, last = reshuffled_labels(split_of(12, classes=3), 3, 12, seed=7)
    assert last.targets.tolist() == [int(value) % 3 for value in raw]


def test_inputs_are_normalised_as_asked() -> None:
    (task,) = reshuffled_labels(split_of(20), 1, 20, seed=0, mean=(0.5,), std=(0.25,))
    torch.testing.assert_close(task.inputs, (split_of(20).tensors()[0] - 0.5) / 0.25)


@pytest.mark.parametrize(("tasks", "examples", "seed"), [(0, 5, 0), (1, 0, 0), (1, 5, -1)])
def test_numbers_that_cannot_be_are_refused_at_once(tasks: int, examples: int, seed: int) -> None:
    with pytest.raises(UsageError):
        reshuffled_labels(split_of(20), tasks, examples, seed)


@pytest.mark.parametrize("targets", [np.ones(4, np.float32), np.zeros(4, np.int64)])
def test_targets_without_classes_are_refused(targets: np.ndarray) -> None:
    with pytest.raises(DataError, match="at least two classes"):
        reshuffled_labels(Split(np.zeros((4, 2), np.float32), targets), 1, 4, 0)
