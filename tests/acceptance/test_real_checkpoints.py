"""The main job on real checkpoints and real images: every probe ends ok, and the accuracy is the published one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plasticity_probe.trace.reader import read_rows

PROBES = {
    "performance", "hessian_spectrum", "fisher_rank", "feature_rank", "dead_units", "weight_norms", "gradient_norms", "memorization",
    "readiness",
}  # fmt: skip


def analyzed(*arguments: object) -> dict:
    command = [
        sys.executable,
        "-m",
        "plasticity_probe",
        "analyze",
        *map(str, arguments),
        "--json",
        "--quiet",
        "--no-figures",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def value(found: dict, probe: str, name: str) -> float:
    return next(q["values"][0] for q in found["quantities"] if (q["probe"], q["name"]) == (probe, name))


@pytest.mark.slow
def test_resnet20_is_found_and_measured_by_every_probe(shared: Path, tmp_path: Path) -> None:
    found = analyzed(
        shared / "checkpoints/resnet20_cifar10/resnet20-12fca82f.th",
        "--data", shared / "cifar10/cifar10_lossless.npz", "--split", "test",
        "--mean", ".485", ".456", ".406", "--std", ".229", ".224", ".225", "--trace", tmp_path / "out.h5",
    )  # fmt: skip
    assert any("resnet20-cifar (found by its names and shapes)" in note for note in found["notes"])
    assert value(found, "performance", "accuracy") == pytest.approx(932 / 1017)
    assert {(row["probe"], row["network"], row["status"]) for row in found["measurements"]} == {
        (probe, network, "ok") for probe in PROBES for network in ("checkpoint", "fresh")
    }
    assert len(read_rows(tmp_path / "out.h5")) == 18


@pytest.mark.slow
def test_the_mnist_net_through_a_users_factory(shared: Path, tmp_path: Path) -> None:
    if not os.environ.get("PLASTICITY_PROBE_DATA"):
        pytest.skip("PLASTICITY_PROBE_DATA names no data root")
    found = analyzed(
        shared / "checkpoints/convex_adversarial_mnist/mnist.pth", "--data", "mnist", "--split", "test",
        "--model", f"{Path(__file__).with_name('mnist_net.py')}:build", "--trace", tmp_path / "out.h5",
    )  # fmt: skip
    assert value(found, "performance", "accuracy") == pytest.approx(0.9820)
    assert {row["status"] for row in found["measurements"]} == {"ok"}
    assert {row["probe"] for row in found["measurements"]} == PROBES
