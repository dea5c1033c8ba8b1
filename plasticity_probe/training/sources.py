"""From the name of data to the examples that a stream makes its tasks of."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plasticity_probe.data.dataset import DataSet, Split
from plasticity_probe.data.sources import load_data
from plasticity_probe.errors import DataError
from plasticity_probe.training.settings import Data
from plasticity_probe.training.tasks import Source

TEST_SPLITS = ("test", "val")
"""Where test examples come from: the first of these that the data set has (our choice; a run selects nothing by its test results)."""
TEST_SHARE = 0.1
"""Of a text, its end (our choice, as is usual for language models: what is tested was written after what was learned)."""


def load_source(data: Data, *, root: str | Path | None = None, download: bool = False) -> Source | None:
    """Reads the examples of a run.

    Args:
        data: Which, and how they are normalised.
        root: Folder of the named data sets.
        download: Fetch a named data set that is not there.

    Returns:
        The examples; None where the setting names none.

    Raises:
        UnknownNameError: No data set of that name.
        DataError: They are missing or malformed, have no training split, or are no pixels where the normalisation needs pixels.
    """
    if not data.name:
        return None
    if data.name.endswith(".txt"):
        return _text(Path(data.name).expanduser(), data)
    found = load_data(data.name, root=root, download=download)
    if not isinstance(found, DataSet):
        raise DataError(
            f"{found.name} is a loader; a run needs a data set: give a function that returns a DataSet or arrays"
        )
    return _of_dataset(found, data)


def source_sha256(source: Source | None) -> str:
    """A hash of the examples, which a run folder keeps so that the same ones are found again.

    Args:
        source: The examples.
    """
    digest = sha256()
    tensors = () if source is None else (source.inputs, source.targets, source.test_inputs, source.test_targets)
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_dataset(found: DataSet, data: Data) -> Source:
    if "train" not in found.splits:
        raise DataError(f"{found.name} has no split 'train' to learn from; it has: {', '.join(found.splits)}")
    train = found.splits["train"]
    if data.examples is not None:
        train = train.subset(data.examples, 0)
    test = next((found.splits[name] for name in TEST_SPLITS if name in found.splits), None)
    mean, std = _moments(found, data)
    inputs, targets = train.tensors(mean, std)
    tested = test.tensors(mean, std) if test is not None else (None, None)
    labels = train.targets.dtype == np.int64
    classes = 0
    if labels:
        largest = max(int(split.targets.max()) for split in found.splits.values())
        classes = len(found.classes) if found.classes is not None else largest + 1
    text = f"{found.name}: {len(train)} training examples, {train.normalisation(mean, std)}"
    return Source(inputs, targets, *tested, classes, text)


def _moments(found: DataSet, data: Data) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    if data.normalise == "none":
        return None, None
    if data.normalise == "symmetric":
        _check_pixels(found)
        return (0.5,), (0.5,)
    if found.mean is not None and found.std is not None:
        return found.mean, found.std
    return _measured(found.splits["train"])


def _check_pixels(found: DataSet) -> None:
    inputs = found.splits["train"].inputs
    if inputs.dtype != np.uint8 and (inputs.min() < 0 or inputs.max() > 1):
        raise DataError(
            f'"symmetric" takes pixels from [0, 1] to [-1, 1], but the inputs of {found.name} lie in [{inputs.min():g}, {inputs.max():g}]; '
            'normalise them as "standard" or "none" (--set data.normalise=standard)'
        )


def _measured(split: Split) -> tuple[Sequence[float], Sequence[float]]:
    inputs, _ = split.tensors()
    channels = inputs.transpose(0, 1).flatten(1).double()
    spread = channels.std(1, correction=0)
    return channels.mean(1).tolist(), torch.where(spread > 0, spread, 1.0).tolist()


def _text(path: Path, data: Data) -> Source:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"the text {path} cannot be read: {error}; expected a UTF-8 file of characters") from error
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text], dtype=torch.int64)
    windows = (len(tokens) - 1) // data.length
    cut = windows - max(1, int(windows * TEST_SHARE))
    if cut < 1 or len(characters) < 2:
        raise DataError(
            f"{path} has {len(text)} characters, {len(characters)} of them different; at least two windows of {data.length} characters and one "
            "more are needed, and two different ones: give a longer text, or shorter windows (--set data.length=8)"
        )
    inputs, targets = (_windows(tokens[shift:], windows, data.length) for shift in (0, 1))
    kept = cut if data.examples is None else min(cut, data.examples)
    description = f"{path.name}: {kept} windows of {data.length} characters to learn from, in the order of the text"
    return Source(inputs[:kept], targets[:kept], inputs[cut:], targets[cut:], len(characters), description)


def _windows(tokens: Tensor, count: int, length: int) -> Tensor:
    return tokens[: count * length].reshape(count, length).clone()
