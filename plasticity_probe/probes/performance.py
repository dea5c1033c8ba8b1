"""The loss and the accuracy of the network on the data: what shows at once that model, data and normalisation belong together."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from torch import Tensor, nn

from plasticity_probe.measurement import Measurement, Quantity, Status, measurement
from plasticity_probe.network.losses import IGNORED, class_axis, inputs_and_targets
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe, measured


@measurement
class Performance(Measurement):
    """Loss and accuracy on all examples.

    Args:
        loss: The mean loss.
        accuracy: Share of targets that have the highest score; NaN for regression and custom losses.
        chance: Accuracy of always guessing the most frequent class of these examples; NaN where there are no classes.
    """

    accuracy: Annotated[float, Quantity("accuracy")]
    chance: Annotated[float, Quantity("accuracy of guessing the most frequent class", shown=False)]
    loss: Annotated[float, Quantity("mean loss", units="loss")]


@final
@dataclass(frozen=True)
class PerformanceProbe(Probe[Performance]):
    """Measures loss and accuracy by one forward pass over every example of the subject."""

    name: ClassVar[str] = "performance"
    title: ClassVar[str] = "loss and accuracy on the data"
    needs: ClassVar[Need] = Need.DATA | Need.LOSS
    returns: ClassVar[type[Measurement]] = Performance

    def cost(self, subject: Subject) -> Cost:
        """Two forward passes: one for the losses, one for the predictions."""
        return Cost(forwards=2 * len(subject.examples))

    def measure(self, subject: Subject, generator: torch.Generator) -> Performance:  # noqa: ARG002 -- nothing random here
        """Measures loss and accuracy."""
        accuracy, chance = _accuracy(subject)
        finite = torch.tensor(subject.mean_loss).isfinite().item()
        message = (
            "" if finite else "the loss is not finite: weights or inputs hold NaN or Inf, or the outputs overflow."
        )
        status = Status.OK if finite else Status.NONFINITE
        return Performance(
            conditions=subject.conditions(),
            status=status,
            message=message,
            accuracy=accuracy,
            chance=chance,
            loss=subject.mean_loss,
        )


def performance(
    model: nn.Module, loader: Any, *, examples: int | None = None, seed: int = 0, **options: Any
) -> Performance:
    """The mean loss and the accuracy of a model on the examples of a loader.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches.
        examples: Read no more than this many; all by default.
        seed: Recorded with the result; nothing random happens.
        options: loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`).
    """
    return measured(PerformanceProbe(), model, loader, examples=examples, seed=seed, **options)


def _accuracy(subject: Subject) -> tuple[float, float]:
    right = total = 0
    seen: list[Tensor] = []
    for batch in subject.chunks():
        targets = inputs_and_targets(batch)[1] if subject.loss.of_outputs else None
        if targets is None or targets.is_floating_point():
            return float("nan"), float("nan")
        with torch.no_grad():
            outputs = subject.outputs(subject.parameters_or_none, batch)
        guessed = outputs.argmax(class_axis(outputs, targets))
        counted = targets != IGNORED
        right += int((guessed == targets)[counted].sum())
        total += int(counted.sum())
        seen.append(targets[counted])
    most = torch.cat(seen).bincount().max().item() if total else 0
    return (right / total, most / total) if total else (float("nan"), float("nan"))
