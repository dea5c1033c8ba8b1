from collections.abc import Callable
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_examples import TESTED, numbered, numbers, untested
from torch import Tensor

from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.training.streams import STREAMS
from plasticity_probe.training.streams.classes import ClassIncremental, ClassPairs, MultiStage
from plasticity_probe.training.streams.growing import GrowingChunks, NoisyStages, SmoothTransition, TwoStage
from plasticity_probe.training.streams.regression import SlowlyChangingRegression
from plasticity_probe.training.streams.shifting import PermutedAlphabet, PermutedLabels, PermutedPixels, RandomLabels
from plasticity_probe.training.streams.subsets import RandomSubset
from plasticity_probe.training.tasks import Source, Stream, Task

VOCABULARY = 7


def text(count: int = 9, length: int = 6, tested: int = 4) -> Source:
    drawn = torch.randint(VOCABULARY, (count + tested, length + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = drawn[:, :-1].clone(), drawn[:, 1:].clone()
    targets[0, -1] = -1
    return Source(inputs[:count], targets[:count], inputs[count:], targets[count:], VOCABULARY, "made-up characters")


def tensors(task: Task) -> list[Tensor]:
    return [t for t in (task.inputs, task.targets, task.test_inputs, task.test_targets) if t is not None]


def same(one: Task, other: Task) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return one.name == other.name and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


EVERY: list[tuple[Stream, Source | None]] = [
    (RandomLabels(3, 20), numbered(40)),
    (PermutedPixels(3, 20, redraw=True), numbered(40)),
    (PermutedLabels(3, 20), numbered(40)),
    (PermutedAlphabet(3, 5, 4), text()),
    (ClassIncremental(3, 2), numbered(40, classes=6)),
    (ClassPairs(3, 4, 1), numbered(40, classes=6)),
    (MultiStage(3, 0.5), numbered(40)),
    (GrowingChunks(3, 20), numbered(40)),
    (TwoStage(examples=20, held_out=0.25), numbered(40)),
    (SmoothTransition(0.3, examples=20), numbered(40)),
    (NoisyStages((0.2, 0.3, 0.5), (0.5, 0.4, 0.0)), numbered(40)),
    (SlowlyChangingRegression(3, 20), None),
    (RandomSubset(0.6, label_noise=0.2), numbered(40)),
]
every_stream = pytest.mark.parametrize(("stream", "source"), EVERY, ids=lambda value: getattr(value, "name", ""))
ENDLESS = {
    "random-labels",
    "permuted-pixels",
    "permuted-labels",
    "permuted-alphabet",
    "class-pairs",
    "slowly-changing-regression",
}


def test_every_stream_is_known_by_its_name_and_has_settings_that_can_be_written_and_read() -> None:
    assert {name: kind.name for name, kind in STREAMS.items()} == {name: name for name in STREAMS}
    assert {stream.name for stream, _ in EVERY} == set(STREAMS)
    for stream, _ in EVERY:
        assert STREAMS[stream.name](**asdict(stream)) == stream  # type: ignore[call-overload]
        assert "tasks" in {entry.name for entry in fields(stream)}  # type: ignore[arg-type]
        assert stream.source


@every_stream
def test_a_task_is_a_pure_function_of_data_seed_and_index(stream: Stream, source: Source | None) -> None:
    first = stream.task(source, stream.tasks - 1, 5)
    torch.manual_seed(3)
    np.random.seed(3)
    if stream.tasks > 1:
        stream.task(source, 0, 5)
    assert same(stream.task(source, stream.tasks - 1, 5), first)
    assert not same(stream.task(source, stream.tasks - 1, 6), first)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))


@every_stream
def test_tasks_have_names_of_their_own_and_leave_the_source_as_it_was(stream: Stream, source: Source | None) -> None:
    before = [] if source is None else [source.inputs.clone(), source.targets.clone()]
    tasks = [stream.task(source, index, 0) for index in range(stream.tasks)]
    assert len({task.name for task in tasks}) == stream.tasks
    assert [task.index for task in tasks] == list(range(stream.tasks))
    if source is not None:
        assert torch.equal(source.inputs, before[0])
        assert torch.equal(source.targets, before[1])


