import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticity_probe as probe
from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.measurement import Status, headlines
from plasticity_probe.network.fresh import fresh_network, reinitialised
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject
from plasticity_probe.network.trials import (
    constant_loss,
    score,
    trained,
    updates,
    with_high_frequency,
    with_model,
    with_random_labels,
    with_targets,
)
from plasticity_probe.probe import generator_for
from plasticity_probe.probes.trainability import TrainabilityProbe, intraclass_correlation, standard_error, trainability
from plasticity_probe.testing import check_probe, linear_regression, softmax_regression

X, Y = torch.randn(48, 6), torch.randint(0, 3, (48,))
LOADER = [(X[:32], Y[:32]), (X[32:], Y[32:])]
QUICK: dict[str, Any] = {"steps": 4, "batch": 16, "repeats": 2, "orders": 2, "learning_rate": 0.01}


def mlp(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def dead() -> nn.Sequential:
    """No hidden unit ever fires, so that every output is the same for all inputs and only the last bias learns."""
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    return model


def measured(made: Subject, **settings: Any) -> probe.Trainability:
    asked = TrainabilityProbe(**settings)
    with isolated():
        return asked.measure(made, generator_for(0, asked.name))


def by_task(found: probe.Trainability, name: str) -> dict[str, float]:
    return dict(zip(found.targets, getattr(found, name).tolist(), strict=True))


def descended(hessian: Tensor, start: Tensor, best: Tensor, rate: float, steps: int) -> Tensor:
    """Weights after gradient descent on a quadratic: (I - rate H)^steps applied to the distance from the best, by eigenvalues."""
    values, vectors = torch.linalg.eigh(hessian)
    return best + vectors @ ((1 - rate * values) ** steps * (vectors.T @ (start - best)))


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_full_batch_descent_on_a_linear_model_ends_where_the_closed_form_says(steps: int) -> None:
    made, hessian = linear_regression()
    (batch,) = made.examples.read()
    inputs, targets = (tensor.double() for tensor in batch)
    start = made.parameters["weight"].detach().flatten()
    best = torch.linalg.lstsq(inputs, targets).solution.flatten()
    end = descended(hessian, start, best, 0.05, steps)
    settings: dict[str, Any] = {"targets": ("data",), "batch": 33, "optimizer": "sgd", "learning_rate": 0.05}
    found = measured(made, steps=steps, repeats=2, **settings)
    assert found.status is Status.OK
    assert float(found.loss_before) == pytest.approx(float((inputs @ start - targets.flatten()).square().mean()))
    after = float((inputs @ end - targets.flatten()).square().mean())
    assert float(found.loss_after) == pytest.approx(after, rel=1e-9)
    # With all examples in every update neither the order nor the repeat plays a part.
    assert float(found.loss_after_sem) == pytest.approx(0, abs=1e-12)
    assert float(found.learned) == pytest.approx(1 - after / float((targets - targets.mean(0)).square().mean()))
    # One update more or less, or another rate, is told apart by that tolerance.
    for other in (descended(hessian, start, best, 0.05, steps + 1), descended(hessian, start, best, 0.051, steps)):
        assert float((inputs @ other - targets.flatten()).square().mean()) != pytest.approx(after, rel=1e-9)


def test_the_comparison_is_what_fresh_networks_reach_minus_what_the_network_reaches() -> None:
    made, hessian = linear_regression()
    (batch,) = made.examples.read()
    inputs, targets = (tensor.double() for tensor in batch)
    best = torch.linalg.lstsq(inputs, targets).solution.flatten()
    settings: dict[str, Any] = {"targets": ("data",), "batch": 33, "optimizer": "sgd", "learning_rate": 0.05}
    found = measured(made, steps=10, repeats=3, fresh=2, **settings)

    def reached(start: Tensor) -> float:
        end = descended(hessian, start, best, 0.05, 10)
        return float((inputs @ end - targets.flatten()).square().mean())

    # What a fresh network reaches follows from where it starts, which is drawn within the initialisation's bounds.
    least = float((inputs @ best - targets.flatten()).square().mean())
    assert (found.fresh_losses > least).all()
    assert found.fresh_losses.unique().numel() == 6
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], dtype=torch.float64)] * 4)
    assert float(found.fresh_losses.max()) <= max(reached(corner) for corner in corners)
    each = found.fresh_losses[0].mean(1) - found.losses[0].mean(1)
    assert float(found.advantage) == pytest.approx(float(each.mean()))
    assert float(found.advantage_sem) == pytest.approx(float(each.std()) / math.sqrt(3))
    constant = float((targets - targets.mean(0)).square().mean())
    assert found.relative_advantage == pytest.approx(float(each.mean()) / constant)
    assert found.relative_advantage_sem == pytest.approx(float(each.std()) / math.sqrt(3) / constant)
    assert float(found.learned - found.fresh_learned) == pytest.approx(found.relative_advantage)


