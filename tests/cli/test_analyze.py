import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from plasticity_probe.checkpoints.formats import write_checkpoint
from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.cli import with_joined_numbers
from plasticity_probe.trace.reader import read_rows

QUICK = "performance,weight_norms"


def test_the_table_goes_to_stdout_and_progress_to_stderr(cli, checkpoint, data) -> None:
    ended = cli("analyze", checkpoint, "--data", data, "--probes", QUICK)
    assert ended.code == 0
    assert "accuracy" in ended.out
    assert "checkpoint" in ended.out
    assert "ratio" in ended.out
    assert "One checkpoint shows a state" in ended.out
    assert "accuracy" not in ended.err


def test_json_is_one_versioned_object(cli, checkpoint, data) -> None:
    ended = cli("analyze", checkpoint, "--data", data, "--probes", QUICK, "--json", "--quiet")
    found = json.loads(ended.out)
    assert found["schema"] == "plasticity_probe.analysis/1"
    assert {q["probe"] for q in found["quantities"]} == {"performance", "weight_norms"}
    assert found["measurements"][0]["step"] == 3
    assert ended.err == ""


def test_a_plan_stores_and_measures_nothing(cli, checkpoint, data, tmp_path) -> None:
    ended = cli("analyze", checkpoint, "--data", data, "--plan", "--trace", tmp_path / "t.h5")
    assert ended.code == 0
    assert "Nothing was measured" in ended.out
    assert not (tmp_path / "t.h5").exists()
    assert (
        json.loads(cli("analyze", checkpoint, "--data", data, "--plan", "--json").out)["schema"]
        == "plasticity_probe.plan/1"
    )


def test_patterns_choose_the_parameters_that_are_measured(cli, checkpoint, data) -> None:
    arguments = "analyze", checkpoint, "--data", data, "--plan", "--json"
    whole, biases = (json.loads(cli(*arguments, *more).out) for more in ((), ("--parameters", "*.bias")))
    assert (whole["parameters"], biases["parameters"]) == (43, 8)
    refused = cli(*arguments, "--parameters", "*.bias,convolution")
    assert refused.code == 2
    assert "no parameter or module named 'convolution'" in refused.err


def test_figures_land_beside_the_trace_and_a_second_run_measures_nothing(cli, checkpoint, data, tmp_path) -> None:
    trace = tmp_path / "t.h5"
    first = cli("analyze", checkpoint, "--data", data, "--probes", QUICK, "--trace", trace)
    assert first.code == 0
    assert list((tmp_path / "t-figures").glob("*.png"))
    assert list((tmp_path / "t-figures").glob("*.pdf"))
    before = [row.seconds for row in read_rows(trace)]
    assert cli("analyze", checkpoint, "--data", data, "--probes", QUICK, "--trace", trace, "--no-figures").code == 0
    assert [row.seconds for row in read_rows(trace)] == before


@pytest.mark.parametrize(
    ("typed", "joined"),
    [
        (["--mean", ".5", ".4", "--std", "1"], ["--mean", ".5 .4", "--std", "1"]),
        (["--mean", "-0.5", "a.pt"], ["--mean", "-0.5", "a.pt"]),
        (["--seed", "3", "4"], ["--seed", "3", "4"]),
    ],
)
def test_mean_and_std_take_one_number_or_one_per_channel(typed, joined) -> None:
    assert with_joined_numbers(typed) == joined


def test_a_model_of_a_users_file(cli, data, tmp_path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))\n"
    )
    state = torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    assert (
        cli("analyze", tmp_path / "w.pt", "--data", data, "--model", f"{tmp_path}/net.py:build", "--probes", QUICK).code
        == 0
    )
    several = cli("analyze", tmp_path / "w.pt", "--data", data, "--probes", QUICK)
    assert several.code == 4
    assert "mlp-relu" in several.err
    assert "--model" in several.err
    assert cli("analyze", tmp_path / "w.pt", "--data", data, "--model", "mlp-tanh", "--probes", QUICK).code == 0


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile(folder: Path) -> Path:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Canary(folder / "canary")}, folder / "bad.pt")
    return folder / "bad.pt"


def test_code_in_a_checkpoint_is_refused_and_nothing_runs(cli, data, tmp_path) -> None:
    ended = cli("analyze", hostile(tmp_path), "--data", data)
    assert ended.code == 4
    assert "--trust-pickle" in ended.err
    assert not (tmp_path / "canary").exists()
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(Canary(tmp_path / "canary"), file)
    assert cli("analyze", tmp_path / "plain.pt", "--data", data).code == 4
    assert not (tmp_path / "canary").exists()


def test_trusting_a_pickle_has_to_be_typed(cli, data, tmp_path) -> None:
    cli("analyze", hostile(tmp_path), "--data", data, "--trust-pickle")
    assert (tmp_path / "canary").exists()


