import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from plasticity_probe.errors import PlanError
from plasticity_probe.probes.performance import PerformanceProbe
from plasticity_probe.study import study
from plasticity_probe.trace.outcome_rows import OUTCOMES, outcomes_of_rows
from plasticity_probe.trace.reader import read_rows
from plasticity_probe.training.loop import train
from plasticity_probe.training.outcomes import as_json, read_outcomes
from plasticity_probe.training.settings import Setting, Training
from plasticity_probe.training.streams import GrowingChunks, RandomLabels

PAGE = Path(__file__).parents[2] / "docs" / "measuring-runs.md"
QUICK = "performance,weight_norms"


def trained(folder: Path, stream: RandomLabels | GrowingChunks) -> Path:
    network = {"name": "mlp-relu", "hidden": [8]}
    train(Setting(stream, network=network, training=Training((1,), batch=20), control_every=0), (0, 1), folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "labels", RandomLabels(2, examples=40))


def test_a_run_folder_needs_no_data(cli, run) -> None:
    ended = cli("analyze", run, "--on", "next", "--probes", QUICK, "--quiet")
    assert ended.code == 0
    assert "stream random-labels, each checkpoint on the task that comes next" in ended.out
    assert "first of 2 runs" in ended.out
    assert ended.err == ""


def test_json_holds_one_measurement_a_checkpoint_and_probe_and_is_versioned(cli, run) -> None:
    ended = cli("analyze", run, "--on", "noise", "--probes", QUICK, "--json", "--quiet", "--fresh", 0)
    found = json.loads(ended.out)
    assert found["schema"] == "plasticity_probe.analysis/1"
    assert len(found["measurements"]) == 2 * 6
    assert {(m["run"], m["step"], m["task"]) for m in found["measurements"]} == {
        (f"labels seed {seed}", 2 * task, task) for seed in (0, 1) for task in (0, 1, 2)
    }
    assert any("with random labels" in note for note in found["notes"])


def test_a_plan_of_a_run_measures_nothing(cli, run, tmp_path) -> None:
    found = json.loads(cli("analyze", run, "--on", "next", "--plan", "--json", "--trace", tmp_path / "t.h5").out)
    assert (found["networks"], found["fresh"]) == (6, 1)
    assert "the task that comes next" in found["data"]
    assert not (tmp_path / "t.h5").exists()


def test_a_trace_goes_on_with_its_own_task_and_refuses_another(cli, run, tmp_path) -> None:
    trace = tmp_path / "t.h5"
    arguments = "analyze", run, "--probes", QUICK, "--trace", trace, "--no-figures", "--quiet"
    assert cli(*arguments, "--on", "next").code == 0
    before = [(row.key, row.seconds) for row in read_rows(trace)]
    assert sum(key.probe != OUTCOMES for key, _ in before) == 2 * 7
    assert cli(*arguments, "--on", "next").code == 0
    assert [(row.key, row.seconds) for row in read_rows(trace)] == before
    refused = cli(*arguments, "--on", "current")
    assert refused.code == 5
    assert 'on: "next" in the trace, "current" now' in refused.err


def test_what_became_of_the_tasks_goes_into_the_trace(cli, run, tmp_path) -> None:
    trace = tmp_path / "t.h5"
    seed = "seed_" + str(read_outcomes(run)[-1].seed)
    assert cli("analyze", run / seed, "--probes", "performance", "--trace", trace, "--no-figures", "--quiet").code == 0
    expected = [o for o in read_outcomes(run) if f"seed_{o.seed}" == seed]
    (found,) = outcomes_of_rows(read_rows(trace)).values()
    assert [as_json(o) for o in found] == [as_json(o) for o in expected]


def test_no_probe_may_take_the_place_of_the_outcomes(run) -> None:
    with pytest.raises(PlanError, match="no probe can be labelled 'outcomes'"):
        study(run, probes={OUTCOMES: PerformanceProbe()})


def test_checkpoints_left_out_are_counted_in_the_notes(cli, tmp_path) -> None:
    folder = trained(tmp_path / "growing", GrowingChunks(2, examples=40))
    found = json.loads(cli("analyze", folder, "--on", "next", "--probes", "performance", "--json", "--quiet").out)
    assert any("2 checkpoints at the end of the stream left out, where no task comes next" in n for n in found["notes"])


def test_data_that_is_named_is_used(cli, run, tmp_path) -> None:
    random = np.random.default_rng(0)
    data = tmp_path / "own.npz"
    np.savez(data, train_x=random.normal(size=(30, 64)).astype(np.float32), train_y=random.integers(0, 10, 30))
    ended = cli("analyze", run, "--data", data, "--probes", "performance", "--quiet")
    assert ended.code == 0
    assert "30 of 30 examples" in ended.out
    assert "stream" not in ended.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{run}", "--on", "nxt"], 2, "Did you mean 'next'"),
        (["{run}", "--split", "test"], 2, "belong to data that is named"),
        (["{run}", "--data", "digits", "--on", "next"], 2, "leave out --on or --data"),
        (["{run}", "{other}"], 2, "several runs cannot be measured together"),
        (["{run}/..", "--on", "next"], 2, "several runs cannot be measured together"),
        (["{run}", "{checkpoint}"], 2, "files of no run"),
        (["{checkpoint}", "--on", "next"], 2, "needs the tasks of a training run"),
        (["{run}/seed_9"], 4, "there is no file or folder"),
    ],
)
def test_what_cannot_be_is_refused(cli, run, checkpoint, arguments, code, message) -> None:
    other = run.parent / "other"
    if not other.exists():
        shutil.copytree(run, other)
    typed = [part.format(run=run, other=other, checkpoint=checkpoint) for part in arguments]
    ended = cli("analyze", *typed, "--probes", "performance")
    assert ended.code == code
    assert message in ended.err


def test_every_command_and_block_of_the_page_runs(cli, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.S | re.M))
    inline = re.findall(r"`(probe \w+ [^`]+)`", text)
    commands = [line for line in (*blocks.splitlines(), *inline) if line.startswith("probe ")]
    assert len(commands) == 4
    for command in commands:
        _, *arguments = shlex.split(command)
        if arguments[0] == "train":
            arguments += ["--set", "training.epochs=2"]
        elif "--probes" not in arguments:
            arguments += ["--probes", "performance"]
        ended = cli(*arguments, "--quiet", *(["--no-figures"] if arguments[0] == "analyze" else []))
        assert ended.code == 0, (command, ended.err)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(block, PAGE.name, "exec"), {"__name__": "docs"})
    table = capsys.readouterr().out
    assert re.search(r"^current +\d", table, re.M)
    assert re.search(r"^next +\d", table, re.M)
