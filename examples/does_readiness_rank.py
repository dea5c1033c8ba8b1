"""Which measurement ranks the checkpoints of a run by how well they will learn a task that they never saw?

Wang et al. 2026 (arXiv 2605.09044) rank checkpoints by optimization readiness on Slowly-Changing Regression. Run it with
`python examples/does_readiness_rank.py`: three runs of twenty short tasks, ten seconds. The numbers of docs/findings.md take about thirteen
minutes of one core:

    python examples/does_readiness_rank.py --seeds 20 --tasks 500 --examples 1000 --held-out 10 --rollouts 128

Networks with two hidden layers of five learn task after task with Adam, one example at a time; every five tasks their weights are kept. Each
checkpoint then meets held-out tasks: the same target network, slow bits drawn anew and never trained on. Labels of a checkpoint on a task:

    gain after k steps       (L(theta) - E L(theta_k)) / L(theta), k steps of plain SGD on mini-batches of the task, mean over rollouts
    gain with Adam           the same after one pass over the task with the optimizer of the run, newly started, one example at a time
    low loss while learning  less the mean squared error of each example of that pass before the update on it
    low loss in the end      less the mean squared error on the task after that pass

An accuracy is the share of pairs of checkpoints of a run that a measurement on a task orders as the label on it does, its ties counting one
half: a mean over tasks, then over runs, with a bootstrap interval over runs. Writes --out/scores.csv, values.csv and a figure.
"""

import argparse
import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jacrev, vmap

from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.linalg.ranks import effective_rank, energy_rank, stable_rank, threshold_rank
from plasticity_probe.prediction.association import mean_interval
from plasticity_probe.prediction.resampling import Interval
from plasticity_probe.prediction.verdict import Verdict
from plasticity_probe.probes.readiness import batch_squared_norm
from plasticity_probe.report.draw_verdicts import render
from plasticity_probe.report.panels import Estimates, Forest, VerdictFigure
from plasticity_probe.training.loop import train
from plasticity_probe.training.protocols import PROTOCOLS
from plasticity_probe.training.run_folder import checkpoint_path
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.settings import Setting
from plasticity_probe.training.streams.regression import SlowlyChangingRegression
from plasticity_probe.training.tasks import Task

STEPS = (1, 10, 100)
GAINS = tuple(f"gain after {k} step{'s' * (k > 1)}" for k in STEPS)
ADAM = ("gain with Adam", "low loss while learning", "low loss in the end")
LABELS = (*GAINS, *ADAM)
METRIC_BATCH, DORMANT = 4, 0.025
"""Mini-batch of optimization readiness (Wang et al. 2026) and threshold of a dormant unit (Sokar et al. 2023)."""
GROUPS = {
    "the gradient": ("optimization readiness", "strength", "reliability", "gradient norm"),
    "ranks": (
        "eNTK 99 %-energy rank",
        "eNTK effective rank",
        "Fisher 99 % rank",
        "representation 99 % rank",
        "representation effective rank",
        "representation stable rank",
        "Hessian 99 % rank",
        "Hessian effective rank",
    ),
    "the rest": ("loss before learning", "dormant share", "weight norm", "tasks learned so far"),
}
PREDICTORS = {name: group for group, names in GROUPS.items() for name in names}
LOOKS = dict(
    zip(LABELS, ("first", "change", "last", Verdict.INCONCLUSIVE, "between", Verdict.DOES_NOT_PREDICT), strict=True)
)
"""Colours and markers, borrowed from the figures of verdicts."""
PUBLISHED = {"optimization readiness": (0.987, 0.988, 0.977), "eNTK 99 %-energy rank": (0.765, 0.768, 0.779)}
"""Wang et al. 2026, after 1, 10 and 100 steps; known to us from a secondary source. The second is the best of their baselines."""

