"""Per-example gradients and their Gram matrix, layer type by layer type, against dense autograd in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from plasticity_probe.network import example_gradients, outer_products, parameter_uses, position_vectors
from plasticity_probe.network.example_gradients import example_gradients as gradients_of
from plasticity_probe.network.example_gradients import route_of
from plasticity_probe.network.gradients import gradient_moments, gram, per_example_gradients
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.outer_products import (
    Gradients,
    Outer,
    add_inner,
    as_rows,
    compact,
    mirror,
    moments,
    part,
    squares,
    summed,
)
from plasticity_probe.network.subject import Subject, subject

Make = Callable[[], nn.Module]


class Applied(nn.Module):
    """Parameters used by a function instead of by modules."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape) / 2) for shape in shapes])
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


class Last(nn.Module):
    """The output of a recurrent layer at the last step."""

    def __init__(self, inner: nn.Module, batch_first: bool = True) -> None:
        super().__init__()
        self.inner, self.batch_first = inner, batch_first

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0][:, -1] if self.batch_first else self.inner(x.transpose(0, 1))[0][-1]


class Twice(nn.Module):
    """One layer called three times, and its weight used again, transposed, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return self.layer(x) @ self.layer.weight


class TiedTokens(nn.Module):
    """A language model whose head is its embedding; the vocabulary decides whether outer products or gradients are cheaper."""

    def __init__(self, vocabulary: int, width: int, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)).tanh())


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, 4))
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=False)[0]


class Turned(nn.Module):
    """A sequence-first module on batch-first data."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


VECTORS = torch.randn(9, 4)
TOKENS = torch.randn(9, 5, 4)
IMAGES = torch.randn(9, 4, 6, 6)
LINES = torch.randn(9, 4, 7)
VOLUMES = torch.randn(9, 2, 3, 4, 3)
WORDS = torch.randint(0, 7, (9, 5))

