"""Seconds, gradient passes and peak memory of the Gram matrix behind the Fisher rank: this package, torch.func.vmap, and a loop.

    PLASTICITY_PROBE_SHARED=DATA python tests/benchmarks/fisher_rank.py [--device cuda] [--threads 2] [--repeats 3] [--examples 512]
    PLASTICITY_PROBE_SHARED=DATA python tests/benchmarks/fisher_rank.py --growth

Prints one table in Markdown. DATA holds checkpoints/resnet20_cifar10, cifar10/cifar10_lossless.npz and mnist/. Each measurement runs in a
process of its own; a gradient pass over the same examples is measured in the same process, between the repeats. Memory is measured in another
process whose allocator hands everything back at once, so that it is what is in use. "vmap" and "loop" hold the n x P gradients in float32, as
people do, and multiply them in float32; this package multiplies in float64.
"""

import argparse
import ctypes
import gzip
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from plasticity_probe.checkpoints.architectures import identify, load_network
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.network import example_gradients
from plasticity_probe.network.gradients import gram, gram_plan, mean_gradient
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject

NETWORKS = ("ResNet-20", "MLP 784-1024-1024-10")
METHODS = ("this package", "vmap", "loop")
GROWTH = (64, 128, 256, 512, 1024)


def main() -> None:
    """Runs every measurement in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--growth", action="store_true", help="how this package grows with the number of examples")
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "METHOD", "WHAT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(given.threads)
        network, method, what = given.one
        print(*measured(network, method, what, given))
        return
    print(f"{date.today()}, torch {torch.__version__}, {machine(given.device)}, {given.threads} threads\n")
    if given.growth:
        growth(given)
    else:
        comparison(given)


def comparison(given: argparse.Namespace) -> None:
    """The methods side by side."""
    memory = "memory above one pass, share of n x P floats"
    print(
        f"| network, {given.examples} examples | method | seconds | gradient passes | {memory} | planned peak over measured |"
    )
    print("|---|---|---|---|---|---|")
    for network in given.networks:
        for method in METHODS:
            best, passes, share, planned, _ = apart(network, method, given, given.examples)
            told = f"{planned:.2f}" if method == METHODS[0] else ""
            print(f"| {network} | {method} | {best:.2f} | {passes:.2f} | {share:.4f} | {told} |", flush=True)


def growth(given: argparse.Namespace) -> None:
    """This package at several numbers of examples, with the multiplications that its formula counts for the products."""
    formula = "n^2/2 sum_k min(r_k c_k, T_k^2 (r_k + c_k)), 10^9"
    memory = "memory above one pass, share of n x P floats"
    print(f"| network | examples n | seconds | gradient passes | {formula} | {memory} |")
    print("|---|---|---|---|---|---|")
    for network in given.networks:
        for count in GROWTH:
            best, passes, share, _, products = apart(network, METHODS[0], given, count)
            print(
                f"| {network} | {count} | {best:.2f} | {passes:.2f} | {products / 1e9:.2f} | {share:.4f} |", flush=True
            )


def apart(network: str, method: str, given: argparse.Namespace, examples: int) -> tuple[float, ...]:
    """One measurement in processes of its own: seconds, gradient passes, memory above a pass, what was planned, multiplications."""
    options = ["--device", given.device, "--threads", given.threads, "--repeats", given.repeats, "--examples", examples]
    found: list[float] = []
    for what in ("time", "memory"):
        command = [sys.executable, __file__, "--one", network, method, what, *map(str, options)]
        frugal = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"} if what == "memory" else {}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | frugal)
        if done.returncode:
            raise SystemExit(done.stderr)
        found += map(float, done.stdout.split())
    return tuple(found)


def measured(network: str, method: str, what: str, given: argparse.Namespace) -> tuple[float, ...]:
    """Seconds and gradient passes, or memory above one pass as a share of n x P floats, planned over measured peak, multiplications."""
    with isolated():
        made = subject(*network_and_data(network, given.examples), device=given.device)
        made.each_loss()
        run = partial(anew, made, {"this package": gram, "vmap": through_vmap, "loop": through_a_loop}[method])
        one_pass = partial(anew, made, mean_gradient)
        one_pass()
        if what == "time":
            times = [(seconds(one_pass, made.device), seconds(run, made.device)) for _ in range(given.repeats)]
            passes, runs = zip(*times, strict=True)
            return min(runs), min(runs) / min(passes)
        floats = 4 * made.size * given.examples
        plan = gram_plan(made)
        whole = peak(run, made.device)
        return (whole - peak(one_pass, made.device)) / floats, plan.peak / whole, plan.multiplications


def anew(made: Subject, compute: Callable[[Subject], object]) -> None:
    """Computes as if for the first time."""
    losses = made.memo["losses"]
    made.memo.clear()
    made.memo["losses"] = losses
    compute(made)
    made.memo.clear()
    made.memo["losses"] = losses


def through_vmap(made: Subject) -> Tensor:
    """All gradients by torch.func, 32 examples at a time, then their products."""
    names = list(made.parameters)
    rows = []
    for batch in made.examples.chunks(32):
        found = example_gradients._vectorised(made, batch, made.parameters, names)
        rows.append(torch.cat([found[name] for name in names], 1))
    gradients = torch.cat(rows)
    return gradients @ gradients.T


def through_a_loop(made: Subject) -> Tensor:
    """All gradients one after the other, then their products."""
    gradients = torch.empty(len(made.examples), made.size, device=made.device)
    leaves = list(made.parameters.values())
    for index, batch in enumerate(made.examples.chunks(1)):
        found = torch.autograd.grad(made.losses(made.parameters, batch)[0].sum(), leaves)
        torch.cat([gradient.reshape(-1) for gradient in found], out=gradients[index])
    return gradients @ gradients.T


def peak(work: Callable[[], None], device: torch.device) -> int:
    """Bytes that some work takes at its peak, beyond what was taken before. On Linux the resident set of the process, as a user would see it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Wall time, with all that was started on the device finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def network_and_data(network: str, count: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network and its first examples."""
    shared = Path(os.environ["PLASTICITY_PROBE_SHARED"])
    if network == NETWORKS[0]:
        file = read_checkpoint(shared / "checkpoints/resnet20_cifar10/resnet20-12fca82f.th")
        model = load_network(file.state, identify(file).build()).model
        stored = np.load(shared / "cifar10/cifar10_lossless.npz")
        # There are 1017 test images; what goes beyond comes from the training images.
        pixels, labels = (np.concatenate([stored[f"test_{kind}"], stored[f"train_{kind}"]])[:count] for kind in "xy")
        images = torch.from_numpy(pixels)
        means, scales = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        inputs = (images.float() / 255 - means.view(3, 1, 1)) / scales.view(3, 1, 1)
        targets = torch.from_numpy(labels).long()
    else:
        torch.manual_seed(0)
        model = MLP([784, 1024, 1024, 10])
        inputs = read_idx(shared / "mnist/t10k-images-idx3-ubyte.gz", 16)[: count * 784].view(count, 784).float() / 255
        targets = read_idx(shared / "mnist/t10k-labels-idx1-ubyte.gz", 8)[:count].long()
    if len(inputs) < count:
        raise SystemExit(f"expected {count} examples, there are {len(inputs)}")
    return model, [(inputs, targets)]


def read_idx(path: Path, header: int) -> Tensor:
    """The numbers of a file of MNIST."""
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8, offset=header)


def machine(device: str) -> str:
    """The processor or accelerator, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
