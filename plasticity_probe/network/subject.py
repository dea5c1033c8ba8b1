"""The subject of a measurement: a private copy of a network in a stated mode, a per-example loss and a fixed set of examples."""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plasticity_probe.checkpoints.prefixes import strip_prefixes
from plasticity_probe.errors import SubjectError
from plasticity_probe.measurement import Conditions
from plasticity_probe.network.autograd_nodes import recorded
from plasticity_probe.network.examples import Batch, Examples, read_examples, tensors_of
from plasticity_probe.network.isolation import without_cudnn
from plasticity_probe.network.losses import Loss, LossFunction, Terms, custom_loss, infer_loss, outputs_of
from plasticity_probe.network.private_copy import Mode, private_copy
from plasticity_probe.network.selection import freeze_others

T = TypeVar("T")

LARGEST_CHUNK = 1024
"""Examples per pass at most (our choice: enough that work on the size of the parameters, once per pass, does not show)."""

PASS_ON_CPU = 2**27
"""Bytes of activations per pass at most on a CPU (our choice: a residual network was slower by a tenth where a pass took twice as much, because
memory came fresh from the operating system at every operation)."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What a probe measures. Its model is a private copy: nothing done here reaches the user's.

    Args:
        model: The network, in `mode`, on its device, in at least float32.
        loss: The per-example loss.
        examples: The fixed examples every quantity is measured on.
        mode: "eval" (running statistics, no dropout) or "train" (batch statistics; dropout must be absent or it is refused).
        seed: Seed of the run.
        memory: Bytes that a measurement may use beyond the weights and examples.
        allow_tf32: Whether curvature products may round factors to the ten bits of TF32, on GPUs that have it.
        initial: Weights at initialisation by name, where known.
        training: Examples the network was trained on, where known.
        held_out: Examples it never saw, where known.
        noisy: Marks the examples of `training` whose labels are known to be wrong, where known.
        memo: Results that several probes share, by key.
    """

    model: nn.Module
    loss: Loss
    examples: Examples
    mode: Mode = "eval"
    seed: int = 0
    memory: int = 2**31
    allow_tf32: bool = False
    initial: Mapping[str, Tensor] | None = None
    training: Examples | None = None
    held_out: Examples | None = None
    noisy: Tensor | None = None
    memo: dict[Hashable, Any] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable floating-point parameters by name, tied ones once; leaves that require gradients.

        Raises:
            SubjectError: Every parameter is frozen.
        """
        found = {
            name: p.detach().requires_grad_()
            for name, p in self.model.named_parameters()
            if p.requires_grad and p.numel()
        }
        if not found:
            raise SubjectError(
                "expected at least one trainable parameter, but all are frozen (or the model has none). Set requires_grad=True on those "
                "whose curvature and gradients you ask for."
            )
        return found

    @cached_property
    def size(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((tensor.device for tensor in self.model.state_dict().values()), torch.device("cpu"))

    @cached_property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next((t.dtype for t in self.model.state_dict().values() if t.is_floating_point()), torch.float32)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Parameter-shaped tensors as one vector of length `size`, in the order of `parameters`."""
        return torch.cat([tensors[name].reshape(-1) for name in self.parameters])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector of length `size` as parameter-shaped tensors by name."""
        pieces = vector.split([parameter.numel() for parameter in self.parameters.values()])
        return {name: piece.view_as(p) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)}

    def losses(self, parameters: Mapping[str, Tensor], batch: Batch) -> Terms:
        """Per example of a batch the sum of its loss terms and their number, each (N,), as a function of the parameters.

        Args:
            parameters: Values for the trainable parameters by name.
            batch: A batch on the subject's device.
        """
        return self._call(parameters, batch, self.loss.of_batch)

    def outputs(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The model's output tensor for a batch, as a function of the parameters."""
        return self._call(parameters, batch, outputs_of)

    def chunks(self, size: int | None = None) -> Iterable[Batch]:
        """The examples in chunks that fit the memory; all at once in train mode, where BatchNorm couples them."""
        return self.examples.chunks(len(self.examples) if self.mode == "train" else size or self.chunk)

    @cached_property
    def chunk(self) -> int:
        """Examples per pass: an eighth of the memory holds their activations, and on a CPU they are no more than is fast."""
        fits = self.memory // (8 * self.activation_bytes)
        fast = PASS_ON_CPU // self.activation_bytes if self.device.type == "cpu" else LARGEST_CHUNK
        return int(min(LARGEST_CHUNK, max(1, min(fits, fast))))

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes that autograd keeps for one example's forward pass, measured by running a few."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = min(tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size())
            # An operation that kept its own result would never be freed.
            return tensor.detach()

        weights = {parameter.data_ptr() for parameter in self.model.parameters()}
        first = next(iter(self.examples.chunks(8)))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sums, _ = self.losses(self.parameters_or_none, first)
        total = sum(size for pointer, size in kept.items() if pointer not in weights)
        return max(1, total // len(sums))

    @cached_property
    def terms(self) -> float:
        """Number of loss terms in the examples: their count, or in a language model the number of tokens with a loss."""
        return float(self.each_loss()[1].sum())

    @cached_property
    def mean_loss(self) -> float:
        """The mean loss: the sum of all terms over their number."""
        sums, counts = self.each_loss()
        return float(sums.sum() / counts.sum())

    def each_loss(self) -> Terms:
        """Per example the sum of its terms and their number, float64 on the CPU, by one forward pass that is remembered."""
        return self.once("losses", self._each_loss)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """A result that several probes share, computed at the first call for these examples."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def take(self, count: int | None) -> "Subject":
        """The same subject on its first `count` examples."""
        return self if count is None or count >= len(self.examples) else self.on(self.examples.take(count))

    def on(self, examples: Examples) -> "Subject":
        """The same network and loss on other examples; what probes share there is remembered too."""
        placed = examples.handed_out_as(self.dtype, self.device)
        return replace(self, examples=placed, memo=self.once(("on", examples.sha256), dict))

    def conditions(self) -> Conditions:
        """The conditions that a measurement of this subject carries."""
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        dtype, device = str(self.dtype).removeprefix("torch."), str(self.device)
        return Conditions(len(self.examples), trainable, self.loss.name, self.mode, dtype, device, self.seed)

    def _call(self, parameters: Mapping[str, Tensor], batch: Batch, function: Callable[[nn.Module, Batch], T]) -> T:
        values = {f"model.{name}": value for name, value in parameters.items()}
        values |= {f"model.{name}": buffer.clone() for name, buffer in self.model.named_buffers()}
        with without_cudnn() if self._recurrent else nullcontext():
            return functional_call(_Applied(self.model, function), values, (batch,))

    @cached_property
    def _recurrent(self) -> bool:
        """Whether a recurrent layer runs, whose cuDNN kernel has no second derivative."""
        return any(isinstance(module, nn.RNNBase) for module in self.model.modules())

    def _each_loss(self) -> Terms:
        with torch.no_grad():
            parts = [self.losses(self.parameters_or_none, batch) for batch in self.chunks()]
        return torch.cat([s for s, _ in parts]).double().cpu(), torch.cat([c for _, c in parts]).double().cpu()

    @property
    def parameters_or_none(self) -> dict[str, Tensor]:
        """The trainable parameters, or an empty mapping where all are frozen: enough to run the network forward."""
        return self.parameters if any(p.requires_grad for p in self.model.parameters()) else {}


def subject(
    model: nn.Module,
    data: Iterable[Batch] | Examples,
    *,
    loss: LossFunction | None = None,
    examples: int | None = None,
    mode: Mode = "eval",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    memory: int | None = None,
    parameters: str | Sequence[str] | None = None,
    allow_tf32: bool = False,
    initial: Mapping[str, Tensor] | None = None,
    training: Iterable[Batch] | Examples | None = None,
    held_out: Iterable[Batch] | Examples | None = None,
    noisy: Tensor | None = None,
) -> Subject:
    """Puts a model, a loss and data together, on a private copy of the model, and checks that they repeat themselves.

    Args:
        model: Any module; compiled, DataParallel and DDP wrappers are taken off the copy.
        data: Any iterable of batches, or examples already read.
        loss: loss(model, batch) -> losses of the examples, shape (N,), or (sums, counts) of that shape; None infers cross-entropy or squared
            error from outputs and targets.
        examples: Read no more than this many examples.
        mode: "eval" by default, stated in every result.
        dtype: Type to compute in; by default the model's own, but at least float32.
        device: Where to compute; by default where the model is.
        seed: Seed of all random draws.
        memory: Bytes a measurement may use; by default half of what is free.
        parameters: Patterns (`*`, `?`, `[...]`) of the parameters whose gradients and curvature are measured, against names such as
            "layer1.0.conv1.weight" or of modules such as "layer1.0", which stand for all below; the others are constants. None: all trainable
            ones. With block-diagonal curvature in mind, one measurement per block.
        allow_tf32: Let curvature products round factors to the ten bits of TF32, on GPUs that have it: faster, with a relative error near 1e-3
            instead of 1e-7. `tests/benchmarks/products.py` measures it.
        initial: Weights at initialisation by name.
        training: Examples the network was trained on.
        held_out: Examples it never saw.
        noisy: Booleans, one per example of `training` (or of `data`): True where the label is known to be wrong.

    Raises:
        SubjectError: Model, loss and data do not go together, or two passes over the same examples differ.
        UnknownNameError: A pattern of `parameters` fits no parameter.
        DataError: The loader is empty.
    """
    network = private_copy(model, mode, dtype, device)
    if parameters is not None:
        freeze_others(network, parameters)
    held = data if isinstance(data, Examples) else read_examples(data, examples)
    shell = Subject(network, _NO_LOSS, held)
    placed = held.take(examples).handed_out_as(shell.dtype, shell.device)
    first = next(iter(placed.chunks(8)))
    if loss is None:
        _check_runs(network, first)
    made = replace(
        shell,
        loss=custom_loss(loss) if loss else infer_loss(network, first, placed.chunks(LARGEST_CHUNK)),
        examples=placed,
        mode=mode,
        seed=seed,
        memory=memory or free_memory(shell.device) // 2,
        allow_tf32=allow_tf32,
        initial=_matched(initial, network) if initial else None,
        training=_read(training, examples),
        held_out=_read(held_out, examples),
        noisy=noisy,
    )
    check_repeats(made)
    return made


def check_repeats(subject: Subject, examples: int = 32) -> None:
    """Refuses a subject whose loss or gradient differs between two passes over the same few examples.

    Args:
        subject: The subject to check.
        examples: How many examples to try (our choice: enough for dropout and noise to show, too few to cost anything).

    Raises:
        SubjectError: The passes differ, or the loss does not depend on the model's parameters; the message names the likely cause.
    """
    few = subject if subject.mode == "train" else subject.take(examples)
    first, second = (_loss_and_gradients(few) for _ in range(2))
    if first is None or second is None:
        return
    if len(first) > 1 and all(gradient is None for gradient in first[1:]):
        raise SubjectError(
            "expected a loss that depends on the model's trainable parameters, but its gradient is missing for all of them. A custom loss must "
            "call the model it is given (loss(model, batch)), not another one, and must not detach its output."
        )
    repeats = all(_close(a, b) for a, b in zip(first, second, strict=True))
    if not repeats:
        raise SubjectError(
            f"two passes over the same examples give different losses or gradients{_likely_cause(subject.model)}. Measure in eval mode, or "
            "make the model deterministic."
        )


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; for the CPU what the operating system calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 1024**3


class _Applied(nn.Module):
    """A function of a model and a batch as a module, so that its parameters can be replaced for one call."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Batch], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function
        self.training = model.training

    def forward(self, batch: Batch) -> Any:
        return self.function(self.model, batch)


def _check_runs(model: nn.Module, batch: Batch) -> None:
    try:
        with torch.no_grad():
            outputs_of(model, batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, SubjectError):
            raise
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(batch)[:3])
        raise SubjectError(
            f"the model does not run on these examples, whose tensors have the shapes {shapes}: {error}. Check that model and data belong "
            "together, or pass loss=lambda model, batch: ... that calls the model as it wants to be called."
        ) from error


