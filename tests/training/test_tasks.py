from dataclasses import dataclass
from typing import ClassVar, final

import pytest
import torch
from numbered_examples import numbered

from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.training.streams import STREAMS
from plasticity_probe.training.tasks import Mixture, Source, Stream, Task, check_labels


@final
@dataclass(frozen=True)
class Same(Stream):
    name: ClassVar[str] = "same"
    source: ClassVar[str] = "none"

    tasks: int

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        assert source is not None
        return Task(index, source.inputs, source.targets, "same")


def source_of(targets: torch.Tensor, classes: int) -> Source:
    return Source(torch.zeros(len(targets), 2), targets, None, None, classes, "made by hand")


def test_a_task_is_its_examples_and_by_default_nothing_else() -> None:
    task = Task(3, inputs := torch.rand(2, 4), targets := torch.tensor([0, 1]), "two examples")
    assert task.inputs is inputs
    assert task.targets is targets
    assert (task.index, task.name, task.arrivals, task.ordered) == (3, "two examples", (), False)
    assert task.test_inputs is task.test_targets is task.mixture is None


@pytest.mark.parametrize(("inputs", "targets"), [(0, 0), (3, 2), (2, 3), (1, 0)])
def test_a_task_without_examples_or_without_a_target_for_each_is_refused(inputs: int, targets: int) -> None:
    with pytest.raises(DataError, match=rf"task 7 \(broken\).*\({inputs}, 4\).*\({targets},\)"):
        Task(7, torch.zeros(inputs, 4), torch.zeros(targets), "broken")


@pytest.mark.parametrize("arrivals", [(1, 1), (2, 2), (4,)])
def test_parts_that_do_not_make_up_the_task_are_refused(arrivals: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=f"hold {sum(arrivals)} of its 3 examples"):
        Task(0, torch.zeros(3, 1), torch.zeros(3), "parts", arrivals=arrivals)


def test_parts_that_make_up_the_task_are_kept() -> None:
    assert Task(0, torch.zeros(3, 1), torch.zeros(3), "parts", arrivals=(1, 2)).arrivals == (1, 2)


def test_a_mixture_begins_in_the_first_part_and_follows_the_published_formula() -> None:
    mixture = Mixture(first=10, gamma=0.5)
    assert mixture.probability(0, 100) == 0
    assert mixture.probability(2, 100) == pytest.approx(0.5)
    assert mixture.probability(4, 100) == pytest.approx(0.75)
    assert mixture.probability(100, 100) == pytest.approx(1 - 2**-50, abs=1e-15)


def test_a_mixture_depends_on_the_share_of_the_updates_and_a_smaller_gamma_is_earlier() -> None:
    assert Mixture(1, 0.3).probability(3, 30) == pytest.approx(Mixture(1, 0.3).probability(100, 1000))
    early, late = ([Mixture(1, gamma).probability(n, 200) for n in range(1, 40)] for gamma in (0.1, 0.9))
    assert all(one > other for one, other in zip(early, late, strict=True))
    assert early == sorted(early)


@pytest.mark.parametrize("index", [-1, 3, 4])
def test_a_finite_stream_refuses_tasks_that_it_does_not_have(index: int) -> None:
    with pytest.raises(UsageError, match=f"same has tasks 0 to 2; there is no task {index}"):
        Same(3).check_index(index, endless=False)


def test_an_endless_stream_refuses_negative_tasks_alone() -> None:
    for index in (0, 2, 3, 10**6):
        Same(3).check_index(index, endless=True)
    for index in range(3):
        Same(3).check_index(index, endless=False)
    with pytest.raises(UsageError, match="no task -1"):
        Same(3).check_index(-1, endless=True)


def test_a_stream_needs_an_output_for_each_class_and_one_for_values() -> None:
    assert Same(1).outputs(numbered(8, classes=4)) == 4
    assert Same(1).outputs(source_of(torch.rand(3), 0)) == Same(1).outputs(None) == 1


def test_labels_that_are_there_are_handed_on() -> None:
    assert check_labels(source := numbered(8), "a test") is source


@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        (torch.rand(4), 2),
        (torch.zeros(4, 3, dtype=torch.int64), 2),
        (torch.zeros(4, dtype=torch.int64), 1),
        (torch.zeros(4, dtype=torch.int32), 2),
    ],
)
def test_targets_without_classes_are_refused(targets: torch.Tensor, classes: int) -> None:
    with pytest.raises(DataError, match="a test needs one int64 label per example and at least two classes"):
        check_labels(source_of(targets, classes), "a test")


def test_no_data_at_all_is_refused_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"a test needs examples with class labels.*such as digits"):
        check_labels(None, "a test")


def test_streams_that_call_themselves_steady_have_tasks_of_one_size() -> None:
    tokens = torch.randint(5, (12, 4))
    text = Source(tokens, tokens, None, None, 5, "text")
    images = Source(torch.randn(12, 1, 2, 2), torch.arange(12) % 3, None, None, 3, "images")
    for name, stream in STREAMS.items():
        if stream.steady:
            made = stream(tasks=4, examples=7)  # type: ignore[call-arg]
            sizes = {
                len(made.task(text if name == "permuted-alphabet" else images, index, 0).targets) for index in range(4)
            }
            assert sizes == {7}, name
    assert STREAMS["random-labels"].steady
    assert not STREAMS["growing-chunks"].steady