@every_stream
def test_streams_end_unless_every_task_is_drawn_anew(stream: Stream, source: Source | None) -> None:
    for index in (-1, stream.tasks):
        if index == stream.tasks and stream.name in ENDLESS:
            assert stream.task(source, index, 0).index == index
        else:
            with pytest.raises(UsageError, match=f"there is no task {index}"):
                stream.task(source, index, 0)


@every_stream
def test_negative_seeds_are_refused(stream: Stream, source: Source | None) -> None:
    with pytest.raises(UsageError, match="must be 0 or more, got -1"):
        stream.task(source, 0, -1)


@every_stream
def test_a_task_fits_the_outputs_and_a_stream_that_says_so_gives_tasks_of_equal_sizes(
    stream: Stream, source: Source | None
) -> None:
    for index in range(stream.tasks):
        drawn = [stream.task(source, index, seed) for seed in range(6)]
        if stream.equal_sizes:
            assert len({tuple(t.shape for t in tensors(task)) for task in drawn}) == 1
            assert len({task.arrivals for task in drawn}) == 1
        if source is not None:
            assert all(int(task.targets.max()) < stream.outputs(source) for task in drawn)


@pytest.mark.parametrize("kind", [entry for entry in EVERY if entry[1] is not None], ids=lambda e: e[0].name)
def test_streams_of_examples_refuse_to_do_without(kind: tuple[Stream, Source]) -> None:
    with pytest.raises(DataError, match="needs examples"):
        kind[0].task(None, 0, 0)


@pytest.mark.parametrize(
    ("stream", "source"), [e for e in EVERY if e[0].name in ENDLESS], ids=lambda value: getattr(value, "name", "")
)
def test_a_longer_endless_stream_begins_with_the_shorter(stream: Stream, source: Source | None) -> None:
    longer = STREAMS[stream.name](**{**asdict(stream), "tasks": 11})  # type: ignore[call-overload]
    assert all(same(stream.task(source, index, 4), longer.task(source, index, 4)) for index in range(3))


@pytest.mark.parametrize("make", [RandomLabels, PermutedPixels, PermutedLabels, PermutedAlphabet])
@pytest.mark.parametrize("counts", [{"tasks": 0}, {"tasks": -1}, {"tasks": 1, "examples": 0}])
def test_numbers_that_cannot_be_are_refused_at_once(make: Callable[..., Stream], counts: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"needs (tasks|examples) >= 1"):
        make(**counts)


@pytest.mark.parametrize("make", [RandomLabels, PermutedPixels, PermutedLabels])
def test_more_examples_than_there_are_are_refused_not_silently_fewer(make: Callable[..., Stream]) -> None:
    with pytest.raises(UsageError, match=r"examples = 41 needs as many examples, but there are 40"):
        make(1, 41).task(numbered(40), 0, 0)


def test_random_labels_share_one_random_subset_and_have_labels_of_their_own() -> None:
    source = numbered(200, classes=10)
    first, second, third = (RandomLabels(3, 50).task(source, index, 1) for index in range(3))
    chosen = numbers(first.inputs)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 50
    assert chosen != list(range(50))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.inputs, third.inputs)
    assert numbers(RandomLabels(3, 50).task(source, 0, 2).inputs) != chosen
    assert not torch.equal(first.targets, second.targets)
    assert not torch.equal(second.targets, third.targets)
    assert first.test_inputs is None
    assert first.test_targets is None


def test_with_one_seed_a_smaller_subset_lies_within_a_larger_one() -> None:
    source = numbered(60)
    small, large = (set(numbers(RandomLabels(1, size).task(source, 0, 3).inputs)) for size in (10, 30))
    assert small < large


def test_all_examples_are_taken_in_their_order_and_without_a_copy() -> None:
    source = numbered(30)
    for examples in (None, 30):
        task = RandomLabels(2, examples).task(source, 1, 0)
        assert numbers(task.inputs) == list(range(30))
        assert task.inputs.data_ptr() == source.inputs.data_ptr()


