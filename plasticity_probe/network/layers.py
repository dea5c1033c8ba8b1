"""What a hidden layer is, what its units are, and how it is called.

A network is seen as the calls it makes while it runs forward: activation functions, affine operations, modules. Whether an activation is a
module (`nn.ReLU`) or a function (`F.relu`, `x.relu_()`) makes no difference. A layer's name is the path of its activation module
("layer1.0.relu") or, for a function, the path of the module that calls it and the function's name; where a name occurs several times in one
forward pass, its calls are numbered ("layer1.0.relu_1", "layer1.0.relu_2"). Names come from models and are untrusted text: they are kept as
they are, and whoever shows them escapes them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.network.unit_axes import CONVOLUTIONS, flat_tensors, is_weight

Test = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """What can become of the units of an activation function, as tests of (pre-activation, output), element by element.

    Args:
        linear: Its linear pieces of a slope other than 0: where the element lies on each of them.
        slope: For functions with two flat ends (and relu6, with a flat upper end), the slope there relative to the largest slope.
    """

    linear: tuple[Test, ...] = ()
    slope: Test | None = None


def _positive(x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001 -- every test takes both
    return x > 0


def _negative(x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001 -- every test takes both
    return x < 0


def _unclipped(x: Tensor, y: Tensor) -> Tensor:
    return x == y


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "relu": Kind((_positive,)),
        "relu6": Kind((lambda x, y: (x > 0) & (x == y),), lambda x, y: (x <= y).double()),
        "leaky_relu": Kind((_positive, _negative)),
        "prelu": Kind((_positive, _negative)),
        "rrelu": Kind((_positive, _negative)),
        "elu": Kind((_positive,)),
        "celu": Kind((_positive,)),
        "selu": Kind((_positive,)),
        "gelu": Kind(),
        "silu": Kind(),
        "mish": Kind(),
        "softplus": Kind(),
        "tanh": Kind(slope=lambda _, y: (1 - y) * (1 + y)),
        "sigmoid": Kind(slope=lambda _, y: 4 * y * (1 - y)),
        "softsign": Kind(slope=lambda _, y: (1 - y.abs()).square()),
        "hardtanh": Kind((_unclipped,), lambda x, y: (x == y).double()),
        "hardsigmoid": Kind((lambda x, _: x.abs() < 3,), lambda x, _: (x.abs() < 3).double()),
        "hardswish": Kind((lambda x, _: x >= 3,)),
        "threshold": Kind((_unclipped,)),
        "hardshrink": Kind((_unclipped,)),
        "softshrink": Kind(),
        "tanhshrink": Kind(),
        "log_sigmoid": Kind(),
        "glu": Kind(),
    }
)
"""The activation functions of torch that make hidden units; softmax and log_softmax make probabilities, not units.

