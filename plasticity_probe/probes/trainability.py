"""Whether a network can still be trained: a discarded copy of it learns probe tasks within a fixed budget, beside freshly initialised networks.

This is the outcome that the other probes are meant to explain, measured by trying (Lyle et al. 2023).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError, UnknownNameError, UsageError
from plasticity_probe.measurement import Labels, Measurement, Quantity, Status, measurement
from plasticity_probe.network.fresh import fresh_network, reinitialised, settle_batchnorm
from plasticity_probe.network.losses import inputs_and_targets, outputs_of
from plasticity_probe.network.private_copy import private_copy
from plasticity_probe.network.subject import Subject
from plasticity_probe.network.trials import (
    NAN,
    Score,
    constant_loss,
    score,
    trained,
    updates,
    with_high_frequency,
    with_model,
    with_random_labels,
)
from plasticity_probe.probe import Cost, Need, Probe, measured
from plasticity_probe.training.seeding import derived_seed
from plasticity_probe.training.seeding import generator as generator_at

TARGETS = ("high_frequency", "random_labels", "data")
"""Names of the probe tasks."""

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
"""Optimizers by name, with torch's defaults beside the learning rate: no momentum in SGD, no weight decay in either."""

Build = Callable[[], nn.Module]
Table = dict[str, Tensor]
"""What was found on one task: by kind, (loss, accuracy) for each repeat and training."""


@measurement
class Trainability(Measurement):
    """How well copies of a network and fresh networks learn probe tasks within the same budget.

    Losses are means over the examples, before and after training, in the subject's mode ("eval": running statistics, no dropout); the mean over
    repeats, batch orders and fresh networks where nothing else is said. A number is NaN where it could not be measured; `message` says why.

    Args:
        targets: Names of the probe tasks, after their targets.
        learned: Share of the loss of the best constant prediction that training removed, 1 - loss_after / constant_loss: 0 as good as ignoring
            the inputs, 1 perfect. Lyle's P = b - E[loss] with b = constant_loss (our choice of b), over b, so that tasks compare.
        fresh_learned: The same for fresh networks.
        relative_advantage: learned minus fresh_learned, mean over the tasks: positive where the network learns better than fresh ones.
        relative_advantage_sem: Its standard error over repeats.
        advantage: Per task loss_after of fresh networks minus that of the network: positive where the network learns better.
        advantage_sem: Its standard error over repeats, which differ in the draw of the task, the order of the batches and the fresh
            network. It says how sure the difference from the mean fresh network is, not how much fresh networks differ.
        loss_before: Loss of the network before training.
        loss_after: Loss after the budget.
        loss_after_sem: Its standard error over repeats.
        accuracy_before: Accuracy before training; NaN where there are no classes.
        accuracy_after: Accuracy after the budget.
        fresh_loss_before: Loss of fresh networks before training.
        fresh_loss_after: Loss of fresh networks after the budget.
        fresh_accuracy_before: Accuracy of fresh networks before training.
        fresh_accuracy_after: Accuracy of fresh networks after the budget.
        constant_loss: Loss of the best prediction that ignores the inputs.
        repeatability: Intraclass correlation (`intraclass_correlation`) of loss_after, the draws of the task being the groups and the batch
            orders the members: near 1 where the loss depends on which targets were drawn and not on the order of the batches, near 0 where
            on the order alone. NaN for "data", which is not drawn.
        losses: Loss of the network after each training.
        fresh_losses: Loss of each fresh network after training, in the first batch order of its repeat.
        steps: Updates of each training.
        batch: Examples per update.
        learning_rate: Learning rate.
        optimizer: Optimizer.
    """

    targets: Annotated[tuple[str, ...], Labels("target")]
    learned: Annotated[
        Float[Tensor, " target"],
        Quantity("share of the loss of a constant prediction that training removes", summary="mean"),
    ]
    fresh_learned: Annotated[
        Float[Tensor, " target"],
        Quantity("the same share for fresh networks trained alike", summary="mean", role="context"),
    ]
    # A comparison with fresh networks already: how many times that of a fresh network it is means nothing, so it is no finding by its ratio.
    relative_advantage: Annotated[
        float, Quantity("share removed by the network minus by fresh ones, mean over tasks", role="context")
    ]
    relative_advantage_sem: Annotated[float, Quantity("standard error of that difference", role="uncertainty")]
    advantage: Annotated[
        Float[Tensor, " target"], Quantity("loss of fresh networks minus of this one, both trained", units="loss")
    ]
    advantage_sem: Annotated[
        Float[Tensor, " target"], Quantity("standard error of the difference", units="loss", role="uncertainty")
    ]
    loss_before: Annotated[Float[Tensor, " target"], Quantity("loss before training", units="loss")]
    loss_after: Annotated[Float[Tensor, " target"], Quantity("loss after training", units="loss")]
    loss_after_sem: Annotated[
        Float[Tensor, " target"],
        Quantity("standard error of the loss after training", units="loss", role="uncertainty"),
    ]
    accuracy_before: Annotated[Float[Tensor, " target"], Quantity("accuracy before training")]
    accuracy_after: Annotated[Float[Tensor, " target"], Quantity("accuracy after training")]
    fresh_loss_before: Annotated[
        Float[Tensor, " target"], Quantity("loss of fresh networks before training", units="loss")
    ]
    fresh_loss_after: Annotated[
        Float[Tensor, " target"], Quantity("loss of fresh networks after training", units="loss")
    ]
    fresh_accuracy_before: Annotated[Float[Tensor, " target"], Quantity("accuracy of fresh networks before training")]
    fresh_accuracy_after: Annotated[Float[Tensor, " target"], Quantity("accuracy of fresh networks after training")]
    constant_loss: Annotated[
        Float[Tensor, " target"], Quantity("loss of the best constant prediction", units="loss", role="context")
    ]
    repeatability: Annotated[
        Float[Tensor, " target"], Quantity("intraclass correlation of the loss after training over draws of the task")
    ]
    losses: Annotated[
        Float[Tensor, "target repeat order"], Quantity("loss after training, by batch order", units="loss")
    ]
    fresh_losses: Annotated[
        Float[Tensor, "target repeat initialisation"], Quantity("loss of a fresh network after training", units="loss")
    ]
    steps: Annotated[int, Quantity("updates of each training", shown=False, role="context")]
    batch: Annotated[int, Quantity("examples per update", shown=False, role="context")]
    learning_rate: Annotated[float, Quantity("learning rate", shown=False, role="context")]
    optimizer: Annotated[str, Quantity("optimizer", shown=False, role="context")]


