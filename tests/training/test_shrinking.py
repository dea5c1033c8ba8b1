import copy
import itertools
from dataclasses import asdict, replace

import pytest
import torch
from remedy_cases import (
    BUILDS,
    EXAMPLES,
    assert_many_train_as_each_alone,
    assert_networks_do_not_see_each_other,
    copied,
    in_double,
    kinds,
    learn,
    many,
    moment_of,
    moved,
    one,
    tasks_of,
)
from torch import Tensor, nn
from torch.nn import functional

from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.checkpoints.transformers import CharTransformer
from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.training.networks import Networks
from plasticity_probe.training.remedies import shrinking
from plasticity_probe.training.remedies.remedy import Remedy
from plasticity_probe.training.remedies.shrinking import Dash, ShrinkPerturb, alignment
from plasticity_probe.training.tasks import Task

REMEDIES = [ShrinkPerturb(), ShrinkPerturb(toward="noise"), ShrinkPerturb(toward="initial"), Dash()]
each_remedy = pytest.mark.parametrize("remedy", REMEDIES, ids=["fresh", "noise", "initial", "dash"])
each_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
# Rounding must not decide here which way a gradient of almost zero points, which a bias before BatchNorm has.
each_stable_build = pytest.mark.parametrize("build", [BUILDS["mlp"], BUILDS["convnet"]], ids=["mlp", "convnet"])


def tasks_for(networks: Networks, arrivals: tuple[int, ...] = (5, 7)) -> list[Task]:
    """The second task of each network, in the precision of its weights."""
    precision = next(iter(networks.weights.values())).dtype
    tasks = [tasks_of(seed, arrivals=arrivals)[1] for seed in networks.seeds]
    return [replace(task, inputs=task.inputs.to(precision)) for task in tasks]


def with_statistics(networks: Networks) -> Networks:
    """The networks after an update of their running statistics, with all weights moved."""
    learn(networks, tasks_for(networks))
    return moved(networks)


def act(remedy: Remedy, networks: Networks, arrivals: tuple[int, ...] = (5, 7)) -> None:
    memory = remedy.start(networks)
    with_statistics(networks)
    remedy.before_task(networks, memory, moment_of(networks, tasks_for(networks, arrivals)))


@pytest.mark.parametrize(
    ("toward", "shrink", "perturb"), [("fresh", 0.4, 0.1), ("noise", 0.3, 0.01), ("initial", 0.2, 0.8)]
)
def test_each_form_takes_its_published_factors_unless_others_are_given(
    toward: str, shrink: float, perturb: float
) -> None:
    assert asdict(ShrinkPerturb(toward=toward)) == {"shrink": shrink, "perturb": perturb, "toward": toward}
    assert ShrinkPerturb(0.5, toward=toward).factors == (0.5, perturb)
    assert ShrinkPerturb(perturb=0.0, toward=toward).factors == (shrink, 0.0)


@each_build
def test_toward_fresh_mixes_all_parameters_with_a_new_network_and_takes_its_buffers(build) -> None:
    for networks in kinds(build):
        with_statistics(networks)
        before, fresh = copied(networks.weights), networks.fresh("shrink-perturb", 7)
        ShrinkPerturb().before_task(networks, {}, moment_of(networks))
        for name, weight in networks.weights.items():
            torch.testing.assert_close(weight, 0.4 * before[name] + 0.1 * fresh[name])
        for name, buffer in dict(build().named_buffers()).items():
            assert all(torch.equal(own, buffer) for own in networks.buffers[name])


def test_toward_fresh_the_scale_of_a_batchnorm_keeps_a_tenth_of_its_initial_one() -> None:
    networks = one(BUILDS["normed"])
    networks.weights["1.weight"].fill_(2.0)
    ShrinkPerturb().before_task(networks, {}, moment_of(networks))
    torch.testing.assert_close(networks.weights["1.weight"], torch.full((1, 2), 0.9))


@each_build
def test_shrink_0_and_perturb_1_make_a_new_network_and_1_and_0_change_no_weight(build) -> None:
    for networks in kinds(build):
        act(ShrinkPerturb(0.0, 1.0), networks)
        assert all(torch.equal(networks.weights[name], w) for name, w in networks.fresh("shrink-perturb", 7).items())
        before = copied(networks.weights)
        ShrinkPerturb(1.0, 0.0).before_task(networks, {}, moment_of(networks))
        assert all(torch.equal(networks.weights[name], before[name]) for name in before)


