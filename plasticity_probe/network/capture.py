"""Runs a network forward and hands on the activations of its layers, chunk by chunk. All hooks live here.

What runs is seen by a `TorchFunctionMode`: every call of a torch function or Tensor method, the outermost only, whether a module makes it or a
forward method. Hooks before and after each module keep the path of the module that is running. Both are there for the length of a pass
and on the subject's private copy only. What runs inside one fused kernel is not visible: of nn.RNN, nn.LSTM and nn.GRU the output sequence of
the top layer counts as a layer of kind "recurrent", attention is one affine operation, TorchScript is opaque.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.examples import Batch
from plasticity_probe.network.layers import (
    Call,
    Layer,
    Structure,
    activation_kind,
    affine_kind,
    function_name,
    structure_of,
)
from plasticity_probe.network.subject import Subject
from plasticity_probe.network.unit_axes import UnitAxes, flat_tensors, is_weight, matrix, unit_axis_of_product

SURVEYED = 16
"""Examples that show which layers a network has (our choice: a fixed network shows them on one; more only costs time)."""


@dataclass(frozen=True, eq=False)
class Activation:
    """The activations of one layer on one chunk of examples.

    Args:
        layer: The layer.
        input: Its pre-activations, of the shape of `output`; None where it has none that are visible.
        output: Its activations.
        axis: The axis that runs over units; all others are rows.
    """

    layer: Layer
    input: Tensor | None
    output: Tensor
    axis: int

    @property
    def matrix(self) -> Tensor:
        """The activations, shape (rows, units): a convolution's positions and a transformer's tokens are rows."""
        return matrix(self.output, self.axis)


class Accumulator(Protocol):
    """Whatever gathers the activations of one layer."""

    def add(self, activation: Activation) -> None:
        """Takes in the activations of one call."""
        ...


A = TypeVar("A", bound=Accumulator)


def observe(
    subject: Subject, choose: Callable[[Structure], Sequence[Layer]], start: Callable[[Layer], A]
) -> tuple[Structure, list[tuple[Layer, A]]]:
    """Runs the subject's model forward over all its examples and hands every activation of the chosen layers to their accumulators.

    Args:
        subject: The subject; nothing of it is changed.
        choose: Picks layers of the network.
        start: Makes an empty accumulator for a layer.

    Returns:
        The network's layers, and the chosen ones with what they have gathered.

    Raises:
        SubjectError: The layers that run or their number of units change from pass to pass.
    """
    for everything in (False, True):
        structure = subject.once(("structure", everything), lambda everything=everything: survey(subject, everything))
        gathered = [(layer, start(layer)) for layer in choose(structure)]
        if _gather(subject, structure, gathered):
            return structure, gathered
    raise SubjectError(
        "the network runs other layers at a second pass over the same examples, so that none of them could be measured on all. Make its path "
        "depend on the examples alone."
    )


def survey(subject: Subject, everything: bool = False) -> Structure:
    """Finds the layers of a network by running it on a few examples.

    Args:
        subject: The subject.
        everything: Whether to run all examples, for a network whose path depends on them.
    """
    read: dict[Call, set[Call]] = {}
    latest: dict[str, tuple[Call, Tensor]] = {}

    def receive(call: Call, reads: Tensor | None, output: Tensor, axes: UnitAxes) -> None:
        if call.kind == "linear" and reads is not None:
            seen = matrix(reads, axes.of(reads)) if reads.ndim else reads
            same = {earlier for earlier, rows in latest.values() if _same(rows, seen)}
            read[call] = read.get(call, same) & same
        if call.role != "module" and output.ndim:
            latest[call.role] = call, matrix(output, axes.of(output)).clone()

    watch = _Watch(subject.model, receive)
    chunks = subject.chunks() if everything else [next(iter(subject.chunks(min(SURVEYED, subject.chunk))))]
    _run(subject, watch, chunks)
    return structure_of(watch.forwards, read)


@contextmanager
def recorded_inputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Records what some modules read while the model runs forward; it works under `torch.func.vmap` too.

    Args:
        model: The model; the hooks are gone afterwards.
        names: Paths of modules with one tensor argument.

    Yields:
        Filled with each module's input, by its path, when it runs; of several calls the last one.
    """
    found: dict[str, Tensor] = {}

    def recording(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0]

        return record

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(recording(name)).remove)
        yield found


