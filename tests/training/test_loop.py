import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from plasticity_probe.checkpoints.architectures import identify, load_network
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.errors import DataError, RunError, UsageError
from plasticity_probe.network.fresh import fresh_network
from plasticity_probe.training import loop, run_folder
from plasticity_probe.training.batches import resident
from plasticity_probe.training.fitting import Learner, Place, Tally, clip, fit
from plasticity_probe.training.loop import train
from plasticity_probe.training.models import blueprint
from plasticity_probe.training.networks import Networks, OneNetwork, example_losses, initial_seed
from plasticity_probe.training.outcomes import DIVERGED, OK, Outcome, read_outcomes
from plasticity_probe.training.remedies.averaging import HareTortoise
from plasticity_probe.training.remedies.remedy import Memory, Moment, Remedy
from plasticity_probe.training.remedies.resets import FreshOptimizer
from plasticity_probe.training.remedies.shrinking import ShrinkPerturb
from plasticity_probe.training.remedies.units import ContinualBackprop
from plasticity_probe.training.run_plan import plan_run
from plasticity_probe.training.seeding import derived_seed, generator
from plasticity_probe.training.settings import Data, Setting, Training
from plasticity_probe.training.sources import load_source
from plasticity_probe.training.streams.growing import GrowingChunks
from plasticity_probe.training.streams.regression import SlowlyChangingRegression
from plasticity_probe.training.streams.shifting import PermutedPixels, RandomLabels
from plasticity_probe.training.tasks import Task

CPU = torch.device("cpu")
TINY = Setting(
    RandomLabels(tasks=3, examples=40),
    Data("digits"),
    {"name": "mlp-relu", "hidden": [12]},
    Training(epochs=(2,), batch=16, learning_rate=3e-3),
)


