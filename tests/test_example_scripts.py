import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SAYS = {
    "is_my_checkpoint_still_plastic": [
        "fresh",
        "fisher_rank",
        "Trial: of 600 new random labels the checkpoint learned",
    ],
    "feature_learning_world": ["notebook", "The warm learner memorised"],
    "own_probe": ["effective number of predicted classes", "xarray.DataArray"],
    "does_curvature_predict": [
        "fisher_rank.threshold_rank may or may not predict trainability",
        "digits-report/index.html",
    ],
    "who_keeps_learning": ["| relu | none |", "| identity | redo |"],
    "which_examples_are_memorised": [
        "1442 examples, 60 models",
        "| input-loss curvature | 1 | 1009 |",
        "Surely memorised",
    ],
    "does_readiness_rank": [
        "| optimization readiness |",
        "| 0.987 / 0.988 / 0.977 |",
        "| Hessian effective rank |",
        "low loss in the end",
    ],
    "watch_a_run": ["rank of the Fisher before it", "threshold rank"],
}


def run(example: Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", example],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_answers_its_question(example: Path, tmp_path: Path) -> None:
    printed = run(example, tmp_path)
    for text in SAYS[example.stem]:
        assert text in printed


@pytest.mark.slow
def test_an_example_with_a_trace_may_be_run_again(tmp_path: Path) -> None:
    example = next(path for path in EXAMPLES if path.stem == "watch_a_run")
    assert run(example, tmp_path) == run(example, tmp_path)


def test_every_example_is_checked_and_asks_one_question() -> None:
    assert {path.stem for path in EXAMPLES} == set(SAYS)
    for path in EXAMPLES:
        first_line = path.read_text().split("\n")[0]
        assert first_line.startswith('"""')
        assert first_line.count("?") == 1
