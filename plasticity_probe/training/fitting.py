"""Training on one task: minibatch descent from wherever networks stand to the end of the task, and how that went."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from plasticity_probe.training.batches import Resident, batches, updates_of
from plasticity_probe.training.models import Blueprint
from plasticity_probe.training.networks import ManyNetworks, Networks, OneNetwork, example_losses, hits, reproducible
from plasticity_probe.training.outcomes import DIVERGED, OK, Outcome
from plasticity_probe.training.remedies.remedy import Memory, Moment
from plasticity_probe.training.seeding import derived_seed
from plasticity_probe.training.settings import Setting

EVALUATED_TOGETHER = 1024
"""Examples of each network in a pass that only evaluates (our choice: bounds the memory; the result does not depend on it)."""


@dataclass(frozen=True)
class Place:
    """Where a group of seeds stands: before the first update on a task, or after an epoch of it.

    Args:
        task: The task.
        phase: Whether the run itself or its control is being trained on it.
        epoch: Epochs of the task that are over.
        updates: Updates on the task.
        step: Updates of the run itself since it began.
    """

    task: int = 0
    phase: Literal["run", "control"] = "run"
    epoch: int = 0
    updates: int = 0
    step: int = 0


@dataclass(eq=False)
class Learner:
    """Networks under training and what the remedies remember of them."""

    networks: Networks
    memories: list[Memory]


@dataclass(eq=False)
class Tally:
    """What has been seen of the task under way, (S,) float64 each."""

    sums: dict[str, Tensor]
    reached: bool = False

    @classmethod
    def empty(cls, count: int, device: torch.device) -> "Tally":
        """Nothing seen yet."""
        names = ("seen", "right", "loss", "first_seen", "first_loss", "tests", "test_right", "test_loss")
        sums = {name: torch.zeros(count, dtype=torch.float64, device=device) for name in names}
        return cls({**sums, "threshold": torch.full((count,), math.nan, dtype=torch.float64, device=device)})


def new_learner(setting: Setting, drawn: Blueprint, seeds: Sequence[int], device: torch.device) -> Learner:
    """Newly initialised networks and remedies.

    Args:
        setting: How they are trained.
        drawn: Their architecture.
        seeds: Seed of each network.
        device: Where they are trained.
    """
    training = setting.training
    if len(seeds) == 1:
        networks: Networks = OneNetwork(
            drawn.build,
            seeds[0],
            training.make_optimizer,
            device,
            bf16=training.bf16,
            channels_last=training.channels_last,
        )
    else:
        networks = ManyNetworks(drawn.build, seeds, training.make_optimizer, device)
    return Learner(networks, [remedy.start(networks) for remedy in setting.remedies])


def fit(
    learner: Learner,
    held: Resident,
    setting: Setting,
    seeds: Sequence[int],
    place: Place,
    tally: Tally,
    after_update: Callable[[Place], None] | None = None,
    after_epoch: Callable[[Place], None] | None = None,
) -> Place:
    """Trains networks on one task from wherever they stand to its end.

    Args:
        learner: The networks, changed in place.
        held: The examples of the task.
        setting: How to train.
        seeds: Seeds of the order of the examples, one a network.
        place: Where training stands.
        tally: What has been seen of the task; changed in place.
        after_update: Called after every update.
        after_epoch: Called after every epoch.

    Returns:
        Where training stands then.
    """
    training, networks = setting.training, learner.networks
    epochs = training.epochs_of(place.task)
    while place.epoch < epochs and not tally.reached:
        place, losses, right = _epoch(learner, held, setting, seeds, place, after_update)
        _count(tally, losses, right, place, training.threshold)
        lost = len(seeds) == 1 and not math.isfinite(float(tally.sums["loss"]))
        tally.reached = lost or (
            training.until is not None and bool((tally.sums["epoch_right"] >= training.until).all())
        )
        if held.test_inputs is not None and (tally.reached or place.epoch > epochs - training.test_last):
            _test(networks, held, tally)
        if after_epoch is not None:
            after_epoch(place)
    return place


def _epoch(
    learner: Learner,
    held: Resident,
    setting: Setting,
    seeds: Sequence[int],
    place: Place,
    after_update: Callable[[Place], None] | None,
) -> tuple[Place, Tensor, Tensor]:
    """One pass over the examples: where training stands then, and loss and hit of each example before the update on it, (S, N) each."""
    training, networks = setting.training, learner.networks
    acting = [*zip(setting.remedies, learner.memories, strict=True)]
    wanted = any(remedy.features for remedy in setting.remedies)
    epochs, updates = training.epochs_of(place.task), updates_of(held.size, training.batch)
    losses: list[Tensor] = []
    right: list[Tensor] = []

    def moment() -> Moment:
        # A control counts its own updates: its step is that of a run that begins with this task.
        step = place.step if place.phase == "run" else place.updates
        return Moment(networks.seeds, place.task, place.epoch, step, held.tasks, training.batch)

    with reproducible(derived_seed(seeds[0], f"{place.phase} epoch", place.task, place.epoch)):
        epoch = batches(held, seeds, place.epoch, epochs, training.batch, training.augmentation)
        for number, (inputs, targets) in enumerate(epoch, start=1):
            learned = networks.learn(inputs, targets, features=wanted)
            for remedy, memory in acting:
                remedy.add_gradient(networks, memory)
            if training.clip is not None:
                clip(networks, training.clip)
            for group in networks.optimizer.param_groups:
                group["lr"] = training.step_size(place.epoch, number / updates)
            networks.optimizer.step()
            place = replace(place, updates=place.updates + 1, step=place.step + (place.phase == "run"))
            for remedy, memory in acting:
                remedy.after_step(networks, memory, moment(), learned.features)
            losses.append(learned.losses)
            right.append(hits(learned.outputs, targets))
            if after_update is not None:
                after_update(place)
        place = replace(place, epoch=place.epoch + 1)
        for remedy, memory in acting:
            remedy.after_epoch(networks, memory, moment())
    return place, torch.cat(losses, 1), torch.cat(right, 1)


@torch.no_grad()
def clip(networks: Networks, largest: float) -> None:
    """Shortens each network's gradient to a largest norm.

    Args:
        networks: The networks, whose gradients are changed in place.
        largest: The norm that no gradient shall exceed.
    """
    gradients = networks.gradients
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients.values()])
    scale = (largest / squares.sum(0).sqrt().clamp(min=torch.finfo(squares.dtype).tiny)).clamp(max=1)
    for gradient in gradients.values():
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.ndim - 1)))


def finite(networks: Networks) -> Tensor:
    """Whether all weights of each network are finite, (S,) bool.

    Args:
        networks: The networks.
    """
    return torch.stack([weight.flatten(1).isfinite().all(1) for weight in networks.weights.values()]).all(0)


@torch.no_grad()
def evaluate(networks: Networks, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and share of examples predicted rightly of each network, in eval mode, (S,) float64 each.

    Args:
        networks: The networks.
        inputs: (S, N, ...).
        targets: (S, N, ...).
    """
    loss = right = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    for some, answers in zip(inputs.split(EVALUATED_TOGETHER, 1), targets.split(EVALUATED_TOGETHER, 1), strict=True):
        outputs = networks.outputs(some)
        each = [example_losses(output, answer) for output, answer in zip(outputs, answers, strict=True)]
        loss = loss + torch.stack(each).double().sum(1)
        right = right + hits(outputs, answers).double().sum(1)
    return loss / targets.shape[1], right / targets.shape[1]