def weights_in(path: Path) -> dict[str, Tensor]:
    return dict(read_checkpoint(path).state)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every weight as bytes, and every outcome."""
    kept = {
        str(path.relative_to(folder)): b"".join(t.numpy().tobytes() for t in weights_in(path).values())
        for path in sorted(folder.rglob("*.safetensors"))
    }
    return kept | {"outcomes": (folder / "outcomes.jsonl").read_bytes()}


def bare_loop(setting: Setting, seed: int, network: nn.Module, task: Task, optimizer: torch.optim.Optimizer) -> None:
    """Plain minibatch training, written as everybody writes it."""
    training = setting.training
    for epoch in range(training.epochs_of(task.index)):
        order = torch.randperm(len(task.targets), generator=generator(seed, "order", task.index, epoch))
        for chosen in order.split(training.batch):
            optimizer.zero_grad()
            example_losses(network(task.inputs[chosen]), task.targets[chosen]).mean().backward()
            optimizer.step()


def test_one_step_of_softmax_regression_is_the_closed_form() -> None:
    inputs, labels = torch.randn(10, 3, dtype=torch.float64), torch.randint(4, (10,))
    networks = OneNetwork(lambda: nn.Linear(3, 4).double(), 0, lambda p: torch.optim.SGD(p, lr=9.0), CPU)
    weight, bias = (networks.weights[name][0].clone() for name in ("weight", "bias"))
    setting = replace(TINY, training=Training(epochs=(1,), batch=10, learning_rate=0.5, optimizer="sgd"))
    held = resident([Task(0, inputs, labels, "one")], CPU)
    place = fit(Learner(networks, []), held, setting, (0,), Place(), Tally.empty(1, CPU))
    surplus = ((inputs @ weight.T + bias).softmax(1) - one_hot(labels, 4)) / 10
    assert place == Place(0, "run", 1, 1, 1)
    torch.testing.assert_close(networks.weights["weight"][0], weight - 0.5 * surplus.T @ inputs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(networks.weights["bias"][0], bias - 0.5 * surplus.sum(0), rtol=1e-12, atol=1e-14)


def test_a_run_is_bit_for_bit_a_bare_loop_and_its_control_one_from_a_fresh_network(tmp_path: Path) -> None:
    run = train(TINY, [5], tmp_path / "x")
    source = load_source(TINY.data)
    tasks = [TINY.stream.task(source, index, 5) for index in range(3)]
    drawn = blueprint(TINY.architecture, tasks[0].inputs[0], 10)
    network = fresh_network(drawn.build, initial_seed(5))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, fused=True)
    step = 0
    for task in tasks:
        kept = weights_in(run_folder.checkpoint_path(tmp_path / "x", 5, step))
        assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())
        bare_loop(TINY, 5, network, task, optimizer)
        step += 6
        alone = fresh_network(drawn.build, initial_seed(derived_seed(5, "control", task.index)))
        bare_loop(TINY, 5, alone, task, torch.optim.Adam(alone.parameters(), lr=3e-3, fused=True))
        for kind, trained in (("run", network), ("control", alone)):
            found = [o for o in run.outcomes if o.task == task.index and o.network == kind]
            if task.index == 0 and kind == "control":
                assert not found
                continue
            outputs = trained(task.inputs)
            assert found[0].accuracy == pytest.approx((outputs.argmax(1) == task.targets).double().mean().item())
            assert found[0].loss == pytest.approx(cross_entropy(outputs, task.targets).item(), rel=1e-5)
    last = weights_in(run_folder.checkpoint_path(tmp_path / "x", 5, 18))
    assert all(torch.equal(last[name], value) for name, value in network.state_dict().items())


def test_many_seeds_as_one_program_are_what_each_is_alone(tmp_path: Path) -> None:
    many = train(TINY, range(4), tmp_path / "many")
    alone = train(TINY, range(4), tmp_path / "alone", together=1)
    assert many.manifest.together == 4
    for one, other in zip(many.outcomes, alone.outcomes, strict=True):
        assert (one.seed, one.task, one.network) == (other.seed, other.task, other.network)
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
    for path in sorted((tmp_path / "alone").rglob("*.safetensors")):
        twin = weights_in(tmp_path / "many" / path.relative_to(tmp_path / "alone"))
        for name, value in weights_in(path).items():
            torch.testing.assert_close(twin[name], value, rtol=1e-3, atol=1e-5)


def test_seeds_differ_and_the_same_seed_repeats(tmp_path: Path) -> None:
    first, again, other = (train(TINY, [seed], tmp_path / name) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first.outcomes == again.outcomes != other.outcomes
    one, two = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert one == two


def test_the_numbers_of_an_outcome_are_those_of_its_definition(tmp_path: Path) -> None:
    setting = TINY.changed({"stream.tasks": 1, "training.epochs": 3, "training.threshold": 0.2, "training.batch": 40})
    (found,) = train(setting, [0], tmp_path / "x").outcomes
    task = setting.stream.task(load_source(setting.data), 0, 0)
    network = fresh_network(blueprint(setting.architecture, task.inputs[0], 10).build, initial_seed(0))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, fused=True)
    losses, shares = [], []
    for _ in range(3):
        optimizer.zero_grad()
        outputs = network(task.inputs)
        loss = cross_entropy(outputs, task.targets)
        losses.append(loss.item())
        shares.append((outputs.argmax(1) == task.targets).double().mean().item())
        loss.backward()
        optimizer.step()
    reached = next((index + 1.0 for index, share in enumerate(shares) if share >= 0.2), math.nan)
    assert (found.updates, found.epochs, found.step, found.status) == (3, 3, 3, OK)
    assert found.online_loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found.first_epoch_loss == pytest.approx(losses[0], rel=1e-5)
    assert found.online_accuracy == pytest.approx(sum(shares) / 3)
    assert found.updates_to_threshold == pytest.approx(reached, nan_ok=True)
    assert math.isnan(found.test_accuracy)


def test_test_results_are_averaged_over_the_last_epochs(tmp_path: Path) -> None:
    setting = TINY.changed(
        {"stream": GrowingChunks(tasks=1), "data.examples": 100, "training.epochs": 4, "training.test_last": 2}
    )
    (found,) = train(setting, [0], tmp_path / "x").outcomes
    tests = []
    for epochs in (3, 4):
        shorter = setting.changed({"training.epochs": epochs, "training.test_last": 1})
        tests.append(train(shorter, [0], tmp_path / str(epochs)).outcomes[0].test_accuracy)
    assert found.test_accuracy == pytest.approx(sum(tests) / 2)


def test_a_task_ends_when_its_accuracy_is_reached(tmp_path: Path) -> None:
    setting = TINY.changed({"training.until": 0.5, "training.epochs": 200, "stream.tasks": 2})
    outcomes = train(setting, [0], tmp_path / "x").outcomes
    assert all(1 < o.epochs < 200 and o.accuracy > 0.4 for o in outcomes)
    assert all(o.updates == 3 * o.epochs for o in outcomes)


def test_regression_is_scored_by_its_loss(tmp_path: Path) -> None:
    setting = Setting(
        SlowlyChangingRegression(tasks=2, examples=50),
        Data(""),
        {"name": "mlp-relu", "hidden": [5]},
        Training(epochs=(1,), batch=1, learning_rate=0.01, optimizer="sgd"),
    )
    outcomes = train(setting, range(2), tmp_path / "x").outcomes
    assert len(outcomes) == 6
    assert all(math.isnan(o.accuracy) and o.loss > 0 and o.updates == 50 for o in outcomes)


def test_the_gradient_is_clipped_for_each_network_by_itself() -> None:
    networks = OneNetwork(lambda: nn.Linear(3, 2), 0, lambda p: torch.optim.SGD(p, lr=1.0), CPU)
    networks.learn(torch.randn(1, 8, 3) * 100, torch.randint(2, (1, 8)))
    before = {name: gradient.clone() for name, gradient in networks.gradients.items()}
    norm = torch.cat([g.flatten() for g in before.values()]).norm()
    clip(networks, float(norm) / 4)
    for name, gradient in networks.gradients.items():
        torch.testing.assert_close(gradient, before[name] / 4)
    clip(networks, float(norm))
    for name, gradient in networks.gradients.items():
        torch.testing.assert_close(gradient, before[name] / 4)


def test_checkpoints_stand_at_starts_and_ends_and_log_spaced_inside_and_say_where(tmp_path: Path) -> None:
    setting = TINY.changed({"training.epochs": 6, "inside": 2, "checkpoint_every": 2})
    train(setting, [0], tmp_path / "x")
    found = sorted(path.name for path in (tmp_path / "x").rglob("*.safetensors"))
    steps = [0, 3, 7, 36, 36 + 3, 36 + 7, 54]
    # Task 1 is left out; 18 updates a task: 18^(1/3) = 2.6 and 18^(2/3) = 6.9.
    assert found == [f"step_{step:08d}.safetensors" for step in steps]
    known = read_checkpoint(tmp_path / "x" / "seed_0" / "step_00000039.safetensors")
    assert {key: known.metadata[key] for key in ("run", "seed", "step", "task", "updates", "remedied")} == {
        "run": "x seed 0", "seed": 0, "step": 39, "task": 2, "updates": 3, "remedied": False,
    }  # fmt: skip
    network = load_network(known.state, identify(known).build()).model
    assert sum(p.numel() for p in network.parameters()) == 64 * 12 + 12 + 12 * 10 + 10


def test_what_a_remedy_does_at_a_task_is_kept_beside_what_the_task_before_left(tmp_path: Path) -> None:
    train(replace(TINY, remedies=(ShrinkPerturb(),)), [0], tmp_path / "x")
    names = sorted(path.name for path in (tmp_path / "x").rglob("*.safetensors"))
    assert names == [
        "step_00000000.safetensors",
        "step_00000006.safetensors",
        "step_00000006_remedied.safetensors",
        "step_00000012.safetensors",
        "step_00000012_remedied.safetensors",
        "step_00000018.safetensors",
    ]
    old = weights_in(tmp_path / "x" / "seed_0" / names[1])
    new = weights_in(tmp_path / "x" / "seed_0" / names[2])
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_a_remedy_that_changes_no_weight_leaves_no_second_file(tmp_path: Path) -> None:
    train(replace(TINY, remedies=(FreshOptimizer(),)), [0], tmp_path / "x")
    assert not list((tmp_path / "x").rglob("*_remedied*"))


REMEDIES: dict[str, tuple[Remedy, ...]] = {
    "none": (),
    "memory": (HareTortoise(decay=0.9, every=1), ContinualBackprop(replacement_rate=0.05, maturity=2)),
    "restart": (FreshOptimizer(), ShrinkPerturb()),
}


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("remedies", REMEDIES)
def test_a_run_that_dies_at_any_write_goes_on_to_the_same_weights_and_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remedies: str, together: int
) -> None:
    setting = replace(TINY, remedies=REMEDIES[remedies], inside=1)
    train(setting, range(2), tmp_path / "whole", together=together)
    expected = files_of(tmp_path / "whole")

    class Killed(BaseException):
        pass

    real, countdown = os.replace, [0]

    def dying(*args: object) -> None:
        countdown[0] -= 1
        if countdown[0] < 0:
            raise Killed
        real(*args)  # type: ignore[arg-type]

    deaths = 0
    folder = tmp_path / "runs" / "whole"
    while True:
        countdown[0] = deaths % 12
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", dying)
            try:
                train(setting, range(2), folder, together=together, resume=folder.exists(), save_every=0)
                break
            except Killed:
                deaths += 1
    assert deaths > 5
    assert files_of(folder) == expected
    assert not list(folder.rglob("*.part"))
    assert not (folder / "state").exists()


def test_a_state_that_did_not_hold_the_optimizer_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(TINY, [0], tmp_path / "whole")

    class Killed(BaseException):
        pass

    def dying(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop._Group, "_finish_task", dying)
        with pytest.raises(Killed):
            train(TINY, [0], tmp_path / "x", save_every=0)
    tensors, place = run_folder.load_state(tmp_path / "x", "seeds_0") or ({}, {})
    assert place["epoch"] == 2
    damaged = {name: torch.zeros_like(t) if "exp_avg" in name else t for name, t in tensors.items()}
    run_folder.save_state(tmp_path / "x", "seeds_0", damaged, place)
    train(TINY, [0], tmp_path / "x", resume=True)
    assert files_of(tmp_path / "x")["outcomes"] != files_of(tmp_path / "whole")["outcomes"]


@dataclass(frozen=True)
class Spoils(Remedy):
    """Puts NaN into the weights of one seed at task 1."""

    name: ClassVar[str] = "spoils"
    title: ClassVar[str] = "test"
    source: ClassVar[str] = "test"
    seed: int = 1

    def before_task(self, networks: Networks, memory: Memory, moment: Moment) -> None:
        if moment.task == 1 and self.seed in moment.seeds:
            for weight in networks.weights.values():
                weight[moment.seeds.index(self.seed)] = torch.nan


@pytest.mark.parametrize("together", [1, 3])
def test_a_seed_that_diverges_is_said_and_harms_no_other(tmp_path: Path, together: int) -> None:
    spoiled = train(replace(TINY, remedies=(Spoils(),)), range(3), tmp_path / "spoiled", together=together)
    sound = train(TINY, range(3), tmp_path / "sound", together=together)
    assert spoiled.diverged == (1,)
    assert [o for o in spoiled.outcomes if o.seed != 1] == [o for o in sound.outcomes if o.seed != 1]
    own = [o for o in spoiled.outcomes if o.seed == 1]
    assert [(o.task, o.status) for o in own] == [(0, OK), (1, DIVERGED)]
    assert math.isnan(own[1].loss)
    kept = sorted(path.name for path in (tmp_path / "spoiled" / "seed_1").iterdir())
    assert kept == ["step_00000000.safetensors", "step_00000006.safetensors"]
    assert all(t.isfinite().all() for t in weights_in(tmp_path / "spoiled" / "seed_1" / kept[1]).values())
    again = train(replace(TINY, remedies=(Spoils(),)), range(3), tmp_path / "spoiled", together=together, resume=True)
    assert again.outcomes == spoiled.outcomes


def test_a_step_size_that_blows_up_is_a_status(tmp_path: Path) -> None:
    wild = TINY.changed({"training.optimizer": "sgd", "training.learning_rate": 1e30})
    run = train(wild, [0], tmp_path / "x")
    assert run.diverged == (0,)
    assert [path.name for path in (tmp_path / "x" / "seed_0").iterdir()] == ["step_00000000.safetensors"]


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    first = train(TINY, [0], tmp_path / "x")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert train(TINY, [0], tmp_path / "x", resume=True).outcomes == first.outcomes
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*") if path.is_file()}


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    train(TINY, [0], tmp_path / "x")
    before = files_of(tmp_path / "x")
    with pytest.raises(UsageError, match="--resume"):
        train(TINY, [0], tmp_path / "x")
    with pytest.raises(UsageError, match="learning_rate"):
        train(TINY.changed({"training.learning_rate": 1e-4}), [0], tmp_path / "x", resume=True)
    with pytest.raises(UsageError, match="seeds"):
        train(TINY, [1], tmp_path / "x", resume=True)
    assert files_of(tmp_path / "x") == before


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    train(TINY, [0], tmp_path / "x")
    with run_folder.alone(tmp_path / "x"), pytest.raises(RunError, match="another process"):
        train(TINY, [0], tmp_path / "x", resume=True)
    train(TINY, [0], tmp_path / "x", resume=True)
    assert not (tmp_path / "x" / "run.lock").exists()


def test_a_nearly_full_disk_does_not_stop_a_run_that_has_its_room_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(TINY, [0], tmp_path / "x")
    (tmp_path / "x" / "ballast").write_bytes(bytes(10**6))
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert train(TINY, [0], tmp_path / "x", resume=True).outcomes == first.outcomes


def test_no_more_disk_is_used_than_announced(tmp_path: Path) -> None:
    setting = replace(TINY, remedies=(HareTortoise(every=1), ShrinkPerturb()), inside=2)
    peak = [0]
    real = run_folder.save_weights

    def watched(path: Path, *args: object) -> None:
        real(path, *args)  # type: ignore[arg-type]
        peak[0] = max(peak[0], sum(p.stat().st_size for p in path.parents[1].rglob("*") if p.is_file()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save_weights", watched)
        train(setting, range(3), tmp_path / "x", save_every=0)
    plan = plan_run(setting, range(3))
    assert plan.bytes / 4 < peak[0] <= plan.bytes
    assert len(list((tmp_path / "x").rglob("*.safetensors"))) <= plan.checkpoints
    assert sum(o.updates for o in read_outcomes(tmp_path / "x")) == 3 * plan.updates


def test_a_disk_without_room_is_found_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(RunError, match="make room"):
        train(TINY, [0], tmp_path / "x")
    assert not list((tmp_path / "x").rglob("*.safetensors"))


def test_a_disk_that_fills_up_leaves_what_was_saved_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(TINY, [0], tmp_path / "whole")
    real, count = run_folder.write_checkpoint, [0]

    def full(path: Path, *args: object) -> None:
        count[0] += 1
        if count[0] > 4:
            raise OSError(28, "No space left on device")
        real(path, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_checkpoint", full)
        with pytest.raises(RunError, match="No space left"):
            train(TINY, [0], tmp_path / "runs" / "whole", save_every=0)
    train(TINY, [0], tmp_path / "runs" / "whole", resume=True)
    assert files_of(tmp_path / "runs" / "whole") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.name": ""}, "needs"),
        ({"data.name": "no-such-data.npz"}, "no file"),
    ],
)
def test_data_that_is_missing_is_said(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(TINY.changed(changes), [0], tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("seeds", [[], [-1]])
def test_seeds_that_cannot_be_are_refused(tmp_path: Path, seeds: list[int]) -> None:
    with pytest.raises(UsageError, match="at least one seed"):
        train(TINY, seeds, tmp_path / "x")


def test_progress_never_falls_and_ends_below_its_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(ticks)))
    seen: list[tuple[int, int]] = []
    train(TINY, range(2), tmp_path / "x", together=1, report=lambda done, total, _: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {1000}
    assert len(seen) == 2 * 5 * 2
    assert seen[-1][0] <= 1000


def test_outcomes_are_read_without_the_weights(tmp_path: Path) -> None:
    run = train(PIXELS, range(2), tmp_path / "x")
    found = read_outcomes(tmp_path / "x")
    assert found == run.outcomes
    assert all(isinstance(o, Outcome) and 0 <= o.test_accuracy <= 1 for o in found)
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["setting"]["stream"]["name"] == "permuted-pixels"


PIXELS = TINY.changed({"stream": PermutedPixels(tasks=2, examples=40, redraw=True)})
