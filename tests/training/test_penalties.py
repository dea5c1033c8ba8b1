import copy

import pytest
import torch
from remedy_cases import (
    BUILDS,
    SEEDS,
    adam,
    assert_many_train_as_each_alone,
    assert_networks_do_not_see_each_other,
    copied,
    in_double,
    kinds,
    learn,
    many,
    moved,
    one,
    tasks_of,
    trained,
)
from torch import Tensor

from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.errors import UsageError
from plasticity_probe.training.networks import Networks
from plasticity_probe.training.remedies.penalties import L2, L2Init, Penalty, Spectral, Wasserstein
from plasticity_probe.training.remedies.remedy import Memory

PENALTIES: dict[str, Penalty] = {
    "l2": L2(0.02),
    "l2-init": L2Init(0.02),
    "wasserstein": Wasserstein(0.02),
    "spectral": Spectral(0.02),
    "spectral of power 1": Spectral(0.02, power=1),
    "spectral of power 3": Spectral(0.02, power=3),
}
each_penalty = pytest.mark.parametrize("remedy", PENALTIES.values(), ids=PENALTIES.keys())
each_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


def added(remedy: Penalty, networks: Networks, memory: Memory) -> dict[str, Tensor]:
    """What the remedy adds to the gradients of a batch."""
    learn(networks, [tasks_of(seed)[0] for seed in networks.seeds])
    before = copied(networks.gradients)
    remedy.add_gradient(networks, memory)
    return {name: gradient - before[name] for name, gradient in networks.gradients.items()}