@final
@dataclass(frozen=True)
class TrainabilityProbe(Probe[Trainability]):
    """Trains discarded copies of the network, and fresh networks of its architecture, on probe tasks under the same budget.

    Lyle et al. 2023 call P(theta) = b - E[loss after 2000 optimizer steps] the plasticity of a network, over 10 probe functions
    g(x) = a + sin(1e5 f(x; w0)), f(.; w0) a fresh network and a the present mean prediction; that is steps=2000, repeats=10, orders=1. They
    ask how far it is below the P of the network before its training; here it stands beside that of freshly initialised ones. Each training
    starts with an optimizer without memory (as in Hofmann & Mäder 2026).

    Tasks, on the subject's examples:

    - "high_frequency": those targets, for the network's outputs under squared error.
    - "random_labels": labels drawn uniformly from all classes, under the subject's own loss.
    - "data": the subject's own examples and targets. Pass the next task's data to ask how well that is learned.

    In every repeat the targets and the order of the batches are drawn anew, the network is trained in `orders` orders of batches, and `fresh`
    newly initialised networks in the first of them. Layers behave as in training (BatchNorm by the batch, dropout on) during the updates and
    as in the subject's mode in what is reported. Only parameters that are trainable in the subject are trained, in fresh networks too.

    Fresh networks come from the modules' own `reset_parameters`; where the architecture has parameters without one there is no comparison, nor a
    probe function, and the message says so. BatchNorm statistics of fresh networks start as those of the examples.

    It is not among the probes that run unless asked for, because it costs more than all others together.

    Args:
        targets: Names of the tasks, of `TARGETS`.
        steps: Updates of each training. 100 as in Hofmann & Mäder 2026; Lyle et al. 2023 use 2000, which with the settings here takes hours
            for a residual network on a CPU.
        batch: Examples per update (our choice: 25 passes over the examples in 100 steps).
        learning_rate: Learning rate (our choice: Adam's usual 1e-3).
        optimizer: "adam" or "sgd" (our choice: Adam learns within few steps at one learning rate for most architectures).
        repeats: Draws of each task; Lyle et al. 2023 use 10. Our choice: the fewest whose standard error means something.
        orders: Batch orders that the network is trained in on each draw (our choice: the fewest that show what the order alone does).
        fresh: Fresh networks in each repeat; 0 for none.
        examples: Examples of the tasks (our choice: with 128 a fresh network of three layers removes a tenth of the loss of random labels on
            handwritten digits in 100 steps, with 512 only a fiftieth; allow more steps where there are more examples).

    Raises:
        UnknownNameError: No such task or optimizer.
        UsageError: A setting is out of range.
    """

    targets: tuple[str, ...] = TARGETS
    steps: int = 100
    batch: int = 32
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    repeats: int = 4
    orders: int = 2
    fresh: int = 1
    examples: int = 128

    name: ClassVar[str] = "trainability"
    title: ClassVar[str] = "how well a copy still learns, beside fresh networks"
    needs: ClassVar[Need] = Need.DATA | Need.LOSS | Need.GRADIENTS
    returns: ClassVar[type[Measurement]] = Trainability
    default: ClassVar[bool] = False

    def __post_init__(self) -> None:
        asked = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", asked)
        for target in asked:
            if target not in TARGETS:
                raise UnknownNameError("probe task", target, TARGETS)
        if not asked or len({*asked}) < len(asked):
            raise UsageError(f"expected each probe task once and at least one of {', '.join(TARGETS)}, got {asked}.")
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)
        counts = (self.steps, self.batch, self.repeats, self.orders, self.examples)
        if min(counts) < 1 or self.fresh < 0:
            raise UsageError(
                "expected steps, batch, repeats, orders and examples of at least 1 and fresh of at least 0, got "
                f"{', '.join(map(str, counts))} and {self.fresh}."
            )
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"expected a learning rate above 0, got {self.learning_rate}.")

    def cost(self, subject: Subject) -> Cost:
        """The updates of all trainings, a pass before and after each, and for each draw one pass to settle and to ask a fresh network."""
        subject = subject.take(self.examples)
        count, draws = len(subject.examples), len(self.targets) * self.repeats
        size = min(self.batch, count)
        trainings = draws * (self.orders + self.fresh)
        passes = 2 * trainings + draws * (3 + 3 * self.fresh)
        # A copy in training has its gradient and Adam's two moments; three more networks wait: the one copied, the drawn function, and what
        # builds fresh ones.
        wide = max(0, size - subject.chunk) * subject.activation_bytes
        return Cost(forwards=passes * count, gradients=trainings * self.steps * size, vectors=7, bytes=wide)

    def measure(self, subject: Subject, generator: torch.Generator) -> Trainability:
        """Runs all trainings; every draw, of dropout too, comes from the generator."""
        subject = subject.take(self.examples)
        seed = int(torch.randint(2**62, (), generator=generator))
        build, unknown = _fresh_of(subject)
        missing = {name: _obstacle(name, subject, build, unknown) for name in self.targets}
        # Dropout and initialisations draw from the global generators, which are put back.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            tables = [self._task(name, subject, build, seed, measure=not missing[name]) for name in self.targets]
        status, message = self._status(tables, missing, unknown)
        return self._summary(subject, tables, status, message)

    def _task(self, name: str, subject: Subject, build: Build | None, seed: int, *, measure: bool) -> Table:
        """Every training on one task: tables of (loss, accuracy), and the loss of the best constant of each repeat."""
        table = {
            "constant": torch.full((self.repeats,), NAN, dtype=torch.float64),
            "before": torch.full((self.repeats, 1, 2), NAN, dtype=torch.float64),
            "after": torch.full((self.repeats, self.orders, 2), NAN, dtype=torch.float64),
            "fresh_before": torch.full((self.repeats, self.fresh, 2), NAN, dtype=torch.float64),
            "fresh_after": torch.full((self.repeats, self.fresh, 2), NAN, dtype=torch.float64),
        }
        for repeat in range(self.repeats if measure else 0):
            posed = _posed(name, subject, build, seed, repeat)
            table["constant"][repeat] = constant_loss(posed)
            table["before"][repeat, 0] = _row(score(posed, subject.chunk))
            for order in range(self.orders):
                table["after"][repeat, order] = _row(self._trained(name, posed, seed, repeat, order, subject.chunk))
            for index in range(self.fresh if build is not None else 0):
                assert build is not None
                network = _fresh_subject(subject, build, derived_seed(seed, "fresh network", repeat, index))
                posed = _posed(name, network, build, seed, repeat)
                table["fresh_before"][repeat, index] = _row(score(posed, subject.chunk))
                table["fresh_after"][repeat, index] = _row(self._trained(name, posed, seed, repeat, 0, subject.chunk))
        return table

    def _trained(self, name: str, posed: Subject, seed: int, repeat: int, order: int, chunk: int) -> Score:
        batches = updates(posed.examples, self.batch, self.steps, generator_at(seed, f"{name}: batches", repeat, order))
        torch.manual_seed(derived_seed(seed, f"{name}: dropout", repeat, order))
        learned = trained(posed, batches, lambda weights: OPTIMIZERS[self.optimizer](weights, lr=self.learning_rate))
        return Score() if learned is None else score(learned, chunk)

    def _status(self, tables: Sequence[Table], missing: Mapping[str, str], unknown: str) -> tuple[Status, str]:
        said = [f"{name} was not measured: {reason}." for name, reason in missing.items() if reason]
        if len(said) == len(self.targets):
            return Status.NOT_APPLICABLE, " ".join(said)
        if self.fresh and unknown:
            said.append(f"There is no comparison with fresh networks: {unknown}.")
        diverged: list[str] = []
        for name, table in zip(self.targets, tables, strict=True):
            own, fresh = (int((~table[kind][..., 0].isfinite()).sum()) for kind in ("after", "fresh_after"))
            fresh = 0 if unknown else fresh
            if not missing[name] and own + fresh:
                diverged.append(f"{name} ({own} of the network, {fresh} of fresh ones)")
        if not diverged:
            return Status.OK, " ".join(said)
        told = (
            f"the loss was not finite in some trainings, whose numbers are NaN: {', '.join(diverged)}. Likely the learning rate of "
            f"{self.learning_rate:g} is too large for this network, or its outputs overflow before any training; try a smaller learning_rate."
        )
        return Status.NONFINITE, " ".join([told, *said])

    def _summary(self, subject: Subject, tables: Sequence[Table], status: Status, message: str) -> Trainability:
        every = {key: torch.stack([table[key] for table in tables]) for key in tables[0]}
        constant, losses, fresh_losses = every["constant"], every["after"][..., 0], every["fresh_after"][..., 0]
        # One number per task and repeat; repeats are independent given the network.
        own, fresh = losses.mean(2), fresh_losses.mean(2)
        base = torch.where(constant > 0, constant, NAN)
        relative = (fresh - own) / base
        known = relative[relative.isfinite().all(1)].mean(0)
        scores = {f"{kind}loss_{when}": every[f"{kind}{when}"][..., 0].mean((1, 2)) for kind, when in _KINDS}
        scores |= {f"{kind}accuracy_{when}": every[f"{kind}{when}"][..., 1].mean((1, 2)) for kind, when in _KINDS}
        return Trainability(
            conditions=subject.conditions(),
            status=status,
            message=message,
            targets=self.targets,
            learned=(1 - own / base).mean(1),
            fresh_learned=(1 - fresh / base).mean(1),
            relative_advantage=float(known.mean()),
            relative_advantage_sem=float(standard_error(known)),
            advantage=(fresh - own).mean(1),
            advantage_sem=standard_error(fresh - own),
            loss_after_sem=standard_error(own),
            constant_loss=constant.mean(1),
            repeatability=torch.tensor(
                [
                    NAN if name == "data" else intraclass_correlation(values)
                    for name, values in zip(self.targets, losses, strict=True)
                ],
                dtype=torch.float64,
            ),
            losses=losses,
            fresh_losses=fresh_losses,
            steps=self.steps,
            batch=min(self.batch, len(subject.examples)),
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            **scores,
        )