def test_a_dead_network_learns_worse_than_fresh_ones_on_every_task() -> None:
    settings: dict[str, Any] = {"steps": 60, "batch": 16, "repeats": 4, "orders": 1, "learning_rate": 0.02}
    found = trainability(dead(), LOADER, **settings)
    assert found.status is Status.OK
    assert (found.advantage < -4 * found.advantage_sem).all()
    # It can do no better than the best constant, and fresh networks can.
    assert (found.learned < 0.05).all()
    assert (found.fresh_learned > found.learned + 0.1).all()
    assert found.relative_advantage < -4 * found.relative_advantage_sem < 0
    chances = by_task(found, "accuracy_after")
    assert math.isnan(chances["high_frequency"])
    assert chances["random_labels"] < by_task(found, "fresh_accuracy_after")["random_labels"]


def test_fresh_networks_are_no_better_and_no_worse_than_fresh_networks() -> None:
    differences = []
    for start in range(6):
        model = fresh_network(mlp, start)
        found = trainability(model, LOADER, **{**QUICK, "steps": 20, "repeats": 3, "orders": 1, "seed": start})
        differences.append(found.advantage)
    each = torch.stack(differences, 1)
    assert (each.mean(1).abs() <= 4 * standard_error(each)).all()
    # The same rule finds the dead network out.
    worse = trainability(dead(), LOADER, **{**QUICK, "steps": 20, "repeats": 3, "orders": 1})
    assert ((worse.advantage - each.mean(1)) < -2 * each.std(1)).any()


def test_high_frequency_targets_lie_around_the_present_mean_of_each_output() -> None:
    constant = dead()
    with torch.no_grad():
        constant[2].bias.copy_(torch.tensor([6.0, -4.0, 1.0]))
    made, function = subject(constant, LOADER), mlp()
    posed = with_high_frequency(made, function)
    (batch,) = posed.examples.read()
    assert torch.equal(batch[0], X)
    sines = torch.sin(1e5 * function(X).detach().double())
    # In float32 a fresh output is known to about 1e-7, and its argument of the sine to about 1e-2.
    assert (batch[1] - constant[2].bias.detach() - sines).abs().max() < 0.05
    assert 0.35 < float(sines.square().mean()) < 0.65
    before = score(posed, 16)
    assert before.loss == pytest.approx(float(sines.square().mean()), abs=0.01)
    assert math.isnan(before.accuracy)
    # Without the shift the outputs' own means would count as error.
    unshifted = (constant(X).detach() - sines).square().mean()
    assert float(unshifted) > 10 * before.loss
    assert constant_loss(posed) == pytest.approx(float((sines - sines.mean(0)).square().mean()), abs=0.01)


def test_the_function_is_asked_for_the_same_examples_that_are_learned() -> None:
    made, function = subject(mlp(), LOADER, memory=1), mlp()
    assert made.chunk == 1
    whole = subject(made.model, LOADER)
    cut, joined = (with_high_frequency(each, function).examples.read() for each in (made, whole))
    assert torch.allclose(next(cut)[1], next(joined)[1], atol=0.05)


