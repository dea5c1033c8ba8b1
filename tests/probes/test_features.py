import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plasticity_probe.checkpoints.networks import CifarResNet
from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.measurement import Status, arrays, headlines
from plasticity_probe.network.capture import Activation
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.layers import Call, Layer
from plasticity_probe.network.subject import subject
from plasticity_probe.probes import features as module
from plasticity_probe.probes.features import FeatureRankProbe, LayerRank, TriangularFactor, feature_rank

LAYER = Layer("planted", "relu", Call("activation", "planted", 1, "relu"))


def with_spectrum(values: list[float], rows: int = 60, columns: int = 12, seed: int = 0) -> Tensor:
    """A matrix with the given singular values (and zeros) and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64, generator=generator))[0]
        for size in (rows, columns)
    )
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


def reading(matrix: Tensor) -> tuple[nn.Module, list[Any]]:
    """A network whose only feature layer has exactly this matrix."""
    return nn.Linear(matrix.shape[1], 2).double(), [(matrix, torch.zeros(len(matrix)).long())]


def by_hand(matrix: np.ndarray, delta: float = 0.01, epsilon: float = 0.01) -> dict[str, float]:
    """Every rank from numpy's singular values of the full matrix."""
    s = np.linalg.svd(matrix, compute_uv=False)
    rows, columns = matrix.shape
    p = s[s > 0] / s.sum()

    def least(values: np.ndarray) -> float:
        return float(np.argmax(np.cumsum(values) >= (1 - delta) * values.sum() * (1 - 1e-13)) + 1)

    return {
        "rows": rows,
        "features": columns,
        "ceiling": min(rows, columns),
        "threshold_rank": least(s),
        "energy_rank": least(s**2),
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "stable_rank": (matrix**2).sum() / s[0] ** 2,
        "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
        "epsilon_rank": float((s / math.sqrt(rows) > epsilon).sum()),
    }


def check(found: LayerRank, expected: dict[str, float], rel: float = 1e-6) -> None:
    for field, value in expected.items():
        assert getattr(found, field) == pytest.approx(value, rel=rel), field


PLANTED = {
    "decaying": [10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 1e-3],
    "flat": [2.0] * 12,
    "one": [5.0],
    "ill-conditioned": [1.0, 1e-4, 1e-8, 1e-12],
    "tiny": [1e-30, 5e-31],
    "huge": [1e30, 5e29],
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_spectra_come_out_to_a_millionth(name: str) -> None:
    values = PLANTED[name]
    found = feature_rank(*reading(with_spectrum(values))).penultimate
    # An error of eps times the largest is what any backward stable method makes.
    floor = 64 * np.finfo(float).eps * values[0]
    assert list(found.singular_values[: len(values)]) == pytest.approx(values, rel=1e-6, abs=floor)
    assert all(value <= floor for value in found.singular_values[len(values) :])
    assert len(found.singular_values) == 12
    assert found.numerical_rank == len(values)
    p = np.array(values) / sum(values)
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert found.stable_rank == pytest.approx(sum((v / values[0]) ** 2 for v in values), rel=1e-6)


def test_squaring_the_features_would_lose_what_is_kept_here() -> None:
    """The wrong way, by the Gram matrix, cannot tell a singular value of 1e-12 from rounding."""
    matrix = with_spectrum(PLANTED["ill-conditioned"])
    squared = torch.linalg.eigvalsh(matrix.T @ matrix).clamp(min=0).sqrt().flip(0)
    assert abs(float(squared[3]) - 1e-12) > 1e-10
    kept = feature_rank(*reading(matrix)).penultimate.singular_values[3]
    assert kept == pytest.approx(1e-12, rel=1e-2)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x).mean((2, 3)))


IMAGES = torch.randn(23, 3, 6, 6, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(23) % 4


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_every_rank_of_every_layer_against_the_full_matrix(dtype: torch.dtype, rel: float) -> None:
    model = Convolutional()
    found = feature_rank(model, [(IMAGES[:9], LABELS[:9]), (IMAGES[9:], LABELS[9:])], dtype=dtype)
    assert found.layers == ("relu", "head:input")
    with torch.no_grad():
        maps = model.double().maps(IMAGES.double())
    check(found.layer("relu"), by_hand(maps.permute(0, 2, 3, 1).reshape(-1, 6).numpy()), rel)
    check(found.penultimate, by_hand(maps.mean((2, 3)).numpy()), rel)
    assert found.penultimate_layer == "head:input"
    assert found.penultimate.numerical_rank == 6


def test_taking_positions_for_features_would_be_noticed() -> None:
    model = Convolutional()
    found = feature_rank(model, [(IMAGES, LABELS)]).layer("relu")
    with torch.no_grad():
        maps = model.maps(IMAGES)
    wrong = by_hand(maps.flatten(1).double().numpy())
    assert (found.features, found.rows) == (6, 23 * 16) != (wrong["features"], wrong["rows"])
    assert found.effective_rank != pytest.approx(wrong["effective_rank"], rel=1e-2)


def test_centring_would_be_noticed() -> None:
    matrix = with_spectrum([3.0, 1.0, 0.2]) + 1
    found = feature_rank(*reading(matrix)).penultimate
    check(found, by_hand(matrix.numpy()))
    assert found.effective_rank != pytest.approx(by_hand((matrix - matrix.mean(0)).numpy())["effective_rank"], rel=1e-2)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 20), min_size=1, max_size=12), columns=st.integers(1, 30), block=st.integers(1, 40))
