"""The example that ranks checkpoints, against the package's probes, torch's optimizers and numbers found by hand."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.linalg.ranks import effective_rank, energy_rank
from plasticity_probe.prediction.held_out import ranking_accuracy
from plasticity_probe.prediction.panel import Panel
from plasticity_probe.probes.features import feature_rank
from plasticity_probe.probes.fisher import fisher_rank
from plasticity_probe.probes.readiness import readiness
from plasticity_probe.probes.spectrum import hessian_spectrum
from plasticity_probe.probes.units import dead_units
from plasticity_probe.training.protocols import PROTOCOLS
from plasticity_probe.training.streams.regression import SlowlyChangingRegression

SAMPLES = 300


def loaded_example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "does_readiness_rank.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(path.stem, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


example = loaded_example()
STREAM = SlowlyChangingRegression(tasks=4, examples=20)
TASK = example.held_out_tasks(STREAM, 0, 1, SAMPLES)[0]


def networks(count: int = 3) -> list[MLP]:
    torch.manual_seed(0)
    return [MLP([20, 5, 5, 1]).double() for _ in range(count)]


def weights_of(nets: list[MLP]) -> list[Tensor]:
    return example.stacked([net.state_dict() for net in nets])


def examples_of(chosen: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
    return TASK.task.inputs[chosen].double(), TASK.task.targets[chosen].double()[..., None]


def loss_of(net: MLP, chosen: Tensor | slice = slice(None)) -> Tensor:
    inputs, targets = examples_of(chosen)
    return (net(inputs) - targets).square().mean()


def update(net: MLP, optimizer: torch.optim.Optimizer, chosen: Tensor | slice) -> float:
    loss = loss_of(net, chosen)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_held_out_tasks_belong_to_the_run_and_were_never_trained_on() -> None:
    tasks = example.held_out_tasks(STREAM, 3, 4, SAMPLES)
    trained = {tuple(STREAM.slow(task, 3).tolist()) for task in range(STREAM.tasks)}
    slow = [tuple(task.task.inputs[0, :15].int().tolist()) for task in tasks]
    assert len({*slow}) == 4
    assert not trained & {*slow}
    for task in tasks:
        torch.testing.assert_close(task.task.targets, STREAM.target(task.task.inputs, 3))
        torch.testing.assert_close(task.inputs[task.which] @ task.basis.T, example.with_one(task.task.inputs).double())
        assert float(task.share.sum()) == pytest.approx(1)


def test_measurements_are_those_of_the_probes() -> None:
    nets = networks()
    found = example.measured(TASK.seen(weights_of(nets)), TASK)
    loader = [examples_of()]
    for at, net in enumerate(nets):
        gradient = readiness(net, loader, examples=SAMPLES)
        features = feature_rank(net, loader).penultimate
        hessian = hessian_spectrum(net, loader, examples=SAMPLES)
        expected = {
            "optimization readiness": gradient.optimization_readiness,
            "strength": gradient.strength,
            "reliability": gradient.reliability,
            "gradient norm": gradient.squared_norm**0.5,
            "loss before learning": gradient.loss,
            "Fisher 99 % rank": float(fisher_rank(net, loader, examples=SAMPLES)),
            "representation 99 % rank": features.threshold_rank,
            "representation effective rank": features.effective_rank,
            "representation stable rank": features.stable_rank,
            "Hessian 99 % rank": float(hessian.rank("threshold_rank", 0.01)),
            "Hessian effective rank": float(hessian.rank("effective_rank", 0.01)),
            "dormant share": dead_units(net, loader).total_dormant_fraction,
        }
        assert {name: found[name][at] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_the_kernel_is_that_of_all_weights_and_examples() -> None:
    nets = networks()
    found = example.measured(TASK.seen(weights_of(nets)), TASK)
    for at, net in enumerate(nets):
        each = jacrev(lambda w, net=net: functional_call(net, w, (examples_of()[0],))[:, 0])(
            dict(net.named_parameters())
        )
        values = torch.linalg.svdvals(torch.cat([part.flatten(1) for part in each.values()], 1))
        assert found["eNTK 99 %-energy rank"][at] == energy_rank(values)
        assert found["eNTK effective rank"][at] == pytest.approx(effective_rank(values.square()))


def test_rollouts_are_those_of_the_whole_network() -> None:
    nets, steps, rollouts, batch, rate = networks(), (1, 7), 18, 4, 0.02
    draws = torch.Generator().manual_seed(5)
    found = example.losses_after(TASK.seen(weights_of(nets)), TASK, steps, rollouts, batch, rate, draws)
    drawn = torch.randint(SAMPLES, (7, batch, rollouts), generator=torch.Generator().manual_seed(5))
    for rollout in (0, 17):
        own = networks()
        for net, at in zip(own, range(3), strict=True):
            optimizer = torch.optim.SGD(net.parameters(), lr=rate)
            for number in range(7):
                update(net, optimizer, drawn[number, :, rollout])
                if number + 1 in steps:
                    after = found[steps.index(number + 1), at, rollout]
                    assert after.item() == pytest.approx(loss_of(net).item(), rel=1e-9)


def test_one_small_step_gains_its_size_times_the_strength() -> None:
    weights, rate = TASK.seen(weights_of(networks())), 1e-6
    draws = torch.Generator().manual_seed(0)
    after = example.losses_after(weights, TASK, (1,), 4096, 4, rate, draws)[0]
    gains = 1 - after / example.mean_loss(weights, TASK)[:, None]
    error = gains.std(1) / 4096**0.5
    expected = rate * torch.tensor(example.measured(weights, TASK)["strength"])
    assert ((gains.mean(1) - expected).abs() < 3 * error).all()
    assert (error < expected / 20).all()


def test_a_task_is_learned_with_the_optimizer_of_the_run() -> None:
    protocol = PROTOCOLS["slowly-changing-regression"]
    setting = protocol.setting.changed({**protocol.variants["adam"], "stream.examples": 40})
    online, after = example.with_adam(weights_of(networks()), [TASK], setting)
    for at, net in enumerate(networks()):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        losses = [update(net, optimizer, slice(number, number + 1)) for number in range(40)]
        assert float(online[at, 0]) == pytest.approx(np.mean(losses), rel=1e-4)
        assert after[at, 0].item() == pytest.approx(loss_of(net).item(), rel=1e-4)


def test_three_checkpoints_are_ranked_as_by_hand() -> None:
    one = np.array([1.0, 2.0, 2.0])
    assert example.ranking(one, np.array([0.0, 1.0, 3.0])) == pytest.approx(2.5 / 3)
    assert example.ranking(-one, np.array([0.0, 1.0, 3.0])) == pytest.approx(0.5 / 3)
    assert example.ranking(np.array([1.0, 2.0, 0.0]), np.array([0.0, 0.0, 1.0])) == 0
    assert example.ranking(one, np.array([-np.inf, 1.0, -np.inf])) == pytest.approx(1.5 / 2)
    assert np.isnan(example.ranking(one, np.zeros(3)))


def test_on_one_task_the_accuracy_is_the_one_of_the_verdict() -> None:
    rng = np.random.default_rng(0)
    label = rng.normal(size=(8, 9))
    predictor = np.round(rng.normal(size=(8, 9)) - label)
    panel = Panel(("all",), np.zeros(8, int), tuple("abcdefgh"), tuple(range(9)), {}, {})
    plain, turned = example.accuracy([*predictor[:, None]], [*label[:, None]])
    assert turned == ranking_accuracy(panel, predictor, label, 0)
    assert plain.value == pytest.approx(1 - turned.value)
    # With two tasks a run, its value is their mean.
    twice, _ = example.accuracy([*predictor.reshape(4, 2, 9)], [*label.reshape(4, 2, 9)])
    assert twice.value == pytest.approx(plain.value)
