from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_examples import TESTED, numbered, numbers, untested
from torch import Tensor

from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.training.streams.growing import GrowingChunks, NoisyStages, SmoothTransition, TwoStage
from plasticity_probe.training.tasks import Mixture, Source, Stream, Task


def wrong_labels(task: Task, classes: int = 4) -> Tensor:
    return torch.tensor(numbers(task.inputs)) % classes != task.targets


def values(count: int) -> Source:
    return Source(1000 * torch.arange(float(count))[:, None], torch.arange(float(count)), None, None, 0, "values")


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 60), chunks=st.integers(1, 60), seed=st.integers(0, 2**40))
def test_chunks_nest_in_order_of_arrival_and_differ_in_size_by_at_most_one(count: int, chunks: int, seed: int) -> None:
    stream, source = GrowingChunks(chunks), numbered(count)
    if count < chunks:
        with pytest.raises(UsageError, match=f"cannot split {count} examples into {chunks} chunks"):
            stream.task(source, 0, seed)
        return
    tasks = [stream.task(source, index, seed) for index in range(chunks)]
    for before, after in pairwise(tasks):
        assert torch.equal(after.inputs[: len(before.inputs)], before.inputs)
        assert after.arrivals[:-1] == before.arrivals
    last = tasks[-1]
    assert sorted(numbers(last.inputs)) == list(range(count))
    assert last.targets.tolist() == [number % 4 for number in numbers(last.inputs)]
    assert len(last.arrivals) == chunks
    assert max(last.arrivals) - min(last.arrivals) <= 1


def test_there_are_fifty_chunks_as_published() -> None:
    assert GrowingChunks().tasks == 50
    assert GrowingChunks().task(numbered(100), 49, 0).arrivals == (2,) * 50


def test_chunks_are_random_and_every_chunk_has_the_whole_test_set() -> None:
    source = numbered(100)
    first = [GrowingChunks(5).task(source, 0, seed) for seed in range(3)]
    assert len({tuple(sorted(numbers(task.inputs))) for task in first}) == 3
    assert all(task.test_inputs is source.test_inputs and task.test_targets is source.test_targets for task in first)


def test_chunks_of_a_random_subset() -> None:
    last = GrowingChunks(3, 20).task(numbered(100), 2, 0)
    chosen = numbers(last.inputs)
    assert last.arrivals == (6, 7, 7)
    assert len(set(chosen)) == 20
    assert max(chosen) > 30


def test_values_grow_too() -> None:
    for stream in (GrowingChunks(4), TwoStage(held_out=0.25), SmoothTransition(0.5)):
        task = stream.task(values(16), stream.tasks - 1, 0)
        assert task.targets.tolist() == numbers(task.inputs)


def test_two_stages_are_a_random_part_and_then_everything_with_that_part_first() -> None:
    source = numbered(40)
    one, two = (TwoStage(0.3).task(source, index, 0) for index in range(2))
    assert (one.arrivals, two.arrivals) == ((12,), (12, 28))
    assert torch.equal(two.inputs[:12], one.inputs)
    assert sorted(numbers(two.inputs)) == list(range(40))
    assert sorted(numbers(one.inputs)) != list(range(12))
    assert TwoStage().task(source, 0, 0).arrivals == (20,)
    assert two.targets.tolist() == [number % 4 for number in numbers(two.inputs)]
    assert one.test_inputs is two.test_inputs is source.test_inputs


@pytest.mark.parametrize("source", [numbered(30), untested(numbered(30))])
def test_a_held_out_share_is_never_trained_on_and_replaces_the_test_set(source: Source) -> None:
    one, two = (TwoStage(held_out=1 / 3).task(source, index, 2) for index in range(2))
    tested = numbers(two.test_inputs)
    assert len(tested) == 10
    assert sorted([*tested, *numbers(two.inputs)]) == list(range(30))
    assert numbers(one.test_inputs) == tested
    assert two.test_targets is not None
    assert two.test_targets.tolist() == [number % 4 for number in tested]
    assert (one.arrivals, two.arrivals) == ((10,), (10, 10))
    assert numbers(TwoStage(held_out=1 / 3).task(source, 0, 3).test_inputs) != tested


def test_a_limited_training_set_leaves_the_held_out_share_as_it_is() -> None:
    whole, limited = (TwoStage(examples=size, held_out=0.5).task(numbered(40), 1, 0) for size in (None, 8))
    assert numbers(limited.test_inputs) == numbers(whole.test_inputs)
    assert limited.arrivals == (4, 4)
    assert set(numbers(limited.inputs)) < set(numbers(whole.inputs))
    with pytest.raises(UsageError, match="examples = 21 needs as many examples, but there are 20"):
        TwoStage(examples=21, held_out=0.5).task(numbered(40), 1, 0)


