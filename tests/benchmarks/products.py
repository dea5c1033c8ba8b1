"""What a curvature-vector product costs, in gradients of the same examples in the same run.

    python tests/benchmarks/products.py [costs | where | growth] [--device cuda] [--threads 2] [--repeats 5]

Prints one table in Markdown.

    costs   the published ResNet-20 on 256 images and an MLP 784-1024-1024-10 on 1024, for every matrix, with the graphs kept and recomputed;
            on a GPU also the error that TF32 brings, and its time
    where   what the time of a Hessian-vector product goes to
    growth  the cost over a range of examples and of parameters
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from networks import heading, mlp, resnet20
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from plasticity_probe.network.curvature import curvature
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject

MATRICES = ("hessian", "ggn", "fisher")
MEMORY = 16 * 2**30

KINDS: Mapping[str, tuple[str, ...]] = {
    "matrix products and convolutions": ("mm", "convolution", "slow_conv", "gemm", "cudnn"),
    "normalisation": ("batch_norm",),
    "elementwise": (
        "mul",
        "add",
        "sub",
        "div",
        "threshold",
        "clamp",
        "where",
        "exp",
        "softmax",
        "neg",
        "sqrt",
        "rsqrt",
        "pow",
    ),
    "sums": ("sum", "mean", "avg_pool"),
    "copies and fills": ("copy", "fill", "zero", "clone", "cat", "contiguous"),
}
"""Kinds of operations by parts of their names, the first that fits."""


def main() -> None:
    """Measures and prints."""
    tables = {"costs": costs, "where": where, "growth": growth}
    arguments = argparse.ArgumentParser()
    arguments.add_argument("table", nargs="?", choices=tables, default="costs")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=5)
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    print(f"{heading(device)}\n")
    with isolated():
        tables[chosen.table](device, chosen.repeats)


def networks(device: torch.device) -> dict[str, Subject]:
    """The two networks that the costs are stated for.

    Args:
        device: Where to compute.
    """
    cases = {"ResNet-20": resnet20(256), "MLP 784-1024-1024-10": mlp(1024)}
    return {
        name: subject(model, [(inputs, targets)], device=device, memory=MEMORY)
        for name, (model, inputs, targets) in cases.items()
    }


def costs(device: torch.device, repeats: int) -> None:
    """The table of what products cost.

    Args:
        device: Where to compute.
        repeats: The best of so many counts.
    """
    tf32 = device.type == "cuda"
    print(
        "| network | examples | gradient, s | matrix | kept, s | recomputed, s | kept, gradients | recomputed, gradients |",
        end="",
    )
    print(" TF32 kept, gradients | TF32, relative error |" if tf32 else "")
    print("|---|---|---|---|---|---|---|---|" + ("---|---|" if tf32 else ""))
    for name, made in networks(device).items():
        works = {("gradient", ""): gradient(made)}
        rounded = replace(made, allow_tf32=True)
        for matrix in MATRICES:
            works |= {(matrix, kept): product(made, matrix, kept == "kept") for kept in ("kept", "recomputed")}
            if tf32:
                works[matrix, "TF32"] = product(rounded, matrix, kept=True)
        best = fastest(works, repeats, device)
        unit = best["gradient", ""]
        for matrix in MATRICES:
            kept, recomputed = best[matrix, "kept"], best[matrix, "recomputed"]
            row = f"| {name} | {len(made.examples)} | {unit:.4f} | {matrix} | {kept:.4f} | {recomputed:.4f} | "
            row += f"{kept / unit:.2f} | {recomputed / unit:.2f} |"
            if tf32:
                truth = works[matrix, "kept"]()
                error = float((works[matrix, "TF32"]() - truth).norm() / truth.norm())
                row += f" {best[matrix, 'TF32'] / unit:.2f} | {error:.1e} |"
            print(row, flush=True)


def where(device: torch.device, repeats: int) -> None:
    """The table of what the time of a product with kept graphs goes to.

    Args:
        device: Where to compute.
        repeats: The times are sums over so many.
    """
    print("| network | kind of operation | gradient, ms | Hessian-vector product, ms | product, gradients |")
    print("|---|---|---|---|---|")
    for name, made in networks(device).items():
        single, double = (by_kind(work, repeats) for work in (gradient(made), product(made, "hessian", kept=True)))
        total = sum(single.values())
        for kind in (*KINDS, "other"):
            print(f"| {name} | {kind} | {single[kind]:.1f} | {double[kind]:.1f} | {double[kind] / total:.2f} |")
        print(f"| {name} | all | {total:.1f} | {sum(double.values()):.1f} | {sum(double.values()) / total:.2f} |")


def growth(device: torch.device, repeats: int) -> None:
    """The table of how the cost of a product grows with examples and parameters.

    Args:
        device: Where to compute.
        repeats: The best of so many counts.
    """
    cases = [(f"MLP of width {width}", mlp(1024, width), 1024) for width in (128, 256, 512, 1024, 2048)]
    cases += [("MLP of width 1024", mlp(1024), count) for count in (64, 128, 256, 512)]
    cases += [("ResNet-20", resnet20(1017), count) for count in (64, 128, 256, 512, 1017)]
    print(
        "| network | parameters | examples | gradient, ms | product kept, ms | recomputed, ms | kept, ps per example and parameter |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (model, inputs, targets), count in cases:
        made = subject(model, [(inputs[:count], targets[:count])], device=device, memory=MEMORY)
        works = {"gradient": gradient(made)} | {kept: product(made, "hessian", kept) for kept in (True, False)}
        best = fastest(works, repeats, device)
        cells = " | ".join(f"{1e3 * seconds:.1f}" for seconds in best.values())
        print(f"| {name} | {made.size} | {count} | {cells} | {1e12 * best[True] / made.size / count:.1f} |", flush=True)


def gradient(made: Subject) -> Callable[[], Tensor]:
    """A gradient of the mean loss, chunk by chunk as a product takes them.

    Args:
        made: The network and its examples.
    """
    leaves, batches = list(made.parameters.values()), list(made.chunks())

    def work() -> Tensor:
        total = torch.zeros(made.size, dtype=made.dtype, device=made.device)
        for batch in batches:
            found = torch.autograd.grad(made.losses(made.parameters, batch)[0].sum(), leaves)
            total += torch.cat([part.reshape(-1) for part in found])
        return total

    return work


def product(made: Subject, matrix: str, kept: bool) -> Callable[[], Tensor]:
    """A product with a vector.

    Args:
        made: The network and its examples.
        matrix: Name of the curvature matrix.
        kept: Whether the graphs are kept.
    """
    operator = curvature(made, matrix)
    assert operator.plan.kept
    operator.plan = replace(operator.plan, kept=kept)
    vector = torch.randn(made.size, device=made.device, dtype=made.dtype)
    return lambda: operator @ vector


def fastest(works: Mapping[Any, Callable[[], Tensor]], repeats: int, device: torch.device) -> dict[Any, float]:
    """The best time of each, in seconds; they take turns, so that other work on the machine slows all alike.

    Args:
        works: What to time.
        repeats: How many turns count; one before them does not.
        device: Where it runs.
    """
    best = dict.fromkeys(works, float("inf"))
    for turn in range(repeats + 1):
        for key, work in works.items():
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            if turn:
                best[key] = min(best[key], time.perf_counter() - start)
    return best


def by_kind(work: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds that kinds of operations take.

    Args:
        work: What to profile.
        repeats: How often; the time is the mean.
    """
    work()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as recorded:
        for _ in range(repeats):
            work()
    found = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in recorded.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "other")
        on_device = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        found[kind] += on_device / 1e3 / repeats
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
