"""Wall time and peak memory of `probe report` on traces of many checkpoints, with known truth.

    python tests/benchmarks/report.py [--configurations 5] [--runs 5] [--tasks 20] [--keep FOLDER]

Builds traces of nine probes with arrays, reports on them in processes of their own, and prints one line in Markdown. With the defaults
there are 500 checkpoints. `fisher_rank.value` is built to predict, `weight_norms.value` to drift along without telling anything.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import numpy as np

from plasticity_probe.trace.layout import Row, Variable
from plasticity_probe.trace.outcome_rows import rows_of_outcomes
from plasticity_probe.trace.writer import open_for_append
from plasticity_probe.training.outcomes import Outcome

PROBES = (
    "performance", "hessian_spectrum", "fisher_rank", "feature_rank", "dead_units", "weight_norms", "gradient_norms", "memorization",
    "readiness",
)  # fmt: skip
REMEDIES = ("plain", "l2-init", "redo", "shrink-perturb", "layer-norm", "crelu", "hare-tortoise", "dash")
UPDATES = 100
LAYERS = ("features.0", "features.3", "classifier.1", "head")


def rows_of_study(configurations: int, runs: int, tasks: int, seed: int = 0) -> list[Row]:
    """Rows of a study in which one quantity predicts, one drifts along and the others are noise.

    Args:
        configurations: How many configurations.
        runs: How many runs of each.
        tasks: How many tasks of each run.
        seed: Seed of all draws.
    """
    rng = np.random.default_rng(seed)
    found: list[Row] = []
    for at in range(configurations):
        name = REMEDIES[at % len(REMEDIES)] + ("" if at < len(REMEDIES) else f"-{at}")
        news = rng.standard_normal((runs, tasks))
        level = 0.95 - (0.35 / (1 + at)) * np.linspace(0, 1, tasks) ** 1.5
        score = np.clip(level + 0.03 * news, 0, 1)
        outcomes = [o for run in range(runs) for task in range(tasks) for o in _outcomes(run, task, score, rng)]
        settings = {"run_sha256": f"{at:08d}"}
        about = {"configuration": name, "protocol": "random-label-digits", "network": "mlp-relu", "remedies": name}
        found += rows_of_outcomes(outcomes, {run: f"{name} seed {run}" for run in range(runs)}, settings, about)
        for run in range(runs):
            for task in range(tasks):
                found += [_row(name, at, run, task, probe, float(news[run, task]), rng) for probe in PROBES]
        found += [_row(name, at, 0, 0, probe, 0.0, rng, fresh=True) for probe in PROBES]
    return found


def write_traces(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Writes a trace for each configuration, as `probe analyze` does; those that are there are kept.

    Args:
        folder: Where.
        rows: Rows of all configurations.
    """
    own: dict[str, list[Row]] = {}
    for row in rows:
        own.setdefault(json.loads(row.settings)["run_sha256"], []).append(row)
    traces = [folder / f"{name}.h5" for name in own]
    for trace, found in zip(traces, own.values(), strict=True):
        if not trace.exists():
            with open_for_append(trace) as writer:
                for row in found:
                    writer.append(row)
    return traces


