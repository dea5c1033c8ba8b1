import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plasticity_probe.checkpoints.networks import CifarResNet
from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.measurement import Status, arrays, headlines
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import subject
from plasticity_probe.probe import generator_for
from plasticity_probe.probes.units import TAUS, DeadUnits, UnitActivity, dead_units

EIGHT = [(torch.zeros(8, 1), torch.zeros(8).long())]


def planted(columns: list[list[float]], activation: Callable[[Tensor], Tensor]) -> tuple[nn.Module, list[Any]]:
    """A network whose hidden pre-activations on the examples are exactly the given columns."""

    class Planted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(len(columns), len(columns)), nn.Linear(len(columns), 2)
            with torch.no_grad():
                self.inner.weight.copy_(torch.eye(len(columns)))
                self.inner.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(activation(self.inner(x)))

    rows = torch.tensor(columns).T
    return Planted(), [(rows, torch.zeros(len(rows)).long())]


def naive(inputs: Tensor | None, outputs: Tensor, tau: float) -> dict[str, float]:
    """The definitions on the full activation matrix of a ReLU layer, one unit at a time."""
    rows, units = outputs.shape
    means = [float(outputs[:, i].double().abs().sum()) / rows for i in range(units)]
    layer_mean = sum(means) / units
    dead = dormant = linear = 0
    entropies: list[float] = []
    for i in range(units):
        column = outputs[:, i].tolist()
        dead += all(value == 0 for value in column)
        dormant += means[i] <= tau * layer_mean if layer_mean else True
        if inputs is not None:
            signs = [value > 0 for value in inputs[:, i].tolist()]
            linear += all(signs)
            p = sum(signs) / rows
            entropies.append(-sum(q * math.log2(q) for q in (p, 1 - p) if q))
    return {
        "dead_fraction": dead / units,
        "dormant_fraction": dormant / units,
        "linearized_fraction": linear / units,
        "sign_entropy": sum(entropies) / units if entropies else float("nan"),
        "mean_activity": layer_mean,
    }


def check(activity: UnitActivity, name: str, expected: dict[str, float]) -> None:
    found = activity.layer(name)
    for field, value in expected.items():
        assert getattr(found, field) == pytest.approx(value, rel=1e-6, abs=1e-12), field


@pytest.mark.parametrize(
    "relu",
    [F.relu, torch.relu, lambda x: x.relu_(), lambda x: F.relu(x, inplace=True), nn.ReLU(), nn.ReLU(inplace=True)],
)
def test_planted_units_of_every_state(relu: Callable[[Tensor], Tensor]) -> None:
    alive, dead, small, zombie = (
        [1.0, -1.0, 2.0, -3.0],
        [-1.0, -2.0, 0.0, -9.0],
        [0.01, -1.0, -1.0, -1.0],
        [5.0, 6, 7, 8],
    )
    model, data = planted([alive, dead, small, zombie], relu)
    activity = dead_units(model, data)
    assert activity.total_units == 4
    assert activity.total_dead_fraction == 0.25
    assert activity.total_dormant_fraction == 0.5
    assert activity.total_linearized_fraction == 0.25
    assert math.isnan(activity.total_saturated_fraction)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert float(activity.sign_entropy[0]) == pytest.approx((1 + 0 + quarter + 0) / 4)
    assert float(activity.mean_activity[0]) == pytest.approx((0.75 + 0 + 0.0025 + 6.5) / 4)


