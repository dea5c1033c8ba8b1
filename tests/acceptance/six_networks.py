"""Six small networks in four states, and how far the measured curvature is from the dense float64 one.

    python tests/acceptance/six_networks.py [hessian|ggn|fisher ...] [network ...]

prints one Markdown table. Real images and text are used where PLASTICITY_PROBE_SHARED or PLASTICITY_PROBE_DATA names their folder, else
made-up ones.
"""

import copy
import gzip
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticity_probe as probe
from plasticity_probe.network.isolation import isolated, one_thread

EXAMPLES = 49
STATES = ("initialisation", "mid-training", "collapsed", "dead layer")
COLLAPSED = 1e-4
MIDWAY = 25
DELTA = 0.01
SINGLE = float(torch.finfo(torch.float32).eps)
NOISE = 64 * SINGLE
"""Share of the largest eigenvalue below which the numerical rank of a float32 matrix counts nothing."""

Batch = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------------------------------ data


def roots() -> Iterator[Path]:
    for name in ("PLASTICITY_PROBE_SHARED", "PLASTICITY_PROBE_DATA"):
        if os.environ.get(name):
            yield Path(os.environ[name])


def found(*names: str) -> Path | None:
    return next((root / name for root in roots() for name in names if (root / name).is_file()), None)


@cache
def digits(pool: int) -> Batch:
    """The first images of MNIST, averaged over squares of `pool` pixels and standardised; made-up ones where there are none."""
    images, labels = found("mnist/train-images-idx3-ubyte.gz"), found("mnist/train-labels-idx1-ubyte.gz")
    if images is None or labels is None:
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(EXAMPLES) % 10
        strokes = torch.rand(10, 1, 28, 28, generator=generator) ** 4
        x = strokes[y] + 0.2 * torch.rand(EXAMPLES, 1, 28, 28, generator=generator)
    else:
        pixels = np.frombuffer(gzip.decompress(images.read_bytes())[16 : 16 + EXAMPLES * 784], np.uint8)
        x = torch.tensor(pixels / 255.0).reshape(EXAMPLES, 1, 28, 28)
        y = torch.tensor(np.frombuffer(gzip.decompress(labels.read_bytes())[8 : 8 + EXAMPLES], np.uint8)).long()
    x = F.avg_pool2d(x.float(), pool)
    return (x - x.mean()) / x.std(), y


TEXT = """Now is the time when small things grow in quiet rooms, and no one asks the river where it goes; the rain has come to wash
the narrow street, and every lamp keeps watch until the day. Who walks so late? A friend, who brings you news from far away."""


@cache
def characters(sequences: int = 9, length: int = 16, context: int = 4) -> tuple[Tensor, Tensor, int]:
    """Pieces of Tiny Shakespeare and their next characters, the first few of which carry no loss: little precedes them."""
    file = found("tinyshakespeare.txt", "text/tinyshakespeare.txt")
    text = file.read_text() if file else TEXT
    vocabulary = {letter: index for index, letter in enumerate(sorted(set(text)))}
    ids = torch.tensor([vocabulary[letter] for letter in text[: sequences * length + 1]])
    inputs, targets = ids[:-1].view(sequences, length), ids[1:].view(sequences, length).clone()
    targets[:, :context] = -100
    return inputs, targets, len(vocabulary)


# -------------------------------------------------------------------------------------------------------------- networks


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.positions = nn.Parameter(0.02 * torch.randn(4, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.patches(x).flatten(2).mT + self.positions)).mean(1))


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(14, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.squeeze(1))[0][:, -1])


class LanguageModel(nn.Module):
    """A causal transformer over characters whose head is its embedding."""

    def __init__(self, letters: int, width: int = 8, length: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.norm(self.block(self.embedding(ids) + self.positions, src_mask=mask, is_causal=True)))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(49, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    )  # fmt: skip


def convolutional(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False), norm(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), norm(8), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 10),
    )  # fmt: skip


def push(parameter: Tensor, value: float) -> None:
    with torch.no_grad():
        parameter.fill_(value)


@dataclass(frozen=True)
class Recipe:
    """How a network is made, what it is trained on, and how one of its layers dies."""

    build: Callable[[], nn.Module]
    data: Callable[[], Batch]
    kill: Callable[[Any], None]

    def loader(self) -> list[Batch]:
        """All examples but one in the first batch, the last in the second."""
        x, y = self.data()
        return [(x[:-1], y[:-1]), (x[-1:], y[-1:])]


