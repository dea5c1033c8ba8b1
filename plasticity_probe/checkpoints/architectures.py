"""From a state dict to a network: which built-in architectures its names and shapes fit, and loading it into a network."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from plasticity_probe.checkpoints.formats import CheckpointFile
from plasticity_probe.checkpoints.networks import ACTIVATIONS, MLP, CifarResNet, ConvNet, ResNet18
from plasticity_probe.checkpoints.prefixes import strip_prefixes
from plasticity_probe.checkpoints.refusals import listed, refused, shown
from plasticity_probe.checkpoints.safetensors_files import OWN_KEY
from plasticity_probe.errors import CheckpointError, UnknownNameError

Shapes = Mapping[str, tuple[int, ...]]
Settings = dict[str, Any]

_OWN_FACTORY = "--model pkg.module:factory or --model file.py:factory"
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Architecture:
    """A built-in network whose settings are all known.

    Args:
        name: Its name, as `--model` takes it.
        settings: The settings that rebuild it, as JSON.
        build: Draws a fresh network of it; the draw follows `torch.manual_seed`.
    """

    name: str
    settings: Mapping[str, Any]
    build: Callable[[], nn.Module]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{key}={shown(value)}' for key, value in self.settings.items())})"


@dataclass(frozen=True)
class _Family:
    """A named network: `network` with the settings that the name means, and `infer`, which reads the others off names and shapes.

    `infer` may answer anything plausible, or None; whether the result fits is then checked by building it without memory.
    """

    network: partial[nn.Module]
    infer: Callable[[Shapes], Settings | None]


def match_architectures(state: Mapping[str, Tensor]) -> list[Architecture]:
    """Every built-in architecture whose parameters and buffers are those of a state dict, by name and shape.

    What shapes do not show (the activation of an MLP, the pooling or stride of a convolutional network) makes several fit. BatchNorm's
    `num_batches_tracked`, which files of torch before 0.4.1 lack, may be missing.

    Args:
        state: The state dict; common prefixes such as "module." do not matter.

    Returns:
        All that fit, none twice.
    """
    shapes = _shapes(state)
    found: list[Architecture] = []
    effects: list[Settings] = []
    for name in _FAMILIES:
        fit = _fitted(name, shapes)
        if fit is not None and (effect := _effect(fit.settings)) not in effects:
            found.append(fit)
            effects.append(effect)
    return found


def identify(file: CheckpointFile) -> Architecture:
    """The one built-in architecture that a checkpoint file belongs to.

    The metadata of the package's own format decides between those that fit; any other file must fit exactly one.

    Args:
        file: A checkpoint file.

    Returns:
        The architecture.

    Raises:
        CheckpointError: None fits (the nearest is named), or several do (all are listed), or the metadata names one that does not.
    """
    if file.format == OWN_KEY and file.metadata.get("architecture") is not None:
        return _declared(file)
    found = match_architectures(file.state)
    if len(found) == 1:
        return found[0]
    if not found:
        detail = (
            f"known are {listed(_FAMILIES, 99)}; {_nearest(_shapes(file.state))}. Name your own network: {_OWN_FACTORY}"
        )
        raise refused("no built-in architecture fits", file.path, detail)
    candidates = "; ".join(map(str, found))
    detail = f"names and shapes leave open which it is: {candidates}. Name one: --model NAME, or your own network: {_OWN_FACTORY}"
    raise refused("several architectures fit", file.path, detail)


def named_architectures() -> dict[str, Callable[..., nn.Module]]:
    """The built-in networks by the names that `--model` takes; each draws a fresh network from the settings that its name leaves open."""
    return {name: family.network for name, family in _FAMILIES.items()}


def architecture_named(name: str, state: Mapping[str, Tensor]) -> Architecture:
    """The built-in architecture of a name, with settings read off a state dict.

    Args:
        name: One of `named_architectures`.
        state: The state dict that it must fit.

    Returns:
        The architecture.

    Raises:
        UnknownNameError: There is no such name.
        CheckpointError: No settings make it fit.
    """
    if name not in _FAMILIES:
        raise UnknownNameError("model", name, _FAMILIES)
    shapes = _shapes(state)
    if (fit := _fitted(name, shapes)) is not None:
        return fit
    fitting = listed(found.name for found in match_architectures(state)) or "none"
    raise CheckpointError(
        f"{name} does not fit the state dict ({listed(shapes, 6)}). Built-in architectures that fit: {fitting}."
    )


def _declared(file: CheckpointFile) -> Architecture:
    """The architecture that the metadata names; the settings there only choose among what fits, so they cannot make it build another."""
    declared = file.metadata["architecture"]
    if not isinstance(declared, dict) or declared.get("name") not in list(_FAMILIES):
        detail = f"its metadata should name one of {listed(_FAMILIES, 99)} as architecture; found {shown(declared)}. Or use {_OWN_FACTORY}"
        raise refused("unknown architecture", file.path, detail)
    fit = architecture_named(declared["name"], file.state)
    settings = json.loads(json.dumps(dict(fit.settings)))
    other = {key: value for key, value in declared.items() if key != "name" and settings.get(key) != value}
    if other:
        detail = (
            f"its tensors are those of {fit}, but its metadata says {shown(other)}; it was not written by one program"
        )
        raise refused("contradictory metadata", file.path, detail)
    return fit


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(state[key].shape) for key, name in strip_prefixes(state, None).items()}


def _fitted(name: str, shapes: Shapes) -> Architecture | None:
    family = _FAMILIES[name]
    inferred = _inferred(family, shapes)
    fixed = family.network.keywords
    if inferred is None or any(inferred.get(key, value) != value for key, value in fixed.items()):
        return None
    settings = inferred | fixed
    build = partial(family.network.func, **settings)
    return Architecture(name, settings, build) if _same_tensors(_blueprint(build), shapes) else None


def _inferred(family: _Family, shapes: Shapes) -> Settings | None:
    return None if any(0 in shape for shape in shapes.values()) else family.infer(shapes)


def _blueprint(build: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):  # shapes without memory
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def _same_tensors(expected: Shapes, found: Shapes) -> bool:
    missing = {name for name in expected if name not in found and not name.endswith(_COUNTER)}
    return not missing and all(expected.get(name) == shape for name, shape in found.items())


def _effect(settings: Mapping[str, Any]) -> Settings:
    """The settings that make a difference: with a single layer, no activation does."""
    return {key: value for key, value in settings.items() if key != "activation" or len(settings["widths"]) > 2}


def _nearest(shapes: Shapes) -> str:
    """The ResNet that shares most tensors with a state dict, of all tensors that either has."""
    best, most = "none has a tensor in common with it", 0.0
    for name, family in _FAMILIES.items():
        if family.network.func not in (ResNet18, CifarResNet):
            continue
        settings = (_inferred(family, shapes) or {}) | family.network.keywords
        expected = _blueprint(partial(family.network.func, **settings))
        alike = sum(expected.get(key) == shape for key, shape in shapes.items())
        share = alike / (len(shapes) + len(expected) - alike)
        if share > most:
            best, most = f"the nearest is {name} with {alike} of its {len(expected)} tensors alike", share
    return best


# A layer of a plain sequence: "0.weight", "fc1.bias", "layers.2.weight", "linear1.weight"; group 1 is the same for all of them.
_NUMBERED = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]*)(\d+)\.(weight|bias)")


def _sequence(shapes: Shapes) -> list[tuple[str, tuple[int, ...]]] | None:
    """The layers of a plain sequence in the order of their numbers: name and weight shape of each."""
    matches = [_NUMBERED.fullmatch(name) for name in shapes]
    layers: dict[int, str] = {}
    for match in matches:
        if match is None or match[1] != matches[0][1] or len(match[2]) > 6:  # type: ignore[index]
            return None
        layers[int(match[2])] = match[1] + match[2]
    # A module cannot have a child that is called like one of its methods.
    parents = matches[0][1].split(".")[:-1] if matches and matches[0] else []
    if any(hasattr(nn.Sequential, parent) for parent in parents) or any(
        f"{name}.weight" not in shapes for name in layers.values()
    ):
        return None
    return [(layers[number], shapes[f"{layers[number]}.weight"]) for number in sorted(layers)]


def _chained(weights: list[tuple[int, ...]]) -> bool:
    return all(before[0] == after[1] for before, after in pairwise(weights))


def _infer_mlp(shapes: Shapes) -> Settings | None:
    layers = _sequence(shapes)
    weights = [weight for _, weight in layers or []]
    if not layers or any(len(weight) != 2 for weight in weights) or not _chained(weights):
        return None
    settings: Settings = {
        "widths": [weights[0][1], *(weight[0] for weight in weights)],
        "bias": len(shapes) > len(layers),
    }
    return _with_names(settings, MLP, layers)


def _infer_convnet(shapes: Shapes, downsample: str) -> Settings | None:
    layers = _sequence(shapes)
    weights = [weight for _, weight in layers or []]
    convolutions, linears = weights[:-2], weights[-2:]
    if not layers or not convolutions or [len(weight) for weight in weights] != [4] * len(convolutions) + [2, 2]:
        return None
    channels = [weight[0] for weight in convolutions]
    side = math.isqrt(linears[0][1] // channels[-1]) if channels[-1] else 0
    if not _chained(convolutions) or not _chained(linears) or side == 0:
        return None
    settings: Settings = {
        "channels": channels,
        "kernel": convolutions[0][2],
        "in_channels": convolutions[0][1],
        "image_size": side * 2 ** len(convolutions),
        "hidden": linears[0][0],
        "classes": linears[1][0],
    }
    return _with_names(settings, partial(ConvNet, downsample=downsample), layers)


def _with_names(
    settings: Settings, network: Callable[..., nn.Module], layers: list[tuple[str, tuple[int, ...]]]
) -> Settings:
    """The settings, and the layers' names unless they are those that the network gives by itself."""
    names = [name for name, _ in layers]
    usual = {key.rpartition(".")[0] for key in _blueprint(partial(network, **settings))}
    return settings if set(names) == usual else settings | {"names": names}