def test_bad_input_ends_with_its_code_and_a_remedy(cli, checkpoint, data, tmp_path) -> None:
    def fails(code: int, text: str, *arguments: object) -> None:
        ended = cli("analyze", *arguments)
        assert ended.code == code, ended
        assert text in ended.err, ended.err
        assert "Traceback" not in ended.err

    whole = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(flipped)
    fails(4, "cut.pt", tmp_path / "cut.pt", "--data", data)
    fails(4, "flipped.safetensors", tmp_path / "flipped.safetensors", "--data", data)
    fails(4, "there is no file or folder", tmp_path / "gone.pt", "--data", data)
    fails(2, "Did you mean 'weight_norms'", checkpoint, "--data", data, "--probes", "weight_norm")
    fails(2, "Did you mean 'cifar10'", checkpoint, "--data", "cifar01")
    fails(4, "--data-root", checkpoint, "--data", "mnist", "--data-root", tmp_path / "nowhere")
    fails(2, "Did you mean", checkpoint, "--data", data, "--model", "resnet20-cifr")
    fails(6, "hessian_spectrum", checkpoint, "--data", data, "--probes", "hessian_spectrum", "--memory", "0.000001")
    np.savez(tmp_path / "labels.npz", x=np.zeros((6, 4), np.float32), y=np.arange(6))
    fails(4, "expected labels from 0 to 2", checkpoint, "--data", tmp_path / "labels.npz")
    np.savez(tmp_path / "shape.npz", x=np.zeros((6, 9), np.float32), y=np.zeros(6, int))
    fails(4, "does not run on these examples", checkpoint, "--data", tmp_path / "shape.npz")
    fails(2, "--dtype", checkpoint, "--data", data, "--dtype", "float16")
    (tmp_path / "foreign.h5").write_bytes(b"text")
    fails(5, "foreign.h5", checkpoint, "--data", data, "--trace", tmp_path / "foreign.h5", "--probes", QUICK)
    assert (tmp_path / "foreign.h5").read_bytes() == b"text"


def test_non_finite_weights_end_with_3_and_the_other_probes_are_there(cli, data, tmp_path) -> None:
    state = MLP([4, 5, 3]).state_dict()
    next(iter(state.values()))[0, 0] = float("nan")
    path = tmp_path / "nan.safetensors"
    write_checkpoint(path, state, {"architecture": {"name": "mlp-relu", "widths": [4, 5, 3]}})
    ended = cli("analyze", path, "--data", data, "--probes", "fisher_rank,dead_units")
    assert ended.code == 3
    assert "training diverged" in ended.out
    assert "hidden" in ended.out


def test_a_trace_with_other_settings_is_refused(cli, checkpoint, data, tmp_path) -> None:
    run = ("analyze", checkpoint, "--data", data, "--probes", QUICK, "--trace", tmp_path / "t.h5", "--no-figures")
    assert cli(*run).code == 0
    ended = cli(*run, "--seed", "1")
    assert ended.code == 5
    assert "seed" in ended.err


def test_hostile_layer_names_are_shown_as_text(cli, data, tmp_path) -> None:
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.add_module('[/b]<script>\\x1b[31m', nn.Linear(4, 3))\n"
        "    def forward(self, x):\n        return self.get_submodule('[/b]<script>\\x1b[31m')(x)\nbuild = Net\n"
    )
    linear = torch.nn.Linear(4, 3).state_dict()
    torch.save({f"[/b]<script>\x1b[31m.{k}": v for k, v in linear.items()}, tmp_path / "odd.pt")
    run = (
        "analyze",
        tmp_path / "odd.pt",
        "--data",
        data,
        "--model",
        f"{tmp_path}/odd.py:build",
        "--probes",
        "weight_norms",
    )
    ended = cli(*run, "--trace", tmp_path / "odd.h5")
    assert ended.code == 0, ended
    assert "\x1b[31m" not in ended.out + ended.err
    assert cli("show", tmp_path / "odd.h5").code == 0


@pytest.mark.slow
def test_an_interrupt_ends_with_130_and_the_next_run_goes_on(checkpoint, data, tmp_path) -> None:
    trace = tmp_path / "t.h5"
    command = [
        sys.executable,
        "-m",
        "plasticity_probe",
        "analyze",
        str(checkpoint),
        "--data",
        str(data),
        "--trace",
        str(trace),
        "--no-figures",
    ]
    process = subprocess.Popen(
        [*command, "--fresh", "200", "--probes", QUICK], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    journal = tmp_path / "t.h5.journal"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "goes on from there" in said
    kept = len(read_rows(trace))
    assert kept > 2
    done = subprocess.run([*command, "--fresh", "2", "--probes", QUICK], capture_output=True, text=True, check=True)
    assert "accuracy" in done.stdout
