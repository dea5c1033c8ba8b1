"""Readiness against dense per-example gradients, all mini-batches one by one, and cases that are solved by hand."""

import math
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticity_probe as probe
from plasticity_probe.errors import SubjectError, UsageError
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.measurement import Status, headlines, schema
from plasticity_probe.network.curvature import true_fisher
from plasticity_probe.network.gradients import gram
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject
from plasticity_probe.planning import memory_of
from plasticity_probe.probes.readiness import OptimizationReadiness, Readiness, batch_squared_norm, readiness
from plasticity_probe.testing import check_probe, linear_regression, softmax_regression

Loader = list[Any]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def conv_net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.Tanh(), nn.Dropout(),
        nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip
    with torch.no_grad():
        net.train()(torch.randn(40, 2, 6, 6))
    return net


class Words(nn.Module):
    """Scores of 4 classes for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 3), nn.Linear(3, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh())


class Point(nn.Module):
    """One weight w, whose output is w whatever the input."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value]))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), 1)


def rows(count: int = 12, width: int = 5, classes: int = 3) -> Loader:
    return [(torch.randn(count, width), torch.randint(0, classes, (count,)))]


def sequences(count: int = 6) -> Loader:
    ids, labels = torch.randint(6, (count, 4)), torch.randint(4, (count, 4))
    for row in range(count):
        labels[row, 1 + row % 4 :] = -100
    return [(ids, labels)]


PROBLEMS: dict[str, Callable[[], tuple[nn.Module, Loader]]] = {
    "mlp": lambda: (mlp(), rows()),
    "conv": lambda: (conv_net(), [(torch.randn(9, 2, 6, 6), torch.randint(3, (9,)))]),
    "regression": lambda: (mlp(), [(torch.randn(9, 5), torch.randn(9, 3))]),
    "sequences": lambda: (Words(), sequences()),
}


def dense(made: Subject) -> Tensor:
    """The gradients of l_i = (N / loss terms) * (sum of the terms of example i) as rows, by one autograd call each."""
    (batch,) = made.examples.chunks(len(made.examples))
    sums, counts = made.losses(made.parameters, batch)
    leaves, scale = list(made.parameters.values()), len(sums) / counts.sum()
    each = [
        torch.autograd.grad(s * scale, leaves, retain_graph=True, materialize_grads=True, allow_unused=True)
        for s in sums
    ]
    return torch.stack([torch.cat([part.reshape(-1) for part in gradient]) for gradient in each])


def enumerated(gradients: Tensor, size: int) -> float:
    """The mean of |g_B|^2 over all mini-batches of a size, one after the other."""
    batches = list(combinations(range(len(gradients)), min(size, len(gradients))))
    return sum(float(gradients[list(batch)].mean(0).square().sum()) for batch in batches) / len(batches)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_against_dense_gradients(name: str, dtype: torch.dtype) -> None:
    model, loader = PROBLEMS[name]()
    found = readiness(model, loader, dtype=dtype, draws=20)
    with isolated():
        made = subject(model, loader, dtype=torch.float64)
        gradients, trace = dense(made), float(to_dense(true_fisher(made)).trace())
    mean = gradients.mean(0)
    squared, batch = float(mean.square().sum()), enumerated(gradients, 4)
    varies = gradients.std(0) > 1e-12
    close = 1e-4 if dtype is torch.float32 else 1e-9
    assert (found.status, found.message) == (Status.OK, "")
    assert found.loss == pytest.approx(made.mean_loss, rel=close)
    assert found.squared_norm == pytest.approx(squared, rel=close)
    assert found.batch_squared_norm == pytest.approx(batch, rel=close)
    assert found.strength == pytest.approx(squared / made.mean_loss, rel=close)
    assert found.reliability == pytest.approx(squared / batch, rel=close)
    assert found.optimization_readiness == pytest.approx(squared**2 / (made.mean_loss * batch), rel=close)
    assert found.gradient_signal_to_noise == pytest.approx(
        float((mean.abs() / gradients.std(0))[varies].mean()), rel=close
    )
    assert found.zero_gradient_fraction == pytest.approx(float((gradients == 0).all(0).double().mean()))
    assert found.local_redundancy == pytest.approx(trace, rel=close)
    assert found.local_redundancy_sem == 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_expectation_over_batches_is_that_of_all_batches(name: str) -> None:
    model, loader = PROBLEMS[name]()
    with isolated():
        made = subject(model, loader, dtype=torch.float64, examples=7)
        gradients = dense(made)
    count = len(gradients)
    for size in range(1, count + 2):
        found = readiness(model, loader, dtype=torch.float64, examples=7, batch=size)
        assert found.batch_squared_norm == pytest.approx(enumerated(gradients, size), rel=1e-10)
        assert ("no more than one batch" in found.message) == (size >= count)
    assert found.reliability == pytest.approx(1, rel=1e-12)


