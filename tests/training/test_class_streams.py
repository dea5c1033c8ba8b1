from collections import Counter
from collections.abc import Callable
from itertools import chain, combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_examples import TESTED, numbered, numbers, untested

from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.training.streams.classes import ClassIncremental, ClassPairs, MultiStage
from plasticity_probe.training.tasks import Source, Stream, Task


def classes_of(task: Task, classes: int) -> list[int]:
    """True classes of a task, in the order of its labels; each label stands for one class, in training and in test."""
    names: dict[int, int] = {}
    pairs = list(zip(numbers(task.inputs), task.targets.tolist(), strict=True))
    if task.test_inputs is not None and task.test_targets is not None:
        pairs += zip(numbers(task.test_inputs), task.test_targets.tolist(), strict=True)
    for number, label in pairs:
        assert names.setdefault(label, number % classes) == number % classes
    return [names[label] for label in sorted(names)]


def passes_of(stream: ClassPairs, classes: int, count: int, seed: int = 0) -> list[list[tuple[int, ...]]]:
    source = numbered(2 * classes, classes, tested=classes)
    each = classes // stream.classes
    tasks = [tuple(classes_of(stream.task(source, index, seed), classes)) for index in range(each * count)]
    return [tasks[begin : begin + each] for begin in range(0, len(tasks), each)]


def drawn_tasks(stream: Stream, source: Source) -> list[Task]:
    return [stream.task(source, index, 0) for index in range(stream.tasks)]


def test_class_incremental_tasks_hold_all_examples_of_the_classes_so_far_numbered_by_appearance() -> None:
    source = numbered(41, classes=6, tested=12)
    stream = ClassIncremental(3, 2)
    tasks = [stream.task(source, index, 0) for index in range(3)]
    order = classes_of(tasks[-1], 6)
    assert sorted(order) == list(range(6))
    assert order != list(range(6))
    for index, task in enumerate(tasks):
        seen = order[: 2 * (index + 1)]
        assert classes_of(task, 6) == seen
        assert sorted(numbers(task.inputs)) == [number for number in range(41) if number % 6 in seen]
        assert numbers(task.test_inputs) == [n for n in range(TESTED, TESTED + 12) if n % 6 in seen]
        assert set(task.targets.tolist()) == set(range(2 * (index + 1)))


def test_class_incremental_examples_are_in_order_of_arrival() -> None:
    source = numbered(41, classes=6)
    tasks = [ClassIncremental(3, 2).task(source, index, 3) for index in range(3)]
    for before, after in pairwise(tasks):
        assert torch.equal(after.inputs[: len(before.inputs)], before.inputs)
        assert torch.equal(after.targets[: len(before.targets)], before.targets)
        assert after.arrivals[:-1] == before.arrivals
    *_, last = tasks
    for part, labels in enumerate(last.targets.split(last.arrivals)):
        assert set(labels.tolist()) == {2 * part, 2 * part + 1}


def test_class_incremental_tasks_can_hold_their_new_classes_alone() -> None:
    source = numbered(40, classes=6, tested=12)
    whole = classes_of(ClassIncremental(3, 2).task(source, 2, 0), 6)
    for index in range(3):
        task = ClassIncremental(3, 2, cumulative=False).task(source, index, 0)
        own = whole[2 * index : 2 * index + 2]
        assert classes_of(task, 6) == own
        assert numbers(task.inputs) == [number for number in range(40) if number % 6 in own]
        assert numbers(task.test_inputs) == [n for n in range(TESTED, TESTED + 12) if n % 6 in own]
        assert set(task.targets.tolist()) == {2 * index, 2 * index + 1}
        assert task.arrivals == ()


def test_the_order_of_classes_is_the_seed_and_a_longer_stream_begins_with_the_shorter() -> None:
    source = numbered(40, classes=8)
    orders = {tuple(classes_of(ClassIncremental(4, 2).task(source, 3, seed), 8)) for seed in range(5)}
    assert len(orders) == 5
    short, long = (ClassIncremental(tasks, 2).task(source, 1, 0) for tasks in (2, 4))
    assert torch.equal(short.inputs, long.inputs)
    assert torch.equal(short.targets, long.targets)


