"""Hidden units that no longer take part: dead, dormant, saturated, linearized. Four quantities, each counted exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.measurement import Labels, Measurement, Quantity, Status, measurement
from plasticity_probe.network.capture import Activation, observe
from plasticity_probe.network.layers import KINDS, Layer, requested
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe, measured

TAUS = (0.0, 0.01, 0.025, 0.1)
"""Thresholds of the dormancy sweep: 0 (dead), two of Sokar et al. 2023 (0.025 and 0.1) and one between (our choice)."""

NAN = float("nan")


class LayerActivity(NamedTuple):
    """The units of one layer, in plain numbers; every field as in `UnitActivity`."""

    layer: str
    units: int
    rows: int
    dead_fraction: float
    dormant_fraction: float
    saturated_fraction: float
    linearized_fraction: float
    sign_entropy: float
    mean_activity: float


@measurement
class UnitActivity(Measurement):
    """How many hidden units of each layer no longer take part in what the network computes or learns.

    Hidden units only: the output layer has none. A convolution's units are its channels and every position is a row; a transformer's units
    are features and every token, padding included, is a row. Fractions are of units; totals weigh every unit alike. A NaN fraction means that
    the layer's activation function has no such state (or that its activations are not finite, see `status`).

    Args:
        layers: Names of the layers, in the order in which they run.
        activations: The different activation functions of these layers.
        units: Units of each layer.
        rows: Rows each unit was seen on: examples times positions or tokens.
        dead_fraction: Units whose output is exactly zero on every row (Dohare et al. 2024).
        dormant_fraction: Units with score E|h_i| / mean_k E|h_k| <= tau, the means over rows and over the layer's units (Sokar et al. 2023,
            definition 3.1); in a layer of zeros all are dormant.
        saturated_fraction: Units of tanh, sigmoid, softsign, hardtanh, hardsigmoid and (at the upper end) relu6 whose slope, relative to the
            function's largest, is at most `slope` on at least a share `share` of the rows. NaN for functions without such ends.
        linearized_fraction: Units that are never clipped and not dead: on every row on the same linear piece of their function (pre-activation
            above zero for ReLU, of one sign for leaky ReLU), so that they compute a linear map (Lyle et al. 2024, "zombie" units). NaN for
            functions without a linear piece.
        sign_entropy: Mean over units of the entropy, in bits, of P(pre-activation > 0) over rows (Lewandowski et al. 2024): 1 for an even
            split, 0 for a unit that is dead or linearized. NaN where no pre-activation is visible.
        mean_activity: Mean over units and rows of |h|.
        taus: Thresholds of the sweep.
        dormant_sweep: The dormant fraction of each layer at these thresholds.
        total_units: Units of all layers.
        total_dead_fraction: Dead units over all units.
        total_dormant_fraction: Dormant units over all units.
        total_saturated_fraction: Saturated units over the units that can saturate.
        total_linearized_fraction: Linearized units over the units that can be linearized.
    """

    layers: Annotated[tuple[str, ...], Labels("layer")]
    activations: Annotated[str, Quantity("activation functions of the layers")]
    units: Annotated[Float[Tensor, " layer"], Quantity("units of a layer", role="context")]
    rows: Annotated[Float[Tensor, " layer"], Quantity("examples times positions or tokens", role="context")]
    dead_fraction: Annotated[Float[Tensor, " layer"], Quantity("share of units that are always zero", summary="max")]
    dormant_fraction: Annotated[Float[Tensor, " layer"], Quantity("share of units with score <= tau")]
    saturated_fraction: Annotated[Float[Tensor, " layer"], Quantity("share of units at a flat end of their function")]
    linearized_fraction: Annotated[Float[Tensor, " layer"], Quantity("share of units that are never clipped")]
    sign_entropy: Annotated[
        Float[Tensor, " layer"], Quantity("entropy of the sign of a unit's pre-activation", units="bit", summary="mean")
    ]
    mean_activity: Annotated[Float[Tensor, " layer"], Quantity("mean absolute activation")]
    taus: Annotated[tuple[str, ...], Labels("tau")]
    dormant_sweep: Annotated[Float[Tensor, "layer tau"], Quantity("share of units with score <= tau, for several tau")]
    total_units: Annotated[float, Quantity("hidden units", role="context")]
    total_dead_fraction: Annotated[float, Quantity("dead units: zero on every example")]
    total_dormant_fraction: Annotated[float, Quantity("dormant units: score <= tau")]
    total_saturated_fraction: Annotated[float, Quantity("saturated units: at a flat end of their function")]
    total_linearized_fraction: Annotated[float, Quantity("linearized units: never clipped")]

    def layer(self, name: str) -> LayerActivity:
        """The numbers of one layer.

        Raises:
            UnknownNameError: No such layer was measured.
        """
        if name not in self.layers:
            raise UnknownNameError("layer", name, self.layers)
        at = self.layers.index(name)
        shares = [float(getattr(self, field)[at]) for field in LayerActivity._fields[3:]]
        return LayerActivity(name, int(self.units[at]), int(self.rows[at]), *shares)


@final
@dataclass(frozen=True)
class DeadUnits(Probe[UnitActivity]):
    """Counts dead, dormant, saturated and linearized hidden units in one forward pass over the examples.

    Args:
        tau: Dormancy threshold; 0.025 as in the ReDo of Sokar et al. 2023, whose other values are in the sweep.
        slope: Slope, relative to the activation function's largest, up to which an element counts as flat. 0.01 is our choice: a gradient is
            passed back at a hundredth of its size or less; for tanh that is |h| >= 0.995.
        share: Share of the rows on which a saturated unit is flat. 0.99 is our choice, after the 99 % of samples of Joudaki et al. 2025: one
            row in a hundred may still carry a gradient.
        layers: Names of layers, paths of modules, or patterns such as "layer1.*"; None for all hidden layers.
        examples: Number of examples measured. 1024 is our choice: a unit that is active on one example in 200 is missed with a chance of 0.6 %.

    Raises:
        UsageError: A setting is out of range.
    """

    tau: float = 0.025
    slope: float = 0.01
    share: float = 0.99
    layers: tuple[str, ...] | None = None
    examples: int = 1024

    name: ClassVar[str] = "dead_units"
    title: ClassVar[str] = "dead, dormant, saturated and linearized units"
    needs: ClassVar[Need] = Need.DATA
    returns: ClassVar[type[Measurement]] = UnitActivity

    def __post_init__(self) -> None:
        if not 0 <= self.tau < float("inf"):
            raise UsageError(f"expected a tau of at least 0, got {self.tau}.")
        if not 0 <= self.slope < 1:
            raise UsageError(f"expected 0 <= slope < 1, relative to the largest slope, got {self.slope}.")
        if not 0 < self.share <= 1:
            raise UsageError(f"expected a share of the rows, 0 < share <= 1, got {self.share}.")
        if self.examples < 1:
            raise UsageError(f"expected at least 1 example, got {self.examples}.")
        object.__setattr__(self, "layers", requested(self.layers))

    def cost(self, subject: Subject) -> Cost:
        """One forward pass; the counts are a few numbers a unit."""
        return Cost(forwards=min(self.examples, len(subject.examples)))

    def measure(self, subject: Subject, generator: torch.Generator) -> UnitActivity:  # noqa: ARG002 -- nothing random here
        """Counts the units.

        Raises:
            UnknownNameError: A requested layer does not exist.
            SubjectError: The layers that run, or their sizes, change from pass to pass.
        """
        subject = subject.take(self.examples)
        _, gathered = observe(
            subject,
            lambda structure: structure.select(structure.hidden, self.layers),
            lambda layer: _Counts(layer, self.slope),
        )
        return self._activity(subject, [counts for _, counts in gathered if counts.rows])

    def _activity(self, subject: Subject, counts: Sequence["_Counts"]) -> UnitActivity:
        found = [_shares(each, self.tau, self.share) for each in counts]
        columns = torch.tensor([each.fractions for each in found], dtype=torch.float64).reshape(-1, 6).T
        units = torch.tensor([each.units for each in counts], dtype=torch.float64)
        totals = [_total(column, units) for column in columns[:4]]
        broken = [each.layer.name for each in counts if not each.finite]
        status, message = _status(broken, len(counts))
        return UnitActivity(
            conditions=subject.conditions(),
            status=status,
            message=message,
            layers=tuple(each.layer.name for each in counts),
            activations=", ".join(dict.fromkeys(each.layer.kind for each in counts)) or "none",
            units=units,
            rows=torch.tensor([each.rows for each in counts], dtype=torch.float64),
            dead_fraction=columns[0],
            dormant_fraction=columns[1],
            saturated_fraction=columns[2],
            linearized_fraction=columns[3],
            sign_entropy=columns[4],
            mean_activity=columns[5],
            taus=tuple(f"{tau:g}" for tau in TAUS),
            dormant_sweep=torch.tensor([each.sweep for each in found], dtype=torch.float64).reshape(-1, len(TAUS)),
            total_units=float(units.sum()),
            total_dead_fraction=NAN if broken else totals[0],
            total_dormant_fraction=NAN if broken else totals[1],
            total_saturated_fraction=NAN if broken else totals[2],
            total_linearized_fraction=NAN if broken else totals[3],
        )


def dead_units(
    model: nn.Module,
    loader: Any,
    *,
    layers: str | Sequence[str] | None = None,
    tau: float = 0.025,
    slope: float = 0.01,
    share: float = 0.99,
    examples: int = 1024,
    seed: int = 0,
    **options: Any,
) -> UnitActivity:
    """Counts the dead, dormant, saturated and linearized hidden units of a model; definitions in `UnitActivity`, defaults in `DeadUnits`.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches.
        layers: Names of layers, paths of modules, or patterns such as "layer1.*"; all hidden layers by default.
        tau: Threshold of the dormancy score.
        slope: Relative slope up to which an element counts as flat.
        share: Share of the rows on which a saturated unit is flat.
        examples: Read no more than this many examples.
        seed: Recorded with the result; nothing random happens.
        options: loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`).

    Raises:
        UsageError: A setting is out of range.
        UnknownNameError: A requested layer does not exist.
        SubjectError: Model, loss and data do not go together, or the layers change from pass to pass.
    """
    probe = DeadUnits(tau=tau, slope=slope, share=share, layers=requested(layers), examples=examples)
    return measured(probe, model, loader, examples=examples, seed=seed, **options)


class _Counts:
    """Counts over the rows of one layer, unit by unit, as integers; only the sum of |h| is a float64."""

    def __init__(self, layer: Layer, slope: float) -> None:
        self.layer, self.slope = layer, slope
        self.kind = KINDS.get(layer.kind)
        self.rows = self.units = 0
        self.finite = True
        self.sums: dict[str, Tensor] = {}

    def add(self, activation: Activation) -> None:
        """Takes in one chunk."""
        x, y = activation.input, activation.output
        self.units = y.shape[activation.axis]
        self.rows += y.numel() // max(1, self.units)
        self.finite = self.finite and bool(y.isfinite().all()) and (x is None or bool(x.isfinite().all()))
        axes = [axis for axis in range(y.ndim) if axis != activation.axis]

        def count(name: str, marks: Tensor) -> None:
            kind = torch.int64 if marks.dtype is torch.bool else torch.float64
            self.sums[name] = self.sums.get(name, 0) + marks.sum(axes, dtype=kind).cpu()

        count("active", y != 0)
        count("size", y.abs())
        if x is None:
            return
        count("positive", x > 0)
        for at, piece in enumerate(self.kind.linear if self.kind else ()):
            count(f"piece {at}", piece(x, y))
        if self.kind and self.kind.slope:
            count("flat", self.kind.slope(x, y) <= self.slope)


class _Shares(NamedTuple):
    """Of one layer: dead, dormant, saturated, linearized fraction, sign entropy, mean activity; and the dormancy sweep."""

    fractions: tuple[float, ...]
    sweep: tuple[float, ...]


def _shares(counts: _Counts, tau: float, share: float) -> _Shares:
    if not counts.finite or not counts.units:
        return _Shares((NAN,) * 6, (NAN,) * len(TAUS))
    sums, rows = counts.sums, counts.rows
    dead = sums["active"] == 0
    sizes = sums["size"] / rows
    pieces = [each == rows for name, each in sums.items() if name.startswith("piece")]
    linearized = _mean(torch.stack(pieces).any(0) & ~dead) if pieces else NAN
    # A share such as 0.07 times 100 rows is 7.000000000000001; dividing the count rounds to the share itself.
    saturated = _mean(sums["flat"] / rows >= share - 1e-12) if "flat" in sums else NAN
    entropy = float(_binary_entropy(sums["positive"].double() / rows).mean()) if "positive" in sums else NAN
    dormant = [_mean(sizes <= each * sizes.mean()) for each in (tau, *TAUS)]
    return _Shares((_mean(dead), dormant[0], saturated, linearized, entropy, float(sizes.mean())), tuple(dormant[1:]))


def _binary_entropy(p: Tensor) -> Tensor:
    """-p log2 p - (1 - p) log2 (1 - p), with 0 log 0 = 0."""
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / torch.log(torch.tensor(2.0).double())


def _mean(marks: Tensor) -> float:
    return float(marks.double().mean())


def _total(fractions: Tensor, units: Tensor) -> float:
    known = ~fractions.isnan()
    return float((fractions * units)[known].sum() / units[known].sum()) if known.any() else NAN


def _status(broken: Sequence[str], layers: int) -> tuple[Status, str]:
    if broken:
        return Status.NONFINITE, (
            f"activations are not finite in {len(broken)} of {layers} layers, first in {broken[0]!r}: weights or inputs hold NaN or Inf, or the "
            "activations overflow."
        )
    if not layers:
        return Status.NOT_APPLICABLE, (
            "the network has no hidden units: no activation function and no affine layer runs before its last affine layer. Name modules with "
            "layers= to measure their outputs."
        )
    return Status.OK, ""
