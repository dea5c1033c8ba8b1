"""The ten largest Hessian eigenpairs to a relative residual of 1e-3: this package, PyHessian, and scipy's eigsh on curvlinops' operator.

    python tests/benchmarks/eigenpairs.py [--device cuda] [--repeats 3] [resnet20 mlp]

PyHessian runs `eigenvalues(top_n=10, maxIter=100, tol=1e-3)`, which orders by size instead of value. Residuals are computed for everyone alike
from products in float64. A method that is not installed is left out. Prints one table in Markdown, with times as ratios to one gradient pass
over the same examples in the same run.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from networks import Case, heading, mlp, resnet20
from torch import Tensor, nn

from plasticity_probe.linalg.krylov_space import KrylovSpace
from plasticity_probe.linalg.lanczos import extreme_eigenpairs
from plasticity_probe.network.curvature import hessian
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import subject

COUNT, TOL, TIGHT = 10, 1e-3, 5e-6
CASES: dict[str, Callable[[], Case]] = {"resnet20": lambda: resnet20(256), "mlp": lambda: mlp(1024)}


@dataclass(frozen=True)
class Run:
    """What a method found, and what it took."""

    method: str
    seconds: float
    products: int
    values: Tensor
    vectors: Tensor
    remark: str = ""


def own(model: nn.Module, inputs: Tensor, targets: Tensor, tol: float = TOL, name: str = "plasticity_probe") -> Run:
    """This package, every check of the status included."""
    with isolated():
        made = subject(model, [(inputs, targets)], memory=8 * 2**30)
        start = time.perf_counter()
        with hessian(made) as operator:
            found = extreme_eigenpairs(
                operator, COUNT, 0, generator=torch.Generator().manual_seed(0), tol=tol, max_steps=100
            )
        seconds = _waited(inputs.device) - start
    return Run(name, seconds, found.top.products, found.top.values, found.top.vectors, found.top.status)


def unchecked(model: nn.Module, inputs: Tensor, targets: Tensor) -> Run:
    """The same search without the look for what was missed and without the test of the result, which no other method has."""
    with isolated():
        made = subject(model, [(inputs, targets)], memory=8 * 2**30)
        start = time.perf_counter()
        with hessian(made) as operator:
            space = KrylovSpace(operator, 100, torch.Generator().manual_seed(0))
            space.add_start()
            largest = slice(0, COUNT)
            while True:
                space.expand()
                space.settle()
                ritz = space.ritz()
                if bool((ritz.residuals[largest] <= TOL * ritz.values[largest].abs()).all()) and space.steps > COUNT:
                    break
            vectors = space.vectors(ritz.coordinates[:, largest])
        seconds = _waited(inputs.device) - start
    return Run("the same, unchecked", seconds, space.products, ritz.values[largest], vectors)


def tighter(model: nn.Module, inputs: Tensor, targets: Tensor) -> Run:
    """This package, asked for residuals below those of any other method here."""
    return own(model, inputs, targets, TIGHT, f"plasticity_probe, tol {TIGHT:g}")


def pyhessian(model: nn.Module, inputs: Tensor, targets: Tensor) -> Run:
    """PyHessian's power iteration with deflation."""
    from pyhessian import hessian as power_iteration

    module: Any = sys.modules["pyhessian.hessian"]
    product, spent = module.hessian_vector_product, 0

    def counted(*arguments: Any) -> Any:
        nonlocal spent
        spent += 1
        return product(*arguments)

    torch.manual_seed(0)
    start = time.perf_counter()
    with warnings.catch_warnings(), mock.patch.object(module, "hessian_vector_product", counted):
        warnings.simplefilter("ignore")
        engine = power_iteration(
            model, nn.CrossEntropyLoss(), data=(inputs, targets), cuda=inputs.device.type == "cuda"
        )
        values, vectors = engine.eigenvalues(maxIter=100, tol=TOL, top_n=COUNT)
    seconds = _waited(inputs.device) - start
    model.zero_grad()
    columns = [torch.cat([part.reshape(-1) for part in vector]) for vector in vectors]
    return Run("PyHessian", seconds, spent, torch.tensor(values, dtype=torch.float64), torch.stack(columns, 1).detach())


def curvlinops(model: nn.Module, inputs: Tensor, targets: Tensor) -> Run:
    """ARPACK on curvlinops' Hessian operator."""
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    start = time.perf_counter()
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, [(inputs, targets)], check_deterministic=False
    )
    made = operator.to_scipy()
    spent = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal spent
        spent += 1
        return made @ vector

    counted = LinearOperator(made.shape, matvec=product, dtype=np.float32)
    begin = np.random.default_rng(0).standard_normal(made.shape[0]).astype(np.float32)
    values, vectors = eigsh(counted, k=COUNT, which="LA", tol=TOL, v0=begin)
    seconds = _waited(inputs.device) - start
    order = torch.from_numpy(np.argsort(-values).copy())
    return Run(
        "eigsh on curvlinops",
        seconds,
        spent,
        torch.from_numpy(values)[order].double(),
        torch.from_numpy(vectors)[:, order],
    )


METHODS = (own, unchecked, tighter, curvlinops, pyhessian)


def main() -> None:
    """Runs every method on every network, prints."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("cases", nargs="*", default=list(CASES))
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--repeats", type=int, default=1)
    chosen = arguments.parse_args()
    device = torch.device(chosen.device)
    print(f"{heading(device)}\n")
    print(
        "| network | method | seconds | gradient passes | products | times slower | relative residual, max | status |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in chosen.cases:
        model, inputs, targets = CASES[name]()
        model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
        gradient = seconds_of_gradient(model, inputs, targets)
        runs = [run for method in METHODS if (run := _best(method, (model, inputs, targets), chosen.repeats))]
        for run in runs:
            print(
                f"| {name} | {run.method} | {run.seconds:.2f} | {run.seconds / gradient:.1f} | {run.products} | "
                f"{run.seconds / runs[0].seconds:.1f} | {residual(model, inputs, targets, run):.1e} | {run.remark} |",
                flush=True,
            )


def seconds_of_gradient(model: nn.Module, inputs: Tensor, targets: Tensor, repeats: int = 5) -> float:
    """The best time of a forward and backward pass over all examples."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), parameters)
        times.append(_waited(inputs.device) - start)
    return min(times[1:])


def residual(model: nn.Module, inputs: Tensor, targets: Tensor, run: Run) -> float:
    """The largest |H v - lambda v| / |lambda| by products in float64."""
    with isolated():
        made = subject(model, [(inputs.double(), targets)], dtype=torch.float64, memory=8 * 2**30)
        vectors = run.vectors.to(device=inputs.device, dtype=torch.float64)
        vectors = vectors / vectors.norm(dim=0)
        with hessian(made) as operator:
            left = operator @ vectors - vectors * run.values.to(vectors)
    return float((left.norm(dim=0) / run.values.to(vectors).abs()).max())


def _best(method: Callable[..., Run], case: Case, repeats: int) -> Run | None:
    try:
        return min((method(*case) for _ in range(repeats)), key=lambda run: run.seconds)
    except ImportError:
        return None


def _waited(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
