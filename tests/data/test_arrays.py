import numpy as np
import pytest

from plasticity_probe.data.arrays import read_npz, split_of
from plasticity_probe.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 7), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def write(tmp_path, **arrays):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(("inputs", "targets"), [("x", "y"), ("images", "labels"), ("inputs", "targets")])
@pytest.mark.parametrize("form", ["{}", "train_{}", "{}_train"])
def test_one_split_is_called_train(tmp_path, inputs, targets, form):
    path = write(tmp_path, **{form.format(inputs): PIXELS, form.format(targets): LABELS, "idx": LABELS})
    read = read_npz(path)
    assert (read.name, read.source, read.classes, list(read.splits)) == ("images", str(path), None, ["train"])
    np.testing.assert_array_equal(read.splits["train"].inputs, PIXELS)
    np.testing.assert_array_equal(read.splits["train"].targets, LABELS)
    assert read.splits["train"].noisy is None


def test_splits_marks_and_class_names(tmp_path):
    marks = LABELS == 1
    path = write(
        tmp_path,
        train_x=PIXELS,
        train_y=LABELS.astype(np.uint8)[:, None],
        noisy_train=marks,
        x_test=PIXELS[:2],
        y_test=LABELS[:2],
        val_images=PIXELS[2:],
        val_labels=LABELS[2:],
        val_noisy=np.array([0, 1, 1, 0]),
        classes=["a", "b", "c"],
    )
    read = read_npz(path)
    assert read.classes == ("a", "b", "c")
    assert {name: len(split) for name, split in read.splits.items()} == {"train": 6, "val": 4, "test": 2}
    np.testing.assert_array_equal(read.splits["train"].noisy, marks)
    np.testing.assert_array_equal(read.splits["val"].noisy, [False, True, True, False])
    assert read.splits["test"].noisy is None
    assert read.splits["train"].targets.shape == (6,)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": PIXELS, "b": LABELS}, r"none of the expected keys .*found: a, b"),
        ({}, "found: none"),
        ({"train_x": PIXELS, "y": LABELS[:2], "z": LABELS}, "6 inputs, 2 targets"),
        ({"x": PIXELS}, r"has 'x' but nothing for 'y' .*found: x"),
        ({"test_labels": LABELS}, "has 'test_labels' but nothing for 'images'"),
        ({"x": PIXELS, "y": LABELS, "train_x": PIXELS}, "'train_x' and 'x', which mean the same"),
        ({"x": PIXELS, "y": LABELS, "images": PIXELS, "labels": LABELS}, "several arrays for split 'train'"),
        ({"x": PIXELS, "y": LABELS, "classes": np.arange(3)}, "'classes' must be a list of names"),
        ({"x": PIXELS, "y": LABELS, "classes": ["a", "b"]}, "2 of 6 labels"),
        ({"x": PIXELS, "y": LABELS + 0.5, "classes": ["a", "b", "c"]}, "6 of 6 class labels are no whole numbers"),
        ({"x": PIXELS, "y": LABELS, "noisy": LABELS}, "noisy marks are int64"),
        ({"x": PIXELS, "y": LABELS[:5]}, r"images\.npz \(x, y\): .*6 inputs, 5 targets"),
        ({"x": PIXELS[:0], "y": LABELS[:0]}, "at least one example"),
    ],
)
def test_other_contents_are_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        read_npz(write(tmp_path, **arrays))


class Canary:
    loaded = False

    def __setstate__(self, state):
        Canary.loaded = True

    def __getstate__(self):
        return {"a": 1}


def test_objects_are_never_unpickled(tmp_path):
    path = write(tmp_path, x=np.array([Canary()], object), y=LABELS[:1])
    with pytest.raises(DataError, match="arrays of Python objects are never read"):
        read_npz(path)
    assert not Canary.loaded
    assert isinstance(np.load(path, allow_pickle=True)["x"][0], Canary)
    assert Canary.loaded


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty", "array", "pickle", "missing"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = write(tmp_path, x=PIXELS, y=LABELS)
    content = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "flipped":
            path.write_bytes(content.replace(PIXELS.tobytes()[100:140], bytes(40)))
        case "text" | "empty":
            path.write_bytes(b"hello" if damage == "text" else b"")
        case "array":
            with path.open("wb") as file:
                np.save(file, PIXELS)
        case "pickle":
            path.write_bytes(b"\x80\x04K\x01.")
        case "missing":
            path.unlink()
    with pytest.raises(DataError, match=r"images\.npz"):
        read_npz(path)