def test_singular_values_do_not_depend_on_how_the_rows_come(cuts: list[int], columns: int, block: int) -> None:
    rows = torch.randn(sum(cuts), columns, dtype=torch.float64)
    factor, before = TriangularFactor(), module.BLOCK
    try:
        module.BLOCK = block
        for piece in rows.split(cuts):
            factor.add(Activation(LAYER, None, piece, 1))
    finally:
        module.BLOCK = before
    torch.testing.assert_close(factor.singular_values(), torch.linalg.svdvals(rows), rtol=1e-12, atol=1e-12)
    assert (factor.rows, factor.features) == rows.shape
    assert factor.factor is not None
    assert len(factor.factor) <= columns


@settings(max_examples=6, deadline=None)
@given(size=st.integers(1, 23))
def test_ranks_do_not_depend_on_the_chunk_size(size: int) -> None:
    model = Convolutional().double()
    with isolated():
        whole, parts = (subject(model, [(IMAGES, LABELS)]) for _ in range(2))
        parts.__dict__["chunk"] = size
        a, b = (FeatureRankProbe().measure(made, torch.Generator()) for made in (whole, parts))
    for name, values in arrays(a).items():
        if values.dtype != object:
            np.testing.assert_allclose(values, arrays(b)[name], rtol=1e-9, atol=1e-12)


def test_the_rank_of_a_dead_layer_is_zero_under_every_definition() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))
    nn.init.constant_(model[0].bias, -1e4)  # type: ignore[arg-type]
    found = feature_rank(model, [(torch.randn(30, 6), torch.zeros(30).long())])
    dead, constant = found.layer("1"), found.penultimate
    ranks = (
        "threshold_rank",
        "energy_rank",
        "effective_rank",
        "stable_rank",
        "participation_ratio",
        "numerical_rank",
        "epsilon_rank",
    )
    assert [getattr(dead, name) for name in ranks] == [0.0] * 7
    assert [getattr(constant, name) for name in ranks] == pytest.approx([1.0] * 7)
    assert (dead.ceiling, found.status) == (8.0, Status.OK)


def test_few_examples_limit_the_rank_and_the_ceiling_says_so() -> None:
    matrix = torch.randn(7, 40, dtype=torch.float64)
    found = feature_rank(*reading(matrix)).penultimate
    assert (found.ceiling, found.numerical_rank, len(found.singular_values)) == (7, 7, 7)
    check(found, by_hand(matrix.numpy()))
    fewer = feature_rank(*reading(matrix), examples=3)
    assert (fewer.penultimate.ceiling, fewer.conditions.examples) == (3, 3)


def test_the_epsilon_rank_sees_features_shrink_and_srank_does_not() -> None:
    matrix = torch.randn(100, 8, dtype=torch.float64)
    strong, weak = (feature_rank(*reading(scale * matrix)).penultimate for scale in (1.0, 1e-4))
    assert (strong.epsilon_rank, weak.epsilon_rank) == (8, 0)
    assert strong.threshold_rank == weak.threshold_rank
    assert feature_rank(*reading(1e-4 * matrix), epsilon=1e-6).penultimate.epsilon_rank == 8


def test_the_epsilon_rank_is_of_the_features_over_the_root_of_the_rows() -> None:
    root = math.sqrt(60)
    found = feature_rank(*reading(with_spectrum([root, 0.011 * root, 0.009 * root]))).penultimate
    assert (found.epsilon_rank, found.numerical_rank) == (2, 3)


def test_delta_moves_the_threshold_rank() -> None:
    matrix = with_spectrum([8.0, 1.0, 0.9, 0.1])
    for delta, rank in ((0.001, 4), (0.01, 3), (0.1, 2), (0.2, 1)):
        found = feature_rank(*reading(matrix), delta=delta).penultimate
        assert (found.threshold_rank, found.energy_rank) == (rank, by_hand(matrix.numpy(), delta)["energy_rank"])