def _count(tally: Tally, losses: Tensor, right: Tensor, place: Place, threshold: float) -> None:
    sums, count = tally.sums, losses.shape[1]
    loss, hit = losses.double().sum(1), right.double().sum(1)
    sums["seen"] = sums["seen"] + count
    sums["loss"], sums["right"] = sums["loss"] + loss, sums["right"] + hit
    if place.epoch == 1:
        sums["first_loss"], sums["first_seen"] = loss, sums["seen"].clone()
    sums["epoch_right"] = hit / count
    learned = torch.where(hit.isnan(), loss / count <= threshold, hit / count >= threshold)
    now = learned & sums["threshold"].isnan()
    sums["threshold"] = torch.where(now, torch.full_like(loss, place.updates), sums["threshold"])


def _test(networks: Networks, held: Resident, tally: Tally) -> None:
    assert held.test_inputs is not None
    assert held.test_targets is not None
    loss, right = evaluate(networks, held.test_inputs, held.test_targets)
    for name, value in (("test_loss", loss), ("test_right", right), ("tests", torch.ones_like(loss))):
        tally.sums[name] = tally.sums[name] + value


def outcomes_of(held: Resident, learner: Learner, seeds: Sequence[int], place: Place, tally: Tally) -> list[Outcome]:
    """How a task went for each network.

    Args:
        held: The examples of the task.
        learner: The networks at its end.
        seeds: Seed of each network's run.
        place: Where training stands.
        tally: What was seen of the task.
    """
    loss, right = evaluate(learner.networks, held.inputs, held.targets)
    sound = finite(learner.networks) & loss.isfinite()
    sums = tally.sums
    numbers = {
        "loss": loss,
        "accuracy": right,
        "online_loss": sums["loss"] / sums["seen"],
        "online_accuracy": sums["right"] / sums["seen"],
        "first_epoch_loss": sums["first_loss"] / sums["first_seen"],
        "updates_to_threshold": sums["threshold"],
        "test_loss": sums["test_loss"] / sums["tests"],
        "test_accuracy": sums["test_right"] / sums["tests"],
    }
    rows = {name: torch.where(sound, value, math.nan).tolist() for name, value in numbers.items()}
    return [
        Outcome(
            seed=seed,
            task=place.task,
            name=held.tasks[index].name,
            network=place.phase,
            status=OK if sound[index] else DIVERGED,
            step=place.step,
            updates=place.updates,
            epochs=place.epoch,
            **{name: values[index] for name, values in rows.items()},
        )
        for index, seed in enumerate(seeds)
    ]
