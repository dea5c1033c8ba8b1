"""Peak memory of measurements: what the plan says, and what the operating system or the accelerator counts.

    python tests/benchmarks/memory.py [--device cuda] [--only resnet20] [--threads 2]

Every measurement runs in a process of its own, through `plasticity_probe.planning` and `plasticity_probe.analysis` as `probe analyze` does.
Measured is the peak while it runs, less what there was once network, examples and plan were there. Prints one table in Markdown.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from networks import Case, heading, mlp, resnet20

from plasticity_probe.analysis import run
from plasticity_probe.planning import plan
from plasticity_probe.probes.fisher import FisherRank
from plasticity_probe.probes.norms import GradientNormsProbe
from plasticity_probe.probes.spectrum import HessianSpectrum
from plasticity_probe.study import study

NETWORKS: Mapping[str, Callable[[int], Case]] = {"resnet20": resnet20, "mlp": mlp, "mlp-256": lambda n: mlp(n, 256)}

PROBES: Mapping[str, Callable[[int], Any]] = {
    "spectrum of the Hessian": lambda n: HessianSpectrum(examples=n),
    "spectrum of the Gauss-Newton matrix": lambda n: HessianSpectrum(matrix="ggn", examples=n),
    "gradient norms": lambda n: GradientNormsProbe(examples=n),
    "rank of the Fisher": lambda n: FisherRank(examples=n),
}


@dataclass(frozen=True)
class Run:
    """One measurement: which network on how many examples, in how many gigabytes, by which probe."""

    network: str
    examples: int
    gigabytes: float
    probe: str


RUNS = (
    Run("resnet20", 64, 4.0, "spectrum of the Hessian"),
    Run("resnet20", 128, 4.0, "spectrum of the Hessian"),
    Run("resnet20", 128, 0.6, "spectrum of the Hessian"),
    Run("resnet20", 128, 4.0, "spectrum of the Gauss-Newton matrix"),
    Run("resnet20", 64, 4.0, "gradient norms"),
    Run("resnet20", 512, 4.0, "rank of the Fisher"),
    Run("mlp", 1024, 8.0, "spectrum of the Hessian"),
    Run("mlp", 1024, 2.5, "spectrum of the Hessian"),
    Run("mlp", 512, 4.0, "rank of the Fisher"),
    Run("mlp", 4096, 4.0, "rank of the Fisher"),
    Run("mlp-256", 4096, 4.0, "spectrum of the Hessian"),
    Run("mlp-256", 4096, 0.4, "spectrum of the Hessian"),
    Run("mlp-256", 512, 4.0, "gradient norms"),
)


def main() -> None:
    """Runs every measurement in its process, prints."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--only", default="", help="networks and probes whose names hold this")
    arguments.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.run:
        print(json.dumps(measured(Run(**chosen.run), chosen.device)))
        return
    print(f"{heading(torch.device(chosen.device))}\n")
    print(
        "| network | examples | memory allowed, GB | measurement | predicted, MB | measured, MB | predicted / measured | status |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for each in RUNS:
        if chosen.only in f"{each.network} {each.probe}":
            options = ["--device", chosen.device, "--threads", str(chosen.threads), "--run", json.dumps(vars(each))]
            done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(done.stdout)
            sizes = f"{found['predicted'] / 1e6:.0f} | {found['measured'] / 1e6:.0f} | {found['predicted'] / found['measured']:.2f}"
            print(
                f"| {each.network} | {each.examples} | {each.gigabytes} | {each.probe} | {sizes} | {found['status']} |",
                flush=True,
            )


def measured(each: Run, device: str) -> dict[str, Any]:
    """Plans one measurement, makes it, and returns both memories in bytes.

    Args:
        each: The measurement.
        device: Where to compute.
    """
    model, inputs, targets = NETWORKS[each.network](each.examples)
    wanted = study(
        model,
        [(inputs, targets)],
        probes={"probe": PROBES[each.probe](each.examples)},
        fresh=0,
        memory=int(each.gigabytes * 1e9),
        device=device,
    )
    predicted = plan(wanted).lines[0].bytes
    before = _start(device)
    status = run(wanted).records[0].status
    return {"predicted": predicted, "measured": _peak(device) - before, "status": str(status)}


def _start(device: str) -> int:
    """Forgets the peak, and returns the bytes in use."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What the allocator holds in reserve would hide what a measurement needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _process("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device != "cpu" else _process("VmHWM")


def _process(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