CASES: dict[str, tuple[Make, Tensor]] = {
    "linear": (lambda: nn.Linear(4, 3), VECTORS),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), VECTORS),
    "linear over tokens": (lambda: nn.Linear(4, 3), TOKENS),
    "linear over tokens, strided": (lambda: nn.Linear(5, 3), TOKENS.transpose(1, 2)),
    "linear over few tokens of wide layers": (lambda: nn.Linear(4, 40), TOKENS[:, :2]),
    "conv": (lambda: nn.Conv2d(4, 3, 3), IMAGES),
    "conv, stride and padding": (lambda: nn.Conv2d(4, 3, 3, stride=2, padding=1), IMAGES),
    "conv, uneven": (lambda: nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), IMAGES),
    "conv, same and reflected": (lambda: nn.Conv2d(4, 3, 4, padding="same", padding_mode="reflect"), IMAGES),
    "conv, circular": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), IMAGES),
    "conv, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), IMAGES),
    "conv, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGES),
    "conv of one place": (lambda: nn.Conv2d(4, 50, 6), IMAGES),
    "conv 1d": (lambda: nn.Conv1d(4, 3, 3, stride=2), LINES),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), VOLUMES),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), IMAGES),
    "transposed conv, groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2), LINES),
    "conv over frames": (
        lambda: Applied(lambda x, w: F.conv1d(x.flatten(0, 1)[:, None], w).unflatten(0, (len(x), -1)), (3, 1, 3)),
        TOKENS,
    ),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.Tanh()), IMAGES),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), VECTORS),
    "layer norm": (lambda: nn.LayerNorm(4), TOKENS),
    "layer norm of images": (lambda: nn.LayerNorm([6, 6]), IMAGES),
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGES),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGES),
    "rms norm": (lambda: nn.RMSNorm(4), TOKENS),
    "prelu": (lambda: nn.PReLU(4), IMAGES),
    "prelu, one slope": (lambda: nn.PReLU(), TOKENS),
    "scale and shift": (lambda: Applied(lambda x, a, b, c: a * x + b - c, (4, 1, 1), (1, 4, 6, 6), ()), IMAGES),
    "product with a matrix": (lambda: Applied(lambda x, w: x @ w, (4, 3)), TOKENS),
    "addmm with factors": (lambda: Applied(lambda x, w, b: torch.addmm(b, x, w, alpha=2.0, beta=0.5), (4, 3), (3,)), VECTORS),
    "class token and positions": (
        lambda: Applied(lambda x, c, p: (torch.cat([c.expand(len(x), -1, -1), x], 1) + p).tanh(), (1, 1, 4), (1, 6, 4)),
        TOKENS,
    ),
    "bilinear": (lambda: Applied(lambda x, w: torch.einsum("ni,nj,oij->no", x, x, w), (3, 4, 4)), VECTORS),
    "einsum over tokens": (lambda: Applied(lambda x, w: torch.einsum("nti,oi->nto", x, w), (3, 4)), TOKENS),
    "low rank": (lambda: Applied(lambda x, a, b, w: F.linear(x, w + a @ b), (3, 2), (2, 4), (3, 4)), TOKENS),
    "weight norm": (lambda: weight_norm(nn.Linear(4, 3)), VECTORS),
    "weight norm, conv": (lambda: weight_norm(nn.Conv2d(4, 3, 2)), IMAGES),
    "spectral norm": (lambda: spectral_norm(nn.Linear(4, 3)), VECTORS),
    "weights alone beside data": (lambda: Applied(lambda x, w: x @ w + w.pow(2).sum(), (4, 3)), VECTORS),
    "repeated and tied": (Twice, VECTORS),
    "attention": (SelfAttention, TOKENS),
    "cross attention": (CrossAttention, TOKENS),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), TOKENS),
    "transformer, sequence first": (
        lambda: Turned(nn.TransformerEncoderLayer(4, 2, 8)),
        TOKENS,
    ),
    "lstm": (lambda: Last(nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)), TOKENS),
    "lstm, sequence first": (lambda: Last(nn.LSTM(4, 3), batch_first=False), TOKENS),
    "gru": (lambda: Last(nn.GRU(4, 3, batch_first=True)), TOKENS),
    "rnn": (lambda: Last(nn.RNN(4, 3, batch_first=True)), TOKENS),
    "recurrent cell": (Cells, TOKENS),
    "embedding": (lambda: nn.Embedding(7, 3), WORDS),
    "embedding, padding": (lambda: nn.Embedding(7, 3, padding_idx=2), WORDS),
    "embedding of a large vocabulary": (lambda: nn.Embedding(7000, 3), WORDS),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 3), WORDS),
    "tied tokens": (lambda: TiedTokens(7, 3, padding=0), WORDS),
    "tied tokens, large vocabulary": (lambda: TiedTokens(300, 8), WORDS),
}  # fmt: skip


READ_OFF_THE_GRAPH = set(CASES) - {
    "bilinear", "einsum over tokens", "spectral norm", "embedding bag", "addmm with factors",
}  # fmt: skip
"""What must not be left to slower ways."""


