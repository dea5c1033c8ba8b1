"""The area under the ROC curve against scikit-learn, its interval against SciPy."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.detection import detection_auc


def test_detection_is_scikit_learns_area_with_scipys_interval() -> None:
    rng = np.random.default_rng(14)
    marked = rng.random(120) < 0.3
    scores = np.round(rng.standard_normal(120) + marked, 1)
    scores[5] = math.nan
    known = ~np.isnan(scores)
    found = detection_auc(scores, marked, draws=4000)
    assert found.value == pytest.approx(roc_auc_score(marked[known], scores[known]))
    theirs = bootstrap(
        (scores[known & marked], scores[known & ~marked]),
        lambda a, b: np.mean((a[:, None] > b) + (a[:, None] == b) / 2),
        vectorized=False,
        n_resamples=4000,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert [found.low, found.high] == pytest.approx([theirs.low, theirs.high], abs=0.01)
    assert detection_auc(-scores, marked).value == pytest.approx(1 - found.value)
    assert math.isnan(detection_auc(scores, np.zeros(120, bool)).value)


def test_scores_and_marks_must_belong_together() -> None:
    with pytest.raises(UsageError, match="one score and one mark"):
        detection_auc(np.zeros(3), np.zeros(2))
