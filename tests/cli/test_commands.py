import csv
import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

THIRD_PARTY = Path(__file__).parents[1] / "third_party"


@pytest.mark.parametrize("command", [[], ["analyze"], ["report"], ["show"], ["list"], ["demo"]])
def test_every_command_has_help(cli, command) -> None:
    ended = cli(*command, "--help")
    assert ended.code == 0
    assert "Usage: probe" in ended.out or "Usage:" in ended.out


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom plasticity_probe.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_the_module_runs_like_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "plasticity_probe", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"


def test_list_names_probes_models_and_data(cli) -> None:
    ended = cli("list")
    for name in ("hessian_spectrum", "memorization", "resnet20-cifar", "mlp-tanh", "digits", "cifar100"):
        assert name in ended.out
    assert cli("list", "probe").code == 2


def test_list_marks_the_probes_that_run_only_when_named(cli) -> None:
    lines = cli("list", "probes").out.splitlines()
    marked = [line.split()[0] for line in lines if "(only with --probes" in line]
    assert marked == ["trainability"]


def test_show_prints_a_table_csv_and_json(cli, checkpoint, data, tmp_path) -> None:
    trace = tmp_path / "t.h5"
    cli("analyze", checkpoint, "--data", data, "--probes", "performance", "--trace", trace, "--no-figures")
    assert "accuracy" in cli("show", trace).out
    lines = list(csv.DictReader(io.StringIO(cli("show", trace, "--csv").out)))
    assert {line["network"] for line in lines} == {"checkpoint", "fresh"}
    assert {line["quantity"] for line in lines} == {"accuracy", "loss"}
    assert all(float(line["value"]) >= 0 for line in lines)
    found = json.loads(cli("show", trace, "--json").out)
    assert found["rows"][0]["quantities"]["loss"]["units"] == "loss"
    assert cli("show", tmp_path / "none.h5").code == 5


@pytest.fixture
def third_party(tmp_path) -> dict[str, str]:
    """An environment in which the package of tests/third_party is installed."""
    project = tomllib.loads((THIRD_PARTY / "pyproject.toml").read_text())["project"]
    site = tmp_path / "site"
    info = site / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"]
    (info / "entry_points.txt").write_text(
        "\n".join(
            line
            for group, entries in groups.items()
            for line in [f"[{group}]", *(f"{k} = {v}" for k, v in entries.items())]
        )
    )
    (site / "weight_signs.py").write_text((THIRD_PARTY / "weight_signs.py").read_text())
    return {**os.environ, "PYTHONPATH": str(site)}


def test_a_probe_of_another_package_appears_everywhere(third_party, checkpoint, data, tmp_path) -> None:
    def probe(*arguments: object) -> str:
        command = [sys.executable, "-m", "plasticity_probe", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=third_party).stdout

    assert "shares of positive weights" in probe("list", "probes")
    table = probe("analyze", checkpoint, "--data", data, "--probes", "weight_signs", "--trace", tmp_path / "t.h5")
    assert "share of positive weights by tensor (mean over tensors)" in table
    assert "weight_signs" in probe("show", tmp_path / "t.h5")
    figures = sorted(path.name for path in (tmp_path / "t-figures").glob("*.png"))
    assert figures
    import h5py

    with h5py.File(tmp_path / "t.h5") as file:
        assert file["weight_signs/positive"].shape[1] == 4


def test_a_broken_plug_in_is_left_out_with_a_warning(third_party, tmp_path) -> None:
    (tmp_path / "site" / "weight_signs.py").write_text("raise RuntimeError('not today')")
    command = [sys.executable, "-m", "plasticity_probe", "list", "probes"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=third_party)
    assert "hessian_spectrum" in done.stdout
    assert "not today" in done.stderr