def test_toward_noise_acts_on_linear_layers_and_convolutions_only() -> None:
    for networks in kinds(BUILDS["normed"]):
        with_statistics(networks)
        before, buffers = copied(networks.weights), copied(networks.buffers)
        ShrinkPerturb(0.3, 0.0, "noise").before_task(networks, {}, moment_of(networks))
        for name, weight in networks.weights.items():
            torch.testing.assert_close(weight, before[name] * (1 if name.startswith("1.") else 0.3))
        assert all(torch.equal(networks.buffers[name], buffers[name]) for name in buffers)
        assert any(name.startswith("1.") for name in before)


def test_the_noise_is_standard_normal_times_perturb_and_each_networks_own() -> None:
    def noise_of(networks: Networks, step: int = 7) -> Tensor:
        ShrinkPerturb(0.0, 0.5, "noise").before_task(networks, {}, moment_of(networks, step=step))
        return torch.cat([weight.flatten(1) for weight in networks.weights.values()], 1)

    def build() -> nn.Module:
        return MLP([100, 100])

    noise = noise_of(many(build))
    count = noise.shape[1]
    assert (noise.mean(1).abs() < 4 * 0.5 / count**0.5).all()
    assert ((noise.std(1) - 0.5).abs() < 4 * 0.5 / (2 * count) ** 0.5).all()
    assert abs(torch.corrcoef(noise)[0, 1]) < 4 / count**0.5
    assert torch.equal(noise, noise_of(many(build)))
    assert not torch.equal(noise, noise_of(many(build), step=8))
    assert torch.equal(noise_of(one(build))[0], noise[0])


@each_build
def test_toward_initial_mixes_all_parameters_with_their_own_initial_values(build) -> None:
    for networks in kinds(build):
        remedy = ShrinkPerturb(toward="initial")
        initial, memory = copied(networks.weights), remedy.start(networks)
        with_statistics(networks)
        before, buffers = copied(networks.weights), copied(networks.buffers)
        remedy.before_task(networks, memory, moment_of(networks))
        for name, weight in networks.weights.items():
            torch.testing.assert_close(weight, 0.2 * before[name] + 0.8 * initial[name])
            assert torch.equal(memory[name], initial[name])
        assert all(torch.equal(networks.buffers[name], buffers[name]) for name in buffers)


def test_a_form_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(UnknownNameError, match="fresh, initial, noise"):
        ShrinkPerturb(toward="freshh")


@pytest.mark.parametrize(
    ("shrink", "perturb"), [(-0.1, 0.1), (1.1, 0.1), (0.5, -0.1), (0.5, float("inf")), (float("nan"), 0)]
)
def test_factors_that_neither_shrink_nor_perturb_are_refused(shrink: float, perturb: float) -> None:
    with pytest.raises(UsageError, match=f"got {shrink} and {perturb}"):
        ShrinkPerturb(shrink, perturb)


