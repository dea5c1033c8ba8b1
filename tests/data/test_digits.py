from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from plasticity_probe.data.digits import read_digits


def test_digits_are_those_of_scikit_learn_split_by_class():
    data = read_digits(Path())
    pixels, targets = map(np.asarray, load_digits(return_X_y=True))
    train, test = data.splits["train"], data.splits["test"]
    assert train.inputs.shape[1:] == (1, 8, 8)
    assert train.inputs.dtype == np.float32
    assert (train.inputs.min(), train.inputs.max()) == (0, 1)
    seen = dict.fromkeys(range(10), 0)
    expected = {"train": [], "test": []}
    for index, label in enumerate(targets):
        seen[label] += 1
        expected["test" if seen[label] % 5 == 0 else "train"].append(index)
    for name, split in data.splits.items():
        np.testing.assert_array_equal(split.inputs.reshape(-1, 64) * 16, pixels[expected[name]])
        np.testing.assert_array_equal(split.targets, targets[expected[name]])
    assert (len(train), len(test)) == (1442, 355)
    assert np.ptp(np.bincount(test.targets)) <= 2


def test_its_moments_normalise_the_training_images():
    data = read_digits(Path())
    images, _ = data.splits["train"].tensors(data.mean, data.std)
    assert abs(images.mean().item()) < 1e-6
    assert abs(images.std(correction=0).item() - 1) < 1e-6
