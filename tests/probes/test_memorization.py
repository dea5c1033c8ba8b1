import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from plasticity_probe.errors import DataError, SubjectError, UsageError
from plasticity_probe.measurement import Status, headlines
from plasticity_probe.network.examples import read_examples
from plasticity_probe.network.subject import subject
from plasticity_probe.probe import generator_for
from plasticity_probe.probes.memorization import Memorization, MemorizationProbe, memorization, roc_auc

X, Y = torch.randn(33, 4, generator=torch.Generator().manual_seed(5)), torch.arange(33) % 3
RAGGED = [(X[:32], Y[:32]), (X[32:], Y[32:])]
HELD_OUT = [(X.flip(1), Y)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def is_nan(*numbers: float) -> bool:
    return all(math.isnan(number) for number in numbers)


def softmax_curvature(model: nn.Linear, x: Tensor) -> Tensor:
    """tr(H^2) with H = W'(diag p - p p')W."""
    weight, p = model.weight.detach().double(), model.double()(x.double()).detach().softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return (weight.T @ inner @ weight).square().sum((1, 2))


def test_input_curvature_of_softmax_regression_in_closed_form() -> None:
    model = nn.Linear(4, 3)
    exact = softmax_curvature(model, X)
    found = memorization(model, RAGGED, draws=400)
    assert found.curvature.shape == (33,)
    assert abs(found.mean_curvature - float(exact.mean())) < 4 * found.mean_curvature_sem
    assert found.mean_curvature_sem < 0.05 * found.mean_curvature
    assert found.median_curvature == pytest.approx(float(exact.quantile(0.5)), rel=0.15)
    assert np.corrcoef(found.curvature, exact)[0, 1] > 0.98
    assert (
        abs(float(exact.sqrt().mean()) - found.mean_curvature) > 4 * found.mean_curvature_sem
    )  # the norm, not squared
    assert abs(float(exact.mean()) / 33**2 - found.mean_curvature) > 4 * found.mean_curvature_sem  # a batch mean


def test_the_standard_error_covers_the_scatter_over_seeds() -> None:
    model = nn.Linear(4, 3)
    exact = float(softmax_curvature(model, X).mean())
    off = [
        (found.mean_curvature - exact) / found.mean_curvature_sem
        for found in (memorization(model, RAGGED, draws=30, seed=seed) for seed in range(20))
    ]
    assert 0.5 < np.sqrt(np.mean(np.square(off))) < 1.7
    assert is_nan(memorization(model, RAGGED, draws=1).mean_curvature_sem)


def test_same_seed_same_numbers_whatever_the_memory() -> None:
    model = mlp()
    first = memorization(model, RAGGED, held_out=HELD_OUT, dtype=torch.float64)
    again = memorization(model, RAGGED, held_out=HELD_OUT, dtype=torch.float64, memory=1)
    other = memorization(model, RAGGED, held_out=HELD_OUT, dtype=torch.float64, seed=1)
    assert torch.allclose(first.curvature, again.curvature, rtol=1e-12)
    assert not torch.allclose(first.curvature, other.curvature, rtol=1e-3)
    for line, same in zip(headlines(first), headlines(again), strict=True):
        assert line.value == pytest.approx(same.value, rel=1e-12, nan_ok=True)


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 3.0]), min_size=1, max_size=9),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 3.0]), min_size=1, max_size=9),
)
def test_roc_auc_is_that_of_scikit_learn(lower: list[float], higher: list[float]) -> None:
    exact = roc_auc_score([0] * len(lower) + [1] * len(higher), lower + higher)
    assert roc_auc(torch.tensor(lower), torch.tensor(higher)) == pytest.approx(exact, abs=1e-12)
    assert is_nan(roc_auc(torch.tensor(lower), torch.zeros(0)), roc_auc(torch.zeros(0), torch.tensor(higher)))