def _outcomes(run: int, task: int, score: np.ndarray, rng: np.random.Generator) -> list[Outcome]:
    made: list[Outcome] = []
    for network, value in (("run", float(score[run, task])), ("control", float(0.95 + 0.005 * rng.standard_normal()))):
        if network == "control" and task == 0:
            continue
        made.append(
            Outcome(
                seed=run, task=task, name=f"task {task}", network=network, status="ok", step=(task + 1) * UPDATES, updates=UPDATES, epochs=1,
                loss=1 - value, accuracy=value, online_loss=1.0, online_accuracy=0.5, first_epoch_loss=2.0, updates_to_threshold=50.0,
                test_loss=1.5 - value, test_accuracy=float(np.clip(value - 0.1 + 0.02 * rng.standard_normal(), 0, 1)),
            )  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    return made


def _row(
    name: str, at: int, run: int, task: int, probe: str, news: float, rng: np.random.Generator, *, fresh: bool = False
) -> Row:
    noise = float(rng.standard_normal())
    value = {
        "fisher_rank": 300 - 8 * task + 20 * (0.7 * news + 0.7 * noise),
        "weight_norms": 20 * (1 + 0.15 * task) + noise,
        "dead_units": 0.01 * task + 0.01 * abs(noise),
    }.get(probe, 10 ** (0.05 * task + 0.2 * noise))
    step = task * UPDATES
    layers = value * (1 + 0.1 * rng.standard_normal((2, len(LAYERS)))) * np.arange(1, len(LAYERS) + 1)
    variables = {
        "value": _number(value, f"the number that {probe} is about"),
        "spread": _number(abs(noise), "its spread", "loss"),
        "by_layer": _array(("layer",), layers[0], "the same in each layer", "last"),
        "largest_by_layer": _array(("layer",), layers[1], "the largest of each layer", "max"),
    }
    if probe == "hessian_spectrum":
        nodes = np.sort(rng.normal(0, 1 + 0.1 * task, (2, 80)))
        variables["nodes"] = _array(("draw", "node"), nodes, "nodes of the quadrature", "none", "loss")
        variables["weights"] = _array(("draw", "node"), np.full((2, 80), 1 / 80), "their weights", "none")
    return Row(
        probe=probe, settings=json.dumps({"run_sha256": f"{at:08d}", "on": "next"}), run="fresh" if fresh else f"{name} seed {run}",
        step=0 if fresh else step, task=-1 if fresh else task, checkpoint="" if fresh else f"runs/{name}/seed_{run}/step_{step:08d}.safetensors",
        sha256=f"{name} {run} {step} {fresh}", network="fresh" if fresh else "checkpoint", replicate=0, status="ok", message="", seconds=0.1,
        peak_bytes=float("nan"), seed=0, conditions={"examples": 1000, "mode": "eval", "dtype": "float32", "loss": "cross-entropy"},
        labels={"layer": LAYERS}, variables=variables,
    )  # fmt: skip


def _number(value: float, meaning: str, units: str = "1") -> Variable:
    return Variable((), np.array(value), {"long_name": meaning, "units": units, "shown": "True", "role": "value"})


def _array(dims: tuple[str, ...], values: np.ndarray, meaning: str, summary: str, units: str = "1") -> Variable:
    attrs = {"long_name": meaning, "units": units, "summary": summary, "shown": "True", "role": "value"}
    return Variable(dims, values, attrs)


def main() -> None:
    """Builds, reports, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, default in (("configurations", 5), ("runs", 5), ("tasks", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, help="folder for traces and report; a temporary one by default")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = wanted.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        traces = write_traces(folder, rows_of_study(wanted.configurations, wanted.runs, wanted.tasks))
        start = time.perf_counter()
        command = ["-m", "plasticity_probe", "report", *map(str, traces), "--out", str(folder / "report"), "--quiet"]
        done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=False)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in (folder / "report").rglob("*") if file.is_file())
        page = (folder / "report" / "index.html").stat().st_size
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        "| checkpoints | probes | exit code | wall, s | CPU, s | largest process, GB | page, MB | folder, MB | date |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    checkpoints = wanted.configurations * wanted.runs * wanted.tasks
    cells = (
        checkpoints,
        len(PROBES),
        done.returncode,
        f"{seconds:.0f}",
        f"{used.ru_utime + used.ru_stime:.0f}",
        f"{used.ru_maxrss / 1e6:.2f}",
    )
    print(f"| {' | '.join(map(str, cells))} | {page / 1e6:.1f} | {size / 1e6:.1f} | {date.today()} |")


if __name__ == "__main__":
    main()