def test_with_replacement_or_with_the_unbiased_covariance_it_would_be_another_number() -> None:
    model, loader = mlp(), rows(5)
    with isolated():
        gradients = dense(subject(model, loader, dtype=torch.float64))
    truth = enumerated(gradients, 4)
    found = readiness(model, loader, dtype=torch.float64).batch_squared_norm
    squared, covariance = float(gradients.mean(0).square().sum()), float((gradients - gradients.mean(0)).square().sum())
    tuples = [gradients[list(chosen)].mean(0).square().sum() for chosen in product(range(5), repeat=4)]
    replaced = squared + covariance / 5 / 4
    assert replaced == pytest.approx(float(torch.stack(tuples).mean()), rel=1e-10)
    assert found == pytest.approx(truth, rel=1e-10)
    assert abs(replaced - truth) > 0.1 * truth
    assert abs(squared + covariance / 4 / 4 * (5 - 4) / (5 - 1) - truth) > 0.001 * truth


def test_a_batch_divided_by_its_own_tokens_would_be_another_number() -> None:
    model, loader = Words(), sequences()
    found = readiness(model, loader, dtype=torch.float64)
    with isolated():
        made = subject(model, loader, dtype=torch.float64)
        (batch,) = made.examples.chunks(6)
        counts = made.losses(made.parameters, batch)[1]
        gradients = dense(made) * counts.sum() / len(counts)
    own = [
        (gradients[list(chosen)].sum(0) / counts[list(chosen)].sum()).square().sum()
        for chosen in combinations(range(6), 4)
    ]
    assert abs(float(torch.stack(own).mean()) - found.batch_squared_norm) > 0.01 * found.batch_squared_norm


def test_a_single_weight_by_hand() -> None:
    # The outputs are 0 and the targets 1 and 3, so g_i = 2 (0 - t) is -2 and -6, and the losses are 1 and 9.
    loader = [(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]))]
    found = readiness(Point(), loader, dtype=torch.float64, batch=1)
    assert found.loss == 5
    assert found.squared_norm == 16
    assert found.batch_squared_norm == (4 + 36) / 2
    assert found.strength == pytest.approx(16 / 5, rel=1e-14)
    assert found.reliability == pytest.approx(0.8, rel=1e-14)
    assert found.optimization_readiness == pytest.approx(2.56, rel=1e-14)
    assert found.gradient_signal_to_noise == pytest.approx(4 / math.sqrt(8), rel=1e-12)
    assert found.zero_gradient_fraction == 0
    # The Jacobian is 1 and D = 1, so targets have the variance 1/2 and the gradient 2 (w - t) the variance 4/2.
    assert found.local_redundancy == pytest.approx(2, rel=1e-14)
    whole = readiness(Point(), loader, dtype=torch.float64)
    assert (whole.reliability, whole.batch_squared_norm) == (1, 16)
    assert "2 examples make no more than one batch of 4" in whole.message