def _infer_resnet18(shapes: Shapes) -> Settings | None:
    stem, linear = shapes.get("conv1.weight", ()), shapes.get("fc.weight", ())
    kinds = {3: "cifar", 7: "imagenet"}
    if len(stem) != 4 or len(linear) != 2 or stem[2] not in kinds:
        return None
    depth = _blocks(shapes)
    return {"width": stem[0], "depth": depth, "classes": linear[0], "in_channels": stem[1], "stem": kinds[stem[2]]}


def _infer_customary_resnet18(shapes: Shapes) -> Settings | None:
    settings = _infer_resnet18(shapes)
    return settings and settings | {"max_pool": settings["stem"] == "imagenet"}


def _infer_cifar_resnet(shapes: Shapes) -> Settings | None:
    linear = shapes.get("linear.weight", ())
    if len(linear) != 2:
        return None
    shortcut = "projection" if any(".shortcut." in name for name in shapes) else "pad"
    return {"blocks": _blocks(shapes), "shortcut": shortcut, "classes": linear[0]}


def _blocks(shapes: Shapes) -> int:
    """The number of blocks in the first module of a ResNet."""
    return sum(re.fullmatch(r"layer1\.\d+\.conv1\.weight", name) is not None for name in shapes)


_FAMILIES: dict[str, _Family] = {
    **{f"mlp-{activation}": _Family(partial(MLP, activation=activation), _infer_mlp) for activation in ACTIVATIONS},
    "convnet": _Family(partial(ConvNet, downsample="pool"), partial(_infer_convnet, downsample="pool")),
    "convnet-strided": _Family(partial(ConvNet, downsample="stride"), partial(_infer_convnet, downsample="stride")),
    "resnet18": _Family(partial(ResNet18), _infer_customary_resnet18),
    "resnet18-max-pool": _Family(partial(ResNet18, max_pool=True), _infer_resnet18),
    "resnet18-no-pool": _Family(partial(ResNet18, max_pool=False), _infer_resnet18),
    **{
        f"resnet{6 * n + 2}-cifar": _Family(partial(CifarResNet, blocks=n), _infer_cifar_resnet)
        for n in (3, 5, 7, 9, 18)
    },
}


