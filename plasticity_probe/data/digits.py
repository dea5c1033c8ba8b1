"""The 8 × 8 digits that come with scikit-learn: real data without a download."""

from pathlib import Path

import numpy as np

from plasticity_probe.data.dataset import DataSet, Split


def read_digits(_: Path) -> DataSet:
    """Read scikit-learn's digits: 1797 images (N, 1, 8, 8) float32 in [0, 1], the original 0 to 16 divided by 16.

    They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI). The split is our choice,
    because scikit-learn has none: of each class, in file order, every fifth image is a test image and the others are training
    images (1442 and 355), so both hold every class alike and no random generator is involved. Mean and std are computed from the
    training images.
    """
    from sklearn.datasets import load_digits  # takes a second to import, and only this data set needs it

    pixels, targets = map(np.asarray, load_digits(return_X_y=True))
    images = (pixels.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    labels = targets.astype(np.int64)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[4::5]] = True
    splits = {"train": Split(images[~test], labels[~test]), "test": Split(images[test], labels[test])}
    mean, std = (
        float(moment) for moment in (images[~test].mean(dtype=np.float64), images[~test].std(dtype=np.float64))
    )
    return DataSet("digits", splits, tuple("0123456789"), (mean,), (std,), source="sklearn.datasets.load_digits")
