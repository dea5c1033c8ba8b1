"""What the names and shapes in a state dict tell about the settings of a built-in network.

Each function answers anything plausible, or None; whether a network of those settings fits is for `architectures` to check.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from plasticity_probe.checkpoints.networks import MLP, ConvNet

Shapes = Mapping[str, tuple[int, ...]]
Settings = dict[str, Any]


def shapes_of(build: Callable[[], nn.Module]) -> Shapes:
    """The names and shapes of a network's parameters and buffers, without memory for them and without a random draw.

    Args:
        build: Makes the network.
    """
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def mlp_settings(shapes: Shapes) -> Settings | None:
    """Settings of an `MLP`; its activation only where the shapes show that it is CReLU.

    Args:
        shapes: Names and shapes of the tensors.
    """
    layers = _sequence(shapes)
    weights = [weight for _, weight in layers or []]
    if not layers or any(len(weight) != 2 for weight in weights):
        return None
    doubled = len(weights) > 1 and _chained(weights, 2)
    if not doubled and not _chained(weights, 1):
        return None
    settings: Settings = {
        "widths": [weights[0][1], *(weight[0] for weight in weights)],
        "bias": f"{layers[0][0]}.bias" in shapes,
        "layer_norm": _has_norms(shapes),
        **({"activation": "crelu"} if doubled else {}),
    }
    return _with_names(settings, MLP, layers)


def convnet_settings(shapes: Shapes, downsample: str) -> Settings | None:
    """Settings of a `ConvNet`; its activation is taken to be ReLU where the shapes do not show that it is CReLU.

    Args:
        shapes: Names and shapes of the tensors.
        downsample: How its convolutions halve the image.
    """
    layers = _sequence(shapes)
    weights = [weight for _, weight in layers or []]
    convolutions, linears = weights[:-2], weights[-2:]
    if not layers or not convolutions or [len(weight) for weight in weights] != [4] * len(convolutions) + [2, 2]:
        return None
    copies = 2 if _chained(linears, 2) else 1
    channels = [weight[0] for weight in convolutions]
    side = math.isqrt(linears[0][1] // (copies * channels[-1])) if channels[-1] else 0
    if not _chained(convolutions, copies) or not _chained(linears, copies) or side == 0:
        return None
    settings: Settings = {
        "channels": channels,
        "kernel": convolutions[0][2],
        "in_channels": convolutions[0][1],
        "image_size": side * 2 ** len(convolutions),
        "hidden": linears[0][0],
        "classes": linears[1][0],
        "activation": "crelu" if copies == 2 else "relu",
        "layer_norm": _has_norms(shapes),
    }
    return _with_names(settings, partial(ConvNet, downsample=downsample), layers)


def resnet18_settings(shapes: Shapes) -> Settings | None:
    """Settings of a `ResNet18` but for its pooling.

    Args:
        shapes: Names and shapes of the tensors.
    """
    stem, linear = shapes.get("conv1.weight", ()), shapes.get("fc.weight", ())
    kinds = {3: "cifar", 7: "imagenet"}
    if len(stem) != 4 or len(linear) != 2 or stem[2] not in kinds:
        return None
    depth = _count(shapes, r"layer1\.\d+\.conv1\.weight")
    return {"width": stem[0], "depth": depth, "classes": linear[0], "in_channels": stem[1], "stem": kinds[stem[2]]}


def customary_resnet18_settings(shapes: Shapes) -> Settings | None:
    """Settings of a `ResNet18` whose pooling is the customary one: only behind the ImageNet stem.

    Args:
        shapes: Names and shapes of the tensors.
    """
    settings = resnet18_settings(shapes)
    return settings and settings | {"max_pool": settings["stem"] == "imagenet"}


def cifar_resnet_settings(shapes: Shapes) -> Settings | None:
    """Settings of a `CifarResNet`.

    Args:
        shapes: Names and shapes of the tensors.
    """
    linear = shapes.get("linear.weight", ())
    if len(linear) != 2:
        return None
    shortcut = "projection" if any(".shortcut." in name for name in shapes) else "pad"
    return {"blocks": _count(shapes, r"layer1\.\d+\.conv1\.weight"), "shortcut": shortcut, "classes": linear[0]}


def vit_settings(shapes: Shapes) -> Settings | None:
    """Settings of a `ViT` but for its heads.

    Args:
        shapes: Names and shapes of the tensors.
    """
    patches, positions, head = (shapes.get(f"{name}.weight", ()) for name in ("patches", "positions", "head"))
    depth = _count(shapes, r"blocks\.\d+\.attention\.qkv\.weight")
    if [len(patches), len(positions), len(head)] != [4, 2, 2] or depth == 0:
        return None
    return {
        "patch": patches[2],
        "width": patches[0],
        "depth": depth,
        "image_size": math.isqrt(positions[0]) * patches[2],
        "in_channels": patches[1],
        "classes": head[0],
    }


def char_transformer_settings(shapes: Shapes) -> Settings | None:
    """Settings of a `CharTransformer` but for its heads.

    Args:
        shapes: Names and shapes of the tensors.
    """
    tokens, positions = shapes.get("tokens.weight", ()), shapes.get("positions.weight", ())
    depth = _count(shapes, r"blocks\.\d+\.attention\.qkv\.weight")
    if [len(tokens), len(positions)] != [2, 2] or depth == 0:
        return None
    return {"vocabulary": tokens[0], "context": positions[0], "width": tokens[1], "depth": depth}


# A layer of a plain sequence: "0.weight", "fc1.bias", "layers.2.weight", "linear1.weight", or its norm: "layers.2_norm.weight"; group 1 is
# the same for all of them.
_NUMBERED = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]*)(\d+)(_norm)?\.(weight|bias)")


def _sequence(shapes: Shapes) -> list[tuple[str, tuple[int, ...]]] | None:
    """The layers of a plain sequence, without their norms, in the order of their numbers: name and weight shape of each."""
    matches = [_NUMBERED.fullmatch(name) for name in shapes]
    layers: dict[int, str] = {}
    for match in matches:
        if match is None or match[1] != matches[0][1] or len(match[2]) > 6:  # type: ignore[index]
            return None
        if not match[3]:
            layers[int(match[2])] = match[1] + match[2]
    # A module cannot have a child that is called like one of its methods.
    parents = matches[0][1].split(".")[:-1] if matches and matches[0] else []
    if any(hasattr(nn.Sequential, parent) for parent in parents) or any(
        f"{name}.weight" not in shapes for name in layers.values()
    ):
        return None
    return [(layers[number], shapes[f"{layers[number]}.weight"]) for number in sorted(layers)]


def _has_norms(shapes: Shapes) -> bool:
    return any(name.endswith("_norm.weight") for name in shapes)


def _chained(weights: Sequence[tuple[int, ...]], copies: int) -> bool:
    """Whether each layer reads every unit of the one before so many times."""
    return all(copies * before[0] == after[1] for before, after in pairwise(weights))


def _with_names(
    settings: Settings, network: Callable[..., nn.Module], layers: list[tuple[str, tuple[int, ...]]]
) -> Settings:
    """The settings, and the layers' names unless they are those that the network gives by itself."""
    names = [name for name, _ in layers]
    usual = {key.rpartition(".")[0] for key in shapes_of(partial(network, **settings))}
    usual = {name for name in usual if not name.endswith("_norm")}
    return settings if set(names) == usual else settings | {"names": names}


def _count(shapes: Shapes, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)
