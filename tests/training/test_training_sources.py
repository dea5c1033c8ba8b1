import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plasticity_probe.errors import DataError, UnknownNameError
from plasticity_probe.training.settings import Data
from plasticity_probe.training.sources import load_source, source_sha256
from plasticity_probe.training.tasks import Source


def npz(folder: Path, **arrays: Any) -> str:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return str(path)


def loaded(name: str, normalise: str = "none", **settings: Any) -> Source:
    source = load_source(Data(name, normalise, **settings))  # type: ignore[arg-type]
    assert source is not None
    return source


def held_out(source: Source) -> tuple[Tensor, Tensor]:
    assert source.test_inputs is not None
    assert source.test_targets is not None
    return source.test_inputs, source.test_targets


PIXELS = np.array([[0, 255, 51], [102, 153, 204]], dtype=np.uint8).reshape(2, 3, 1, 1)


def test_no_name_is_no_source() -> None:
    assert load_source(Data("")) is None


def test_pixels_that_are_not_normalised_lie_between_0_and_1(tmp_path: Path) -> None:
    source = loaded(npz(tmp_path, x=PIXELS, y=np.array([1, 0])))
    assert torch.equal(source.inputs.flatten(1), torch.tensor([[0, 255, 51], [102, 153, 204]]) / 255)
    assert source.inputs.dtype == torch.float32
    assert source.targets.tolist() == [1, 0]
    assert source.test_inputs is source.test_targets is None
    assert source.description.endswith("2 training examples, pixels scaled to [0, 1], not normalised")


def test_symmetric_pixels_lie_between_minus_1_and_1(tmp_path: Path) -> None:
    source = loaded(npz(tmp_path, x=PIXELS, y=np.array([1, 0])), "symmetric")
    expected = 2 * torch.tensor([[0.0, 1.0, 0.2], [0.4, 0.6, 0.8]]) - 1
    torch.testing.assert_close(source.inputs.flatten(1), expected, rtol=0, atol=1e-6)


def test_symmetric_takes_pixels_only(tmp_path: Path) -> None:
    scaled = np.array([[0.0], [1.0], [0.25]], dtype=np.float32)
    source = loaded(npz(tmp_path, x=scaled, y=np.arange(3)), "symmetric")
    assert source.inputs.flatten().tolist() == [-1, 1, -0.5]
    for values in (scaled * 2, scaled - 0.5):
        with pytest.raises(DataError, match=r"lie in \[-?[0-9.]+, [0-9.]+\]; normalise them as \"standard\""):
            loaded(npz(tmp_path, x=values, y=np.arange(3)), "symmetric")


def test_standard_pixels_have_the_mean_and_spread_of_the_training_split_in_every_channel(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    train, test = (draws.integers(0, high, (n, 2, 3, 4), dtype=np.uint8) for high, n in ((200, 50), (255, 20)))
    train[:, 1] //= 4
    source = loaded(
        npz(tmp_path, train_x=train, train_y=np.arange(50) % 3, test_x=test, test_y=np.arange(20) % 3), "standard"
    )
    mean = (train / 255).mean((0, 2, 3), keepdims=True)
    std = (train / 255).std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(source.inputs.numpy(), (train / 255 - mean) / std, rtol=0, atol=2e-6)
    np.testing.assert_allclose(held_out(source)[0].numpy(), (test / 255 - mean) / std, rtol=0, atol=2e-6)
    # The test split's own moments would give something else.
    assert abs(float(held_out(source)[0].mean())) > 0.1


def test_a_constant_channel_is_centred_and_not_divided_by_nothing(tmp_path: Path) -> None:
    inputs = np.array([[3.0, 1.0], [3.0, 5.0]], dtype=np.float32)
    source = loaded(npz(tmp_path, x=inputs, y=np.array([0, 1])), "standard")
    assert source.inputs.tolist() == [[0, -1], [0, 1]]


def test_usual_moments_go_before_measured_ones(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "import numpy as np\n"
        "from plasticity_probe.data.dataset import DataSet, Split\n"
        "def examples():\n"
        "    split = Split(np.array([[0], [255]], np.uint8), np.array([0, 1]))\n"
        "    return DataSet('own', {'train': split, 'test': split}, mean=(0.25,), std=(0.125,))\n"
    )
    source = loaded(f"{file}:examples", "standard")
    assert source.inputs.tolist() == held_out(source)[0].tolist() == [[-2], [6]]
    assert source.description == (
        "own: 2 training examples, pixels scaled to [0, 1], then (x - mean) / std with mean (0.25) and std (0.125)"
    )


def test_digits_are_at_hand() -> None:
    source = loaded("digits", "standard")
    assert source.inputs.shape[1:] == held_out(source)[0].shape[1:] == (1, 8, 8)
    assert source.classes == 10
    assert abs(float(source.inputs.mean())) < 1e-5
    assert abs(float(source.inputs.std(correction=0)) - 1) < 1e-5


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train",), None),
        (("train", "val"), "val"),
        (("train", "test"), "test"),
        (("train", "val", "test"), "test"),
        (("test", "val", "train"), "test"),
    ],
)
def test_test_examples_are_those_of_the_test_split_and_else_of_the_validation_split(
    splits: tuple[str, ...], expected: str | None, tmp_path: Path
) -> None:
    level = {"train": 1.0, "val": 2.0, "test": 3.0}
    arrays: dict[str, np.ndarray] = {}
    for split in splits:
        arrays |= {f"{split}_x": np.full((2, 1), level[split], np.float32), f"{split}_y": np.array([0, 1])}
    source = loaded(npz(tmp_path, **arrays))
    assert source.inputs.unique().tolist() == [1.0]
    assert (None if source.test_inputs is None else source.test_inputs.unique().item()) == level.get(expected or "")
    assert (source.test_targets is None) == (expected is None)


