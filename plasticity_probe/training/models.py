"""Which network a setting means, and its parts that remedies act on: hidden units, and modules that can be reset."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from plasticity_probe.checkpoints.architectures import named_architectures
from plasticity_probe.checkpoints.networks import ACTIVATIONS, MLP, CifarResNet, ConvNet, CReLU, ResNet18
from plasticity_probe.checkpoints.transformers import CharTransformer, ViT
from plasticity_probe.errors import UnknownNameError, UsageError

HIDDEN = (100, 100)
"""Hidden widths of an MLP unless its settings say otherwise (Kumar et al. 2023 and, in its code, Ash and Adams 2020)."""


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A network whose settings are all known.

    Args:
        architecture: Name and settings, as JSON, as the metadata of a checkpoint holds them.
        build: Draws a network of it; the draw follows `torch.manual_seed`.
    """

    architecture: Mapping[str, Any]
    build: Callable[[], nn.Module]


@dataclass(frozen=True, eq=False)
class HiddenLayer:
    """Hidden units between two modules: whatever changes a unit must change its row there and its columns here.

    Args:
        name: Path of the module that reads the units, through `outgoing` weights; what it reads are the units' features.
        incoming: Path of the linear layer or convolution whose rows (output channels) make the units.
        norm: Path of the normalisation in between whose affine parameters belong to single units; None where there is none.
        units: Number of units.
        unit_of: (inputs of `name`,) int64: the unit that each of its input features or channels belongs to. An identity where each unit is
            read once; each unit comes twice behind CReLU, and once per position where a convolution's output was flattened.
    """

    name: str
    incoming: str
    norm: str | None
    units: int
    unit_of: Tensor


def blueprint(settings: Mapping[str, Any], example: Tensor, outputs: int) -> Blueprint:
    """The network that a setting means, sized for its tasks.

    Sizes come from the example: the inputs of an MLP, the side and channels of images, the context of the character transformer. What the
    settings leave open are the network's own defaults; an MLP has hidden layers of `HIDDEN` units. A setting of None counts as left open.

    Args:
        settings: "name", one of `named_architectures`, and beside it, as far as the name leaves them open: `hidden` (a list), `bias` and
            `layer_norm` of an MLP; `channels`, `kernel`, `hidden`, `activation` and `layer_norm` of a ConvNet; `width`, `depth`, `stem` and
            `max_pool` of ResNet-18; `shortcut` of a CIFAR ResNet; `patch`, `width`, `depth` and `heads` of a ViT; `width`, `depth` and
            `heads` of the character transformer.
        example: One example, without an axis over examples.
        outputs: Outputs that the tasks need; the vocabulary of the character transformer.

    Raises:
        UnknownNameError: No such network.
        UsageError: Settings that the network does not have or that cannot be, or examples that it cannot read.
    """
    name = settings.get("name")
    made = _named(name)
    network = made.func
    given = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in settings.items()
        if key != "name" and value is not None
    }
    _check_settings(str(name), {k: v for k, v in _SETTINGS[network].items() if k not in made.keywords}, given)
    if outputs < 1:
        raise UsageError(f"a network needs at least one output, got {outputs}; the data has no classes")
    _check_example(str(name), network, example)
    sizes = _sizes(network, example, outputs, given)
    known = {
        **sizes,
        **made.keywords,
        **{key: value for key, value in given.items() if key != "hidden" or network is not MLP},
    }
    build = partial(network, **known)
    with torch.device("meta"):  # a network that cannot be is refused here, not at its first draw
        build()
    return Blueprint({"name": name, **known}, build)


def with_activation(settings: Mapping[str, Any], activation: str) -> dict[str, Any]:
    """The settings of the same network with another activation function.

    Args:
        settings: Name and settings of a network.
        activation: A name of `ACTIVATIONS`.

    Raises:
        UnknownNameError: No such network or activation.
        UsageError: The network's activation is part of what it is.
    """
    if activation not in ACTIVATIONS:
        raise UnknownNameError("activation", activation, ACTIVATIONS)
    network = _named(settings.get("name")).func
    if network is MLP:
        return {**settings, "name": f"mlp-{activation}"}
    if network is ConvNet:
        return {**settings, "activation": activation}
    raise UsageError(
        f"the activation of {settings['name']} cannot be chosen, but {activation} was asked for; choose an MLP or a convnet instead"
    )


