from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.example_gradients import example_gradients, route_of
from plasticity_probe.network.examples import map_tensors
from plasticity_probe.network.gradients import (
    covariance_trace,
    gradient_moments,
    gram,
    gram_plan,
    mean_cosine,
    mean_gradient,
    moments_bytes,
    negative_fraction,
    pairwise_cosines,
    per_example_gradients,
    squared_mean_norm,
)
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject

Judge = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A network, its batches, its loss written out by hand, and whether its gradients should be read off the graph."""

    model: Callable[[], nn.Module]
    batches: list[Any]
    judge: Judge
    read: bool = True
    given: bool = False

    def subject(self, **options: Any) -> Subject:
        torch.manual_seed(1)
        loss = self.judge if self.given else None
        return subject(self.model(), self.batches, loss=loss, **{"dtype": torch.float64, **options})


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0][:, -1])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.a(row) if row.sum() > 0 else self.b(row) for row in x])


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.head.bias.requires_grad_(False)
        self.unused = nn.Linear(3, 3)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.mix(self.embed(input_ids)))}


def conv_net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2, groups=1),
        nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        net.train()(torch.randn(50, 2, 8, 8))
    return net


def cross_entropy(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses, torch.ones_like(losses)


def squared_error(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    losses = ((model(batch[0]) - batch[1]) ** 2).mean(1)
    return losses, torch.ones_like(losses)


def tokens(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=batch["input_ids"])["logits"]
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=-100)
    return losses.view(batch["labels"].shape).sum(1), (batch["labels"] != -100).sum(1)


def whole_lists(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    targets, sequences = batch
    outputs = torch.cat([model(sequence).mean(0, keepdim=True) for sequence in sequences])
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses, torch.ones_like(losses)


def language_batches() -> list[Any]:
    ids = torch.randint(1, 7, (9, 5))
    labels = ids.roll(-1, 1)
    for row, kept in enumerate((5, 3, 0, 1, 4, 5, 2, 5, 5)):
        labels[row, kept:] = -100
    return [{"input_ids": ids[:8], "labels": labels[:8]}, {"input_ids": ids[8:], "labels": labels[8:]}]


def ragged(x: Tensor, y: Tensor) -> list[Any]:
    return [(x[:-1], y[:-1]), (x[-1:], y[-1:])]


torch.manual_seed(0)
CASES = {
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
        ragged(torch.randn(33, 4), torch.randint(3, (33,))),
        cross_entropy,
    ),
    "regression": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
        ragged(torch.randn(12, 4), torch.randn(12, 2)),
        squared_error,
    ),
    "conv": Case(conv_net, ragged(torch.randn(11, 2, 8, 8), torch.randint(3, (11,))), cross_entropy),
    "gru": Case(lambda: Recurrent(nn.GRU), ragged(torch.randn(9, 6, 3), torch.randint(2, (9,))), cross_entropy),
    "lstm": Case(lambda: Recurrent(nn.LSTM), ragged(torch.randn(9, 6, 3), torch.randint(2, (9,))), cross_entropy),
    "branching": Case(Branching, ragged(torch.randn(9, 3), torch.randint(2, (9,))), cross_entropy, read=False),
    "language": Case(TiedLanguageModel, language_batches(), tokens),
    "language, loss given": Case(TiedLanguageModel, language_batches(), tokens, given=True),
    "lists": Case(
        lambda: nn.Linear(3, 2),
        [
            (torch.randint(2, (len(lengths),)), [torch.randn(length, 3) for length in lengths])
            for lengths in ((4, 2), (3, 3, 1), (5,), (2, 2, 2))
        ],
        whole_lists,
        read=False,
        given=True,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with isolated():
        yield CASES[request.param]


def by_hand(case: Case, made: Subject) -> Tensor:
    """Per-example gradients in float64, one example and one parameter at a time, from the written-out loss."""
    model = made.model
    leaves = [p for p in model.parameters() if p.requires_grad]
    parts = []
    for batch in case.batches:
        batch = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
        parts.append(case.judge(model, batch))
    sums, counts = torch.cat([s for s, _ in parts]), torch.cat([c for _, c in parts])
    rows = []
    for loss in sums * len(sums) / counts.sum():
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).view(-1) if g is None else g.reshape(-1)
                    for p, g in zip(leaves, found, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def all_gradients(made: Subject) -> Tensor:
    return torch.cat([per_example_gradients(made, batch) for batch in made.chunks()])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_per_example_gradients_are_those_of_dense_autograd(case: Case) -> None:
    made = case.subject()
    exact = by_hand(case, made)
    assert relative(all_gradients(made), exact) < 1e-12
    assert (set(route_of(made).orders) == set(made.parameters)) == case.read
    single = case.subject(dtype=torch.float32)
    assert relative(all_gradients(single).double(), exact) < 1e-4


def test_the_mean_gradient_is_that_of_the_mean_loss(case: Case) -> None:
    made = case.subject()
    exact = by_hand(case, made).mean(0)
    found = mean_gradient(made)
    assert list(found) == list(made.parameters)
    assert relative(made.flatten(found), exact) < 1e-12
    assert mean_gradient(made) is found


@pytest.mark.parametrize("memory", [1, 2000, 2**30])
def test_moments_of_the_gradients_in_every_parameter(case: Case, memory: int) -> None:
    made = case.subject(memory=memory)
    exact = by_hand(case, made)
    found = gradient_moments(made)
    assert relative(found.mean, exact.mean(0)) < 1e-12
    assert relative(found.mean_square, exact.square().mean(0)) < 1e-12
    assert gradient_moments(made) is found
    assert moments_bytes(made) >= 0


@pytest.mark.parametrize("memory", [1, 500, 2000, 4000, 2**30])
def test_the_gram_matrix_does_not_depend_on_the_memory(case: Case, memory: int) -> None:
    made = case.subject()
    exact = by_hand(case, made)
    limited = case.subject(memory=memory)
    groups = gram_plan(limited).groups
    assert [name for names, _ in groups for name in names] == list(made.parameters)
    assert memory > 1 or (len(groups) > 1 and groups[0][1] == 1)
    assert memory < 2**30 or groups == ((tuple(made.parameters), len(exact)),)
    found = gram(limited)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert relative(found, exact @ exact.T) < 1e-12
    assert gram(limited) is found


def test_the_plan_counts_the_gradients_that_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"0.weight": 4 + 5, "0.bias": 5, "2.weight": 5 + 3, "2.bias": 3}
    made = CASES["mlp"].subject(memory=2 * 33 * 14 * 8)
    assert route_of(made).kept == kept
    seen: list[int] = []

    def counting(subject: Subject, batch: Any, names: Any) -> Any:
        seen.append(len(batch[1]))
        return example_gradients(subject, batch, names)

    monkeypatch.setattr("plasticity_probe.network.gradients.example_gradients", counting)
    gram(made)
    plan = gram_plan(made)
    assert plan.groups == ((("0.weight", "0.bias"), 33), (("2.weight", "2.bias"), 33))
    assert sum(seen) == plan.gradients == 66
    assert plan.multiplications == 33 * 34 // 2 * ((4 + 5) + 5 + (5 + 3) + 3)
    assert plan.peak >= 33 * 14 * 8 + 8 * 33**2
    assert 0 <= plan.bytes <= plan.peak
    small = CASES["mlp"].subject(memory=2 * 10 * 9 * 8)
    seen.clear()
    gram(small)
    assert sum(seen) == gram_plan(small).gradients > 3 * 33


def test_gradients_of_linear_softmax_regression_in_closed_form() -> None:
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    model = nn.Linear(4, 3)
    made = subject(model, [(x, y)], dtype=torch.float64)
    error = model.double()(x.double()).detach().softmax(1) - F.one_hot(y, 3)
    expected = torch.cat([(error[:, :, None] * x.double()[:, None]).flatten(1), error], 1)
    assert relative(all_gradients(made), expected) < 1e-12


def test_a_mean_over_batches_would_be_another_gradient() -> None:
    case = CASES["mlp"]
    made = case.subject()
    each = by_hand(case, made)
    of_batches = (each[:32].mean(0) + each[32]) / 2
    assert relative(of_batches, each.mean(0)) > 1e-2
    assert relative(made.flatten(mean_gradient(made)), of_batches) > 1e-2


def test_a_mean_over_the_tokens_of_each_sequence_would_be_another_gradient() -> None:
    with isolated():
        case = CASES["language"]
        made = case.subject()
        _, counts = made.each_loss()
        found = all_gradients(made)
    per_sequence = found * (counts.sum() / len(counts) / counts.clamp(min=1))[:, None]
    assert relative(per_sequence.mean(0), made.flatten(mean_gradient(made))) > 1e-2
    assert not found[counts == 0].any()


def test_train_mode_with_batch_norm_is_refused() -> None:
    with pytest.raises(SubjectError, match=r"BatchNorm uses the statistics of the batch \(1\)"):
        gram(CASES["conv"].subject(mode="train"))


def test_batch_norm_without_running_statistics_is_refused_in_eval_mode_too() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))
    with pytest.raises(SubjectError, match="BatchNorm"):
        gram(subject(model, CASES["mlp"].batches))


def test_train_mode_without_batch_norm_is_that_of_eval() -> None:
    case = CASES["mlp"]
    assert torch.allclose(gram(case.subject(mode="train")), gram(case.subject()), rtol=1e-12)


def test_a_loss_that_compares_examples_is_refused() -> None:
    def contrast(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")

    with pytest.raises(SubjectError, match="do not add up"):
        gram(subject(nn.Linear(4, 3), CASES["mlp"].batches, loss=contrast))


def test_a_mistake_of_the_loss_is_not_hidden() -> None:
    def faulty(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) == 1 and torch.is_grad_enabled() and seen:
            raise RuntimeError("a mistake of the loss")
        return model(batch[0]).sum(1)

    seen: list[int] = []
    made = subject(nn.Linear(4, 3), CASES["mlp"].batches, loss=faulty)
    assert made.activation_bytes
    seen.append(1)
    with pytest.raises(RuntimeError, match="a mistake of the loss"):
        gram(made)


def test_frozen_networks_are_refused_and_ignored_labels_are_not_a_number() -> None:
    with pytest.raises(SubjectError, match="all are frozen"):
        gram(subject(nn.Linear(4, 3).requires_grad_(False), CASES["mlp"].batches))
    nothing = [(torch.randn(4, 4), torch.full((4,), -100))]
    assert gram(subject(nn.Linear(4, 3), nothing)).isnan().all()


def test_nothing_of_the_model_changes() -> None:
    model = conv_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = subject(model, CASES["conv"].batches)
    gram(made), mean_gradient(made)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *made.model.parameters()])
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())


@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 2**31))
def test_statistics_of_the_gram_matrix_are_those_of_the_gradients(n: int, p: int, seed: int) -> None:
    rows = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inner = rows @ rows.T
    mean = rows.mean(0)
    slack = 1e-12 * float(inner.trace())
    assert squared_mean_norm(inner) == pytest.approx(float(mean @ mean), abs=slack)
    assert covariance_trace(inner) == pytest.approx(
        float(torch.cov(rows.T.reshape(p, n)).reshape(p, p).trace()), abs=slack
    )
    expected = [float(F.cosine_similarity(rows[i], rows[j], dim=0)) for i in range(n) for j in range(i + 1, n)]
    cosines = pairwise_cosines(inner)
    assert torch.allclose(cosines, torch.tensor(expected, dtype=torch.float64), atol=1e-10)
    assert mean_cosine(cosines) == pytest.approx(sum(expected) / len(expected), abs=1e-10)


def test_right_angles_and_zero_gradients_are_no_interference() -> None:
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 1e-9], [0, 0, 0], [-1, -1, 0], [2, 0, 0]], dtype=torch.float64)
    cosines = pairwise_cosines(rows @ rows.T)
    assert len(cosines) == 6
    assert negative_fraction(cosines) == pytest.approx(3 / 6)
    assert (
        torch.tensor([mean_cosine(cosines[:0]), negative_fraction(cosines[:0]), covariance_trace(torch.ones(1, 1))])
        .isnan()
        .all()
    )
