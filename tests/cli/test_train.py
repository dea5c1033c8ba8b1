import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from plasticity_probe.checkpoints.series import find_checkpoints
from plasticity_probe.cli import app
from plasticity_probe.training.protocols import PROTOCOLS
from plasticity_probe.training.remedies import REMEDIES

QUICK = ["--set", "stream.tasks=3", "--set", "training.epochs=2", "--set", "stream.examples=60", "--quiet"]


def probe(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def digits(out: Path, *arguments: object) -> Result:
    return probe("random-label-digits", "--seeds", 2, "--out", out, *QUICK, *arguments)


def said(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_protocol_is_trained_and_its_tasks_are_shown_beside_fresh_networks(tmp_path: Path) -> None:
    result = digits(tmp_path / "x")
    assert result.exit_code == 0, result.output
    assert "fresh accuracy" in result.stdout
    assert "95 % interval" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert len(find_checkpoints([tmp_path / "x"])) == 2 * 4


def test_json_holds_every_outcome_and_the_table(tmp_path: Path) -> None:
    entry = said(digits(tmp_path / "x", "--json"))
    assert entry["schema"] == "plasticity_probe.train/1"
    assert len(entry["outcomes"]) == 2 * (3 + 2)
    assert [task["task"] for task in entry["tasks"]] == [0, 1, 2]
    runs = [o["accuracy"] for o in entry["outcomes"] if o["task"] == 2 and o["network"] == "run"]
    assert entry["tasks"][2]["score"]["value"] == pytest.approx(sum(runs) / 2)
    assert entry["findings"]


def test_variant_remedies_scale_and_changes_decide_the_setting(tmp_path: Path) -> None:
    result = probe(
        "lewandowski-random-label-mnist", "--variant", "tanh", "--remedy", "l2-init:coefficient=1e-3", "--remedy", "redo", "--scale",
        "small", "--set", "training.batch=30", "--set", "data.name=digits", "--plan", "--json", "--out", tmp_path / "x",
    )  # fmt: skip
    setting = said(result)["setting"]
    assert setting["network"]["name"] == "mlp-tanh"
    assert [remedy["name"] for remedy in setting["remedies"]] == ["l2-init", "redo"]
    assert setting["remedies"][0]["coefficient"] == 1e-3
    assert (setting["stream"]["tasks"], setting["training"]["batch"]) == (10, 30)
    entry = said(result)
    assert len(entry["seeds"]) == entry["together"] == PROTOCOLS["lewandowski-random-label-mnist"].small["seeds"]
    # 10 tasks and controls on tasks 5 and 9, of 50 epochs of 1200 images in batches of 30.
    assert entry["updates"] == 12 * 50 * 40
    assert entry["parameters"] == 64 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10
    assert 0 < entry["checkpoints"] * 4 * entry["parameters"] < entry["bytes"]
    assert not (tmp_path / "x").exists()


def test_the_plan_in_words_names_what_would_be_trained(tmp_path: Path) -> None:
    result = probe("berariu-reset", "--set", "data.name=digits", "--plan", "--out", tmp_path / "x")
    assert result.exit_code == 0, result.output
    assert "reset-modules" in result.stdout
    assert "MB on disk. Nothing was trained." in result.stdout


def test_the_run_folder_is_named_after_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = probe("random-label-digits", "--seeds", 1, "--variant", "tanh", "--remedy", "l2:coefficient=0.1", *QUICK)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "random-label-digits-tanh-l2" / "outcomes.jsonl").is_file()


def test_a_run_goes_on_with_resume_and_is_refused_without(tmp_path: Path) -> None:
    first = said(digits(tmp_path / "x", "--json"))
    again = digits(tmp_path / "x")
    assert again.exit_code == 2
    assert "--resume" in again.output
    assert said(digits(tmp_path / "x", "--resume", "--json")) == first
    other = digits(tmp_path / "x", "--resume", "--set", "training.batch=10")
    assert other.exit_code == 2
    assert "batch" in other.output


def test_a_diverging_run_ends_with_3_and_says_which_seeds(tmp_path: Path) -> None:
    result = digits(tmp_path / "x", "--set", "training.learning_rate=1e30", "--set", "training.optimizer=sgd")
    assert result.exit_code == 3
    assert "Diverged" in result.stdout
    assert "2 of 2 seeds" in " ".join(result.stdout.split())
    assert [path.name for path in find_checkpoints([tmp_path / "x"])] == ["step_00000000.safetensors"] * 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-protocol"], 2, "Known:"),
        (["random-label-digit"], 2, "Did you mean 'random-label-digits'"),
        (["random-label-digits", "--variant", "relus"], 2, "relu"),
        (["random-label-digits", "--remedy", "l3"], 2, "l2"),
        (["random-label-digits", "--remedy", "l2:lambda=1"], 2, "coefficient"),
        (["random-label-digits", "--set", "training.epoch=1"], 2, "epochs"),
        (["random-label-digits", "--set", "training.epochs"], 2, "NAME=VALUE"),
        (["random-label-digits", "--set", "training.epochs=0"], 2, "at least one"),
        (["random-label-digits", "--scale", "medium"], 2, "full or small"),
        (["random-label-digits", "--set", "data.name=nowhere.npz"], 4, "no file"),
        (["dash-synthetic", "--remedy", "l2"], 2, "--remedy"),
        (["dash-synthetic", "--set", "tasks=2"], 2, "--set"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    result = probe(*arguments, "--out", tmp_path / "x")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = digits(tmp_path / "file" / "x")
    assert result.exit_code == 5
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupt_ends_with_130_and_resume_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = said(digits(tmp_path / "a" / "x", "--json"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("plasticity_probe.training.loop._Group._finish_task", interrupted)
        result = digits(tmp_path / "b" / "x")
    assert result.exit_code == 130, result.output
    assert "--resume" in result.output
    found = said(digits(tmp_path / "b" / "x", "--resume", "--json"))
    assert found["outcomes"] == expected["outcomes"]


def test_the_feature_world_is_simulated_beside_the_published_table(tmp_path: Path) -> None:
    result = probe("dash-synthetic", "--seeds", 2, "--out", tmp_path / "x")
    assert result.exit_code == 0, result.output
    assert "published" in result.stdout
    assert "0.752 ± 0.015" in result.stdout
    entry = json.loads((tmp_path / "x" / "feature_world.json").read_text())
    assert len(entry["courses"]) == 2 * 3 * 50
    assert said(probe("dash-synthetic", "--seeds", 2, "--json"))["table"] == entry["table"]


def test_protocols_and_remedies_are_listed_with_their_sources() -> None:
    shown = CliRunner().invoke(app, ["list", "protocols"])
    text = " ".join(shown.stdout.split())
    for name, protocol in PROTOCOLS.items():
        assert name in text
        assert protocol.source.split(",")[0] in text
    assert text.count("--scale small:") == len(PROTOCOLS)
    shown = CliRunner().invoke(app, ["list", "remedies"])
    for name, remedy in REMEDIES.items():
        assert name in shown.stdout
        assert remedy.source.split(",")[0].split("(")[0].strip() in " ".join(shown.stdout.split())


def test_what_the_run_takes_on_disk_is_said_before_it_starts(tmp_path: Path) -> None:
    loud = [word for word in QUICK if word != "--quiet"]
    result = probe("random-label-digits", "--seeds", 2, "--out", tmp_path / "x", *loud)
    assert result.exit_code == 0, result.output
    assert "at most 8 checkpoints and" in result.stderr
    assert "at most" not in result.stdout
