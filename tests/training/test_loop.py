import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from plasticity_probe.checkpoints.architectures import identify, load_network
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.checkpoints.series import find_checkpoints, standing
from plasticity_probe.errors import CheckpointError, DataError, UnknownNameError, UsageError
from plasticity_probe.training.loop import TaskOutcome, TrainingSettings, checkpoint_path, outcomes_in, train
from plasticity_probe.training.tasks import Task

BRIEF = TrainingSettings(epochs=2, batch=4, learning_rate=1e-2)
ARCHITECTURE = {"name": "mlp-relu", "widths": [3, 8, 4], "bias": True, "activation": "relu"}


def tasks_of(count: int, examples: int = 10, dtype: torch.dtype = torch.float32) -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 3, generator=generator, dtype=dtype)
    labels = [torch.randint(4, (examples,), generator=generator) for _ in range(count)]
    return [Task(index, inputs, targets, f"task {index}") for index, targets in enumerate(labels)]


def network_of(seed: int = 0) -> MLP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP([3, 8, 4])


def weights_of(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


def loaded(path: Path) -> nn.Module:
    file = read_checkpoint(path)
    return load_network(file.state, identify(file).build()).model


def test_one_step_of_softmax_regression_is_the_closed_form(tmp_path: Path) -> None:
    (task,) = tasks_of(1, dtype=torch.float64)
    network = nn.Linear(3, 4).double()
    weight, bias = network.weight.detach().clone(), network.bias.detach().clone()
    surplus = ((task.inputs @ weight.T + bias).softmax(1) - one_hot(task.targets, 4)) / 10
    train(network, [task], TrainingSettings(epochs=1, batch=10, learning_rate=0.5, optimizer="sgd"), tmp_path, {})
    torch.testing.assert_close(network.weight.detach(), weight - 0.5 * surplus.T @ task.inputs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(network.bias.detach(), bias - 0.5 * surplus.sum(0), rtol=1e-12, atol=1e-14)


def test_a_checkpoint_holds_the_weights_before_its_task_and_the_last_one_those_after_all(tmp_path: Path) -> None:
    network = network_of()
    initial, tasks = weights_of(network), tasks_of(3)
    seen: list[Tensor] = []
    train(network, tasks, BRIEF, tmp_path / "new" / "folder", {}, report=lambda _: seen.append(weights_of(network)))
    files = find_checkpoints([tmp_path / "new" / "folder"])
    for path, expected in zip(files, [initial, *seen], strict=True):
        state = read_checkpoint(path).state
        assert torch.equal(torch.cat([state[name].reshape(-1) for name, _ in network.named_parameters()]), expected)
    assert torch.equal(weights_of(network), seen[-1])


def test_a_checkpoint_says_where_it_stands_and_what_it_is(tmp_path: Path) -> None:
    outcomes = train(network_of(), tasks_of(2), BRIEF, tmp_path, {"run": "mine", "architecture": ARCHITECTURE})
    updates = 2 * 3  # epochs times batches of at most 4 of 10 examples
    for index in range(3):
        file = read_checkpoint(checkpoint_path(tmp_path, index * updates))
        assert standing(file.path, file.metadata, 99) == ("mine", index * updates, index)
        assert file.metadata["seed"] == 0
        assert file.metadata["training"] == {
            "epochs": 2, "batch": 4, "learning_rate": 1e-2, "optimizer": "adam", "seed": 0,
        }  # fmt: skip
        assert outcomes_in(file.metadata) == tuple(outcomes[:index])
        assert identify(file).name == "mlp-relu"
    assert len(list(tmp_path.iterdir())) == 3


def test_accuracy_is_that_of_the_weights_at_the_end_of_the_task(tmp_path: Path) -> None:
    tasks = tasks_of(3)
    outcomes = train(network_of(), tasks, BRIEF, tmp_path, {"architecture": ARCHITECTURE})
    after = [loaded(path) for path in find_checkpoints([tmp_path])[1:]]
    for task, network, outcome in zip(tasks, after, outcomes, strict=True):
        right = (network(task.inputs).argmax(1) == task.targets).sum().item()
        assert (outcome.task, outcome.name, outcome.accuracy) == (task.index, task.name, right / 10)


def test_online_numbers_are_taken_before_the_update_and_weigh_examples_not_batches(tmp_path: Path) -> None:
    network, (task,) = network_of(), tasks_of(1)
    losses = cross_entropy(network(task.inputs), task.targets, reduction="none").detach()
    right = (network(task.inputs).argmax(1) == task.targets).double()
    still = TrainingSettings(epochs=1, batch=8, learning_rate=1e-12)  # batches of 8 and 2
    (outcome,) = train(network, [task], still, tmp_path / "still", {})
    assert outcome.first_epoch_loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert outcome.online_accuracy == pytest.approx(right.mean().item())
    of_batches = [
        (losses[list(some)].mean() + losses[[i for i in range(10) if i not in some]].mean()).item() / 2
        for some in itertools.combinations(range(10), 2)
    ]
    assert min(abs(mean - outcome.first_epoch_loss) for mean in of_batches) > 1e-5

    whole = TrainingSettings(epochs=1, batch=10, learning_rate=1.0, optimizer="sgd")
    (outcome,) = train(network, [task], whole, tmp_path / "whole", {})
    assert outcome.first_epoch_loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert outcome.online_accuracy == pytest.approx(right.mean().item())
    assert cross_entropy(network(task.inputs), task.targets).item() != pytest.approx(losses.mean().item(), rel=0.01)


def test_online_accuracy_covers_all_epochs_and_first_epoch_loss_the_first(tmp_path: Path) -> None:
    (task,) = tasks_of(1)
    one, two = (
        train(network_of(), [task], TrainingSettings(epochs=e, batch=10, learning_rate=0.05), tmp_path / str(e), {})[0]
        for e in (1, 2)
    )
    assert two.first_epoch_loss == one.first_epoch_loss
    assert two.online_accuracy == pytest.approx((one.online_accuracy + one.accuracy) / 2)


def test_the_optimizer_keeps_its_state_from_task_to_task(tmp_path: Path) -> None:
    (task,) = tasks_of(1)
    twice = [task, Task(1, task.inputs, task.targets, "the same again")]
    split, joined = network_of(), network_of()
    train(split, twice, TrainingSettings(epochs=2, batch=4), tmp_path / "split", {})
    train(joined, [task], TrainingSettings(epochs=4, batch=4), tmp_path / "joined", {})
    assert torch.equal(weights_of(split), weights_of(joined))


def with_dropout() -> nn.Module:
    return nn.Sequential(network_of(), nn.Dropout(0.5))


@pytest.mark.parametrize("build", [network_of, with_dropout])
def test_a_seed_fixes_the_weights_and_leaves_the_global_random_state(tmp_path: Path, build) -> None:
    found = []
    for name, seed, global_seed in (("a", 1, 10), ("b", 1, 20), ("c", 2, 10)):
        network = build()
        torch.manual_seed(global_seed)
        train(network, tasks_of(2), TrainingSettings(epochs=2, batch=4, seed=seed), tmp_path / name, {})
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(global_seed)))
        found.append(weights_of(network))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_modes_are_as_before_and_gradients_flow_even_where_the_caller_turned_them_off(tmp_path: Path) -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))
    network.eval()
    network[1].train()
    before = weights_of(network)
    with torch.no_grad():
        train(network, tasks_of(1), BRIEF, tmp_path, {})
    assert [module.training for module in network.modules()] == [False, False, True]
    assert not torch.equal(weights_of(network), before)
    assert network[0].num_batches_tracked == 6


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    network = network_of()
    first, second = network.parameters().__next__(), list(network.parameters())[2]
    first.requires_grad_(False)
    before = first.clone(), second.detach().clone()
    train(network, tasks_of(1), BRIEF, tmp_path, {})
    assert torch.equal(first, before[0])
    assert not torch.equal(second, before[1])