@pytest.mark.parametrize(
    ("activation", "columns", "linearized"),
    [
        (F.leaky_relu, [[1.0, 2, 3, 4], [-1.0, -2, -3, -4], [-1.0, 1, 1, 1], [0.0, 0, 0, 0]], 0.5),
        (lambda x: F.leaky_relu(x, 0.0), [[1.0, 2, 3, 4], [-1.0, -2, -3, -4]], 0.5),
        (lambda x: F.prelu(x, torch.tensor([0.3])), [[1.0, 2, 3, 4], [-1.0, -2, -3, -4], [-1.0, 1, 1, 1]], 2 / 3),
        (F.relu6, [[1.0, 2, 3, 5], [1.0, 2, 3, 7]], 0.5),
        (nn.ReLU6(), [[1.0, 2, 3, 5], [1.0, 2, 3, 7], [-1.0, -1, -1, -1]], 1 / 3),
        (F.elu, [[1.0, 2, 3, 5], [-1.0, -2, -3, -4]], 0.5),
        (F.selu, [[1.0, 2, 3, 5], [-1.0, 2, 3, 4]], 0.5),
        (F.hardtanh, [[0.5, -0.5, 0.1, 0.2], [0.5, 2.0, 0, 0], [0.0, 0, 0, 0]], 1 / 3),
        (F.hardsigmoid, [[0.5, -2.5, 0.1, 0.2], [0.5, 4.0, 0, 0]], 0.5),
        (F.hardswish, [[3.5, 4.0, 5, 6], [3.5, 2.0, 5, 6], [-4.0, -5, -6, -7]], 1 / 3),
        (F.gelu, [[1.0, 2, 3, 4]], float("nan")),
        (torch.tanh, [[0.1, 0.2, 0.3, 0.4]], float("nan")),
    ],
)
def test_linearized_units_by_kind(activation: Callable[[Tensor], Tensor], columns: Any, linearized: float) -> None:
    model, data = planted(columns, activation)
    assert dead_units(model, data).total_linearized_fraction == pytest.approx(linearized, nan_ok=True)


FLAT, STEEP = [9.0, -9.0, 9.0, 9.0], [0.1, -0.1, 0.2, 0.3]


@pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid, F.hardtanh, F.hardsigmoid, nn.Tanh(), nn.Sigmoid()])
def test_saturated_units(activation: Callable[[Tensor], Tensor]) -> None:
    model, data = planted([FLAT, STEEP, [9.0, -9.0, 9.0, 0.1]], activation)
    activity = dead_units(model, data)
    assert activity.total_saturated_fraction == pytest.approx(1 / 3)
    assert activity.total_dead_fraction == 0
    assert dead_units(model, data, share=0.75).total_saturated_fraction == pytest.approx(2 / 3)


def test_a_unit_that_is_active_once_and_hardly_is_not_dead() -> None:
    model, data = planted([[1e-30, -1.0, -1.0, -1.0], [-1.0] * 4], F.relu)
    activity = dead_units(model, data)
    assert activity.total_dead_fraction == 0.5
    assert activity.dormant_sweep[0].tolist() == [0.5] * 4


def test_saturation_begins_at_the_stated_slope() -> None:
    edge = math.atanh(math.sqrt(0.99))  # where 1 - tanh^2 is 0.01
    model, data = planted([[edge * 1.001] * 4, [edge * 0.999] * 4], torch.tanh)
    assert dead_units(model, data, dtype=torch.float64).total_saturated_fraction == 0.5
    assert dead_units(model, data, slope=0.02).total_saturated_fraction == 1
    soft, data = planted([[9.1] * 4, [8.9] * 4], F.softsign)  # (1 - |y|)^2 = 0.01 at |x| = 9
    assert dead_units(soft, data).total_saturated_fraction == 0.5


def test_relu6_saturates_at_six_and_dies_at_zero() -> None:
    model, data = planted([[7.0] * 4, [-1.0] * 4, [1.0] * 4], F.relu6)
    activity = dead_units(model, data)
    assert (activity.total_saturated_fraction, activity.total_dead_fraction) == (pytest.approx(1 / 3),) * 2


def test_the_dormancy_sweep_and_tau() -> None:
    means = [0.0, 0.02, 0.05, 0.3, 4.0]
    model, data = planted([[mean] * 4 for mean in means], F.relu)
    scores = [mean / (sum(means) / 5) for mean in means]
    expected = [sum(score <= tau for score in scores) / 5 for tau in TAUS]
    activity = dead_units(model, data, tau=0.5)
    assert activity.dormant_sweep[0].tolist() == pytest.approx(expected)
    assert activity.taus == ("0", "0.01", "0.025", "0.1")
    assert activity.total_dormant_fraction == sum(score <= 0.5 for score in scores) / 5
    assert expected == sorted(expected)
    assert len(set(expected)) > 2


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc, self.head = (
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.Linear(24, 9),
            nn.Linear(9, 4),
        )
        with torch.no_grad():
            self.bn.bias.copy_(torch.tensor([0.0, -9.0, 9.0, 0.5, -0.5, -1.0]))
            self.fc.bias[:3] = torch.tensor([-9.0, 9.0, -0.5])

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.bn(self.conv(x))
        return first, self.fc(F.max_pool2d(F.relu(first), 2).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pre(x)[1].relu())


