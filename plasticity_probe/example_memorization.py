"""Which examples of a run of subset-trained networks are memorised: its checkpoints, their predictions and who saw what, brought together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plasticity_probe.checkpoints.architectures import identify, load_network
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.errors import CheckpointError, DataError, UsageError
from plasticity_probe.network.isolation import isolated
from plasticity_probe.prediction import training_influence
from plasticity_probe.prediction.member_differences import Marks
from plasticity_probe.prediction.plain import plain
from plasticity_probe.prediction.resampling import DRAWS
from plasticity_probe.prediction.subset_memorization import MEMORISED, SubsetMemorization, subset_memorization
from plasticity_probe.prediction.training_influence import INFLUENTIAL, Pairs
from plasticity_probe.run_tasks import RunTasks, run_tasks
from plasticity_probe.training.outcomes import OK
from plasticity_probe.training.run_folder import Manifest, checkpoint_path, read_manifest, stored_outcomes
from plasticity_probe.training.streams.subsets import RandomSubset
from plasticity_probe.training.tasks import Source

CHUNK = 1024
"""Examples in one forward pass (our choice; it decides no prediction but by rounding)."""


@dataclass(frozen=True, eq=False)
class ExampleMemorization:
    """How much of each training example the networks of a run have memorised.

    Args:
        run: The run folder.
        scores: The estimates, by example, with their errors; see `plasticity_probe.prediction.subset_memorization`.
        examples: Number of each example in the training set of the run, in the order of its data, shape (example,).
        labels: The label that it was trained with, same shape.
        wrong: Whether the stream made that label wrong, same shape.
        seeds: The seeds whose networks were used.
        left_out: Seeds that were not: they have diverged, or are not trained to the end. That some diverge is no accident, so where many
            are left out the others are no random sample.
        members: Which network was trained on which example, shape (seed, example).
        correct: Which label each network predicts, same shape.
        tested: Which test labels each network predicts, shape (seed, test example); None where the data has no test examples.
        description: Where the examples come from.
    """

    run: str
    scores: SubsetMemorization
    examples: NDArray[np.int64]
    labels: NDArray[np.int64]
    wrong: Marks
    seeds: tuple[int, ...]
    left_out: tuple[int, ...]
    members: Marks
    correct: Marks
    tested: Marks | None
    description: str

    def most(self, count: int = 10) -> NDArray[np.int64]:
        """The most memorised examples, the most certain first among equals.

        Args:
            count: How many.
        """
        order = np.lexsort(
            (-np.nan_to_num(self.scores.low, nan=-2.0), -np.nan_to_num(self.scores.memorization, nan=-2.0))
        )
        return self.examples[order[:count]]

    def influence(self) -> NDArray[np.float64]:
        """How much each training example raises the chance that a test example is predicted rightly, shape (example, test example).

        Raises:
            DataError: The data has no test examples.
        """
        return training_influence.influence(self.members, self._tested())

    def influential_pairs(self, *, cut: float = INFLUENTIAL) -> Pairs:
        """Memorised training examples and the test examples that they decide.

        Args:
            cut: The least influence (Feldman and Zhang 2020: 0.15).

        Raises:
            DataError: The data has no test examples.
        """
        scores = self.scores
        return training_influence.influential_pairs(
            self.members, self._tested(), scores.memorization, cut=cut, memorised=scores.cut
        )

    def to_dict(self) -> dict[str, Any]:
        """The estimates and what they are of, as plain data; what each network predicts is left out."""
        return {
            "run": self.run,
            "description": self.description,
            "seeds": list(self.seeds),
            "left_out": list(self.left_out),
            "examples": plain(self.examples),
            "labels": plain(self.labels),
            "wrong": plain(self.wrong),
            "scores": self.scores.to_dict(),
        }

    def __repr__(self) -> str:
        lines = [f"ExampleMemorization of {self.run} ({self.description})", repr(self.scores)]
        if self.left_out:
            lines.append(f"  left out, diverged or unfinished: {len(self.left_out)} of the run's seeds")
        if self.wrong.any():
            of_wrong, of_right = (np.nanmean(self.scores.memorization[marks]) for marks in (self.wrong, ~self.wrong))
            lines.append(f"  mean memorization of wrong labels {of_wrong:.3f}, of right ones {of_right:.3f}")
        return "\n".join(lines)

    def _tested(self) -> Marks:
        if self.tested is None:
            raise DataError(
                f"influence is on test examples, but the data of {self.run} has none; train on data with a test split"
            )
        return self.tested


def memorized_examples(
    run: str | Path,
    *,
    cut: float = MEMORISED,
    draws: int = DRAWS,
    seed: int = 0,
    device: str | torch.device = "cpu",
    data_root: str | Path | None = None,
    download: bool = False,
    trust_code: bool = False,
) -> ExampleMemorization:
    """How much of each training example the networks of a run have memorised (Feldman and Zhang 2020).

    The run is one of the stream "random-subset", such as that of the protocol feldman-zhang-subsets: each seed's network was trained on a random
    subset of the examples. Each network at its end predicts all examples, in eval mode.

    Args:
        run: The run folder.
        cut: From so much on an example counts as memorised (Feldman and Zhang 2020: 0.25).
        draws: Bootstrap draws of the networks.
        seed: Seed of the draws.
        device: Where to run the networks.
        data_root: Folder of the named data sets.
        download: Fetch a named data set that is not there.
        trust_code: Whether a function that the run folder names as its data may be called.

    Raises:
        UsageError: A run of another stream, one without networks at their end, or too few networks for an estimate.
        RunError: The folder holds no run, or is damaged.
        DataError: The data is missing or is not what the run was trained on.
        CheckpointError: A checkpoint is missing or cannot be read.
    """
    folder = Path(run)
    manifest = read_manifest(folder)
    stream = _subsets(folder, manifest)
    ends = _ends(folder, manifest)
    found = run_tasks(list(ends.values()), "current", 1, data_root=data_root, download=download, trust_code=trust_code)
    source = found.source
    assert source is not None
    _check_seeds(found, ends)
    labels = stream.labels(source)
    correct, tested = _predicted(list(ends.values()), source, labels, torch.device(device))
    members = stream.members(len(labels), ends).numpy()
    return ExampleMemorization(
        run=str(folder),
        scores=subset_memorization(members, correct, cut=cut, draws=draws, seed=seed),
        examples=np.arange(len(labels), dtype=np.int64),
        labels=labels.numpy(),
        wrong=stream.wrong(len(labels)).numpy(),
        seeds=tuple(ends),
        left_out=tuple(each for each in manifest.seeds if each not in ends),
        members=members,
        correct=correct,
        tested=tested,
        description=manifest.data,
    )


def _subsets(folder: Path, manifest: Manifest) -> RandomSubset:
    stream = manifest.setting.stream
    if not isinstance(stream, RandomSubset):
        raise UsageError(
            f"memorization is told from networks that each saw a random subset of the same examples, but {folder} holds a run of the stream "
            f"{stream.name}; train one of the stream {RandomSubset.name}, as `probe train feldman-zhang-subsets --scale small` does"
        )
    return stream


def _ends(folder: Path, manifest: Manifest) -> dict[int, Path]:
    """The last checkpoint of each seed that was trained to the end."""
    if not manifest.setting.checkpoint_every:
        raise UsageError(
            f"{folder} kept no weights (checkpoint_every = 0); train it anew with --set checkpoint_every=1"
        )
    done = [o for o in stored_outcomes(folder) if o.network == "run" and o.status == OK]
    if not done:
        raise UsageError(f"no network of {folder} is trained to the end; go on with it by `probe train ... --resume`")
    ends = {o.seed: checkpoint_path(folder, o.seed, o.step) for o in done}
    if missing := [path for path in ends.values() if not path.is_file()]:
        raise CheckpointError(
            f"{missing[0]} is missing, as are {len(missing) - 1} other networks that {folder} once held; put them back, or train the run anew"
        )
    return ends


def _check_seeds(found: RunTasks, ends: dict[int, Path]) -> None:
    for seed, path in ends.items():
        # Who saw what is rebuilt from the seed, so a file in another seed's place would silently count on the wrong side.
        if found.seed_of(path) != seed:
            raise DataError(
                f"{path} says that it is of seed {found.seed_of(path)}; put it back where it was written, or train the run anew"
            )


def _predicted(
    paths: Sequence[Path], source: Source, labels: Tensor, device: torch.device
) -> tuple[Marks, Marks | None]:
    """Which labels of the training and of the test examples each network predicts, (network, example) each."""
    has_tests = source.test_inputs is not None and source.test_targets is not None and len(source.test_targets) > 0
    correct: list[Tensor] = []
    tested: list[Tensor] = []
    with isolated(), torch.no_grad():
        for path in paths:
            file = read_checkpoint(path)
            network = load_network(file.state, identify(file).build()).model.to(device).eval()
            correct.append(_classes(network, source.inputs, device) == labels)
            if has_tests:
                assert source.test_inputs is not None
                tested.append(_classes(network, source.test_inputs, device) == source.test_targets)
    return torch.stack(correct).numpy(), torch.stack(tested).numpy() if has_tests else None


def _classes(network: torch.nn.Module, inputs: Tensor, device: torch.device) -> Tensor:
    """The class that a network predicts of each example, (example,) int64."""
    return torch.cat([network(some.to(device)).argmax(-1).cpu() for some in inputs.split(CHUNK)])