def test_class_incremental_outputs_are_the_classes_that_ever_appear() -> None:
    assert ClassIncremental(3, 2).outputs(numbered(40, classes=10)) == 6


def test_more_classes_than_there_are_are_refused() -> None:
    with pytest.raises(UsageError, match="3 tasks of 2 classes needs 6 classes, but there are 5"):
        ClassIncremental(3, 2).task(numbered(40, classes=5), 0, 0)
    with pytest.raises(UsageError, match="classes = 6 needs as many classes, but there are 5"):
        ClassPairs(1, classes=6).task(numbered(40, classes=5), 0, 0)


@pytest.mark.parametrize("stream", [ClassIncremental(1, 5), ClassIncremental(5, 1), ClassPairs(10)])
def test_a_class_without_examples_is_refused_by_its_own_name(stream: Stream) -> None:
    with pytest.raises(DataError, match="of class 4 there are none"):
        drawn_tasks(stream, numbered(4, classes=5))


@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.parametrize("stream", [ClassIncremental(1, 2), ClassPairs(1), MultiStage(2, 0.5)])
def test_labels_outside_the_classes_are_refused_in_training_and_test(stream: Stream, wrong: int) -> None:
    for held in ("targets", "test_targets"):
        getattr(source := numbered(16), held)[3] = wrong
        with pytest.raises(DataError, match="needs labels from 0 to 3, got labels from"):
            stream.task(source, 0, 0)


def test_a_task_whose_classes_have_no_test_examples_has_no_test_set() -> None:
    source = numbered(8, tested=0)
    for stream in (ClassIncremental(1, 2), ClassPairs(1)):
        for given_source in (source, untested(source)):
            task = stream.task(given_source, 0, 0)
            assert task.test_inputs is None
            assert task.test_targets is None


@pytest.mark.parametrize("classes", [2, 3, 4, 7, 10])
def test_every_pass_goes_through_the_classes_once(classes: int) -> None:
    for drawn in passes_of(ClassPairs(1), classes, 2 * classes):
        used = [label for pair in drawn for label in pair]
        assert len(used) == len(set(used)) == classes - classes % 2


@pytest.mark.parametrize(("classes", "cycle"), [(4, 3), (6, 5), (7, 7), (10, 9)])
def test_no_pair_comes_again_before_all_pairs_have_come(classes: int, cycle: int) -> None:
    drawn = passes_of(ClassPairs(1), classes, 2 * cycle, seed=3)
    every = Counter(frozenset(pair) for pair in combinations(range(classes), 2))
    for begin in (0, cycle):
        assert Counter(frozenset(pair) for one in drawn[begin : begin + cycle] for pair in one) == every


def test_pairs_are_uniform_over_seeds_and_a_class_takes_either_label() -> None:
    source = numbered(4)
    seeds = 600
    drawn = Counter(tuple(classes_of(ClassPairs(1).task(source, 1, seed), 4)) for seed in range(seeds))
    expected, error = seeds / 12, (seeds / 12 * 11 / 12) ** 0.5
    assert len(drawn) == 12
    assert all(abs(count - expected) < 4 * error for count in drawn.values())


def test_no_class_keeps_one_label_through_a_cycle() -> None:
    cycle = [pair for one in passes_of(ClassPairs(1), 12, 11) for pair in one]
    for place in range(2):
        assert {pair[place] for pair in cycle} == set(range(12))


def test_the_order_of_passes_is_random_over_seeds() -> None:
    assert len({str(passes_of(ClassPairs(1), 6, 5, seed)) for seed in range(8)}) == 8