IMAGES = torch.randn(23, 3, 6, 6, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(23) % 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_convolutional_network_against_the_full_matrices(dtype: torch.dtype) -> None:
    model = Convolutional()
    activity = dead_units(model, [(IMAGES[:9], LABELS[:9]), (IMAGES[9:], LABELS[9:])], dtype=dtype)
    assert activity.layers == ("relu_1", "relu_2")
    with torch.no_grad():
        channels, hidden = model.eval().to(dtype).pre(IMAGES.to(dtype))
    channels = channels.permute(0, 2, 3, 1).reshape(-1, 6)
    first, second = (naive(pre, F.relu(pre), 0.025) for pre in (channels, hidden))
    assert first["dead_fraction"] > 0 < first["linearized_fraction"]
    assert second["dead_fraction"] > 0 < second["linearized_fraction"]
    check(activity, activity.layers[0], first)
    check(activity, activity.layers[1], second)
    assert activity.units.tolist() == [6, 9]
    assert activity.rows.tolist() == [23 * 16, 23]
    total = (6 * first["dead_fraction"] + 9 * second["dead_fraction"]) / 15
    assert activity.total_dead_fraction == pytest.approx(total)


def test_taking_positions_for_units_would_be_noticed() -> None:
    model = Convolutional().eval()
    activity = dead_units(model, [(IMAGES, LABELS)])
    with torch.no_grad():
        pre = model.pre(IMAGES)[0]
    wrong = naive(pre.reshape(-1, 4), F.relu(pre).reshape(-1, 4), 0.025)
    assert activity.layer(activity.layers[0]).dead_fraction != wrong["dead_fraction"]


@settings(max_examples=8, deadline=None)
@given(size=st.integers(1, 23), seed=st.integers(0, 99))
def test_counts_do_not_depend_on_the_chunk_size(size: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Convolutional()
    with isolated():
        whole, parts = (subject(model, [(IMAGES, LABELS)]) for _ in range(2))
        whole.__dict__["chunk"], parts.__dict__["chunk"] = 23, size
        a, b = (DeadUnits().measure(made, generator_for(0, "dead_units")) for made in (whole, parts))
    for name, values in arrays(a).items():
        if values.dtype == object:
            assert values.tolist() == arrays(b)[name].tolist()
        else:
            # One image's convolution may round otherwise than a batch's.
            torch.testing.assert_close(
                torch.tensor(values), torch.tensor(arrays(b)[name]), rtol=1e-5, atol=1e-6, equal_nan=True
            )


def test_a_functional_network_that_is_entirely_dead_scores_one() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(32, 16), nn.Linear(16, 2)
            for layer in (self.a, self.b):
                nn.init.constant_(layer.bias, -1e4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    activity = dead_units(Dead(), [(torch.randn(20, 6), torch.zeros(20).long())])
    assert activity.total_dead_fraction == activity.total_dormant_fraction == 1
    assert activity.total_linearized_fraction == 0
    assert activity.total_units == 48
    assert activity.dormant_sweep.eq(1).all()
    assert activity.status is Status.OK


def test_a_concatenated_relu_has_twice_the_units() -> None:
    model, data = planted([[1.0, 2, 3, 4], [1.0, -1, 1, -1]], F.relu)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = model.inner, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)  # type: ignore[operator]
            return self.head(F.relu(torch.cat([h, -h], 1)))

    activity = dead_units(Both(), data)
    assert activity.total_units == 4
    assert (activity.total_dead_fraction, activity.total_linearized_fraction) == (0.25, 0.25)


def test_tokens_are_rows_and_features_units() -> None:
    encoder = nn.TransformerEncoderLayer(6, 2, 10, batch_first=True)
    with torch.no_grad():
        encoder.linear1.bias[:4] = -1e4
    model = nn.Sequential(encoder, nn.Linear(6, 3))
    activity = dead_units(model, [(torch.randn(7, 5, 6), torch.zeros(7, 5).long())])
    found = activity.layer("0.relu")
    assert (found.units, found.rows, found.dead_fraction) == (10, 35, 0.4)


def test_totals_weigh_units_and_not_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 9), nn.Tanh(), nn.Linear(9, 2))
    nn.init.constant_(model[0].bias, -1e4)  # type: ignore[arg-type]
    activity = dead_units(model, [(torch.randn(8, 3), torch.zeros(8).long())])
    assert activity.total_dead_fraction == pytest.approx(0.1)
    assert activity.total_saturated_fraction == 0
    assert activity.activations == "relu, tanh"
    assert math.isnan(float(activity.saturated_fraction[0]))


