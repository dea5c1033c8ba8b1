import ast
from pathlib import Path

import pytest

import plasticity_probe

PACKAGE = Path(plasticity_probe.__file__).parent


def unsafe_calls(source):
    """Calls that could run code from a file: (line, what it is)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle", "joblib"):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name in ("load", "loads", "Unpickler")]
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and any(alias.name == "load" for alias in node.names)
        ):
            found.append((node.lineno, "load imported from torch"))
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        allowed = keywords.get("allow_pickle")
        if name == "torch.load" and "weights_only" not in keywords:
            found.append((node.lineno, "torch.load without weights_only"))
        if name in (
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "dill.load",
            "joblib.load",
            "torch.jit.load",
            "yaml.load",
        ):
            found.append((node.lineno, name))
        if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
            found.append((node.lineno, "allow_pickle"))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_of_the_package_can_run_code_from_a_file(path):
    assert unsafe_calls(path.read_text()) == []


def test_torch_trusts_a_file_in_one_place_only():
    trusting = [
        path.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "weights_only" and ast.unparse(node.value) != "True"
    ]
    assert trusting == ["torch_files.py"]


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, map_location='cpu')",
        "pickle.load(f)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=trusted)",
        "from pickle import loads",
        "from torch import load",
        "torch.jit.load(f)",
    ],
)
def test_the_check_finds_each_kind(source):
    assert len(unsafe_calls(source)) == 1


def test_the_check_lets_safe_calls_pass():
    assert (
        unsafe_calls(
            "torch.load(f, weights_only=True); np.load(f, allow_pickle=False); from pickle import UnpicklingError"
        )
        == []
    )