Values = dict[str, NDArray[np.float64]]
"""Of a run, by measurement or label: (task, checkpoint)."""
Weights = list[Tensor]
"""Tensors of many networks, with the axes over networks last: five weights a unit of the first layer's inputs, and so on."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A task as its network sees it: few different inputs, in the few dimensions that they span.

    Only the fast bits of a task vary, so its inputs (with the constant one that the bias belongs to) span six of 21 dimensions, and there are
    2^5 of them. In an orthonormal basis of that space losses, gradient norms, eigenvalues and steps of SGD are what they are in the whole.

    Args:
        task: The task, of many examples.
        basis: (inputs + 1, dimensions), orthonormal columns.
        inputs: The different inputs in this basis, (different, dimensions).
        targets: (different,).
        share: Share of the examples that have each input, (different,).
        which: For each example its input, (examples,).
    """

    task: Task
    basis: Tensor
    inputs: Tensor
    targets: Tensor
    share: Tensor
    which: Tensor

    def seen(self, weights: Weights) -> Weights:
        """Weights in this basis.

        Args:
            weights: Those of networks on all inputs.
        """
        first, *others = weights
        return [torch.einsum("ui...,id->ud...", first, self.basis.to(first.dtype)), *others]


def held_out_tasks(stream: SlowlyChangingRegression, seed: int, count: int, samples: int) -> list[HeldOut]:
    """Tasks of a run's target network that it never trained on.

    Args:
        stream: What it was trained on.
        seed: Its seed.
        count: How many.
        samples: Examples of each.
    """
    trained = {tuple(stream.slow(task, seed).tolist()) for task in range(stream.tasks)}
    others = replace(stream, rule="redraw_all", examples=samples)
    found: list[HeldOut] = []
    index = stream.tasks
    while len(found) < count:
        if tuple(others.slow(index, seed).tolist()) not in trained:
            found.append(held_out(others.task(None, index, seed), stream.slow_bits))
        index += 1
    return found


def held_out(task: Task, slow_bits: int) -> HeldOut:
    """A task in the basis of its inputs.

    Args:
        task: The task.
        slow_bits: How many of its first inputs are the same in all examples.
    """
    different, which, counts = torch.unique(with_one(task.inputs), dim=0, return_inverse=True, return_counts=True)
    constant = different[0].clone()
    constant[slow_bits:-1] = 0
    basis = torch.cat([torch.eye(len(constant))[:, slow_bits:-1], (constant / constant.norm())[:, None]], 1).double()
    targets = torch.zeros(len(different)).index_copy(0, which, task.targets).double()
    return HeldOut(task, basis, different.double() @ basis, targets, counts / counts.sum().double(), which)


def with_one(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, torch.ones(len(inputs), 1)], 1)


def stacked(states: list[dict[str, Tensor]]) -> Weights:
    """The weights of networks with two hidden layers, the first layer's bias as its last column."""
    names = [f"layers.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")]
    first, bias, *others = [torch.stack([state[name] for state in states], -1).double() for name in names]
    return [torch.cat([first, bias[:, None]], 1), *others]


