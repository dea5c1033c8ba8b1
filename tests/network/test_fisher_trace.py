"""The trace of the true Fisher against sums over labels, dense Jacobians and the trace of the Gauss-Newton matrix, in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.network import example_gradients
from plasticity_probe.network.curvature import ggn
from plasticity_probe.network.example_gradients import Route, route_of
from plasticity_probe.network.fisher_trace import fisher_trace, fisher_trace_passes
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject


class Tokens(nn.Module):
    """Scores of 3 classes for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 4), nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids))[0])


class Branching(nn.Module):
    """What torch.func cannot vectorise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.a(row) if row.sum() > 0 else self.b(row) for row in x])


def conv_net(outputs: int = 3) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs),
    )  # fmt: skip
    with torch.no_grad():
        net.train()(torch.randn(30, 2, 6, 6))
    return net


def pixel_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1))


def ignoring(targets: Tensor) -> Tensor:
    """Some positions without a target, all of the first example among them."""
    changed = targets.clone()
    changed[0], changed[1, 0] = -100, -100
    return changed


def ragged(x: Tensor, y: Tensor) -> list[Any]:
    return [(x[:-1], y[:-1]), (x[-1:], y[-1:])]


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    columns: int

    def subject(self, **options: Any) -> Subject:
        torch.manual_seed(2)
        return subject(self.model(), self.batches(), **{"dtype": torch.float64, **options})


CASES = {
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
        lambda: ragged(torch.randn(9, 4), torch.randint(3, (9,))),
        3,
    ),
    "conv": Case(conv_net, lambda: ragged(torch.randn(7, 2, 6, 6), torch.randint(3, (7,))), 3),
    "regression": Case(lambda: conv_net(4), lambda: ragged(torch.randn(7, 2, 6, 6), torch.randn(7, 4)), 4),
    "regression, one output": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)),
        lambda: ragged(torch.randn(7, 4), torch.randn(7)),
        1,
    ),
    "tokens": Case(Tokens, lambda: ragged(torch.randint(7, (6, 5)), ignoring(torch.randint(3, (6, 5)))), 15),
    "pixels": Case(
        pixel_net, lambda: ragged(torch.randn(5, 2, 3, 3), ignoring(torch.randint(2, (5, 3, 3)))), 18
    ),
    "no vmap": Case(Branching, lambda: ragged(torch.randn(6, 3), torch.randint(2, (6,))), 2),
    "batches of different lengths": Case(
        Tokens,
        lambda: [(torch.randint(7, (4, 5)), torch.randint(3, (4, 5))), (torch.randint(7, (2, 6)), torch.randint(3, (2, 6)))],
        15,
    ),
    "mapping": Case(
        Tokens,
        lambda: [{"ids": torch.randint(7, (4, 5)), "labels": torch.randint(3, (4, 5))}],
        15,
    ),
}  # fmt: skip


def _one_by_one(made: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in made.examples.chunks(100):
        outputs = made.outputs(made.parameters, batch)
        yield from zip(outputs, batch["labels"] if isinstance(batch, dict) else batch[1], strict=True)


def summed_over_targets(made: Subject) -> float:
    """The mean over loss terms of the expected |gradient|^2, one label after the other, one autograd call each."""
    leaves, total = list(made.parameters.values()), 0.0

    def squared(value: Tensor) -> float:
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        return sum(float(part.square().sum()) for part in found)

    for outputs, targets in _one_by_one(made):
        if targets.is_floating_point():
            total += sum(2 / outputs.numel() * squared(output) for output in outputs.reshape(-1))
            continue
        scores = outputs.movedim(0, -1) if outputs.ndim == 3 else outputs
        for row, target in zip(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1), strict=True):
            for label, p in enumerate(row.softmax(-1).tolist()):
                total += p * squared(F.cross_entropy(row, torch.tensor(label))) if target != -100 else 0.0
    return total / made.terms


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_sum_over_targets_and_the_trace_of_the_gauss_newton_matrix(name: str) -> None:
    with isolated():
        made = CASES[name].subject()
        truth = summed_over_targets(made)
        found = fisher_trace(made, 20, torch.Generator())
        assert found.value == pytest.approx(truth, rel=1e-10)
        assert found.value == pytest.approx(float(to_dense(ggn(made)).trace()), rel=1e-9)
        assert found.standard_error == 0
        assert fisher_trace_passes(made, 20) == CASES[name].columns
        assert fisher_trace_passes(made, 1) == 1


NO_VMAP = {"no vmap", "tokens", "mapping", "batches of different lengths"}
"""Branches, and torch's own recurrent layers."""


