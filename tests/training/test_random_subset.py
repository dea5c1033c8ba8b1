"""Random subsets of one set of examples: of one size, independent of each other, with labels that all seeds share."""

import math

import pytest
import torch
from numbered_examples import numbered, numbers

from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.training.protocols import PROTOCOLS
from plasticity_probe.training.settings import Setting
from plasticity_probe.training.streams.subsets import RandomSubset
from plasticity_probe.training.tasks import Source


def test_a_task_is_the_share_of_the_examples_that_its_members_say() -> None:
    stream, source = RandomSubset(0.7), numbered(41)
    members = stream.members(41, range(30))
    for seed in range(30):
        task = stream.task(source, 0, seed)
        chosen = numbers(task.inputs)
        assert len(chosen) == 29
        assert chosen == sorted(set(chosen)) == torch.nonzero(members[seed]).flatten().tolist()
        assert task.targets.tolist() == [number % 4 for number in chosen]
        assert task.test_inputs is source.test_inputs
    assert torch.equal(stream.members(41, [17, 3]), members[[17, 3]])


def test_subsets_of_different_seeds_are_independent_draws() -> None:
    seeds, count = 4000, 10
    members = RandomSubset(0.7).members(count, range(seeds)).double()
    assert (members.sum(1) == 7).all()
    # Shares and pairs of a draw without replacement: 7 / 10 and 7 * 6 / (10 * 9).
    for found, wanted in ((members.mean(0), 0.7), ((members.T @ members / seeds)[0, 1:], 7 * 6 / 90)):
        assert (found - wanted).abs().max() < 4 * math.sqrt(wanted * (1 - wanted) / seeds)
    # Of neighbouring seeds: two independent subsets share 4.9 examples on average, with the variance of a hypergeometric.
    shared = (members[::2] * members[1::2]).sum(1)
    assert abs(shared.mean() - 4.9) < 4 * math.sqrt(0.49 / (seeds / 2))


def test_the_subset_does_not_depend_on_the_examples_nor_on_the_noise() -> None:
    one, two = RandomSubset(0.5).task(numbered(20), 0, 4), RandomSubset(0.5, 0.3, 8).task(numbered(20, classes=3), 0, 4)
    assert numbers(one.inputs) == numbers(two.inputs)


def test_wrong_labels_are_of_the_share_asked_for_and_the_same_for_every_seed() -> None:
    stream, source = RandomSubset(0.6, label_noise=0.25), numbered(40)
    wrong = stream.wrong(40)
    labels = stream.labels(source)
    assert wrong.sum() == 10
    assert torch.equal(labels != source.targets, wrong)
    assert labels.min() >= 0
    assert labels.max() < 4
    for seed in range(5):
        task = stream.task(source, 0, seed)
        assert torch.equal(task.targets, labels[numbers(task.inputs)])
        assert task.test_targets is source.test_targets
    other = RandomSubset(0.6, label_noise=0.25, noise_seed=1)
    assert not torch.equal(other.wrong(40), wrong)
    assert not RandomSubset().wrong(40).any()


def test_every_other_class_is_as_likely_a_wrong_label() -> None:
    source = numbered(4000, shape=(1,))
    stream = RandomSubset(label_noise=0.9)
    wrong = stream.wrong(4000)
    shift = (stream.labels(source) - source.targets)[wrong] % 4
    counts = shift.bincount(minlength=4)
    assert counts[0] == 0
    expected = 3600 / 3
    assert (counts[1:] - expected).abs().max() < 4 * math.sqrt(expected * 2 / 3)


def test_what_cannot_be_is_refused() -> None:
    for settings, message in (
        ({"share": 1.0}, "0 < share < 1"),
        ({"share": 0.0}, "0 < share < 1"),
        ({"label_noise": 1.0}, r"lie in \[0, 1\)"),
        ({"noise_seed": -1}, "noise seed"),
        ({"tasks": 2}, "has 1 tasks"),
    ):
        with pytest.raises(UsageError, match=message):
            RandomSubset(**settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="takes 2 of 2 examples"):
        RandomSubset(0.9).task(numbered(2), 0, 0)
    values = Source(torch.zeros(8, 1), torch.zeros(8), None, None, 0, "values")
    with pytest.raises(DataError, match="label"):
        RandomSubset().task(values, 0, 0)


def test_the_protocol_is_seventy_percent_of_cifar_100_and_small_of_the_digits() -> None:
    protocol = PROTOCOLS["feldman-zhang-subsets"]
    assert isinstance(protocol.setting, Setting)
    assert protocol.setting.stream == RandomSubset(0.7)
    assert (protocol.setting.data.name, protocol.seeds) == ("cifar100", 4000)
    small = protocol.setting.changed({key: value for key, value in protocol.small.items() if key != "seeds"})
    assert (small.data.name, small.network["name"], protocol.small["seeds"]) == ("digits", "mlp-relu", 200)
    assert small.training.optimizer_settings == {}