def test_linear_regression_in_closed_form() -> None:
    made, hessian = linear_regression()
    found = OptimizationReadiness().measure(made, torch.Generator())
    (batch,) = (chunk for chunk in made.examples.chunks(33))
    x, y = batch
    errors = 2 * (x @ made.parameters["weight"].detach().T - y) * x
    squared, covariance = float(errors.mean(0).square().sum()), float((errors - errors.mean(0)).square().sum() / 33)
    assert found.reliability == pytest.approx(squared / (squared + covariance / 4 * 29 / 32), rel=1e-12)
    assert found.local_redundancy == pytest.approx(float(hessian.trace()), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_what_a_factor_of_the_loss_does(scale: float) -> None:
    def loss(model: nn.Module, batch: Any, factor: float) -> Tensor:
        return factor * F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model, loader = mlp(), rows()
    one = readiness(model, loader, loss=lambda m, b: loss(m, b, 1.0))
    scaled = readiness(model, loader, loss=lambda m, b: loss(m, b, scale))
    powers = {"loss": 1, "strength": 1, "optimization_readiness": 1, "squared_norm": 2, "batch_squared_norm": 2}
    for name in [field.name for field in schema(Readiness) if not field.name.startswith("local_redundancy")]:
        factor = scale ** powers.get(name, 0)
        assert getattr(scaled, name) == pytest.approx(factor * getattr(one, name), rel=1e-4), name


def test_local_redundancy_does_not_look_at_targets() -> None:
    model, ((x, y),) = mlp(), rows()
    one, other = (readiness(model, [(x, labels)], dtype=torch.float64) for labels in (y, (y + 1) % 3))
    assert one.local_redundancy == other.local_redundancy
    assert one.strength != other.strength


def test_many_classes_are_estimated_with_a_standard_error() -> None:
    model, loader = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 30)), rows(40, classes=30)
    truth = readiness(model, loader, draws=30)
    found = readiness(model, loader)
    assert truth.local_redundancy_sem == 0
    assert 0 < found.local_redundancy_sem < 0.1 * truth.local_redundancy
    assert abs(found.local_redundancy - truth.local_redundancy) < 4 * found.local_redundancy_sem
    assert readiness(model, loader).local_redundancy == found.local_redundancy
    assert readiness(model, loader, seed=1).local_redundancy != found.local_redundancy
    assert math.isnan(readiness(model, loader, draws=1).local_redundancy_sem)


