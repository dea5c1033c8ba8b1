"""Folders of images, one subfolder a class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plasticity_probe.data.arrays import split_of
from plasticity_probe.data.dataset import DataSet
from plasticity_probe.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLITS = ("train", "val", "test")
GREY = ("1", "L", "LA")
COLOUR = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")

Example = tuple[Path, int]


def read_folder(folder: Path) -> DataSet:
    """Read a folder of PNG or JPEG images.

    Either `folder/class/*.png` (one split, called "train") or `folder/train/class/*.png` with `test` and `val` beside `train` where
    they exist. Classes are numbered in the sorted order of their folders' names, images sorted by path; folders inside a class
    are searched too, names that start with a dot are passed over. Images become uint8 (N, 1, H, W) if all of them are grey, else
    (N, 3, H, W); transparency is dropped.

    Args:
        folder: The folder.

    Raises:
        DataError: No classes or images, images of several sizes or of more than 8 bits a channel, an unreadable image, or a class of
            another split that `train` lacks.
    """
    parts = _parts(folder)
    classes = _class_names(parts["train"])
    if not classes:
        raise DataError(
            f"{folder} holds no folders of images: expected CLASS/*.png (or .jpg), or train/CLASS/*.png in it; a named data set is "
            "asked for by its name, such as cifar10, with --data-root"
        )
    examples = {split: _examples(part, classes) for split, part in parts.items()}
    colour = _survey([path for split in examples.values() for path, _ in split])
    splits = {
        split: split_of(
            _decode([path for path, _ in part], colour),
            [label for _, label in part],
            classes=classes,
            where=str(parts[split]),
        )
        for split, part in examples.items()
    }
    return DataSet(folder.resolve().name, splits, classes, source=str(folder))


def _parts(folder: Path) -> dict[str, Path]:
    if _class_names(folder / "train"):
        return {split: folder / split for split in SPLITS if _class_names(folder / split)}
    return {"train": folder}


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _examples(part: Path, classes: Sequence[str]) -> list[Example]:
    own = _class_names(part)
    if unknown := sorted(set(own) - set(classes)):
        raise DataError(
            f"{part} has classes that train lacks: {', '.join(unknown)}; expected only {', '.join(classes)}"
        )
    images = {name: _images(part / name) for name in own}
    if empty := [name for name, paths in images.items() if not paths]:
        raise DataError(
            f"no .png or .jpg images in {', '.join(str(part / name) for name in empty)}: add some or remove the folder"
        )
    return [(path, classes.index(name)) for name, paths in images.items() for path in paths]


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _survey(paths: Sequence[Path]) -> bool:
    """Read the headers alone: check that all images have one size, and tell whether any is in colour."""
    first_size, colour = None, False
    for path in paths:
        with _open(path) as image:
            size, mode = image.size, image.mode
        first_size = first_size or size
        if size != first_size:
            raise DataError(
                f"images must have one size, but {paths[0]} has {first_size[0]}×{first_size[1]} and {path} {size[0]}×{size[1]} "
                "pixels (width × height): resize them to one size, or hand over a DataLoader that does"
            )
        if mode not in GREY + COLOUR:
            raise DataError(
                f"{path} has mode {mode}, but 8 bits a channel are expected: convert it to 8-bit grey or RGB"
            )
        colour = colour or mode in COLOUR
    return colour


def _decode(paths: Sequence[Path], colour: bool) -> np.ndarray:
    images = []
    for path in paths:
        with _open(path) as image:
            try:
                image.load()
                # Pillow would warn that it drops a palette's transparency, which is what the docstring says.
                image.info.pop("transparency", None)
                images.append(np.asarray(image.convert("RGB" if colour else "L")))
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(f"{path} is damaged: {error}; remove or replace it") from error
    stacked = np.stack(images)
    return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)) if colour else stacked[:, None]


def _open(path: Path) -> Any:
    from PIL import Image  # only folders of images need it

    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no readable image: {error}; remove or replace it") from error
