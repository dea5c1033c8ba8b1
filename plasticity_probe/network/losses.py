"""Per-example losses: what a model is judged by, inferred from its outputs and targets or given by the user."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.examples import Batch, batch_size

LossFunction = Callable[[nn.Module, Batch], Any]
Terms = tuple[Tensor, Tensor]
"""Per example the sum of its loss terms and their number, each of shape (N,)."""

IGNORED = -100
"""Targets with this value carry no loss, as in torch.nn.functional.cross_entropy."""


@dataclass(frozen=True)
class Loss:
    """A per-example loss.

    Args:
        name: What it is and how it was chosen, as reports print it.
        of_batch: (model, batch) -> per example the sum of its terms and their number.
        of_outputs: (outputs, targets) -> the same, where the loss is a function of outputs and targets alone; else None.
    """

    name: str
    of_batch: Callable[[nn.Module, Batch], Terms]
    of_outputs: Callable[[Tensor, Tensor], Terms] | None


def outputs_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output tensor: the output itself, its `.logits`, its ["logits"], or the first entry of a tuple or list.

    Raises:
        SubjectError: None of these is a tensor.
    """
    inputs, _ = inputs_and_targets(batch)
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    found = output
    if hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple | list):
        found = output[0] if output else None
    if not isinstance(found, Tensor):
        raise SubjectError(
            f"expected the model to return a tensor, an object with .logits, a mapping with 'logits' or a tuple of tensors, got "
            f"{type(output).__name__}. Pass loss=lambda model, batch: ... that returns one loss per example."
        )
    return found


def inputs_and_targets(batch: Batch) -> tuple[Any, Tensor | None]:
    """Splits a batch: (x, y) as it stands; a mapping into its entries without "labels" and "labels"; a lone tensor has no targets.

    Raises:
        SubjectError: The batch has another form, so that only a custom loss can know what is what.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, Mapping):
        key = next((key for key in ("labels", "label", "targets", "target") if key in batch), None)
        rest = {name: value for name, value in batch.items() if name != key}
        return rest, batch[key] if key else None
    raise SubjectError(
        f"expected batches (inputs, targets) or mappings with 'labels', got {_form(batch)}. Pass loss=lambda model, batch: ... that returns "
        "one loss per example."
    )


def custom_loss(function: LossFunction) -> Loss:
    """A user's loss(model, batch), which returns the losses of the examples, shape (N,), or a pair (sums, counts) of that shape."""
    if isinstance(function, nn.modules.loss._Loss):
        raise SubjectError(
            f"expected loss(model, batch) that returns one loss per example, got the module {type(function).__name__}. Leave loss=None to "
            "have cross-entropy or squared error inferred, or wrap it: loss=lambda model, batch: "
            "F.cross_entropy(model(batch[0]), batch[1], reduction='none')."
        )

    def of_batch(model: nn.Module, batch: Batch) -> Terms:
        result = function(model, batch)
        sums, counts = result if isinstance(result, tuple) else (result, None)
        if not isinstance(sums, Tensor) or sums.ndim != 1:
            came = f"shape {tuple(sums.shape)}" if isinstance(sums, Tensor) else type(sums).__name__
            raise SubjectError(
                f"expected the loss to return one value per example, shape (N,), or a pair (sums, counts), got {came}. Use "
                "reduction='none' and sum over everything but the examples."
            )
        _check_one_each(sums, batch)
        return sums, torch.ones_like(sums) if counts is None else counts.to(sums)

    return Loss(f"{getattr(function, '__name__', type(function).__name__)} (given)", of_batch, None)


def infer_loss(model: nn.Module, batch: Batch, examples: Iterable[Batch]) -> Loss:
    """Cross-entropy for integer targets and class scores, squared error for targets of the outputs' shape.

    Args:
        model: The network.
        batch: A few of its examples, to see the shapes of outputs and targets.
        examples: All batches, whose targets are checked.

    Raises:
        SubjectError: Targets are missing, out of range, or fit neither; the message says what came and what to do.
    """
    with torch.no_grad():
        outputs = outputs_of(model, batch)
    _, targets = inputs_and_targets(batch)
    if targets is None:
        raise SubjectError(
            "expected targets beside the inputs, got inputs alone. Let the loader yield (inputs, targets), or pass loss=."
        )
    if targets.is_floating_point():
        return _regression(outputs, targets)
    classes = _classes(outputs, targets)
    _check_not_shifted_inside(batch, targets)
    for each in examples:
        check_classes(cast(Tensor, inputs_and_targets(each)[1]), classes)
    return _of_outputs("cross-entropy (inferred)", cross_entropy_terms)


def class_axis(outputs: Tensor, targets: Tensor) -> int:
    """The axis of the outputs that runs over classes: the last for tokens, (N, T, C) with targets (N, T), else axis 1."""
    return -1 if outputs.ndim == 3 and outputs.shape[:2] == targets.shape else 1


