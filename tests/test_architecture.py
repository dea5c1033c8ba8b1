"""Imports go one way, down; heavy or dangerous packages stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import plasticity_probe

ROOT = Path(plasticity_probe.__file__).parent
FLOORS = [
    {"errors", "references", "whole_files"},
    {"linalg", "locked_file", "measurement", "rank", "spectrum", "checkpoints", "data"},
    {"network", "training"},
    {"probe"},
    {"probes", "record", "registry", "functional", "testing"},
    {"trace"},
    {
        "comparison",
        "material",
        "run_tasks",
        "study",
        "planning",
        "analysis",
        "demonstration",
        "prediction",
        "example_memorization",
    },
    {"report"},
    {"cli"},
]
HEIGHT = {name: floor for floor, names in enumerate(FLOORS) for name in names}
WITHIN = {
    "rank": {"linalg", "measurement"},
    "spectrum": {"linalg", "measurement", "rank"},
    "planning": {"study"},
    "study": {"material", "run_tasks"},
    "run_tasks": {"material"},
    "analysis": {"comparison", "planning", "run_tasks", "study"},
    "demonstration": {"analysis", "prediction", "study"},
    "prediction": {"comparison"},
    "example_memorization": {"prediction", "run_tasks"},
    "references": {"errors"},
}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem not in ("__init__", "__main__"))


def home(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Names imported by a file, and whether the import runs when the module does."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) not in inside
            yield from ((f"{node.module}.{alias.name}", id(node) not in inside) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_has_a_floor_and_imports_go_down(path: Path) -> None:
    own = home(path)
    assert own in HEIGHT, f"{own} is on no floor"
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] != "plasticity_probe" or len(parts) < 2 or parts[1] not in HEIGHT or parts[1] == own:
            continue
        other = parts[1]
        allowed = (
            HEIGHT[other] < HEIGHT[own]
            or other in WITHIN.get(own, set())
            or (HEIGHT[other] == HEIGHT[own] and own in ("record", "functional", "training"))
        )
        assert allowed, f"{path.relative_to(ROOT)} imports {name}, which is not below it"


@pytest.mark.parametrize("path", sorted((ROOT / "probes").glob("*.py")), ids=lambda p: p.stem)
def test_probe_files_import_neither_each_other_nor_anything_above(path: Path) -> None:
    for name, _ in imports(path):
        assert not name.startswith(("plasticity_probe.probes.", "plasticity_probe.trace", "plasticity_probe.report")), (
            name
        )


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("matplotlib", {"report/canvas.py", "report/draw.py", "report/draw_verdicts.py"}),
        ("seaborn", {"report/canvas.py", "report/draw.py", "report/draw_verdicts.py"}),
        ("h5py", {"trace"}),
        ("torchvision", set()),
        ("pickle", {"data/cifar_pickle.py", "checkpoints/torch_files.py"}),
    ],
)
def test_packages_stay_where_they_belong(package: str, allowed: set[str]) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for name, _ in imports(path)
        if name.split(".")[0] == package
    }
    strays = {user for user in users if user not in allowed and user.split("/")[0] not in allowed}
    assert not strays, f"{package} is imported by {strays}"


def test_hooks_live_in_capture_alone() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and node.attr.endswith("hook")
    }
    assert users <= {"network/capture.py"}


@pytest.mark.parametrize(
    "module",
    [
        "plasticity_probe",
        "plasticity_probe.cli",
        "plasticity_probe.report.figures",
        "plasticity_probe.report.draw",
        "plasticity_probe.trace.reader",
        "plasticity_probe.trace.outcome_rows",
        "plasticity_probe.prediction.verdict",
        "plasticity_probe.prediction.alignment",
        "plasticity_probe.prediction.detection",
        "plasticity_probe.prediction.training_influence",
        "plasticity_probe.cli.report",
        "plasticity_probe.report.document",
    ],
)
def test_torch_is_not_imported_by(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_resolves_and_every_contract_name_is_public() -> None:
    contract = {
        "curvature_rank", "fisher_rank", "hessian_spectrum", "feature_rank", "dead_units", "weight_norms", "gradient_norms",
        "memorization", "readiness", "trainability", "analyze", "open_trace",
    }  # fmt: skip
    assert contract <= set(plasticity_probe.__all__)
    for name in plasticity_probe.__all__:
        assert getattr(plasticity_probe, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        _ = plasticity_probe.no_such_name


def test_a_module_that_imports_upward_would_be_found(tmp_path: Path) -> None:
    stray = tmp_path / "stray.py"
    stray.write_text("from plasticity_probe.cli import main\n")
    assert ("plasticity_probe.cli", True) in set(imports(stray))
    assert HEIGHT["cli"] > HEIGHT["linalg"]