def with_layer_norm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the same network with layer norm before its activations.

    Args:
        settings: Name and settings of a network.

    Raises:
        UnknownNameError: No such network.
        UsageError: The network has norms of its own.
    """
    network = _named(settings.get("name")).func
    if network in (MLP, ConvNet):
        return {**settings, "layer_norm": True}
    own = "LayerNorm" if network in (ViT, CharTransformer) else "BatchNorm"
    raise UsageError(
        f"{settings['name']} has {own} already, but layer norm was to be added; choose an MLP or a convnet instead"
    )


def hidden_layers(network: nn.Module) -> tuple[HiddenLayer, ...]:
    """The layers of hidden units of a built-in network, in forward order; empty for networks that are not built in.

    Hidden units are those that a single module reads: all of an MLP and a ConvNet, those inside the blocks of a ResNet (what blocks write to
    the stream between them has many readers), and those inside the MLPs of a transformer.

    Args:
        network: The network.
    """
    paths = dict(network.named_modules())
    if isinstance(network, MLP | ConvNet):
        return tuple(_between(paths, before, after) for before, after in pairwise(_layers(network)))
    if isinstance(network, ResNet18 | CifarResNet):
        blocks = [path.removesuffix(".conv2") for path in paths if path.endswith(".conv2")]
        return tuple(_inside(paths, f"{block}.conv1", f"{block}.conv2", f"{block}.bn1") for block in blocks)
    if isinstance(network, ViT | CharTransformer):
        inner = [path.removesuffix(".contract") for path in paths if path.endswith(".mlp.contract")]
        return tuple(_inside(paths, f"{mlp}.expand", f"{mlp}.contract", None) for mlp in inner)
    return ()


def modules_from_the_top(network: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The modules of a built-in network from its input to its output, as Berariu et al. 2021, appendix A.5, number those of ResNet-18.

    There they are the first convolution, the four modules of blocks and the linear layer, each convolution with its norm. In the other
    networks (our choice, by analogy) they are the layers of an MLP or ConvNet, each with its norm, and of a transformer the embedding, each
    block, and the output layer with the norm before it.

    Args:
        network: A built-in network.

    Returns:
        Each module as paths: the parameters and buffers of a path are those whose names begin with it and a dot. Every one belongs to
        exactly one module.

    Raises:
        UsageError: The network is not built in.
    """
    if isinstance(network, MLP | ConvNet):
        paths = dict(network.named_modules())
        return tuple((path, f"{path}_norm") if f"{path}_norm" in paths else (path,) for path in _layers(network))
    if isinstance(network, ResNet18):
        return ("conv1", "bn1"), *((f"layer{i}",) for i in (1, 2, 3, 4)), ("fc",)
    if isinstance(network, CifarResNet):
        return ("conv1", "bn1"), *((f"layer{i}",) for i in (1, 2, 3)), ("linear",)
    if isinstance(network, ViT | CharTransformer):
        first = "patches" if isinstance(network, ViT) else "tokens"
        return (first, "positions"), *((f"blocks.{i}",) for i in range(len(network.blocks))), ("norm", "head")
    raise UsageError(
        f"expected one of the built-in networks, whose modules are known, got {type(network).__name__}; see `probe list models`"
    )