def _gather(subject: Subject, structure: Structure, gathered: Sequence[tuple[Layer, Accumulator]]) -> bool:
    """Whether the pass made only calls that the structure knows."""
    wanted: dict[Call, list[tuple[Layer, Accumulator]]] = {}
    for layer, accumulator in gathered:
        wanted.setdefault(layer.call, []).append((layer, accumulator))
    units: dict[Layer, int] = {}

    def receive(call: Call, reads: Tensor | None, output: Tensor, axes: UnitAxes) -> None:
        for layer, accumulator in wanted.get(call, ()):
            values = reads if layer.reads else output
            if values is None or not values.ndim:
                continue
            axis = axes.of(values)
            _check_units(layer, units.setdefault(layer, values.shape[axis]), values.shape[axis])
            elementwise = call.role == "activation" and reads is not None and reads.shape == values.shape
            accumulator.add(Activation(layer, reads if elementwise else None, values, axis))

    watch = _Watch(subject.model, receive)
    _run(subject, watch, subject.chunks())
    return all(call in structure.calls for forward in watch.forwards for call in forward)


def _check_units(layer: Layer, expected: int, came: int) -> None:
    if expected != came:
        raise SubjectError(
            f"expected the {expected} units that layer {layer.name!r} had before, got {came}: its size changes with the examples. Pad them "
            "to one size, or choose other layers (layers=)."
        )


def _run(subject: Subject, watch: "_Watch", chunks: Iterable[Batch]) -> None:
    # A custom loss knows what its batches mean; otherwise the outputs are enough and the targets are left alone.
    forward = subject.losses if subject.loss.of_outputs is None else subject.outputs
    with torch.no_grad(), ExitStack() as stack:
        for handle in watch.hooks():
            stack.callback(handle.remove)
        stack.enter_context(watch)
        for batch in chunks:
            watch.begin()
            forward(subject.parameters_or_none, batch)


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool(((one == other) | (one.isnan() & other.isnan())).all())
    )


@dataclass(eq=False)
class _Frame:
    """A module that is running. `entry` is a copy of what went into a module that may be one whole custom activation function."""

    path: str
    module: nn.Module
    entry: Tensor | None
    inside: list[tuple[Call, Tensor, Tensor]]