def test_a_network_without_hidden_units_is_not_applicable() -> None:
    activity = dead_units(nn.Linear(3, 2), [(torch.randn(8, 3), torch.zeros(8).long())])
    assert activity.status is Status.NOT_APPLICABLE
    assert "no hidden units" in activity.message
    assert math.isnan(activity.total_dead_fraction)
    assert activity.total_units == 0
    assert arrays(activity)["dormant_sweep"].shape == (0, 4)
    assert "UnitActivity" in repr(activity)


def test_a_linear_network_has_units_but_no_states_of_an_activation_function() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    activity = dead_units(model, [(torch.randn(8, 3), torch.zeros(8).long())])
    found = activity.layer("0")
    assert (found.units, found.dead_fraction) == (4, 0)
    assert all(math.isnan(v) for v in (found.saturated_fraction, found.linearized_fraction, found.sign_entropy))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_a_status_and_not_a_number(value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[2].weight[0, 0] = value  # type: ignore[index]
        model[0].bias.fill_(1e3)  # type: ignore[union-attr,operator]
    activity = dead_units(model, [(torch.randn(8, 3), torch.zeros(8).long())])
    assert activity.status is Status.NONFINITE
    assert "'3'" in activity.message
    assert math.isnan(activity.total_dead_fraction)
    assert activity.dead_fraction.isnan().tolist() == [False, True]


def test_minus_infinity_before_a_relu_is_no_healthy_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[0].bias, -math.inf)  # type: ignore[arg-type]
    assert dead_units(model, [(torch.randn(8, 3), torch.zeros(8).long())]).status is Status.NONFINITE


def test_examples_are_the_first_and_layers_can_be_chosen() -> None:
    x = torch.full((50, 1), -1.0)
    x[30:] = 1
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model[0].bias)  # type: ignore[arg-type]
    data = [(x, torch.zeros(50).long())]
    assert dead_units(model, data, layers="1", examples=30).total_dead_fraction == 1
    chosen = dead_units(model, data, layers=["1"])
    assert (chosen.layers, chosen.total_dead_fraction, chosen.conditions.examples) == (("1",), 0, 50)
    with pytest.raises(UnknownNameError, match="no layer named"):
        dead_units(model, data, layers="7")
    with pytest.raises(UnknownNameError):
        chosen.layer("3")


def test_layers_of_any_name_work() -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(1, 3))
    model.add_module("[/b]<script>", nn.ReLU())
    model.add_module("last", nn.Linear(3, 2))
    activity = dead_units(model, EIGHT, layers="[/b]<script>")
    assert activity.layers == ("[/b]<script>",)
    assert "<script>" not in activity._repr_html_()


@pytest.mark.parametrize(
    "setting", [{"tau": -0.1}, {"tau": math.nan}, {"slope": 1.0}, {"share": 0.0}, {"examples": 0}, {"layers": ()}]
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        DeadUnits(**setting)


def test_the_model_is_left_as_it_was() -> None:
    model = Convolutional().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    dead_units(model, [(IMAGES, LABELS)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_cost_is_the_examples_and_the_table_is_short() -> None:
    with isolated():
        made = subject(Convolutional(), [(IMAGES, LABELS)])
    assert DeadUnits().cost(made).forwards == 23
    assert DeadUnits(examples=5).cost(made).forwards == 5
    activity = dead_units(Convolutional(), [(IMAGES, LABELS)])
    assert 3 <= len(headlines(activity)) <= 8
    assert activity.to_dict()["total_units"] == 15


def test_the_real_resnet20_has_nineteen_relu_layers(shared: Path) -> None:
    file = shared / "checkpoints/resnet20_cifar10/resnet20-12fca82f.th"
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    model = CifarResNet()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    activity = dead_units(model, [(torch.randn(16, 3, 32, 32), torch.zeros(16).long())])
    assert activity.units.tolist() == [16] * 7 + [32] * 6 + [64] * 6
    assert activity.layers[:3] == ("relu", "layer1.0.relu_1", "layer1.0.relu_2")
    assert activity.total_units == 688
    assert activity.total_dead_fraction < 0.2
