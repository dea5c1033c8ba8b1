"""Situations in which other tools for curvature and plasticity were measured to fail, each with the right answer.

Every network and matrix is built here from scratch, every truth is a closed form or dense float64 linear algebra. What the others answered, in
versions of 2021 to 2026, stands in the docstrings.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticity_probe as probe
from plasticity_probe.errors import SubjectError
from plasticity_probe.linalg.lanczos import Eigenpairs, EigenStatus, extreme_eigenpairs
from plasticity_probe.linalg.operator import DenseOperator, columns
from plasticity_probe.measurement import Status
from plasticity_probe.network.curvature import ggn, hessian
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import subject
from plasticity_probe.probes.spectrum import Spectrum

Loader = list[tuple[Tensor, Tensor]]
LARGE = 700
"""More parameters than the package forms a matrix of, so that products are all it has."""


class Problem(NamedTuple):
    """A network, its data, and the Hessian of its mean loss in float64 with its eigenvalues, descending."""

    net: nn.Module
    loader: Loader
    matrix: Tensor
    eigenvalues: Tensor


class Point(nn.Module):
    """A single vector of weights."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weights)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(eigenvalues: list[float], size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A symmetric matrix with these eigenvalues and zeros, in random directions."""
    basis = torch.linalg.qr(torch.randn(size, len(eigenvalues), dtype=torch.float64))[0]
    matrix = (basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def quadratic_spectrum(matrix: Tensor, **settings: float) -> Spectrum:
    """The measured spectrum of the loss w' A w / 2, whose Hessian is A."""

    def loss(model: Point, batch: Tensor) -> Tensor:
        return 0.5 * (model.w @ (matrix @ model.w)) * torch.ones_like(batch)

    point = Point(torch.ones(len(matrix), dtype=matrix.dtype))
    return probe.hessian_spectrum(point, [torch.zeros(3)], loss=loss, **settings)


def integral(spectrum: Spectrum, grid: Tensor) -> float:
    return float(torch.trapezoid(spectrum.density(grid), grid))


def top(matrix: Tensor, k: int, dense_below: int = 0) -> Eigenpairs:
    return extreme_eigenpairs(DenseOperator(matrix), k, 0, generator=generator(), dense_below=dense_below).top


@cache
def dead_first_layer() -> Problem:
    """A ReLU network of 1893 parameters whose first hidden layer is silent on every example."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    with torch.no_grad():
        net.get_parameter("0.bias").fill_(-100.0)
    x, y = torch.randn(200, 20), torch.randint(0, 5, (200,))
    with isolated():
        matrix = columns(hessian(subject(net, [(x, y)], dtype=torch.float64)))
    assert len(matrix) == 1893
    return Problem(net, [(x, y)], matrix, torch.linalg.eigvalsh(matrix).flip(0))


def test_m1_a_last_batch_of_one_example_weighs_one_example():
    """Linear regression from a batch of 32 and one of 1: the Hessian is 2 X'X / 33.

    hessian-eigenthings averages the two batches equally and names a largest eigenvalue 3.9 times too large.
    """
    x, y = torch.randn(33, LARGE), torch.randn(33, 1)
    x[32] *= 10
    net = nn.Linear(LARGE, 1, bias=False)
    ragged = [(x[:32], y[:32]), (x[32:], y[32:])]
    exact = x.double()
    truth = float(torch.linalg.eigvalsh(2 * exact @ exact.T / 33)[-1])
    equally = float(torch.linalg.eigvalsh(exact[:32].T @ exact[:32] / 32 + exact[32:].T @ exact[32:])[-1])
    assert equally > 3 * truth
    for matrix in ("hessian", "ggn"):
        found = probe.hessian_spectrum(net, ragged, matrix=matrix, k=3, density=False)
        assert found.status is Status.OK
        assert float(found.top[0]) == pytest.approx(truth, rel=1e-5)
    each = 2 * (net(x) - y).detach().double() * exact
    fisher = probe.fisher_rank(net, ragged)
    assert float(fisher.eigenvalues[0]) == pytest.approx(float(torch.linalg.eigvalsh(each @ each.T / 33)[-1]), rel=1e-5)


@pytest.mark.parametrize(("size", "dense_below"), [(400, 512), (400, 0), (700, 512)])
@pytest.mark.parametrize("k", [8, 20])
def test_m2_a_matrix_of_rank_five_has_five_large_eigenvalues(size, dense_below, k):
    """Eigenvalues 5, 4, 3, 2, 1 and zeros in float32, 8 or 20 asked for.

    hessian-eigenthings gives 20 above 0.5 (phantoms such as 3.58 among them), TensorScope repeats 5 seven times, curvlinops holds 33 large Ritz
    values of 40.
    """
    found = top(with_spectrum([5, 4, 3, 2, 1], size), k, dense_below)
    assert found.status is EigenStatus.OK
    torch.testing.assert_close(found.values[:5], torch.tensor([5.0, 4, 3, 2, 1]).double(), rtol=1e-5, atol=0)
    assert int((found.values > 0.5).sum()) == 5
    assert (found.values[5:].abs() < 1e-4).all()


def test_m3_the_spectrum_of_a_network_with_a_dead_layer_has_its_multiplicities():
    """The twenty largest and smallest eigenvalues in float32, of which one occurs thirteen times at each end.

    On such a network hessian-eigenthings gives the largest nine times, the next nine times, the third twice, and marks 18 as converged.
    """
    problem = dead_first_layer()
    often = problem.eigenvalues[4]
    assert ((problem.eigenvalues[:20] - often).abs() < 1e-12).sum() == 13
    found = probe.hessian_spectrum(problem.net, problem.loader, k=20, examples=200, density=False)
    assert found.status is Status.OK
    noise = 1e-6 * float(problem.eigenvalues[0])
    torch.testing.assert_close(found.top, problem.eigenvalues[:20], rtol=1e-3, atol=noise)
    torch.testing.assert_close(found.bottom, problem.eigenvalues.flip(0)[:20], rtol=1e-3, atol=noise)
    assert (found.top_residuals <= 1e-3 * found.top).all()


@pytest.mark.parametrize("products", [30, 100, 200])
def test_m4_more_steps_do_not_raise_the_largest_eigenvalue_of_the_density(products):
    """The same network: no node of the density lies beyond the extreme eigenvalues.

    On such a network, whose largest eigenvalue is .34, PyHessian's grow with its steps: .54 after 30, 1.28 after 100, 1.60 after 200.
    """
    problem = dead_first_layer()
    found = probe.hessian_spectrum(problem.net, problem.loader, examples=200, accuracy=1e-9, density_products=products)
    largest = float(problem.eigenvalues[0])
    assert float(found.nodes.max()) <= largest * (1 + 1e-5)
    assert float(found.nodes.min()) >= float(problem.eigenvalues[-1]) * (1 + 1e-5)
    assert found.nodes.isfinite().all()
    beyond = found.density(torch.linspace(largest + 10 * found.bandwidth, 5 * largest, 200))
    assert float(beyond.max()) < 1e-12


def test_m5_the_share_of_large_eigenvalues_is_read_off_the_weights():
    """The same network: 38 of 1893 eigenvalues exceed 1 % of the largest.

    Counts of Ritz values, 98 with PyHessian, 50 with hessian-eigenthings, 91 with curvlinops, say nothing about it.
    """
    problem = dead_first_layer()
    cut = 0.01 * float(problem.eigenvalues.abs().max())
    assert int((problem.eigenvalues.abs() > cut).sum()) == 38
    spectra = [probe.hessian_spectrum(problem.net, problem.loader, examples=200, seed=seed) for seed in range(5)]
    shares = [float((found.weights * (found.nodes.abs() > cut)).sum(1).mean()) for found in spectra]
    assert 1893 * sum(shares) / 5 == pytest.approx(38, rel=0.2)
    ranks = [found.rank("epsilon_rank", epsilon=cut) for found in spectra]
    assert sum(float(rank) for rank in ranks) / 5 == pytest.approx(38, rel=0.2)
    missed = sum(not rank.lower <= 38 <= rank.upper for rank in ranks)
    assert missed <= 2, "three misses of five intervals that cover 95 % of the time happen once in a thousand"


@pytest.mark.parametrize("size", [40, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_m6_the_identity_has_all_its_ones(size, dtype):
    """Six eigenvalues of the identity, and its density. curvlinops raises at the density, as its range has no width."""
    found = top(torch.eye(size, dtype=dtype), 6)
    assert found.status is EigenStatus.OK
    torch.testing.assert_close(found.values, torch.ones(6).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(6, dtype=dtype), rtol=0, atol=1e-5)
    spectrum = quadratic_spectrum(torch.eye(size, dtype=dtype), k=6)
    assert spectrum.status is Status.OK
    torch.testing.assert_close(spectrum.nodes, torch.ones_like(spectrum.nodes), rtol=1e-5, atol=0)
    assert spectrum.matrix_trace == pytest.approx(size, abs=4 * spectrum.matrix_trace_sem + 1e-5 * size)
    assert float(spectrum.rank("effective_rank")) == pytest.approx(size, rel=1e-3)
    assert integral(spectrum, torch.linspace(0.5, 1.5, 4001)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("size", [40, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_m6_the_zero_matrix_has_zeros_and_rank_zero(size, dtype):
    """As many eigenvalues as asked for, all 0, and a density of integral 1.

    curvlinops gives NaN or the ARPACK error -9; hessian-eigenthings one value where six were asked for and an integral of .954.
    """
    found = top(torch.zeros(size, size, dtype=dtype), 6)
    assert found.status is EigenStatus.ZERO_OPERATOR
    assert found.values.tolist() == [0.0] * 6
    spectrum = quadratic_spectrum(torch.zeros(size, size, dtype=dtype), k=6)
    assert spectrum.status is Status.OK
    assert (spectrum.top == 0).all()
    assert (spectrum.bottom == 0).all()
    assert spectrum.top.shape == (6,)
    assert (spectrum.matrix_trace, spectrum.matrix_trace_sem) == (0.0, 0.0)
    assert float(spectrum.rank()) == 0.0
    assert spectrum.rank().interval == (0.0, 0.0)
    assert integral(spectrum, spectrum.grid(4001)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("k", [1, 10])
def test_m8_sixty_steps_on_a_matrix_of_rank_three(k):
    """Eigenvalues 1, .6 and .3 and zeros; far more steps than distinct eigenvalues.

    PyHessian finds a largest value of 2.78, 52 values that are not zero, and complex weights that sum to 1.10.
    """
    found = quadratic_spectrum(with_spectrum([1, 0.6, 0.3], LARGE), k=k, accuracy=1e-9, density_products=60)
    assert found.status is Status.OK
    assert float(found.top[0]) == pytest.approx(1, rel=1e-4)
    assert float(found.nodes.max()) <= 1 + 1e-4
    assert found.weights.dtype == torch.float64
    torch.testing.assert_close(found.weights.sum(1), torch.ones(len(found.weights)).double(), rtol=0, atol=1e-9)
    weighty = found.nodes[found.weights > 1e-9]
    off = torch.stack([(weighty - value).abs() for value in (1, 0.6, 0.3, 0)]).amin(0)
    assert float(off.max()) < 1e-4
    assert found.matrix_trace == pytest.approx(1.9, abs=4 * found.matrix_trace_sem + 1e-4)


def test_m9_eigenvalues_of_equal_size_and_opposite_sign():
    """Eigenvalues 1, -1 and .1. A power iteration stays in a mixture of the first two: PyHessian names .93 and -.93."""
    found = quadratic_spectrum(with_spectrum([1, -1, 0.1], LARGE), k=2)
    assert found.status is Status.OK
    assert found.top.tolist() == pytest.approx([1, 0.1], rel=1e-3)
    assert float(found.bottom[0]) == pytest.approx(-1, rel=1e-3)
    three = quadratic_spectrum(torch.diag(torch.tensor([1, -1, 0.1])), k=3)
    assert three.top.tolist() == pytest.approx([1, 0.1, -1], rel=1e-6)


def batch_norm_and_dropout() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    net(torch.randn(64, 6) * 3 + 1)
    return net


def state(net: nn.Module) -> dict[str, list[float]]:
    return {name: tensor.tolist() for name, tensor in net.state_dict().items()}


def test_m10_a_network_left_in_train_mode_is_measured_in_eval_mode_and_not_touched():
    """BatchNorm and dropout in train mode, as training left them.

    hessian-eigenthings measures so: running statistics move, and two products with one vector differ by 69 %, without a word.
    """
    net, loader = batch_norm_and_dropout(), [(torch.randn(33, 6), torch.randint(0, 3, (33,)))]
    assert net.training
    before = state(net)
    first, second = (probe.hessian_spectrum(net, loader) for _ in range(2))
    assert net.training
    assert state(net) == before
    assert first.conditions.mode == "eval"
    assert torch.equal(first.top, second.top)
    assert torch.equal(first.top, probe.hessian_spectrum(net.eval(), loader).top)
    assert first.matrix_trace == second.matrix_trace


def test_m10_dropout_in_train_mode_is_refused_and_batch_norm_measured():
    """Asked for train mode: dropout has no Hessian and is refused by name; batch statistics have one, and stay as they were."""
    net, loader = batch_norm_and_dropout(), [(torch.randn(33, 6), torch.randint(0, 3, (33,)))]
    before = state(net)
    with pytest.raises(SubjectError, match=r"dropout is active.*3"):
        probe.hessian_spectrum(net, loader, mode="train")
    assert state(net) == before
    net[3].p = 0.0  # type: ignore[index, assignment]
    found = probe.hessian_spectrum(net, loader, mode="train")
    assert found.conditions.mode == "train"
    assert state(net) == before
    assert float(found.top[0]) != pytest.approx(float(probe.hessian_spectrum(net, loader).top[0]), rel=1e-3)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_m11_the_gauss_newton_matrix_is_symmetric_and_positive_to_rounding(activation):
    """In float32, all columns.

    hessian-eigenthings' default takes finite differences: 1 % error, 1.5 % asymmetry, a smallest eigenvalue of -1e-4 of the largest.
    """
    net = nn.Sequential(nn.Linear(6, 12), activation(), nn.Linear(12, 12), activation(), nn.Linear(12, 3))
    loader = [(torch.randn(33, 6), torch.randint(0, 3, (33,)))]
    with isolated():
        found = columns(ggn(subject(net, loader))).double()
        truth = columns(ggn(subject(net, loader, dtype=torch.float64)))
    eps = torch.finfo(torch.float32).eps
    norm = float(torch.linalg.matrix_norm(truth, 2))
    assert float((found - truth).norm()) < 32 * eps * float(truth.norm())
    assert float((found - found.T).norm()) < 32 * eps * float(truth.norm())
    assert float(torch.linalg.eigvalsh((found + found.T) / 2)[0]) > -32 * eps * norm


def test_m13_the_hessian_is_that_of_the_loss_at_the_weights():
    """f(w) = w1^3 + w2^3 at w = (2, 3): H e1 = (12, 0), eigenvalues 18 and 12.

    HessFormer gives (6, 0): it puts the vector where the weights belong.
    """

    def cubes(model: Point, batch: Tensor) -> Tensor:
        return model.w.pow(3).sum() * torch.ones_like(batch)

    net, loader = Point(torch.tensor([2.0, 3.0])), [torch.zeros(4)]
    with isolated():
        product = hessian(subject(net, loader, loss=cubes)) @ torch.tensor([1.0, 0.0])
    assert product.tolist() == [12.0, 0.0]
    assert probe.hessian_spectrum(net, loader, loss=cubes, k=2).top.tolist() == pytest.approx([18, 12])


class Named(nn.Module):
    """Takes its inputs by name and has a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, features: Tensor) -> Tensor:
        return torch.tanh(self.used(features))


