"""A stream that makes its own examples: regression on bits, some of which change seldom."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.streams.drawing import check_counts, check_request
from plasticity_probe.training.tasks import Source, Stream, Task


@final
@dataclass(frozen=True)
class SlowlyChangingRegression(Stream):
    """Slowly-Changing Regression: m random bits, the first f of which stay for a whole task; a fixed network of thresholds gives the targets.

    Dohare et al. 2024. An example is x in {0, 1}^m; its bits f + 1, ..., m are drawn anew for each example, its slow bits 1, ..., f
    are those of the task, so a learner that is small sees a new problem with each task. The target is y = v_0 + sum_i v_i h_i with hidden units

        h_i = 1 if w_i · x + b_i > theta_i, else 0,    theta_i = (m + 1) beta - S_i,

    where S_i is the number of negative ones among the m + 1 numbers w_i and b_i: unit i is on where more than a share beta of its m + 1 inputs
    (the last one constantly 1) agree with the signs of their weights. All weights and biases are +1 or -1 with equal probability. Our choices:
    b_i counts in S_i as a weight, 1 where it is -1 (the official code adds b_i / 2 to the negative ones among the w_i), and the network belongs
    to the seed, like everything that is drawn. There are neither a source nor a test set. The stream never ends.

    Args:
        tasks: Number of tasks, the changes and one more (the official setting has 1 M examples, which are 100; the paper 3 M).
        examples: Examples of a task, between two changes.
        rule: "flip_one": at each change one slow bit, drawn at random, flips (the paper). "redraw_all": all slow bits are drawn
            anew (the default setting of the official code).
        slow_bits: f.
        inputs: m.
        hidden: Hidden units of the target network.
        beta: Where units switch on, in (0, 1).

    Raises:
        UsageError: A number below 1, more slow bits than inputs, beta outside (0, 1) or an unknown rule.
    """

    name: ClassVar[str] = "slowly-changing-regression"
    source: ClassVar[str] = "Dohare et al. 2024, Slowly-Changing Regression"
    steady: ClassVar[bool] = True

    tasks: int
    examples: int = 10_000
    rule: Literal["flip_one", "redraw_all"] = "flip_one"
    slow_bits: int = 15
    inputs: int = 20
    hidden: int = 100
    beta: float = 0.7

    def __post_init__(self) -> None:
        check_counts(
            self,
            tasks=self.tasks,
            examples=self.examples,
            slow_bits=self.slow_bits,
            inputs=self.inputs,
            hidden=self.hidden,
        )
        if self.slow_bits > self.inputs:
            raise UsageError(
                f"the stream {self.name} cannot have {self.slow_bits} slow bits among {self.inputs} inputs"
            )
        if not 0 < self.beta < 1:
            raise UsageError(f"the stream {self.name} needs 0 < beta < 1, got beta = {self.beta}")
        if self.rule not in ("flip_one", "redraw_all"):
            raise UsageError(f'the stream {self.name} has the rules "flip_one" and "redraw_all", got {self.rule!r}')

    def outputs(self, source: Source | None) -> int:  # noqa: ARG002 -- it makes its own examples
        """As `Stream.outputs`: one value."""
        return 1

    def task(self, source: Source | None, index: int, seed: int) -> Task:  # noqa: ARG002 -- it makes its own examples
        """As `Stream.task`; inputs (N, m) float32 of zeros and ones, targets (N,) float32, in the order of time; the source is not used."""
        check_request(self, index, seed, endless=True)
        slow = self.slow(index, seed).expand(self.examples, -1)
        fast = _bits(seed, "fast bits", (self.examples, self.inputs - self.slow_bits), index)
        inputs = torch.cat([slow, fast], dim=1).float()
        return Task(index, inputs, self.target(inputs, seed), f"slow bits {index} (seed {seed})", ordered=True)

    def slow(self, index: int, seed: int) -> Tensor:
        """The slow bits of a task, (slow_bits,) int64.

        Args:
            index: The task.
            seed: Seed of the stream.
        """
        if self.rule == "redraw_all":
            return _bits(seed, "slow bits", (self.slow_bits,), index)
        flips = [
            int(torch.randint(self.slow_bits, (), generator=generator(seed, "flipped bit", t)))
            for t in range(1, index + 1)
        ]
        counts = torch.tensor(flips, dtype=torch.int64).bincount(minlength=self.slow_bits)
        return (_bits(seed, "slow bits", (self.slow_bits,), 0) + counts) % 2

    def target(self, inputs: Tensor, seed: int) -> Tensor:
        """What the target network of a seed says, (N,) float32.

        Args:
            inputs: (N, m) zeros and ones.
            seed: Seed of the stream.
        """
        # Seen as signs, the last column belongs to the input that is constantly 1.
        weights = 2.0 * _bits(seed, "hidden weights", (self.hidden, self.inputs + 1)) - 1
        outward = 2.0 * _bits(seed, "output weights", (self.hidden + 1,)) - 1
        thresholds = (self.inputs + 1) * self.beta - (weights < 0).sum(1)
        on = inputs @ weights[:, :-1].T + weights[:, -1] > thresholds
        return on.float() @ outward[:-1] + outward[-1]


def _bits(seed: int, label: str, shape: tuple[int, ...], *numbers: int) -> Tensor:
    return torch.randint(2, shape, generator=generator(seed, label, *numbers))