def by_autograd(remedy: Penalty, networks: Networks, memory: Memory) -> dict[str, Tensor]:
    leaves = {name: weight.clone().requires_grad_() for name, weight in networks.weights.items()}
    differentiable = copy.copy(networks)
    differentiable.weights = leaves
    penalty = remedy.penalty(differentiable, memory)
    assert penalty.shape == (len(networks.seeds),)
    found = torch.autograd.grad(penalty.sum(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def single(weight: list[list[float]], bias: list[float]) -> Networks:
    """A linear layer with these weights."""
    networks = one(in_double(lambda: MLP([len(weight[0]), len(weight)])))
    put(networks, weight, bias)
    return networks


def put(networks: Networks, weight: list[list[float]], bias: list[float]) -> None:
    networks.weights["layers.0.weight"].copy_(torch.tensor([weight]))
    networks.weights["layers.0.bias"].copy_(torch.tensor([bias]))
    for parameter in networks.trained:
        parameter.grad = torch.zeros_like(parameter)


@each_penalty
@each_build
def test_the_gradient_added_is_that_of_the_penalty(remedy: Penalty, build) -> None:
    for networks in kinds(in_double(build)):
        memory = remedy.start(networks)
        moved(networks)
        expected = by_autograd(remedy, networks, memory)
        actual = added(remedy, networks, memory)
        assert actual.keys() == expected.keys()
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
        assert max(gradient.abs().max() for gradient in actual.values()) > 1e-3


def test_l2_of_two_numbers_by_hand() -> None:
    networks = single([[2.0]], [-1.0])
    assert L2(0.5).penalty(networks, {}).tolist() == [2.5]
    L2(0.5).add_gradient(networks, {})
    assert networks.gradients["layers.0.weight"].item() == 2
    assert networks.gradients["layers.0.bias"].item() == -1


def test_l2_init_of_two_numbers_by_hand() -> None:
    networks = single([[2.0]], [-1.0])
    memory = L2Init(0.5).start(networks)
    assert L2Init(0.5).penalty(networks, memory).tolist() == [0]
    put(networks, [[5.0]], [0.0])
    assert L2Init(0.5).penalty(networks, memory).tolist() == [5]
    L2Init(0.5).add_gradient(networks, memory)
    assert networks.gradients["layers.0.weight"].item() == 3
    assert networks.gradients["layers.0.bias"].item() == 1


def test_wasserstein_compares_values_of_equal_rank_by_hand() -> None:
    networks = single([[1.0, 2.0, 5.0]], [0.0])
    memory = Wasserstein(0.5).start(networks)
    put(networks, [[3.0, 1.0, 2.5]], [0.0])
    assert Wasserstein(0.5).penalty(networks, memory).tolist() == [0.5 * (0.25 + 4)]
    Wasserstein(0.5).add_gradient(networks, memory)
    assert networks.gradients["layers.0.weight"].tolist() == [[[-2.0, 0.0, 0.5]]]


def test_values_that_changed_places_cost_l2_init_something_and_wasserstein_nothing() -> None:
    for networks in kinds(BUILDS["mlp"]):
        memories = {remedy: remedy.start(networks) for remedy in (L2Init(), Wasserstein())}
        for weight in networks.weights.values():
            weight.copy_(weight.flatten(1).flip(1).view(weight.shape))
        assert (L2Init().penalty(networks, memories[L2Init()]) > 1e-3).all()
        assert (Wasserstein().penalty(networks, memories[Wasserstein()]) == 0).all()
        assert all(
            (gradient == 0).all() for gradient in added(Wasserstein(), networks, memories[Wasserstein()]).values()
        )


def test_wasserstein_keeps_the_values_of_networks_apart() -> None:
    networks = many(BUILDS["mlp"])
    memory = Wasserstein().start(networks)
    for weight in networks.weights.values():
        weight.copy_(weight.flip(0))
    assert (Wasserstein().penalty(networks, memory) > 1e-5).all()


def test_wasserstein_equals_l2_init_while_no_two_values_change_places() -> None:
    networks = one(in_double(BUILDS["convnet"]))
    memories = [remedy.start(networks) for remedy in (L2Init(), Wasserstein())]
    for weight in networks.weights.values():
        weight.mul_(1.7).add_(0.2)
    first, second = (r.penalty(networks, m) for r, m in zip((L2Init(), Wasserstein()), memories, strict=True))
    torch.testing.assert_close(first, second)


def test_spectral_of_a_diagonal_matrix_by_hand() -> None:
    networks = single([[3.0, 0.0], [0.0, 1.0]], [7.0, 7.0])
    remedy = Spectral(0.5)
    memory = remedy.start(networks)
    torch.testing.assert_close(remedy.penalty(networks, memory), torch.tensor([32.0], dtype=torch.float64))
    remedy.add_gradient(networks, memory)
    expected = torch.tensor([[[0.5 * 2 * 8 * 2 * 3, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(networks.gradients["layers.0.weight"], expected)
    assert (networks.gradients["layers.0.bias"] == 0).all()


def singular(networks: Networks, remedy: Spectral) -> Tensor:
    """The penalty by full decompositions."""
    matrices = [weight.flatten(2) for weight in networks.weights.values() if weight.ndim in (3, 5)]
    norms = [torch.linalg.svdvals(matrix)[:, 0] for matrix in matrices]
    return remedy.coefficient * sum((norm**remedy.power - 1).square() for norm in norms)


@each_build
def test_spectral_norms_start_exact_and_converge_to_those_of_changed_weights(build) -> None:
    remedy = Spectral(0.02)
    for networks in kinds(in_double(build)):
        memory = remedy.start(networks)
        torch.testing.assert_close(remedy.penalty(networks, memory), singular(networks, remedy))
        moved(networks)
        exact = singular(networks, remedy)
        assert ((remedy.penalty(networks, memory) - exact).abs() > 1e-3 * exact).all()
        added(remedy, networks, memory)
        for _ in range(300):
            remedy.add_gradient(networks, memory)
        torch.testing.assert_close(remedy.penalty(networks, memory), exact, rtol=1e-6, atol=0)


def test_spectral_needs_no_more_than_one_power_iteration_an_update_to_follow_training() -> None:
    networks = many(in_double(BUILDS["mlp"]), optimizer=adam)
    remedy = Spectral()
    memory = trained(networks, remedy, [tasks_of(seed) for seed in SEEDS])
    torch.testing.assert_close(remedy.penalty(networks, memory), singular(networks, remedy), rtol=0.05, atol=0)


def test_spectral_recovers_from_a_matrix_of_zeros() -> None:
    networks = single([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0])
    remedy = Spectral(0.5)
    memory = remedy.start(networks)
    remedy.add_gradient(networks, memory)
    assert (networks.gradients["layers.0.weight"] == 0).all()
    put(networks, [[3.0, 1.0], [1.0, 2.0]], [0.0, 0.0])
    for _ in range(60):
        remedy.add_gradient(networks, memory)
    torch.testing.assert_close(remedy.penalty(networks, memory), singular(networks, remedy))


def test_spectral_pushes_a_small_norm_up_and_a_large_one_down() -> None:
    for size, sign in ((0.5, -1), (2.0, 1)):
        networks = single([[size]], [0.0])
        Spectral().add_gradient(networks, Spectral().start(networks))
        assert networks.gradients["layers.0.weight"].sign().item() == sign


@each_penalty
@each_build
def test_many_networks_train_as_each_alone(remedy: Penalty, build) -> None:
    assert_many_train_as_each_alone(remedy, build)


@each_penalty
def test_networks_do_not_see_each_other(remedy: Penalty) -> None:
    assert_networks_do_not_see_each_other(remedy, BUILDS["convnet"])


@each_penalty
def test_what_is_remembered_is_a_copy(remedy: Penalty) -> None:
    networks = one(BUILDS["mlp"])
    memory = remedy.start(networks)
    before = copied(memory)
    moved(networks)
    assert all(torch.equal(memory[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", [L2, L2Init, Wasserstein, Spectral])
@pytest.mark.parametrize("coefficient", [0.0, -1e-3, float("inf"), float("nan")])
def test_a_coefficient_must_be_a_positive_number(kind: type[Penalty], coefficient: float) -> None:
    with pytest.raises(UsageError, match=f"coefficient of {kind.name} must be a positive number, got {coefficient}"):
        kind(coefficient)  # type: ignore[call-arg]


def test_the_power_of_the_spectral_penalty_is_at_least_one() -> None:
    with pytest.raises(UsageError, match="power of spectral must be at least 1, got 0"):
        Spectral(power=0)


def test_a_network_without_matrices_is_refused_by_the_spectral_penalty() -> None:
    with pytest.raises(UsageError, match="needs linear layers or convolutions"):
        Spectral().start(one(lambda: torch.nn.LayerNorm(4)))