def test_m14_unused_parameters_and_mappings_are_measured_and_nothing_is_left_behind():
    """PyHessian crashes on both, leaves the model in eval mode and a graph in every gradient."""
    net, batch = Named(), {"features": torch.randn(9, 4), "labels": torch.randint(0, 3, (9,))}
    found = probe.hessian_spectrum(net, [batch], k=21)
    assert found.status is Status.OK
    assert found.top.shape == (21,)
    assert int((found.top.abs() < 1e-9).sum()) >= 6, "the unused parameters have no curvature"
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


class Silent(nn.Module):
    """A network that calls relu as a function, whose hidden layers are silent on every example where asked."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.bias.fill_(bias)
            self.second.bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def test_m15_a_layer_of_zeros_has_rank_zero():
    """Every hidden unit is dead: the features have rank 0 under every definition.

    loss-of-plasticity's and Plasticine's ranks of that matrix are 1.
    """
    loader = [(torch.randn(64, 5), torch.randint(0, 3, (64,)))]
    found = probe.feature_rank(Silent(-100.0), loader)
    assert found.status is Status.OK
    definitions = (
        "threshold_rank",
        "energy_rank",
        "effective_rank",
        "stable_rank",
        "participation_ratio",
        "numerical_rank",
    )
    for layer in found.layers:
        ranks = found.layer(layer)
        assert {name: getattr(ranks, name) for name in definitions} == dict.fromkeys(definitions, 0.0)
    assert found.penultimate.features == 8
    alive = probe.feature_rank(Silent(0.5), loader)
    assert all(alive.layer(layer).effective_rank > 1 for layer in alive.layers)


def test_m16_dead_units_are_seen_behind_a_functional_activation():
    """All hidden units are dead, and relu is a function. traintools sees no layer there and scores the network 1.0, healthy."""
    loader = [(torch.randn(64, 5), torch.randint(0, 3, (64,)))]
    found = probe.dead_units(Silent(-100.0), loader)
    assert found.dead_fraction.tolist() == [1.0, 1.0]
    assert found.units.tolist() == [16, 8]
    assert (found.total_dead_fraction, found.total_dormant_fraction) == (1.0, 1.0)
    assert probe.dead_units(Silent(0.5), loader).total_dead_fraction < 0.5


def double_network(hidden: int) -> tuple[nn.Module, Loader]:
    net = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()
    return net, [(torch.randn(33, 6, dtype=torch.float64), torch.randint(0, 3, (33,)))]


@pytest.mark.parametrize("hidden", [8, 80])
def test_m17_a_double_precision_network_gets_double_precision_numbers(hidden):
    """Eigenvalues, nodes and weights of a float64 network. PyHessian's density works in float32 and returns complex64 weights."""
    net, loader = double_network(hidden)
    with isolated():
        truth = torch.linalg.eigvalsh(columns(hessian(subject(net, loader)))).flip(0)
    found = probe.hessian_spectrum(net, loader, k=4, tol=1e-6)
    assert found.status is Status.OK
    assert found.conditions.dtype == "float64"
    assert found.nodes.dtype == found.weights.dtype == torch.float64
    torch.testing.assert_close(found.top, truth[:4], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.bottom, truth.flip(0)[:4], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(len(found.weights)).double(), rtol=0, atol=1e-12)
    if len(truth) < 512:
        torch.testing.assert_close(found.nodes[0].flip(0), truth, rtol=0, atol=1e-10 * float(truth[0]))
    else:
        single = torch.linalg.eigvalsh(with_single_precision(net, loader)).flip(0)
        assert float((single[:4] / truth[:4] - 1).abs().max()) > 1e-9, "float32 would be seen"


def with_single_precision(net: nn.Module, loader: Loader) -> Tensor:
    with isolated():
        return columns(hessian(subject(net, loader, dtype=torch.float32))).double()


def test_m18_every_node_has_one_weight_and_they_sum_to_one():
    """Linear regression with ten weights. Landscaper's weights are ten to a node and sum to 10, in complex64."""
    x = torch.randn(50, 10)
    found = probe.hessian_spectrum(nn.Linear(10, 1, bias=False), [(x, torch.randn(50, 1))])
    assert found.weights.shape == found.nodes.shape
    torch.testing.assert_close(found.weights.sum(1), torch.ones(len(found.weights)).double(), rtol=0, atol=1e-12)
    truth = torch.linalg.eigvalsh(2 * x.double().T @ x.double() / 50)
    assert float((found.weights * found.nodes).sum(1).mean()) == pytest.approx(float(truth.mean()), rel=1e-5)
    assert integral(found, found.grid(4001)) == pytest.approx(1, abs=1e-3)
