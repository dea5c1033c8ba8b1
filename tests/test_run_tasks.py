import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, relu

import plasticity_probe as probe
from plasticity_probe import run_tasks as module
from plasticity_probe import study as study_module
from plasticity_probe.checkpoints.formats import read_checkpoint, write_checkpoint
from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.checkpoints.safetensors_files import read_metadata
from plasticity_probe.errors import CheckpointError, DataError, PlanError, TraceError, UnknownNameError, UsageError
from plasticity_probe.planning import plan
from plasticity_probe.study import Study, is_run, study
from plasticity_probe.trace.outcome_rows import OUTCOMES
from plasticity_probe.trace.reader import read_rows
from plasticity_probe.training.loop import train
from plasticity_probe.training.remedies import remedy_named
from plasticity_probe.training.run_folder import read_manifest
from plasticity_probe.training.settings import Data, Setting, Training
from plasticity_probe.training.sources import load_source
from plasticity_probe.training.streams import (
    GrowingChunks,
    PermutedAlphabet,
    PermutedLabels,
    RandomLabels,
    SlowlyChangingRegression,
    TwoStage,
)
from plasticity_probe.training.tasks import Stream, Task

BRIEF = Training(epochs=(2,), batch=20, learning_rate=1e-2)
LOSS = ["performance"]

MEASURED_ON = {
    "step_00000000": (0, 0),  # at the start
    "step_00000002": (0, 1),  # inside task 0
    "step_00000006": (0, 1),  # at the start of task 1
    "step_00000006_remedied": (0, 1),  # there too, after the remedy
    "step_00000008": (1, 2),  # inside task 1
    "step_00000012": (1, 2),  # at the end, where task 2 would come
}
"""By hand, for two tasks of six updates with a checkpoint after the second of them: the current and the next task."""


