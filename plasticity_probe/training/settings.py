"""A training run as data: what is learned, by which network, how, and with which remedies. All of it is JSON and back."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.training import remedies as remedies_package
from plasticity_probe.training.kinds import as_object, check_kinds, made, tupled
from plasticity_probe.training.remedies.remedy import Remedy
from plasticity_probe.training.streams import STREAMS
from plasticity_probe.training.tasks import Stream

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = MappingProxyType(
    {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
)
"""All of them work element by element, which is what lets many networks share one."""
FUSED = frozenset({"adam", "adamw", "sgd"})
AUGMENTATIONS = ("none", "crop-flip", "crop-flip-rotate")


@dataclass(frozen=True)
class Data:
    """The examples of a run.

    Args:
        name: A data set, a file or a folder as `--data` takes it, or a text file (*.txt) for streams of text; empty for streams that make
            their own examples.
        normalise: "none" (pixels in [0, 1]), "standard" (less the data set's usual mean, over its standard deviation; computed from the
            training split where there is no usual one) or "symmetric" (pixels in [-1, 1], as Ash and Adams 2020 do).
        examples: Use at most this many training examples, the same for every seed: a random subset of a data set, the beginning of a text;
            None for all.
        length: Characters of an example, for text.
    """

    name: str = "digits"
    normalise: Literal["none", "standard", "symmetric"] = "standard"
    examples: int | None = None
    length: int = 64

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "data")
        if self.length < 2:
            raise UsageError(f"an example of a text has at least two characters, got data.length = {self.length}")
        if self.examples is not None and self.examples < 1:
            raise UsageError(f"at least one example is needed, got data.examples = {self.examples}")


@dataclass(frozen=True)
class Training:
    """How every task of a stream is trained: minibatch descent on the mean loss.

    The defaults are our choice and small; each protocol states its own.

    Args:
        epochs: Passes over the examples of task 0, 1, ...; the last number holds for all further tasks.
        batch: Examples per update; the last batch of an epoch holds what is left.
        learning_rate: Step size.
        optimizer: A name of `OPTIMIZERS`; its memory is kept from task to task unless a remedy restarts it.
        optimizer_settings: What torch's optimizer takes besides, such as {"momentum": 0.9}; otherwise torch's defaults.
        milestones: Epochs of a task after which the step size is multiplied by `factor`.
        factor: By how much.
        warm_up: Epochs at the start of a task over which the step size grows linearly, update by update, to its value.
        until: Ends a task when the online accuracy of an epoch reaches this; `epochs` is then the most it may take. None: never.
        clip: Largest norm of each network's gradient; None: unlimited.
        augmentation: "none", "crop-flip" (images padded by 4, cropped at random, mirrored with probability 1/2) or "crop-flip-rotate"
            (and turned by up to 15 degrees).
        threshold: Online accuracy of an epoch that counts as learned, for `Outcome.updates_to_threshold`; for values, online loss.
        test_last: Test results are averaged over so many last epochs of a task (Berariu et al. 2021: 100).
        bf16: Compute forward passes in bfloat16 (autocast).
        channels_last: Lay images and convolutions out with channels last.
    """

    epochs: tuple[int, ...] = (50,)
    batch: int = 60
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    optimizer_settings: Mapping[str, Any] = field(default_factory=dict)
    milestones: tuple[int, ...] = ()
    factor: float = 0.2
    warm_up: int = 0
    until: float | None = None
    clip: float | None = None
    augmentation: str = "none"
    threshold: float = 0.9
    test_last: int = 1
    bf16: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "training")
        wrong = [
            text
            for text, right in (
                (f"epochs = {self.epochs}: at least one each", bool(self.epochs) and min(self.epochs) >= 1),
                (f"batch = {self.batch}: at least 1", self.batch >= 1),
                (f"learning_rate = {self.learning_rate}: positive and finite", 0 < self.learning_rate < math.inf),
                (f"until = {self.until}: in (0, 1]", self.until is None or 0 < self.until <= 1),
                (f"clip = {self.clip}: positive", self.clip is None or self.clip > 0),
                (f"factor = {self.factor}: positive and finite", 0 < self.factor < math.inf),
                (f"warm_up = {self.warm_up}: at least 0", self.warm_up >= 0),
                (f"test_last = {self.test_last}: at least 1", self.test_last >= 1),
                (f"augmentation = {self.augmentation!r}: one of {AUGMENTATIONS}", self.augmentation in AUGMENTATIONS),
            )
            if not right
        ]
        if wrong:
            raise UsageError("training cannot be: " + "; ".join(wrong))
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)
        self.make_optimizer([torch.zeros(1, requires_grad=True)])

    def epochs_of(self, task: int) -> int:
        """The most passes over the examples of a task.

        Args:
            task: Its index.
        """
        return self.epochs[min(task, len(self.epochs) - 1)]

    def step_size(self, epoch: int, share: float) -> float:
        """The step size at a point of a task.

        Args:
            epoch: Epochs of the task that are over.
            share: Share of the present epoch that is over, with the update to come, in (0, 1].
        """
        decay = self.factor ** sum(epoch >= milestone for milestone in self.milestones)
        return self.learning_rate * decay * (min(1.0, (epoch + share) / self.warm_up) if self.warm_up else 1.0)

    def make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """A new optimizer.

        Args:
            parameters: What it is to update.

        Raises:
            UsageError: torch's optimizer takes no such setting.
        """
        fused = {"fused": True} if self.optimizer in FUSED else {}
        try:
            return OPTIMIZERS[self.optimizer](parameters, lr=self.learning_rate, **fused, **self.optimizer_settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self.optimizer} cannot take {dict(self.optimizer_settings)}: {error}") from error


@dataclass(frozen=True)
class Setting:
    """Everything that decides a run but its seed.

    Args:
        stream: The tasks.
        data: The examples they are made of.
        network: Name and settings of the network; the sizes of its input and output come from the tasks.
        training: How each task is trained.
        remedies: What keeps the network's ability to learn, in the order in which they act.
        control_every: A newly initialised network is trained on every so many-th task and on the last one; 0 for none.
        checkpoint_every: Weights are kept at the start of every so many-th task, and after the last one; 0 for none.
        inside: Number of further checkpoints inside each of those tasks, at logarithmically spaced updates.
    """

    stream: Stream
    data: Data = Data()
    network: Mapping[str, Any] = field(default_factory=lambda: {"name": "mlp-relu", "hidden": [100, 100]})
    training: Training = Training()
    remedies: tuple[Remedy, ...] = ()
    control_every: int = 1
    checkpoint_every: int = 1
    inside: int = 0

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "setting")
        check_kinds(type(self.stream), vars(self.stream), "stream")
        for name in ("control_every", "checkpoint_every", "inside"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is a number from 0 on, 0 for never; got {getattr(self, name)}")
        names = [remedy.name for remedy in self.remedies]
        if len(set(names)) < len(names):
            raise UsageError(f"each remedy can act once; got {', '.join(names)}")

    @property
    def architecture(self) -> dict[str, Any]:
        """Name and settings of the network with the remedies that change it."""
        settings = dict(self.network)
        for remedy in self.remedies:
            settings = remedy.architecture(settings)
        return settings

    def has_control(self, task: int) -> bool:
        """Whether a newly initialised network is trained on a task besides.

        Args:
            task: Its index.
        """
        wanted = self.control_every and (task % self.control_every == 0 or task == self.stream.tasks - 1)
        return task > 0 and bool(wanted)

    def has_checkpoints(self, task: int) -> bool:
        """Whether weights are kept at the start of a task (and inside it).

        Args:
            task: Its index; the number of tasks stands for the end of the last one.
        """
        return bool(self.checkpoint_every) and (task % self.checkpoint_every == 0 or task == self.stream.tasks)

    def changed(self, changes: Mapping[str, Any]) -> "Setting":
        """The setting with some of its values replaced, all at once, so that values that depend on each other can change together.

        Args:
            changes: New values by dotted name: "training.epochs", "stream.tasks", "network.width", "data.name", "control_every". Lists stand
                for tuples, and a single value for a tuple of one. A part that is replaced whole ("network") is so before its values.

        Raises:
            UsageError: No such name, or a value that cannot be.
        """
        return _replaced(self, "", changes)


def written(setting: Setting) -> dict[str, Any]:
    """A setting as JSON.

    Args:
        setting: The setting.
    """
    training = {**vars(setting.training), "optimizer_settings": dict(setting.training.optimizer_settings)}
    plain = {
        "stream": {"name": setting.stream.name, **asdict(setting.stream)},  # type: ignore[call-overload]
        "data": asdict(setting.data),
        "network": dict(setting.network),
        "training": training,
        "remedies": [remedies_package.written(remedy) for remedy in setting.remedies],
        "control_every": setting.control_every,
        "checkpoint_every": setting.checkpoint_every,
        "inside": setting.inside,
    }
    return json.loads(json.dumps(plain))


def read(entry: Mapping[str, Any]) -> Setting:
    """The setting that `written` wrote.

    Args:
        entry: The JSON object, with all parts of a setting. Inside a part, values that are left out have their defaults.

    Raises:
        UnknownNameError: A stream or a remedy that is not there.
        UsageError: It is none, or a value in it cannot be.
    """
    parts = dict(as_object(entry, "a setting"))
    names = [part.name for part in dataclasses.fields(Setting)]
    if missing := [name for name in names if name not in parts]:
        raise UsageError(f"a setting has the parts {', '.join(names)}; got none of the name {', '.join(missing)}")
    stream, training = dict(as_object(parts["stream"], "stream")), dict(as_object(parts["training"], "training"))
    name = stream.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f'a stream is written as {{"name": ..., and its settings}}, got {parts["stream"]!r}')
    if isinstance(own := training.get("optimizer_settings"), Mapping):
        training["optimizer_settings"] = {key: tupled(value) for key, value in own.items()}
    if not isinstance(parts["remedies"], list):
        raise UsageError(f"remedies should be a list, got {parts['remedies']!r}")
    parts["stream"] = stream_named(name, **stream)
    parts["data"] = made(Data, "data", as_object(parts["data"], "data"))
    parts["training"] = made(Training, "training", training)
    parts["remedies"] = tuple(remedies_package.read(as_object(remedy, "a remedy")) for remedy in parts["remedies"])
    return made(Setting, "a setting", parts)


def stream_named(name: str, /, **settings: Any) -> Stream:
    """A stream by name.

    Args:
        name: A name of `STREAMS`.
        settings: Its settings; lists stand for tuples.

    Raises:
        UnknownNameError: No such stream.
        UsageError: Settings that it does not have or that cannot be.
    """
    if name not in STREAMS:
        raise UnknownNameError("stream", name, STREAMS)
    return made(STREAMS[name], f"the stream {name}", settings)


def _replaced(part: Any, path: str, changes: Mapping[str, Any]) -> Any:
    """A part of a setting with the values of some dotted names replaced at once; `path` is its own name and a dot."""
    grouped: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        first, dot, rest = name.partition(".")
        if not first or (dot and not rest):
            raise UsageError(
                f"a setting has no {path + name!r}; names are joined by single dots, as in training.epochs"
            )
        grouped.setdefault(first, {})[rest] = value
    if isinstance(part, Mapping):
        return {**part, **{name: _new(part.get(name), f"{path}{name}.", own) for name, own in grouped.items()}}
    known = [entry.name for entry in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
    if unknown := [name for name in grouped if name not in known]:
        instead = f"expected one of {', '.join(known)}" if known else f"{path[:-1]} has no parts"
        raise UsageError(f"a setting has no {', '.join(repr(path + name) for name in unknown)}: {instead}")
    values = {name: _new(getattr(part, name), f"{path}{name}.", own) for name, own in grouped.items()}
    for name, value in values.items():
        value = tupled(value)
        values[name] = (value,) if isinstance(getattr(part, name), tuple) and not isinstance(value, tuple) else value
    check_kinds(type(part), values, path[:-1] or "setting")
    return dataclasses.replace(part, **values)  # type: ignore[type-var]


def _new(now: Any, path: str, changes: Mapping[str, Any]) -> Any:
    """A value after changes to it, by the rest of their dotted names: none for the whole, which comes before its parts."""
    now = changes.get("", now)
    parts = {name: value for name, value in changes.items() if name}
    return _replaced(now, path, parts) if parts else now
