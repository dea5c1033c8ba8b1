"""Influence of training examples on predictions elsewhere, against loops and a planted truth."""

import json

import numpy as np
import pytest
from subset_worlds import NAN, by_loops, random_members

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.subset_memorization import subset_memorization
from plasticity_probe.prediction.training_influence import influence, influence_blocks, influential_pairs


def test_influence_on_the_training_examples_has_the_memorization_on_its_diagonal() -> None:
    rng = np.random.default_rng(11)
    members = random_members(rng, 30, 12)
    correct = (rng.random((30, 12)) < 0.6).astype(float)
    correct[3, 4] = correct[7, 7] = NAN
    found = subset_memorization(members, correct, draws=2)
    matrix = influence(members, correct)
    np.testing.assert_allclose(np.diag(matrix), found.memorization, atol=1e-12)
    for i in range(12):
        for j in range(12):
            column = np.repeat(correct[:, j : j + 1], 12, axis=1)
            assert matrix[i, j] == pytest.approx(by_loops(members, column)[i][0], abs=1e-12)


def test_blocks_of_influence_are_the_whole_and_carry_its_errors() -> None:
    rng = np.random.default_rng(12)
    members, correct = random_members(rng, 20, 7), rng.random((20, 5))
    blocks = list(influence_blocks(members, correct, held=10))
    assert [(rows.start, rows.stop) for rows, _ in blocks] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    np.testing.assert_allclose(np.concatenate([found.value for _, found in blocks]), influence(members, correct))
    for rows, found in blocks:
        for at, i in enumerate(range(rows.start, rows.stop)):
            for j in range(5):
                column = np.repeat(correct[:, j : j + 1], 7, axis=1)
                assert found.error[at, j] == pytest.approx(by_loops(members, column)[i][1], abs=1e-7)


def test_a_planted_influence_is_found_and_that_of_an_example_that_is_not_memorised_left_out() -> None:
    rng = np.random.default_rng(13)
    members = random_members(rng, 200, 10)
    right = rng.random((200, 6)) < 0.5
    right[:, 2] = members[:, 4]
    right[:, 5] = members[:, 1]
    memorization = np.zeros(10)
    memorization[4] = 0.6
    pairs = influential_pairs(members, right, memorization)
    assert (pairs.trained[0], pairs.tested[0], pairs.influence[0]) == (4, 2, 1)
    assert set(pairs.trained.tolist()) == {4}
    assert pairs.low[0] > 0.9
    both = influential_pairs(members, right, np.ones(10), cut=0.9)
    assert {(int(i), int(j)) for i, j in zip(both.trained, both.tested, strict=True)} == {(4, 2), (1, 5)}
    assert len(influential_pairs(members, right, np.zeros(10))) == 0
    assert json.dumps(pairs.to_dict())
    assert "4 -> 2: 1.00" in repr(pairs)


def test_what_cannot_be_is_refused() -> None:
    members, correct = np.ones((4, 3), bool), np.ones((4, 3))
    with pytest.raises(UsageError, match="same models"):
        influence(members, correct[:3])
    with pytest.raises(UsageError, match="memorization of 3 examples"):
        influential_pairs(members, correct, np.zeros(2))
