"""The answer in sentences, held against the verdicts it sums up."""

import numpy as np
from studies import study, telling

from plasticity_probe.prediction.verdict import Verdict
from plasticity_probe.report.story import answer
from plasticity_probe.report.verdicts import number_of

RUNS, TASKS = 16, 8


def test_curvature_has_a_sentence_of_its_own() -> None:
    y, seeing, drifting = telling(RUNS, TASKS)
    noise = np.random.default_rng(1).standard_normal((RUNS, TASKS))
    x = {"weight_norms.l2": drifting, "fisher_rank.effective_rank": seeing, "hessian_spectrum.effective_rank": noise}
    found = study(x, y, configurations=2)
    _, seen, unrelated = found.judged["trainability"]
    assert seen.verdict is Verdict.PREDICTS
    ((title, text),) = answer(found)
    assert title == "Trainability"
    assert "Of its 2 measures of curvature, 1 predicts it and 1 " in text
    assert f"that of fisher_rank.effective_rank, {number_of(seen.evidence.association.estimate)}." in text
    assert unrelated.verdict is not Verdict.PREDICTS


def test_without_curvature_nothing_is_said_of_it() -> None:
    y, seeing, drifting = telling(RUNS, TASKS)
    for x in ({"weight_norms.l2": drifting, "readiness.strength": seeing}, {"fisher_rank.rank": seeing}):
        assert "curvature" not in answer(study(x, y))[0][1]
