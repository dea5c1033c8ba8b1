"""The two networks that benchmarks measure, with their examples, and how a benchmark says where it ran."""

import os
import platform
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from plasticity_probe.checkpoints.architectures import identify, load_network
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.data.dataset import DataSet, Split
from plasticity_probe.data.sources import load_data

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet: what the checkpoint was trained with."""

Case = tuple[nn.Module, Tensor, Tensor]


def resnet20(count: int) -> Case:
    """The published ResNet-20 in eval mode, with the first of CIFAR-10's lossless test images ($PLASTICITY_PROBE_SHARED)."""
    shared = Path(os.environ["PLASTICITY_PROBE_SHARED"])
    file = read_checkpoint(shared / "checkpoints/resnet20_cifar10/resnet20-12fca82f.th")
    model = identify(file).build()
    load_network(file.state, model)
    split = _test_split(str(shared / "cifar10/cifar10_lossless.npz"))
    images, labels = split.tensors(CIFAR_MEAN, CIFAR_STD)
    return model.eval(), images[:count], labels[:count]


def mlp(count: int, width: int = 1024, steps: int = 30) -> Case:
    """An MLP 784-width-width-10 after some full-batch steps of Adam on the first of MNIST's test images ($PLASTICITY_PROBE_DATA)."""
    images, labels = (tensor[:count] for tensor in _test_split("mnist").tensors(flatten=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), images, labels


def heading(device: torch.device) -> str:
    """Date, torch, processor or accelerator, and number of threads, in words."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    name = names[0] if names else platform.processor()
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    )
    return f"{date.today()}, torch {torch.__version__}, {where}"


def _test_split(name: str) -> Split:
    data = load_data(name)
    assert isinstance(data, DataSet)
    return data.splits["test"]