def cross_entropy_terms(outputs: Tensor, targets: Tensor) -> Terms:
    """Per example the summed cross-entropy over its positions (tokens, pixels) and their number; ignored targets count nothing.

    Computed in float64 from the outputs: its derivative p - 1 at the right class cancels where p is close to 1, so that in float32 a network
    of loss 1e-4 would have a thousandth of its curvature wrong, and one of loss 1e-6 a tenth.

    Args:
        outputs: Scores, (N, C), (N, T, C) for tokens, or (N, C, H, W) for pixels.
        targets: Classes, (N,), (N, T) or (N, H, W).
    """
    scores = outputs.movedim(class_axis(outputs, targets), 1)
    losses = F.cross_entropy(scores.double(), targets, reduction="none", ignore_index=IGNORED)
    sums = losses.reshape(len(losses), -1).sum(1).to(torch.promote_types(outputs.dtype, torch.float32))
    return sums, (targets != IGNORED).reshape(len(losses), -1).sum(1).to(sums)


def squared_error_terms(outputs: Tensor, targets: Tensor) -> Terms:
    """Per example the mean of (output - target)^2 over its outputs, so that the mean over examples is torch's mse_loss."""
    errors = (outputs.reshape(targets.shape) - targets).square().reshape(len(targets), -1).mean(1)
    return errors, torch.ones_like(errors)


def check_classes(targets: Tensor, classes: int) -> None:
    """Raises SubjectError where a target lies outside 0..classes-1 and is not ignored."""
    bad = (targets != IGNORED) & ((targets < 0) | (targets >= classes))
    if bad.any():
        found = ", ".join(str(int(value)) for value in targets[bad].unique()[:5])
        raise SubjectError(
            f"expected labels from 0 to {classes - 1}, one for each of the model's {classes} outputs, but {int(bad.sum())} of "
            f"{targets.numel()} lie outside: {found}. Check that the model and the data belong together."
        )


def _classes(outputs: Tensor, targets: Tensor) -> int:
    axis = class_axis(outputs, targets)
    positions = (
        outputs.ndim == targets.ndim + 1
        and outputs.shape[0] == targets.shape[0]
        and outputs.shape[2:] == targets.shape[1:]
    )
    classes = outputs.shape[axis] if outputs.ndim > 1 else 1
    if not (axis == -1 or positions) or classes < 2:
        raise SubjectError(
            f"cannot tell the loss: integer targets of shape {tuple(targets.shape)} and outputs of shape {tuple(outputs.shape)} are neither "
            "class scores (N, C) nor (N, T, C). For binary targets or counts pass loss=lambda model, batch: ... with one loss per example."
        )
    return classes


def _regression(outputs: Tensor, targets: Tensor) -> Loss:
    if len(outputs) == len(targets) and outputs.numel() == targets.numel():
        return _of_outputs("squared error (inferred)", squared_error_terms)
    hint = "If they are class labels, make them integers: y.long(). " if targets.ndim == 1 else ""
    raise SubjectError(
        f"cannot tell the loss: floating-point targets of shape {tuple(targets.shape)} do not match outputs of shape {tuple(outputs.shape)}. "
        f"{hint}Otherwise pass loss=lambda model, batch: ... with one loss per example."
    )


def _of_outputs(name: str, terms: Callable[[Tensor, Tensor], Terms]) -> Loss:
    def of_batch(model: nn.Module, batch: Batch) -> Terms:
        sums, counts = terms(outputs_of(model, batch), cast(Tensor, inputs_and_targets(batch)[1]))
        _check_one_each(sums, batch)
        return sums, counts

    return Loss(name, of_batch, terms)


def _check_one_each(sums: Tensor, batch: Batch) -> None:
    if len(sums) != batch_size(batch):
        raise SubjectError(
            f"expected one loss per example, {batch_size(batch)} for this batch, got {len(sums)}. The examples of a batch are the rows of its "
            "first tensor: put them first (batch_first=True in recurrent networks), and sum the terms of each example."
        )


def _check_not_shifted_inside(batch: Batch, targets: Tensor) -> None:
    """Refuses a language model's labels that are its inputs: they are meant to be shifted inside the model, and this loss would not."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.shape != targets.shape:
        return
    counted = targets != IGNORED
    if counted.any() and (ids == targets)[counted].all():
        raise SubjectError(
            "expected labels that the outputs at the same position predict, but the labels are the input ids themselves, which Hugging Face's "
            "causal models shift by one inside. Let the loader yield input_ids[:, :-1] with labels=input_ids[:, 1:] (and the attention mask "
            "cut alike), or pass loss=lambda model, batch: ... that returns the (sums, counts) of the sequences."
        )


def _form(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)} entries"
    return type(batch).__name__