def test_random_labels_are_uniform_over_the_outputs_and_do_not_depend_on_the_true_ones() -> None:
    inputs, ones = torch.randn(3000, 6), torch.ones(3000, dtype=torch.int64)
    made = subject(mlp(), [(inputs, ones)])
    (batch,) = with_random_labels(made, generator_for(0, "labels")).examples.read()
    shares = batch[1].bincount(minlength=3) / 3000
    assert (shares - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / 3000)
    other = next(with_random_labels(made, generator_for(1, "labels")).examples.read())[1]
    assert (batch[1] == other).float().mean() < 0.5
    assert torch.equal(batch[0], inputs)


def test_ignored_targets_stay_ignored_and_count_for_nothing() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    inputs, targets = torch.randint(5, (12, 6)), torch.randint(5, (12, 6))
    targets[:, 4:] = -100
    made = subject(Tokens(), [{"x": inputs, "labels": targets}])
    (batch,) = with_random_labels(made, generator_for(0, "labels")).examples.read()
    assert (batch["labels"][:, 4:] == -100).all()
    assert (batch["labels"][:, :4] >= 0).all()
    assert torch.equal(batch["x"], inputs)
    shares = targets[:, :4].flatten().bincount() / 48
    assert constant_loss(made) == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-5)
    found = trainability(Tokens(), [{"x": inputs, "labels": targets}], **QUICK)
    assert found.status is Status.OK
    outputs = made.model(inputs).detach()
    right = (outputs.argmax(-1) == targets)[:, :4].float().mean()
    assert by_task(found, "loss_before").keys() == {"high_frequency", "random_labels", "data"}
    assert score(made, 5).accuracy == pytest.approx(float(right))


def test_losses_and_accuracies_before_training_are_those_of_the_model() -> None:
    model = mlp()
    found = trainability(model, LOADER, targets=("data",), **QUICK)
    outputs = model(X).detach()
    assert float(found.loss_before) == pytest.approx(float(F.cross_entropy(outputs, Y)), rel=1e-5)
    assert float(found.accuracy_before) == pytest.approx(float((outputs.argmax(1) == Y).float().mean()))
    shares = Y.bincount() / 48
    assert float(found.constant_loss) == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-5)
    assert float(found.loss_after) < float(found.loss_before)


def test_every_example_comes_once_a_pass_and_every_update_has_the_same_number() -> None:
    made = subject(mlp(), [(torch.arange(66.0).reshape(11, 6), Y[:11])])
    drawn = list(updates(made.examples, 4, 5, generator_for(0, "order")))
    assert [len(batch[0]) for batch in drawn] == [4] * 5
    for two in (drawn[0:2], drawn[2:4]):
        assert torch.cat([batch[0][:, 0] for batch in two]).unique().numel() == 8
    assert not torch.equal(drawn[0][0], drawn[2][0])
    rows = {float(x[0]): int(y) for x, y in zip(torch.arange(66.0).reshape(11, 6), Y[:11], strict=True)}
    assert all(rows[float(x[0])] == int(y) for batch in drawn for x, y in zip(*batch, strict=True))
    assert [len(batch[0]) for batch in updates(made.examples, 99, 2, generator_for(0, "order"))] == [11, 11]


def test_examples_of_different_lengths_are_learned_in_the_batches_they_came_in() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean(1))

    ragged = [(torch.randn(6, length, 4), torch.randint(3, (6,))) for length in (2, 3, 5)]
    found = trainability(Mean(), ragged, **QUICK)
    assert "high_frequency was not measured" in found.message
    after = by_task(found, "loss_after")
    assert math.isnan(after["high_frequency"])
    assert not math.isnan(after["random_labels"] + after["data"])


