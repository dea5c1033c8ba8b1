import numpy as np
import pytest
from PIL import Image

from plasticity_probe.data.folders import read_folder
from plasticity_probe.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 4, 6, 3), np.uint8)


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def test_a_folder_of_classes(tmp_path):
    save(tmp_path / "pets/dog/1.png", PIXELS[1])
    save(tmp_path / "pets/cat/b.PNG", PIXELS[3])
    save(tmp_path / "pets/cat/a.png", PIXELS[2])
    save(tmp_path / "pets/dog/images/0.png", PIXELS[0])
    (tmp_path / "pets/cat/notes.txt").write_text("no image")
    (tmp_path / "pets/cat/._a.png").write_text("what macOS leaves")
    (tmp_path / "pets/.git").mkdir()
    read = read_folder(tmp_path / "pets")
    assert (read.name, read.classes, read.source) == ("pets", ("cat", "dog"), str(tmp_path / "pets"))
    split = read.splits["train"]
    assert list(read.splits) == ["train"]
    assert split.targets.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(split.inputs, PIXELS[[2, 3, 1, 0]].transpose(0, 3, 1, 2))


def test_splits_share_the_classes_of_train(tmp_path):
    for i, place in enumerate(["train/a", "train/b", "train/c", "test/c", "val/b"]):
        save(tmp_path / place / "0.png", PIXELS[i])
    read = read_folder(tmp_path)
    assert {name: split.targets.tolist() for name, split in read.splits.items()} == {
        "train": [0, 1, 2],
        "val": [1],
        "test": [2],
    }
    np.testing.assert_array_equal(read.splits["test"].inputs[0], PIXELS[3].transpose(2, 0, 1))


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    save(tmp_path / "train/0.png", PIXELS[0])
    save(tmp_path / "plane/0.png", PIXELS[1])
    assert read_folder(tmp_path).classes == ("plane", "train")


def test_grey_images_have_one_channel_unless_any_is_in_colour(tmp_path):
    save(tmp_path / "a/0.png", PIXELS[0, :, :, 0])
    save(tmp_path / "a/1.jpeg", PIXELS[1, :, :, 0])
    grey = read_folder(tmp_path).splits["train"].inputs
    assert grey.shape == (2, 1, 4, 6)
    np.testing.assert_array_equal(grey[0, 0], PIXELS[0, :, :, 0])
    save(tmp_path / "b/2.jpg", PIXELS[2])
    mixed = read_folder(tmp_path).splits["train"].inputs
    assert mixed.shape == (3, 3, 4, 6)
    np.testing.assert_array_equal(mixed[0], np.repeat(PIXELS[0, None, :, :, 0], 3, axis=0))
    np.testing.assert_array_equal(mixed[2], np.asarray(Image.open(tmp_path / "b/2.jpg")).transpose(2, 0, 1))


def test_transparency_is_dropped_and_palettes_are_resolved(tmp_path):
    alpha = np.full((4, 6, 1), 7, np.uint8)
    save(tmp_path / "a/0.png", np.concatenate([PIXELS[0], alpha], axis=2))
    few = PIXELS[1] // 128 * 255
    palette = Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    palette.save(tmp_path / "a/1.png", transparency=bytes(range(8)))
    images = read_folder(tmp_path).splits["train"].inputs
    np.testing.assert_array_equal(images[0], PIXELS[0].transpose(2, 0, 1))
    np.testing.assert_array_equal(images[1], few.transpose(2, 0, 1))


def test_images_of_two_sizes_are_refused_with_both(tmp_path):
    save(tmp_path / "a/0.png", PIXELS[0])
    save(tmp_path / "a/1.png", PIXELS[1, :3])
    with pytest.raises(DataError, match=r"0\.png has 6×4 and .*1\.png 6×3 pixels .*resize"):
        read_folder(tmp_path)


def test_more_than_8_bits_are_refused(tmp_path):
    save(tmp_path / "a/0.png", np.full((4, 6), 1000, np.uint16))
    with pytest.raises(DataError, match="8 bits a channel are expected"):
        read_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 60, 0.7])
def test_a_damaged_image_is_named(tmp_path, keep):
    save(tmp_path / "a/0.png", PIXELS[0])
    content = (tmp_path / "a/0.png").read_bytes()
    (tmp_path / "a/0.png").write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(DataError, match=r"0\.png is (no readable image|damaged)"):
        read_folder(tmp_path)


def test_an_empty_class_is_named(tmp_path):
    save(tmp_path / "a/0.png", PIXELS[0])
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"no \.png or \.jpg images in .*b: "):
        read_folder(tmp_path)


def test_a_class_that_train_lacks_is_named(tmp_path):
    for place in ["train/a", "test/a", "test/z"]:
        save(tmp_path / place / "0.png", PIXELS[0])
    with pytest.raises(DataError, match="classes that train lacks: z"):
        read_folder(tmp_path)


def test_a_folder_without_classes_is_refused(tmp_path):
    save(tmp_path / "0.png", PIXELS[0])
    with pytest.raises(DataError, match="no folders of images"):
        read_folder(tmp_path)
