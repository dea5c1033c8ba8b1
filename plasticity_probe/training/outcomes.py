"""How a network learned a task, as plain numbers; written and read without torch."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from plasticity_probe.errors import RunError
from plasticity_probe.training.kinds import as_object, made

OK, DIVERGED = "ok", "diverged"


@dataclass(frozen=True)
class Outcome:
    """How well one task was learned.

    Of a task that is learned to values, accuracies are NaN; of one without test examples, the test numbers are. After a divergence all are.

    Args:
        seed: Seed of the run.
        task: The task's index.
        name: The task's name.
        network: "run" for the network that learned the tasks before, "control" for a newly initialised one that is trained on this task
            alone, in the same way and for the same time. Task 0 has no control, because there the run itself starts anew.
        status: "ok", or "diverged" when weights or losses are no longer finite.
        step: Updates since the run began, at the end of the task.
        updates: Updates on this task.
        epochs: Passes over its examples.
        loss: Mean loss on its examples at its end, in eval mode.
        accuracy: Share of its examples predicted rightly at its end, in eval mode; 1 - accuracy is the outcome of Lewandowski et al. 2023.
        online_loss: Mean loss of each example before the update on it, over all epochs.
        online_accuracy: Share predicted rightly before the update on them, over all epochs: the average online task accuracy of Kumar et al.
            2023. It falls also where only the start of each task becomes worse.
        first_epoch_loss: Mean loss before the update over the first epoch.
        updates_to_threshold: Updates after which, for the first time, the online accuracy of an epoch (for values: its online loss) had
            reached the threshold of the setting; NaN where it never did.
        test_loss: Mean loss on the test examples, averaged over the last epochs that the setting names.
        test_accuracy: Share of test examples predicted rightly, averaged in the same way.
    """

    seed: int
    task: int
    name: str
    network: Literal["run", "control"]
    status: Literal["ok", "diverged"]
    step: int
    updates: int
    epochs: int
    loss: float
    accuracy: float
    online_loss: float
    online_accuracy: float
    first_epoch_loss: float
    updates_to_threshold: float
    test_loss: float
    test_accuracy: float


NUMBERS = tuple(field.name for field in fields(Outcome) if field.type is float)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON: what is not finite is null.

    Args:
        outcome: The outcome.
    """
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(outcome).items()}


def outcome_of(entry: dict[str, Any]) -> Outcome:
    """The outcome that `as_json` wrote; numbers that are null are NaN.

    Args:
        entry: The JSON object.

    Raises:
        UsageError: It is none.
    """
    values = as_object(entry, "an outcome")
    read = {key: math.nan if value is None and key in NUMBERS else value for key, value in values.items()}
    return made(Outcome, "an outcome", read)


def read_outcomes(path: str | Path) -> tuple[Outcome, ...]:
    """The outcomes of a run, in order of seed, task and network.

    Args:
        path: A run folder, or the file of outcomes in it.

    Raises:
        RunError: There is none, or it is damaged.
    """
    file = Path(path) / "outcomes.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return in_order(outcome_of(json.loads(line)) for line in lines)
    except OSError as error:
        raise RunError(f"the outcomes {file} cannot be read: {error.strerror}; name the folder of a run") from error
    except ValueError as error:
        raise RunError(
            f"{file} is no file of outcomes: {error}; name the folder of a run that `probe train` wrote"
        ) from error


def in_order(outcomes: Iterable[Outcome]) -> tuple[Outcome, ...]:
    """Outcomes by seed, then task, the run before its control.

    Args:
        outcomes: Any outcomes.
    """
    return tuple(sorted(outcomes, key=lambda o: (o.seed, o.task, o.network == "control")))
