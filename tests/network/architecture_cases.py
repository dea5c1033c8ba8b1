"""Small instances of the architectures that people bring, with their loss and its derivatives written out by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Terms = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Judge:
    """A loss of outputs and targets.

    Args:
        terms: Per example the sum of its terms and their number.
        curved: The Hessian of the sum of all terms in the outputs, times a tangent.
    """

    terms: Callable[[Tensor, Tensor], Terms]
    curved: Callable[[Tensor, Tensor, Tensor], Tensor]


def _surprise(outputs: Tensor, targets: Tensor) -> Terms:
    kept = targets != -100
    logarithms = outputs.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(logarithms * kept).reshape(len(targets), -1).sum(1), kept.reshape(len(targets), -1).sum(1)


def _surprise_curved(outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
    p = outputs.softmax(-1)
    return (p * tangent - p * (p * tangent).sum(-1, keepdim=True)) * (targets != -100).unsqueeze(-1)


def _squares(outputs: Tensor, targets: Tensor) -> Terms:
    return (outputs - targets).square().mean(1), torch.ones(len(targets))


def _squares_curved(outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
    return 2 * tangent / outputs.shape[1]


CROSS_ENTROPY = Judge(_surprise, _surprise_curved)
SQUARED_ERROR = Judge(_squares, _squares_curved)


def first_of(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


@dataclass(frozen=True)
class Case:
    """A network and its data, in two batches of different sizes.

    Args:
        build: Makes the network in float32.
        batches: Makes the data.
        judge: The loss.
        outputs: The plain network's outputs for a batch, classes last.
        targets: The targets of a batch.
        wrap: What the user puts around the network.
        mode: The mode it is measured in.
        tolerance: Relative error that a float64 measurement may have.
    """

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    judge: Judge = CROSS_ENTROPY
    outputs: Callable[[nn.Module, Any], Tensor] = first_of
    targets: Callable[[Any], Tensor] = lambda batch: batch[1]
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    mode: str = "eval"
    tolerance: float = 1e-7

    def network(self) -> nn.Module:
        torch.manual_seed(3)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    def data(self) -> list[Any]:
        torch.manual_seed(4)
        return self.batches()


class Plain:
    """The mean loss of all data on an ordinary float64 module, by loops and first derivatives alone."""

    def __init__(self, case: Case, model: nn.Module, batches: list[Any]) -> None:
        self.case = case
        self.model = case.network().double().train(case.mode == "train")
        self.model.load_state_dict(model.state_dict())
        self.batches = [_doubled(batch) for batch in batches]
        self.leaves = [p for p in self.model.parameters() if p.requires_grad]
        self.point = torch.cat([p.detach().reshape(-1) for p in self.leaves]).clone()
        parts = [case.judge.terms(case.outputs(self.model, b).detach(), case.targets(b)) for b in self.batches]
        self.examples = sum(len(sums) for sums, _ in parts)
        self.terms = float(sum(counts.sum() for _, counts in parts))
        self.mean_loss = float(sum(sums.sum() for sums, _ in parts)) / self.terms

    def move(self, vector: Tensor) -> None:
        pieces = vector.split([p.numel() for p in self.leaves])
        with torch.no_grad():
            for leaf, piece in zip(self.leaves, pieces, strict=True):
                leaf.copy_(piece.view_as(leaf))

    def backward(self, value: Tensor) -> Tensor:
        for leaf in self.leaves:
            leaf.grad = None
        value.backward(retain_graph=True)
        return torch.cat(
            [torch.zeros(p.numel()).double() if p.grad is None else p.grad.reshape(-1) for p in self.leaves]
        )

    def gradient(self) -> Tensor:
        total = torch.zeros_like(self.point)
        for batch in self.batches:
            sums, _ = self.case.judge.terms(self.case.outputs(self.model, batch), self.case.targets(batch))
            total += self.backward(sums.sum())
        return total / self.terms

    def gradients(self) -> Tensor:
        """Those of the single examples, scaled so that their mean is the gradient."""
        rows = []
        for batch in self.batches:
            sums, _ = self.case.judge.terms(self.case.outputs(self.model, batch), self.case.targets(batch))
            rows += [self.backward(each) for each in sums]
        return torch.stack(rows) * self.examples / self.terms

    def hessian_times(self, vector: Tensor) -> Tensor:
        return self._differences(self.gradient, vector)

    def ggn_times(self, vector: Tensor) -> Tensor:
        total = torch.zeros_like(self.point)
        for batch in self.batches:

            def outputs(batch: Any = batch) -> Tensor:
                return self.case.outputs(self.model, batch).detach()

            tangent = self._differences(outputs, vector)
            values = self.case.outputs(self.model, batch)
            pulled = self.case.judge.curved(values.detach(), self.case.targets(batch), tangent)
            total += self.backward((values * pulled).sum())
        return total / self.terms

    def _differences(self, function: Callable[[], Tensor], vector: Tensor, step: float = 1e-4) -> Tensor:
        """The derivative along a vector: central differences at two steps, extrapolated (Richardson)."""

        def central(width: float) -> Tensor:
            ends = []
            for sign in (1, -1):
                self.move(self.point + sign * width * vector)
                ends.append(function())
            self.move(self.point)
            return (ends[0] - ends[1]) / (2 * width)

        return (4 * central(step) - central(2 * step)) / 3


def _doubled(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: _doubled(value) for key, value in batch.items()}
    return type(batch)(_doubled(value) for value in batch)


# ---------------------------------------------------------------------------------------------------------------- data


def split(*columns: Tensor, at: int = 5) -> list[Any]:
    return [tuple(c[:at] for c in columns), tuple(c[at:] for c in columns)]


def rows(count: int = 7, width: int = 4, classes: int = 3) -> list[Any]:
    return split(torch.randn(count, width), torch.randint(classes, (count,)))


def images(count: int = 7, size: int = 6) -> list[Any]:
    return split(torch.randn(count, 2, size, size), torch.randint(3, (count,)))


def signals(count: int = 7) -> list[Any]:
    return split(torch.randn(count, 5, 4), torch.randint(3, (count,)))


def numbers(count: int = 7) -> list[Any]:
    return split(torch.randn(count, 4), torch.randn(count, 3))


def words(count: int = 7, length: int = 5) -> list[Any]:
    """Token ids and next tokens; the sequences hold 5, 1, 0, 4, 2, ... tokens with a loss."""
    ids, targets = torch.randint(1, 9, (count, length)), torch.randint(9, (count, length))
    for row, kept in enumerate((5, 1, 0, 4, 2, 5, 3)[:count]):
        targets[row, kept:] = -100
    return split(ids, targets)


def word_lists(count: int = 7) -> list[Any]:
    """Batches whose sequences differ in length from batch to batch."""
    (ids, targets), (more_ids, more_targets) = words(count)
    return [(ids, targets), (more_ids[:, :3].clone(), more_targets[:, :3].clone())]


def labelled_words(count: int = 7) -> list[Any]:
    return [
        {"input_ids": ids, "labels": targets, "lengths": torch.tensor([5, 4, 3, 2, 1])[: len(ids)]}
        for ids, targets in words(count)
    ]


def by_name(model: nn.Module, batch: Any) -> Tensor:
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def labels(batch: Any) -> Tensor:
    return batch["labels"]


# ------------------------------------------------------------------------------------------------------------ networks


class Tokens(nn.Module):
    """Embedding, something that mixes positions, and a head that may share the embedding's weight."""

    def __init__(self, mix: nn.Module, width: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, width, padding_idx=0)
        self.mix = mix
        self.head = nn.Linear(width, 9, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(ids)))