def test_random_labels_are_uniform_and_know_nothing_of_the_true_ones_or_of_each_other() -> None:
    count, classes = 20_000, 10
    source = numbered(count, classes, shape=(1,))
    one, two = (RandomLabels(2).task(source, index, 0).targets for index in range(2))
    standard_error = (count * 0.1 * 0.9) ** 0.5
    for labels in (one, two):
        assert (labels.bincount(minlength=classes) - count / classes).abs().max() < 4 * standard_error
    for other in (source.targets, two):
        assert abs(int((one == other).sum()) - count / classes) < 4 * standard_error


def test_random_labels_are_drawn_not_permuted() -> None:
    one, two = (RandomLabels(2).task(numbered(600), index, 0).targets for index in range(2))
    assert not torch.equal(one.bincount(), two.bincount())


def test_random_labels_are_the_promised_numbers() -> None:
    raw = np.random.PCG64(np.random.SeedSequence(7, spawn_key=(2,))).random_raw(12)
    task = RandomLabels(3).task(numbered(12, classes=3), 2, 7)
    assert task.targets.tolist() == [int(value) % 3 for value in raw]
    assert task.targets.dtype == torch.int64


def test_random_labels_need_classes() -> None:
    values = Source(torch.rand(4, 2), torch.rand(4), None, None, 0, "values")
    with pytest.raises(DataError, match="random-labels needs one int64 label per example and at least two classes"):
        RandomLabels(1).task(values, 0, 0)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (3, 2, 3)])
def test_permuted_pixels_move_by_one_order_in_all_images_of_a_task(shape: tuple[int, ...]) -> None:
    source = numbered(20, shape=shape)
    orders: list[list[int]] = []
    for index in range(3):
        task = PermutedPixels(3).task(source, index, 0)
        assert numbers(task.inputs) == list(range(20))
        assert torch.equal(task.targets, source.targets)
        assert task.inputs.shape == source.inputs.shape
        assert task.test_inputs is not None
        channels = shape[0] if len(shape) > 1 else 1
        places = (torch.cat([task.inputs, task.test_inputs]) % 1000).reshape(26, channels, 6)
        order = places[0, 0].int().tolist()
        assert sorted(order) == list(range(6))
        expected = torch.tensor(order) + 6 * torch.arange(channels)[:, None]
        assert torch.equal(places, expected.double().expand(26, -1, -1))
        assert numbers(task.test_inputs) == list(range(TESTED, TESTED + 6))
        assert task.test_targets is source.test_targets
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 3
    assert list(range(6)) not in orders


def test_the_first_task_is_permuted_too() -> None:
    source = numbered(4, shape=(1, 10, 10))
    assert not torch.equal(PermutedPixels(1).task(source, 0, 0).inputs, source.inputs)


def test_permuted_pixels_keep_one_subset_or_draw_one_for_each_task() -> None:
    source = numbered(50)
    kept, redrawn = (
        [numbers(PermutedPixels(3, 20, redraw=redraw).task(source, index, 1).inputs) for index in range(3)]
        for redraw in (False, True)
    )
    assert kept[0] == kept[1] == kept[2]
    assert len({tuple(chosen) for chosen in redrawn}) == 3
    assert all(len(set(chosen)) == 20 for chosen in [*kept, *redrawn])


def test_the_labels_of_permuted_pixels_stay_with_their_images() -> None:
    task = PermutedPixels(1, 20).task(numbered(50), 0, 1)
    assert task.targets.tolist() == [number % 4 for number in numbers(task.inputs)]


@pytest.mark.parametrize("inputs", [torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4), torch.zeros(4, 3, 1)])
def test_inputs_without_pixels_are_refused(inputs: Tensor) -> None:
    with pytest.raises(DataError, match=r"permuted pixels need floating-point inputs.*permuted-alphabet"):
        PermutedPixels(1).task(Source(inputs, torch.zeros(4).long(), None, None, 2, "no pixels"), 0, 0)


