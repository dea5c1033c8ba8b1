"""The networks that are trained: one module, or many seeds of one architecture as a single vectorised program.

Both look alike from outside: every weight, gradient and optimizer moment has a first axis over networks, of length 1 for a single module,
and its memory is the memory that is trained, so that a remedy writes the same lines for both.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from plasticity_probe.network.capture import recorded_inputs
from plasticity_probe.network.fresh import fresh_network
from plasticity_probe.training.models import HiddenLayer, hidden_layers
from plasticity_probe.training.seeding import derived_seed
from plasticity_probe.training.side_by_side import side_by_side

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Learned:
    """What one backward pass saw, each before the update on it.

    Args:
        losses: (S, B) loss of each example.
        outputs: (S, B, ...) outputs of each network.
        features: What hidden layers handed on, (S, B, ...) each, where asked for.
    """

    losses: Tensor
    outputs: Tensor
    features: Mapping[str, Tensor]


class Networks(ABC):
    """Networks of one architecture, each with its own seed, and the optimizer that trains them.

    Attributes:
        seeds: The seed of each network.
        build: Draws a new network of the architecture.
        weights: Parameters that are trained, by name, (S, ...): detached, and the very memory that is trained.
        gradients: Their gradients after `learn`, by name, (S, ...), the very memory the optimizer reads.
        buffers: Buffers such as running statistics, by name, (S, ...).
        hidden: The layers of hidden units.
        optimizer: Updates `weights` from `gradients`, element by element.
    """

    seeds: tuple[int, ...]
    build: Callable[[], nn.Module]
    module: nn.Module
    weights: Weights
    buffers: Weights
    hidden: tuple[HiddenLayer, ...]
    optimizer: torch.optim.Optimizer
    make_optimizer: MakeOptimizer

    @property
    @abstractmethod
    def gradients(self) -> Weights:
        """Gradients of the weights by name, (S, ...); they can be changed in place."""

    @property
    @abstractmethod
    def trained(self) -> list[Tensor]:
        """The tensors that the optimizer updates, in the order of `weights`."""

    @abstractmethod
    def learn(self, inputs: Tensor, targets: Tensor, *, features: bool = False) -> Learned:
        """Runs a batch forward and backward in train mode and leaves the gradients of each network's mean loss.

        Args:
            inputs: (S, B, ...) a batch for each network.
            targets: (S, B, ...).
            features: Whether to record what hidden layers hand on.
        """

    @abstractmethod
    def outputs(self, inputs: Tensor) -> Tensor:
        """Outputs in eval mode and without gradients, (S, N, ...), of inputs (S, N, ...)."""

    @abstractmethod
    def features(self, inputs: Tensor) -> Weights:
        """What hidden layers hand on in eval mode and without gradients, by `HiddenLayer.name`, (S, N, ...) each, of inputs (S, N, ...)."""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(iter(self.weights.values())).device

    def moments(self, name: str) -> list[Tensor]:
        """What the optimizer remembers of a weight, element by element (momentum, second moments), (S, ...) each, in place.

        Args:
            name: The weight.
        """
        held = self.optimizer.state.get(dict(zip(self.weights, self.trained, strict=True))[name], {})
        shape = self.weights[name].shape
        return [
            value.view(shape)
            for value in held.values()
            if isinstance(value, Tensor) and value.numel() == self.weights[name].numel() and value.ndim
        ]

    def restart_optimizer(self) -> None:
        """A new optimizer without memory."""
        self.optimizer = self.make_optimizer(self.trained)

    def fresh(self, label: str, number: int) -> Weights:
        """Weights of newly initialised networks of this architecture, (S, ...), drawn from each network's own seed.

        Args:
            label: What they are drawn for.
            number: Where that stands, such as a step: other numbers give other draws.
        """
        drawn = [fresh_network(self.build, derived_seed(seed, label, number)) for seed in self.seeds]
        each = [dict(network.named_parameters()) for network in drawn]
        return {
            name: torch.stack([found[name].detach() for found in each]).to(weight)
            for name, weight in self.weights.items()
        }

    def state_of(self, index: int) -> Weights:
        """The state dict of one network, in memory of its own.

        Args:
            index: Which of them.
        """
        held = {**self.weights, **self.buffers}
        named = self.module.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]}
        copies = {name: tensor[index].detach().clone() for name, tensor in held.items()}
        # A tensor that two names share is one copy under both, so that it stays tied in the file.
        return {name: copies[names[id(tensor)]] for name, tensor in named.items()}

    def memory(self) -> Weights:
        """Everything that training changes, as named tensors: weights, buffers and the optimizer's memory."""
        state = {f"weights/{name}": tensor for name, tensor in self.weights.items()}
        state |= {f"buffers/{name}": tensor for name, tensor in self.buffers.items()}
        for index, held in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{index}/{key}": value for key, value in held.items() if isinstance(value, Tensor)}
        return state

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Takes up where another process left off.

        Args:
            memory: What `memory` gave there.
        """
        with torch.no_grad():
            for kind, tensors in (("weights", self.weights), ("buffers", self.buffers)):
                for name, tensor in tensors.items():
                    tensor.copy_(memory[f"{kind}/{name}"])
        held: dict[int, dict[str, Tensor]] = {}
        for key, value in memory.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/", 2)
                held.setdefault(int(index), {})[name] = value
        blank = self.make_optimizer(self.trained).state_dict()
        self.restart_optimizer()
        self.optimizer.load_state_dict({**blank, "state": held})


class OneNetwork(Networks):
    """A single module with its own parameters, trained as any module is.

    Args:
        build: Draws the network.
        seed: Seed of its initialisation.
        make_optimizer: Makes the optimizer of its parameters.
        device: Where to train.
        bf16: Whether to compute the forward pass in bfloat16 where that is safe (autocast).
        channels_last: Whether images and convolutions are laid out with channels last.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        seed: int,
        make_optimizer: MakeOptimizer,
        device: torch.device,
        *,
        bf16: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.seeds, self.build, self.make_optimizer = (seed,), build, make_optimizer
        layout = torch.channels_last if channels_last else torch.preserve_format
        self.module = fresh_network(build, initial_seed(seed)).to(device)
        if channels_last:
            self.module = self.module.to(memory_format=layout)  # type: ignore[call-overload]
        self.layout, self.bf16 = layout, bf16
        self.weights = {name: parameter.detach()[None] for name, parameter in self.module.named_parameters()}
        self.buffers = {name: buffer[None] for name, buffer in self.module.named_buffers()}
        self.hidden = hidden_layers(self.module)
        self.restart_optimizer()

    @property
    def trained(self) -> list[Tensor]:
        """The module's parameters."""
        return [*self.module.parameters()]

    @property
    def gradients(self) -> Weights:
        """Gradients of the module's parameters, (1, ...)."""
        return {name: p.grad[None] for name, p in self.module.named_parameters() if p.grad is not None}

    def learn(self, inputs: Tensor, targets: Tensor, *, features: bool = False) -> Learned:
        """As `Networks.learn`."""
        self.module.train()
        names = [layer.name for layer in self.hidden] if features else []
        with recorded_inputs(self.module, names) as recorded:
            outputs = self._forward(inputs[0])
            losses = example_losses(outputs, targets[0])
        self.optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        return Learned(
            losses.detach()[None], outputs.detach()[None], {k: v.detach()[None] for k, v in recorded.items()}
        )

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """As `Networks.outputs`."""
        self.module.eval()
        return self._forward(inputs[0])[None]

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Weights:
        """As `Networks.features`."""
        self.module.eval()
        with recorded_inputs(self.module, [layer.name for layer in self.hidden]) as recorded:
            self._forward(inputs[0])
        return {name: value[None] for name, value in recorded.items()}

    def _forward(self, inputs: Tensor) -> Tensor:
        lower = torch.autocast(inputs.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with lower:
            if self.layout is torch.channels_last and inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            outputs = self.module(inputs)
        return outputs.float() if self.bf16 else outputs


class ManyNetworks(Networks):
    """Many seeds of one architecture whose tensors are stacked, so that each operation works on all of them at once.

    Fully connected networks run as layers of many networks (`side_by_side`), all others under `torch.func.vmap`.

    Rounding differs from that of each network alone, because matrices are multiplied in batches; what is computed does not.

    Args:
        build: Draws a network.
        seeds: Seed of each network.
        make_optimizer: Makes the optimizer of the stacked parameters. It must work element by element, as SGD, RMSprop and Adam do.
        device: Where to train.
    """

    def __init__(
        self, build: Callable[[], nn.Module], seeds: Sequence[int], make_optimizer: MakeOptimizer, device: torch.device
    ) -> None:
        self.seeds, self.build, self.make_optimizer = tuple(seeds), build, make_optimizer
        drawn = [fresh_network(build, initial_seed(seed)) for seed in seeds]
        self.module = drawn[0].to(device)
        each = [dict(network.named_parameters()) for network in drawn]
        self._leaves = {
            name: torch.stack([found[name].detach().to(device) for found in each]).requires_grad_() for name in each[0]
        }
        self.weights = {name: leaf.detach() for name, leaf in self._leaves.items()}
        kept = [dict(network.named_buffers()) for network in drawn]
        self.buffers = {name: torch.stack([found[name].to(device) for found in kept]) for name in kept[0]}
        self.hidden = hidden_layers(self.module)
        self._stacked = side_by_side(self.module, self._leaves)
        if self._stacked is not None:
            for leaf in self._leaves.values():
                leaf.grad = torch.zeros_like(leaf)
        self.restart_optimizer()

    @property
    def trained(self) -> list[Tensor]:
        """The stacked parameters."""
        return [*self._leaves.values()]

    @property
    def gradients(self) -> Weights:
        """Gradients of the stacked parameters, (S, ...)."""
        return {name: leaf.grad for name, leaf in self._leaves.items() if leaf.grad is not None}

    def learn(self, inputs: Tensor, targets: Tensor, *, features: bool = False) -> Learned:
        """As `Networks.learn`."""
        names = [layer.name for layer in self.hidden] if features else []
        if self._stacked is not None:
            return self._learn_stacked(self._stacked, inputs, targets, names)
        self.module.train()

        def mean_loss(weights: Weights, buffers: Weights, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
            with recorded_inputs(self.module, names) as recorded:
                outputs = functional_call(self.module, (weights, buffers), (inputs,))
            losses = example_losses(outputs, targets)
            return losses.mean(), (losses, outputs, dict(recorded))

        step = vmap(grad(mean_loss, has_aux=True), randomness="different")
        gradients, (losses, outputs, recorded) = step(self.weights, self.buffers, inputs, targets)
        for name, leaf in self._leaves.items():
            leaf.grad = gradients[name]
        return Learned(losses, outputs, recorded)

    def _learn_stacked(self, stacked: nn.Module, inputs: Tensor, targets: Tensor, names: Sequence[str]) -> Learned:
        for leaf in self._leaves.values():
            # Those of linear layers are overwritten; only small ones are added up.
            if leaf.grad is not None and leaf.ndim < 3:
                leaf.grad.zero_()
        with recorded_inputs(stacked, names) as recorded:
            outputs = stacked(inputs)
        losses = example_losses(outputs.flatten(0, 1), targets.flatten(0, 1)).unflatten(0, targets.shape[:2])
        losses.mean(1).sum().backward()
        return Learned(losses.detach(), outputs.detach(), {name: value.detach() for name, value in recorded.items()})

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """As `Networks.outputs`."""
        self.module.eval()
        if self._stacked is not None:
            return self._stacked(inputs)

        def forward(weights: Weights, buffers: Weights, inputs: Tensor) -> Tensor:
            return functional_call(self.module, (weights, buffers), (inputs,))

        return vmap(forward, randomness="different")(self.weights, self.buffers, inputs)

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Weights:
        """As `Networks.features`."""
        self.module.eval()
        names = [layer.name for layer in self.hidden]
        if self._stacked is not None:
            with recorded_inputs(self._stacked, names) as recorded:
                self._stacked(inputs)
            return dict(recorded)

        def forward(weights: Weights, buffers: Weights, inputs: Tensor) -> Weights:
            with recorded_inputs(self.module, names) as recorded:
                functional_call(self.module, (weights, buffers), (inputs,))
            return dict(recorded)

        return vmap(forward, randomness="different")(self.weights, self.buffers, inputs)


def initial_seed(seed: int) -> int:
    """Seed of the initialisation of the network of a run.

    Args:
        seed: Seed of the run.
    """
    return derived_seed(seed, "initialisation")


def example_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of each example, shape (N,): cross-entropy in nats for int64 targets, the mean over a sequence's tokens; otherwise squared error.

    Args:
        outputs: (N, C) or (N, T, C) logits, or values (N,) or (N, K).
        targets: (N,) or (N, T) int64 labels, or values of the shape of the outputs, (N,) standing for (N, 1).
    """
    if targets.dtype == torch.int64:
        right = outputs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        losses = outputs.logsumexp(-1) - right
    else:
        losses = functional.mse_loss(outputs.reshape(targets.shape), targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of each example that is predicted rightly, (S, N): 0 or 1 for a label, a fraction for a sequence, NaN for values.

    Args:
        outputs: (S, N, ..., C) logits.
        targets: (S, N, ...) labels or values.
    """
    if targets.dtype != torch.int64:
        return torch.full(outputs.shape[:2], torch.nan, device=outputs.device)
    right = (outputs.argmax(-1) == targets).float()
    return right.flatten(2).mean(2) if right.ndim > 2 else right


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeds what networks draw themselves (dropout), asks cuDNN for its deterministic kernels, and puts all of it back afterwards.

    Args:
        seed: Seed of the global generators.
    """
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        torch.enable_grad(),
    ):
        torch.manual_seed(seed)
        yield