def test_classes_are_those_of_all_splits_or_those_that_are_named(tmp_path: Path) -> None:
    arrays = {"train_x": np.zeros((3, 2), np.float32), "train_y": np.array([0, 2, 1])}
    arrays |= {"test_x": np.zeros((2, 2), np.float32), "test_y": np.array([4, 0])}
    assert loaded(npz(tmp_path, **arrays)).classes == 5
    assert loaded(npz(tmp_path, **arrays, classes=np.array(list("abcdefg")))).classes == 7


def test_values_are_no_classes(tmp_path: Path) -> None:
    source = loaded(npz(tmp_path, x=np.zeros((3, 2), np.float32), y=np.array([0.5, 3.0, -1.0])))
    assert source.classes == 0
    assert source.targets.dtype == torch.float32
    assert source.targets.tolist() == [0.5, 3.0, -1.0]


def test_fewer_examples_are_one_random_subset_measured_like_the_whole(tmp_path: Path) -> None:
    inputs = np.arange(40, dtype=np.float32)[:, None]
    name = npz(tmp_path, train_x=inputs, train_y=np.arange(40), test_x=inputs[:7], test_y=np.arange(7))
    whole, part = loaded(name, "standard"), loaded(name, "standard", examples=10)
    rows = part.targets
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows.tolist() != list(range(10))
    assert torch.equal(part.inputs, whole.inputs[rows])
    assert part.classes == 40
    assert len(held_out(part)[0]) == 7
    assert torch.equal(part.inputs, loaded(name, "standard", examples=10).inputs)
    assert source_sha256(loaded(name, "standard", examples=99)) == source_sha256(whole)
    assert ": 10 training examples" in part.description


def test_without_a_training_split_nothing_can_be_learned(tmp_path: Path) -> None:
    name = npz(tmp_path, test_x=np.zeros((3, 2), np.float32), test_y=np.arange(3))
    with pytest.raises(DataError, match="no split 'train' to learn from; it has: test"):
        loaded(name)


def test_a_loader_is_no_data_set(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\n"
        "def batches():\n"
        "    return torch.utils.data.DataLoader([(torch.zeros(2), 0), (torch.ones(2), 1)], batch_size=2)\n"
    )
    with pytest.raises(DataError, match="is a loader; a run needs a data set"):
        loaded(f"{file}:batches")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder .*no\.npz"):
        loaded(str(tmp_path / "no.npz"))
    with pytest.raises(DataError, match=r"the text .*no\.txt cannot be read"):
        loaded(str(tmp_path / "no.txt"))
    with pytest.raises(UnknownNameError, match="Did you mean 'digits'"):
        loaded("digit")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xff" * 200)
    for name in ("folder.txt", "bytes.txt"):
        with pytest.raises(DataError, match="expected a UTF-8 file"):
            loaded(str(tmp_path / name))


def written(folder: Path, text: str) -> str:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def rising(count: int) -> str:
    """Character i is another one than all before it, so a token is its own place in the text."""
    return "".join(chr(0x4E00 + index) for index in range(count))


