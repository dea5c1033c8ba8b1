"""What holds for every remedy: it can be written and read, and a run with it goes through all its hooks."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.training.models import blueprint
from plasticity_probe.training.networks import ManyNetworks, Networks, OneNetwork
from plasticity_probe.training.remedies import REMEDIES, read, remedy_named, written
from plasticity_probe.training.remedies.remedy import Moment, Remedy
from plasticity_probe.training.tasks import Task

# Settings other than the defaults, under which the remedy acts within the few updates of these runs.
QUICK: dict[str, dict[str, Any]] = {
    "l2": {"coefficient": 0.01},
    "l2-init": {"coefficient": 0.01},
    "wasserstein": {"coefficient": 0.01},
    "spectral": {"coefficient": 0.01, "power": 4},
    "shrink-perturb": {"shrink": 0.5, "perturb": 0.2, "toward": "noise"},
    "dash": {"alpha": 0.5, "lam": 0.1},
    "reset-modules": {"last": 2},
    "zero-head": {},
    "fresh-optimizer": {},
    "hare-tortoise": {"decay": 0.5, "every": 1},
    "redo": {"tau": 0.5, "every": 3, "examples": 8},
    "continual-backprop": {"replacement_rate": 0.1, "maturity": 1, "decay": 0.9},
    "layer-norm": {},
    "crelu": {},
}
EVERY_NAME = pytest.mark.parametrize("name", REMEDIES)
SEEDS = pytest.mark.parametrize("seeds", [(3,), (3, 5)], ids=["one", "many"])
TASKS, EPOCHS, EXAMPLES, BATCH = 2, 2, 12, 4


def task_of(seed: int, index: int) -> Task:
    generator = torch.Generator().manual_seed(100 * seed + index)
    inputs = torch.randn(EXAMPLES, 5, generator=generator)
    return Task(index, inputs, torch.randint(0, 3, (EXAMPLES,), generator=generator), "random", arrivals=(8, 4))


def networks_of(seeds: tuple[int, ...], remedy: Remedy | None) -> Networks:
    settings: dict[str, Any] = {"name": "mlp-relu", "hidden": [8, 6]}
    settings = remedy.architecture(settings) if remedy else settings
    build = blueprint(settings, torch.zeros(5), 3).build
    make, device = (lambda weights: torch.optim.Adam(weights, lr=0.01)), torch.device("cpu")
    return OneNetwork(build, seeds[0], make, device) if len(seeds) == 1 else ManyNetworks(build, seeds, make, device)


def run(seeds: tuple[int, ...], remedy: Remedy | None) -> tuple[Networks, dict[str, Tensor]]:
    """Trains on two tasks; a remedy acts at each of its moments."""
    networks, step = networks_of(seeds, remedy), 0
    acting = remedy or Remedy()
    memory = acting.start(networks)
    for index in range(TASKS):
        tasks = [task_of(seed, index) for seed in seeds]
        inputs, targets = (torch.stack([getattr(task, kind) for task in tasks]) for kind in ("inputs", "targets"))
        if index:
            acting.before_task(networks, memory, Moment(seeds, index, 0, step, tasks, BATCH))
        for epoch in range(EPOCHS):
            for start in range(0, EXAMPLES, BATCH):
                batch = slice(start, start + BATCH)
                learned = networks.learn(inputs[:, batch], targets[:, batch], features=acting.features)
                acting.add_gradient(networks, memory)
                networks.optimizer.step()
                step += 1
                acting.after_step(networks, memory, Moment(seeds, index, epoch, step, tasks, BATCH), learned.features)
            acting.after_epoch(networks, memory, Moment(seeds, index, epoch + 1, step, tasks, BATCH))
    return networks, memory


def test_the_settings_of_these_tests_cover_every_remedy() -> None:
    assert QUICK.keys() == REMEDIES.keys()
    assert all(kind.name == name for name, kind in REMEDIES.items())


@EVERY_NAME
def test_a_remedy_says_what_it_is(name: str) -> None:
    remedy = remedy_named(name)
    assert isinstance(remedy, Remedy)
    assert remedy.title
    assert remedy.title[0].islower()
    assert not remedy.title.endswith(".")
    assert any(part.isdigit() and len(part) == 4 for part in remedy.source.replace(",", " ").replace(";", " ").split())
    with pytest.raises(AttributeError):  # frozen: dataclasses.FrozenInstanceError
        remedy.anything = 1  # type: ignore[attr-defined]


@EVERY_NAME
def test_a_remedy_is_written_as_json_and_read_again(name: str) -> None:
    usual, other = remedy_named(name), remedy_named(name, **QUICK[name])
    for remedy in (usual, other):
        text = json.dumps(written(remedy), allow_nan=False)
        assert json.loads(text)["name"] == name
        assert read(json.loads(text)) == remedy
    assert QUICK[name].items() <= written(other).items()
    assert (usual == other) == (not QUICK[name])
    assert read({"name": name}) == usual


@SEEDS
@EVERY_NAME
def test_a_run_with_a_remedy_goes_through_all_its_hooks_and_differs_from_one_without(
    name: str, seeds: tuple[int, ...]
) -> None:
    networks, memory = run(seeds, remedy_named(name, **QUICK[name]))
    for held in (networks.weights, networks.buffers):
        assert all(tensor.isfinite().all() for tensor in held.values())
    assert all(tensor.shape[0] == len(seeds) for tensor in memory.values())
    assert not any(tensor.requires_grad for tensor in memory.values())
    without, _ = run(seeds, None)
    same = {n: without.weights[n].shape == weight.shape and torch.equal(without.weights[n], weight)
            for n, weight in networks.weights.items() if n in without.weights}  # fmt: skip
    assert networks.weights.keys() != without.weights.keys() or not all(same.values())


@EVERY_NAME
def test_many_networks_with_a_remedy_fare_as_each_does_alone(name: str) -> None:
    remedy = remedy_named(name, **QUICK[name])
    together = run((3, 5), remedy)[0]
    for index, seed in enumerate((3, 5)):
        for weight_name, weight in run((seed,), remedy)[0].weights.items():
            torch.testing.assert_close(together.weights[weight_name][index], weight[0], rtol=1e-3, atol=1e-4)


@EVERY_NAME
def test_a_run_with_a_remedy_repeats_itself(name: str) -> None:
    remedy = remedy_named(name, **QUICK[name])
    first = run((3, 5), remedy)[0].weights
    torch.rand(7)  # the global generator stands elsewhere
    again = run((3, 5), remedy)[0].weights
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_unknown_names_are_refused_with_those_that_are_near() -> None:
    with pytest.raises(UnknownNameError, match=r"no remedy named 'l2init'.*'l2-init'"):
        remedy_named("l2init")
    with pytest.raises(UnknownNameError, match="no remedy named 'rest'"):
        read({"name": "rest", "last": 1})


@EVERY_NAME
def test_unknown_settings_are_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UsageError, match=f"the remedy {name} has no 'strength'; it has ") as caught:
        remedy_named(name, strength=1)
    assert all(key in str(caught.value) for key in QUICK[name])
    assert QUICK[name] or "it has no settings" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("redo", {"tau": "0.1"}, "redo cannot be so: tau should be a number, got '0.1'"),
        ("redo", {"every": 10.5}, "every should be a whole number, got 10.5"),
        ("redo", {"every": True}, "every should be a whole number, got True"),
        ("shrink-perturb", {"shrink": "half"}, "shrink should be a number or none, got 'half'"),
        ("shrink-perturb", {"toward": None}, "toward should be a text, got None"),
    ],
)
def test_settings_of_another_type_are_refused(name: str, settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        remedy_named(name, **settings)


def test_whole_numbers_and_none_are_taken_where_they_fit() -> None:
    assert remedy_named("redo", tau=0) == remedy_named("redo", tau=0.0)
    assert remedy_named("shrink-perturb", shrink=None) == remedy_named("shrink-perturb")


@pytest.mark.parametrize("settings", [{}, {"tau": 0.1}, {"name": ["redo"]}, {"name": None}])
def test_what_names_no_remedy_cannot_be_read(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a remedy is written as"):
        read(settings)