def test_a_loss_that_was_given_has_no_local_redundancy() -> None:
    model, loader = mlp(), rows()
    expected = readiness(model, loader)
    found = readiness(model, loader, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    assert found.status is Status.OK
    assert "local_redundancy is NaN" in found.message
    assert math.isnan(found.local_redundancy)
    assert math.isnan(found.local_redundancy_sem)
    assert found.optimization_readiness == pytest.approx(expected.optimization_readiness, rel=1e-5)
    assert found.gradient_signal_to_noise == pytest.approx(expected.gradient_signal_to_noise, rel=1e-5)


def test_a_loader_is_cut_where_it_likes() -> None:
    x, y = torch.randn(33, 5), torch.randint(0, 3, (33,))
    model = mlp()
    whole = readiness(model, [(x, y)], dtype=torch.float64)
    for other in (
        readiness(model, [(x[:32], y[:32]), (x[32:], y[32:])], dtype=torch.float64),
        readiness(model, [(x, y)], dtype=torch.float64, memory=10_000),
        readiness(model, [(x, y)], dtype=torch.float64, mode="train"),
    ):
        for field in schema(Readiness):
            assert getattr(other, field.name) == pytest.approx(getattr(whole, field.name), rel=1e-9), field.name


def test_the_same_examples_as_the_gram_matrix_give_the_same_norms() -> None:
    model, loader = conv_net(), [(torch.randn(20, 2, 6, 6), torch.randint(3, (20,)))]
    found = readiness(model, loader, batch=1, dtype=torch.float64)
    with isolated():
        products = gram(subject(model, loader, dtype=torch.float64))
    assert found.squared_norm == pytest.approx(float(products.mean()), rel=1e-10)
    assert found.batch_squared_norm == pytest.approx(float(products.trace() / 20), rel=1e-10)


def test_parameters_without_gradient_are_counted_and_left_out() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0.0, -1.0
    found = readiness(model, rows(50), dtype=torch.float64)
    assert found.zero_gradient_fraction == pytest.approx((5 + 1 + 3) / (20 + 4 + 12 + 3))
    alive = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        alive[0].weight.copy_(model[0].weight[1:])
        alive[0].bias.copy_(model[0].bias[1:])
        alive[2].weight.copy_(model[2].weight[:, 1:])
        alive[2].bias.copy_(model[2].bias)
    torch.manual_seed(1)
    loader = rows(50)
    without, within = (readiness(net, loader, dtype=torch.float64) for net in (alive, model))
    assert within.gradient_signal_to_noise == pytest.approx(without.gradient_signal_to_noise, rel=1e-10)
    assert without.zero_gradient_fraction == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_without_noise_has_no_ratio(dtype: torch.dtype) -> None:
    # The loss is the first output, whose bias has the gradient 1 on every example, and those of the others 0.
    model, loader = nn.Linear(5, 3), rows()
    found = readiness(model, loader, loss=lambda m, b: m(b[0])[:, 0] + 10, dtype=dtype)
    x = loader[0][0].double()
    assert "1 of 18 parameters have one and the same gradient on every example" in found.message
    assert found.gradient_signal_to_noise == pytest.approx(float((x.mean(0).abs() / x.std(0)).mean()), rel=1e-5)
    assert found.zero_gradient_fraction == pytest.approx(12 / 18)
    copies = readiness(mlp(), [(x[:1].float().repeat(9, 1), torch.zeros(9, dtype=torch.int64))], dtype=dtype)
    assert math.isnan(copies.gradient_signal_to_noise)
    assert copies.reliability == pytest.approx(1, rel=1e-6)


def test_noise_alone_gives_the_floor_that_the_docstring_states() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4000))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    found = readiness(Sum(), [(torch.randn(64, 4000),)], loss=lambda m, b: m(b[0]) + 1)
    assert found.gradient_signal_to_noise == pytest.approx(math.sqrt(2 / (math.pi * 64)), rel=0.05)
    assert found.reliability == pytest.approx(4 / 64, rel=0.1)


def test_no_gradient_and_no_loss_are_zero() -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    x = torch.randn(6, 3)
    fitted = readiness(model, [(x, torch.zeros(6, 1))])
    assert fitted.status is Status.OK
    assert (fitted.optimization_readiness, fitted.strength, fitted.reliability, fitted.loss) == (0, 0, 0, 0)
    assert math.isnan(fitted.gradient_signal_to_noise)
    assert fitted.zero_gradient_fraction == 1
    assert fitted.local_redundancy == pytest.approx(float(2 * x.square().sum(1).mean()), rel=1e-5)
    assert "exactly zero" in fitted.message
    # Examples that pull in opposite directions: noise, and no signal at all.
    balanced = readiness(Point(), [(torch.zeros(6, 1), torch.tensor([[1.0], [-1.0]] * 3))])
    assert (balanced.optimization_readiness, balanced.strength, balanced.reliability) == (0, 0, 0)
    assert balanced.gradient_signal_to_noise == 0
    assert balanced.batch_squared_norm == pytest.approx(4 / 4 * 2 / 5)
    nothing = readiness(nn.Linear(3, 1), [(x,)], loss=lambda m, b: m(b[0])[:, 0] - m(b[0])[:, 0].detach())
    assert (nothing.loss, nothing.strength, nothing.optimization_readiness) == (0, 0, 0)
    assert nothing.reliability > 0


def test_a_negative_loss_has_no_relative_progress() -> None:
    found = readiness(nn.Linear(5, 1), rows(), loss=lambda m, b: m(b[0])[:, 0] - 100)
    assert found.status is Status.OK
    assert "mean loss is negative" in found.message
    assert math.isnan(found.strength)
    assert math.isnan(found.optimization_readiness)
    assert 0 < found.reliability < 1


