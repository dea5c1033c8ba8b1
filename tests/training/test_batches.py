import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.training import batches as module
from plasticity_probe.training.batches import Resident, augmented, batches, log_spaced, resident, updates_of
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.tasks import Mixture, Task

CPU = torch.device("cpu")


def counted(size: int, first: int = 0, index: int = 0, **settings: object) -> Task:
    """Example i holds first + i, twice, and has the target -(first + i)."""
    numbers = torch.arange(first, first + size)
    return Task(index, numbers.float()[:, None].repeat(1, 2), -numbers, "counted", **settings)  # type: ignore[arg-type]


def epoch_of(
    held: Resident,
    seeds: Sequence[int],
    epoch: int = 0,
    *,
    epochs: int = 10,
    batch: int = 7,
    augmentation: str = "none",
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of an epoch in the order in which they come, (S, N, ...)."""
    parts = list(batches(held, seeds, epoch, epochs, batch, augmentation))
    assert [part[1].shape[1] for part in parts[:-1]] == [batch] * (len(parts) - 1)
    assert len(parts) == updates_of(held.size, batch)
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


def order_of(task: Task, seed: int, epoch: int = 0, epochs: int = 10, batch: int = 7) -> list[int]:
    return epoch_of(resident([task], CPU), [seed], epoch, epochs=epochs, batch=batch)[0][0, :, 0].int().tolist()


@given(
    st.integers(1, 40),
    st.integers(1, 45),
    st.integers(0, 5),
    st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
)
def test_an_epoch_brings_every_network_each_of_its_own_examples_once_with_its_target(
    size: int, batch: int, epoch: int, seeds: list[int]
) -> None:
    held = resident([counted(size, 1000 * number) for number in range(len(seeds))], CPU)
    inputs, targets = epoch_of(held, seeds, epoch, batch=batch)
    for number in range(len(seeds)):
        assert sorted(inputs[number, :, 0].int().tolist()) == list(range(1000 * number, 1000 * number + size))
        assert torch.equal(inputs[number, :, 0].long(), -targets[number])
        assert torch.equal(inputs[number, :, 0], inputs[number, :, 1])


def test_the_order_is_the_same_on_every_call_and_another_for_every_seed_epoch_and_task() -> None:
    orders = {
        (seed, epoch, index): tuple(order_of(counted(30, index=index), seed, epoch))
        for seed in range(3)
        for epoch in range(3)
        for index in range(3)
    }
    assert len(set(orders.values())) == 27
    assert tuple(range(30)) not in orders.values()
    assert all(tuple(order_of(counted(30, index=i), s, e)) == order for (s, e, i), order in orders.items())


def test_the_order_depends_neither_on_the_batch_size_nor_on_the_planned_epochs_nor_on_global_randomness() -> None:
    order = order_of(counted(30), 4, 2)
    torch.manual_seed(99)
    assert order_of(counted(30), 4, 2, epochs=3, batch=11) == order


def test_every_order_is_equally_likely() -> None:
    count = 600
    found = torch.zeros(6)
    places = {(0, 1, 2): 0, (0, 2, 1): 1, (1, 0, 2): 2, (1, 2, 0): 3, (2, 0, 1): 4, (2, 1, 0): 5}
    for seed in range(count):
        found[places[tuple(order_of(counted(3), seed))]] += 1  # type: ignore[index]
    assert ((found / count - 1 / 6).abs() < 4 * math.sqrt(5 / 36 / count)).all()


def test_an_ordered_task_is_seen_as_it_is_in_every_epoch() -> None:
    assert order_of(counted(23, ordered=True), 5, 3) == list(range(23))
    # A mixture cannot disturb a series in time.
    assert order_of(counted(23, ordered=True, mixture=Mixture(3, 0.5)), 5, 3) == list(range(23))


def test_networks_that_are_trained_together_see_what_each_sees_alone() -> None:
    draws = torch.Generator().manual_seed(0)
    tasks = [
        Task(2, torch.randn(11, 2, 5, 5, generator=draws), torch.arange(11) + 100 * number, "images")
        for number in range(3)
    ]
    for augmentation in ("none", "crop-flip", "crop-flip-rotate"):
        settings = {"epoch": 1, "batch": 4, "augmentation": augmentation}
        inputs, targets = epoch_of(resident(tasks, CPU), [5, 0, 9], **settings)  # type: ignore[arg-type]
        for number, seed in enumerate([5, 0, 9]):
            own, labels = epoch_of(resident([tasks[number]], CPU), [seed], **settings)  # type: ignore[arg-type]
            assert torch.equal(inputs[number], own[0])
            assert torch.equal(targets[number], labels[0])


def test_batches_are_memory_of_their_own() -> None:
    for tasks in ([counted(9)], [counted(9), counted(9, 50)]):
        held = resident(tasks, CPU)
        before, targets = held.inputs.clone(), held.targets.clone()
        for some, answers in batches(held, range(len(tasks)), 0, 1, 9, "none"):
            some.fill_(-1)
            answers.fill_(-1)
        assert torch.equal(held.inputs, before)
        assert torch.equal(held.targets, targets)


def test_a_seed_for_each_network_is_needed() -> None:
    with pytest.raises(ValueError, match="argument 2 is"):
        list(batches(resident([counted(4), counted(4)], CPU), [0], 0, 1, 2, "none"))


def test_a_mixture_draws_from_the_whole_set_as_often_as_its_formula_says() -> None:
    size, first, batch, epochs, gamma = 4000, 1000, 800, 4, 0.9
    each, seeds = updates_of(size, batch), 4
    task = counted(size, mixture=Mixture(first, gamma))
    rows = torch.tensor([[order_of(task, s, e, epochs, batch) for e in range(epochs)] for s in range(seeds)])
    drawn = rows.reshape(seeds, epochs * each, batch)
    for update in range(epochs * each):
        chance = 1 - gamma ** (50 * update / (epochs * each))
        outside = chance * (size - first) / size
        found = float((drawn[:, update] >= first).double().mean())
        assert abs(found - outside) <= 4 * math.sqrt(outside * (1 - outside) / (seeds * batch)), update
    # The probability of the wrong end of the task would be seen.
    assert float((drawn[:, -1] >= first).double().mean()) > 0.7


def test_a_mixture_is_uniform_over_its_first_part_before_and_over_everything_after_the_transition() -> None:
    size, first, seeds = 30, 6, 100
    gamma = 1e-300  # p(0) = 0 and p(n) = 1 for every n >= 1 in float32
    task = counted(size, mixture=Mixture(first, gamma))
    rows = torch.tensor([order_of(task, seed, 0, 1, 15) for seed in range(seeds)])
    for part, sizes in ((rows[:, :15], first), (rows[:, 15:], size)):
        counts = part.flatten().bincount(minlength=size).double() / part.numel()
        assert counts[sizes:].sum() == 0
        assert ((counts[:sizes] - 1 / sizes).abs() <= 4 * math.sqrt(1 / sizes * (1 - 1 / sizes) / part.numel())).all()


def test_a_mixture_starts_in_the_first_part_and_draws_with_replacement() -> None:
    order = order_of(counted(64, mixture=Mixture(4, 0.5)), 0, 0, 50, 64)
    assert set(order) == {0, 1, 2, 3}
    assert set(order_of(counted(64, mixture=Mixture(1, 0.5)), 0, 0, 50, 64)) == {0}
    later = order_of(counted(64, mixture=Mixture(4, 0.5)), 0, 49, 50, 64)
    assert max(later) > 4
    assert len(set(later)) < 64  # a permutation would bring all of them


def test_the_last_batch_of_an_epoch_counts_as_an_update_of_a_mixture() -> None:
    # Three updates an epoch, the third of one example: p changes at examples 2, 4 and 5, so example 4 is of update 2.
    task = counted(5, mixture=Mixture(1, 1e-300))
    assert all(order_of(task, seed, 0, 2, 2)[:2] == [0, 0] for seed in range(20))
    assert any(order_of(task, seed, 1, 2, 2)[:2] != [0, 0] for seed in range(20))
    assert any(order_of(task, seed, 0, 2, 2)[4] != 0 for seed in range(20))


@pytest.mark.parametrize(
    ("size", "batch", "updates"), [(1, 1, 1), (1, 60, 1), (60, 60, 1), (61, 60, 2), (1200, 16, 75)]
)
def test_a_pass_has_as_many_updates_as_batches_whole_or_not(size: int, batch: int, updates: int) -> None:
    assert updates_of(size, batch) == updates


@pytest.mark.parametrize(
    ("updates", "count", "points"),
    [
        (100, 1, {10}),
        (1000, 2, {10, 100}),
        (10_000, 3, {10, 100, 1000}),
        (64, 5, {2, 4, 8, 16, 32}),
        (4, 3, {1, 2, 3}),  # 1.41, 2, 2.83
        (3, 5, {1, 2}),  # 1.2, 1.44, 1.73, 2.08, 2.5: rounded they fall together
        (2, 4, {1}),
        (1, 3, set()),
        (0, 3, set()),
        (100, 0, set()),
    ],
)
def test_logarithmic_points_by_hand(updates: int, count: int, points: set[int]) -> None:
    assert log_spaced(updates, count) == points


@given(st.integers(0, 10**6), st.integers(0, 50))
def test_logarithmic_points_are_inside_and_no_more_than_asked_for(updates: int, count: int) -> None:
    found = log_spaced(updates, count)
    assert len(found) <= count
    assert all(0 < point < updates for point in found)
    if updates > 2 and count:
        assert found


def naive_crop_flip(images: Tensor, draws: torch.Generator) -> Tensor:
    """Pixel by pixel, from the same draws: first who is mirrored, then the shifts to the right and down."""
    count, channels, height, width = images.shape
    mirrored = torch.rand(count, generator=draws) < 0.5
    across, down = torch.randint(-4, 5, (2, count), generator=draws).tolist()
    result = torch.zeros_like(images)
    for n in range(count):
        for row in range(height):
            for column in range(width):
                y, x = row + down[n], (width - 1 - column if mirrored[n] else column) + across[n]
                if 0 <= y < height and 0 <= x < width:
                    for channel in range(channels):
                        result[n, channel, row, column] = images[n, channel, y, x]
    return result


@pytest.mark.parametrize("shape", [(40, 1, 8, 8), (20, 3, 5, 9), (20, 2, 3, 2), (7, 1, 1, 1)])
def test_crops_and_mirrorings_are_those_of_a_loop_over_pixels(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = augmented(images, "crop-flip", torch.Generator().manual_seed(3))
    assert torch.equal(found, naive_crop_flip(images, torch.Generator().manual_seed(3)))
    assert found.is_contiguous()


def test_half_of_the_images_are_mirrored_and_all_shifts_are_equally_likely() -> None:
    count, size = 8000, 16
    images = torch.zeros(count, 2, size, size)
    images[:, 0, 8, 8] = 1  # says where pixel (8, 8) went
    images[:, 1, 8, 9] = 1  # its right neighbour says whether the image is mirrored
    found = augmented(images, "crop-flip", torch.Generator().manual_seed(0)).flatten(2).argmax(2)
    row, column = found[:, 0] // size, found[:, 0] % size
    right = found[:, 1] % size > column
    assert abs(float(right.double().mean()) - 0.5) < 4 * 0.5 / count**0.5
    down, across = row - 8, torch.where(right, column - 8, 7 - column)
    for shift in (down, across):
        counts = (shift + 4).bincount(minlength=9)
        assert counts.sum() == count
        assert len(counts) == 9
        assert ((counts / count - 1 / 9).abs() < 4 * math.sqrt(8 / 81 / count)).all()
    assert abs(float(torch.corrcoef(torch.stack([down, across]).double())[0, 1])) < 4 / count**0.5


@pytest.mark.parametrize("shape", [(30, 2, 8, 8), (30, 1, 6, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_turn_by_nothing_is_the_crop_alone(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN", 0.0)
    images = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(3)
    torch.rand(shape[0], generator=draws)  # the angles come first
    expected = augmented(images, "crop-flip", draws)
    found = augmented(images, "crop-flip-rotate", torch.Generator().manual_seed(3))
    # Shifts are float32, so a pixel is read some 1e-6 beside its middle.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_images_are_turned_by_their_angle_whatever_their_shape(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PADDING", 0)
    count = 30
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    # A spot 15 pixels to the right of the middle; where it went says by how much the image was turned.
    spot = torch.exp(-((x - 15) ** 2 + y**2) / 18).double()
    found = augmented(spot.expand(count, 1, -1, -1), "crop-flip-rotate", torch.Generator().manual_seed(5))[:, 0]
    draws = torch.Generator().manual_seed(5)
    angles = (torch.rand(count, generator=draws, dtype=torch.float32) * 2 - 1).double() * math.radians(15)
    side = torch.where(torch.rand(count, generator=draws) < 0.5, -1.0, 1.0).double()
    mass = found.sum((1, 2))
    across, down = (found * x).sum((1, 2)) / mass, (found * y).sum((1, 2)) / mass
    torch.testing.assert_close((across**2 + down**2).sqrt(), torch.full((count,), 15.0).double(), rtol=0, atol=0.02)
    # Output o shows the input at R F o, so the spot appears at o = F R^-1 (15, 0).
    torch.testing.assert_close(across, side * 15 * angles.cos(), rtol=0, atol=0.02)
    torch.testing.assert_close(down, -15 * angles.sin(), rtol=0, atol=0.02)
    assert float(angles.abs().max()) > math.radians(10)


def test_augmentation_is_drawn_anew_for_every_seed_epoch_and_task_and_again_the_same() -> None:
    images = torch.arange(4 * 64.0).reshape(4, 1, 8, 8) + 1
    task = Task(0, images, torch.arange(4), "images", ordered=True)

    def seen(seed: int, epoch: int, index: int) -> Tensor:
        held = resident([replace(task, index=index)], CPU)
        return epoch_of(held, [seed], epoch, batch=3, augmentation="crop-flip")[0][0]

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    found = [seen(*place) for place in places]
    assert all(torch.equal(image, seen(*place)) for image, place in zip(found, places, strict=True))
    assert all(not torch.equal(a, b) for number, a in enumerate(found) for b in found[:number])
    draws = generator(0, "augmentation", 0, 0)
    parts = [naive_crop_flip(images[:3], draws), naive_crop_flip(images[3:], draws)]
    assert torch.equal(found[0], torch.cat(parts))


@pytest.mark.parametrize("shape", [(4, 10), (4, 8, 8), (4, 1, 2, 3, 3)])
def test_only_images_are_cropped(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"only images \(N, C, H, W\)"):
        augmented(torch.zeros(shape), "crop-flip", torch.Generator())


def test_examples_of_unequal_number_are_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"task 3 .*\(4, 2\) or \(5, 2\).*--together 1"):
        resident([counted(5, index=3), counted(4, index=3)], CPU)
    wide = Task(0, torch.zeros(5, 2), torch.zeros(5, 2), "two targets each")
    with pytest.raises(UsageError, match="together"):
        resident([counted(5), wide], CPU)


def test_test_examples_of_unequal_number_are_refused_and_never_left_out_silently() -> None:
    def tested(size: int) -> Task:
        return replace(counted(4), test_inputs=torch.zeros(size, 2), test_targets=torch.zeros(size))

    with pytest.raises(UsageError, match=r"test examples of task 0 .*\(2, 2\) or \(3, 2\)"):
        resident([tested(3), tested(2)], CPU)


def test_test_examples_are_kept_only_where_every_network_has_them() -> None:
    bare = counted(4)
    tested = [replace(bare, test_inputs=torch.full((3, 2), n), test_targets=torch.arange(3) + n) for n in (1.0, 2.0)]
    held = resident(tested, CPU)
    assert held.test_inputs is not None
    assert held.test_targets is not None
    assert held.test_inputs.shape == (2, 3, 2)
    assert held.test_targets[:, 0].tolist() == [1, 2]
    for tasks in ([bare], [bare, bare], [tested[0], bare], [bare, tested[1]]):
        held = resident(tasks, CPU)
        assert held.test_inputs is None
        assert held.test_targets is None


def test_the_examples_of_each_network_are_stacked_in_order() -> None:
    tasks = [counted(4), counted(4, 10), counted(4, 20)]
    held = resident(tasks, CPU)
    assert held.size == 4
    assert held.tasks == tuple(tasks)
    assert held.inputs[:, 0, 0].tolist() == [0, 10, 20]
    assert torch.equal(held.targets[1], tasks[1].targets)
    assert resident(tasks[:1], CPU).inputs.shape == (1, 4, 2)
