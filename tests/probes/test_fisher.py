import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError, UnknownNameError, UsageError
from plasticity_probe.linalg.ranks import DEFINITIONS
from plasticity_probe.measurement import Status, headlines
from plasticity_probe.network.subject import subject
from plasticity_probe.probes.fisher import FisherRank, fisher_eigenvalues, fisher_rank, noise_floor

RELATIVE = {torch.float32: 1e-3, torch.float64: 1e-6}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def ragged(x: Tensor, y: Tensor) -> list[Any]:
    return [(x[:-1], y[:-1]), (x[-1:], y[-1:])]


def dense_fisher(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """F = (1/N) sum g g' in float64, by one autograd call per example."""
    model = model.double()
    total: Any = 0
    for row, target in zip(x.double(), y, strict=True):
        loss = F.cross_entropy(model(row[None]), target[None])
        g = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(model.parameters()))])
        total = total + g.outer(g) / len(x)
    return total


@pytest.mark.parametrize("dtype", RELATIVE)
def test_eigenvalues_are_those_of_the_dense_fisher(dtype: torch.dtype) -> None:
    x, y = torch.randn(33, 4), torch.randint(3, (33,))
    model = mlp()
    measured = fisher_rank(model, ragged(x, y), dtype=dtype)
    exact = torch.linalg.eigvalsh(dense_fisher(model, x, y)).flip(0)[:33]
    assert (measured.eigenvalues - exact).abs().max() <= RELATIVE[dtype] * exact[0]
    assert measured.status is Status.OK
    share = exact.cumsum(0) / exact.sum()
    assert float(measured) == measured.threshold_rank == int((share < 0.99).sum()) + 1
    shares = exact.clamp(min=1e-300) / exact.sum()
    assert measured.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=RELATIVE[dtype])
    assert measured.stable_rank == pytest.approx(float((exact**2).sum() / exact[0] ** 2), rel=RELATIVE[dtype])
    assert measured.participation_ratio == pytest.approx(
        float(exact.sum() ** 2 / (exact**2).sum()), rel=RELATIVE[dtype]
    )
    assert measured.interval == (measured.value, measured.value)


def test_wrong_fishers_have_other_ranks() -> None:
    x, y = torch.randn(33, 4), torch.randint(3, (33,))
    model = mlp()
    right = fisher_rank(model, ragged(x, y), dtype=torch.float64)
    made = subject(model, ragged(x, y), dtype=torch.float64)
    losses = made.losses(made.parameters, (x.double(), y))[0]
    batches = [losses[:32].mean(), losses[32:].mean()]
    leaves = list(made.parameters.values())
    of_batches = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, leaves, retain_graph=True)]) for loss in batches]
    )
    squared_means = fisher_eigenvalues(of_batches @ of_batches.T)
    assert len(squared_means) == 2 < right.threshold_rank
    each = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, leaves, retain_graph=True)]) for loss in losses]
    )
    centred = each - each.mean(0)
    assert not torch.allclose(fisher_eigenvalues(centred @ centred.T), right.eigenvalues, rtol=1e-2)
    unweighted = torch.linalg.eigvalsh((each[:32].T @ each[:32] / 32 + each[32:].T @ each[32:]) / 2).flip(0)[:33]
    assert not torch.allclose(unweighted, right.eigenvalues, rtol=1e-2)