def curved(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose gradient differs at every output."""
    outputs = model(batch[0]).flatten(1)
    return ((outputs - torch.arange(outputs.shape[1]).to(outputs) / 7) ** 4).sum(1).add(1).sqrt()


def made_of(name: str, dtype: torch.dtype, ragged: bool = True, **options: Any) -> Subject:
    make, inputs = CASES[name]
    torch.manual_seed(3)
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    targets = torch.zeros(len(inputs))
    batches = [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])] if ragged else [(inputs, targets)]
    return subject(model, batches, loss=curved, dtype=dtype, **options)


def exact(made: Subject) -> Tensor:
    """Every example by itself, in float64, through plain autograd."""
    leaves = list(made.parameters.values())
    rows = []
    for batch in made.examples.chunks(1):
        loss = made.losses(made.parameters, batch)[0].sum()
        found = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in found]))
    return torch.stack(rows)


def inner(left: Gradients, right: Gradients) -> torch.Tensor:
    """The inner products of two sets of gradients."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    add_inner(total, left, right)
    if left is right:
        mirror(total)
    return total


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_their_products_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated():
        made = made_of(name, torch.float64)
        rows = exact(made)
        assert relative(torch.cat([per_example_gradients(made, b) for b in made.examples.chunks(4)]), rows) < 1e-12
        assert relative(gram(made), rows @ rows.T) < 1e-10
        assert relative(gram(made_of(name, torch.float32)), rows @ rows.T) < 1e-5
        read = not set(made.parameters) - set(route_of(made).orders)
        assert read == (name in READ_OFF_THE_GRAPH)
        # The smallest blocks that there can be, and the way that was not taken.
        small = made_of(name, torch.float64, memory=8 * 3 * route_of(made).numbers * 8)
        monkeypatch.setattr(position_vectors, "SLAB", 32)
        monkeypatch.setattr(outer_products, "SLAB", 32)
        monkeypatch.setattr(outer_products, "PAIRS", 16)
        assert relative(gram(small), rows @ rows.T) < 1e-10
        for cheaper in (True, False):
            monkeypatch.setattr(outer_products, "pairs_are_cheaper", lambda _, cheaper=cheaper: cheaper)
            assert relative(gram(made_of(name, torch.float64)), rows @ rows.T) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_moments_over_examples_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated():
        rows = exact(made_of(name, torch.float64))
        for slab in (2**20, 32):
            monkeypatch.setattr(outer_products, "SLAB", slab)
            for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
                found = gradient_moments(made_of(name, dtype))
                assert found.mean.dtype == found.mean_square.dtype == torch.float64
                assert relative(found.mean, rows.mean(0)) < close
                assert relative(found.mean_square, rows.square().mean(0)) < close
        assert relative(rows.mean(0).square(), rows.square().mean(0)) > 100 * close


@pytest.mark.parametrize("name", ["repeated and tied", "tied tokens", "tied tokens, large vocabulary", "lstm"])
def test_without_the_cross_terms_between_uses_it_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated():
        made = made_of(name, torch.float64)
        rows = exact(made)
        route_of(made)
        products = torch.zeros(9, 9, dtype=torch.float64)
        (batch,) = made.examples.chunks(9)
        real = parameter_uses.summed
        uses: list[Any] = []
        monkeypatch.setattr(parameter_uses, "summed", lambda parts: (uses.extend(parts), real(parts))[1])
        gradients_of(made, batch)
        for one in {id(use): use for use in uses}.values():
            products += inner(one, one)
        assert relative(products, rows @ rows.T) > 1e-2


@pytest.mark.parametrize("name", ["linear over tokens", "conv, groups", "tied tokens", "embedding, padding", "conv"])
def test_every_form_of_the_same_gradients_agrees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated():
        made = made_of(name, torch.float64)
        (batch,) = made.examples.chunks(9)
        monkeypatch.setattr(example_gradients, "compact", lambda gradients: gradients)
        for gradients in gradients_of(made, batch).values():
            rows = as_rows(gradients)
            assert torch.allclose(squares(gradients), rows.square().sum(1), rtol=1e-12)
            assert torch.allclose(torch.stack(moments(gradients)), torch.stack([rows.sum(0), rows.square().sum(0)]))
            assert torch.allclose(as_rows(part(gradients, 2, 5)), rows[2:5], rtol=1e-12)
            assert torch.allclose(as_rows(summed([gradients, gradients, rows])), 3 * rows, rtol=1e-12)
            assert torch.allclose(inner(gradients, part(gradients, 1, 4)), rows @ rows[1:4].T, rtol=1e-10, atol=1e-12)
            assert torch.allclose(inner(compact(gradients), rows), rows @ rows.T, rtol=1e-10, atol=1e-12)
            if isinstance(gradients, Outer):
                monkeypatch.setattr(outer_products, "pairs_are_cheaper", lambda _: True)
                assert torch.allclose(squares(gradients), rows.square().sum(1), rtol=1e-12)
                monkeypatch.undo()
                monkeypatch.setattr(example_gradients, "compact", lambda gradients: gradients)


def test_a_wrong_rule_is_found_and_left_to_the_slower_way(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dict(parameter_uses.RULES) | {("AddmmBackward0", 2): lambda use, flowing, rows: 2 * as_rows(
        parameter_uses._product(use, flowing, rows))}  # fmt: skip
    monkeypatch.setattr(parameter_uses, "RULES", broken)
    with isolated():
        made = made_of("linear", torch.float64)
        rows = exact(made)
        assert relative(gram(made), rows @ rows.T) < 1e-12
        assert list(route_of(made).orders) == ["bias"]
        assert route_of(made).otherwise == "vmap"


def test_positions_are_not_taken_for_examples() -> None:
    """In a sequence-first layer rows run over time first; read the other way round the gradients would still add up."""
    with isolated():
        made = made_of("transformer, sequence first", torch.float64)
        assert "last" in route_of(made).orders.values()
        losses = made.losses(made.parameters, next(iter(made.examples.chunks(9))))[0]
        found = parameter_uses.gradients_by_use(losses, made.parameters, dict.fromkeys(made.parameters, "first"))
        rows = torch.cat([as_rows(found[name]) for name in made.parameters], 1)  # type: ignore[arg-type]
        right = exact(made)
    assert relative(rows.sum(0), right.sum(0)) < 1e-10
    assert relative(rows @ rows.T, right @ right.T) > 1e-2


def test_a_dead_layer_does_not_hide_how_it_is_used() -> None:
    with isolated():
        torch.manual_seed(0)
        model = Turned(nn.TransformerEncoderLayer(4, 2, 8))
        with torch.no_grad():
            model.get_parameter("inner.linear1.bias").fill_(-1e4)
        made = subject(model, [(TOKENS, torch.zeros(9))], loss=curved, dtype=torch.float64)
        assert set(route_of(made).orders) == set(made.parameters)
        with torch.no_grad():
            made.parameters["inner.linear1.bias"].fill_(0.0)
        rows = exact(made)
        assert relative(gram(made), rows @ rows.T) < 1e-10


def test_frozen_parameters_are_constants() -> None:
    with isolated():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4))
        model[0].bias.requires_grad_(False)
        model[2].weight.requires_grad_(False)
        made = subject(model, [(VECTORS, torch.zeros(9))], loss=curved, dtype=torch.float64)
        rows = exact(made)
        assert rows.shape[1] == 20 + 4 + 8
        assert relative(gram(made), rows @ rows.T) < 1e-10