@pytest.mark.parametrize(
    ("name", "way"), [(name, "loop") for name in CASES] + [(name, "vmap") for name in CASES if name not in NO_VMAP]
)
def test_every_way_to_the_gradients_gives_the_same(name: str, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated():
        made = CASES[name].subject()
        expected = fisher_trace(made, 20, torch.Generator()).value
        route = Route({}, way, route_of(made).kept, made.size)
        monkeypatch.setattr(example_gradients, "route_of", lambda _: route)
        assert fisher_trace(made, 20, torch.Generator()).value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].columns > 2])
def test_signs_estimate_it_with_an_honest_error(name: str) -> None:
    with isolated():
        made = CASES[name].subject()
        truth = fisher_trace(made, 20, torch.Generator()).value
        draws = 2 if CASES[name].columns < 5 else 8
        found = [fisher_trace(made, draws, torch.Generator().manual_seed(seed)) for seed in range(60)]
    values = torch.tensor([each.value for each in found], dtype=torch.float64)
    errors = torch.tensor([each.standard_error for each in found], dtype=torch.float64)
    spread = float(values.std())
    assert spread > 0
    assert abs(float(values.mean()) - truth) < 4 * spread / 60**0.5
    assert float(errors.square().mean().sqrt()) == pytest.approx(spread, rel=0.5)


def test_a_draw_depends_on_the_generator_alone() -> None:
    with isolated():
        torch.manual_seed(2)
        model, batches = Tokens(), ragged(torch.randint(7, (30, 5)), torch.randint(3, (30, 5)))
        plenty = subject(model, batches, dtype=torch.float64)
        little = subject(model, batches, dtype=torch.float64, memory=60_000)
        one, same = (fisher_trace(plenty, 3, torch.Generator().manual_seed(5)) for _ in range(2))
        other = fisher_trace(plenty, 3, torch.Generator().manual_seed(6))
        pieces = fisher_trace(little, 3, torch.Generator().manual_seed(5))
        single = fisher_trace(plenty, 1, torch.Generator())
        assert example_gradients.route_of(little).numbers
    assert one == same != other
    assert pieces.value == pytest.approx(one.value, rel=1e-10)
    assert pieces.standard_error == pytest.approx(one.standard_error, rel=1e-8)
    assert single.standard_error != single.standard_error


def test_where_the_network_is_sure_signs_see_what_drawn_labels_miss() -> None:
    with isolated():
        torch.manual_seed(2)
        model = nn.Linear(6, 12)
        with torch.no_grad():
            model.bias[0] = 12.0
        made = subject(model, [(torch.randn(40, 6), torch.randint(12, (40,)))], dtype=torch.float64)
        truth = fisher_trace(made, 12, torch.Generator()).value
        found = fisher_trace(made, 10, torch.Generator())
        batch = next(iter(made.examples.chunks(40)))
        p = made.outputs(made.parameters, batch).softmax(-1).detach()
    assert abs(found.value - truth) < 4 * found.standard_error < 0.2 * truth
    labels = torch.multinomial(p, 10, replacement=True)
    norms = batch[0].square().sum(1, keepdim=True) + 1
    drawn = norms[:, None] * (F.one_hot(labels, 12) - p[:, None]).square().sum(-1, keepdim=True)
    assert float(drawn.mean()) < 0.1 * truth


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_regression_at_any_scale_of_the_outputs(scale: float) -> None:
    with isolated():
        torch.manual_seed(2)
        x = torch.randn(10, 4)
        model = nn.Linear(4, 3)
        with torch.no_grad():
            model.weight.mul_(scale)
        found = fisher_trace(subject(model, [(x, torch.randn(10, 3))]), 3, torch.Generator())
    assert found.value == pytest.approx(2 / 3 * 3 * float((x.square().sum(1) + 1).mean()), rel=1e-5)


def test_a_loss_that_was_given_and_coupled_examples_are_refused() -> None:
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    with isolated():
        given = subject(nn.Linear(4, 3), [(x, y)], loss=lambda model, batch: model(batch[0]).square().sum(1))
        with pytest.raises(SubjectError, match="loss=None"):
            fisher_trace(given, 3, torch.Generator())
        assert fisher_trace_passes(given, 3) == 0
        coupled = subject(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), [(x, y)], mode="train")
        with pytest.raises(SubjectError, match="mode='eval'"):
            fisher_trace(coupled, 3, torch.Generator())


def test_without_any_target_it_is_unknown() -> None:
    with isolated():
        made = subject(Tokens(), [(torch.randint(7, (2, 5)), torch.full((2, 5), -100))])
        found = fisher_trace(made, 20, torch.Generator())
    assert found.value != found.value