@pytest.mark.parametrize(("length", "characters"), [(5, 101), (5, 105), (5, 100), (7, 200), (2, 5), (64, 64 * 30 + 1)])
def test_windows_of_a_text_follow_each_other_and_targets_are_the_next_characters(
    length: int, characters: int, tmp_path: Path
) -> None:
    source = loaded(written(tmp_path, rising(characters)), length=length)
    windows = (characters - 1) // length
    tests = max(1, windows // 10)
    inputs = torch.cat([source.inputs, held_out(source)[0]])
    targets = torch.cat([source.targets, held_out(source)[1]])
    assert torch.equal(inputs, torch.arange(windows * length).reshape(windows, length))
    assert torch.equal(targets, inputs + 1)
    assert len(held_out(source)[0]) == tests
    assert source.classes == characters
    assert inputs.dtype == targets.dtype == torch.int64
    assert source.description == (
        f"text.txt: {windows - tests} windows of {length} characters to learn from, in the order of the text"
    )


def test_nothing_that_is_tested_was_learned(tmp_path: Path) -> None:
    for examples in (None, 3):
        source = loaded(written(tmp_path, rising(333)), length=10, examples=examples)
        inputs, targets = held_out(source)
        assert int(source.targets.max()) <= int(inputs.min())
        assert set(source.targets.flatten().tolist()).isdisjoint(targets.flatten().tolist())


def test_of_a_text_the_beginning_is_kept_and_the_test_part_stays(tmp_path: Path) -> None:
    name = written(tmp_path, rising(401))
    whole, part = loaded(name, length=10), loaded(name, length=10, examples=5)
    assert torch.equal(part.inputs, whole.inputs[:5])
    assert torch.equal(part.targets, whole.targets[:5])
    assert all(torch.equal(a, b) for a, b in zip(held_out(part), held_out(whole), strict=True))
    assert source_sha256(loaded(name, length=10, examples=36)) == source_sha256(whole)
    assert source_sha256(loaded(name, length=10, examples=99)) == source_sha256(whole)


def test_characters_are_numbered_by_their_code_point(tmp_path: Path) -> None:
    source = loaded(written(tmp_path, "böa\nb" * 30), length=4)
    assert source.classes == 4  # newline, a, b, o with dots
    assert source.inputs[0].tolist() == [2, 3, 1, 0]
    assert source.targets[0].tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize(("text", "length"), [("", 4), ("ab", 2), ("abab", 2), ("abcdefgh", 4), ("a" * 500, 4)])
def test_a_text_that_is_too_short_is_refused_with_what_it_has(text: str, length: int, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"has {len(text)} characters, {len(set(text))} of them different; at least two"
    ):
        loaded(written(tmp_path, text), length=length)


def test_the_shortest_text_has_two_windows_and_one_character_more(tmp_path: Path) -> None:
    source = loaded(written(tmp_path, "abcab"), length=2)
    assert source.inputs.tolist() == [[0, 1]]
    assert held_out(source)[0].tolist() == [[2, 0]]
    assert held_out(source)[1].tolist() == [[0, 1]]


def test_the_hash_of_examples_changes_with_every_value_shape_and_type() -> None:
    source = Source(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2), torch.zeros(2), 2, "zeros")
    seen = {source_sha256(None), source_sha256(source)}
    for name in ("inputs", "targets", "test_inputs", "test_targets"):
        tensor = getattr(source, name)
        for place in range(tensor.numel()):
            other = tensor.clone()
            other.view(-1)[place] = 1
            seen.add(source_sha256(dataclasses.replace(source, **{name: other})))
        seen.add(source_sha256(dataclasses.replace(source, **{name: tensor[None]})))
        other_type = {torch.float32: torch.int32, torch.int64: torch.float64}[tensor.dtype]  # zeros of the same bytes
        seen.add(source_sha256(dataclasses.replace(source, **{name: tensor.to(other_type)})))
    seen.add(source_sha256(dataclasses.replace(source, inputs=torch.full((3, 2), -0.0))))
    seen.add(source_sha256(dataclasses.replace(source, test_inputs=None, test_targets=None)))
    assert len(seen) == 2 + (6 + 3 + 4 + 2) + 2 * 4 + 2
    assert source_sha256(dataclasses.replace(source, description="other words")) == source_sha256(source)
    turned = dataclasses.replace(source, inputs=torch.zeros(2, 3).t())
    assert source_sha256(turned) == source_sha256(source)