@pytest.mark.parametrize(("classes", "size"), [(9, 3), (10, 3), (12, 4)])
def test_larger_tuples_are_disjoint_within_a_pass_and_do_not_repeat(classes: int, size: int) -> None:
    drawn = passes_of(ClassPairs(1, classes=size), classes, 6)
    for one in drawn:
        used = [label for group in one for label in group]
        assert len(used) == len(set(used)) == classes - classes % size
    groups = [frozenset(group) for one in drawn for group in one]
    assert len(set(groups)) == len(groups)


def test_tuples_repeat_only_where_they_cannot_but() -> None:
    drawn = passes_of(ClassPairs(1, classes=3), 6, 10)
    assert len({frozenset(group) for one in drawn[:9] for group in one}) == 18
    assert all(
        frozenset(group) == frozenset(range(4)) for one in passes_of(ClassPairs(1, classes=4), 4, 3) for group in one
    )


def test_a_pair_holds_all_examples_of_its_classes_or_so_many_of_each() -> None:
    source = numbered(40, classes=5, tested=20)
    whole, part = (stream.task(source, 3, 0) for stream in (ClassPairs(5), ClassPairs(5, 4, 2)))
    pair = classes_of(whole, 5)
    assert classes_of(part, 5) == pair
    assert sorted(numbers(whole.inputs)) == [number for number in range(40) if number % 5 in pair]
    assert sorted(numbers(whole.test_inputs)) == [n for n in range(TESTED, TESTED + 20) if n % 5 in pair]
    assert part.targets.tolist() == [0] * 4 + [1] * 4
    assert part.test_targets is not None
    assert part.test_targets.tolist() == [0] * 2 + [1] * 2
    assert set(numbers(part.inputs)) < set(numbers(whole.inputs))
    assert set(numbers(part.test_inputs)) < set(numbers(whole.test_inputs))
    assert ClassPairs(5).outputs(source) == 2
    assert ClassPairs(5, classes=3).outputs(source) == 3


def test_a_class_that_comes_again_brings_the_same_random_examples() -> None:
    source = numbered(60, classes=4, tested=24)
    chosen: dict[int, set[tuple[int, ...]]] = {}
    for index in range(12):
        task = ClassPairs(12, 5, 3).task(source, index, 0)
        for label, name in enumerate(classes_of(task, 4)):
            own = [n for n in (*numbers(task.inputs), *numbers(task.test_inputs)) if n % 4 == name]
            chosen.setdefault(name, set()).add(tuple(own))
            assert len(own) == 8, label
    assert all(len(versions) == 1 for versions in chosen.values())
    first = [*range(0, 20, 4), *range(TESTED, TESTED + 12, 4)]
    assert tuple(first) not in chosen[0]


