"""From a state dict to a network: which built-in architectures its names and shapes fit, and loading it into a network."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from plasticity_probe.checkpoints import inference
from plasticity_probe.checkpoints.formats import CheckpointFile
from plasticity_probe.checkpoints.inference import Settings, Shapes, shapes_of
from plasticity_probe.checkpoints.networks import ACTIVATIONS, MLP, CifarResNet, ConvNet, ResNet18
from plasticity_probe.checkpoints.prefixes import strip_prefixes
from plasticity_probe.checkpoints.refusals import listed, refused, shown
from plasticity_probe.checkpoints.safetensors_files import OWN_KEY
from plasticity_probe.checkpoints.transformers import CharTransformer, ViT
from plasticity_probe.errors import CheckpointError, UnknownNameError

_OWN_FACTORY = "--model pkg.module:factory or --model file.py:factory"
_ONE_OF_SEVERAL = (
    f"Say which in the metadata of a file written by write_checkpoint, or name your own network: {_OWN_FACTORY}"
)
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
    `unseen` are settings that shapes do not show: the values that are possible beside the inferred ones. The metadata of a file may choose
    among these, and among nothing else. One that `infer` leaves out is open: every value of it fits.
    """

    network: partial[nn.Module]
    infer: Callable[[Shapes], Settings | None]
    unseen: Mapping[str, Callable[[Settings], Sequence[Any]]] = field(default_factory=dict)


def match_architectures(state: Mapping[str, Tensor]) -> list[Architecture]:
    """Every built-in architecture whose parameters and buffers are those of a state dict, by name and shape.

    What shapes do not show (the activation of an MLP, the pooling or stride of a convolutional network, the heads of a transformer) makes
    several fit; a convolutional network is taken to have ReLU. BatchNorm's `num_batches_tracked`, which files of torch before 0.4.1 lack, may
    be missing.

    Args:
        state: The state dict; common prefixes such as "module." do not matter.

    Returns:
        All that fit, none twice.
    """
    return _matching(_shapes(state))


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
    names = {fit.name for fit in found}
    remedy = f"Name one: --model NAME, or your own network: {_OWN_FACTORY}" if len(names) > 1 else _ONE_OF_SEVERAL
    detail = f"names and shapes leave open which it is: {_candidates(found)}. {remedy}"
    raise refused("several architectures fit", file.path, detail)


