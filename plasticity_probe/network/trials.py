"""What trials of learning are made of: tasks put to a network, a fixed budget of training on a private copy, and how well it did."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from plasticity_probe.network.examples import Batch, Examples, keep, map_tensors, place
from plasticity_probe.network.losses import (
    IGNORED,
    Loss,
    Terms,
    class_axis,
    inputs_and_targets,
    outputs_of,
    squared_error_terms,
)
from plasticity_probe.network.private_copy import private_copy
from plasticity_probe.network.subject import Subject

FREQUENCY = 1e5
"""Factor inside the sine of a probe function (Lyle et al. 2023)."""

NAN = float("nan")


@dataclass(frozen=True)
class Score:
    """How well a network does on a task.

    Args:
        loss: The mean loss.
        accuracy: Share of targets with the highest score; NaN where there are no classes.
    """

    loss: float = NAN
    accuracy: float = NAN


def with_model(subject: Subject, model: nn.Module) -> Subject:
    """The same task put to another network, brought to the subject's mode.

    Args:
        subject: The task.
        model: The network, on the subject's device.
    """
    return replace(subject, model=model.train(subject.mode == "train"), memo={})


def with_random_labels(subject: Subject, generator: torch.Generator) -> Subject:
    """The subject's examples with labels drawn uniformly from all classes, under its own loss; ignored targets stay ignored.

    Args:
        subject: A subject with integer targets and a loss of outputs and targets.
        generator: Draws the labels.
    """
    first = next(iter(subject.examples.chunks(8)))
    outputs = subject.outputs(subject.parameters_or_none, first)
    classes = outputs.shape[class_axis(outputs, _targets(first))]

    def drawn(targets: Tensor) -> Tensor:
        labels = torch.randint(classes, targets.shape, generator=generator).to(targets)
        return torch.where(targets == IGNORED, targets, labels)

    batches = [with_targets(batch, drawn(_targets(batch))) for batch in subject.examples.read()]
    return replace(subject, examples=keep(batches, subject.dtype, subject.device), memo={})


def with_high_frequency(subject: Subject, function: nn.Module) -> Subject:
    """The subject's examples with the targets of Lyle et al. 2023, under squared error.

    g(x) = a + sin(1e5 f(x; w0)), with f(.; w0) a freshly initialised network and a the mean prediction of the network to be trained, so that
    nothing is learned by moving the outputs together. The sine is taken of each output, and a is the mean over examples of each output (our
    reading for networks with several outputs).

    Args:
        subject: A subject whose examples can be joined and whose outputs have one shape.
        function: The network f(.; w0).
    """
    drawn = with_model(subject, function)
    # The chunks of one subject serve both, so that outputs and inputs stay side by side.
    batches = list(subject.chunks())
    own = torch.cat([_outputs(subject, batch) for batch in batches]).mean(0)
    sines = [torch.sin(FREQUENCY * _outputs(drawn, batch).double()).to(own) for batch in batches]
    posed = [with_targets(batch, own + sine) for batch, sine in zip(batches, sines, strict=True)]
    loss = Loss("squared error to high-frequency targets", _squared_error, squared_error_terms)
    return replace(subject, loss=loss, examples=keep(posed, subject.dtype, subject.device), memo={})


def with_targets(batch: Batch, targets: Tensor) -> Batch:
    """A batch with other targets: (inputs, targets), or a mapping with its target entry replaced.

    Args:
        batch: A tensor, a tuple or list of one or two entries, or a mapping.
        targets: The new targets.
    """
    inputs, _ = inputs_and_targets(batch)
    return {**inputs, "labels": targets} if isinstance(inputs, Mapping) else (inputs, targets)


def constant_loss(subject: Subject) -> float:
    """The mean loss of the best prediction that is the same for all examples.

    For classes the entropy in nats of their frequencies, over all positions; for values the mean squared distance from their mean, which is
    that of each output over the examples. NaN for a given loss, whose best constant is unknown.

    Args:
        subject: The task.
    """
    if subject.loss.of_outputs is None:
        return NAN
    targets = [_targets(batch) for batch in subject.examples.read()]
    if targets[0].is_floating_point():
        values = torch.cat(targets).double()
        return float((values - values.mean(0)).square().mean())
    labels = torch.cat([each.reshape(-1) for each in targets])
    shares = labels[labels != IGNORED].bincount().double()
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * shares.log()).sum())


def score(subject: Subject, chunk: int) -> Score:
    """How well the subject's network does on all examples, by one forward pass, in the subject's mode.

    Args:
        subject: The task and the network.
        chunk: Examples per pass.
    """
    parameters, judge = subject.parameters_or_none, subject.loss.of_outputs
    loss = terms = right = labels = 0.0
    with torch.no_grad():
        for batch in subject.chunks(chunk):
            if judge is None:
                sums, counts = subject.losses(parameters, batch)
            else:
                outputs, targets = subject.outputs(parameters, batch), _targets(batch)
                sums, counts = judge(outputs, targets)
                if not targets.is_floating_point():
                    counted = targets != IGNORED
                    right += int((outputs.argmax(class_axis(outputs, targets)) == targets)[counted].sum())
                    labels += int(counted.sum())
            loss, terms = loss + float(sums.double().sum()), terms + float(counts.double().sum())
    return Score(loss / terms if terms else NAN, right / labels if labels else NAN)


def updates(examples: Examples, batch: int, steps: int, generator: torch.Generator) -> Iterator[Batch]:
    """The batches of a number of updates: random passes over the examples, each without its ragged rest.

    So every update has the same number of examples, all of them where `batch` is not smaller. Examples that cannot be cut come in the
    batches they were read in.

    Args:
        examples: The examples.
        batch: Examples per update.
        steps: Number of updates.
        generator: Draws the order of each pass.
    """
    kept = examples if examples.resident else keep(list(examples.read()), examples.dtype, examples.device)
    held = [place(each, examples.device, examples.dtype) for each in kept.read()]
    size = min(batch, len(kept))

    def endless() -> Iterator[Batch]:
        while True:
            if not kept.sliceable:
                yield from (held[index] for index in torch.randperm(len(held), generator=generator))
                continue
            order = torch.randperm(len(kept), generator=generator).to(examples.device)
            for rows in order.split(size)[: len(kept) // size]:
                yield map_tensors(lambda tensor, rows=rows: tensor[rows.to(tensor.device)], held[0])

    return islice(endless(), steps)


def trained(
    subject: Subject, batches: Iterable[Batch], optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> Subject | None:
    """The subject with a private copy of its network that was trained, in train mode, by one update on each batch.

    Args:
        subject: The task and the network, which is not changed.
        batches: The batches.
        optimizer: Makes the optimizer of the trainable parameters, whose memory is empty.

    Returns:
        None where the loss of a batch was not finite.
    """
    model = private_copy(subject.model, "train", subject.dtype)
    descent = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    with torch.enable_grad():
        for batch in batches:
            loss = _mean(subject.loss.of_batch(model, batch))
            if not loss.isfinite():
                return None
            descent.zero_grad(set_to_none=True)
            loss.backward()
            descent.step()
    return with_model(subject, model)


def _mean(terms: Terms) -> Tensor:
    sums, counts = terms
    return sums.sum() / counts.sum().clamp(min=1)


def _targets(batch: Batch) -> Tensor:
    return cast(Tensor, inputs_and_targets(batch)[1])


def _outputs(subject: Subject, batch: Batch) -> Tensor:
    with torch.no_grad():
        return subject.outputs(subject.parameters_or_none, batch)


def _squared_error(model: nn.Module, batch: Any) -> Terms:
    return squared_error_terms(outputs_of(model, batch), _targets(batch))