def trainability(
    model: nn.Module,
    loader: Any,
    *,
    targets: Sequence[str] = TARGETS,
    steps: int = 100,
    batch: int = 32,
    learning_rate: float = 1e-3,
    optimizer: str = "adam",
    repeats: int = 4,
    orders: int = 2,
    fresh: int = 1,
    examples: int = 128,
    seed: int = 0,
    **options: Any,
) -> Trainability:
    """How well a discarded copy of a model still learns within a fixed budget, beside fresh networks; what and why, see `TrainabilityProbe`.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches; of the next task, to ask how well "data" is learned.
        targets: Names of the probe tasks: "high_frequency", "random_labels", "data".
        steps: Updates of each training.
        batch: Examples per update.
        learning_rate: Learning rate.
        optimizer: "adam" or "sgd".
        repeats: Draws of each task.
        orders: Batch orders that the network is trained in on each draw.
        fresh: Fresh networks in each repeat; 0 for none.
        examples: Examples of the tasks.
        seed: Seed of every draw.
        options: loss, mode, dtype, device, memory, parameters (see `plasticity_probe.network.subject.subject`).

    Returns:
        Losses and accuracies before and after, of the network and of fresh ones; `advantage` is positive where the network learns better.

    Raises:
        UnknownNameError: No such task or optimizer.
        UsageError: A setting is out of range.
        SubjectError: Model, loss and data do not go together.
    """
    probe = TrainabilityProbe(
        targets=tuple(targets) if not isinstance(targets, str) else (targets,),
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        optimizer=optimizer,
        repeats=repeats,
        orders=orders,
        fresh=fresh,
        examples=examples,
    )
    return measured(probe, model, loader, examples=examples, seed=seed, **options)


