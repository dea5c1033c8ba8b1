import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plasticity_probe.data.dataset import DataSet, Split
from plasticity_probe.errors import DataError, UsageError


def pixels(n: int = 4, shape: tuple[int, ...] = (3, 2, 2)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)


def labels(n: int = 4) -> np.ndarray:
    return np.arange(n, dtype=np.int64) % 3


def test_pixels_are_scaled_and_nothing_else():
    inputs, targets = Split(pixels(), labels()).tensors()
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    np.testing.assert_array_equal(inputs.numpy(), pixels().astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(targets.numpy(), labels())


def test_normalisation_is_per_channel():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    inputs, _ = Split(pixels(), labels()).tensors(mean, std)
    for channel in range(3):
        expected = (pixels()[:, channel] / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(
            inputs[:, channel].numpy(), expected, rtol=0, atol=8 * float(np.finfo(np.float32).eps)
        )
    over_rows, _ = Split(pixels(), labels()).tensors(mean[::-1], std[::-1])
    assert not torch.allclose(inputs, over_rows)


def test_one_number_serves_every_channel():
    split = Split(pixels(), labels())
    assert torch.equal(split.tensors((0.3,), (0.2,))[0], split.tensors((0.3,) * 3, (0.2,) * 3)[0])


def test_float_inputs_are_used_as_they_are():
    values = np.array([[200.0, -3.0]], np.float32)
    split = Split(values, np.zeros(1, np.int64))
    np.testing.assert_array_equal(split.tensors()[0].numpy(), values)
    np.testing.assert_array_equal(split.tensors((1.0, -1.0), (2.0, 4.0))[0].numpy(), [[99.5, -0.5]])


def test_flatten_keeps_the_normalisation_per_channel():
    split = Split(pixels(), labels())
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    flat, _ = split.tensors(mean, std, flatten=True)
    assert flat.shape == (4, 12)
    assert torch.equal(flat, split.tensors(mean, std)[0].reshape(4, 12))


def test_tensors_share_no_memory_with_the_split():
    split = Split(np.ones((2, 1), np.float32), np.zeros(2, np.float32))
    for tensor in split.tensors():
        tensor.fill_(7)
    assert (split.inputs == 1).all()
    assert (split.targets == 0).all()


def test_read_only_arrays_are_fine():
    values = np.frombuffer(bytes(range(8)), np.uint8).reshape(2, 4)
    assert Split(values, np.zeros(2, np.int64)).tensors()[0].shape == (2, 4)


@pytest.mark.parametrize("moments", [((0.5, 0.5), (1.0, 1.0)), ((0.5,), (1.0, 1.0)), ((0.5,) * 4, (1.0,))])
def test_a_mismatch_of_channels_names_both(moments):
    with pytest.raises(DataError, match=r"[24] numbers, but the inputs have 3 channels"):
        Split(pixels(), labels()).tensors(*moments)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), 1e-60])
def test_std_must_be_positive_in_float32(std):
    with pytest.raises(DataError, match="std positive"):
        Split(pixels(), labels()).tensors((0.0,), (std,))


@pytest.mark.parametrize(("mean", "std", "given"), [((0.5,), None, "mean"), (None, (0.5,), "std")])
def test_mean_and_std_go_together(mean, std, given):
    with pytest.raises(UsageError, match=f"only {given} was given"):
        Split(pixels(), labels()).tensors(mean, std)


