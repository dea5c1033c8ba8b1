"""ReDo and continual backprop against cases computed by hand and against loops over single units."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from plasticity_probe.checkpoints.networks import MLP, ConvNet, ResNet18
from plasticity_probe.checkpoints.transformers import ViT
from plasticity_probe.errors import UsageError
from plasticity_probe.training.models import HiddenLayer
from plasticity_probe.training.networks import ManyNetworks, Networks, OneNetwork
from plasticity_probe.training.remedies.remedy import Memory, Moment
from plasticity_probe.training.remedies.units import ContinualBackprop, ReDo, contribution, per_unit
from plasticity_probe.training.tasks import Task

CPU = torch.device("cpu")
Plain = dict[str, Tensor]


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def momentum(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def doubled(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build().double()


def networks_of(
    build: Callable[[], nn.Module],
    seeds: Sequence[int],
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = adam,
) -> Networks:
    """One seed makes a OneNetwork, several a ManyNetworks."""
    build = doubled(build)
    return (
        OneNetwork(build, seeds[0], optimizer, CPU) if len(seeds) == 1 else ManyNetworks(build, seeds, optimizer, CPU)
    )


def moment_of(networks: Networks, step: int, inputs: Tensor) -> Moment:
    """A moment at which network i is on a task with the examples inputs[i]."""
    tasks = [Task(0, own, torch.zeros(len(own), dtype=torch.int64), "task") for own in inputs]
    return Moment(networks.seeds, 0, 0, step, tasks, len(inputs[0]))


def set_weights(networks: Networks, index: int, **values: Sequence) -> None:
    for name, value in values.items():
        networks.weights[name.replace("__", ".")][index] = torch.tensor(value, dtype=torch.float64)


def plain(networks: Networks, index: int) -> tuple[Plain, dict[str, list[Tensor]], Plain]:
    """Copies of the weights, moments and buffers of one network."""
    return (
        {name: weight[index].clone() for name, weight in networks.weights.items()},
        {name: [moment[index].clone() for moment in networks.moments(name)] for name in networks.weights},
        {name: buffer[index].clone() for name, buffer in networks.buffers.items()},
    )


def assert_same(networks: Networks, index: int, expected: tuple[Plain, dict[str, list[Tensor]], Plain]) -> None:
    weights, moments, buffers = plain(networks, index)
    assert weights.keys() == expected[0].keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[0][name]), name
        assert len(moments[name]) == len(expected[1][name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(moments[name], expected[1][name], strict=True)), name
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[2][name]), name


# The rules again, one unit and one weight at a time, for one network.


def inputs_of(layer: HiddenLayer, unit: int) -> list[int]:
    return [index for index, owner in enumerate(layer.unit_of.tolist()) if owner == unit]


def activity_of(layer: HiddenLayer, weights: Plain, features: Tensor, index: int) -> float:
    """E|h| of one input of the reading module; features (N, ...)."""
    values = features.select(1 if weights[f"{layer.name}.weight"].ndim > 2 else -1, index)
    return float(values.abs().sum()) / values.numel()


def dormant_by_loop(layer: HiddenLayer, weights: Plain, features: Tensor, tau: float) -> list[int]:
    scores = []
    for unit in range(layer.units):
        own = [activity_of(layer, weights, features, index) for index in inputs_of(layer, unit)]
        scores.append(sum(own) / len(own))
    mean = sum(scores) / len(scores)
    return [unit for unit, score in enumerate(scores) if mean == 0 or score / mean <= tau]


def renew(
    layer: HiddenLayer, units: list[int], state: tuple[Plain, dict[str, list[Tensor]], Plain], fresh: Plain
) -> None:
    weights, moments, buffers = state
    for path in (layer.incoming, layer.norm):
        for part in ("weight", "bias"):
            if (name := f"{path}.{part}") in weights:
                for unit in units:
                    weights[name][unit] = fresh[name][unit]
                    for moment in moments[name]:
                        moment[unit] = 0
        if f"{path}.running_mean" in buffers:
            for unit in units:
                buffers[f"{path}.running_mean"][unit] = 0
                buffers[f"{path}.running_var"][unit] = 1


def clear(layer: HiddenLayer, units: list[int], state: tuple[Plain, dict[str, list[Tensor]], Plain]) -> None:
    weights, moments, _ = state
    name = f"{layer.name}.weight"
    for unit in units:
        for index in inputs_of(layer, unit):
            for tensor in [weights[name], *moments[name]]:
                tensor[:, index] = 0


@dataclass
class Loop:
    """Continual backprop of one network, one unit at a time."""

    layers: tuple[HiddenLayer, ...]
    rate: float
    maturity: int
    decay: float
    utility: dict = field(default_factory=dict)
    age: dict = field(default_factory=dict)
    due: dict = field(default_factory=dict)
    replaced: list = field(default_factory=list)

    def step(self, state: tuple[Plain, dict[str, list[Tensor]], Plain], features: Plain, drawn: Plain) -> None:
        weights = state[0]
        chosen: dict[str, list[int]] = {}
        for layer in self.layers:
            reader = weights[f"{layer.name}.weight"]
            for unit in range(layer.units):
                new = sum(
                    activity_of(layer, weights, features[layer.name], index) * float(reader[:, index].abs().sum())
                    for index in inputs_of(layer, unit)
                )
                key = layer.name, unit
                self.age[key] = self.age.get(key, 0) + 1
                self.utility[key] = self.decay * self.utility.get(key, 0.0) + (1 - self.decay) * new
            mature = [unit for unit in range(layer.units) if self.age[layer.name, unit] > self.maturity]
            self.due[layer.name] = self.due.get(layer.name, 0.0) + self.rate * len(mature)
            whole = int(self.due[layer.name])
            self.due[layer.name] -= whole
            mature.sort(key=lambda u: self.utility[layer.name, u] / (1 - self.decay ** self.age[layer.name, u]))
            chosen[layer.name] = mature[:whole]
        for layer in self.layers:
            units = chosen[layer.name]
            if not units:
                continue
            if f"{layer.incoming}.bias" in drawn:
                drawn[f"{layer.incoming}.bias"] = torch.zeros(layer.units, dtype=torch.float64)
            renew(layer, units, state, drawn)
            clear(layer, units, state)
            for unit in units:
                self.age[layer.name, unit] = 0
                self.utility[layer.name, unit] = 0.0
                self.replaced.append((layer.name, unit))


def crelu() -> nn.Module:
    return MLP([3, 5, 4, 2], "crelu")


def convolutional() -> nn.Module:
    return ConvNet((2, 3), 3, 1, 8, 4, 2)


def residual() -> nn.Module:
    return ResNet18(width=2, depth=1, classes=2, in_channels=1)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: MLP([3, 6, 5, 2]), (3,)),
    "layer norm": (lambda: MLP([3, 6, 5, 2], layer_norm=True), (3,)),
    "crelu": (crelu, (3,)),
    "convnet": (convolutional, (1, 8, 8)),
    "crelu convnet": (lambda: ConvNet((2, 3), 3, 1, 8, 4, 2, activation="crelu"), (1, 8, 8)),
    "strided": (lambda: ConvNet((3,), 3, 1, 4, 5, 2, downsample="stride"), (1, 4, 4)),
    "vit": (lambda: ViT(4, 6, 1, 2, 8, 1, 2), (1, 8, 8)),
    "resnet": (residual, (1, 4, 4)),
}
# The three kinds that differ in how units are read take the long way.
UPDATES = {kind: 200 if kind in ("relu", "crelu", "convnet") else 30 for kind in KINDS}
SEEDS = pytest.mark.parametrize("seeds", [(4,), (4, 7, 9)], ids=["one", "many"])
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def trained(networks: Networks, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """One update on random examples; its inputs and features."""
    count = len(networks.seeds)
    inputs = torch.randn(count, 4, *shape, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 2, (count, 4), generator=generator)
    learned = networks.learn(inputs, targets, features=True)
    networks.optimizer.step()
    return inputs, dict(learned.features)


# Continual backprop


def by_hand(seeds: tuple[int, ...]) -> tuple[Networks, Memory, ContinualBackprop, dict[str, Tensor]]:
    """Three hidden units whose mean features are 1, 2 and 4 and whose outgoing weights sum to 3, 2 and 1/8 in size."""
    networks = networks_of(lambda: MLP([2, 3, 2]), seeds, momentum)
    for index in range(len(seeds)):
        set_weights(
            networks,
            index,
            layers__0__weight=[[1, 2], [3, 4], [5, 6]],
            layers__0__bias=[7, 8, 9],
            layers__2__weight=[[1, -1, 0.125], [-2, 1, 0]],
            layers__2__bias=[10, 11],
        )
    remedy = ContinualBackprop(replacement_rate=0.125, maturity=2, decay=0.5)
    features = torch.tensor([[1.0, 1.0, -4.0], [-1.0, 3.0, 4.0]]).double().expand(len(seeds), 2, 3)
    return networks, remedy.start(networks), remedy, {"layers.2": features}


@SEEDS
def test_continual_backprop_replaces_the_unit_that_a_hand_calculation_names_when_it_names_it(
    seeds: tuple[int, ...],
) -> None:
    networks, memory, remedy, features = by_hand(seeds)
    before = [plain(networks, index)[0] for index in range(len(seeds))]
    inputs = torch.zeros(len(seeds), 2, 2)
    # Contributions 1*3, 2*2, 4*(1/8). Mature from the third update on; then 3/8 of a unit falls due per update: 3/8, 3/4, 9/8.
    for step in (1, 2, 3, 4):
        remedy.after_step(networks, memory, moment_of(networks, step, inputs), features)
        share = 1 - 0.5**step
        assert memory["layers.2/utility"].tolist() == [[3 * share, 4 * share, 0.5 * share]] * len(seeds)
        assert memory["layers.2/age"].tolist() == [[step] * 3] * len(seeds)
        assert memory["layers.2/due"].tolist() == [0.375 * max(0, step - 2)] * len(seeds)
        assert all(
            torch.equal(plain(networks, i)[0][name], before[i][name]) for i in range(len(seeds)) for name in before[i]
        )
    remedy.after_step(networks, memory, moment_of(networks, 5, inputs), features)
    drawn = networks.fresh("continual-backprop", 5 // 3)
    for index in range(len(seeds)):
        weights = plain(networks, index)[0]
        assert weights["layers.0.weight"].tolist() == [[1, 2], [3, 4], drawn["layers.0.weight"][index, 2].tolist()]
        assert weights["layers.0.bias"].tolist() == [7, 8, 0]
        assert weights["layers.2.weight"].tolist() == [[1, -1, 0], [-2, 1, 0]]
        assert weights["layers.2.bias"].tolist() == [10, 11]  # no mean feature is moved into it
    share = 1 - 0.5**5
    assert memory["layers.2/utility"].tolist() == [[3 * share, 4 * share, 0]] * len(seeds)
    assert memory["layers.2/age"].tolist() == [[5, 5, 0]] * len(seeds)
    assert memory["layers.2/due"].tolist() == [0.125] * len(seeds)


def test_a_young_unit_is_protected_although_its_utility_is_least() -> None:
    networks, memory, remedy, features = by_hand((4,))
    memory["layers.2/age"].copy_(torch.tensor([[10, 10, 1]]))
    memory["layers.2/utility"].copy_(torch.tensor([[3 * (1 - 0.5**10), 4 * (1 - 0.5**10), 0.25]]))
    memory["layers.2/due"].fill_(0.75)
    # Two of three units are mature: 3/4 + 2/8 of a unit is due. Unit 2 has the least utility at age 2, and 2 is not above the maturity of 2.
    remedy.after_step(networks, memory, moment_of(networks, 1, torch.zeros(1, 2, 2)), features)
    assert memory["layers.2/age"].tolist() == [[0, 11, 2]]
    assert memory["layers.2/due"].item() == 0


def test_a_unit_whose_utility_is_not_finite_stays_and_no_young_one_goes_in_its_stead() -> None:
    networks, memory, remedy, features = by_hand((4,))
    memory["layers.2/age"].copy_(torch.tensor([[10, 1, 1]]))
    memory["layers.2/due"].fill_(1)
    before = {name: weight.clone() for name, weight in networks.weights.items()}
    broken = {"layers.2": features["layers.2"] * torch.tensor([torch.nan, 1, 1])}
    remedy.after_step(networks, memory, moment_of(networks, 1, torch.zeros(1, 2, 2)), broken)
    assert memory["layers.2/age"].tolist() == [[11, 2, 2]]
    assert all(torch.equal(networks.weights[name], weight) for name, weight in before.items())


def test_the_correction_for_short_averages_decides_which_unit_goes() -> None:
    networks, memory, _, features = by_hand((4,))
    remedy = ContinualBackprop(replacement_rate=0.5, maturity=0, decay=0.9)
    # Unit 1 is younger: its average is smaller than that of unit 0, but not what the average is of.
    memory["layers.2/age"].copy_(torch.tensor([[50, 0, 50]]))
    memory["layers.2/utility"].copy_(torch.tensor([[3 * (1 - 0.9**50), 0.0, 9.0]]))
    memory["layers.2/due"].fill_(-0.5)
    remedy.after_step(networks, memory, moment_of(networks, 1, torch.zeros(1, 2, 2)), features)
    assert memory["layers.2/due"].tolist() == [0.0]
    assert memory["layers.2/age"].tolist() == [[0, 1, 51]]
    assert memory["layers.2/utility"][0, 1] == pytest.approx(0.4)


@SEEDS
def test_units_of_a_replacement_lose_what_the_optimizer_remembers_of_them_and_no_other_does(
    seeds: tuple[int, ...],
) -> None:
    networks, memory, _, features = by_hand(seeds)
    trained(networks, (2,), torch.Generator().manual_seed(0))
    for name, weight in by_hand(seeds)[0].weights.items():
        networks.weights[name].copy_(weight)
        for moment in networks.moments(name):
            moment.fill_(5)
    remedy = ContinualBackprop(replacement_rate=1 / 3, maturity=0, decay=0)
    remedy.after_step(networks, memory, moment_of(networks, 1, torch.zeros(len(seeds), 2, 2)), features)
    assert memory["layers.2/age"].tolist() == [[1, 1, 0]] * len(seeds)
    for index in range(len(seeds)):
        held = {name: moments[0].tolist() for name, moments in plain(networks, index)[1].items()}
        assert held["layers.0.weight"] == [[5, 5], [5, 5], [0, 0]]
        assert held["layers.0.bias"] == [5, 5, 0]
        assert held["layers.2.weight"] == [[5, 5, 0], [5, 5, 0]]
        assert held["layers.2.bias"] == [5, 5]


@SEEDS
@EVERY_KIND
def test_continual_backprop_equals_a_loop_over_units_at_every_update(kind: str, seeds: tuple[int, ...]) -> None:
    build, shape = KINDS[kind]
    networks = networks_of(build, seeds)
    remedy = ContinualBackprop(replacement_rate=0.05, maturity=6, decay=0.9)
    memory = remedy.start(networks)
    loops = [Loop(networks.hidden, 0.05, 6, 0.9) for _ in seeds]
    generator, draws = torch.Generator().manual_seed(1), {}
    for step in range(1, UPDATES[kind] + 1):
        inputs, features = trained(networks, shape, generator)
        states = [plain(networks, index) for index in range(len(seeds))]
        if step == 1 or step % 7 == 0:  # maturity is 6, so that one draw serves 7 updates
            draws = networks.fresh("continual-backprop", step // 7)
        for index, (loop, state) in enumerate(zip(loops, states, strict=True)):
            own, drawn = ({name: values[index] for name, values in held.items()} for held in (features, draws))
            loop.step(state, own, drawn)
        remedy.after_step(networks, memory, moment_of(networks, step, inputs), features)
        for index, state in enumerate(states):
            assert_same(networks, index, state)
    for index, loop in enumerate(loops):
        assert len(loop.replaced) > UPDATES[kind] / 10
        assert {name for name, _ in loop.replaced} == {layer.name for layer in networks.hidden}
        for layer in networks.hidden:
            expected = [loop.utility[layer.name, unit] for unit in range(layer.units)]
            torch.testing.assert_close(
                memory[f"{layer.name}/utility"][index], torch.tensor(expected, dtype=torch.float64)
            )
            assert memory[f"{layer.name}/age"][index].tolist() == [loop.age[layer.name, u] for u in range(layer.units)]
    if len(seeds) > 1:  # the networks went different ways, so that none could have decided for another
        assert len({tuple(loop.replaced) for loop in loops}) == len(seeds)


def test_no_unit_of_a_draw_is_used_twice_and_a_resumed_run_draws_the_same() -> None:
    networks = networks_of(lambda: MLP([3, 4, 2]), (4,))
    remedy = ContinualBackprop(replacement_rate=1, maturity=3, decay=0.5)
    memory = remedy.start(networks)
    generator = torch.Generator().manual_seed(0)
    rows: list[tuple[float, ...]] = []
    for step in range(1, 30):
        inputs, features = trained(networks, (3,), generator)
        remedy.after_step(networks, memory, moment_of(networks, step, inputs), features)
        new = memory["layers.2/age"][0] == 0
        rows += [tuple(row) for row in networks.weights["layers.0.weight"][0][new].tolist()]
    assert len(rows) == len(set(rows)) > 20
    other = networks_of(lambda: MLP([3, 4, 2]), (4,))
    other.remember(networks.memory())
    again = {name: value.clone() for name, value in memory.items()}
    inputs, _ = trained(networks, (3,), generator)
    features = networks.features(inputs)
    for one, held in ((networks, memory), (other, again)):
        one.weights["layers.2.weight"][:] = 1
        held["layers.2/due"].fill_(3)
        held["layers.2/age"].fill_(10)
        remedy.after_step(one, held, moment_of(one, 30, inputs), features)
    changed = memory["layers.2/age"][0] == 0
    assert changed.sum() == 4
    assert torch.equal(networks.weights["layers.0.weight"][0, changed], other.weights["layers.0.weight"][0, changed])


def test_contributions_of_a_flattened_convolution_sum_over_its_positions() -> None:
    networks = networks_of(lambda: ConvNet((2,), 3, 1, 4, 3, 2), (4,))
    layer = next(layer for layer in networks.hidden if len(layer.unit_of) == 8)
    features = torch.arange(16.0).double().reshape(1, 2, 8)
    reader = networks.weights[f"{layer.name}.weight"][0]
    expected = [
        sum(float(features[0, :, 4 * unit + at].mean() * reader[:, 4 * unit + at].abs().sum()) for at in range(4))
        for unit in range(2)
    ]
    assert contribution(networks, layer, features)[0].tolist() == pytest.approx(expected)


# ReDo


def sleepy(seeds: tuple[int, ...]) -> Networks:
    """Hidden units with features 10, 0 (dead), 1 and 29 on the examples (1,) and (1,): scores 1, 0, 0.1 and 2.9."""
    networks = networks_of(lambda: MLP([1, 4, 2]), seeds, momentum)
    for index in range(len(seeds)):
        set_weights(
            networks,
            index,
            layers__0__weight=[[10], [-1], [1], [29]],
            layers__0__bias=[0, 0, 0, 0],
            layers__2__weight=[[1, 2, 3, 4], [5, 6, 7, 8]],
            layers__2__bias=[1, 2],
        )
    return networks


@SEEDS
@pytest.mark.parametrize(("tau", "recycled"), [(0.0, [1]), (0.09, [1]), (0.1, [1, 2]), (0.99, [1, 2])])
def test_redo_recycles_the_units_whose_score_is_at_most_tau(
    seeds: tuple[int, ...], tau: float, recycled: list[int]
) -> None:
    networks = sleepy(seeds)
    trained(networks, (1,), torch.Generator().manual_seed(0))
    for name in networks.weights:
        networks.moments(name)[0].fill_(5)
    before = sleepy(seeds)
    for name, weight in before.weights.items():
        networks.weights[name].copy_(weight)
    remedy = ReDo(tau=tau, every=5)
    inputs = torch.ones(len(seeds), 2, 1).double()
    for step in (1, 2, 3, 4):
        remedy.after_step(networks, {}, moment_of(networks, step, inputs), {})
        assert all(torch.equal(networks.weights[name], before.weights[name]) for name in before.weights)
    remedy.after_step(networks, {}, moment_of(networks, 5, inputs), {})
    drawn = networks.fresh("redo", 5)
    for index in range(len(seeds)):
        weights, moments, _ = plain(networks, index)
        for unit in range(4):
            source = drawn if unit in recycled else before.weights
            held = 0 if unit in recycled else 5
            for name in ("layers.0.weight", "layers.0.bias"):
                assert torch.equal(weights[name][unit], source[name][index, unit])
                assert (moments[name][0][unit] == held).all()
            outgoing = before.weights["layers.2.weight"][index, :, unit]
            assert torch.equal(weights["layers.2.weight"][:, unit], 0 * outgoing if unit in recycled else outgoing)
            assert (moments["layers.2.weight"][0][:, unit] == held).all()
        assert weights["layers.2.bias"].tolist() == [1, 2]
        assert moments["layers.2.bias"][0].tolist() == [5, 5]


@SEEDS
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "layer norm"])
def test_recycling_a_dead_unit_leaves_the_outputs_as_they_were(kind: str, seeds: tuple[int, ...]) -> None:
    build, shape = KINDS[kind]
    networks = networks_of(build, seeds)
    generator = torch.Generator().manual_seed(3)
    inputs, _ = trained(networks, shape, generator)
    for layer in networks.hidden:
        networks.weights[f"{layer.incoming}.weight"][:, 1] = 0
        for path in (layer.incoming, layer.norm):
            if f"{path}.bias" in networks.weights:
                networks.weights[f"{path}.bias"][:, 1] = 0 if kind.startswith(("crelu", "vit")) else -1
    for name, buffer in networks.buffers.items():
        if name.endswith("running_mean"):
            buffer[:] = 0
    outputs = networks.outputs(inputs)
    ReDo(tau=0, every=1).after_step(networks, {}, moment_of(networks, 1, inputs), {})
    torch.testing.assert_close(networks.outputs(inputs), outputs, rtol=0, atol=1e-12)
    for layer in networks.hidden:
        assert (networks.weights[f"{layer.incoming}.weight"][:, 1] != 0).any()
        assert (networks.weights[f"{layer.name}.weight"][:, :, layer.unit_of == 1] == 0).all()


@SEEDS
@EVERY_KIND
def test_redo_equals_a_loop_over_units_at_every_update(kind: str, seeds: tuple[int, ...]) -> None:
    build, shape = KINDS[kind]
    networks = networks_of(build, seeds)
    remedy = ReDo(tau=0.9, every=5, examples=3)
    generator = torch.Generator().manual_seed(2)
    recycled: list[set[tuple[int, str, int]]] = []
    for step in range(1, UPDATES[kind] + 1):
        inputs, _ = trained(networks, shape, generator)
        moment = moment_of(networks, step, inputs)
        if step % 5:
            remedy.after_step(networks, {}, moment, {})
            continue
        states = [plain(networks, index) for index in range(len(seeds))]
        picks = [torch.randperm(4, generator=draw)[:3] for draw in moment.generators("redo")]
        features = networks.features(torch.stack([own[pick] for own, pick in zip(inputs, picks, strict=True)]))
        drawn = networks.fresh("redo", step)
        for index, state in enumerate(states):
            units = {
                layer.name: dormant_by_loop(layer, state[0], features[layer.name][index], 0.9)
                for layer in networks.hidden
            }
            for layer in networks.hidden:
                renew(layer, units[layer.name], state, {name: weight[index] for name, weight in drawn.items()})
            for layer in networks.hidden:
                clear(layer, units[layer.name], state)
            recycled.append({(index, name, unit) for name, found in units.items() for unit in found})
        remedy.after_step(networks, {}, moment, {})
        for index, state in enumerate(states):
            assert_same(networks, index, state)
    assert {name for found in recycled for _, name, _ in found} == {layer.name for layer in networks.hidden}
    assert any(len(found) < sum(layer.units for layer in networks.hidden) for found in recycled)


def test_in_a_layer_of_zeros_all_units_are_dormant_and_with_features_that_are_not_finite_none_is() -> None:
    networks = networks_of(lambda: MLP([1, 3, 2]), (4,))
    (layer,) = networks.hidden
    assert ReDo(tau=0).dormant(networks, layer, torch.zeros(1, 5, 3)).all()
    assert not ReDo(tau=0.5).dormant(networks, layer, torch.full((1, 5, 3), torch.nan)).any()
    assert ReDo(tau=0.5).dormant(networks, layer, torch.tensor([[[1e-30, 1e-30, 0.0]]])).tolist() == [
        [False, False, True]
    ]


def test_redo_scores_no_more_examples_than_asked_and_all_where_there_are_fewer() -> None:
    networks = networks_of(lambda: MLP([1, 3, 2]), (4, 5))
    seen: list[Tensor] = []
    original = networks.features
    networks.features = lambda inputs: seen.append(inputs) or original(inputs)  # type: ignore[method-assign]
    inputs = torch.arange(20.0).double().reshape(2, 10, 1)
    for step in (1, 2):
        ReDo(every=1, examples=4).after_step(networks, {}, moment_of(networks, step, inputs), {})
    ReDo(every=1, examples=64).after_step(networks, {}, moment_of(networks, 3, inputs), {})
    assert [batch.shape for batch in seen] == [(2, 4, 1), (2, 4, 1), (2, 10, 1)]
    for batch in seen:
        assert (batch[0] < 10).all()
        assert (batch[1] >= 10).all()
        assert all(len(set(own.flatten().tolist())) == len(own) for own in batch)
    assert set(seen[0][0].flatten().tolist()) != set(seen[1][0].flatten().tolist())


# Both


@pytest.mark.parametrize("remedy", [ReDo(tau=0.9, every=1), ContinualBackprop(0.4, 0, 0.5)], ids=lambda r: r.name)
def test_what_one_network_goes_through_does_not_reach_another(remedy: ReDo | ContinualBackprop) -> None:
    courses = []
    for disturbance in (0.0, 3.0):
        networks = networks_of(lambda: MLP([3, 6, 5, 2]), (4, 7))
        memory = remedy.start(networks)
        for weight in networks.weights.values():
            weight[1] += disturbance
        generator = torch.Generator().manual_seed(0)
        for step in range(1, 20):
            inputs, features = trained(networks, (3,), generator)
            remedy.after_step(networks, memory, moment_of(networks, step, inputs), features)
        courses.append([plain(networks, index)[0] for index in (0, 1)])
    for name in courses[0][0]:
        assert torch.equal(courses[0][0][name], courses[1][0][name])
    assert not torch.equal(courses[0][1]["layers.0.weight"], courses[1][1]["layers.0.weight"])


@pytest.mark.parametrize("remedy", [ReDo(tau=0.9, every=1), ContinualBackprop(0.4, 0, 0.5)], ids=lambda r: r.name)
def test_many_networks_fare_as_each_does_alone(remedy: ReDo | ContinualBackprop) -> None:
    together, *alone = (networks_of(lambda: MLP([3, 6, 5, 2]), seeds) for seeds in ((4, 7), (4,), (7,)))
    memories = [remedy.start(networks) for networks in (together, *alone)]
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 20):
        inputs, targets = (
            torch.randn(2, 4, 3, dtype=torch.float64, generator=generator),
            torch.tensor([[0, 1, 0, 1]] * 2),
        )
        for networks, memory, own in zip(
            (together, *alone), memories, (slice(0, 2), slice(0, 1), slice(1, 2)), strict=True
        ):
            learned = networks.learn(inputs[own], targets[own], features=True)
            networks.optimizer.step()
            remedy.after_step(networks, memory, moment_of(networks, step, inputs[own]), learned.features)
    for index, networks in enumerate(alone):
        for name, weight in networks.weights.items():
            torch.testing.assert_close(together.weights[name][index], weight[0])


@SEEDS
def test_features_are_what_hidden_layers_hand_on_in_eval_mode(seeds: tuple[int, ...]) -> None:
    networks = networks_of(lambda: MLP([3, 4, 2]), seeds)
    inputs = torch.randn(len(seeds), 5, 3).double()
    features = networks.features(inputs)
    assert features.keys() == {"layers.2"}
    for index in range(len(seeds)):
        first, bias = networks.weights["layers.0.weight"][index], networks.weights["layers.0.bias"][index]
        torch.testing.assert_close(features["layers.2"][index], (inputs[index] @ first.T + bias).relu())
    assert not networks.module.training
    assert not features["layers.2"].requires_grad


def test_per_unit_sums_the_inputs_of_a_unit_wherever_they_are() -> None:
    layer = HiddenLayer("reader", "maker", None, 3, torch.tensor([2, 0, 1, 1, 2, 0]))
    assert per_unit(layer, torch.tensor([[1.0, 2, 4, 8, 16, 32], [0, 0, 0, 0, 0, 1]])).tolist() == [
        [34, 12, 17],
        [1, 0, 0],
    ]


@pytest.mark.parametrize("remedy", [ReDo(), ContinualBackprop()], ids=lambda r: r.name)
def test_networks_without_known_hidden_units_are_refused(remedy: ReDo | ContinualBackprop) -> None:
    with pytest.raises(UsageError, match=rf"{remedy.name} replaces hidden units.*Sequential"):
        remedy.start(networks_of(lambda: nn.Sequential(nn.Linear(2, 2)), (0,)))
    networks = networks_of(lambda: MLP([2, 2, 2]), (0,))
    networks.hidden = (HiddenLayer("layers.2", "layers.0", None, 2, torch.tensor([0, 0, 1])),)
    with pytest.raises(UsageError, match="as many inputs as the others"):
        remedy.start(networks)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReDo(tau=-0.1),
        lambda: ReDo(tau=1),
        lambda: ReDo(every=0),
        lambda: ReDo(examples=0),
        lambda: ReDo(tau=float("nan")),
        lambda: ContinualBackprop(replacement_rate=0),
        lambda: ContinualBackprop(replacement_rate=1.1),
        lambda: ContinualBackprop(maturity=-1),
        lambda: ContinualBackprop(decay=1),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="got"):
        make()