def intraclass_correlation(values: Tensor) -> float:
    """The one-way random intraclass correlation ICC(1): the share of the variance of single values that lies between groups.

    ICC = (B - W) / (B + (k - 1) W), with B = k sum_i (m_i - m)^2 / (n - 1) the mean square between n groups of k values and means m_i, and W the
    mean square within them (Shrout & Fleiss 1979, case 1). It estimates s_b^2 / (s_b^2 + s_w^2) and may be negative, down to -1 / (k - 1).

    With one row per checkpoint, trained again and again, it is the repeatability of the probe itself, which Hofmann & Mäder 2026 report as
    0.94 for theirs.

    Args:
        values: One row per group, (n, k).

    Returns:
        NaN for fewer than two groups or values in a group, for values that are not finite, and where all values are equal.
    """
    n, k = values.shape
    if n < 2 or k < 2 or not values.isfinite().all():
        return NAN
    values = values.double()
    between = k * values.mean(1).var()
    within = values.var(1).mean()
    whole = between + (k - 1) * within
    return float((between - within) / whole) if whole > 0 else NAN


def standard_error(values: Tensor) -> Tensor:
    """The standard error of the mean over the last axis; NaN for a single value.

    Args:
        values: Independent values along the last axis.
    """
    count = values.shape[-1]
    return values.std(-1) / count**0.5 if count > 1 else torch.full_like(values.mean(-1), NAN)