def test_the_fisher_of_linear_regression_in_closed_form() -> None:
    x, y = torch.randn(20, 4), torch.randn(20, 1)
    model = nn.Linear(4, 1)
    with torch.no_grad():
        error = 2 * (model.double()(x.double()) - y)
    rows = error * torch.cat([x.double(), torch.ones(20, 1)], 1)
    expected = torch.linalg.eigvalsh(rows.T @ rows / 20).flip(0)
    measured = fisher_rank(model, [(x, y)], dtype=torch.float64)
    assert torch.allclose(measured.eigenvalues, expected, rtol=1e-9)
    assert (measured.ceiling, measured.numerical_rank) == (5, 5)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_planted_rank_is_found(dtype: torch.dtype, scale: float) -> None:
    factors = torch.linalg.qr(torch.randn(30, 30))[0][:, :3] @ torch.linalg.qr(torch.randn(12, 12))[0][:3]
    x, y = scale * factors, torch.randn(30, 1)
    measured = fisher_rank(nn.Linear(12, 1, bias=False), [(x, y)], dtype=dtype)
    assert measured.numerical_rank == 3
    assert (measured.ceiling, len(measured.eigenvalues)) == (12, 12)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_examples_seen_again_add_no_rank(dtype: torch.dtype) -> None:
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    model = mlp()
    once, often = (fisher_rank(model, ragged(x.repeat(k, 1), y.repeat(k)), dtype=dtype) for k in (1, 8))
    assert once.numerical_rank == often.numerical_rank == 5
    assert (once.ceiling, often.ceiling) == (5, 40)
    assert torch.allclose(once.eigenvalues, often.eigenvalues[:5], rtol=RELATIVE[dtype])
    assert once.value == often.value


