"""What an analysis would cost, before anything is measured: passes, products, memory and, from one timed pass, minutes."""

import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from plasticity_probe.errors import BudgetError, PlanError
from plasticity_probe.measurement import Measurement
from plasticity_probe.network.curvature import hessian
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe
from plasticity_probe.study import Probes, Study

TIMED_EXAMPLES = 16
"""Examples of the timed pass (our choice: a second or less for common networks, enough to fill two cores)."""


@dataclass(frozen=True)
class PlanLine:
    """The cost of one probe on one network.

    Args:
        label: The probe's label.
        cost: Its cost in examples, products and vectors, without what an earlier probe has spent for both.
        seconds: Predicted wall time.
        bytes: Predicted memory beyond weights and examples.
    """

    label: str
    cost: Cost
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What an analysis would do and cost.

    Args:
        description: Where the examples come from.
        networks: Number of checkpoints.
        fresh: Number of fresh networks beside.
        parameters: Number of trainable parameters.
        lines: The cost of each probe on one network.
        memory: Bytes that a measurement may use.
    """

    description: str
    networks: int
    fresh: int
    parameters: int
    lines: tuple[PlanLine, ...]
    memory: int

    @property
    def seconds(self) -> float:
        """Predicted wall time of the whole analysis, if every search takes as long as it may."""
        return (self.networks + self.fresh) * sum(line.seconds for line in self.lines)

    @property
    def bytes(self) -> int:
        """Predicted peak memory beyond weights and examples: that of the probe that takes most, as they run one after another."""
        return max((line.bytes for line in self.lines), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        lines = [
            {"label": line.label, **asdict(line.cost), "seconds": line.seconds, "predicted_bytes": line.bytes}
            for line in self.lines
        ]
        return {
            "data": self.description,
            "networks": self.networks,
            "fresh": self.fresh,
            "parameters": self.parameters,
            "memory": self.memory,
            "seconds": self.seconds,
            "predicted_bytes": self.bytes,
            "probes": lines,
        }


def plan(study: Study) -> Plan:
    """Predicts the cost of a study from its first network; no quantity is measured and nothing is stored.

    Args:
        study: The study.
    """
    network = next(study.networks())()
    with isolated():
        made = study.subject_of(network)
        check(study.probes, made)
        rates = _rates(made)
        lines = _lines(study.probes, made, rates)
    parameters = made.conditions().parameters
    return Plan(study.material.description, study.size, study.fresh, parameters, lines, made.memory)


def check(probes: Probes, subject: Subject) -> None:
    """Finds what would make probes fail on a subject, all problems at once, before hours of work.

    Args:
        probes: Probes by label.
        subject: The first subject of the study.

    Raises:
        PlanError: A probe needs a trainable parameter and all are frozen.
        BudgetError: A probe needs more memory than is allowed.
    """
    frozen = not any(p.requires_grad for p in subject.model.parameters())
    needing = [label for label, probe in probes.items() if Need.GRADIENTS in probe.needs]
    if frozen and needing:
        raise PlanError(
            [
                f"all parameters of the network are frozen, but {', '.join(needing)} need gradients. Set requires_grad=True, or choose other "
                "probes (--probes)."
            ]
        )
    too_large = [text for label, probe in probes.items() if (text := _excess(label, probe, subject))]
    if too_large:
        raise BudgetError(
            "; ".join(too_large)
            + ". Allow more with --memory, ask the probe for fewer examples, or leave it out (--probes)."
        )


def _excess(label: str, probe: Probe[Measurement], subject: Subject) -> str:
    try:
        needed = memory_of(probe, subject)
    except BudgetError as error:
        return f"{label}: {error}"
    if needed <= subject.memory:
        return ""
    return f"{label} needs about {_gigabytes(needed)}, but {_gigabytes(subject.memory)} are allowed"


def memory_of(probe: Probe[Measurement], subject: Subject) -> int:
    """Bytes that a probe needs beyond weights and examples: its vectors, its own arrays, and a pass over a chunk of examples.

    The graphs of curvature-vector products and a pass are never there at the same time.

    Args:
        probe: The probe.
        subject: What it would measure.
    """
    cost = probe.cost(subject)
    vectors = cost.vectors * subject.size * subject.dtype.itemsize if cost.vectors else 0
    a_pass = 0 if probe.needs is Need.WEIGHTS else subject.chunk * subject.activation_bytes
    return vectors + cost.bytes + max(cost.graphs, a_pass)


def _lines(probes: Probes, subject: Subject, rates: "_Rates") -> tuple[PlanLine, ...]:
    spent: set[Hashable] = set()
    lines: list[PlanLine] = []
    for label, probe in probes.items():
        cost = probe.cost(subject)
        already = sum(products for key, products in cost.shared if key in spent)
        spent |= {key for key, _ in cost.shared}
        own = replace(cost, products=cost.products - already, shared=())
        seconds = own.forwards * rates.forward + own.gradients * rates.gradient + own.products * rates.product
        lines.append(PlanLine(label, own, seconds, memory_of(probe, subject)))
    return tuple(lines)


@dataclass(frozen=True)
class _Rates:
    """Seconds for one example: run forward, forward and backward, and one curvature-vector product."""

    forward: float
    gradient: float
    product: float


def _rates(subject: Subject) -> _Rates:
    few = subject.take(TIMED_EXAMPLES)
    parameters = few.parameters_or_none
    batch = next(iter(few.chunks(len(few.examples))))
    with torch.no_grad():
        forward = _seconds(lambda: few.losses(parameters, batch))
    if not parameters:
        return _Rates(forward / len(few.examples), 0.0, 0.0)
    leaves = list(parameters.values())
    gradient = _seconds(lambda: torch.autograd.grad(few.losses(parameters, batch)[0].sum(), leaves, allow_unused=True))
    operator, direction = hessian(few), torch.ones(few.size, dtype=few.dtype, device=few.device)
    product = _seconds(lambda: operator @ direction)
    return _Rates(*(seconds / len(few.examples) for seconds in (forward, gradient, product)))


def _seconds(work: Callable[[], Any]) -> float:
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