def setting_of(stream: Stream, **changes: Any) -> Setting:
    network = {"name": "mlp-relu", "hidden": [8]}
    return replace(Setting(stream, network=network, training=BRIEF, control_every=0), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of two tasks with checkpoints inside tasks and a remedy between them."""
    folder = tmp_path_factory.mktemp("runs") / "labels"
    shrink = remedy_named("shrink-perturb", shrink=0.5, perturb=0.1)
    train(setting_of(RandomLabels(2, examples=60), remedies=(shrink,), inside=1), (0, 1), folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "labels"))


def task_of(folder: Path, index: int, seed: int) -> Task:
    setting = read_manifest(folder).setting
    return setting.stream.task(load_source(setting.data), index, seed)


def loss_on(path: Path, task: Task) -> float:
    state = read_checkpoint(path).state
    hidden = relu(linear(task.inputs.flatten(1), state["layers.0.weight"], state["layers.0.bias"]))
    last = max(name for name in state if name.endswith("weight")).removesuffix(".weight")
    return float(cross_entropy(linear(hidden, state[f"{last}.weight"], state[f"{last}.bias"]), task.targets))


def losses(analysis: probe.Analysis) -> dict[Path, float]:
    assert analysis.ok, analysis.findings
    return {
        Path(row.checkpoint): float(row.variables["loss"].data)
        for row in analysis.rows
        if row.probe == "performance" and row.network == "checkpoint"
    }


def weights_of(path: Path) -> Tensor:
    return torch.cat([tensor.double().reshape(-1) for tensor in read_checkpoint(path).state.values()])


def batch_of(wanted: Study, path: Path) -> tuple[Tensor, Tensor]:
    assert wanted.tasks is not None
    (batch,) = wanted.tasks.material(path).examples.read()
    return batch


@pytest.mark.parametrize(("on", "place"), [("current", 0), ("next", 1)])
def test_each_checkpoint_is_measured_on_its_own_seeds_task(run: Path, on: str, place: int) -> None:
    found = losses(probe.analyze(run, on=on, probes=LOSS, fresh=0))
    assert {path.relative_to(run).as_posix() for path in found} == {
        f"seed_{seed}/{name}.safetensors" for seed in (0, 1) for name in MEASURED_ON
    }
    for path, loss in found.items():
        seed, expected = int(path.parent.name[-1]), MEASURED_ON[path.stem][place]
        assert loss == pytest.approx(loss_on(path, task_of(run, expected, seed)), rel=1e-5)
        others = [(index, seed) for index in range(3) if index != expected] + [(expected, 1 - seed)]
        for index, other in others:
            assert abs(loss - loss_on(path, task_of(run, index, other))) > 1e-3


def test_seeds_keep_their_names_steps_and_tasks(run: Path) -> None:
    rows = probe.analyze(run, probes=LOSS, fresh=0).rows
    assert Counter(row.run for row in rows) == {"labels seed 0": 6, "labels seed 1": 6}
    own = [(row.step, row.task) for row in rows if row.run == "labels seed 1"]
    assert own == [(0, 0), (2, 0), (6, 1), (6, 1), (8, 1), (12, 2)]


def test_a_seeds_folder_and_single_files_give_the_numbers_of_the_whole_run(run: Path) -> None:
    whole = losses(probe.analyze(run, on="next", probes=LOSS, fresh=0))
    seed = losses(probe.analyze(run / "seed_1", on="next", probes=LOSS, fresh=0))
    assert len(seed) == 6
    assert seed.items() <= whole.items()
    places = ["seed_0/step_00000006", "seed_0/step_00000012", "seed_1/step_00000012"]  # two of them on task 2
    files = [run / f"{place}.safetensors" for place in places]
    found = losses(probe.analyze(files, on="next", probes=LOSS, fresh=0))
    assert list(found) == files
    assert found.items() <= whole.items()


def test_a_subset_of_a_task_is_one_random_sample_for_all_tasks_of_a_seed(run: Path) -> None:
    current, later = (study(run, on=on, probes=LOSS, examples=25) for on in ("current", "next"))
    paths = [run / "seed_0" / f"step_{step:08d}.safetensors" for step in (0, 12)]
    inputs = [batch_of(wanted, path)[0] for wanted in (current, later) for path in paths]
    assert all(len(some) == 25 for some in inputs)
    assert all(torch.equal(some, inputs[0]) for some in inputs)
    assert not torch.equal(inputs[0], task_of(run, 0, 0).inputs[:25])
    redrawn = study(run, probes=LOSS, examples=25, seed=1)
    assert not torch.equal(batch_of(redrawn, paths[0])[0], inputs[0])
    other = run / "seed_1" / "step_00000000.safetensors"
    assert not torch.equal(batch_of(current, other)[0], inputs[0])


def test_targets_stay_with_their_inputs_where_a_subset_is_measured(run: Path) -> None:
    path, task = run / "seed_0" / "step_00000000.safetensors", task_of(run, 0, 0)
    inputs, targets = batch_of(study(run, probes=LOSS, examples=25), path)
    places = [int((task.inputs == one).flatten(1).all(1).nonzero()[0, 0]) for one in inputs]
    assert torch.equal(task.targets[places], targets)


def test_noise_is_the_current_tasks_inputs_with_uniform_labels_that_know_nothing_of_the_true_ones(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    train(setting_of(PermutedLabels(2), training=replace(BRIEF, epochs=(1,), batch=1500)), (0,), folder)
    first, second = (folder / "seed_0" / f"step_{step:08d}.safetensors" for step in (0, 2))
    clean, noise, again = (study(folder, on=on, probes=LOSS) for on in ("current", "noise", "noise"))
    (inputs, truth), (same, labels) = batch_of(clean, first), batch_of(noise, first)
    assert torch.equal(inputs, same)
    assert torch.equal(labels, batch_of(again, first)[1])
    count = len(labels)
    counts, classes = labels.bincount(minlength=10).double(), truth.bincount(minlength=10).double()
    assert float(((counts - count / 10) ** 2 / (count / 10)).sum()) < chi2.ppf(0.999, 9)
    together = (10 * truth + labels).bincount(minlength=100).reshape(10, 10)
    expected = classes.outer(counts) / count
    assert float(((together - expected) ** 2 / expected).sum()) < chi2.ppf(0.999, 81)
    # Shuffled true labels would have the same counts; independent ones do not.
    assert not torch.equal(counts, classes)
    later = batch_of(noise, second)[1]
    assert (later == labels).double().mean() < 0.2
    assert not torch.equal(batch_of(study(folder, on="noise", probes=LOSS, seed=1), first)[1], labels)
    assert noise.tasks is not None
    assert noise.tasks.material(first).training is None


def test_the_loss_on_noise_is_that_of_the_random_labels(run: Path) -> None:
    wanted = study(run, on="noise", probes=LOSS, fresh=0)
    for path, loss in losses(probe.analyze(run, on="noise", probes=LOSS, fresh=0)).items():
        inputs, labels = batch_of(wanted, path)
        assert loss == pytest.approx(loss_on(path, Task(0, inputs, labels, "noise")), rel=1e-5)


@pytest.mark.parametrize("stream", [GrowingChunks(2, examples=60), TwoStage(examples=60)])
def test_a_stream_that_ends_has_no_next_task_and_the_notes_say_how_many_were_left_out(
    stream: Stream, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(setting_of(stream), (0, 1), folder)
    steps = sorted(int(path.stem[5:]) for path in (folder / "seed_0").iterdir())
    analysis = probe.analyze(folder, on="next", probes=LOSS, fresh=0)
    assert sorted(row.step for row in analysis.rows) == sorted(2 * steps[:-1])
    assert any("2 checkpoints at the end of the stream left out" in note for note in analysis.notes)
    for path, loss in losses(analysis).items():
        task = task_of(folder, 0 if path.stem == "step_00000000" else 1, int(path.parent.name[-1]))
        assert loss == pytest.approx(loss_on(path, task), rel=1e-5)
    with pytest.raises(UsageError, match="no task comes next; measure on current"):
        study(folder / "seed_0" / f"step_{steps[-1]:08d}.safetensors", on="next")
    assert len(probe.analyze(folder, probes=LOSS, fresh=0).rows) == 2 * len(steps)


def test_what_was_learned_and_what_was_held_out_are_known_on_current_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(setting_of(TwoStage(examples=60)), (0,), folder)
    last = folder / "seed_0" / "step_00000010.safetensors"  # stages of 30 and 60 examples: four and six updates
    current, first = study(folder), study(folder, on="next")
    assert current.tasks is not None
    assert first.tasks is not None
    learned, ahead = current.tasks.material(last), first.tasks.material(last.with_name("step_00000004.safetensors"))
    assert learned.training is learned.examples
    assert learned.held_out is not None
    assert len(learned.held_out) == len(task_of(folder, 1, 0).test_targets)  # type: ignore[arg-type]
    assert (ahead.training, ahead.held_out) == (None, None)


def test_initial_weights_are_those_of_the_own_seed_at_step_0(run: Path) -> None:
    rows = probe.analyze(run, probes=["weight_norms"], fresh=0).rows
    for row in rows:
        path, found = Path(row.checkpoint), float(row.variables["total_distance"].data)
        start, other = (weights_of(run / f"seed_{seed}" / "step_00000000.safetensors") for seed in (0, 1))
        own, foreign = (start, other) if path.parent.name == "seed_0" else (other, start)
        assert found == pytest.approx(float((weights_of(path) - own).norm()), rel=1e-9)
        assert (found == 0) == (row.step == 0)
        assert abs(found - float((weights_of(path) - foreign).norm())) > 0.1


def test_initial_weights_that_are_given_go_before_those_of_the_run_and_are_part_of_the_settings(run: Path) -> None:
    given = read_checkpoint(run / "seed_0" / "step_00000012.safetensors").state
    analysis = probe.analyze(run / "seed_0", probes=["weight_norms"], initial=given)
    distances = {row.step: float(row.variables["total_distance"].data) for row in analysis.rows if row.task >= 0}
    assert distances[12] == 0
    assert distances[0] > 0
    assert all("initial_sha256" in json.loads(row.settings) for row in analysis.rows)


def test_a_fresh_network_is_measured_on_the_last_checkpoints_task_and_has_no_distance_from_the_run(run: Path) -> None:
    analysis = probe.analyze(run, on="next", probes=["performance", "weight_norms"], fresh=1)
    fresh = {row.probe: row for row in analysis.rows if row.network == "fresh"}
    assert np.isnan(fresh["weight_norms"].variables["total_distance"].data)
    wanted = study(run, on="next")
    (inputs, targets) = batch_of(wanted, run / "seed_1" / "step_00000012.safetensors")
    assert wanted.material is not None
    (own,) = wanted.material.examples.read()
    assert torch.equal(own[0], inputs)
    assert torch.equal(own[1], targets)
    assert Counter(targets.tolist()) == Counter(task_of(run, 2, 1).targets.tolist())


def test_a_run_without_its_first_checkpoint_has_no_distance_from_initialisation(copy: Path) -> None:
    first = copy / "seed_0" / "step_00000000.safetensors"
    first.unlink()
    rows = probe.analyze(copy, probes=["weight_norms"], fresh=0).rows
    known = {row.run: [] for row in rows}
    for row in rows:
        known[row.run].append(bool(np.isfinite(row.variables["total_distance"].data)))
    assert known == {"labels seed 0": [False] * 5, "labels seed 1": [True] * 6}


def test_runs_are_measured_one_at_a_time(copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    for paths in ([copy, other], [tmp_path]):
        with pytest.raises(UsageError, match=r"several runs cannot be measured together .*labels, .*other"):
            study(paths)
    shutil.rmtree(other)
    assert len(study(tmp_path).model) == 12  # type: ignore[arg-type]


def test_a_checkpoint_of_no_run_is_not_measured_on_the_tasks_of_one(copy: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign" / "step_1.safetensors"
    foreign.parent.mkdir()
    write_checkpoint(foreign, MLP([64, 8, 10]).state_dict(), {"seed": 0, "task": 0, "updates": 0})
    assert is_run([copy, foreign])
    with pytest.raises(UsageError, match="files of no run"):
        study([copy, foreign])
    assert not is_run(foreign)
    with pytest.raises(UsageError, match=r"no training run, so their data must be named \(--data\)"):
        study(foreign)
    with pytest.raises(UsageError, match="a module belongs to no training run"):
        study(MLP([64, 8, 10]))


def test_data_that_is_named_goes_before_the_tasks_of_the_run(run: Path) -> None:
    task = task_of(run, 0, 0)
    flipped = replace(task, targets=9 - task.targets)
    assert is_run(run)
    found = losses(probe.analyze(run, [(flipped.inputs, flipped.targets)], probes=LOSS, fresh=0))
    assert len(found) == 12
    for path, loss in found.items():
        assert loss == pytest.approx(loss_on(path, flipped), rel=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"data": [(torch.zeros(2, 64), torch.zeros(2).long())], "on": "next"}, "needs the tasks of a training run"),
        ({"split": "test"}, "belong to data that is named"),
        ({"mean": [0.5]}, "belong to data that is named"),
        ({"held_out": [(torch.zeros(2, 64), torch.zeros(2).long())]}, "belong to data that is named"),
    ],
)
def test_what_would_be_ignored_is_refused(run: Path, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        study(run, **request_)


def test_a_task_that_there_is_not_is_refused_with_the_three(run: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'nxt'.* Did you mean 'next'.* current, next, noise"):
        study(run, on="nxt")


def npz_run(folder: Path, data: str) -> Path:
    stream = RandomLabels(1)
    return train(setting_of(stream, data=Data(data, "none"), training=replace(BRIEF, epochs=(1,))), (0,), folder).folder


def saved(path: Path, shift: float = 0.0) -> Path:
    draws = np.random.default_rng(0)
    np.savez(path, train_x=draws.normal(shift, size=(30, 4)).astype(np.float32), train_y=draws.integers(0, 3, 30))
    return path


def test_data_that_changed_since_training_is_refused_and_the_same_data_found_again(tmp_path: Path) -> None:
    folder = npz_run(tmp_path / "run", str(saved(tmp_path / "own.npz")))
    assert probe.analyze(folder, probes=LOSS, fresh=0).ok
    saved(tmp_path / "own.npz", shift=1e-3)
    with pytest.raises(DataError, match=r"is not what .*run was trained on \(other bytes\)"):
        study(folder)
    (tmp_path / "own.npz").unlink()
    with pytest.raises(DataError, match=r"run was trained on cannot be read: there is no file .*own.npz"):
        study(folder)


def test_code_that_a_run_folder_names_as_its_data_runs_only_if_it_is_trusted(tmp_path: Path) -> None:
    saved(tmp_path / "own.npz")
    code = tmp_path / "maker.py"
    code.write_text(
        "from pathlib import Path\nfrom plasticity_probe.data.arrays import read_npz\n\n\ndef make():\n"
        f"    Path({str(tmp_path / 'ran')!r}).touch()\n    return read_npz(Path({str(tmp_path / 'own.npz')!r}))\n"
    )
    folder = npz_run(tmp_path / "run", f"{code}:make")
    (tmp_path / "ran").unlink()
    with pytest.raises(DataError, match="no code that a run folder names is run unasked; allow it with --trust-pickle"):
        study(folder)
    assert not (tmp_path / "ran").exists()
    assert probe.analyze(folder, probes=LOSS, fresh=0, trust_pickle=True).ok
    assert (tmp_path / "ran").exists()


def test_a_trace_that_is_taken_up_again_measures_nothing_twice(copy: Path, tmp_path: Path) -> None:
    late = [path for path in copy.rglob("*.safetensors") if path.stem in ("step_00000008", "step_00000012")]
    for path in late:
        path.rename(path.with_suffix(".later"))
    trace = tmp_path / "t.h5"
    probe.analyze(copy, on="next", probes=LOSS, fresh=0, trace=trace)
    before = {row.key: row.seconds for row in read_rows(trace)}
    assert sum(key.probe != OUTCOMES for key in before) == 8
    for path in late:
        path.with_suffix(".later").rename(path)
    second = probe.analyze(copy, on="next", probes=LOSS, fresh=0, trace=trace)
    assert (len(second.rows), len(second.records)) == (12, 4)
    assert probe.analyze(copy, on="next", probes=LOSS, fresh=0, trace=trace).records == ()
    after = {row.key: row.seconds for row in read_rows(trace)}
    assert sum(key.probe != OUTCOMES for key in after) == 12
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"on": "noise"}, 'on: "next" in the trace, "noise" now'),
        ({"examples": 30}, "examples: 10000 in the trace, 30 now"),
    ],
)
def test_a_trace_holds_one_task_per_label_and_shows_both_settings(
    run: Path, tmp_path: Path, change: dict[str, Any], both: str
) -> None:
    trace = tmp_path / "t.h5"
    probe.analyze(run, on="next", probes=LOSS, fresh=0, trace=trace)
    before = trace.read_bytes()
    with pytest.raises(TraceError, match=both):
        probe.analyze(run, **{"on": "next", **change}, probes=LOSS, fresh=0, trace=trace)
    assert trace.read_bytes() == before


def test_a_damaged_checkpoint_is_a_status_and_the_others_are_measured(copy: Path) -> None:
    broken, foreign = copy / "seed_0" / "step_00000006.safetensors", copy / "seed_0" / "step_00000099.safetensors"
    broken.write_bytes(broken.read_bytes()[:-40])
    architecture = {"name": "mlp-relu", "widths": [64, 8, 10]}
    write_checkpoint(foreign, MLP([64, 8, 10]).state_dict(), {"architecture": architecture})
    analysis = probe.analyze(copy, on="next", probes=LOSS, fresh=0)
    failed = {row.checkpoint: row.message for row in analysis.rows if row.status == "failed"}
    assert failed.keys() == {str(broken), str(foreign)}
    assert "corrupt checkpoint" in failed[str(broken)]
    assert "does not say where it stands in its run" in failed[str(foreign)]
    assert len(analysis.rows) == 13
    with pytest.raises(CheckpointError, match="corrupt checkpoint"):
        probe.analyze(broken, probes=LOSS)
    for paths in (foreign, [foreign, broken]):
        with pytest.raises((DataError, CheckpointError), match=r"does not say where it stands|corrupt checkpoint"):
            probe.analyze(paths, probes=LOSS)


@pytest.mark.parametrize(
    "wrong", [{"seed": 7}, {"task": 3}, {"task": -1}, {"updates": -1}, {"task": "x"}, {"seed": None}]
)
def test_a_checkpoint_that_cannot_be_of_this_run_is_refused(copy: Path, wrong: dict[str, Any]) -> None:
    path = copy / "seed_0" / "step_00000012.safetensors"
    file = read_checkpoint(path)
    write_checkpoint(path, file.state, {**file.metadata, **wrong})
    with pytest.raises(DataError, match=r"where it stands in its run|but its run has the seeds 0, 1 and 2 tasks"):
        study(path)


def test_a_task_is_built_once_and_a_checkpoint_is_read_once_and_as_initial_weights_once_a_seed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[int, int]] = []
    read: list[Path] = []
    build, reading = RandomLabels.task, read_checkpoint

    def task(self: RandomLabels, source: Any, index: int, seed: int) -> Task:
        built.append((index, seed))
        return build(self, source, index, seed)

    def counted(path: Path, **how: Any) -> Any:
        read.append(Path(path))
        return reading(path, **how)

    monkeypatch.setattr(RandomLabels, "task", task)
    monkeypatch.setattr(module, "read_checkpoint", counted)
    monkeypatch.setattr(study_module, "read_checkpoint", counted)
    wanted = study(run, on="current")
    assert built == [(1, 1)]  # for the fresh network
    assert read == []
    networks = [make() for make in wanted.networks()]
    assert built[1:] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    starts = {run / f"seed_{seed}" / "step_00000000.safetensors" for seed in (0, 1)}
    assert Counter(read) == {path: 1 + (path in starts) for path in wanted.tasks.paths}  # type: ignore[union-attr]
    assert len({id(network.material) for network in networks}) == 4
    assert len({id(network.initial) for network in networks}) == 2


def test_where_a_checkpoint_stands_is_read_from_its_header_alone(copy: Path) -> None:
    path = copy / "seed_1" / "step_00000008.safetensors"
    known = read_metadata(path)
    assert known == read_checkpoint(path).metadata
    assert (known["seed"], known["task"], known["updates"]) == (1, 1, 2)
    # The last bytes are weights: the header does not notice, the whole file does.
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_metadata(path) == known
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="corrupt checkpoint"):
        read_metadata(path)


def test_a_plan_of_a_run_names_its_tasks_and_counts_its_checkpoints(run: Path) -> None:
    found = plan(study(run, on="next", probes=LOSS))
    assert (found.networks, found.fresh) == (12, 1)
    assert "stream random-labels, each checkpoint on the task that comes next" in found.description


def test_a_regression_stream_is_measured_by_its_squared_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(setting_of(SlowlyChangingRegression(2, examples=40), data=Data("")), (0,), folder)
    analysis = probe.analyze(folder, on="next", probes=LOSS, fresh=1)
    for index, (path, loss) in enumerate(losses(analysis).items()):
        state, task = read_checkpoint(path).state, task_of(folder, index, 0)
        names = sorted({name.rsplit(".", 1)[0] for name in state})
        hidden = relu(linear(task.inputs, state[f"{names[0]}.weight"], state[f"{names[0]}.bias"]))
        values = linear(hidden, state[f"{names[1]}.weight"], state[f"{names[1]}.bias"]).squeeze(1)
        assert loss == pytest.approx(float((values - task.targets).square().mean()), rel=1e-5)
    path = folder / "seed_0" / "step_00000000.safetensors"
    clean, noise = (batch_of(study(folder, on=on, probes=LOSS), path) for on in ("current", "noise"))
    assert torch.equal(clean[0], noise[0])
    assert not torch.equal(clean[1], noise[1])
    assert torch.equal(clean[1].sort().values, noise[1].sort().values)


def test_a_stream_of_text_is_measured_by_the_cross_entropy_of_its_tokens(tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away " * 6, encoding="utf-8")
    network = {"name": "char-transformer", "width": 8, "depth": 1, "heads": 2}
    setting = setting_of(PermutedAlphabet(2), data=Data(str(text), length=12), network=network)
    folder = train(setting, (0,), tmp_path / "run").folder
    analysis = probe.analyze(folder, on="next", probes=["performance", "weight_norms"], fresh=1)
    found = losses(analysis)
    assert len(found) == 3
    for index, (path, loss) in enumerate(found.items()):
        file, task = read_checkpoint(path), task_of(folder, index, 0)
        network_ = study_module.load_network(file.state, study_module.architecture_of(file, None).build()).model.eval()
        with torch.no_grad():
            scores = network_(task.inputs)
        each = scores.log_softmax(-1).gather(-1, task.targets.unsqueeze(-1))
        assert loss == pytest.approx(-float(each.mean()), rel=1e-5)
    start = folder / "seed_0" / "step_00000000.safetensors"
    inputs, labels = batch_of(study(folder, on="noise", probes=LOSS), start)
    assert torch.equal(inputs, batch_of(study(folder, probes=LOSS), start)[0])
    assert labels.shape == inputs.shape
    assert probe.analyze(folder, on="noise", probes=LOSS, fresh=0).ok