def test_a_network_that_diverges_is_recorded_not_raised(tmp_path: Path) -> None:
    (outcome, _) = train(network_of(), tasks_of(2), TrainingSettings(learning_rate=1e30, optimizer="sgd"), tmp_path, {})
    assert outcome.accuracy <= 1
    last = read_checkpoint(find_checkpoints([tmp_path])[-1])
    assert not all(torch.isfinite(tensor).all() for tensor in last.state.values())
    assert outcomes_in(last.metadata)[0].task == 0


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    frozen = network_of().requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable parameter"):
        train(frozen, tasks_of(1), BRIEF, tmp_path, {})
    for targets in (torch.zeros(10), torch.zeros(9, dtype=torch.int64)):
        with pytest.raises(DataError, match="one int64 label per example"):
            train(network_of(), [Task(0, torch.zeros(10, 3), targets, "bad")], BRIEF, tmp_path, {})
    with pytest.raises(UsageError, match="JSON"):
        train(network_of(), tasks_of(1), BRIEF, tmp_path, {"run": torch.zeros(1)})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        train(network_of(), tasks_of(1), BRIEF, tmp_path / "file", {})


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"seed": -1}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match="training needs"):
        TrainingSettings(**wrong)
    with pytest.raises(UnknownNameError, match="Did you mean 'adam'"):
        TrainingSettings(optimizer="adm")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_network_on_the_gpu_sees_the_same_order_of_examples(tmp_path: Path) -> None:
    cpu, gpu = network_of(), copy.deepcopy(network_of()).cuda()
    on_cpu = train(cpu, tasks_of(2), BRIEF, tmp_path / "cpu", {})
    on_gpu = train(gpu, tasks_of(2), BRIEF, tmp_path / "gpu", {})
    torch.testing.assert_close(weights_of(gpu).cpu(), weights_of(cpu), rtol=1e-3, atol=1e-5)
    assert [one.accuracy for one in on_gpu] == [one.accuracy for one in on_cpu]
    assert all(isinstance(one, TaskOutcome) for one in on_gpu)