def test_permuted_labels_rename_the_true_classes_by_a_permutation_in_training_and_test() -> None:
    source = numbered(40, classes=5, tested=10)
    found: set[tuple[int, ...]] = set()
    for index in range(6):
        task = PermutedLabels(6, 20).task(source, index, 0)
        names: dict[int, int] = {}
        assert task.test_targets is not None
        tested = zip(numbers(task.test_inputs), task.test_targets.tolist(), strict=True)
        for number, label in [*zip(numbers(task.inputs), task.targets.tolist(), strict=True), *tested]:
            assert names.setdefault(number % 5, label) == label
        assert sorted(names.values()) == list(range(5))
        found.add(tuple(names[label] for label in range(5)))
    assert len(found) > 3


def test_permuted_labels_share_one_subset() -> None:
    one, two = (PermutedLabels(2, 15).task(numbered(40), index, 0) for index in range(2))
    assert torch.equal(one.inputs, two.inputs)
    assert len(set(numbers(one.inputs))) == 15


@pytest.mark.parametrize("wrong", [-1, 4])
def test_labels_outside_the_classes_are_refused(wrong: int) -> None:
    source = numbered(8)
    source.targets[3] = wrong
    with pytest.raises(DataError, match="labels from 0 to 3"):
        PermutedLabels(1).task(source, 0, 0)


def test_a_stream_of_a_source_without_a_test_set_has_none() -> None:
    for make in (PermutedPixels, PermutedLabels):
        task = make(1).task(untested(numbered(8)), 0, 0)
        assert task.test_inputs is None
        assert task.test_targets is None


def test_a_permuted_alphabet_renames_characters_in_inputs_and_targets_alike() -> None:
    source = text()
    held = [t for t in (source.inputs, source.targets, source.test_inputs, source.test_targets) if t is not None]
    renamings: set[tuple[tuple[int, int], ...]] = set()
    for index in range(4):
        task = PermutedAlphabet(4).task(source, index, 0)
        names: dict[int, int] = {}
        for before, after in zip(held, tensors(task), strict=True):
            for old, new in zip(before.flatten().tolist(), after.flatten().tolist(), strict=True):
                assert names.setdefault(old, new) == new
        assert names.pop(-1) == -1
        assert sorted(names) == sorted(names.values()) == list(range(VOCABULARY))
        renamings.add(tuple(sorted(names.items())))
        assert torch.equal(task.inputs[:, 1:], task.targets[:, :-1])
    assert len(renamings) == 4


def test_a_permuted_alphabet_takes_a_subset_and_the_beginning_of_each_sequence() -> None:
    whole, cut = (PermutedAlphabet(1, 5, length).task(text(), 0, 0) for length in (None, 4))
    assert cut.inputs.shape == cut.targets.shape == (5, 4)
    assert cut.test_inputs is not None
    assert cut.test_inputs.shape == (4, 4)
    for long, short in zip(tensors(whole), tensors(cut), strict=True):
        assert torch.equal(long[:, :4], short)


def test_text_that_is_none_or_too_short_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(N, T\) int64 tokens.*give a text"):
        PermutedAlphabet(1).task(numbered(8), 0, 0)
    with pytest.raises(UsageError, match="length = 7 needs sequences of as many tokens, got 6"):
        PermutedAlphabet(1, length=7).task(text(), 0, 0)
    with pytest.raises(UsageError, match="length >= 1"):
        PermutedAlphabet(1, length=0)
    source = text()
    few = Source(source.inputs, source.targets, None, None, 3, "a vocabulary that is too small")
    with pytest.raises(DataError, match="got 3 tokens and text with token 6"):
        PermutedAlphabet(1).task(few, 0, 0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), index=st.integers(0, 10**6), examples=st.integers(1, 12))
def test_any_task_of_any_seed_is_a_renaming_of_distinct_examples(seed: int, index: int, examples: int) -> None:
    task = PermutedLabels(1, examples).task(numbered(12), index, seed)
    chosen = numbers(task.inputs)
    assert len(set(chosen)) == examples
    pairs = {(number % 4, label) for number, label in zip(chosen, task.targets.tolist(), strict=True)}
    assert len({old for old, _ in pairs}) == len({new for _, new in pairs}) == len(pairs)