def test_the_text_says_what_was_done():
    images, values = Split(pixels(), labels()), Split(np.ones((2, 1), np.float32), labels(2))
    assert images.normalisation() == "pixels scaled to [0, 1], not normalised"
    assert values.normalisation() == "inputs as stored, not normalised"
    text = images.normalisation((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    assert text == (
        "pixels scaled to [0, 1], then (x - mean) / std with mean (0.4914, 0.4822, 0.4465) and std (0.247, 0.2435, 0.2616)"
    )


@given(size=st.integers(1, 60), n=st.integers(1, 80), seed=st.integers(0, 2**64))
def test_a_subset_is_ascending_without_repeats_and_nested(size, n, seed):
    split = Split(np.arange(size, dtype=np.float32)[:, None], np.arange(size, dtype=np.int64))
    chosen = split.subset(n, seed).targets
    assert len(chosen) == min(n, size)
    assert (np.diff(chosen) > 0).all()
    assert set(split.subset(max(1, n // 2), seed).targets) <= set(chosen)
    np.testing.assert_array_equal(chosen, split.subset(n, seed).inputs[:, 0])


def test_a_subset_is_fixed_for_ever_and_leaves_global_generators_alone():
    split = Split(np.zeros((12, 1), np.float32), np.arange(12), np.arange(12) % 2 == 0)
    before = repr(np.random.get_state())
    torch_before = torch.get_rng_state()
    part = split.subset(5, 3)
    assert repr(np.random.get_state()) == before
    assert torch.equal(torch.get_rng_state(), torch_before)
    raw = np.random.PCG64(3).random_raw(12).tolist()
    assert part.targets.tolist() == sorted(sorted(range(12), key=raw.__getitem__)[:5])
    np.testing.assert_array_equal(part.noisy, part.targets % 2 == 0)
    assert part.targets.tolist() != split.subset(5, 4).targets.tolist()


def test_every_example_is_as_likely_to_be_chosen():
    split = Split(np.zeros((10, 1), np.float32), np.arange(10))
    draws = 2000
    counts = np.bincount(np.concatenate([split.subset(3, seed).targets for seed in range(draws)]), minlength=10)
    standard_error = np.sqrt(draws * 0.3 * 0.7)
    assert np.abs(counts - 0.3 * draws).max() < 4 * standard_error


@pytest.mark.parametrize(("n", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_a_subset_refuses_nonsense(n, seed):
    with pytest.raises(UsageError, match="n >= 1"):
        Split(pixels(), labels()).subset(n, seed)


@pytest.mark.parametrize(
    ("inputs", "targets", "noisy", "message"),
    [
        (pixels(), labels(3), None, "4 inputs, 3 targets"),
        (pixels(), labels(), np.zeros(3, bool), "4 inputs, 4 targets, 3 noisy marks"),
        (pixels(), labels(), np.zeros((4, 1), bool), "noisy marks must have the shape"),
        (pixels(0), labels(0), None, "at least one example"),
        (pixels(4, (0, 2)), labels(), None, "nothing in inputs"),
        (pixels().astype(np.float64), labels(), None, "inputs must be .* not float64"),
        (pixels(), labels().astype(np.int32), None, "targets must be .* not int32"),
        (pixels(), labels(), np.zeros(4, np.uint8), "noisy must be .* not uint8"),
        (pixels().tolist(), labels(), None, "not list"),
        (pixels()[:, 0, 0, 0], labels(), None, "at least two axes"),
        (pixels(), np.eye(4, dtype=np.float32), None, "argmax"),
        (pixels(), labels() - 1, None, "2 of 4 are negative"),
        (
            pixels(),
            np.array([0, np.nan, np.inf, 1], np.float32),
            None,
            "2 of 4 values of the targets .* in 2 of 4 examples",
        ),
        (
            np.array([[1, np.nan], [np.nan, np.inf], [0, 0], [0, 0]], np.float32),
            labels(),
            None,
            "3 of 8 values .* in 2 of 4",
        ),
    ],
)
def test_what_is_no_split_is_refused(inputs, targets, noisy, message):
    with pytest.raises(DataError, match=message):
        Split(inputs, targets, noisy)


def test_labels_outside_the_classes_are_counted():
    with pytest.raises(DataError, match=r"2 of 5 labels of split 'test' .* 0 to 1 \(the largest is 2\)"):
        DataSet(
            "d",
            {"train": Split(pixels(2), labels(2)), "test": Split(pixels(5), labels(5) + np.array([0, 0, 0, 2, 0]))},
            ("a", "b"),
        )


def test_splits_must_be_alike():
    with pytest.raises(DataError, match=r"train: \(3, 2, 2\) uint8.*test: \(1, 2, 2\) uint8"):
        DataSet("d", {"train": Split(pixels(), labels()), "test": Split(pixels(4, (1, 2, 2)), labels())})


def test_a_data_set_needs_a_split_and_labels_for_its_classes():
    with pytest.raises(DataError, match="no split"):
        DataSet("d", {})
    with pytest.raises(DataError, match="float32 targets"):
        DataSet("d", {"train": Split(pixels(), labels().astype(np.float32))}, ("a", "b", "c"))