NETWORKS: dict[str, Recipe] = {
    "MLP": Recipe(perceptron, lambda: digits(4), lambda net: push(net[1].bias, -100.0)),
    "conv + BatchNorm": Recipe(
        lambda: convolutional(nn.BatchNorm2d), lambda: digits(2), lambda net: push(net[4].bias, -100.0)
    ),
    "conv + GroupNorm": Recipe(
        lambda: convolutional(lambda channels: nn.GroupNorm(2, channels)),
        lambda: digits(2),
        lambda net: push(net[4].bias, -100.0),
    ),
    "ViT": Recipe(VisionTransformer, lambda: digits(2), lambda net: push(net.block.linear2.weight, 0.0)),
    "LSTM": Recipe(Recurrent, lambda: digits(2), lambda net: push(net.head.weight, 0.0)),
    "tied character LM": Recipe(
        lambda: LanguageModel(characters()[2]),
        lambda: characters()[:2],
        lambda net: push(net.block.linear2.weight, 0.0),
    ),
}


# -------------------------------------------------------------------------------------------------------------- training


def mean_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten(), ignore_index=-100)


@cache
def networks(name: str) -> dict[str, nn.Module]:
    """The network in every state, in float32 and eval mode; trained in float64 with Adam, then L-BFGS, on all examples at once."""
    recipe = NETWORKS[name]
    with one_thread(), isolated():
        torch.manual_seed(0)
        states = {"initialisation": recipe.build()}
        net = copy.deepcopy(states["initialisation"]).double()
        x, y = recipe.data()
        x = x.double() if x.is_floating_point() else x

        def loss() -> Tensor:
            return mean_loss(net(x), y)

        adam = torch.optim.Adam(net.parameters(), 0.01)
        _descend(net.train(), adam, loss, MIDWAY, 0.0)
        states["mid-training"] = copy.deepcopy(net)
        _descend(net.eval(), adam, loss, 1500, 0.01)  # BatchNorm keeps the statistics that it has
        lbfgs = torch.optim.LBFGS(net.parameters(), 1, 1, 25, 0.0, 0.0, 50, "strong_wolfe")
        _descend(net, lbfgs, loss, 500, COLLAPSED)
        states["collapsed"] = net
        states["dead layer"] = copy.deepcopy(states["mid-training"])
        recipe.kill(states["dead layer"])
    return {state: net.float().eval() for state, net in states.items()}


def _descend(net: nn.Module, optimizer: Any, loss: Callable[[], Tensor], steps: int, until: float) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        if float(optimizer.step(closure).detach()) <= until:
            break
    optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------------- dense truth


@dataclass(frozen=True)
class Truth:
    """The eigenvalues of the dense matrix in float64, ascending, and the mean loss."""

    eigenvalues: Tensor
    loss: float

    @property
    def norm(self) -> float:
        return float(self.eigenvalues.abs().max())


@cache
def truth(name: str, state: str, matrix: str) -> Truth:
    """Dense double differentiation of the mean over all loss terms, or products of dense Jacobians."""
    net = copy.deepcopy(networks(name)[state]).double().eval()
    x, y = NETWORKS[name].data()
    x = x.double() if x.is_floating_point() else x
    leaves = list(net.parameters())
    # Second derivatives of GroupNorm cannot be taken for several vectors at once (torch 2.13).
    at_once = 1 if any(isinstance(module, nn.GroupNorm) for module in net.modules()) else 128
    with one_thread(), isolated():
        scores = net(x)
        loss = mean_loss(scores, y)
        if matrix == "hessian":
            gradient = torch.autograd.grad(loss, leaves, create_graph=True)
            dense = _rows(torch.cat([part.flatten() for part in gradient]), leaves, at_once)
        elif matrix == "ggn":
            jacobian = _rows(scores.flatten(), leaves, at_once)
            dense = jacobian.T @ _curved(scores.detach(), y, jacobian)
        else:
            terms = F.cross_entropy(scores.movedim(-1, 1), y, reduction="none", ignore_index=-100)
            each = _rows(terms.reshape(len(y), -1).sum(1) * len(y) / (y != -100).sum(), leaves, at_once)
            dense = each.T @ each / len(y)
        assert (dense - dense.T).norm() <= 1e-10 * dense.norm()
        return Truth(torch.linalg.eigvalsh((dense + dense.T) / 2), float(loss.detach()))


def _curved(scores: Tensor, targets: Tensor, jacobian: Tensor) -> Tensor:
    """The Hessian of the mean cross-entropy in the scores, (diag(p) - p p') / terms for each term, times the Jacobian."""
    counted = (targets != -100).flatten()
    p = scores.flatten(0, -2).softmax(-1)
    blocks = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) * counted[:, None, None] / counted.sum()
    return (blocks @ jacobian.view(*p.shape, -1)).flatten(0, 1)


def _rows(values: Tensor, leaves: list[Tensor], at_once: int) -> Tensor:
    """The Jacobian of a vector, some entries to a backward pass."""
    blocks = [
        torch.autograd.grad(values, leaves, rows, retain_graph=True, materialize_grads=True, is_grads_batched=True)
        if at_once > 1
        else [
            part[None]
            for part in torch.autograd.grad(values, leaves, rows[0], retain_graph=True, materialize_grads=True)
        ]
        for rows in torch.eye(len(values), dtype=values.dtype).split(at_once)
    ]
    return torch.cat([torch.cat([part.flatten(1) for part in block], 1) for block in blocks])