def test_float32_rounding_over_many_rows_is_no_rank_and_drowns_none() -> None:
    inner, outer = torch.randn(12, 3), torch.randn(3, 16)
    inner[:, 2] *= 1e-3
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Identity(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight.copy_((inner @ outer).T)  # type: ignore[union-attr,operator]
    x = torch.randn(64, 500, 12)
    found = feature_rank(model, [(x, torch.zeros(64, 500).long())]).penultimate
    assert (found.rows, found.numerical_rank) == (32000, 3)
    # The usual tolerance, max(shape) * eps * largest, would not see the third direction here.
    assert found.singular_values[2] < 32000 * torch.finfo(torch.float32).eps * found.singular_values[0]


def test_tokens_are_rows() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
            self.layer = nn.TransformerEncoderLayer(6, 2, 11, batch_first=True, activation=F.gelu)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.layer(self.embed(tokens)))

    tokens = torch.randint(9, (8, 5))
    found = feature_rank(Model(), [(tokens, tokens)])
    assert found.layers == ("layer.gelu", "head:input")
    assert (found.layer("layer.gelu").rows, found.layer("layer.gelu").features) == (40, 11)
    assert (found.penultimate.rows, found.penultimate.features) == (40, 6)


def test_chosen_layers_and_modules() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    data = [(x, torch.zeros(30).long())]
    found = feature_rank(model, data, layers=["2", "1"])
    assert found.layers == ("2", "1")
    check(found.layer("2"), by_hand(model[:3](x).detach().numpy()))
    with pytest.raises(UsageError, match="penultimate layer was not measured"):
        _ = found.penultimate
    assert feature_rank(model, data, layers="3").penultimate.layer == "3"
    with pytest.raises(UnknownNameError, match="no layer named"):
        feature_rank(model, data, layers="relu")
    with pytest.raises(UnknownNameError):
        found.layer("3")


def test_layers_of_different_widths_are_padded_with_nan() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
    found = feature_rank(model, [(torch.randn(30, 6), torch.zeros(30).long())])
    assert found.singular_values.shape == (2, 5)
    assert found.singular_values[1].isnan().tolist() == [False] * 3 + [True] * 2
    assert len(found.penultimate.singular_values) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_a_status_and_not_a_number(value: float) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].bias[0] = value  # type: ignore[index]
    found = feature_rank(model, [(torch.randn(30, 6), torch.zeros(30).long())])
    assert found.status is Status.NONFINITE
    assert "'3'" in found.message
    assert math.isnan(found.penultimate.threshold_rank)
    assert found.penultimate.singular_values == ()
    assert found.layer("1").numerical_rank > 0


def test_a_network_without_any_feature_is_not_applicable() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    found = feature_rank(Scale(), [(torch.randn(8, 2), torch.zeros(8).long())])
    assert found.status is Status.NOT_APPLICABLE
    assert (found.layers, found.singular_values.shape) == ((), (0, 0))
    assert math.isnan(headlines(found)[0].value)


@pytest.mark.parametrize(
    "setting",
    [{"delta": 1.0}, {"delta": -0.1}, {"epsilon": -1.0}, {"epsilon": math.nan}, {"examples": 0}, {"layers": []}],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        FeatureRankProbe(**setting)


def test_cost_and_table() -> None:
    with isolated():
        made = subject(Convolutional(), [(IMAGES, LABELS)])
    cost = FeatureRankProbe().cost(made)
    assert (cost.forwards, cost.bytes) == (23, 8 * 6 * 6)
    assert FeatureRankProbe(layers=("relu",)).cost(made).bytes == 0
    found = feature_rank(Convolutional(), [(IMAGES, LABELS)])
    lines = headlines(found)
    assert 3 <= len(lines) <= 8
    assert {line.where for line in lines} == {"head:input"}
    assert found.to_dict()["layers"] == ["relu", "head:input"]


def test_frozen_tied_and_dictionary_networks() -> None:
    shared = nn.Linear(6, 6)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = shared
            self.head = nn.Linear(6, 2).requires_grad_(False)

        def forward(self, x: Tensor) -> Any:
            return {"logits": self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))}

    x = torch.randn(30, 6)
    found = feature_rank(Tied(), [(x, torch.zeros(30).long())], dtype=torch.float64)
    assert found.layers == ("tanh_1", "tanh_2")
    with torch.no_grad():
        shared.double()
        expected = torch.tanh(shared(torch.tanh(shared(x.double()))))
    check(found.penultimate, by_hand(expected.numpy()))


def test_the_real_resnet20_has_nineteen_relu_layers_and_64_penultimate_features(shared: Path) -> None:
    file = shared / "checkpoints/resnet20_cifar10/resnet20-12fca82f.th"
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    model = CifarResNet()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    found = feature_rank(model, [(torch.randn(16, 3, 32, 32), torch.zeros(16).long())])
    assert found.features.tolist() == [16] * 7 + [32] * 6 + [64] * 7
    assert found.penultimate_layer == "linear:input"
    assert (found.penultimate.features, found.penultimate.ceiling) == (64, 16)