_KINDS = (("", "before"), ("", "after"), ("fresh_", "before"), ("fresh_", "after"))


def _row(found: Score) -> Tensor:
    return torch.tensor([found.loss, found.accuracy], dtype=torch.float64)


def _posed(name: str, subject: Subject, build: Build | None, seed: int, repeat: int) -> Subject:
    """A task put to the subject's network: its draw depends on the repeat alone and is the same for fresh networks."""
    if name == "random_labels":
        return with_random_labels(subject, generator_at(seed, "random labels", repeat))
    if name == "high_frequency":
        assert build is not None
        function = _fresh_subject(subject, build, derived_seed(seed, "probe function", repeat))
        return with_high_frequency(subject, function.model)
    return subject


def _fresh_subject(subject: Subject, build: Build, seed: int) -> Subject:
    made = with_model(subject, fresh_network(build, seed))
    settle_batchnorm(made)
    return made


def _fresh_of(subject: Subject) -> tuple[Build | None, str]:
    """What builds fresh networks of the subject's architecture, or why nothing does."""
    try:
        # A copy that was never run: tensors that a pass leaves behind in modules cannot be copied again.
        build = reinitialised(private_copy(subject.model, subject.mode, subject.dtype))
    except SubjectError as error:
        return None, str(error).split(". ")[0]
    # A weight that a hook computes from others (torch.nn.utils.weight_norm) is drawn anew in vain: those others stay as they were.
    # Two draws, because one may by chance have the seed that the network itself began with.
    drawn = [dict(fresh_network(build, number).named_parameters()) for number in range(2)]
    named = [(name, p) for name, p in subject.model.named_parameters() if p.numel()]
    kept = [name for name, p in named if all(_kept(p, each[name]) for each in drawn)]
    return (None, f"{', '.join(kept[:3])} cannot be initialised anew by reset_parameters()") if kept else (build, "")


def _kept(before: Tensor, after: Tensor) -> bool:
    """Whether a weight is what it was although it is none of the constants that biases and gains start as."""
    return torch.equal(before, after) and bool((before != before.reshape(-1)[0]).any())


def _obstacle(name: str, subject: Subject, build: Build | None, unknown: str) -> str:
    """Why a task cannot be put to the subject; empty where it can."""
    if name == "data":
        return ""
    if name == "random_labels":
        if subject.loss.of_outputs is None:
            return "the loss was given as a function, which does not tell what the classes are"
        targets = inputs_and_targets(next(iter(subject.examples.chunks(8))))[1]
        values = targets is None or targets.is_floating_point()
        return "this is a regression, whose targets are values and no labels" if values else ""
    if build is None:
        return f"its targets come from a fresh network, and {unknown}"
    if not subject.examples.sliceable:
        return "it needs examples of one shape, whose outputs can be averaged"
    try:
        with torch.no_grad():
            outputs_of(private_copy(subject.model, "eval"), next(iter(subject.examples.chunks(8))))
    except SubjectError as error:
        return str(error).split(". ")[0]
    return ""
