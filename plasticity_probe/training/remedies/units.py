"""Remedies that replace single hidden units: ReDo those that are dormant, continual backprop those of least utility.

Both give a unit new incoming weights and take away its outgoing ones, so that it starts without a say in the outputs. Where a LayerNorm or
GroupNorm lies behind the incoming weights, the other units of the layer shift a little too, because it normalises over all of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.training.models import HiddenLayer
from plasticity_probe.training.networks import Networks, Weights
from plasticity_probe.training.remedies.remedy import Memory, Moment, Remedy

FRESH_STATISTICS = {"running_mean": 0.0, "running_var": 1.0}
"""Running statistics of a unit under a fresh BatchNorm, as torch initialises them."""


@final
@dataclass(frozen=True)
class ReDo(Remedy):
    """Recycles dormant units at regular intervals.

    A unit's score is s_i = E|h_i| / mean_k E|h_k|, where the expectation is over examples and, in a convolution or a transformer, over
    positions, and the mean is over the units of its layer; it is dormant where s_i <= tau (Sokar et al. 2023, definition 3.1). In a layer
    of zeros all units are dormant. A dormant unit gets incoming weights, bias and normalisation parameters of a freshly initialised network,
    outgoing weights of zero, and an optimizer without memory of any of these entries (Sokar et al. 2023, algorithm 1 and section 5). All
    layers are scored before any unit is recycled, and a weight between two recycled units is zero, as in the authors' code, whose fresh
    biases are zeros because those of its networks are. As there, Adam goes on counting its updates, since it counts them by tensor.

    The scored examples are drawn from the task under way; the update's own batch is not used, so that updates in between cost nothing.
    Scores are taken in eval mode (our choice: no dropout, and no example's score depends on the others through BatchNorm).

    Args:
        tau: Dormancy threshold. Sokar et al. 2023 use 0.1, and 0.025 where the replay ratio is DQN's default.
        every: Updates between checks; 1000 as in Sokar et al. 2023 (200 000 where their code is given none).
        examples: Examples that are scored, or all where the task has fewer; 64 as in Sokar et al. 2023 (256 where their code is given none).

    Raises:
        UsageError: A setting is out of range.
    """

    name: ClassVar[str] = "redo"
    title: ClassVar[str] = "dormant units recycled at regular intervals"
    source: ClassVar[str] = "Sokar et al. 2023, section 5"

    tau: float = 0.1
    every: int = 1000
    examples: int = 64

    def __post_init__(self) -> None:
        if not (0 <= self.tau < 1 and self.every >= 1 and self.examples >= 1):
            raise UsageError(
                f"redo needs tau from 0 to below 1 (at 1, units of average activity would be dormant), and every and examples of at least 1; "
                f"got tau={self.tau}, every={self.every}, examples={self.examples}"
            )

    def start(self, networks: Networks) -> Memory:
        """As `Remedy.start`; nothing is remembered."""
        check_hidden(networks, self.name)
        return {}

    @torch.no_grad()
    def after_step(
        self,
        networks: Networks,
        memory: Memory,  # noqa: ARG002 -- nothing is remembered
        moment: Moment,
        features: Mapping[str, Tensor],  # noqa: ARG002 -- those of the update's batch
    ) -> None:
        """As `Remedy.after_step`; recycles dormant units at every `every`-th update."""
        if moment.step % self.every:
            return
        seen = networks.features(self._scored(networks, moment))
        dormant = {layer.name: self.dormant(networks, layer, seen[layer.name]) for layer in networks.hidden}
        if not any(bool(units.any()) for units in dormant.values()):
            return
        fresh = networks.fresh(self.name, moment.step)
        for layer in networks.hidden:
            renew_incoming(networks, layer, dormant[layer.name], fresh)
        for layer in networks.hidden:
            clear_outgoing(networks, layer, dormant[layer.name])

    def dormant(self, networks: Networks, layer: HiddenLayer, features: Tensor) -> Tensor:
        """Which units of a layer are dormant, (S, units).

        Args:
            networks: The networks.
            layer: The layer.
            features: What it handed on, (S, N, ...).
        """
        activity = per_unit(layer, magnitudes(networks, layer, features))
        # Without a division, a layer of zeros needs no small number in a denominator.
        return activity <= self.tau * activity.mean(1, keepdim=True)

    def _scored(self, networks: Networks, moment: Moment) -> Tensor:
        """Examples of each network's own task, (S, N, ...), drawn without replacement."""
        count = min(self.examples, *(len(task.inputs) for task in moment.tasks))
        drawn = [
            task.inputs[torch.randperm(len(task.inputs), generator=generator)[:count].to(task.inputs.device)]
            for task, generator in zip(moment.tasks, moment.generators(self.name), strict=True)
        ]
        return torch.stack(drawn).to(networks.device)


@final
@dataclass(frozen=True)
class ContinualBackprop(Remedy):
    """Replaces, after every update, a small fraction of the mature units: those of least utility.

    The utility of a unit is a running average of its contribution, u_i <- decay u_i + (1 - decay) E|h_i| sum_k |w_ik|, over the units k that
    read it (Dohare et al. 2024, methods); E is over the batch and, in a convolution, over positions, and a unit that is read through several
    inputs (CReLU, flattened positions) sums over them. Features are those of the update's forward pass, weights those after the update.
    After each update every unit grows a step older; units older than `maturity` are mature. A layer's count of due replacements grows by
    replacement_rate times its mature units, and as many whole units as it holds are replaced, those of least u_i / (1 - decay^age_i) first.
    That correction for short averages, as Adam's, is in the authors' code, not in the paper's formula.

    A replaced unit gets incoming weights of a freshly initialised network, a bias of zero, fresh normalisation parameters and running
    statistics, outgoing weights of zero, utility and age zero, and an optimizer without memory of these entries. Two differences from
    variants in circulation: utility is divided neither by the size of incoming weights nor computed on centred features ("contribution" in
    the authors' code, their default and the paper's formula), and the replaced unit's mean feature is not moved into the readers' biases:
    the paper's algorithm has no such step, and in the authors' code it adds zero because the mean is cleared first. Unlike the authors'
    Adam, torch's counts updates by tensor, so its correction for short averages is not restarted for single entries.

    Args:
        replacement_rate: Fraction of the mature units replaced per update; 1e-4 as in the authors' code (3e-4 for the paper's Continual
            ImageNet, 1e-5 for its incremental CIFAR-100).
        maturity: Updates that a unit is protected for; 100 as in the authors' code (1000 in the paper's incremental CIFAR-100).
        decay: Decay of the running average; 0.99 as in Dohare et al. 2024.

    Raises:
        UsageError: A setting is out of range.
    """

    name: ClassVar[str] = "continual-backprop"
    title: ClassVar[str] = "mature units of least utility replaced after every update"
    source: ClassVar[str] = "Dohare et al. 2024, methods"
    features: ClassVar[bool] = True

    replacement_rate: float = 1e-4
    maturity: int = 100
    decay: float = 0.99

    def __post_init__(self) -> None:
        if not (0 < self.replacement_rate <= 1 and self.maturity >= 0 and 0 <= self.decay < 1):
            raise UsageError(
                f"continual-backprop needs a replacement_rate above 0 and up to 1, a maturity of at least 0 and a decay from 0 to below 1; got "
                f"replacement_rate={self.replacement_rate}, maturity={self.maturity}, decay={self.decay}"
            )

    def start(self, networks: Networks) -> Memory:
        """As `Remedy.start`; remembers utilities and ages, (S, units), and counts of due replacements, (S,), of each layer."""
        check_hidden(networks, self.name)
        memory: Memory = {}
        for layer in networks.hidden:
            weight = networks.weights[f"{layer.incoming}.weight"]
            shape = weight.shape[0], layer.units
            memory[f"{layer.name}/utility"] = weight.new_zeros(shape)
            memory[f"{layer.name}/age"] = weight.new_zeros(shape, dtype=torch.int64)
            # A rate of 1e-4 is added tens of thousands of times before a narrow layer is due; float32 would lose part of it.
            memory[f"{layer.name}/due"] = weight.new_zeros(shape[0], dtype=torch.float64)
        return memory

    @torch.no_grad()
    def after_step(self, networks: Networks, memory: Memory, moment: Moment, features: Mapping[str, Tensor]) -> None:
        """As `Remedy.after_step`; updates utilities and replaces the units that are due."""
        for layer in networks.hidden:
            utility, age, due = (memory[f"{layer.name}/{kind}"] for kind in ("utility", "age", "due"))
            utility.lerp_(contribution(networks, layer, features[layer.name]).to(utility), 1 - self.decay)
            age += 1
            due += self.replacement_rate * (age > self.maturity).sum(1, dtype=due.dtype)
        # One question to the device for all layers, because each of them would make an accelerator wait.
        if not bool(torch.stack([memory[f"{layer.name}/due"] for layer in networks.hidden]).ge(1).any()):
            return
        fresh = self._drawn(networks, moment.step)
        for layer in networks.hidden:
            chosen = self._chosen(layer, memory)
            renew_incoming(networks, layer, chosen, fresh)
            clear_outgoing(networks, layer, chosen)

    def _chosen(self, layer: HiddenLayer, memory: Memory) -> Tensor:
        """The units of a layer to replace now, (S, units); what is remembered of them starts anew."""
        utility, age, due = (memory[f"{layer.name}/{kind}"] for kind in ("utility", "age", "due"))
        mature, whole = age > self.maturity, due.floor()
        corrected = (utility / (1 - self.decay ** age.double())).masked_fill(~mature, math.inf)
        places = corrected.argsort(dim=1, stable=True).argsort(dim=1)
        chosen = mature & (places < whole[:, None])
        due -= whole
        utility.masked_fill_(chosen, 0)
        age.masked_fill_(chosen, 0)
        return chosen

    def _drawn(self, networks: Networks, step: int) -> Weights:
        """Fresh networks to take units from.

        A replaced unit cannot be replaced again within the next `maturity` updates, so one draw serves maturity + 1 of them and none of its
        units is used twice. That keeps wide networks, of which some unit is due at almost every update, from being drawn as often.
        """
        number = step // (self.maturity + 1)
        held = _DRAWN.get(networks)
        if held is None or held[0] != number:
            fresh = networks.fresh(self.name, number)
            for layer in networks.hidden:
                if f"{layer.incoming}.bias" in fresh:
                    fresh[f"{layer.incoming}.bias"].zero_()
            held = _DRAWN[networks] = number, fresh
        return held[1]


# The latest draw of continual backprop for each networks: it can be drawn again at any time, so it is no part of what a run remembers.
_DRAWN: WeakKeyDictionary[Networks, tuple[int, Weights]] = WeakKeyDictionary()


def check_hidden(networks: Networks, wanted: str) -> None:
    """Refuses networks whose hidden units are not known.

    Args:
        networks: The networks.
        wanted: The remedy that needs them, for the message.

    Raises:
        UsageError: There are none, or the units of a layer are read through different numbers of inputs.
    """
    if not networks.hidden:
        raise UsageError(
            f"{wanted} replaces hidden units, but none are known of {type(networks.module).__name__}; use a built-in network with hidden "
            "layers, or another remedy"
        )
    for layer in networks.hidden:
        if len(set(layer.unit_of.bincount(minlength=layer.units).tolist())) != 1:
            raise UsageError(
                f"{wanted} needs every unit of {layer.incoming} to be read by {layer.name} through as many inputs as the others"
            )


def magnitudes(networks: Networks, layer: HiddenLayer, features: Tensor) -> Tensor:
    """E|h| of each input of the module that reads a layer, (S, inputs): means over examples and, where there are any, positions.

    Args:
        networks: The networks.
        layer: The layer.
        features: What it handed on: (S, N, inputs), (S, N, T, inputs), or (S, N, inputs, ...) to a convolution.
    """
    convolution = networks.weights[f"{layer.name}.weight"].ndim > 3
    axis = 2 if convolution else features.ndim - 1
    others = [other for other in range(1, features.ndim) if other != axis]
    return features.abs().mean(others, dtype=torch.promote_types(features.dtype, torch.float32))


def contribution(networks: Networks, layer: HiddenLayer, features: Tensor) -> Tensor:
    """What each unit adds to those that read it, (S, units): E|h_j| sum_k |w_kj|, summed over its inputs j (Dohare et al. 2024, methods).

    Args:
        networks: The networks.
        layer: The layer.
        features: What it handed on, as in `magnitudes`.
    """
    outgoing = networks.weights[f"{layer.name}.weight"]
    # Over the readers first: summing that axis together with a kernel's is ten times slower on a CPU.
    sizes = outgoing.abs().sum(1).reshape(outgoing.shape[0], outgoing.shape[2], -1).sum(2)
    return per_unit(layer, magnitudes(networks, layer, features) * sizes)


def per_unit(layer: HiddenLayer, values: Tensor) -> Tensor:
    """Sums of values over the inputs that belong to each unit, (S, units).

    Args:
        layer: The layer, whose units all have as many inputs.
        values: A value for each input of the module that reads it, (S, inputs).
    """
    # Sorted and summed rather than scattered: scattered sums are added in an order that changes from run to run on an accelerator.
    sorted_inputs = layer.unit_of.argsort(stable=True).to(values.device)
    return values[:, sorted_inputs].unflatten(1, (layer.units, -1)).sum(2)


def renew_incoming(networks: Networks, layer: HiddenLayer, chosen: Tensor, fresh: Weights) -> None:
    """Gives units the incoming weights, biases and normalisation of fresh networks, and clears what the optimizer remembers of them.

    Args:
        networks: The networks; changed in place.
        layer: The layer.
        chosen: Which units, (S, units).
        fresh: Weights of freshly initialised networks, by name, (S, ...).
    """
    each = chosen.nonzero(as_tuple=True)
    paths = [layer.incoming] if layer.norm is None else [layer.incoming, layer.norm]
    for name in [f"{path}.{part}" for path in paths for part in ("weight", "bias")]:
        if name in networks.weights:
            networks.weights[name][each] = fresh[name][each]
            for remembered in networks.moments(name):
                remembered[each] = 0
    for statistic, value in FRESH_STATISTICS.items():
        if f"{layer.norm}.{statistic}" in networks.buffers:
            networks.buffers[f"{layer.norm}.{statistic}"][each] = value


def clear_outgoing(networks: Networks, layer: HiddenLayer, chosen: Tensor) -> None:
    """Sets the outgoing weights of units to zero, and what the optimizer remembers of them.

    Args:
        networks: The networks; changed in place.
        layer: The layer.
        chosen: Which units, (S, units).
    """
    name = f"{layer.name}.weight"
    network, column = chosen[:, layer.unit_of.to(chosen.device)].nonzero(as_tuple=True)
    for held in [networks.weights[name], *networks.moments(name)]:
        held[network, :, column] = 0