class SelfAttention(nn.Module):
    def __init__(self, causal: bool, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
        self.causal, self.need_weights = causal, need_weights

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        mixed, _ = self.inner(x, x, x, attn_mask=mask, is_causal=self.causal, need_weights=self.need_weights)
        return x + mixed


class ScaledDotProduct(nn.Module):
    def __init__(self, causal: bool = False, padded: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.causal, self.padded = causal, padded

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool) if self.padded else None
        if mask is not None:
            mask[:, -1] = False
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return x + mixed.transpose(1, 2).flatten(2)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class Padded(nn.Module):
    """A whole encoder with a padding mask: what its nested-tensor fast path is for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 9)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.arange(ids.shape[1]) >= ids.shape[1] - 1
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=hidden.expand(ids.shape)))


class LastState(nn.Module):
    def __init__(self, inner: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0][:, -1])


class Packed(nn.Module):
    """An LSTM over sequences of the lengths given beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 3)
        self.inner = nn.LSTM(3, 3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, 9)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> SimpleNamespace:
        inputs = pack_padded_sequence(self.embedding(input_ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.inner(inputs)[0], batch_first=True, total_length=input_ids.shape[1])
        return SimpleNamespace(logits=self.head(hidden), loss=None)


class Stateful(nn.Module):
    """Keeps its hidden state between batches in a tuple, as many recurrent models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)
        self.hidden: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out, self.hidden = self.inner(x)
        return self.head(out[:, -1])


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.c(F.silu(self.b(F.gelu(self.a(x), approximate="tanh")).sin()))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x.clone().mul_(2)), inplace=True)
        x = self.b(x).add_(x)
        return self.c(F.leaky_relu_(x))


class Branching(nn.Module):
    """A path through the network that depends on the data and on the weights, with a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self._one(row) for row in x])

    def _one(self, row: Tensor) -> Tensor:
        for _ in range(1 + int(row.detach().sum() > 0)):
            row = torch.tanh(self.a(row) if float(self.b(row).detach()[0]) > 0 else self.b(row))
        return self.c(row)


