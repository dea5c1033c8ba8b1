"""From a run folder to the memorization of each example, against a second way of computing it from the same files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import plasticity_probe as probe
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.errors import CheckpointError, DataError, RunError, UsageError
from plasticity_probe.example_memorization import ExampleMemorization
from plasticity_probe.prediction.detection import detection_auc
from plasticity_probe.prediction.subset_memorization import subset_memorization
from plasticity_probe.training.loop import train
from plasticity_probe.training.run_folder import read_manifest
from plasticity_probe.training.settings import Data, Setting, Training
from plasticity_probe.training.sources import load_source
from plasticity_probe.training.streams.shifting import RandomLabels
from plasticity_probe.training.streams.subsets import RandomSubset

SEEDS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)
SETTING = Setting(
    RandomSubset(label_noise=0.1),
    Data("digits", examples=150),
    {"name": "mlp-relu", "hidden": [32]},
    Training(epochs=(30,), batch=35, learning_rate=1e-2),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "subsets"
    train(SETTING, SEEDS, folder)
    return folder


@pytest.fixture(scope="module")
def found(run: Path) -> ExampleMemorization:
    return probe.memorized_examples(run, draws=100)


def test_predictions_and_members_are_those_of_the_files(run: Path, found: ExampleMemorization) -> None:
    manifest = read_manifest(run)
    source = load_source(manifest.setting.data)
    assert source is not None
    assert source.test_inputs is not None
    assert found.tested is not None
    assert found.seeds == SEEDS
    assert found.left_out == ()
    for at, seed in enumerate(SEEDS):
        task = manifest.setting.stream.task(source, 0, seed)
        seen = [bool((task.inputs == example).flatten(1).all(1).any()) for example in source.inputs]
        assert found.members[at].tolist() == seen
        assert torch.equal(torch.from_numpy(found.labels)[found.members[at]], task.targets)
        state = read_checkpoint(sorted((run / f"seed_{seed}").iterdir())[-1]).state
        network = MLP([64, 32, 10], activation="relu")
        network.load_state_dict(state)
        predicted = network(source.inputs).argmax(1)
        assert found.correct[at].tolist() == (predicted == torch.from_numpy(found.labels)).tolist()
        assert found.tested[at].tolist() == (network(source.test_inputs).argmax(1) == source.test_targets).tolist()
        # What the run itself recorded of its own subset.
        accuracy = next(o.accuracy for o in train(SETTING, SEEDS, run, resume=True).outcomes if o.seed == seed)
        assert found.correct[at][found.members[at]].mean() == pytest.approx(accuracy, abs=1e-6)


def test_the_estimate_is_the_difference_of_the_two_shares(found: ExampleMemorization) -> None:
    for i in (0, 40, 149):
        inside = found.members[:, i]
        assert found.scores.memorization[i] == pytest.approx(
            found.correct[inside, i].mean() - found.correct[~inside, i].mean()
        )
    assert found.examples.tolist() == list(range(150))


def test_wrong_labels_are_the_memorised_ones(found: ExampleMemorization) -> None:
    assert found.wrong.sum() == 15
    area = detection_auc(found.scores.memorization, found.wrong, draws=200)
    assert area.low > 0.9
    # With the members of other seeds than trained the networks, nothing is told from anything.
    mixed = subset_memorization(np.roll(found.members, 1, axis=0), found.correct, draws=2)
    assert np.nanmean(mixed.memorization[found.wrong]) < 0.5 * np.nanmean(found.scores.memorization[found.wrong])
    assert found.wrong[found.most(10)].mean() > 0.5


def test_influence_is_on_the_test_examples(found: ExampleMemorization) -> None:
    assert found.tested is not None
    matrix = found.influence()
    assert matrix.shape == (150, 355)
    inside = found.members[:, 7]
    assert matrix[7, 11] == pytest.approx(found.tested[inside, 11].mean() - found.tested[~inside, 11].mean())
    pairs = found.influential_pairs(cut=0.5)
    memorised = found.scores.memorization >= found.scores.cut - 1e-9
    assert len(pairs) == np.sum(matrix[memorised] >= 0.5 - 1e-9)
    with pytest.raises(DataError, match="test split"):
        replace(found, tested=None).influence()


def test_a_result_can_be_written_and_read(found: ExampleMemorization) -> None:
    entry = found.to_dict()
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert len(entry["scores"]["memorization"]) == 150
    assert "mean memorization of wrong labels" in repr(found)


def test_seeds_that_are_not_trained_to_the_end_are_left_out(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "subsets"))
    lines = (copy / "outcomes.jsonl").read_text().splitlines(keepends=True)
    diverged = json.loads(lines[0]) | {"status": "diverged"}
    (copy / "outcomes.jsonl").write_text("".join([json.dumps(diverged) + "\n", *lines[2:]]))
    found = probe.memorized_examples(copy, draws=10)
    assert found.left_out == (0, 1)
    assert found.seeds == SEEDS[2:]
    assert "2 of the run's seeds" in repr(found)


def test_other_runs_are_refused(run: Path, tmp_path: Path) -> None:
    other = replace(SETTING, stream=RandomLabels(1, 30), training=Training(epochs=(1,)))
    train(other, [0], tmp_path / "labels")
    with pytest.raises(UsageError, match=r"stream random-labels; train one of the stream random-subset"):
        probe.memorized_examples(tmp_path / "labels")
    with pytest.raises(RunError, match="holds no training run"):
        probe.memorized_examples(tmp_path)
    unkept = replace(SETTING, checkpoint_every=0, training=Training(epochs=(1,)))
    train(unkept, [0, 1], tmp_path / "unkept")
    with pytest.raises(UsageError, match="kept no weights"):
        probe.memorized_examples(tmp_path / "unkept")
    few = replace(SETTING, training=Training(epochs=(1,)))
    train(few, [0, 1], tmp_path / "few")
    with pytest.raises(UsageError, match="train more models"):
        probe.memorized_examples(tmp_path / "few")
    (tmp_path / "few" / "outcomes.jsonl").unlink()
    with pytest.raises(UsageError, match="--resume"):
        probe.memorized_examples(tmp_path / "few")


def test_files_that_are_missing_or_swapped_are_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "subsets"))
    one, two = (sorted((copy / f"seed_{seed}").iterdir())[-1] for seed in (0, 1))
    shutil.copy(two, one)
    with pytest.raises(DataError, match="says that it is of seed 1"):
        probe.memorized_examples(copy)
    one.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        probe.memorized_examples(copy)
