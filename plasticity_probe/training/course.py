"""Where a group of seeds stands on its way through a stream: everything that a kill must not lose, as tensors and JSON and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from plasticity_probe.training.fitting import Learner, Place, Tally, new_learner
from plasticity_probe.training.outcomes import DIVERGED, Outcome, as_json, outcome_of
from plasticity_probe.training.run_plan import RunPlan
from plasticity_probe.training.seeding import derived_seed


@dataclass(eq=False)
class Course:
    """A group of seeds that is trained as one program.

    Args:
        seeds: Their seeds.
        learner: Their networks.
        control: Newly initialised networks on the task at hand, while they are trained.
        place: Where training stands.
        tally: What has been seen of the task at hand, once it is begun.
        outcomes: How the tasks before went.
    """

    seeds: tuple[int, ...]
    learner: Learner
    control: Learner | None = None
    place: Place = field(default_factory=Place)
    tally: Tally | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def lost(self) -> set[int]:
        """Seeds that have diverged."""
        return {o.seed for o in self.outcomes if o.status == DIVERGED and o.network == "run"}

    @property
    def alive(self) -> bool:
        """Whether a seed is left that has not diverged."""
        return len(self.lost) < len(self.seeds)


def new_course(plan: RunPlan, seeds: tuple[int, ...]) -> Course:
    """A group of seeds before its first update.

    Args:
        plan: The run.
        seeds: Their seeds.
    """
    return Course(seeds, new_learner(plan.setting, plan.drawn, seeds, plan.device))


def new_control(plan: RunPlan, course: Course) -> Learner:
    """Newly initialised networks for the task at hand, drawn from the seeds and the task.

    Args:
        plan: The run.
        course: Where it stands.
    """
    alone = [derived_seed(seed, "control", course.place.task) for seed in course.seeds]
    return new_learner(plan.setting, plan.drawn, alone, plan.device)


def as_saved(course: Course) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A course as tensors by name and as JSON.

    Args:
        course: Where it stands.
    """
    tensors = _named(course.learner, "run")
    if course.control is not None:
        tensors |= _named(course.control, "control")
    if course.tally is not None:
        tensors |= {f"tally/{name}": values for name, values in course.tally.sums.items()}
    known = {
        **vars(course.place),
        "outcomes": [as_json(outcome) for outcome in course.outcomes],
        "reached": course.tally is not None and course.tally.reached,
    }
    return tensors, known


def take_up(course: Course, plan: RunPlan, tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
    """Goes on where another process stood.

    Args:
        course: A new course of the same seeds; changed in place.
        plan: The run.
        tensors: What `as_saved` gave there.
        known: The JSON that it gave.
    """
    here = {name: tensor.to(plan.device) for name, tensor in tensors.items()}
    place = dict(known)
    course.outcomes = [outcome_of(entry) for entry in place.pop("outcomes")]
    reached = place.pop("reached")
    course.place = Place(**place)
    _remember(course.learner, here, "run")
    if any(name.startswith("control/") for name in here):
        course.control = new_control(plan, course)
        _remember(course.control, here, "control")
    sums = {name.removeprefix("tally/"): values for name, values in here.items() if name.startswith("tally/")}
    course.tally = Tally(sums, reached) if sums else None


def _named(learner: Learner, prefix: str) -> dict[str, Tensor]:
    held = {f"{prefix}/networks/{name}": tensor for name, tensor in learner.networks.memory().items()}
    for number, memory in enumerate(learner.memories):
        held |= {f"{prefix}/remedies/{number}/{name}": tensor for name, tensor in memory.items()}
    return held


def _remember(learner: Learner, tensors: Mapping[str, Tensor], prefix: str) -> None:
    own = {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
    learner.networks.remember({n.removeprefix("networks/"): t for n, t in own.items() if n.startswith("networks/")})
    for number, memory in enumerate(learner.memories):
        start = f"remedies/{number}/"
        memory.update({name.removeprefix(start): t for name, t in own.items() if name.startswith(start)})