class _Watch(TorchFunctionMode):
    """Sees a model's calls: notes them by forward pass and hands each on as (call, what it reads, what it returns, unit axes)."""

    def __init__(self, model: nn.Module, receive: Callable[[Call, Tensor | None, Tensor, UnitAxes], None]) -> None:
        super().__init__()
        self.model = model
        self.receive = receive
        self.forwards: list[list[Call]] = []
        self.frames: list[_Frame] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.axes = UnitAxes()
        self.receiving = False
        pointers = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.weights = frozenset(pointers - {0})

    def begin(self) -> None:
        """Starts a forward pass."""
        self.frames.clear()
        self.counts.clear()
        self.axes = UnitAxes()
        if not self.forwards or self.forwards[-1]:
            self.forwards.append([])

    def hooks(self) -> Iterable[Any]:
        """Puts a hook before and after every module; yields their handles."""
        for path, module in self.model.named_modules():
            yield module.register_forward_pre_hook(self._entering(path), with_kwargs=True)
            yield module.register_forward_hook(self._leaving, always_call=True)

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module is self.model and not self.frames:
                self.begin()
            entry = None
            if _may_be_activation(module):
                tensors = list(flat_tensors((*args, *kwargs.values())))
                entry = tensors[0].clone() if len(tensors) == 1 else None
            self.frames.append(_Frame(path, module, entry, []))

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002 -- torch passes all three
        frame = self.frames.pop()
        result = output.data if isinstance(output, PackedSequence) else next(flat_tensors((output,)), None)
        if frame.entry is not None:
            self._settle(frame, result)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            result = _sequence(output)
        if result is None:
            return
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            self.axes.put_last(result)
            self._note("affine", frame.path or "recurrent", "recurrent", None, result)
            self._note("activation", frame.path or "recurrent", "recurrent", None, result)
        self._note("module", frame.path, "module", None, result)

    def _settle(self, frame: _Frame, result: Tensor | None) -> None:
        """A small module of its own around one activation function (a hand-written GELU or swish) is an activation function itself."""
        whole = (
            len(frame.inside) == 1
            and frame.entry is not None
            and result is not None
            and result.shape == frame.entry.shape
            and result.data_ptr() != frame.inside[0][2].data_ptr()
        )
        if whole and result is not None:
            self._note("activation", frame.path or "custom", "custom", frame.entry, result)
            return
        for call, reads, output in frame.inside:
            self._note("activation", call.base, call.kind, reads, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.receiving or not self.frames:
            return func(*args, **kwargs)
        name, operands = function_name(func), (*args, *kwargs.values())
        kind, affine = activation_kind(name, args, kwargs), affine_kind(name, operands, self.weights)
        counts = kind is not None or affine is not None
        given = flat_tensors(operands) if counts else ()
        reads = next((tensor for tensor in given if not is_weight(tensor, self.weights)), None)
        if kind is not None and reads is not None and _may_overwrite(func, operands, kwargs):
            reads = reads.clone()
        result = func(*args, **kwargs)
        product = unit_axis_of_product(name, operands, self.weights) if affine == "linear" else None
        self.axes.follow(name, operands, result, partial(_again, func, args, kwargs) if args else None, product)
        output = next(flat_tensors((result,)), None)
        if affine is not None and output is not None:
            self._note("affine", self._base(name, leaf=True), affine, reads, output)
        elif kind is not None and reads is not None and output is not None and output.ndim > 1:
            self._activation(name, kind, reads, output)
        return result

    def _activation(self, name: str, kind: str, reads: Tensor, output: Tensor) -> None:
        frame = self.frames[-1]
        base = self._base(name, leaf=_is_activation(frame.module))
        if frame.entry is None:
            self._note("activation", base, kind, reads, output)
        else:
            frame.inside.append((Call("activation", base, 0, kind), reads, output))

    def _base(self, name: str, leaf: bool) -> str:
        frame = self.frames[-1]
        if leaf and frame.path and not any(True for _ in frame.module.children()):
            return frame.path
        return f"{frame.path}.{name}" if frame.path else name

    def _note(self, role: Any, base: str, kind: str, reads: Tensor | None, output: Tensor) -> None:
        self.counts[role, base] += 1
        call = Call(role, base, self.counts[role, base], kind)
        self.forwards[-1].append(call)
        # Whoever receives computes with torch too, which is none of the model's calls.
        self.receiving = True
        try:
            self.receive(call, reads, output, self.axes)
        finally:
            self.receiving = False


def _again(func: Any, args: Sequence[Any], kwargs: Any, first: Tensor) -> Any:
    return func(first, *args[1:], **kwargs)


def _sequence(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple) and not isinstance(output, PackedSequence) else output
    return first.data if isinstance(first, PackedSequence) else first


def _is_activation(module: nn.Module) -> bool:
    return any(kind.__module__ == "torch.nn.modules.activation" for kind in type(module).__mro__)


def _may_be_activation(module: nn.Module) -> bool:
    bare = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    return bare and not type(module).__module__.startswith("torch.nn.") and not _is_activation(module)


def _may_overwrite(func: Any, operands: Sequence[Any], kwargs: Any) -> bool:
    in_place = getattr(func, "__name__", "").endswith("_")
    return in_place or "out" in kwargs or any(operand is True for operand in operands)
