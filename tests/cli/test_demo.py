import json
import re
from pathlib import Path

import pytest

from plasticity_probe import demonstration
from plasticity_probe.cli.demo import marks, percent
from plasticity_probe.report import document
from plasticity_probe.report.work import Drawn
from plasticity_probe.trace.reader import read_rows
from plasticity_probe.training.settings import Training
from plasticity_probe.training.summary import mean_of


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates an epoch, two epochs a task, one probe; figures are not drawn."""
    monkeypatch.setattr(demonstration, "EXAMPLES", 120)
    monkeypatch.setattr(demonstration, "TRAINING", Training(epochs=(2,), batch=60))
    monkeypatch.setattr(demonstration, "PROBES", ("weight_norms",))
    one = Drawn(b"\x89PNG", b"%PDF", b"\x89PNG", 10, 10)
    monkeypatch.setattr(document, "drawn", lambda figures, spread: (one for _ in figures))


@pytest.mark.usefixtures("small")
def test_a_demo_of_few_runs_trains_measures_and_says_that_they_are_too_few(cli, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = ("demo", "--out", out, "--seeds", 2, "--tasks", 2, "--first-seed", 3, "--jobs", 1, "--quiet")
    ended = cli(*command)
    assert ended.code == 3
    assert ended.err == ""
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.strip()}
    for name in demonstration.CONFIGURATIONS:
        assert len(re.findall(r"\d+\.\d ± \d+\.\d", lines[name])) == 3
    assert "Too few runs to judge" in ended.out
    assert "at least 5 runs of a configuration are needed, there are at most 2" in ended.out
    assert not re.search(r"weight_norms\.\w+ +(predicts|accompanies|does not|refuted|inconclusive)", ended.out)
    assert str(out / "report" / "index.html") in ended.out
    verdict = json.loads((out / "report" / "verdict.json").read_text())
    assert {v["verdict"] for o in verdict["outcomes"].values() for v in o["verdicts"]} == {"not assessed"}
    assert {(row.run, row.task) for row in read_rows(out / "tanh.h5") if row.probe == "weight_norms"} == {
        (f"tanh seed {seed}", task) for seed in (3, 4) for task in (0, 1)
    }
    assert cli(*command) == ended


@pytest.mark.usefixtures("small")
def test_a_demo_of_enough_runs_ends_with_verdicts(cli, tmp_path: Path) -> None:
    ended = cli("demo", "--out", tmp_path / "demo", "--seeds", 5, "--tasks", 4, "--jobs", 1, "--quiet")
    assert ended.code == 0
    assert re.search(r"weight_norms\.\w+ +(predicts|accompanies|does not|refuted|inconclusive)", ended.out)
    assert re.search(r"hessian_spectrum\.top +not assessed", ended.out)
    assert "Trainability (accuracy on the task's own examples at its end)" in ended.out
    assert "Too few" not in ended.out


@pytest.mark.usefixtures("small")
def test_one_run_of_one_task_is_shown_without_what_it_cannot_tell(cli, tmp_path: Path) -> None:
    ended = cli("demo", "--out", tmp_path / "demo", "--seeds", 1, "--tasks", 1, "--jobs", 1, "--quiet")
    assert ended.code == 3
    assert "One task is no sequence" in ended.out
    assert "nan" not in ended.out
    assert re.search(r"^tanh +\S +\d+\.\d +\d+\.\d +–", ended.out, re.MULTILINE)


def test_a_folder_with_other_files_is_refused(cli, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ended = cli("demo", "--out", tmp_path, "--tasks", 2)
    assert ended.code == 2
    assert "no folder of a demonstration" in ended.err
    assert ended.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_report_folder_with_other_files_is_refused_before_anything_is_trained(cli, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    ended = cli("demo", "--out", tmp_path, "--tasks", 2)
    assert ended.code == 5
    assert "found mine.txt" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_accuracies_are_drawn_as_marks_and_told_in_percent() -> None:
    assert marks([0.0, 0.124, 0.126, 0.5, 1.0, float("nan")]) == "▁▁▂▅█ "
    assert percent(mean_of([0.5])) == "50.0"
    assert percent(mean_of([])) == "–"
    assert re.fullmatch(r"50\.0 ± 127\.1", percent(mean_of([0.4, 0.6])))  # t of one degree of freedom is 12.706


@pytest.mark.slow
def test_the_full_demo_loses_trainability_keeps_it_and_judges(cli, tmp_path: Path) -> None:
    ended = cli("demo", "--out", tmp_path / "demo", "--quiet", "--jobs", 1)
    assert ended.code == 0
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.strip()}
    first, last, fresh = ({} for _ in range(3))
    for name in demonstration.CONFIGURATIONS:
        means = [float(value) for value in re.findall(r"(\d+\.\d) ±", lines[name])]
        first[name], last[name], fresh[name] = means
    assert first["relu"] > 75
    assert last["relu"] < 20
    assert fresh["relu"] > 75
    assert last["leaky-relu"] < 40
    assert last["tanh"] < 50 < fresh["tanh"]
    assert last["relu-l2-init"] > 60
    verdict = json.loads((tmp_path / "demo" / "report" / "verdict.json").read_text())
    assert (verdict["runs"], verdict["tasks"]) == (40, 20)
    found = {v["predictor"]: v["verdict"] for v in verdict["outcomes"]["trainability"]["verdicts"]}
    unjudged = {name.split(".")[0] for name, verdict in found.items() if verdict == "not assessed"}
    assert unjudged == {"hessian_spectrum"}
    assert {name.split(".")[0] for name in found} == {*demonstration.PROBES, "hessian_spectrum"}