@pytest.mark.parametrize(
    ("stream", "count"),
    [
        (TwoStage(0.1), 4),
        (TwoStage(0.9), 4),
        (TwoStage(held_out=0.01), 10),
        (TwoStage(), 1),
        (SmoothTransition(0.5), 1),
    ],
)
def test_shares_that_round_to_nothing_are_refused(stream: Stream, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} examples"):
        stream.task(numbered(count), 0, 0)


def test_a_smooth_transition_is_one_task_whose_mixture_begins_in_its_first_part() -> None:
    task = SmoothTransition(0.3, fraction=0.25).task(source := numbered(40), 0, 0)
    assert task.mixture == Mixture(first=10, gamma=0.3)
    assert sorted(numbers(task.inputs)) == list(range(40))
    assert sorted(numbers(task.inputs[:10])) != list(range(10))
    assert task.test_inputs is source.test_inputs
    assert SmoothTransition(0.3).task(source, 0, 0).mixture == Mixture(20, 0.3)


def test_a_smooth_transition_begins_in_the_part_that_the_two_stages_begin_with() -> None:
    source = numbered(40)
    smooth, abrupt = SmoothTransition(0.5).task(source, 0, 6), TwoStage().task(source, 0, 6)
    assert torch.equal(smooth.inputs[:20], abrupt.inputs)


def test_stages_bring_their_shares_and_exactly_their_share_of_wrong_labels() -> None:
    source = numbered(200)
    one, two = (NoisyStages().task(source, index, 0) for index in range(2))
    assert (one.arrivals, two.arrivals) == ((20,), (20, 180))
    assert torch.equal(two.inputs[:20], one.inputs)
    assert torch.equal(two.targets[:20], one.targets)
    assert sorted(numbers(two.inputs)) == list(range(200))
    assert int(wrong_labels(one).sum()) == int(wrong_labels(two).sum()) == 10
    assert two.test_targets is source.test_targets


def test_noise_on_all_labels_is_drawn_anew_in_each_stage_and_the_last_one_can_be_clean() -> None:
    shares, noise = (0.25, 0.25, 0.5), (0.5, 0.5, 0.0)
    source = numbered(80)
    tasks = [NoisyStages(shares, noise, noise_on="all").task(source, index, 0) for index in range(3)]
    assert [int(wrong_labels(task).sum()) for task in tasks] == [10, 20, 0]
    assert [task.arrivals for task in tasks] == [(20,), (20, 20), (20, 20, 40)]
    assert not torch.equal(wrong_labels(tasks[1])[:20], wrong_labels(tasks[0]))
    arrived = NoisyStages(shares, noise).task(source, 2, 0)
    assert [int(part.sum()) for part in wrong_labels(arrived).split(arrived.arrivals)] == [10, 10, 0]


def test_stages_need_not_be_cumulative() -> None:
    source = numbered(80)
    parts = [NoisyStages((0.25, 0.25, 0.5), (1.0, 0.5, 0.0), cumulative=False).task(source, i, 0) for i in range(3)]
    whole = NoisyStages((0.25, 0.25, 0.5), (1.0, 0.5, 0.0)).task(source, 2, 0)
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert [int(wrong_labels(part).sum()) for part in parts] == [20, 10, 0]
    assert all(part.arrivals == () for part in parts)


def test_wrong_labels_are_uniform_over_the_other_classes_and_never_true() -> None:
    source = numbered(40_000, shape=(1,))
    task = NoisyStages((1.0,), (0.75,)).task(source, 0, 0)
    shift = (task.targets - torch.tensor(numbers(task.inputs))) % 4
    counts = shift.bincount(minlength=4)
    assert int(counts[0]) == 10_000
    assert (counts[1:] - 10_000).abs().max() < 4 * (30_000 / 3 * 2 / 3) ** 0.5
    true = torch.tensor(numbers(task.inputs)) % 4
    assert (true[shift > 0].bincount() - 7500).abs().max() < 4 * (40_000 * 0.25 * 0.75) ** 0.5


def test_parts_of_equal_size_have_wrong_labels_at_places_of_their_own() -> None:
    parts = wrong_labels(NoisyStages((0.5, 0.5), (0.5, 0.5)).task(numbered(80), 1, 0)).split(40)
    assert [int(part.sum()) for part in parts] == [20, 20]
    assert not torch.equal(*parts)


