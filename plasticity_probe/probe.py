"""What a probe is: frozen settings and one pure method.

A probe never sees a step, a file or an axis. To add one, write a final frozen dataclass with a `name`, what it `needs`, the measurement it
`returns`, its `cost` and its `measure`, and register it in the entry point group `plasticity_probe.probes` (docs/adding-a-probe.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields
from enum import Flag, auto
from hashlib import blake2b
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from plasticity_probe.measurement import Measurement
from plasticity_probe.network.examples import Examples
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject

M = TypeVar("M", bound=Measurement)


class Need(Flag):
    """What a probe needs of its subject; checked before any work is done.

    WEIGHTS: the weights are enough. DATA: examples to run the network on. LOSS: a per-example loss of them. GRADIENTS: at least one
    trainable parameter and finite weights.
    """

    WEIGHTS = 0
    DATA = auto()
    LOSS = auto()
    GRADIENTS = auto()


@dataclass(frozen=True)
class Cost:
    """What a measurement costs, in units that do not depend on the machine.

    Args:
        forwards: Examples run forward.
        gradients: Examples run forward and backward.
        products: Examples times curvature-vector products, at most.
        vectors: Vectors of the size of the parameters held at the same time.
        bytes: Memory for anything else that grows with examples or parameters.
        graphs: Memory that is never there at the same time as a pass over a chunk of examples: the graphs of curvature-vector products.
        shared: Parts of `products` that are spent once for all probes that name the same key: (key, products) each.
    """

    forwards: int = 0
    gradients: int = 0
    products: int = 0
    vectors: int = 0
    bytes: int = 0
    graphs: int = 0
    shared: tuple[tuple[Hashable, int], ...] = ()


class Probe(ABC, Generic[M]):
    """A question asked of a network. Concrete probes are final frozen dataclasses; their fields are their settings.

    Attributes:
        name: The name it is registered, stored and asked for under.
        title: What it measures, in a few words.
        needs: What the subject must offer.
        returns: The class of its measurement.
        default: Whether it runs where no probes are named; False for what costs more than all others together.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[Need] = Need.DATA
    returns: ClassVar[type[Measurement]]
    default: ClassVar[bool] = True

    @abstractmethod
    def cost(self, subject: Subject) -> Cost:
        """What `measure` would cost on this subject; nothing is run."""

    @abstractmethod
    def measure(self, subject: Subject, generator: torch.Generator) -> M:
        """Measures the subject.

        Args:
            subject: The network, its loss and its examples. It is not changed.
            generator: The only source of randomness, on the CPU.
        """

    def settings(self) -> dict[str, Any]:
        """The probe's settings as plain data: what distinguishes two rows of the same quantity."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


def measured(
    probe: Probe[M],
    model: nn.Module,
    data: Iterable[Any] | Examples,
    *,
    examples: int | None = None,
    seed: int = 0,
    **options: Any,
) -> M:
    """Measures one probe on a model and data: what every functional twin of a probe does.

    Args:
        probe: The probe with its settings.
        model: Any module; it is copied and never changed.
        data: Any iterable of batches, or examples already read.
        examples: Number of examples to read.
        seed: Seed of the random draws.
        options: Further arguments of `plasticity_probe.network.subject.subject`: loss, mode, dtype, device, memory, ...
    """
    with isolated():
        made = subject(model, data, examples=examples, seed=seed, **options)
        return probe.measure(made, generator_for(seed, probe.name))


def generator_for(seed: int, label: str, step: int = 0) -> torch.Generator:
    """A generator that depends on the run's seed, the probe's label and the step alone.

    So results depend neither on the order of probes nor on which others ran.

    Args:
        seed: Seed of the run.
        label: The probe's label.
        step: The checkpoint's step.
    """
    digest = blake2b(f"{seed}\n{label}\n{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