def test_training_changes_the_copy_alone_and_updates_its_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    made = subject(model, LOADER)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    batches = updates(made.examples, 16, 5, generator_for(0, "order"))
    learned = trained(made, batches, lambda weights: torch.optim.SGD(weights, lr=0.1))
    assert learned is not None
    after = learned.model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in made.model.state_dict().items())
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert int(after["1.num_batches_tracked"]) == 5
    assert not any(module.training for module in [*learned.model.modules(), *made.model.modules()])
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_dropout_follows_the_seed_and_the_global_state_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    made = subject(model, LOADER)
    state = torch.get_rng_state()
    asked = TrainabilityProbe(**QUICK)
    first = asked.measure(made, generator_for(0, "a"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, other = asked.measure(made, generator_for(0, "a")), asked.measure(made, generator_for(1, "a"))
    assert torch.equal(first.losses, again.losses)
    assert torch.equal(first.fresh_losses, again.fresh_losses)
    assert not torch.equal(first.losses, other.losses)


def test_a_task_gives_the_same_numbers_whichever_others_are_asked_for() -> None:
    model = mlp()
    every = trainability(model, LOADER, **QUICK)
    alone = trainability(model, LOADER, targets=("random_labels",), **QUICK)
    assert torch.equal(alone.losses[0], every.losses[1])
    assert torch.equal(alone.fresh_losses[0], every.fresh_losses[1])
    more = trainability(model, LOADER, targets="data", **{**QUICK, "repeats": 3, "orders": 3})
    assert torch.equal(more.losses[0, :2, :2], every.losses[2])


def test_repeats_and_orders_draw_anew() -> None:
    found = trainability(mlp(), LOADER, **QUICK)
    assert all(losses.unique().numel() == 4 for losses in found.losses)
    assert found.losses.shape == (3, 2, 2)
    assert found.fresh_losses.shape == (3, 2, 1)
    assert math.isnan(by_task(found, "repeatability")["data"])
    assert by_task(found, "repeatability")["random_labels"] == intraclass_correlation(found.losses[1])


def test_the_network_and_fresh_ones_get_the_same_draw_and_every_repeat_another() -> None:
    # A linear model under full batches ends at the one optimum of its task, wherever it starts and in whichever order.
    settings: dict[str, Any] = {"batch": 48, "optimizer": "sgd", "learning_rate": 0.4, "steps": 500, "orders": 1}
    names = ("high_frequency", "random_labels")
    found = trainability(nn.Linear(6, 3).double(), LOADER, targets=names, repeats=2, **settings)
    assert torch.allclose(found.losses, found.fresh_losses, rtol=1e-5)
    assert not torch.isclose(found.losses[:, 0], found.losses[:, 1], rtol=1e-3).any()


def test_fresh_networks_start_with_the_batchnorm_statistics_of_the_examples() -> None:
    inputs = 50 * X + 200
    found = trainability(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), [(inputs, Y)], targets="data", **QUICK)
    assert float(found.fresh_loss_before) < 3
    unsettled = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    assert float(F.cross_entropy(unsettled(inputs).detach(), Y)) > 10


def test_frozen_parameters_are_not_trained() -> None:
    model = mlp()
    made = subject(model, LOADER, parameters="2.bias")
    learned = trained(made, updates(made.examples, 16, 3, generator_for(0, "o")), lambda w: torch.optim.SGD(w, lr=0.1))
    assert learned is not None
    moved = [name for name, p in learned.model.named_parameters() if not torch.equal(p, made.model.get_parameter(name))]
    assert moved == ["2.bias"]


def test_the_subject_is_left_alone_and_the_probe_keeps_the_contract() -> None:
    quick = TrainabilityProbe(**QUICK)
    check_probe(quick)
    check_probe(quick, linear_regression()[0])
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    check_probe(quick, subject(model, LOADER))
    check_probe(TrainabilityProbe(**QUICK, fresh=0), softmax_regression())


def test_regression_has_no_labels_to_draw_and_says_so() -> None:
    made, _ = linear_regression()
    found = measured(made, **QUICK)
    assert found.status is Status.OK
    assert "random_labels was not measured: this is a regression" in found.message
    assert math.isnan(by_task(found, "loss_after")["random_labels"])
    assert not math.isnan(by_task(found, "loss_after")["data"])
    # What was measured counts in the mean over tasks.
    assert not math.isnan(found.relative_advantage)
    none = measured(made, targets=("random_labels",), **QUICK)
    assert none.status is Status.NOT_APPLICABLE


def test_a_given_loss_learns_its_data_and_names_no_classes() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = mlp()
    found, inferred = (trainability(model, LOADER, loss=given, **QUICK) for given in (loss, None))
    assert found.status is Status.OK
    assert "random_labels was not measured: the loss was given" in found.message
    assert by_task(found, "loss_after")["data"] == pytest.approx(by_task(inferred, "loss_after")["data"], rel=1e-5)
    assert torch.equal(found.losses[0], inferred.losses[0])
    assert math.isnan(by_task(found, "learned")["data"])


def test_without_a_known_initialisation_the_network_is_measured_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = mlp(), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    found = trainability(Scaled(), LOADER, **QUICK)
    assert found.status is Status.OK
    assert "no comparison with fresh networks: cannot initialise scale anew" in found.message
    assert "high_frequency was not measured" in found.message
    assert not math.isnan(by_task(found, "loss_after")["random_labels"])
    assert found.advantage.isnan().all()
    assert math.isnan(found.relative_advantage)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_would_stay_trained_are_no_fresh_network() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    found = trainability(model, LOADER, **QUICK)
    assert found.status is Status.OK
    assert "no comparison with fresh networks: 0.weight_g, 0.weight_v cannot be initialised anew" in found.message
    assert found.fresh_losses.isnan().all()
    assert not found.losses[1:].isnan().any()
    # A network that began with the seed of a fresh one is not taken for such a case.
    for seed in (0, 1):
        assert trainability(fresh_network(mlp, seed), LOADER, **QUICK).message == ""


def test_divergence_is_a_status_and_never_a_number() -> None:
    model = mlp().double()
    settings: dict[str, Any] = {**QUICK, "optimizer": "sgd", "learning_rate": 1e200, "steps": 12}
    found = trainability(model, LOADER, targets=("high_frequency", "data"), **settings)
    assert found.status is Status.NONFINITE
    assert "too large" in found.message
    assert "high_frequency (4 of the network, 2 of fresh ones)" in found.message
    assert math.isnan(by_task(found, "loss_after")["high_frequency"])
    assert math.isnan(by_task(found, "advantage")["high_frequency"])


def test_one_repeat_has_no_standard_error_and_no_repeatability() -> None:
    found = trainability(mlp(), LOADER, **{**QUICK, "repeats": 1})
    assert found.advantage_sem.isnan().all()
    assert found.loss_after_sem.isnan().all()
    assert found.repeatability.isnan().all()
    assert not found.advantage.isnan().any()


def test_the_intraclass_correlation_of_a_case_worked_by_hand() -> None:
    # Means 2, 4, 9 around 5: B = 2 (9 + 1 + 16) / 2 = 26; within each group a variance of 2: W = 2; (26 - 2) / (26 + 2).
    values = torch.tensor([[1.0, 3.0], [3.0, 5.0], [8.0, 10.0]])
    assert intraclass_correlation(values) == pytest.approx(24 / 28)
    assert intraclass_correlation(values + 7) == pytest.approx(24 / 28)
    assert intraclass_correlation(torch.tensor([[1.0, 1.0], [2.0, 2.0]])) == 1
    assert intraclass_correlation(torch.tensor([[1.0, 2.0, 3.0]] * 4)) == pytest.approx(-1 / 2)
    for unknown in (torch.ones(3, 2), values[:1], values[:, :1], values * math.nan):
        assert math.isnan(intraclass_correlation(unknown))


def test_the_intraclass_correlation_estimates_the_share_of_variance_between_groups() -> None:
    groups, each = torch.randn(4000, 1), torch.randn(4000, 3)
    # Fisher's standard error at rho = 0.8, k = 3 groups of 4000 is about 0.005.
    assert intraclass_correlation(2 * groups + each) == pytest.approx(4 / 5, abs=0.02)
    assert intraclass_correlation(each) == pytest.approx(0, abs=0.06)


def test_settings_are_recorded_and_impossible_ones_refused() -> None:
    found = trainability(mlp(), LOADER, **{**QUICK, "batch": 1000})
    assert (found.steps, found.batch, found.learning_rate, found.optimizer) == (4, 48, 0.01, "adam")
    assert found.conditions.examples == 48
    settings = TrainabilityProbe(**QUICK).settings()
    assert settings["targets"] == ("high_frequency", "random_labels", "data")
    assert {name: settings[name] for name in QUICK} == QUICK
    with pytest.raises(UnknownNameError, match="Did you mean 'random_labels'"):
        TrainabilityProbe(targets=("random_label",))
    with pytest.raises(UnknownNameError, match="adam"):
        TrainabilityProbe(optimizer="adamm")
    for wrong in ({"targets": ()}, {"targets": ("data", "data")}, {"steps": 0}, {"fresh": -1}, {"learning_rate": 0.0}):
        with pytest.raises(UsageError):
            TrainabilityProbe(**wrong)


def test_the_cost_counts_the_examples_of_every_update() -> None:
    made = subject(mlp(), LOADER)
    seen = {"forward": 0, "backward": 0}

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen["backward" if module.training else "forward"] += len(output)

    made.model[0].register_forward_hook(count)  # type: ignore[index]
    asked = TrainabilityProbe(**QUICK)
    cost = asked.cost(made)
    seen.update(forward=0, backward=0)
    with isolated():
        asked.measure(made, generator_for(0, "a"))
    assert cost.gradients == seen["backward"] == 3 * 2 * 3 * 4 * 16
    assert 0.5 * cost.forwards <= seen["forward"] <= 1.1 * cost.forwards


def test_it_runs_only_when_named_and_its_row_is_stored(tmp_path: Any) -> None:
    from plasticity_probe.study import resolve_probes
    from plasticity_probe.trace.reader import read_rows

    assert "trainability" not in resolve_probes(None)
    assert {"performance", "memorization"} <= resolve_probes(None).keys()
    assert resolve_probes(["trainability"])["trainability"] == TrainabilityProbe()
    quick = TrainabilityProbe(**QUICK, fresh=0)
    analysis = probe.analyze(mlp(), LOADER, probes=[quick], trace=tmp_path / "t.h5")
    assert analysis.ok
    rows = read_rows(tmp_path / "t.h5")
    assert [row.network for row in rows] == ["checkpoint", "fresh"]
    assert rows[0].variables["losses"].data.shape == (3, 2, 2)
    assert rows[0].variables["fresh_losses"].data.shape == (3, 2, 0)
    shown = [headline.name for headline in headlines(analysis["trainability"])]
    assert shown == ["learned", "fresh_learned", "relative_advantage", "relative_advantage_sem"]


def test_other_targets_keep_the_form_of_a_batch() -> None:
    new = torch.zeros(48)
    assert with_targets((X, Y), new) == (X, new)
    assert with_targets([X], new) == (X, new)
    assert with_targets(X, new) == (X, new)
    replaced = with_targets({"x": X, "label": Y}, new)
    assert set(replaced) == {"x", "labels"}
    assert replaced["labels"] is new


def test_a_model_put_to_a_task_takes_the_subjects_mode() -> None:
    made = subject(mlp(), LOADER)
    other = with_model(made, reinitialised(made.model)().train())
    assert not other.model.training
    assert other.memo is not made.memo
    assert other.mean_loss != made.mean_loss