def _layers(network: nn.Module) -> list[str]:
    """Paths of the linear layers and convolutions of a plain sequence."""
    return [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _between(paths: Mapping[str, nn.Module], incoming: str, name: str) -> HiddenLayer:
    """The units between two layers of a plain sequence."""
    made, reader = _weight(paths[incoming]), _weight(paths[name])
    # CReLU puts all positive parts before all negative ones; flattening puts the positions of a channel side by side.
    features = torch.arange(len(made)).repeat(2 if isinstance(paths[f"{incoming}_activation"], CReLU) else 1)
    unit_of = features.repeat_interleave(reader.shape[1] // len(features))
    norm = f"{incoming}_norm" if f"{incoming}_norm" in paths else None
    return HiddenLayer(name, incoming, norm, len(made), unit_of)


def _inside(paths: Mapping[str, nn.Module], incoming: str, name: str, norm: str | None) -> HiddenLayer:
    """The units inside a block, each read once."""
    units = len(_weight(paths[incoming]))
    return HiddenLayer(name, incoming, norm, units, torch.arange(units))


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return module.weight


def _named(name: Any) -> partial[nn.Module]:
    known = named_architectures()
    if name not in list(known):
        raise UnknownNameError("model", str(name), known)
    return known[name]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_SIZE = ("a whole number of at least 1", _is_size)
_LIST = ("a list of whole numbers of at least 1", lambda value: isinstance(value, list) and all(map(_is_size, value)))
_SWITCH = ("true or false", lambda value: isinstance(value, bool))
_WORD = ("a name", lambda value: isinstance(value, str))
_BLOCKS = {"width": _SIZE, "depth": _SIZE}
_SETTINGS: Mapping[Any, Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    MLP: {"hidden": _LIST, "bias": _SWITCH, "layer_norm": _SWITCH, "activation": _WORD},
    ConvNet: {"channels": _LIST, "kernel": _SIZE, "hidden": _SIZE, "activation": _WORD, "layer_norm": _SWITCH},
    ResNet18: {**_BLOCKS, "stem": _WORD, "max_pool": _SWITCH},
    CifarResNet: {"shortcut": _WORD},
    ViT: {"patch": _SIZE, **_BLOCKS, "heads": _SIZE},
    CharTransformer: {**_BLOCKS, "heads": _SIZE},
}
"""The settings of each network that its tasks do not fix: what a value must be, in words and as a test."""


def _check_settings(
    name: str, known: Mapping[str, tuple[str, Callable[[Any], bool]]], given: Mapping[str, Any]
) -> None:
    if unknown := [key for key in given if key not in known]:
        raise UsageError(
            f"the settings of {name} are {', '.join(known)}; got {', '.join(map(str, unknown))}, which its name or its data fixes or which it "
            "does not have. Leave it out"
        )
    for key, value in given.items():
        wanted, fits = known[key]
        if not fits(value):
            raise UsageError(f"the setting {key} of {name} should be {wanted}; got {value!r}")


def _check_example(name: str, network: Any, example: Tensor) -> None:
    shape = tuple(example.shape)
    floating, image, square = example.is_floating_point(), len(shape) == 3, len(shape) == 3 and shape[1] == shape[2]
    wanted, reads, remedy = {
        MLP: (
            "floating-point examples of at least one axis",
            floating and len(shape) > 0,
            "for text choose char-transformer",
        ),
        ConvNet: ("square floating-point images (channels, side, side)", floating and square, _NO_IMAGES),
        ViT: ("square floating-point images (channels, side, side)", floating and square, _NO_IMAGES),
        ResNet18: ("floating-point images (channels, height, width)", floating and image, _NO_IMAGES),
        CifarResNet: (
            "floating-point images of 3x32x32",
            floating and shape == (3, 32, 32),
            "for other images choose resnet18 or a convnet, for other examples mlp-relu",
        ),
        CharTransformer: (
            "sequences of int64 tokens (length,)",
            example.dtype == torch.int64 and len(shape) == 1,
            "choose mlp-relu, or text as data",
        ),
    }[network]
    if not reads or example.numel() == 0:
        raise UsageError(f"{name} reads {wanted}, got examples of shape {shape} and type {example.dtype}; {remedy}")


_NO_IMAGES = "give the examples such a shape, or choose mlp-relu"


def _sizes(network: Any, example: Tensor, outputs: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the tasks fix."""
    if network is MLP:
        return {"widths": [example.numel(), *given.get("hidden", HIDDEN), outputs]}
    if network is CharTransformer:
        return {"vocabulary": outputs, "context": len(example)}
    if network is CifarResNet:
        return {"classes": outputs}
    if network is ResNet18:
        return {"in_channels": len(example), "classes": outputs}
    return {"in_channels": len(example), "image_size": example.shape[-1], "classes": outputs}