def dense_ranks(eigenvalues: Tensor) -> dict[str, float]:
    """Every rank of the absolute values, from its definition."""
    sizes = eigenvalues.abs().sort(descending=True).values
    shares, energies = sizes / sizes.sum(), sizes.square() / sizes.square().sum()
    positive = shares[shares > 0]
    return {
        "threshold_rank": float((shares.cumsum(0) < 1 - DELTA).sum() + 1),
        "energy_rank": float((energies.cumsum(0) < 1 - DELTA).sum() + 1),
        "effective_rank": math.exp(-float((positive * positive.log()).sum())),
        "stable_rank": float((sizes / sizes[0]).square().sum()),
        "participation_ratio": float(sizes.sum() ** 2 / sizes.square().sum()),
        "numerical_rank": float((sizes > NOISE * sizes[0]).sum()),
        "epsilon_rank": float((sizes > 1e-3 * sizes[0]).sum()),
    }


# ------------------------------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Comparison:
    """A measured spectrum beside the dense one.

    Args:
        spectrum: What was measured.
        exact: The dense eigenvalues.
        top: Per pair the error over the exact value's size.
        bottom: The same at the other end.
        top_in_norms: Per pair the error over the norm of the matrix.
        bottom_in_norms: The same at the other end.
        trace: Error of the trace in its standard errors; 0 where it lies within rounding, 1e-4 of the sum of absolute eigenvalues.
        missed: The ranks whose interval does not hold the dense one: (lower, upper, dense) by definition.
    """

    spectrum: Any
    exact: Truth
    top: Tensor
    bottom: Tensor
    top_in_norms: Tensor
    bottom_in_norms: Tensor
    trace: float
    missed: dict[str, tuple[float, float, float]]


def compared(name: str, state: str, matrix: str, seed: int = 0) -> Comparison:
    """Measures the float32 network as a user would and sets it beside the dense float64 matrix."""
    with one_thread():
        spectrum = probe.hessian_spectrum(networks(name)[state], NETWORKS[name].loader(), matrix=matrix, seed=seed)
    exact = truth(name, state, matrix)
    k = len(spectrum.top)
    highest, lowest = exact.eigenvalues.flip(0)[:k], exact.eigenvalues[:k]
    errors = [(spectrum.top - highest).abs(), (spectrum.bottom - lowest).abs()]
    rounding = 1e-4 * float(exact.eigenvalues.abs().sum())  # what float32 outputs leave of a collapsed network's
    off = abs(spectrum.matrix_trace - float(exact.eigenvalues.sum()))
    missed = {}
    for definition, dense in dense_ranks(exact.eigenvalues).items():
        rank = spectrum.rank(definition, DELTA, epsilon=1e-3 * exact.norm)
        slack = 1e-4 * dense  # the eigenvalues themselves are known to rounding
        if not rank.lower - slack <= dense <= rank.upper + slack:
            missed[definition] = (rank.lower, rank.upper, dense)
    return Comparison(
        spectrum,
        exact,
        errors[0] / highest.abs(),
        errors[1] / lowest.abs(),
        errors[0] / exact.norm,
        errors[1] / exact.norm,
        0.0 if off <= rounding else off / spectrum.matrix_trace_sem if spectrum.matrix_trace_sem else math.inf,
        missed,
    )


COLUMNS = (
    "network", "state", "matrix", "parameters", "loss", "status", "error of top, relative", "of bottom",
    "in norms", "products", "trace, standard errors", "rank intervals that cover",
)  # fmt: skip


def row(name: str, state: str, matrix: str) -> str:
    """One line of the Markdown table; relative errors are those of eigenvalues that are off by more than 1e-6 of the norm."""
    found = compared(name, state, matrix)
    ranks = len(dense_ranks(found.exact.eigenvalues))
    relative = [
        float(errors[scaled > 1e-6].max()) if bool((scaled > 1e-6).any()) else 0.0
        for errors, scaled in ((found.top, found.top_in_norms), (found.bottom, found.bottom_in_norms))
    ]
    cells = (
        name, state, matrix, str(found.spectrum.conditions.parameters), f"{found.exact.loss:.2g}", str(found.spectrum.status),
        f"{relative[0]:.1e}", f"{relative[1]:.1e}",
        f"{float(torch.cat([found.top_in_norms, found.bottom_in_norms]).max()):.1e}", f"{found.spectrum.products:.0f}",
        f"{found.trace:.2f}", f"{ranks - len(found.missed)}/{ranks}" + (f" (not {', '.join(found.missed)})" if found.missed else ""),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    """Prints the table of the matrices and networks named, or of all Hessians."""
    matrices = [each for each in arguments if each in ("hessian", "ggn", "fisher")] or ["hessian"]
    names = [each for each in arguments if each in NETWORKS] or list(NETWORKS)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in names:
        for state in STATES:
            for matrix in matrices:
                print(row(name, state, matrix), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