def test_every_mutated_file_ends_in_a_data_error_or_in_data(tmp_path):
    path = write(tmp_path, x=PIXELS[:2, :, :1, :1], y=LABELS[:2])
    content = path.read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        mutated = bytearray(content)
        for place in generator.integers(0, len(mutated), 3):
            mutated[place] = generator.integers(0, 256)
        path.write_bytes(mutated)
        try:
            read_npz(path)
        except DataError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("channels", [1, 3])
def test_uint8_images_with_channels_last_are_moved(channels):
    images = PIXELS[:, :channels]
    np.testing.assert_array_equal(split_of(images.transpose(0, 2, 3, 1), LABELS).inputs, images)
    np.testing.assert_array_equal(split_of(images, LABELS).inputs, images)


def test_grey_uint8_images_get_a_channel_axis():
    np.testing.assert_array_equal(split_of(PIXELS[:, 0], LABELS).inputs, PIXELS[:, :1])


@pytest.mark.parametrize("shape", [(6, 3, 32, 3), (6, 1, 8, 1), (6, 64, 1, 1), (6, 64, 3, 3), (6, 5), (6, 2, 2, 4)])
def test_other_layouts_are_left_alone(shape):
    images = np.arange(np.prod(shape)).astype(np.uint8).reshape(shape)
    np.testing.assert_array_equal(split_of(images, LABELS).inputs, images)


def test_floats_keep_their_layout_and_become_float32():
    for shape in [(6, 8, 8, 3), (6, 4, 5)]:
        values = np.random.default_rng(0).standard_normal(shape)
        split = split_of(values, LABELS)
        assert split.inputs.dtype == np.float32
        np.testing.assert_array_equal(split.inputs, values.astype(np.float32))


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64, bool])
def test_integers_become_labels(kind):
    targets = split_of(PIXELS, (LABELS % 2).astype(kind)).targets
    assert targets.dtype == np.int64
    np.testing.assert_array_equal(targets, LABELS % 2)


def test_floats_are_values_unless_there_are_classes():
    assert split_of(PIXELS, LABELS.astype(np.float64)).targets.dtype == np.float32
    assert split_of(PIXELS, LABELS.astype(np.float64), classes=("a", "b", "c")).targets.dtype == np.int64


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (PIXELS.astype(np.int64), LABELS, "here: inputs are int64, but uint8"),
        (PIXELS.astype(complex), LABELS, "inputs are complex128"),
        (PIXELS, LABELS.astype(str), "targets are <U"),
        (PIXELS, np.array([None] * 6), "targets are object"),
        (np.full((6, 2), 1e39), LABELS, "12 of 12 values .* in 6 of 6"),
        (np.full((6, 2), np.nan), LABELS, "12 of 12 values"),
        (PIXELS, LABELS - 1, "2 of 6 are negative"),
        (PIXELS, np.array([0, 1, np.nan, 0, 1, 2]), "1 of 6 values of the targets"),
    ],
)
def test_what_could_mean_several_things_is_refused(inputs, targets, message):
    with pytest.raises(DataError, match=message):
        split_of(inputs, targets, where="here")


def test_a_label_that_is_nan_is_no_label():
    with pytest.raises(DataError, match="1 of 6 class labels are no whole numbers"):
        split_of(PIXELS, np.array([0, 1, np.nan, 0, 1, 2]), classes=("a", "b", "c"))
    with pytest.raises(DataError, match="1 of 6 class labels are no whole numbers"):
        split_of(PIXELS, np.array([0, 1, np.inf, 0, 1, 2]), classes=("a", "b", "c"))