def named_architectures() -> dict[str, partial[nn.Module]]:
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
        CheckpointError: No settings make it fit, or several do and nothing decides between them.
    """
    if name not in _FAMILIES:
        raise UnknownNameError("model", name, _FAMILIES)
    shapes = _shapes(state)
    return _single(name, shapes, _fitting(name, shapes, {}))


def _single(name: str, shapes: Shapes, fits: Sequence[Architecture]) -> Architecture:
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise CheckpointError(
            f"{name} fits the state dict with several settings that shapes do not show: {_candidates(fits)}. {_ONE_OF_SEVERAL}"
        )
    fitting = listed(dict.fromkeys(found.name for found in _matching(shapes))) or "none"
    raise CheckpointError(
        f"{name} does not fit the state dict ({listed(shapes, 6)}). Built-in architectures that fit: {fitting}."
    )


def _declared(file: CheckpointFile) -> Architecture:
    """The architecture that the metadata names; the settings there only choose among what fits, so they cannot make it build another."""
    declared = file.metadata["architecture"]
    if not isinstance(declared, dict) or declared.get("name") not in list(_FAMILIES):
        detail = f"its metadata should name one of {listed(_FAMILIES, 99)} as architecture; found {shown(declared)}. Or use {_OWN_FACTORY}"
        raise refused("unknown architecture", file.path, detail)
    name, shapes = declared["name"], _shapes(file.state)
    fits = _fitting(name, shapes, declared)
    if not fits and (others := _fitting(name, shapes, {})):
        raise _contradiction(file, others[0], {key: declared[key] for key in _FAMILIES[name].unseen if key in declared})
    fit = _single(name, shapes, fits)
    settings = json.loads(json.dumps(dict(fit.settings)))
    other = {key: value for key, value in declared.items() if key != "name" and settings.get(key) != value}
    if other:
        raise _contradiction(file, fit, other)
    return fit


def _contradiction(file: CheckpointFile, fit: Architecture, declared: Settings) -> CheckpointError:
    detail = (
        f"its tensors are those of {fit}, but its metadata says {shown(declared)}; it was not written by one program"
    )
    return refused("contradictory metadata", file.path, detail)


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(state[key].shape) for key, name in strip_prefixes(state, None).items()}


def _matching(shapes: Shapes) -> list[Architecture]:
    found: list[Architecture] = []
    for name in _FAMILIES:
        known = [_effect(fit) for fit in found]
        found += [fit for fit in _fitting(name, shapes, {}) if _effect(fit) not in known]
    return found


def _fitting(name: str, shapes: Shapes, declared: Mapping[str, Any]) -> list[Architecture]:
    """The networks of a name whose tensors are exactly those; `declared` decides what shapes do not show, as far as it is possible."""
    family = _FAMILIES[name]
    inferred = _inferred(family, shapes)
    fixed = family.network.keywords
    if inferred is None or any(inferred.get(key, value) != value for key, value in fixed.items()):
        return []
    possible: dict[str, Sequence[Any]] = {}
    for key, values in family.unseen.items():
        if key in declared:
            # JSON's true and 1.0 equal 1, but are no number of heads.
            possible[key] = [v for v in values(inferred) if v == declared[key] and type(v) is type(declared[key])]
        elif key not in inferred:
            possible[key] = values(inferred)
    fits = (
        _built(name, inferred | fixed | dict(zip(possible, each, strict=True))) for each in product(*possible.values())
    )
    return [fit for fit in fits if _same_tensors(shapes_of(fit.build), shapes)]


def _built(name: str, settings: Settings) -> Architecture:
    return Architecture(name, settings, partial(_FAMILIES[name].network.func, **settings))


def _inferred(family: _Family, shapes: Shapes) -> Settings | None:
    return None if any(0 in shape for shape in shapes.values()) else family.infer(shapes)


def _same_tensors(expected: Shapes, found: Shapes) -> bool:
    missing = {name for name in expected if name not in found and not name.endswith(_COUNTER)}
    return not missing and all(expected.get(name) == shape for name, shape in found.items())


def _effect(fit: Architecture) -> tuple[Any, Settings]:
    """What makes a difference: with a single layer, no activation does."""
    network = _FAMILIES[fit.name].network.func
    layers = len(fit.settings.get("widths", ())) - 1
    return network, {key: value for key, value in fit.settings.items() if key != "activation" or layers != 1}


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _candidates(fits: Sequence[Architecture]) -> str:
    return "; ".join(map(str, fits))


def _nearest(shapes: Shapes) -> str:
    """The ResNet that shares most tensors with a state dict, of all tensors that either has."""
    best, most = "none has a tensor in common with it", 0.0
    for name, family in _FAMILIES.items():
        if family.network.func not in (ResNet18, CifarResNet):
            continue
        settings = (_inferred(family, shapes) or {}) | family.network.keywords
        expected = shapes_of(partial(family.network.func, **settings))
        alike = sum(expected.get(key) == shape for key, shape in shapes.items())
        share = alike / (len(shapes) + len(expected) - alike)
        if share > most:
            best, most = f"the nearest is {name} with {alike} of its {len(expected)} tensors alike", share
    return best


_POOLING = {"max_pool": lambda _: (False, True)}
_SWITCHES = {"layer_norm": lambda _: (False, True)}
_HEADS = {"heads": lambda settings: _divisors(settings["width"])}
_FAMILIES: dict[str, _Family] = {
    **{
        f"mlp-{activation}": _Family(partial(MLP, activation=activation), inference.mlp_settings, _SWITCHES)
        for activation in ACTIVATIONS
    },
    **{
        name: _Family(
            partial(ConvNet, downsample=downsample),
            partial(inference.convnet_settings, downsample=downsample),
            {"activation": lambda _: tuple(ACTIVATIONS), **_SWITCHES},
        )
        for name, downsample in (("convnet", "pool"), ("convnet-strided", "stride"))
    },
    "resnet18": _Family(partial(ResNet18), inference.customary_resnet18_settings, _POOLING),
    "resnet18-max-pool": _Family(partial(ResNet18, max_pool=True), inference.resnet18_settings),
    "resnet18-no-pool": _Family(partial(ResNet18, max_pool=False), inference.resnet18_settings),
    **{
        f"resnet{6 * n + 2}-cifar": _Family(partial(CifarResNet, blocks=n), inference.cifar_resnet_settings)
        for n in (3, 5, 7, 9, 18)
    },
    "vit": _Family(partial(ViT), inference.vit_settings, _HEADS),
    "char-transformer": _Family(partial(CharTransformer), inference.char_transformer_settings, _HEADS),
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