def test_in_place_activations_do_not_disturb_what_was_read() -> None:
    with isolated():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.ReLU(inplace=True)
        )
        made = subject(model, [(IMAGES, torch.zeros(9))], loss=curved, dtype=torch.float64)
        rows = exact(made)
        assert not set(made.parameters) - set(route_of(made).orders)
        assert relative(gram(made), rows @ rows.T) < 1e-10


def test_the_square_of_the_mean_gradient_would_be_another_matrix() -> None:
    with isolated():
        made = made_of("linear", torch.float64)
        rows = exact(made)
        mean = rows.mean(0)
    fisher = torch.linalg.eigvalsh(gram(made) / 9)
    squared = torch.linalg.eigvalsh(mean.outer(mean))
    assert int((fisher > 1e-9 * fisher[-1]).sum()) > 1
    assert int((squared > 1e-9 * squared[-1]).sum()) == 1
    assert float(fisher.sum()) > 1.01 * float(squared.sum())


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 2
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.integers(1, 3))
        groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
        kernel, stride, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
        kind = draw(st.sampled_from([nn.Conv1d, nn.ConvTranspose1d]))
        layers.append(
            kind(channels, out * groups, kernel, stride=stride, padding=min(padding, kernel - 1), groups=groups)
        )
        channels = out * groups
        layers.append(
            draw(st.sampled_from([nn.Tanh(), nn.BatchNorm1d(channels), nn.GroupNorm(1, channels), nn.PReLU()]))
        )
    return nn.Sequential(*layers)


@settings(max_examples=25, deadline=None)
@given(networks(), st.integers(1, 7), st.integers(0, 2**31))
def test_random_networks(model: nn.Module, examples: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = torch.randn(examples, 2, 8)
    with isolated():
        made = subject(model, [(inputs, torch.zeros(examples))], loss=curved, dtype=torch.float64)
        rows = exact(made)
        assert float((gram(made) - rows @ rows.T).norm()) <= 1e-10 * float((rows @ rows.T).norm()) + 1e-300