def test_more_examples_of_a_class_than_there_are_are_refused() -> None:
    source = numbered(40, classes=4, tested=8)
    with pytest.raises(UsageError, match="train_per_class = 11 needs as many examples, but there are 10"):
        ClassPairs(1, 11).task(source, 0, 0)
    with pytest.raises(UsageError, match="test_per_class = 3 needs as many examples, but there are 2"):
        ClassPairs(1, 10, 3).task(source, 0, 0)
    with pytest.raises(UsageError, match="no test set to take test_per_class = 3 examples from"):
        ClassPairs(1, 10, 3).task(untested(source), 0, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassIncremental(0, 1),
        lambda: ClassIncremental(1, 0),
        lambda: ClassPairs(0),
        lambda: ClassPairs(1, 0),
        lambda: ClassPairs(1, 1, 0),
        lambda: ClassPairs(1, classes=1),
        lambda: MultiStage(0, 0.5),
        lambda: MultiStage(2, -0.1),
        lambda: MultiStage(2, 1.1),
        lambda: MultiStage(2, float("nan")),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(make: Callable[[], Stream]) -> None:
    with pytest.raises(UsageError, match="got "):
        make()


def stages(source: Source, tasks: int, share: float, seed: int = 0) -> list[Task]:
    return [MultiStage(tasks, share).task(source, index, seed) for index in range(tasks)]


def parts_of(last: Task) -> list[list[int]]:
    return [numbers(part) for part in last.inputs.split(last.arrivals)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_stages_nest_in_order_of_arrival_and_end_with_everything(share: float) -> None:
    source = numbered(60, classes=5)
    drawn = stages(source, 4, share)
    for before, after in pairwise(drawn):
        assert torch.equal(after.inputs[: len(before.inputs)], before.inputs)
        assert after.arrivals[:-1] == before.arrivals
        assert after.arrivals[-1] > 0
    assert sorted(numbers(drawn[-1].inputs)) == list(range(60))
    for task in drawn:
        assert task.targets.tolist() == [number % 5 for number in numbers(task.inputs)]
        assert task.test_inputs is source.test_inputs
        assert task.test_targets is source.test_targets


def test_without_a_uniform_part_each_stage_brings_whole_classes() -> None:
    groups = [{number % 5 for number in part} for part in parts_of(stages(numbered(60, classes=5), 3, 0.0)[-1])]
    assert sorted(len(group) for group in groups) == [1, 2, 2]
    assert set.union(*groups) == set(range(5))
    assert len({str(parts_of(stages(numbered(60, 5), 3, 0.0, seed)[-1])) for seed in range(4)}) == 4


def test_with_nothing_but_the_uniform_part_stages_are_equal_random_parts_of_any_data() -> None:
    values = Source(torch.arange(62.0)[:, None] * 1000, torch.rand(62), None, None, 0, "values")
    parts = parts_of(stages(values, 4, 1.0)[-1])
    assert [len(part) for part in parts] == [15, 16, 15, 16]
    assert sorted(chain.from_iterable(parts)) == list(range(62))
    assert parts[0] != sorted(parts[0])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tasks=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
    classes=st.integers(5, 7),
)
def test_each_stage_is_the_union_that_the_paper_writes_down(seed: int, tasks: int, share: float, classes: int) -> None:
    count = 60 * classes
    parts = parts_of(stages(numbered(count, classes), tasks, share, seed)[-1])
    common = round(share * count)
    sizes = [common * (stage + 1) // tasks - common * stage // tasks for stage in range(tasks)]
    uniform = {number for part, size in zip(parts, sizes, strict=True) for number in part[:size]}
    assert len(uniform) == common
    groups = [{number % classes for number in part[size:]} for part, size in zip(parts, sizes, strict=True)]
    assert sorted(chain.from_iterable(groups)) == list(range(classes))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    for part, size, group in zip(parts, sizes, groups, strict=True):
        by_class = {number for number in range(count) if number % classes in group} - uniform
        assert sorted(part[size:]) == sorted(by_class)


def test_the_uniform_part_is_drawn_from_all_classes() -> None:
    parts = parts_of(stages(numbered(4000, classes=4, shape=(1,)), 4, 0.5, seed=1)[-1])
    for part in parts:
        uniform = Counter(number % 4 for number in part[:500])
        assert all(abs(count - 125) < 4 * (500 * 0.25 * 0.75) ** 0.5 for count in uniform.values())
        assert len({number % 4 for number in part[500:]}) == 1


def test_fewer_classes_than_stages_need_uniform_parts() -> None:
    with pytest.raises(UsageError, match=r"each of its 5 tasks, but there are 4 classes.*iid_fraction = 1"):
        MultiStage(5, 0.9).task(numbered(40), 0, 0)
    assert len(MultiStage(5, 1.0).task(numbered(40), 4, 0).inputs) == 40


def test_a_stage_that_would_add_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="of these 3 examples task 0 would add none; ask for fewer tasks"):
        MultiStage(4, 1.0).task(numbered(3), 3, 0)


def test_stages_with_classes_need_labels() -> None:
    values = Source(torch.rand(8, 2), torch.rand(8), None, None, 0, "values")
    with pytest.raises(DataError, match="int64 label"):
        MultiStage(2, 0.5).task(values, 0, 0)


def test_one_stage_is_everything() -> None:
    task = MultiStage(1, 0.5).task(numbered(20), 0, 0)
    assert sorted(numbers(task.inputs)) == list(range(20))
    assert task.arrivals == (20,)
