"""How often does the verdict say "predicts" where nothing links predictor and outcome, and how often where something does?

    python tests/acceptance/verdict_calibration.py --studies 1000 --jobs 2

Prints the tables of docs/statistics.md and fails if "predicts" comes out in more than 6.4 % of the studies of any null (5 % and two standard
errors of 1000), or if fewer than 95 % of planted sign flips of .5 are refuted.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prediction"))

from simulated_studies import NULLS, as_panel, linked

from plasticity_probe.prediction.verdict import Verdict, judge, weigh

CONFIGURATIONS, RUNS, TASKS = 4, 10, 20
EFFECTS, SIZES = (0.1, 0.2, 0.3, 0.4, 0.6), (5, 10, 20, 30)
FLIPS = (0.3, 0.5)
COMPANIONS = 20
SHORT = {
    Verdict.PREDICTS: "predicts",
    Verdict.ACCOMPANIES: "accompanies",
    Verdict.DOES_NOT_PREDICT: "does not",
    Verdict.REFUTED: "refuted",
    Verdict.INCONCLUSIVE: "inconclusive",
}


def of_null(name: str, seed: int) -> Verdict:
    x, y = NULLS[name](np.random.default_rng([seed, 1]), CONFIGURATIONS, RUNS, TASKS)
    panel = as_panel(x, y, CONFIGURATIONS)
    return judge([weigh(panel, "x", "y", seed, full=False)], panel)[0].verdict


def of_link(effect: float, runs: int, seed: int) -> Verdict:
    x, y = linked(effect)(np.random.default_rng([seed, 2]), CONFIGURATIONS, runs, TASKS)
    panel = as_panel(x, y, CONFIGURATIONS)
    return judge([weigh(panel, "x", "y", seed, full=False)], panel)[0].verdict


def of_flip(effect: float, seed: int) -> Verdict:
    signs = np.array([effect, effect, -effect, -effect])
    x, y = linked(signs)(np.random.default_rng([seed, 3]), CONFIGURATIONS, RUNS, TASKS)
    panel = as_panel(x, y, CONFIGURATIONS)
    return judge([weigh(panel, "x", "y", seed, full=False)], panel)[0].verdict


def of_many(seed: int) -> Verdict:
    """Twenty predictors that drift with the outcome and are not linked to it; the best verdict that any of them gets."""
    _, y = NULLS["shared trends"](np.random.default_rng([seed, 4]), CONFIGURATIONS, RUNS, TASKS)
    others = {
        f"x{at}": NULLS["shared trends"](np.random.default_rng([seed, 5, at]), CONFIGURATIONS, RUNS, TASKS)[0]
        for at in range(COMPANIONS)
    }
    panel = replace(as_panel(y, y, CONFIGURATIONS), predictors=others)
    verdicts = {j.verdict for j in judge([weigh(panel, name, "y", seed, full=False) for name in others], panel)}
    return next((v for v in (Verdict.PREDICTS, Verdict.INCONCLUSIVE) if v in verdicts), Verdict.ACCOMPANIES)


def shares(workers: ProcessPoolExecutor, study: Callable[[int], Verdict], studies: int) -> Counter[Verdict]:
    return Counter(workers.map(study, range(studies), chunksize=10))


def line(first: Sequence[object], found: Counter[Verdict]) -> str:
    total = found.total()
    return "| " + " | ".join([*map(str, first), *(f"{found[v] / total:.3f}" for v in SHORT)]) + " |"


def head(first: Sequence[str]) -> str:
    names = [*first, *SHORT.values()]
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--powered", type=int, default=200, help="studies of each effect and size")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    failures: list[str] = []
    allowed = 0.05 + 2 * np.sqrt(0.05 * 0.95 / given.studies)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as workers:
        print(
            f"{given.studies} studies of {CONFIGURATIONS} configurations x {RUNS} runs x {TASKS} tasks without a link\n"
        )
        print(head(["null"]), flush=True)
        for name in NULLS:
            found = shares(workers, partial(of_null, name), given.studies)
            print(line([name], found), flush=True)
            if found[Verdict.PREDICTS] / given.studies > allowed:
                failures.append(name)
        many = shares(workers, of_many, given.powered)
        print(line([f"any of {COMPANIONS} with shared trends ({given.powered} studies)"], many), flush=True)
        print(f"\n{given.powered} studies with a planted link of both signs\n")
        print(head(["effects in the four configurations"]))
        for effect in FLIPS:
            found = shares(workers, partial(of_flip, effect), given.powered)
            print(line([f"{effect}, {effect}, -{effect}, -{effect}"], found), flush=True)
            if effect == max(FLIPS) and found[Verdict.REFUTED] / given.powered < 0.95:
                failures.append(f"flip of {effect}")
        print(f"\n{given.powered} studies with a planted link of one sign\n")
        print(head(["planted", "runs in each"]))
        for effect, runs in product(EFFECTS, SIZES):
            found = shares(workers, partial(of_link, effect, runs), given.powered)
            print(line([effect, runs], found), flush=True)
    if failures:
        sys.exit(f"beyond what the rules promise: {', '.join(failures)}")


if __name__ == "__main__":
    main()