def test_one_example_has_no_noise() -> None:
    found = readiness(mlp(), rows(1))
    assert found.status is Status.OK
    assert found.reliability == 1
    assert found.optimization_readiness == found.strength > 0
    assert math.isnan(found.gradient_signal_to_noise)
    assert "One example has no spread" in found.message


def test_broken_weights_losses_and_labels_are_a_status() -> None:
    broken = mlp()
    with torch.no_grad():
        broken[0].weight[0, 0] = math.nan
    unlabelled = (Words(), [(torch.randint(6, (3, 4)), torch.full((3, 4), -100))])
    for model, loader in ((broken, rows()), unlabelled):
        found = readiness(model, loader)
        assert found.status is Status.NONFINITE
        assert "no example has a loss term" in found.message
        assert all(math.isnan(getattr(found, field.name)) for field in schema(Readiness))
    infinite = readiness(mlp(), rows(), loss=lambda m, b: m(b[0])[:, 0] + math.inf)
    assert infinite.status is Status.NONFINITE
    assert "mean loss is not finite" in infinite.message
    assert math.isnan(infinite.optimization_readiness)
    huge = mlp()
    with torch.no_grad():
        huge[2].weight.fill_(1e38)
        huge[0].weight.zero_()
    overflowing = readiness(huge, [(torch.randn(12, 5), torch.zeros(12, 3))])
    assert overflowing.status is Status.NONFINITE


def test_what_has_no_gradient_of_its_own_is_refused() -> None:
    with pytest.raises(SubjectError, match="mode='eval'"):
        readiness(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), rows(), mode="train")
    with pytest.raises(SubjectError, match="frozen"):
        readiness(mlp().requires_grad_(False), rows())


def test_frozen_parameters_are_constants() -> None:
    model, loader = mlp(), rows()
    model[0].requires_grad_(False)
    found = readiness(model, loader, dtype=torch.float64)
    with isolated():
        made = subject(model, loader, dtype=torch.float64)
        assert found.squared_norm == pytest.approx(float(dense(made).mean(0).square().sum()), rel=1e-10)
    assert found.conditions.parameters == 8 * 3 + 3


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_contract_of_probes(name: str) -> None:
    with isolated():
        made = subject(*PROBLEMS[name]())
    check_probe(OptimizationReadiness(draws=2), made)


def test_cost_counts_the_passes_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = softmax_regression()
    asked = OptimizationReadiness(examples=20)
    cost = asked.cost(made)
    assert (cost.forwards, cost.gradients, cost.products, cost.vectors) == (20, 20 * (1 + 3), 0, 0)
    assert OptimizationReadiness(draws=2).cost(made).gradients == 40 * (1 + 2)
    assert memory_of(asked, made) > 0
    passed: list[int] = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **s: (passed.append(1), real(*a, **s))[1])
    asked.cost(made)
    passed.clear()
    asked.measure(made, torch.Generator())
    assert len(passed) == 1 + 3


def test_settings_below_one_are_refused() -> None:
    for settings in ({"batch": 0}, {"draws": 0}, {"examples": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            OptimizationReadiness(**settings)


def test_it_is_public_and_shows_its_numbers() -> None:
    found = probe.readiness(mlp(), rows())
    assert isinstance(found, probe.Readiness)
    assert [line.name for line in headlines(found)] == [
        "optimization_readiness",
        "strength",
        "reliability",
        "gradient_signal_to_noise",
        "zero_gradient_fraction",
        "local_redundancy",
    ]


def test_the_closed_form_is_between_signal_and_single_examples() -> None:
    assert batch_squared_norm(1.0, 5.0, 10, 1) == 5.0
    assert batch_squared_norm(1.0, 5.0, 10, 10) == batch_squared_norm(1.0, 5.0, 10, 99) == 1.0
    assert batch_squared_norm(1.0, 5.0, 10, 4) == pytest.approx(1 + 4 / 4 * 6 / 9)
    assert batch_squared_norm(1.0, 1.0, 1, 4) == 1.0