@pytest.mark.parametrize("dtype", RELATIVE)
def test_rounding_of_products_stays_below_the_noise_floor(dtype: torch.dtype) -> None:
    """A convolution, whose gradients are formed and multiplied in their own precision, on few examples many times."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.Flatten(), nn.Linear(256, 4)
        )
        x, y = torch.randn(9, 3, 8, 8), torch.randint(4, (9,))
        # In an order in which equal examples meet others in every strip of the product.
        order = torch.randperm(270) % 9
        measured = fisher_rank(model, [(x[order], y[order])], dtype=dtype)
        assert measured.numerical_rank == 9
        floor = noise_floor(measured.eigenvalues, 270, dtype)
        assert float(measured.eigenvalues[9]) <= floor < float(measured.eigenvalues[8])


def test_the_ceiling_is_the_number_of_examples_or_of_parameters() -> None:
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    assert fisher_rank(mlp(), [(x, y)], examples=7).ceiling == 7
    measured = fisher_rank(nn.Linear(4, 3), [(x, y)])
    assert (measured.ceiling, len(measured.eigenvalues)) == (15, 15)
    assert (
        measured.numerical_rank == 10
    )  # softmax errors sum to zero over the classes, so each of 5 inputs gives 2 directions


def test_a_fitted_network_has_rank_zero() -> None:
    model = nn.Linear(4, 2)
    x = torch.randn(10, 4)
    measured = fisher_rank(model, [(x, model(x).detach())])
    ranks = ("value", "threshold_rank", "effective_rank", "stable_rank", "participation_ratio", "numerical_rank")
    assert [getattr(measured, name) for name in ranks] == [0] * 6
    assert measured.status is Status.OK
    assert not measured.eigenvalues.any()


def test_rank_does_not_depend_on_memory_or_order() -> None:
    x, y = torch.randn(33, 4), torch.randint(3, (33,))
    model = mlp()
    plenty = fisher_rank(model, ragged(x, y), dtype=torch.float64)
    little = fisher_rank(model, ragged(x, y), dtype=torch.float64, memory=70_000)
    turned = fisher_rank(model, ragged(x.flip(0), y.flip(0)), dtype=torch.float64)
    for other in (little, turned):
        assert torch.allclose(other.eigenvalues, plenty.eigenvalues, rtol=1e-9, atol=1e-15)


def test_a_batch_norm_network_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    model(x)
    measured = fisher_rank(model, [(x, y)], dtype=torch.float64)
    exact = torch.linalg.eigvalsh(dense_fisher(model.eval(), x, y)).flip(0)[:20]
    assert (measured.eigenvalues - exact).abs().max() <= 1e-9 * exact[0]
    with pytest.raises(SubjectError, match="mode='eval'"):
        fisher_rank(model, [(x, y)], mode="train")


def test_broken_weights_are_a_status() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    measured = fisher_rank(model, [(torch.randn(6, 4), torch.randint(3, (6,)))])
    assert measured.status is Status.NONFINITE
    assert "NaN or Inf" in measured.message
    assert measured.eigenvalues.isnan().all()
    assert math.isnan(float(measured))
    assert math.isnan(measured.numerical_rank)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_value_is_the_asked_definition(definition: str) -> None:
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    measured = fisher_rank(mlp(), [(x, y)], definition=definition, delta=0.1, epsilon=1e-2)
    values = measured.eigenvalues
    expected = {
        "energy_rank": int(((values**2).cumsum(0) < 0.9 * (values**2).sum()).sum()) + 1,
        "epsilon_rank": int((values > 1e-2).sum()),
    }
    assert measured.value == (expected[definition] if definition in expected else getattr(measured, definition))
    assert measured.definition == definition


def test_negative_eigenvalues_of_rounding_are_zero_and_below_the_noise() -> None:
    rows = torch.randn(30, 2, dtype=torch.float64)
    values = fisher_eigenvalues(rows @ rows.T)
    assert (values >= 0).all()
    floor = noise_floor(values, 30, torch.float64)
    assert int((values > floor).sum()) == 2
    assert noise_floor(values, 30, torch.float32) > floor


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="threshold_rank"):
        FisherRank(definition="threshhold_rank")
    with pytest.raises(UsageError, match="delta"):
        FisherRank(delta=1.0)
    with pytest.raises(UsageError, match="epsilon"):
        FisherRank(definition="epsilon_rank")
    with pytest.raises(UsageError, match="at least 1 example"):
        FisherRank(examples=0)


def test_a_matrix_that_does_not_fit_is_sketched_with_an_interval_that_holds() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(200, 3), torch.randint(2, (200,))
    exact = fisher_rank(model, [(x, y)], dtype=torch.float64, examples=200)
    for definition in DEFINITIONS:
        settings = {"definition": definition, "epsilon": 1e-3, "dtype": torch.float64, "examples": 200}
        truth = fisher_rank(model, [(x, y)], **settings)
        widths = []
        for memory in (5e4, 2e5):
            for seed in range(4):
                found = fisher_rank(model, [(x, y)], seed=seed, memory=int(memory), **settings)
                assert found.lower - 1e-6 <= truth.value <= found.upper + 1e-6
                assert found.lower - 1e-6 <= found.value <= found.upper + 1e-6
                assert "200 examples does not fit the memory" in found.message
                assert (
                    found.eigenvalues <= exact.eigenvalues[: len(found.eigenvalues)] + 1e-6 * exact.eigenvalues[0]
                ).all()
                widths.append(found.upper - found.lower)
        assert sum(widths[4:]) <= sum(widths[:4])


def test_a_sketch_that_leaves_too_much_out_says_so() -> None:
    x, y = torch.randn(100, 40), torch.randint(3, (100,))
    found = fisher_rank(nn.Linear(40, 3), [(x, y)], memory=30_000)
    assert found.status is Status.NOT_CONVERGED
    assert "allow more memory" in found.message
    assert found.lower < found.upper
    broken = nn.Linear(40, 3)
    with torch.no_grad():
        broken.weight.fill_(float("nan"))
    assert fisher_rank(broken, [(x, y)], memory=30_000).status is Status.NONFINITE


def test_what_a_sketch_costs_is_told_before() -> None:
    made = subject(mlp(), [(torch.randn(100, 4), torch.randint(3, (100,)))], memory=30_000)
    cost = FisherRank(examples=100).cost(made)
    assert cost.gradients == 100 + len(FisherRank(examples=100).measure(made, torch.Generator()).eigenvalues)
    assert cost.bytes <= made.memory


def test_cost_and_table() -> None:
    x, y = torch.randn(33, 4), torch.randint(3, (33,))
    made = subject(mlp(), ragged(x, y))
    cost = FisherRank(examples=20).cost(made)
    assert cost.gradients == 20
    assert cost.bytes >= 0
    measured = fisher_rank(mlp(), ragged(x, y))
    assert len(headlines(measured)) == 6
    assert measured.conditions.examples == 33