def features(weights: Weights, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Both hidden layers, (N, units, ...), of inputs (N, dimensions, ...)."""
    first, second, bias, _, _ = weights
    early = (inputs[:, None] * first).sum(2).relu()
    return early, ((early[:, None] * second).sum(2) + bias).relu()


def outputs(weights: Weights, inputs: Tensor) -> Tensor:
    """(N, ...) of inputs (N, dimensions, ...)."""
    return (features(weights, inputs)[1] * weights[3][0]).sum(1) + weights[4]


def mean_loss(weights: Weights, task: HeldOut) -> Tensor:
    """Mean squared error on all examples of a task, one a network."""
    shape = [-1, *[1] * (weights[4].ndim - 1)]
    inputs, targets, share = (t.to(weights[4].dtype) for t in (task.inputs, task.targets, task.share))
    errors = outputs(weights, inputs.reshape(*inputs.shape, *shape[1:])) - targets.reshape(shape)
    return (share.reshape(shape) * errors.square()).sum(0)


def measured(weights: Weights, task: HeldOut) -> dict[str, NDArray[np.float64]]:
    """Every measurement that depends on the task, for networks with one axis over them.

    Args:
        weights: The networks, in the basis of the task.
        task: The task.
    """
    sizes = [tensor[..., 0].shape for tensor in weights]

    def unflattened(flat: Tensor) -> Weights:
        parts = flat.split([size.numel() for size in sizes])
        return [part.view(*size, 1) for part, size in zip(parts, sizes, strict=True)]

    flat = torch.cat([tensor.flatten(0, -2) for tensor in weights]).mT
    jacobian = vmap(jacrev(lambda w: outputs(unflattened(w), task.inputs[..., None])[:, 0]))(flat)
    curvature = vmap(jacrev(jacrev(lambda w: mean_loss(unflattened(w), task)[0])), chunk_size=16)(flat)
    early, late = (layer.movedim(-1, 0) for layer in features(weights, task.inputs[..., None]))
    errors = (outputs(weights, task.inputs[..., None]) - task.targets[:, None]).mT
    root = task.share.sqrt()[:, None]
    gradients = 2 * errors[..., None] * jacobian

    loss = (task.share * errors.square()).sum(1)
    squared = (task.share[:, None] * gradients).sum(1).square().sum(1)
    mean_square = (task.share * gradients.square().sum(2)).sum(1)
    strength = squared / loss
    reliability = squared / batch_squared_norm(squared, mean_square, len(task.which), METRIC_BATCH)  # type: ignore[arg-type]
    kernel, fisher, late_values = (torch.linalg.svdvals(root * rows) for rows in (jacobian, gradients, late))
    bends = torch.linalg.eigvalsh(curvature)
    activity = torch.stack([(task.share[:, None] * layer).sum(1) for layer in (early, late)], 1)
    dormant = activity <= DORMANT * activity.mean(2, keepdim=True)
    found = {
        "optimization readiness": torch.where(squared > 0, strength * reliability, 0),
        "strength": strength,
        "reliability": torch.where(squared > 0, reliability, 0),
        "gradient norm": squared.sqrt(),
        "loss before learning": loss,
        "dormant share": dormant.double().mean((1, 2)),
    }
    ranks = {
        "eNTK 99 %-energy rank": [energy_rank(values) for values in kernel],
        "eNTK effective rank": [effective_rank(values.square()) for values in kernel],
        "Fisher 99 % rank": [threshold_rank(values.square()) for values in fisher],
        "representation 99 % rank": [threshold_rank(values) for values in late_values],
        "representation effective rank": [effective_rank(values) for values in late_values],
        "representation stable rank": [stable_rank(values) for values in late_values],
        "Hessian 99 % rank": [threshold_rank(values) for values in bends],
        "Hessian effective rank": [effective_rank(values) for values in bends],
    }
    return {name: np.asarray(values, dtype=np.float64) for name, values in {**found, **ranks}.items()}


def learn(weights: Weights, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> Tensor:
    """One update of every network, and the losses before it.

    Args:
        weights: The networks, leaves that require gradients; changed in place.
        optimizer: Their optimizer.
        inputs: (batch, dimensions, ...).
        targets: (batch, ...).
    """
    losses = (outputs(weights, inputs) - targets).square().mean(0)
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


def losses_after(
    weights: Weights,
    task: HeldOut,
    steps: tuple[int, ...],
    rollouts: int,
    batch: int,
    rate: float,
    draws: torch.Generator,
) -> Tensor:
    """Losses on the whole task after steps of plain SGD, (steps, network, rollout).

    A rollout draws the same mini-batches for all networks: what differs between them is never the luck of the draw.

    Args:
        weights: The networks, in the basis of the task.
        task: The task.
        steps: After how many steps.
        rollouts: How many rollouts.
        batch: Examples of a mini-batch, drawn with replacement.
        rate: Step size.
        draws: Generator of the mini-batches.
    """
    kind = weights[0].dtype
    drawn = task.which[torch.randint(len(task.which), (max(steps), batch, rollouts), generator=draws)]
    found: list[Tensor] = []
    # So few at a time stay in a processor's cache.
    for some in drawn.split(16, dim=2):
        own = [tensor[..., None].repeat(*[1] * tensor.ndim, some.shape[2]).requires_grad_() for tensor in weights]
        optimizer = torch.optim.SGD(own, lr=rate, fused=True)
        after: list[Tensor] = []
        for number, chosen in enumerate(some, 1):
            inputs = task.inputs[chosen].movedim(-1, 1)[:, :, None].to(kind)
            learn(own, optimizer, inputs, task.targets[chosen][:, None].to(kind))
            if number in steps:
                with torch.no_grad():
                    after.append(mean_loss(own, task))
        found.append(torch.stack(after))
    return torch.cat(found, 2)


def with_adam(weights: Weights, tasks: list[HeldOut], setting: Setting) -> tuple[Tensor, Tensor]:
    """One pass over the beginning of tasks, as long as those of the run, with the optimizer of the run newly started.

    Args:
        weights: The networks.
        tasks: The tasks.
        setting: What decides the run.

    Returns:
        The mean loss of examples before the update on them, and the loss on the whole task afterwards, (network, task) each.
    """
    count = setting.stream.examples  # type: ignore[attr-defined]
    own = [tensor[..., None].repeat(*[1] * tensor.ndim, len(tasks)).float().requires_grad_() for tensor in weights]
    optimizer = setting.training.make_optimizer(own)
    inputs = torch.stack([with_one(task.task.inputs[:count]) for task in tasks], -1)[:, :, None]
    targets = torch.stack([task.task.targets[:count] for task in tasks], -1)[:, None]
    while_learning = sum(learn(own, optimizer, x[None], y[None]).double() for x, y in zip(inputs, targets, strict=True))
    with torch.no_grad():
        after = [
            mean_loss(task.seen([tensor[..., at].double() for tensor in own]), task) for at, task in enumerate(tasks)
        ]
    return torch.as_tensor(while_learning) / count, torch.stack(after, -1)


def of_run(given: argparse.Namespace, setting: Setting, folder: Path, seed: int) -> Values:
    """Measurements and labels of all checkpoints of a run on all its held-out tasks."""
    stream = setting.stream
    assert isinstance(stream, SlowlyChangingRegression)
    learned = [*range(0, stream.tasks, setting.checkpoint_every), stream.tasks]
    paths = [checkpoint_path(folder, seed, task * stream.examples) for task in learned]
    weights = stacked([read_checkpoint(path).state for path in paths])
    tasks = held_out_tasks(stream, seed, given.held_out, given.samples)
    online, end = with_adam(weights, tasks, setting)
    norm = np.asarray(torch.stack([tensor.square().flatten(0, -2).sum(0) for tensor in weights]).sum(0).sqrt())
    rows: list[Values] = []
    for at, task in enumerate(tasks):
        seen = task.seen(weights)
        before, draws = mean_loss(seen, task), generator(seed, "rollouts", at)
        short = [tensor.float() for tensor in seen]
        after = losses_after(short, task, STEPS, given.rollouts, given.rollout_batch, given.rate, draws).double()
        gains = np.asarray(1 - after.mean(2) / before)
        rows.append(
            {
                **measured(seen, task),
                "weight norm": norm,
                "tasks learned so far": np.array(learned, dtype=np.float64),
                **dict(zip(GAINS, gains, strict=True)),
                **dict(
                    zip(
                        ADAM,
                        np.asarray(torch.stack([1 - end[:, at] / before, -online[:, at], -end[:, at]])),
                        strict=True,
                    )
                ),
            }
        )
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def ranking(predictor: NDArray[np.float64], label: NDArray[np.float64]) -> float:
    """Share of pairs that a predictor orders as a label does; its ties count one half, pairs with equal labels do not count.

    Args:
        predictor: One value a checkpoint.
        label: Likewise.
    """
    one, other = np.triu_indices(len(label), 1)
    x, y = (np.sign((v[one] > v[other]).astype(int) - (v[one] < v[other])) for v in (predictor, label))
    return float(((x * y + 1) / 2)[y != 0].mean()) if (y != 0).any() else float("nan")


def accuracy(predictors: list[NDArray[np.float64]], labels: list[NDArray[np.float64]]) -> tuple[Interval, Interval]:
    """The accuracy where a higher value is taken to promise more, and where the other runs tell whether it does.

    Args:
        predictors: One array a run, (task, checkpoint).
        labels: Likewise.
    """
    of_runs = np.array([float(np.mean([*map(ranking, x, y)])) for x, y in zip(predictors, labels, strict=True)])
    others = of_runs.sum() - of_runs - (len(of_runs) - 1) / 2
    groups = [np.arange(len(of_runs))]
    return mean_interval(of_runs, groups, 0), mean_interval(0.5 + np.sign(others) * (of_runs - 0.5), groups, 0)


Scores = dict[str, dict[str, tuple[Interval, Interval]]]


def figure(scores: Scores, given: argparse.Namespace, checkpoints: int) -> VerdictFigure:
    """All accuracies, those after steps of SGD at the left and those with the run's own optimizer at the right."""

    def estimates(label: str) -> Estimates:
        found = [scores[name][label][0] for name in PREDICTORS]
        ends = (np.array([getattr(interval, end) for interval in found]) for end in ("value", "low", "high"))
        return Estimates(label, LOOKS[label], *ends)

    def panel(title: str, labels: tuple[str, ...]) -> Forest:
        shown, groups = tuple(map(estimates, labels)), tuple(PREDICTORS.values())
        axis = "pairs of checkpoints ordered rightly (share)"
        return Forest(title, axis, tuple(PREDICTORS), shown, True, groups, reference=0.5, limits=(-0.02, 1.02))

    caption = (
        f"Slowly-Changing Regression: {given.seeds} runs of {given.tasks} tasks of {given.examples} examples, learned by Adam with step size",
        f"{given.learning_rate:g}; {checkpoints} checkpoints a run, {given.held_out} held-out tasks. Share of pairs of checkpoints of a run",
        "that the measurement on a held-out task orders as the label on it does; ties of the measurement count one half. Dots and lines:",
        "mean over tasks, then runs, and its 95 % bootstrap interval over runs. Grey line: guessing; below it a low value promises more,",
        "and 1 less the share is ordered rightly. Gains: relative decrease of the loss, by SGD a mean over",
        f"{given.rollouts} rollouts in mini-batches of {given.rollout_batch} with step size {given.rate:g}, by Adam over one pass of the",
        "task, one example at a time. Low loss: mean squared error during and after that pass. Wang et al. 2026 publish for 1, 10 and 100 steps",
        ".987, .988, .977 for optimization readiness and .765, .768, .779 for the 99 %-energy rank of the eNTK, the best of their baselines.",
    )
    return VerdictFigure(
        "ranking",
        "Who ranks the checkpoints of a run by how they learn a task they never saw?",
        (panel("gains by a few steps of plain SGD", GAINS), panel("a whole task with the run's Adam", ADAM)),
        " ".join(caption),
    )


def cell(found: tuple[Interval, Interval]) -> str:
    """An accuracy as it is, and behind an arrow with its sign learned from the other runs where that turns it."""
    plain, turned = found
    text = f"{plain.value:.3f} [{plain.low:.3f}, {plain.high:.3f}]"
    return text if abs(turned.value - plain.value) < 5e-4 else f"{text} → {turned.value:.3f}"


def report(runs: list[Values], given: argparse.Namespace) -> None:
    """Writes and prints what came out of all runs."""
    scores: Scores = {
        name: {label: accuracy([run[name] for run in runs], [run[label] for run in runs]) for label in LABELS}
        for name in PREDICTORS
    }
    with (given.out / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["predictor", "label", "sign", "accuracy", "low", "high", "published"])
        for name, of_labels in scores.items():
            for at, (label, found) in enumerate(of_labels.items()):
                published = PUBLISHED.get(name, ())[at : at + 1]
                for sign, interval in zip(("higher promises more", "from the other runs"), found, strict=True):
                    writer.writerow([name, label, sign, interval.value, interval.low, interval.high, *published])
    with (given.out / "values.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = [*PREDICTORS, *LABELS]
        writer.writerow(["seed", "held_out_task", "checkpoint", *names])
        for seed, run in enumerate(runs):
            for at in np.ndindex(run[names[0]].shape):
                writer.writerow([seed, *at, *(f"{run[name][at]:.9g}" for name in names)])

    checkpoints = runs[0][GAINS[0]].shape[1]
    print("| checkpoint |", " | ".join([*GAINS, *(name.replace("low loss", "loss") for name in ADAM)]), "|")
    print("|---" * (1 + len(LABELS)) + "|")
    for name, at in (("first", 0), ("middle", checkpoints // 2), ("last", -1)):
        means = {label: float(np.mean([run[label][:, at] for run in runs])) for label in LABELS}
        texts = [f"{-mean if label.startswith('low') else mean:.4f}" for label, mean in means.items()]
        print(f"| {name} |", " | ".join(texts), "|")
    print(
        "\nPairs ordered rightly, a higher value taken to promise more [95 % over runs]; behind an arrow where the other"
    )
    print("runs say that a lower value does. Published are the gains after 1, 10 and 100 steps.\n")
    print("| predictor |", " | ".join(GAINS), "| published |", " | ".join(ADAM), "|")
    print("|---" * (2 + len(LABELS)) + "|")
    for name, of_labels in scores.items():
        texts = [cell(found) for found in of_labels.values()]
        published = " / ".join(f"{value:.3f}" for value in PUBLISHED.get(name, ()))
        print(f"| {name} |", " | ".join([*texts[: len(GAINS)], published, *texts[len(GAINS) :]]), "|")

    drawn = render(figure(scores, given, checkpoints))
    (given.out / "ranking.png").write_bytes(drawn.png)
    (given.out / "ranking.pdf").write_bytes(drawn.pdf)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--examples", type=int, default=200, help="of a task")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam, which the runs learn with")
    parser.add_argument("--every", type=int, default=5, help="tasks between two checkpoints")
    parser.add_argument("--held-out", type=int, default=3, help="held-out tasks of each run")
    parser.add_argument("--samples", type=int, default=10_000, help="examples of a held-out task")
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--rollout-batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3, help="step size of the rollouts")
    parser.add_argument("--out", type=Path, default=Path("runs/does-readiness-rank"))
    given = parser.parse_args()

    torch.set_num_threads(1)
    protocol = PROTOCOLS["slowly-changing-regression"]
    setting = protocol.setting.changed(protocol.variants["adam"]).changed(
        {
            "network.hidden": [5, 5],
            "stream.tasks": given.tasks,
            "stream.examples": given.examples,
            "training.learning_rate": given.learning_rate,
            "control_every": 0,
            "checkpoint_every": given.every,
        }
    )
    folder = given.out / f"{given.tasks}-tasks-of-{given.examples}-at-{given.learning_rate:g}"
    train(setting, range(given.seeds), folder, resume=True, protocol=protocol.name)
    report([of_run(given, setting, folder, seed) for seed in range(given.seeds)], given)


if __name__ == "__main__":
    main()