class Unused(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(4, 5), nn.Linear(2, 2), nn.Linear(5, 3)
        self.form = form
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.form(self.frozen(torch.tanh(self.used(x))))


class Output(dict[str, Any]):
    """An output as Hugging Face's: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class CausalModel(nn.Module):
    """Takes what a tokenizer gives, returns what Hugging Face's models return."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tokens(ScaledDotProduct(causal=True), tied=True)

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None) -> Output:
        return Output(loss=None, logits=self.inner(input_ids), past_key_values=())


class Reused(nn.Module):
    """One layer applied three times and one weight used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.a(x))
        return self.head(x @ self.a.weight)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def mlp(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), activation or nn.Tanh(), nn.Linear(6, 3))


def normalised(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), layer, nn.GELU(), nn.Linear(6, 3))


def convolutional(norm: nn.Module) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norm, nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        net.train()(2 * torch.randn(32, 2, 6, 6) + 1)
    return net.train()


def batch_rows() -> nn.Module:
    net = normalised(nn.BatchNorm1d(6))
    with torch.no_grad():
        net.train()(2 * torch.randn(32, 4) + 1)
    return net


def encoder_layer(norm_first: bool, activation: str = "relu") -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, activation=activation, batch_first=True, norm_first=norm_first)


def spectral(legacy: bool) -> nn.Module:
    layer = nn.Linear(4, 6)
    layer = nn.utils.spectral_norm(layer) if legacy else parametrizations.spectral_norm(layer)
    net = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3)).train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 4))
    return net


def weight_normed(legacy: bool) -> nn.Module:
    layer = nn.Linear(4, 6)
    layer = nn.utils.weight_norm(layer) if legacy else parametrizations.weight_norm(layer)
    net = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))
    net(torch.randn(2, 4))  # the legacy hook now keeps a weight that is no leaf
    return net


def symmetric() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    return net


def orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))


CASES: dict[str, Case] = {
    "MLP": Case(mlp, rows),
    "regression": Case(mlp, numbers, SQUARED_ERROR),
    "MultiheadAttention": Case(lambda: Tokens(SelfAttention(causal=False, need_weights=True)), words),
    "MultiheadAttention, causal, without weights": Case(lambda: Tokens(SelfAttention(True, False)), words),
    "scaled dot product": Case(lambda: Tokens(ScaledDotProduct()), words),
    "scaled dot product, causal": Case(lambda: Tokens(ScaledDotProduct(causal=True)), words),
    "scaled dot product, masked": Case(lambda: Tokens(ScaledDotProduct(padded=True)), words),
    "TransformerEncoderLayer": Case(lambda: Tokens(encoder_layer(norm_first=False)), words),
    "TransformerEncoderLayer, norm first": Case(lambda: Tokens(encoder_layer(True, "gelu")), words),
    "TransformerEncoder with padding": Case(Padded, words),
    "TransformerDecoderLayer": Case(lambda: Tokens(Decoder()), words),
    "RNN": Case(lambda: LastState(nn.RNN(4, 4, batch_first=True), 4), signals),
    "LSTM, two layers both ways": Case(
        lambda: LastState(nn.LSTM(4, 2, 2, batch_first=True, bidirectional=True), 4), signals
    ),
    "LSTM with projection": Case(lambda: LastState(nn.LSTM(4, 4, batch_first=True, proj_size=2), 2), signals),
    "GRU, two layers both ways": Case(
        lambda: LastState(nn.GRU(4, 2, 2, batch_first=True, bidirectional=True), 4), signals
    ),
    "packed LSTM": Case(Packed, labelled_words, outputs=by_name, targets=labels),
    "LSTM that keeps its state": Case(Stateful, signals),
    "BatchNorm": Case(lambda: convolutional(nn.BatchNorm2d(4)), images),
    "BatchNorm of rows": Case(batch_rows, rows),
    "GroupNorm": Case(lambda: convolutional(nn.GroupNorm(2, 4)), images),
    "InstanceNorm": Case(lambda: convolutional(nn.InstanceNorm2d(4, affine=True)), images),
    "InstanceNorm with running statistics": Case(
        lambda: convolutional(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), images
    ),
    "LocalResponseNorm": Case(lambda: convolutional(nn.LocalResponseNorm(2)), images),
    "LayerNorm": Case(lambda: normalised(nn.LayerNorm(6)), rows),
    "RMSNorm": Case(lambda: normalised(nn.RMSNorm(6)), rows),
    "channels last": Case(
        lambda: convolutional(nn.GroupNorm(2, 4)).to(memory_format=torch.channels_last),
        images,  # type: ignore[call-overload]
    ),
    "transposed convolution": Case(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 2, 3, stride=2), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        ),
        images,
    ),
    "Embedding": Case(lambda: Tokens(nn.Tanh()), words),
    "tied head": Case(lambda: Tokens(nn.Tanh(), tied=True), words),
    "tied head, batches of other lengths": Case(lambda: Tokens(ScaledDotProduct(True), tied=True), word_lists),
    "weight_norm": Case(lambda: weight_normed(legacy=False), rows),
    "weight_norm by a hook": Case(lambda: weight_normed(legacy=True), rows),
    "spectral_norm": Case(lambda: spectral(legacy=False), rows),
    "spectral_norm by a hook": Case(lambda: spectral(legacy=True), rows),
    "own parametrization": Case(symmetric, rows),
    "orthogonal": Case(orthogonal, rows),
    "functional activations and a number as parameter": Case(Functional, rows),
    "in place": Case(InPlace, rows),
    "ReLU in place": Case(lambda: mlp(nn.ReLU(inplace=True)), rows),
    "gated": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.GLU(), nn.Linear(3, 3)), rows),
    "control flow": Case(Branching, rows),
    "reused layer": Case(Reused, rows),
    "unused and frozen parameters": Case(Unused, rows),
    "outputs in a tuple": Case(
        lambda: Unused(lambda z: (z, "more")), rows, outputs=lambda model, batch: model(batch[0])[0]
    ),
    "outputs in a mapping": Case(
        lambda: Unused(lambda z: {"logits": z}), rows, outputs=lambda model, batch: model(batch[0])["logits"]
    ),
    "outputs in an object": Case(
        lambda: Unused(lambda z: SimpleNamespace(logits=z)), rows, outputs=lambda model, batch: model(batch[0]).logits
    ),
    "causal model with labelled batches": Case(CausalModel, labelled_words, outputs=by_name, targets=labels),
    "compiled": Case(mlp, rows, wrap=lambda model: torch.compile(model, backend="eager")),  # type: ignore[arg-type]
    "compiled ahead of time": Case(mlp, rows, wrap=lambda model: torch.compile(model, backend="aot_eager")),  # type: ignore[arg-type]
    "DataParallel": Case(mlp, rows, wrap=nn.DataParallel),
}
"""Architectures in eval mode."""

BATCH_STATISTICS: dict[str, Case] = {
    "convolution": Case(lambda: convolutional(nn.BatchNorm2d(4)), lambda: [_joined(images())], mode="train"),
    "rows": Case(batch_rows, lambda: [_joined(rows())], mode="train"),
}
"""BatchNorm in train mode, where all examples are one batch."""


def _joined(batches: list[Any]) -> Any:
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))