def _matched(initial: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Initial weights under the network's own names, whatever wrapper they were saved from."""
    wanted = {name for name, _ in network.named_parameters()}
    names = strip_prefixes(initial, wanted)
    found = {names[key]: value for key, value in initial.items() if names.get(key) in wanted}
    if not found:
        raise SubjectError(
            f"expected initial weights with names such as {', '.join(sorted(wanted)[:3])}, got {', '.join(list(initial)[:3])}. Pass the "
            "state dict of this network before training."
        )
    return found


def _read(data: Iterable[Batch] | Examples | None, limit: int | None) -> Examples | None:
    return data if data is None or isinstance(data, Examples) else read_examples(data, limit)


def _loss_and_gradients(subject: Subject) -> list[Tensor | None] | None:
    parameters = subject.parameters_or_none
    batch = next(iter(subject.chunks(len(subject.examples))))
    sums, _ = subject.losses(parameters, batch)
    if not torch.isfinite(sums).all():
        return None
    if not parameters or not sums.requires_grad:
        return [sums.detach(), *([None] if parameters else [])]
    if any(node.name() == "CheckpointFunctionBackward" for node in recorded([sums])):
        raise SubjectError(
            "expected operations that gradients can be taken of, but the model recomputes activations by torch.utils.checkpoint with "
            "use_reentrant=True, which hides the parameters inside. Call it with use_reentrant=False, or switch it off."
        )
    return [sums.detach(), *torch.autograd.grad(sums.sum(), list(parameters.values()), allow_unused=True)]


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool((a - b).norm() <= 1e-3 * max(a.norm(), b.norm()))


def _likely_cause(model: nn.Module) -> str:
    dropout = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
    ]
    if dropout:
        return f": dropout is active in train mode ({', '.join(dropout[:3])})"
    return ", so the model draws random numbers or keeps state between calls"


def _no_loss(*_: object) -> Terms:
    raise SubjectError("no loss was chosen yet")


_NO_LOSS = Loss("none", _no_loss, None)