def by_loops(networks: Networks, index: int, task: Task, remedy: Dash, *, training: bool = False) -> dict[str, Tensor]:
    """Direction-aware shrinking written out: one module, one part after the other, one vector of weights after the other."""
    network = copy.deepcopy(networks.module)
    network.load_state_dict(networks.state_of(index))
    network.train(training)
    layers = {path: m for path, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    average = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    start = 0
    for size in task.arrivals or (len(task.inputs),):
        network.zero_grad()
        part = slice(start, start + size)
        functional.cross_entropy(network(task.inputs[part]), task.targets[part]).backward()
        for name, parameter in network.named_parameters():
            average[name] = (1 - remedy.alpha) * average[name] + remedy.alpha * -parameter.grad
        start += size

    def scale(wanted: Tensor, weight: Tensor) -> float:
        dot = sum(u * w for u, w in zip(wanted.flatten().tolist(), weight.flatten().tolist(), strict=True))
        lengths = wanted.norm().item() * weight.norm().item()
        return min(max(dot / lengths if lengths else 0.0, remedy.lam), 1.0)

    after = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for path, layer in layers.items():
        weight, wanted = after[f"{path}.weight"], average[f"{path}.weight"]
        if isinstance(layer, nn.Linear):
            for unit in range(len(weight)):
                weight[unit] *= scale(wanted[unit], weight[unit].clone())
        else:
            for out, into in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
                weight[out, into] *= scale(wanted[out, into], weight[out, into].clone())
        if layer.bias is not None:
            after[f"{path}.bias"] *= scale(average[f"{path}.bias"], after[f"{path}.bias"].clone())
    return after


@each_build
@pytest.mark.parametrize("arrivals", [(5, 7), (3, 1, 8), (12,), ()])
def test_dash_is_the_rule_written_out_in_loops(build, arrivals: tuple[int, ...]) -> None:
    remedy = Dash(alpha=0.4, lam=0.2)
    for networks in kinds(in_double(build)):
        with_statistics(networks)
        tasks, buffers = tasks_for(networks, arrivals), copied(networks.buffers)
        expected = [by_loops(networks, index, task, remedy) for index, task in enumerate(tasks)]
        before = copied(networks.weights)
        remedy.before_task(networks, {}, moment_of(networks, tasks))
        for index, after in enumerate(expected):
            for name, weight in after.items():
                torch.testing.assert_close(networks.weights[name][index], weight, rtol=1e-9, atol=1e-12)
        assert any((networks.weights[name] != before[name]).any() for name in before)
        assert all(torch.equal(networks.buffers[name], buffers[name]) for name in buffers)


def shrunk(weight: list[float], bias: float, answer: float, remedy: Dash) -> tuple[list[float], float]:
    """One linear unit after DASH on the example (1, 0) with a squared error."""
    networks = one(lambda: MLP([2, 1]))
    networks.weights["layers.0.weight"].copy_(torch.tensor([[weight]]))
    networks.weights["layers.0.bias"].copy_(torch.tensor([[bias]]))
    task = Task(1, torch.tensor([[1.0, 0.0]]), torch.tensor([answer]), "one example")
    remedy.before_task(networks, {}, moment_of(networks, [task]))
    return networks.weights["layers.0.weight"].flatten().tolist(), networks.weights["layers.0.bias"].item()


def test_dash_by_hand() -> None:
    # The output is 4: an answer of 5 wants the first weight and the bias to grow. The cosine of (1, 0) and (3, 4) is 0.6, that of biases 1.
    weight, bias = shrunk([3.0, 4.0], 1.0, 5.0, Dash())
    assert weight == pytest.approx([1.8, 2.4])
    assert bias == pytest.approx(1.0)
    # An answer of 3 wants the opposite: both cosines are negative.
    weight, bias = shrunk([3.0, 4.0], 1.0, 3.0, Dash())
    assert weight == pytest.approx([0.9, 1.2])
    assert bias == pytest.approx(0.3)
    # Without a gradient nothing is known to be wanted.
    weight, bias = shrunk([3.0, 4.0], 1.0, 4.0, Dash(lam=0.5))
    assert weight == pytest.approx([1.5, 2.0])
    assert bias == pytest.approx(0.5)


def test_the_newest_part_weighs_most() -> None:
    # Two parts want opposite things of equal size; with alpha 0.6 the later one wins.
    for answers, expected in (([3.0, 5.0], [1.8, 2.4]), ([5.0, 3.0], [0.9, 1.2])):
        networks = one(lambda: MLP([2, 1]))
        networks.weights["layers.0.weight"].copy_(torch.tensor([[[3.0, 4.0]]]))
        networks.weights["layers.0.bias"].copy_(torch.tensor([[1.0]]))
        inputs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        task = Task(1, inputs, torch.tensor(answers), "two examples", arrivals=(1, 1))
        Dash(alpha=0.6).before_task(networks, {}, moment_of(networks, [task]))
        assert networks.weights["layers.0.weight"].flatten().tolist() == pytest.approx(expected)


def test_a_1x1_kernel_is_kept_or_multiplied_by_the_smallest_factor() -> None:
    networks = many(BUILDS["normed"])
    before = networks.weights["3.weight"].clone()
    act(Dash(lam=0.3), networks)
    with_statistics(before_networks := many(BUILDS["normed"]))
    before = before_networks.weights["3.weight"]
    factors = (networks.weights["3.weight"] / before).flatten()
    kept, multiplied = (factors - 1).abs() < 1e-5, (factors - 0.3).abs() < 1e-5
    assert (kept | multiplied).all()
    assert kept.any()
    assert multiplied.any()


def test_dash_reads_running_statistics_and_not_those_of_the_batch() -> None:
    networks = one(in_double(BUILDS["normed"]))
    with_statistics(networks)
    (task,) = tasks_for(networks)
    networks.module.train()
    by_batch = by_loops(networks, 0, task, Dash(), training=True)
    Dash().before_task(networks, {}, moment_of(networks, [task]))
    assert any((networks.weights[name][0] - weight).abs().max() > 1e-3 for name, weight in by_batch.items())


def test_dash_of_a_transformer_shrinks_its_linear_layers_only() -> None:
    networks = many(lambda: CharTransformer(vocabulary=5, context=6, width=4, depth=1, heads=2))
    before = copied(networks.weights)
    text = torch.randint(5, (EXAMPLES, 7))
    task = Task(1, text[:, :-1], text[:, 1:], "text", arrivals=(5, 7))
    Dash().before_task(networks, {}, moment_of(networks, [task, task]))
    linear = {path for path, module in networks.module.named_modules() if isinstance(module, nn.Linear)}
    for name, weight in networks.weights.items():
        path, _, leaf = name.rpartition(".")
        if path not in linear:
            assert torch.equal(weight, before[name])
        elif leaf == "weight":
            factors = weight / before[name]
            assert ((factors > 0.3 - 1e-4) & (factors < 1 + 1e-4)).all()
            assert (factors < 0.99).any()


def test_dash_does_not_depend_on_how_many_examples_it_differentiates_together(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for together in (EXAMPLES, 2):
        monkeypatch.setattr(shrinking, "DIFFERENTIATED_TOGETHER", together)
        networks = many(in_double(BUILDS["convnet"]))
        act(Dash(), networks)
        results.append(networks.weights)
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-9, atol=1e-12)


def test_parts_without_examples_change_nothing() -> None:
    results = []
    for arrivals in ((5, 7), (5, 0, 7, 0)):
        networks = one(BUILDS["mlp"])
        act(Dash(), networks, arrivals)
        results.append(networks.weights)
    assert all(torch.equal(weight, results[1][name]) for name, weight in results[0].items())


def test_alignment_has_one_number_per_row_kernel_or_bias() -> None:
    weight = torch.randn(4, 3, 2, 2)
    assert alignment(torch.randn_like(weight), weight).shape == (4, 3, 1, 1)
    assert alignment(torch.randn(4, 3), torch.randn(4, 3)).shape == (4, 1)
    assert alignment(torch.randn(4), torch.randn(4)).shape == (1,)
    torch.testing.assert_close(alignment(1e-12 * weight, weight), torch.ones(4, 3, 1, 1))
    torch.testing.assert_close(alignment(-weight, weight), -torch.ones(4, 3, 1, 1))


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"alpha": 1.1}, {"lam": -0.1}, {"lam": 1.1}, {"alpha": float("nan")}]
)
def test_settings_of_dash_outside_their_bounds_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="0 < alpha <= 1 and 0 <= lam <= 1"):
        Dash(**settings)


@each_remedy
@each_stable_build
def test_many_networks_train_as_each_alone(remedy: Remedy, build) -> None:
    assert_many_train_as_each_alone(remedy, build)


@each_remedy
@each_build
def test_networks_do_not_see_each_other(remedy: Remedy, build) -> None:
    assert_networks_do_not_see_each_other(remedy, build)


@each_remedy
def test_what_the_optimizer_remembers_stays(remedy: Remedy) -> None:
    for networks in kinds(BUILDS["mlp"]):
        learn(networks, tasks_for(networks))
        networks.optimizer.step()
        before = {name: [m.clone() for m in networks.moments(name)] for name in networks.weights}
        assert all(before.values())
        act(remedy, networks)
        for name, moments in before.items():
            assert all(torch.equal(m, now) for m, now in zip(moments, networks.moments(name), strict=True))
