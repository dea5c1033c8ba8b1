"""Our products against those of curvlinops (Dangel, Eschenhagen et al.), which come from forward over reverse mode and from code of others."""

import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from plasticity_probe.linalg.lanczos import extreme_eigenpairs
from plasticity_probe.network.curvature import curvature, hessian
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject

try:
    with warnings.catch_warnings(action="ignore"):  # of what it imports; they would be errors here
        from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
except Exception as reason:  # not installed, or backpack beneath it finds no working torchvision
    pytest.skip(f"curvlinops cannot be imported: {reason}", allow_module_level=True)

# torch's own rules for forward mode, which curvlinops uses, are scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")

OPERATORS = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator, "fisher": EFLinearOperator}


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolated():
        torch.manual_seed(0)
        yield


class Named(nn.Module):
    """Takes its inputs as a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(3, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.head(torch.tanh(self.left(inputs["a"]) * self.right(inputs["b"])))


class Spread(nn.Module):
    """The same network for our loader, whose mappings are handed on by name."""

    def __init__(self, network: Named) -> None:
        super().__init__()
        self.network = network

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.network({"a": a, "b": b})


def mlp(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


def conv() -> nn.Module:
    """A small network whose BatchNorm has seen data, in eval mode."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    with torch.no_grad():
        net(torch.randn(32, 2, 6, 6) * 2 + 1)
    return net.double().eval()


def labels(count: int) -> Tensor:
    return torch.randint(0, 3, (count,))


def ragged(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """One full batch and a last one of a single example that outweighs the others where batches are averaged equally."""
    x[-1] *= 4
    return [(x[:-1], y[:-1]), (x[-1:], y[-1:])]


def theirs(
    matrix: str, model: nn.Module, loss: nn.Module, data: Any, **options: Any
) -> HessianLinearOperator | GGNLinearOperator | EFLinearOperator:
    return OPERATORS[matrix](model, loss, list(model.parameters()), data, **options)


def differs(made: Subject, matrix: str, operator: Any, scale: float = 1.0) -> float:
    """Relative difference of the products with three random vectors; `scale` is what their matrix has to be multiplied with."""
    block = torch.randn(made.size, 3, dtype=torch.float64)
    ours, other = curvature(made, matrix) @ block, scale * (operator @ block)
    return float((ours - other).norm() / other.norm())


@pytest.mark.parametrize("matrix", OPERATORS)
def test_cross_entropy_on_ragged_batches(matrix):
    net, data = mlp(), ragged(torch.randn(33, 4).double(), labels(33))
    other = theirs(matrix, net, nn.CrossEntropyLoss(), data)
    assert differs(subject(net, data), matrix, other) < 1e-10
    alone = theirs(matrix, net, nn.CrossEntropyLoss(), data[-1:])
    assert differs(subject(net, data), matrix, alone) > 0.1, "the last example alone is another matrix"


@pytest.mark.parametrize("matrix", OPERATORS)
def test_squared_error_on_ragged_batches(matrix):
    # The loss of an example is its mean over the C outputs, as in torch's mse_loss, so the Fisher holds 1/C twice; curvlinops divides once.
    net, data = mlp(2), ragged(torch.randn(33, 4).double(), torch.randn(33, 2).double())
    other = theirs(matrix, net, nn.MSELoss(), data)
    assert differs(subject(net, data), matrix, other, scale=0.5 if matrix == "fisher" else 1.0) < 1e-10


@pytest.mark.parametrize("matrix", OPERATORS)
def test_chunks_of_any_size(matrix):
    net, data = mlp(), ragged(torch.randn(33, 4).double(), labels(33))
    made = subject(net, data)
    made.__dict__["chunk"] = 5
    assert differs(made, matrix, theirs(matrix, net, nn.CrossEntropyLoss(), data)) < 1e-10


@pytest.mark.parametrize("matrix", OPERATORS)
def test_inputs_in_mappings(matrix):
    net = Named().double()
    a, b, y = torch.randn(11, 4).double(), torch.randn(11, 3).double(), labels(11)
    pieces = [slice(0, 6), slice(6, 11)]
    other = theirs(
        matrix, net, nn.CrossEntropyLoss(), [({"a": a[p], "b": b[p]}, y[p]) for p in pieces], batch_size_fn=_rows
    )
    with_targets_inside = [{"a": a[p], "b": b[p], "labels": y[p]} for p in pieces]
    with_targets_beside = [({"a": a[p], "b": b[p]}, y[p]) for p in pieces]
    assert differs(subject(Spread(net), with_targets_inside), matrix, other) < 1e-10
    assert differs(subject(Spread(net), with_targets_beside), matrix, other) < 1e-10


@pytest.mark.parametrize("matrix", OPERATORS)
def test_a_loader_that_shuffles(matrix):
    net, x, y = mlp(), torch.randn(33, 4).double(), labels(33)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    made = subject(net, loader)
    # Their own check compares the loss of the last batch, so it takes a shuffled loader for one that does not repeat itself.
    shuffled = theirs(matrix, net, nn.CrossEntropyLoss(), loader, check_deterministic=False)
    assert differs(made, matrix, shuffled) < 1e-10
    assert differs(made, matrix, theirs(matrix, net, nn.CrossEntropyLoss(), [(x, y)])) < 1e-10


@pytest.mark.parametrize("matrix", OPERATORS)
def test_convolution_with_batch_norm_in_eval_mode(matrix):
    net, data = conv(), [(torch.randn(12, 2, 6, 6).double(), labels(12)), (torch.randn(5, 2, 6, 6).double(), labels(5))]
    assert differs(subject(net, data), matrix, theirs(matrix, net, nn.CrossEntropyLoss(), data)) < 1e-10


def test_eigenvalues_of_scipy_on_their_operator():
    net, data = mlp(), ragged(torch.randn(33, 4).double(), labels(33))
    operator = theirs("hessian", net, nn.CrossEntropyLoss(), data).to_scipy()
    found = extreme_eigenpairs(
        hessian(subject(net, data)), 4, 4, generator=torch.Generator().manual_seed(0), tol=1e-8, dense_below=0
    )
    largest, smallest = (
        torch.from_numpy(eigsh(operator, k=4, which=end, return_eigenvectors=False)).sort().values
        for end in ("LA", "SA")
    )
    torch.testing.assert_close(found.top.values, largest.flip(0), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.bottom.values, smallest, rtol=1e-8, atol=0)
    assert found.top.status == found.bottom.status == "ok"


def _rows(inputs: MutableMapping[str, Tensor]) -> int:
    return len(inputs["a"])