def test_the_gap_between_training_and_held_out_examples() -> None:
    model = mlp().double()
    found = memorization(model, RAGGED, held_out=HELD_OUT)
    trained, unseen = (F.cross_entropy(model(x.double()), Y, reduction="none").detach() for x in (X, X.flip(1)))
    assert found.training_loss == pytest.approx(float(trained.mean()), rel=1e-12)
    assert found.loss_gap == pytest.approx(float(unseen.mean() - trained.mean()), rel=1e-9)
    assert found.held_out_loss == pytest.approx(float(unseen.mean()), rel=1e-12)
    right = [float((model(x.double()).argmax(1) == Y).double().mean()) for x in (X, X.flip(1))]
    assert [found.training_accuracy, found.held_out_accuracy] == pytest.approx(right)
    exact = roc_auc_score([1] * 33 + [0] * 33, -torch.cat([trained, unseen]))
    assert found.membership_auc == pytest.approx(exact)
    assert (found.training_examples, found.held_out_examples) == (33, 33)


def test_training_examples_come_before_the_subjects_own() -> None:
    model = mlp()
    next_task = [(torch.randn(7, 4), torch.randint(3, (7,)))]
    known = memorization(model, next_task, training=RAGGED, held_out=HELD_OUT)
    assert known.training_examples == known.conditions.examples == 33
    plain = memorization(model, RAGGED, held_out=HELD_OUT)
    assert (known.training_loss, known.mean_cosine) == (plain.training_loss, plain.mean_cosine)
    assert torch.equal(known.curvature, plain.curvature)


def test_what_is_not_known_is_nan_and_said() -> None:
    found = memorization(mlp(), RAGGED)
    assert is_nan(found.loss_gap, found.held_out_loss, found.held_out_accuracy, found.membership_auc)
    assert is_nan(found.noisy_fit, found.noisy_loss, found.clean_loss, found.noisy_auc)
    assert found.status is Status.OK
    assert (found.held_out_examples, found.noisy_examples) == (0, 0)
    assert "No held-out examples" in found.message
    assert "No wrong labels" in found.message
    names = [line.name for line in headlines(found)]
    assert names == ["median_curvature", "loss_gap", "membership_auc", "noisy_fit", "mean_cosine", "negative_fraction"]


