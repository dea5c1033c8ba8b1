"""Does a collapse of curvature come before a network stops learning, and do its rivals do better? Trains, measures and judges a study.

Run it with `python examples/does_curvature_predict.py`: two activations, five seeds and five tasks on the digits, with three quick probes; it
takes about a minute, and its report says that these are too few runs to settle much. The studies of docs/findings.md take about an hour each on
one core; STUDY is one of digits, mnist, regression and warm-start:

    python examples/does_curvature_predict.py --study STUDY --seeds 20 --tasks 15 --epochs 0 --probes all --on next current noise
        --activations relu leaky_relu tanh identity --remedies none l2-init shrink-perturb layer-norm

Every setting is a run folder and its traces below --out; what is finished is neither trained nor measured again. Each checkpoint is measured
on the task that comes next, before any update on it, and if asked for on the task just learned and on noise. The report, with every figure and
the verdicts, is written to --out/STUDY-report.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from plasticity_probe.analysis import analyze
from plasticity_probe.comparison import number
from plasticity_probe.prediction.assessment import Assessment
from plasticity_probe.prediction.association import Association
from plasticity_probe.prediction.verdict import Evidence
from plasticity_probe.probes.norms import GradientNormsProbe
from plasticity_probe.probes.spectrum import HessianSpectrum
from plasticity_probe.report.document import write_report
from plasticity_probe.study import resolve_probes
from plasticity_probe.training.loop import train
from plasticity_probe.training.protocols import PROTOCOLS
from plasticity_probe.training.remedies import remedy_named

STUDIES = {
    "digits": ("random-label-digits", {}),
    "mnist": ("lewandowski-random-label-mnist", {"training.epochs": 30}),
    "regression": ("slowly-changing-regression", {"stream.examples": 5000}),
    "warm-start": (
        "dash-growing",
        {
            "data.name": "mnist",
            "data.examples": 2000,
            "network": {"name": "mlp-relu", "hidden": [100, 100]},
            "training.learning_rate": 0.01,
            "training.epochs": 200,
        },
    ),
}
"""Protocols, and what makes them small enough for two cores."""
QUICK = ("fisher_rank", "feature_rank", "weight_norms")
EXPLANATIONS = {
    "Hessian: effective rank": "hessian_spectrum.effective_rank",
    "Hessian: threshold rank": "hessian_spectrum.threshold_rank",
    "Hessian: largest eigenvalue": "hessian_spectrum.top",
    "empirical Fisher: threshold rank": "fisher_rank.threshold_rank",
    "features: threshold rank": "feature_rank.threshold_rank",
    "dead units, share": "dead_units.total_dead_fraction",
    "dormant units, share": "dead_units.total_dormant_fraction",
    "saturated units, share": "dead_units.total_saturated_fraction",
    "weight norm": "weight_norms.total_l2",
    "distance from the initial weights": "weight_norms.total_distance",
    "gradient norm": "gradient_norms.total_l2",
    "optimization readiness": "readiness.optimization_readiness",
}
"""What loss of plasticity was explained by, and the quantity that measures it (Lewandowski et al. 2023 and those they answer)."""
ELSEWHERE = ("fisher_rank", "feature_rank", "dead_units", "readiness", "performance")
"""Probes of other data than the next task: those that depend on the data and need no search for eigenvalues."""
SEARCH = {"k": 5, "tol": 1e-2, "max_products": 1000}
"""How eigenvalues are searched: few and to a percent, which orders checkpoints as well as more would; with products enough for networks that
stopped learning, whose eigenvalues lie close together."""


def study(given: argparse.Namespace, activation: str, remedy: str) -> list[Path]:
    torch.set_num_threads(1)
    name, smaller = STUDIES[given.study]
    protocol = PROTOCOLS[name]
    setting = protocol.setting.changed(smaller).changed(
        {
            "network.name": f"mlp-{activation}",
            "stream.tasks": given.tasks,
            "remedies": () if remedy == "none" else (remedy_named(remedy),),
            "control_every": given.control_every,
            "checkpoint_every": 1,
            "inside": 0,
            **({"training.epochs": given.epochs} if given.epochs else {}),
        }
    )
    name = f"{given.study}-{activation}-{remedy}"
    train(setting, range(given.seeds), given.out / name, resume=True, protocol=protocol.name)
    traces = [given.out / f"{name}-on-{on}.h5" for on in given.on]
    for on, trace in zip(given.on, traces, strict=True):
        analyze(given.out / name, on=on, fresh=0, probes=chosen(given, on), trace=trace)
    return traces


def chosen(given: argparse.Namespace, on: str) -> dict:
    if given.probes != ["all"]:
        return dict(resolve_probes(given.probes))
    if on != "next":
        # How well learned data are known is a question about the task just learned alone.
        return dict(resolve_probes([*ELSEWHERE, *(["memorization"] if on == "current" else [])]))
    probes = dict(resolve_probes([*QUICK, "dead_units", "readiness", "performance"]))
    search = {**SEARCH, "examples": given.spectrum_examples}
    return {**probes, "hessian_spectrum": HessianSpectrum(**search), "gradient_norms": GradientNormsProbe(**search)}


def explanations(assessment: Assessment, names: list[str]) -> list[str]:
    """What the explanations of Lewandowski et al. 2023 and of those they answer do in each configuration, as a table.

    A cell holds the mean before the first and before the last task; the rank correlation with the outcome over the tasks of a run; and that
    at equal task and history between runs. A star: the 95 % interval over runs excludes 0.
    """
    panel = assessment.aligned.panel
    outcome, judged = next(iter(assessment.judged.items()))
    by_name = {j.evidence.predictor: j.evidence for j in judged}
    at = [panel.configurations.index(name) for name in names]
    lines = [f"| before tasks, beside {outcome} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for words, quantity in EXPLANATIONS.items():
        name = next((each for each in (quantity, f"{quantity} on next") if each in by_name), None)
        if name is not None:
            cells = (_cell(by_name[name], panel.predictors[name][panel.groups[each]], each) for each in at)
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def _cell(evidence: Evidence, values: np.ndarray, configuration: int) -> str:
    known = np.flatnonzero(~np.isnan(values).all(axis=0))
    if not known.size:
        return "–"
    first, last = (float(np.nanmean(values[:, task])) for task in (known[0], known[-1]))
    return f"{number(first)} → {number(last)}; {_starred(evidence.together, configuration)}; {_starred(evidence.association, configuration)}"


def _starred(found: Association, configuration: int) -> str:
    for at, value, error, runs in zip(found.configurations, found.values, found.errors, found.runs, strict=True):
        if at == configuration:
            return f"{value:+.2f}{'*' if abs(value) > student.isf(0.025, runs - 1) * error else ''}"
    return "–"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", choices=STUDIES, default="digits")
    parser.add_argument("--activations", nargs="+", default=["relu", "tanh"])
    parser.add_argument("--remedies", nargs="+", default=["none"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10, help="0: those of the study")
    parser.add_argument("--probes", nargs="+", default=list(QUICK))
    parser.add_argument(
        "--control-every", type=int, default=1, help="tasks between two that a fresh network learns too"
    )
    parser.add_argument("--on", nargs="+", choices=("next", "current", "noise"), default=["next"])
    parser.add_argument("--spectrum-examples", type=int, default=128, help="examples that the Hessian is measured on")
    parser.add_argument("--layers", action="store_true", help="judge each layer's numbers too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/does-curvature-predict"))
    given = parser.parse_args()

    settings = [(activation, remedy) for activation in given.activations for remedy in given.remedies]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as workers:
        traces = list(workers.map(study, [given] * len(settings), *zip(*settings, strict=True)))
    report = write_report(
        [trace for of_setting in traces for trace in of_setting],
        given.out / f"{given.study}-report",
        layers=given.layers,
        processes=given.jobs,
    )
    for judged in report.assessment.judged.values():
        for j in judged:
            print(f"{j.verdict}: {j.text}")
    if plain := [name for name in report.assessment.aligned.panel.configurations if name.endswith("-none")]:
        print("\n".join(explanations(report.assessment, plain)))
    print(f"report: {report.page}")


if __name__ == "__main__":
    main()