@dataclass(frozen=True)
class Loaded:
    """A network with the weights of a state dict.

    Args:
        model: The network, the same object that was given.
        loaded: The names in the network that were loaded.
        missing: The names in the network that the state dict lacks.
        unexpected: The names in the state dict that the network lacks.
    """

    model: nn.Module
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_network(state: Mapping[str, Tensor], model: nn.Module, *, strict: bool = True) -> Loaded:
    """Loads a state dict into a network, whatever prefixes either of them carries.

    Weights are copied into the network's own tensors and take their dtype. Values are not judged: a network with NaNs loads.

    Args:
        state: The state dict.
        model: The network, which is changed.
        strict: Whether a parameter that the state dict lacks is an error. Missing buffers never are.

    Returns:
        The network and which names were loaded, missing and unexpected.

    Raises:
        CheckpointError: Shapes differ, nothing fits, a parameter is missing, or the network has parameters without a shape yet.
    """
    _check_materialised(model)
    targets = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    named = {plain: name for name, plain in strip_prefixes(targets, None).items()}
    source = {named[plain]: key for key, plain in strip_prefixes(state, named.keys()).items() if plain in named}
    _check_shapes({name: (tuple(targets[name].shape), tuple(state[key].shape)) for name, key in source.items()})
    if not source:
        expected = listed(targets, 5) or "nothing"
        raise CheckpointError(
            f"no tensor of the checkpoint belongs to the network: it expects {expected}; found {listed(state, 5)}."
        )
    missing = tuple(name for name in targets if name not in source)
    if strict:
        _check_complete(model, source.keys(), missing)
    try:
        model.load_state_dict({name: state[key] for name, key in source.items()}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the network refuses the state dict: {shown(error, 300)}") from error
    used = set(source.values())
    return Loaded(model, tuple(source), missing, tuple(key for key in state if key not in used))


def _check_materialised(model: nn.Module) -> None:
    lazy = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if is_lazy(value)]
    if lazy:
        raise CheckpointError(
            f"the network has parameters without a shape ({listed(lazy)}); run one batch through it before loading."
        )


def _check_shapes(pairs: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    wrong = [
        f"{shown(name)} expected {expected}, found {found}"
        for name, (expected, found) in pairs.items()
        if expected != found
    ]
    if wrong:
        count = f"{len(wrong)} of {len(pairs)} tensors have"
        raise CheckpointError(
            f"{count} another shape than in the network: {'; '.join(wrong[:10])}. Build the network that was saved."
        )


def _check_complete(model: nn.Module, loaded: Any, missing: tuple[str, ...]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {id(parameter) for name, parameter in parameters.items() if name in loaded}
    lost = [name for name in missing if name in parameters and id(parameters[name]) not in held]
    if lost:
        remedy = "build the network that was saved, or pass strict=False to leave these at their initial values"
        raise CheckpointError(f"the checkpoint lacks {len(lost)} parameters of the network: {listed(lost)}; {remedy}.")