class Oracle(nn.Module):
    """Predicts the class that the first input names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.exp(-((x[:, :1] - torch.arange(3.0)) ** 2))


@pytest.mark.parametrize("fitted", [True, False])
def test_fit_to_wrong_labels(fitted: bool) -> None:
    true = torch.arange(30) % 3
    marks = torch.arange(30) % 5 == 0
    labels = torch.where(marks, (true + 1) % 3, true)
    x = (labels if fitted else true)[:, None].float()
    found = memorization(Oracle(), [(x, labels)], noisy=marks)
    losses = F.cross_entropy(Oracle()(x), labels, reduction="none").detach()
    assert (found.noisy_fit, found.noisy_examples) == (float(fitted), 6)
    assert found.noisy_loss == pytest.approx(float(losses[marks].mean()), rel=1e-6)
    assert found.clean_loss == pytest.approx(float(losses[~marks].mean()), rel=1e-6)
    assert found.noisy_auc == pytest.approx(roc_auc_score(marks, losses))
    assert found.noisy_auc < 0.9 if fitted else found.noisy_auc == 1

    wrong = memorization(Oracle(), [(x[~marks], labels[~marks])], noisy=[(x[marks], labels[marks])])
    for name in ("noisy_fit", "noisy_loss", "clean_loss", "noisy_auc", "noisy_examples"):
        assert getattr(wrong, name) == pytest.approx(getattr(found, name), rel=1e-6)
    assert wrong.training_examples == 24


def test_marks_follow_the_examples_that_are_read() -> None:
    marks = np.arange(33) % 2 == 0
    found = memorization(mlp(), RAGGED, noisy=marks, examples=10, compared=10)
    assert (found.noisy_examples, found.training_examples, len(found.curvature)) == (5, 10, 10)
    for bad in (torch.ones(5, dtype=torch.bool), torch.ones(33), torch.ones(33, 1, dtype=torch.bool)):
        with pytest.raises(DataError, match="booleans"):
            memorization(mlp(), RAGGED, noisy=bad)


def test_a_probe_takes_all_of_it_from_the_subject() -> None:
    marks, model = torch.arange(33) % 2 == 0, mlp()
    made = subject(model, RAGGED, held_out=read_examples(HELD_OUT), noisy=marks)
    probe = MemorizationProbe(draws=3, examples=20, compared=25)
    found = probe.measure(made, generator_for(0, probe.name))
    twin = memorization(model, RAGGED, held_out=HELD_OUT, noisy=marks, draws=3, examples=20, compared=25)
    assert found.to_dict() == twin.to_dict()
    assert (found.training_examples, found.held_out_examples, found.noisy_examples) == (25, 25, 13)
    assert len(found.curvature) == 20
    cost = probe.cost(made)
    assert (cost.forwards, cost.gradients, cost.products) == (50, 40, 60)


def cosines(weight: Tensor, gradient: Tensor) -> list[float]:
    pairs = zip(weight.reshape(-1, weight.shape[-1]), gradient.reshape(-1, weight.shape[-1]), strict=True)
    return [float(-(w @ g) / (w.norm() * g.norm())) for w, g in pairs]


def test_cosines_of_weights_and_negative_gradient() -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 3, padding=1), nn.BatchNorm1d(3), nn.Tanh(), nn.Conv1d(3, 2, 1), nn.Tanh(),
        nn.ConvTranspose1d(2, 2, 2), nn.Flatten(), nn.Linear(10, 3),
    ).double()  # fmt: skip
    found = memorization(model, RAGGED)
    model.eval()
    F.cross_entropy(model(X.double()), Y).backward()
    expected = {
        "1": cosines(model[1].weight.detach(), model[1].weight.grad),
        "6": cosines(model[6].weight.detach(), model[6].weight.grad),
        "8": cosines(model[8].weight.detach(), model[8].weight.grad),
    }
    assert [len(values) for values in expected.values()] == [3, 4, 3]
    assert found.layers == ("1", "6", "8")  # the 1x1 convolution would have cosines of 1 and -1 alone
    means = [np.mean(values) for values in expected.values()]
    assert found.layer_cosine.tolist() == pytest.approx(means, rel=1e-9)
    assert found.layer_negative_fraction.tolist() == [np.mean(np.array(v) < 0) for v in expected.values()]
    everything = [value for values in expected.values() for value in values]
    assert found.mean_cosine == pytest.approx(np.mean(everything), rel=1e-9)
    assert found.negative_fraction == np.mean(np.array(everything) < 0)
    assert found.mean_cosine != pytest.approx(np.mean(means), rel=1e-3)
    whole_filter = cosines(model[6].weight.detach().flatten(1), model[6].weight.grad.flatten(1))
    assert found.layer_cosine[1] != pytest.approx(np.mean(whole_filter), rel=1e-3)


def test_weights_along_the_descent_direction_have_cosine_one() -> None:
    target = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    x = torch.eye(4)
    for sign in (1, -1):
        model = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(sign * 0.1 * target)
        found = memorization(model, [(x, x @ target.T)])
        assert (found.mean_cosine, found.negative_fraction) == (pytest.approx(sign, abs=1e-6), float(sign < 0))
        assert found.layers == ("Linear",)


def test_dead_neurons_are_counted_and_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:3] = -100
    found = memorization(model, RAGGED)
    assert found.zero_vectors == 3
    alive = memorization(model, RAGGED, dtype=torch.float64)
    assert found.layer_cosine.tolist() == pytest.approx(alive.layer_cosine.tolist(), rel=1e-4)
    with torch.no_grad():
        model[0].bias.fill_(-100)
    dead = memorization(model, RAGGED)
    assert dead.zero_vectors == 5 + 3  # nothing reaches the last layer's weights either
    assert is_nan(float(dead.layer_cosine[0]), dead.mean_cosine)
    assert dead.status is Status.OK


class TiedTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.frozen(self.b(self.a(self.embed(input_ids)))))}


def test_a_language_model_with_ignored_tokens() -> None:
    ids = torch.randint(7, (9, 5))
    labels = ids.roll(-1, 1)
    for row, kept in enumerate((5, 3, 0, 1, 4, 5, 2, 5, 5)):
        labels[row, kept:] = -100
    batches = [{"input_ids": ids[:8], "labels": labels[:8]}, {"input_ids": ids[8:], "labels": labels[8:]}]
    model = TiedTokens()
    found = memorization(model, batches, held_out=batches, dtype=torch.float64)
    assert found.curvature.isnan().all()
    assert "tokens have none" in found.message
    assert found.layers == ("a", "unused", "head")
    assert found.zero_vectors == 3
    logits = model.double()(ids)["logits"].detach()
    exact = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert found.training_loss == pytest.approx(float(exact), rel=1e-9)
    counted = labels != -100
    assert found.training_accuracy == pytest.approx(float((logits.argmax(2) == labels)[counted].double().mean()))
    assert (found.loss_gap, found.membership_auc) == (0, 0.5)


def test_examples_without_a_term_have_no_curvature() -> None:
    labels = Y.clone()
    labels[4] = -100
    found = memorization(mlp(), [(X, labels)])
    assert found.curvature.isnan().nonzero().tolist() == [[4]]
    assert found.mean_curvature == pytest.approx(float(found.curvature.nanmean()))


def test_train_mode_with_batch_norm_keeps_what_is_defined() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    found = memorization(model, RAGGED, held_out=HELD_OUT, mode="train")
    assert is_nan(found.median_curvature, found.mean_curvature, found.mean_curvature_sem)
    assert "mode='eval'" in found.message
    assert not is_nan(found.loss_gap)
    assert not is_nan(found.mean_cosine)
    assert found.status is Status.OK


def test_regression_and_custom_losses_have_no_accuracy_but_everything_else() -> None:
    def custom(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).double(), batch[1], reduction="none").float()

    model = mlp()
    plain, given = (memorization(model, RAGGED, held_out=HELD_OUT, noisy=Y == 0, **o) for o in ({}, {"loss": custom}))
    assert is_nan(given.training_accuracy, given.held_out_accuracy, given.noisy_fit)
    assert torch.allclose(given.curvature, plain.curvature)
    for name in ("loss_gap", "membership_auc", "noisy_auc", "mean_cosine"):
        assert getattr(given, name) == pytest.approx(getattr(plain, name))
    regression = memorization(nn.Linear(4, 2), [(X, torch.randn(33, 2))], held_out=[(X, torch.randn(33, 2))])
    assert is_nan(regression.training_accuracy)
    assert regression.mean_curvature > 0


def test_a_frozen_network_has_no_direction_but_a_curvature() -> None:
    model = mlp()
    free = memorization(model, RAGGED, held_out=HELD_OUT)
    frozen = memorization(model.requires_grad_(False), RAGGED, held_out=HELD_OUT)
    assert torch.allclose(frozen.curvature, free.curvature)
    assert frozen.loss_gap == pytest.approx(free.loss_gap)
    assert (frozen.layers, is_nan(frozen.mean_cosine, frozen.negative_fraction)) == ((), True)
    assert "No linear or convolutional layer" in frozen.message


def test_broken_weights_are_a_status() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    found = memorization(model, RAGGED, held_out=HELD_OUT, noisy=Y == 0)
    assert found.status is Status.NONFINITE
    assert "not finite" in found.message
    assert all(is_nan(line.value) for line in headlines(found))
    assert found.curvature.isnan().all()


def test_settings_and_labels_out_of_range_are_refused() -> None:
    for settings in ({"draws": 0}, {"examples": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            MemorizationProbe(**settings)
    with pytest.raises(SubjectError, match="labels from 0 to 2"):
        memorization(mlp(), RAGGED, held_out=[(X, Y + 1)])


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = memorization(model, RAGGED, held_out=HELD_OUT)
    assert isinstance(found, Memorization)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
