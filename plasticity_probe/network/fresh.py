"""A freshly initialised network of the same architecture: the yardstick beside every number."""

import copy
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.examples import Batch
from plasticity_probe.network.subject import Subject


def fresh_network(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network built anew under its own seed; the global random state is left as it was.

    Args:
        build: Makes the network with its own initialisation.
        seed: Seed of that initialisation.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def reinitialised(model: nn.Module) -> Callable[[], nn.Module]:
    """A way to build a fresh network from a model at hand: a copy whose modules all reset their parameters.

    Args:
        model: Any module.

    Raises:
        SubjectError: Some parameter belongs to a module without `reset_parameters`, so its initialisation is unknown.
    """
    reset = [module for module in model.modules() if callable(getattr(module, "reset_parameters", None))]
    covered = {id(parameter) for module in reset for parameter in module.parameters(recurse=False)}
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in covered]
    if left:
        raise SubjectError(
            f"cannot initialise {', '.join(left[:3])} anew: their modules have no reset_parameters(). Pass a function that builds the "
            "network, or fresh=0 to do without the yardstick."
        )

    def build() -> nn.Module:
        copied = copy.deepcopy(model)
        for module in copied.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]
        return copied

    return build


def settle_batchnorm(subject: Subject) -> None:
    """Gives a fresh network's BatchNorm layers the running statistics of the subject's examples.

    A fresh layer's statistics are mean 0 and variance 1, which no trained network has; measured so, the comparison would be between two
    different functions. The statistics are the average over equal batches, in train mode for BatchNorm alone.

    Args:
        subject: A subject with a fresh model; only its running statistics change.
    """
    norms = [m for m in subject.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    batches = _equal_chunks(subject)
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # type: ignore[assignment]  # torch's own way to ask for a cumulative average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            subject.loss.of_batch(subject.model, batch)
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum = momentum  # type: ignore[assignment]
        norm.train(training)


def _equal_chunks(subject: Subject) -> Iterator[Batch]:
    whole = len(subject.examples) // subject.chunk
    chunks = subject.examples.chunks(subject.chunk)
    return islice(chunks, whole) if whole and subject.examples.sliceable else chunks
