"""The ranks of what the layers of a network represent, exact, from the singular values of their activations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.linalg.ranks import (
    effective_rank,
    energy_rank,
    epsilon_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
    threshold_rank,
)
from plasticity_probe.measurement import Labels, Measurement, Quantity, Status, measurement
from plasticity_probe.network.capture import Activation, observe
from plasticity_probe.network.layers import Layer, requested
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe, measured

BLOCK = 4096
"""Rows factored at a time, at least (our choice: large enough that the factor so far costs little, small enough to fit a cache)."""

NAN = float("nan")


class LayerRank(NamedTuple):
    """The ranks of one layer, in plain numbers; every field as in `FeatureRank`."""

    layer: str
    rows: int
    features: int
    ceiling: float
    threshold_rank: float
    energy_rank: float
    effective_rank: float
    stable_rank: float
    participation_ratio: float
    numerical_rank: float
    epsilon_rank: float
    singular_values: tuple[float, ...]


@measurement
class FeatureRank(Measurement):
    """The ranks of the feature matrix Phi of each layer: activations, uncentred, with units as columns.

    A convolution's channels are columns and every position is a row; a transformer's features are columns and every token, padding included,
    is a row. No rank exceeds `ceiling` = min(rows, features), so compare ranks at the same number of examples only. The rank of a layer of zeros
    is 0 under every definition. Definitions in `plasticity_probe.linalg.ranks`.

    Args:
        layers: Names of the layers, in the order in which they run; the penultimate one last.
        penultimate_layer: Which layer the last linear layer reads: a hidden layer, or a layer named after the linear one with ":input" where
            something (pooling, flattening positions into features, a norm) stands between. Empty where it was not measured.
        rows: Rows of each matrix: examples times positions or tokens.
        features: Columns of each matrix.
        ceiling: min(rows, features).
        threshold_rank: Least k whose k largest singular values hold a share 1 - delta of their sum: srank (Kumar et al. 2021).
        energy_rank: The same on squared singular values (Yang et al. 2019).
        effective_rank: exp of the entropy of the singular values over their sum (Roy & Vetterli 2007).
        stable_rank: |Phi|_F^2 / |Phi|_2^2 (Rudelson & Vershynin 2007).
        participation_ratio: (sum s^2)^2 / sum s^4, on squared singular values, which are the eigenvalues of the uncentred second moment of the
            features (Gao et al. 2017).
        numerical_rank: Singular values above rounding: features * eps(dtype of the network) * largest. Rows are left out of that factor (our
            choice): a hundred thousand positions would drown real directions in float32.
        epsilon_rank: Singular values of Phi / sqrt(rows) above epsilon: the feature rank of Lyle et al. 2022. It depends on the scale of the
            features, and so sees them shrink to zero, which no other of these ranks does.
        singular_values: Of each layer, descending, NaN behind its last.
    """

    layers: Annotated[tuple[str, ...], Labels("layer")]
    penultimate_layer: Annotated[str, Quantity("layer that the last linear layer reads")]
    rows: Annotated[Float[Tensor, " layer"], Quantity("examples times positions or tokens", role="context")]
    features: Annotated[Float[Tensor, " layer"], Quantity("features of a layer", role="context")]
    ceiling: Annotated[
        Float[Tensor, " layer"], Quantity("largest rank rows and features allow", summary="last", role="context")
    ]
    threshold_rank: Annotated[
        Float[Tensor, " layer"], Quantity("threshold rank (srank) of the features", summary="last")
    ]
    energy_rank: Annotated[Float[Tensor, " layer"], Quantity("threshold rank on squared singular values")]
    effective_rank: Annotated[
        Float[Tensor, " layer"], Quantity("effective rank: exp of the entropy of the singular values", summary="last")
    ]
    stable_rank: Annotated[Float[Tensor, " layer"], Quantity("stable rank of the features", summary="last")]
    participation_ratio: Annotated[
        Float[Tensor, " layer"], Quantity("participation ratio of the squared singular values")
    ]
    numerical_rank: Annotated[
        Float[Tensor, " layer"], Quantity("numerical rank: singular values above rounding", summary="last")
    ]
    epsilon_rank: Annotated[Float[Tensor, " layer"], Quantity("singular values of features / sqrt(rows) above epsilon")]
    singular_values: Annotated[Float[Tensor, "layer index"], Quantity("singular values of the features, descending")]

    def layer(self, name: str) -> LayerRank:
        """The ranks of one layer.

        Raises:
            UnknownNameError: No such layer was measured.
        """
        if name not in self.layers:
            raise UnknownNameError("layer", name, self.layers)
        at = self.layers.index(name)
        values = self.singular_values[at]
        ranks = {field: float(getattr(self, field)[at]) for field in LayerRank._fields[3:-1]}
        return LayerRank(
            layer=name,
            rows=int(self.rows[at]),
            features=int(self.features[at]),
            **ranks,
            singular_values=tuple(values[~values.isnan()].tolist()),
        )

    @property
    def penultimate(self) -> LayerRank:
        """The ranks of what the last linear layer reads (without one, of the last hidden layer).

        Raises:
            UsageError: It was not among the layers measured.
        """
        if not self.penultimate_layer:
            raise UsageError(
                f"the penultimate layer was not measured, only {', '.join(self.layers) or 'no layer'}; leave layers=None to measure it."
            )
        return self.layer(self.penultimate_layer)


@final
@dataclass(frozen=True)
class FeatureRankProbe(Probe[FeatureRank]):
    """Measures the ranks of every layer's features in one forward pass over the examples.

    The features are never held together: the triangular factor R of what came so far is factored again with each block of new rows
    (R <- qr([R; rows]), float64), and the singular values of R are those of all rows. Nothing is squared, so small singular values keep their
    digits. Cost beside the forward pass: 2 * rows * features^2 operations and features^2 numbers for each layer; with more than 4096 features
    that is minutes and over 100 MB a layer, so name the layers you need.

    Args:
        delta: The share of the sum that threshold rank and energy rank leave out; 0.01 as in Kumar et al. 2021.
        epsilon: Cut-off of the epsilon rank; 0.01, after Lyle et al. 2022 (their value is not known for sure).
        layers: Names of layers, paths of modules, or patterns such as "layer1.*"; None for all hidden layers and the penultimate one.
        examples: Number of examples measured. 1024 is our choice (as in Joudaki et al. 2025): above the width of common penultimate layers, so
            that the ceiling is the width.

    Raises:
        UsageError: A setting is out of range.
    """

    delta: float = 0.01
    epsilon: float = 0.01
    layers: tuple[str, ...] | None = None
    examples: int = 1024

    name: ClassVar[str] = "feature_rank"
    title: ClassVar[str] = "ranks of the features of each layer"
    needs: ClassVar[Need] = Need.DATA
    returns: ClassVar[type[Measurement]] = FeatureRank

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 1:
            raise UsageError(f"expected 0 <= delta < 1, got {self.delta}.")
        if not 0 <= self.epsilon < float("inf"):
            raise UsageError(f"expected an epsilon of at least 0, got {self.epsilon}.")
        if self.examples < 1:
            raise UsageError(f"expected at least 1 example, got {self.examples}.")
        object.__setattr__(self, "layers", requested(self.layers))

    def cost(self, subject: Subject) -> Cost:
        """One forward pass, and a float64 triangular factor for the outputs of each linear and convolution layer but the last.

        A factor has no more rows than there are examples and positions; how many is not known here, so linear layers are taken to have `BLOCK`.
        """
        outputs = [
            (m.out_features, max(self.examples, BLOCK))
            if isinstance(m, nn.Linear)
            else (m.out_channels, m.out_channels)
            for m in subject.model.modules()
            if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
        ]
        held = sum(8 * width * min(width, rows) for width, rows in outputs[:-1]) if self.layers is None else 0
        return Cost(forwards=min(self.examples, len(subject.examples)), bytes=held)

    def measure(self, subject: Subject, generator: torch.Generator) -> FeatureRank:  # noqa: ARG002 -- nothing random here
        """Measures the ranks.

        Raises:
            UnknownNameError: A requested layer does not exist.
            SubjectError: The layers that run, or their sizes, change from pass to pass.
        """
        subject = subject.take(self.examples)
        structure, gathered = observe(
            subject,
            lambda structure: structure.select(structure.features, self.layers),
            lambda _: TriangularFactor(),
        )
        factors = [(layer, factor) for layer, factor in gathered if factor.rows]
        last = structure.penultimate
        return self._ranks(subject, factors, last.name if last and last in dict(factors) else "")

    def _ranks(
        self, subject: Subject, factors: Sequence[tuple[Layer, "TriangularFactor"]], penultimate: str
    ) -> FeatureRank:
        broken = [layer.name for layer, factor in factors if not factor.finite]
        status, message = _status(broken, len(factors))
        ranks = [layer_rank(layer.name, factor, self.delta, self.epsilon, subject.dtype) for layer, factor in factors]
        length = max((len(rank.singular_values) for rank in ranks), default=0)
        padded = [[*rank.singular_values, *[NAN] * (length - len(rank.singular_values))] for rank in ranks]
        columns = {
            name: torch.tensor([getattr(rank, name) for rank in ranks], dtype=torch.float64)
            for name in LayerRank._fields[1:-1]
        }
        return FeatureRank(
            conditions=subject.conditions(),
            status=status,
            message=message,
            layers=tuple(rank.layer for rank in ranks),
            penultimate_layer=penultimate,
            singular_values=torch.tensor(padded, dtype=torch.float64).reshape(len(ranks), length),
            **columns,
        )


def feature_rank(
    model: nn.Module,
    loader: Any,
    *,
    layers: str | Sequence[str] | None = None,
    delta: float = 0.01,
    epsilon: float = 0.01,
    examples: int = 1024,
    seed: int = 0,
    **options: Any,
) -> FeatureRank:
    """The ranks of the features of each layer of a model; definitions in `FeatureRank`, method and defaults in `FeatureRankProbe`.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches.
        layers: Names of layers, paths of modules (their outputs), or patterns such as "layer1.*"; all by default.
        delta: The share of the sum that threshold rank and energy rank leave out.
        epsilon: Cut-off of the epsilon rank.
        examples: Read no more than this many examples.
        seed: Recorded with the result; nothing random happens.
        options: loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`).

    Returns:
        The ranks by layer; `.penultimate` and `.layer(name)` give those of one layer as plain numbers.

    Raises:
        UsageError: A setting is out of range.
        UnknownNameError: A requested layer does not exist.
        SubjectError: Model, loss and data do not go together, or the layers change from pass to pass.
    """
    probe = FeatureRankProbe(delta=delta, epsilon=epsilon, layers=requested(layers), examples=examples)
    return measured(probe, model, loader, examples=examples, seed=seed, **options)


class TriangularFactor:
    """The triangular factor of a matrix whose rows come in chunks."""

    def __init__(self) -> None:
        self.rows = self.features = 0
        self.finite = True
        self.factor: Tensor | None = None

    def add(self, activation: Activation) -> None:
        """Takes in the rows of one chunk."""
        rows = activation.matrix
        self.rows += len(rows)
        self.features = rows.shape[1]
        self.finite = self.finite and bool(rows.isfinite().all())
        if self.finite and rows.numel():
            for block in rows.split(max(BLOCK, 4 * self.features)):
                self._stack(block.double())

    def singular_values(self) -> Tensor:
        """All min(rows, features) singular values, descending, float64; empty where a value was not finite."""
        if self.factor is None or not self.finite:
            return torch.zeros(0, dtype=torch.float64)
        return torch.linalg.svdvals(self.factor).cpu()

    def _stack(self, block: Tensor) -> None:
        stacked = block if self.factor is None else torch.cat([self.factor, block])
        # Fewer rows than columns are no larger than their factor, which so is only taken when it pays.
        self.factor = stacked if len(stacked) <= stacked.shape[1] else torch.linalg.qr(stacked, mode="r").R


def layer_rank(layer: str, factor: TriangularFactor, delta: float, epsilon: float, dtype: torch.dtype) -> LayerRank:
    """The ranks of a layer of which the triangular factor is known.

    Args:
        layer: Its name.
        factor: The factor of its features.
        delta: The share that threshold rank and energy rank leave out.
        epsilon: Cut-off of the epsilon rank.
        dtype: Precision of the features.

    Returns:
        Its ranks; NaN where a feature was not finite.
    """
    values = factor.singular_values()
    ranks = [
        threshold_rank(values, delta),
        energy_rank(values, delta),
        effective_rank(values),
        stable_rank(values),
        participation_ratio(values.square() / (values.max().square() if values.any() else 1)),
        numerical_rank(values, dtype=dtype, shape=(factor.features,)),
        epsilon_rank(values / max(1, factor.rows) ** 0.5, epsilon),
    ]
    ceiling = float(min(factor.rows, factor.features))
    known = ranks if factor.finite else [NAN] * len(ranks)
    return LayerRank(layer, factor.rows, factor.features, ceiling, *known, singular_values=tuple(values.tolist()))


def _status(broken: Sequence[str], layers: int) -> tuple[Status, str]:
    if broken:
        return Status.NONFINITE, (
            f"features are not finite in {len(broken)} of {layers} layers, first in {broken[0]!r}: weights or inputs hold NaN or Inf, or the "
            "activations overflow."
        )
    if not layers:
        return Status.NOT_APPLICABLE, (
            "the network has no features to measure: neither a hidden layer nor a linear layer was seen. Name modules with layers= to measure "
            "their outputs."
        )
    return Status.OK, ""