def test_the_source_keeps_its_right_labels() -> None:
    source = numbered(40)
    NoisyStages((0.5, 0.5), (1.0, 1.0)).task(source, 1, 0)
    assert source.targets.tolist() == [number % 4 for number in range(40)]


def test_a_stage_depends_on_earlier_stages_alone() -> None:
    source = numbered(100)
    short, long = NoisyStages((0.2, 0.3), (0.5, 0.4)), NoisyStages((0.2, 0.3, 0.5), (0.5, 0.4, 1.0))
    for index in range(2):
        assert torch.equal(short.task(source, index, 0).inputs, long.task(source, index, 0).inputs)
        assert torch.equal(short.task(source, index, 0).targets, long.task(source, index, 0).targets)
    assert len(short.task(source, 1, 0).inputs) == 50


def test_the_continual_stream_has_ten_equal_stages_whose_noise_falls_linearly_to_zero() -> None:
    stream = NoisyStages.continual()
    assert stream.tasks == 10
    assert stream.label_noise[0] == 0.5
    assert stream.label_noise[-1] == 0.0
    assert all(one - other == pytest.approx(0.5 / 9) for one, other in pairwise(stream.label_noise))
    last = stream.task(numbered(200), 9, 0)
    assert last.arrivals == (20,) * 10
    falling = [int(part.sum()) for part in wrong_labels(last).split(20)]
    assert falling == [round(20 * noise) for noise in stream.label_noise]
    assert NoisyStages.continual(noise_on="all").noise_on == "all"


def test_lists_stand_for_tuples() -> None:
    assert NoisyStages([0.1, 0.9], [0.5, 0.0]) == NoisyStages()  # type: ignore[arg-type]


def test_a_stage_that_would_add_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"of these 4 examples stage 0 with the share 0.1 would add none"):
        NoisyStages().task(numbered(4), 0, 0)


def test_noise_needs_labels_in_range() -> None:
    with pytest.raises(DataError, match="int64 label"):
        NoisyStages().task(values(40), 0, 0)
    source = numbered(40)
    source.targets[0] = -1
    with pytest.raises(DataError, match="labels from 0 to 3, got labels from -1 to 3"):
        NoisyStages().task(source, 0, 0)


@pytest.mark.parametrize("stream", [GrowingChunks(2, 41), SmoothTransition(0.5, examples=41), TwoStage(examples=41)])
def test_more_examples_than_there_are_are_refused(stream: Stream) -> None:
    with pytest.raises(UsageError, match="examples = 41 needs as many examples, but there are 40"):
        stream.task(numbered(40), 0, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GrowingChunks(0),
        lambda: GrowingChunks(2, 0),
        lambda: TwoStage(0.0),
        lambda: TwoStage(1.0),
        lambda: TwoStage(held_out=0.0),
        lambda: TwoStage(held_out=1.0),
        lambda: TwoStage(examples=0),
        lambda: TwoStage(tasks=3),
        lambda: SmoothTransition(0.0),
        lambda: SmoothTransition(1.0),
        lambda: SmoothTransition(0.5, 1.0),
        lambda: SmoothTransition(0.5, examples=0),
        lambda: SmoothTransition(0.5, tasks=2),
        lambda: NoisyStages((), ()),
        lambda: NoisyStages((0.5,), (0.1, 0.1)),
        lambda: NoisyStages((0.5, 0.6), (0.1, 0.1)),
        lambda: NoisyStages((0.5, 0.0), (0.1, 0.1)),
        lambda: NoisyStages((0.5, float("nan")), (0.1, 0.1)),
        lambda: NoisyStages((0.5, 0.5), (1.1, 0.1)),
        lambda: NoisyStages((0.5, 0.5), (-0.1, 0.1)),
        lambda: NoisyStages(noise_on="some"),  # type: ignore[arg-type]
        lambda: NoisyStages(tasks=3),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(make: Callable[[], Stream]) -> None:
    with pytest.raises(UsageError, match=r"got |cannot split"):
        make()


def test_no_examples_can_not_be_split_into_chunks_at_once() -> None:
    with pytest.raises(UsageError, match="cannot split 3 examples into 4 chunks"):
        GrowingChunks(4, 3)


def test_the_held_out_examples_are_of_the_training_set() -> None:
    task = TwoStage(held_out=0.5).task(numbered(20), 0, 0)
    assert all(number < TESTED for number in numbers(task.test_inputs))