Slopes are derivatives over their maximum: tanh' = 1 - y^2, 4 sigmoid' = 4 y (1 - y), softsign' = (1 - |y|)^2. relu6 is flat at both ends, but
its lower end is death (zero output), so that only the upper one counts as saturation. A layer of another kind ("custom", "recurrent",
"identity", "module", "input") has neither linear pieces nor saturation that could be told.
"""

_SPELLINGS = {"special_expit": "sigmoid"}
_PRODUCTS = frozenset(
    {"matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot"}
)


@dataclass(frozen=True)
class Call:
    """One call in a forward pass.

    Args:
        role: Whether it is an activation function, an affine operation, or a module's output.
        base: The path of its module, with the function's name where the module does more than this function.
        number: How often this base was called in this forward pass so far, from 1.
        kind: Which activation function (a key of `KINDS`, "custom" or "recurrent") or which affine operation.
    """

    role: Literal["activation", "affine", "module"]
    base: str
    number: int
    kind: str


@dataclass(frozen=True)
class Layer:
    """A layer whose units can be measured.

    Args:
        name: Its name, unique in the network; untrusted text.
        kind: Its activation function, or "custom", "recurrent", "identity", "module" or "input".
        call: The call that computes it.
        reads: Whether the layer is what the call reads instead of what it returns.
    """

    name: str
    kind: str
    call: Call
    reads: bool = False


@dataclass(frozen=True)
class Structure:
    """The layers of a network, as its forward passes showed them.

    Args:
        hidden: Its hidden layers, in the order in which they run: activations before the last affine operation; in a network without any,
            the outputs of all affine operations but the last.
        penultimate: What the last linear layer reads: a hidden layer where it reads exactly its units and rows, else a layer of its own named
            after the linear layer with ":input". Where the last affine operation is no linear layer, the last hidden layer.
        modules: For every module that returned a tensor, by path, its outputs as layers.
        calls: Every call that was seen.
    """

    hidden: tuple[Layer, ...]
    penultimate: Layer | None
    modules: Mapping[str, tuple[Layer, ...]]
    calls: frozenset[Call]

    @property
    def features(self) -> tuple[Layer, ...]:
        """The hidden layers and, where it is none of them, the penultimate one, last."""
        last = self.penultimate
        return self.hidden if last is None or last in self.hidden else (*self.hidden, last)

    def select(self, offered: Sequence[Layer], wanted: Sequence[str] | None) -> tuple[Layer, ...]:
        """The layers of the given names; all that are offered for None.

        Args:
            offered: Layers with a name of their own.
            wanted: Names of layers, paths of modules (the module's output), or patterns such as "layer1.*", tried in this order.

        Raises:
            UnknownNameError: A name or pattern fits nothing.
        """
        if wanted is None:
            return tuple(offered)
        chosen: dict[Layer, None] = {}
        for pattern in wanted:
            chosen |= dict.fromkeys(self._matching(offered, pattern))
        return tuple(chosen)

    def _matching(self, offered: Sequence[Layer], pattern: str) -> Sequence[Layer]:
        outputs = [layer for layers in self.modules.values() for layer in layers]
        found = (
            [layer for layer in offered if layer.name == pattern]
            or self.modules.get(pattern)
            or [layer for layer in offered if fnmatchcase(layer.name, pattern)]
            or [layer for layer in outputs if fnmatchcase(layer.name, pattern)]
        )
        if not found:
            raise UnknownNameError("layer", pattern, {layer.name for layer in (*offered, *outputs)})
        return found


def structure_of(forwards: Sequence[Sequence[Call]], read: Mapping[Call, Collection[Call]]) -> Structure:
    """Finds the hidden and the penultimate layers in the calls of some forward passes.

    Args:
        forwards: The calls of each forward pass in their order; they differ where the network's path depends on its data.
        read: For linear layers that read the output of earlier calls as it is: those calls.
    """
    calls = dict.fromkeys(call for forward in forwards for call in forward)
    hidden = _hidden(forwards)
    last = next((affine[-1] for forward in forwards if (affine := _affine(forward))), None)
    penultimate = hidden[-1] if hidden else None
    if last is not None and last.kind == "linear":
        same = [layer for layer in hidden if layer.call in read.get(last, ())]
        name = f"{_names(c for c in calls if c.role == 'affine')[last]}:input"
        penultimate = same[0] if same else Layer(name, "input", last, reads=True)
    outputs = [call for call in calls if call.role == "module" and call.base]
    named = _names(outputs)
    modules: dict[str, tuple[Layer, ...]] = {}
    for call in outputs:
        modules[call.base] = (*modules.get(call.base, ()), Layer(named[call], "module", call))
    return Structure(hidden, penultimate, MappingProxyType(modules), frozenset(calls))


def requested(layers: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of layers as a tuple; one name alone counts as a list of one.

    Raises:
        UsageError: The list is empty.
    """
    names = (layers,) if isinstance(layers, str) else layers if layers is None else tuple(layers)
    if names == ():
        raise UsageError("expected at least one layer, got an empty list; leave layers=None to measure all of them.")
    return names


def _affine(forward: Sequence[Call]) -> list[Call]:
    return [call for call in forward if call.role == "affine"]


def _hidden(forwards: Sequence[Sequence[Call]]) -> tuple[Layer, ...]:
    inner: dict[Call, None] = {}
    for forward in forwards:
        ends = [at for at, call in enumerate(forward) if call.role == "affine"]
        inner |= dict.fromkeys(forward[: ends[-1]] if ends else ())
    every = [call for forward in forwards for call in forward]
    activations = [call for call in inner if call.role == "activation"]
    named = _names(call for call in every if call.role == "activation")
    if activations:
        return tuple(Layer(named[call], call.kind, call) for call in activations)
    named = _names(call for call in every if call.role == "affine")
    plain = [call for call in inner if call.role == "affine" and call.kind != "attention"]
    return tuple(Layer(named[call], "identity", call) for call in plain)


def _names(calls: Iterable[Call]) -> dict[Call, str]:
    unique = list(dict.fromkeys(calls))
    repeated = {call.base for call in unique if call.number > 1}
    names: dict[Call, str] = {}
    for call in unique:
        name = f"{call.base}_{call.number}" if call.base in repeated else call.base
        # A module may be called "relu_1" beside functional relus; two layers must not share a name.
        while name in names.values():
            name += "_"
        names[call] = name
    return names


def function_name(function: Callable[..., Any]) -> str:
    """The name of a torch function or Tensor method without the marks of variants: "relu" for F.relu, x.relu_ and torch.relu_."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "")
    stripped = name.strip("_")
    return _SPELLINGS.get(stripped, stripped)


def activation_kind(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Which activation function a call is, a key of `KINDS`; None for anything else.

    `hardtanh` from 0 up is what nn.ReLU6 calls, and `clamp` from 0 up without an upper end is a ReLU by another name.

    Args:
        name: The function's name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    def given(key: str, at: int, default: Any) -> Any:
        return kwargs.get(key, args[at] if len(args) > at else default)

    if name in ("clamp", "clip", "clamp_min"):
        low, high = given("min", 1, None), None if name == "clamp_min" else given("max", 2, None)
        return "relu" if isinstance(low, int | float) and low == 0 and high is None else None
    if name == "hardtanh" and given("min_val", 1, -1.0) == 0:
        return "relu6"
    return name if name in KINDS else None


def affine_kind(name: str, args: Sequence[Any], weights: frozenset[int]) -> str | None:
    """Which affine operation a call is: "linear", "conv", "bilinear" or "attention"; None for anything else.

    Args:
        name: The function's name.
        args: Its positional arguments.
        weights: Addresses of the storages of the parameters: a matrix product is a linear layer where one of its operands is a parameter.
    """
    if name in CONVOLUTIONS:
        return "conv"
    if name in ("linear", "bilinear"):
        return name
    if name == "multi_head_attention_forward":
        return "attention"
    if name in _PRODUCTS and any(is_weight(tensor, weights) for tensor in flat_tensors(args)):
        return "linear"
    return None
