from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_examples import numbered
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.streams.regression import SlowlyChangingRegression

SMALL = SlowlyChangingRegression(tasks=4, examples=30, slow_bits=3, inputs=5, hidden=6)


def signs(seed: int, label: str, *shape: int) -> list[list[int]]:
    drawn = torch.randint(2, shape, generator=generator(seed, label)).reshape(-1, shape[-1])
    return [[1 if bit else -1 for bit in row] for row in drawn.tolist()]


def by_hand(stream: SlowlyChangingRegression, example: list[float], seed: int) -> float:
    """Unit by unit: on where more than a share beta of the inputs, the constant one among them, agree with their weights' signs."""
    (outward,) = signs(seed, "output weights", stream.hidden + 1)
    total = outward[-1]
    for unit, weights in enumerate(signs(seed, "hidden weights", stream.hidden, stream.inputs + 1)):
        agreeing = sum((bit == 1) == (weight == 1) for bit, weight in zip([*example, 1], weights, strict=True))
        if agreeing > stream.beta * (stream.inputs + 1):
            total += outward[unit]
    return float(total)


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_targets_are_those_of_the_published_network_of_thresholds(beta: float, seed: int) -> None:
    stream = SlowlyChangingRegression(1, slow_bits=3, inputs=5, hidden=6, beta=beta)
    every = torch.tensor(list(product([0.0, 1.0], repeat=5)))
    found = stream.target(every, seed)
    assert found.tolist() == [by_hand(stream, example, seed) for example in every.tolist()]
    assert found.unique().numel() > 1


def test_the_threshold_is_the_published_formula() -> None:
    stream = SlowlyChangingRegression(1, hidden=40)
    inputs = stream.task(None, 0, 0).inputs[:50]
    (outward,) = signs(0, "output weights", 41)
    for example, target in zip(inputs.tolist(), stream.target(inputs, 0).tolist(), strict=True):
        total = outward[-1]
        for unit, weights in enumerate(signs(0, "hidden weights", 40, 21)):
            drive = sum(weight * bit for weight, bit in zip(weights, example, strict=False)) + weights[-1]
            theta = 21 * 0.7 - sum(weight == -1 for weight in weights)
            total += outward[unit] * (drive > theta)
        assert target == total


def test_a_threshold_that_is_met_exactly_leaves_the_unit_off() -> None:
    stream = SlowlyChangingRegression(1, slow_bits=1, inputs=1, hidden=1, beta=0.5)
    differs = 0
    for seed in range(20):
        ((weight, bias),) = signs(seed, "hidden weights", 1, 2)
        (outward, shift) = signs(seed, "output weights", 2)[0]
        for bit in (0.0, 1.0):
            agreeing = ((bit == 1) == (weight == 1)) + (bias == 1)
            assert float(stream.target(torch.tensor([[bit]]), seed)) == shift + outward * (agreeing == 2)
            differs += agreeing == 1
    assert differs > 0


def test_the_defaults_are_the_published_ones() -> None:
    stream = SlowlyChangingRegression(2)
    task = stream.task(None, 1, 0)
    assert (stream.rule, stream.slow_bits, stream.hidden, stream.beta) == ("flip_one", 15, 100, 0.7)
    assert task.inputs.shape == (10_000, 20)
    assert task.targets.shape == (10_000,)
    assert task.inputs.dtype == task.targets.dtype == torch.float32
    assert task.ordered
    assert task.test_inputs is None
    assert 1 < task.targets.std() < 20
    assert stream.outputs(None) == stream.outputs(numbered(4)) == 1


def test_inputs_are_bits_of_which_the_slow_ones_stay_and_the_others_are_fair_coins() -> None:
    stream = SlowlyChangingRegression(1)
    inputs = stream.task(None, 3, 1).inputs
    assert set(inputs.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(inputs[:, :15], stream.slow(3, 1).float().expand(10_000, -1))
    assert (inputs[:, 15:].mean(0) - 0.5).abs().max() < 4 * 0.5 / 100
    correlations = torch.corrcoef(inputs[:, 15:].T) - torch.eye(5)
    assert correlations.abs().max() < 4 / 100
    assert abs(float((inputs[1:, 15:] == inputs[:-1, 15:]).float().mean()) - 0.5) < 4 * 0.5 / (5 * 9999) ** 0.5


def test_tasks_draw_other_fast_bits_and_share_one_target_network() -> None:
    one, two = (SMALL.task(None, index, 0) for index in range(2))
    assert not torch.equal(one.inputs[:, 3:], two.inputs[:, 3:])
    for task in (one, two):
        assert task.targets.tolist() == [by_hand(SMALL, example, 0) for example in task.inputs.tolist()]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), first=st.integers(0, 60))
def test_exactly_one_slow_bit_flips_at_each_change(seed: int, first: int) -> None:
    states = [SlowlyChangingRegression(1).slow(index, seed) for index in range(first, first + 4)]
    for before, after in pairwise(states):
        assert int((before != after).sum()) == 1


def test_slow_bits_are_the_first_ones_with_every_flip_so_far() -> None:
    state = SMALL.slow(0, 2).tolist()
    for change in range(1, 30):
        flipped = int(torch.randint(3, (), generator=generator(2, "flipped bit", change)))
        state[flipped] = 1 - state[flipped]
        assert SMALL.slow(change, 2).tolist() == state


def test_every_slow_bit_flips_about_equally_often() -> None:
    stream = SlowlyChangingRegression(1)
    counts = torch.zeros(15)
    for seed in range(60):
        states = torch.stack([stream.slow(index, seed) for index in range(21)])
        counts += (states[1:] != states[:-1]).sum(0)
    assert int(counts.sum()) == 1200
    assert (counts - 80).abs().max() < 4 * (1200 / 15 * 14 / 15) ** 0.5


def redrawn(seeds: int) -> Tensor:
    stream = SlowlyChangingRegression(1, rule="redraw_all")
    return torch.stack([torch.stack([stream.slow(index, seed) for index in range(11)]) for seed in range(seeds)])


def test_all_slow_bits_can_be_drawn_anew_instead() -> None:
    states = redrawn(40)
    changes = (states[:, 1:] != states[:, :-1]).float()
    assert abs(float(changes.mean()) - 0.5) < 4 * 0.5 / (40 * 10 * 15) ** 0.5
    assert float(changes.sum(2).std()) > 1


def test_seeds_have_target_networks_of_their_own() -> None:
    every = torch.tensor(list(product([0.0, 1.0], repeat=5)))
    assert len({tuple(SMALL.target(every, seed).tolist()) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"tasks": 0},
        {"examples": 0},
        {"slow_bits": 0},
        {"slow_bits": 21},
        {"inputs": 0},
        {"hidden": 0},
        {"beta": 0.0},
        {"beta": 1.0},
        {"rule": "flip_two"},
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"got |cannot have"):
        SlowlyChangingRegression(**{"tasks": 3, **wrong})  # type: ignore[arg-type]


def test_all_inputs_can_be_slow() -> None:
    task = SlowlyChangingRegression(1, examples=4, slow_bits=5, inputs=5).task(None, 0, 0)
    assert torch.equal(task.inputs, task.inputs[:1].expand(4, -1))
