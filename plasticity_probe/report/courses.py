"""What to draw of training runs, as data: how well each task was learned, beside newly initialised networks. Needs neither torch nor matplotlib.

A setting is the outcomes of one run folder: one way of training, many seeds. Means and intervals are those of
`plasticity_probe.training.summary`, so figures and tables say the same.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from plasticity_probe.errors import RunError, UsageError
from plasticity_probe.report.panels import LINEAR, Curve, Dots, Figure, Numbers, Points, Role, Scale, drawable, scale_of
from plasticity_probe.report.wording import counted, plain, shortened
from plasticity_probe.training.outcomes import OK, Outcome, read_outcomes
from plasticity_probe.training.summary import Mean, TaskSummary, scored_by_loss, summarise

Examples = Literal["task", "test"]
Settings = Mapping[str, Sequence[Outcome]]

EVERY_CLASS = frozenset(
    {
        "class-pairs", "growing-chunks", "noisy-stages", "permuted-labels", "permuted-pixels", "random-labels", "random-subset",
        "smooth-transition", "two-stage",
    }
)  # fmt: skip
"""Streams whose every task has examples of all classes that the network has outputs for: guessing is right in one case of that many."""
RUN, CONTROL = "learned all tasks before", "newly initialised"
BANDS = 8
"""The most courses of a panel whose intervals are drawn as bands; more would cover each other, and have whiskers (our choice). So have
courses of fewer than three tasks, between which a band would show nothing that was measured."""


@dataclass(frozen=True, eq=False)
class Course:
    """How one setting fared from task to task.

    Args:
        label: Its entry in the legend.
        hue: Number of its colour and marker, the same in all panels of a figure.
        run: Means over seeds at the end of each task, and their 95 % intervals, of the networks that learned all tasks before.
        control: The same of newly initialised networks, on the tasks that have them; None where no task has.
    """

    label: str
    hue: int
    run: Curve
    control: Curve | None


@dataclass(frozen=True, eq=False)
class CoursePanel:
    """Courses against the number of the task.

    Args:
        title: What sets this panel apart; empty for a single one.
        courses: In the order of drawing.
    """

    title: str
    courses: tuple[Course, ...]


@dataclass(frozen=True, eq=False)
class CourseFigure:
    """Panels with the same axes and one legend.

    Args:
        name: What its file is called, before it is made safe.
        title: One line above it.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        units: Its units.
        panels: From left to right, then down.
        caption: What lines, bands and dashes are, and what was left out.
        chance: Height of a dotted line: what guessing reaches; None for no line.
        scale: Layout of the vertical axis.
        limits: Lower and upper end of the vertical axis.
        x_limits: Left and right end of the horizontal axis.
        banded: Whether intervals are bands; otherwise whiskers.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    units: str
    panels: tuple[CoursePanel, ...]
    caption: str
    chance: float | None
    scale: Scale
    limits: tuple[float, float]
    x_limits: tuple[float, float]
    banded: bool


def courses(
    settings: Settings, *, title: str = "", examples: Examples = "task", chance: float | None = None
) -> CourseFigure:
    """Settings in one panel: the score at the end of each task as a mean over seeds with its interval, beside controls where there are some.

    The score is the share of examples predicted rightly, or for tasks that are learned to values the squared error.

    Args:
        settings: Outcomes by label.
        title: One line above; says what is shown where it is empty.
        examples: "task" for the examples that were learned (trainability), "test" for test examples (generalisation).
        chance: What guessing reaches, such as 1 / classes; None where nobody knows.

    Raises:
        UsageError: There is no finite score to draw, or some settings are scored by accuracy and others by loss.
    """
    return course_grid({"": settings}, title=title, examples=examples, chance=chance)


def course_grid(
    groups: Mapping[str, Settings], *, title: str = "", examples: Examples = "task", chance: float | None = None
) -> CourseFigure:
    """Small multiples: a panel for each group, such as an activation function, and a line in it for each setting, such as a remedy.

    Args:
        groups: Outcomes by label, by the title of the panel. A label has the same colour in all panels.
        title: As in `courses`.
        examples: As in `courses`.
        chance: As in `courses`.

    Raises:
        UsageError: As in `courses`.
    """
    score = _score(groups, examples)
    hues = {label: at for at, label in enumerate(dict.fromkeys(label for own in groups.values() for label in own))}
    means: list[Mean] = []
    panels: list[CoursePanel] = []
    for name, settings in groups.items():
        tasks = {label: summarise(outcomes) for label, outcomes in settings.items()}
        means += [score.of(task)[0] for own in tasks.values() for task in own]
        found = (_course(label, hues[label], own, settings[label], score) for label, own in tasks.items())
        panels.append(CoursePanel(name, tuple(found)))
    curves = [c for panel in panels for course in panel.courses for c in (course.run, course.control) if c is not None]
    known = [float(x) for curve in curves for x in curve.x[~np.isnan(curve.y)]]
    if not known:
        raise UsageError(
            f"expected a finite {score.words} of some task to draw, got none; outcomes of a training that diverged, or without such examples, "
            "have none"
        )
    chance = None if score.by_loss else chance
    scale = scale_of(*(curve.y for curve in curves)) if score.by_loss else LINEAR
    low, high, near = _limits(curves, scale, score.by_loss, chance)
    banded = max(len(panel.courses) for panel in panels) <= BANDS and len(set(known)) > 2
    caption = [
        _over_seeds(means, f"Lines and {'bands' if banded else 'whiskers'}"),
        _control_words(curves),
        _lost_words(groups),
        _far_words(chance, near),
    ]
    span = max(known) - min(known)
    pad = max(0.03 * span, 0.2)
    # Single controls under bands stand one beside the other, behind the task that they belong to.
    beside = 0.02 * span * max(len(panel.courses) for panel in panels) if banded else 0.0
    return CourseFigure(
        f"course-{score.field}".replace("_", "-"),
        title or _sentence(f"{score.words} along {counted(int(max(known)) + 1, 'task')}"),
        "task (the first is 0)",
        score.axis,
        score.units,
        tuple(panels),
        " ".join(filter(None, caption)),
        near,
        scale,
        (low, high),
        (min(known) - pad, max(known) + pad + beside),
        banded,
    )


def final_scores(
    groups: Mapping[str, Settings], *, title: str = "", examples: Examples = "task", chance: float | None = None
) -> Figure:
    """A line for each setting under the heading of its group: the score at the end of its last task, beside newly initialised networks.

    Args:
        groups: Outcomes by label, by heading; an empty heading is not drawn where it is the only one.
        title: As in `courses`.
        examples: As in `courses`.
        chance: Where a vertical line stands; as in `courses`.

    Returns:
        A figure that `plasticity_probe.report.draw.draw` draws.

    Raises:
        UsageError: As in `courses`.
    """
    score = _score(groups, examples)
    lines = [(group, label, own) for group, settings in groups.items() for label, own in settings.items()]
    last = [_last(own) for _, _, own in lines]
    runs, controls = ([score.of(s)[part] if s else NOTHING for s in last] for part in (0, 1))
    if not any(mean.count for mean in runs):
        raise UsageError(
            f"expected a finite {score.words} of some setting's last task to draw, got none; all trainings diverged or have no such examples"
        )
    points = [_points(RUN, "mean", runs)]
    if any(mean.count for mean in controls):
        points.insert(0, _points(CONTROL, "fresh", controls))
    places = [(f"task {s.task}" if s else "no task", counted(m.count, "seed")) for s, m in zip(last, runs, strict=True)]
    alike = len(set(places)) == 1
    chance = None if score.by_loss else chance
    shown = [v for p in points for v in (p.values, p.lower, p.upper) if v is not None]
    scale = scale_of(*shown) if score.by_loss else LINEAR
    near = _near(chance, *(float(end(np.concatenate(shown))) for end in (np.nanmin, np.nanmax)))
    caption = [
        f"Last task: {places[0][0].removeprefix('task ')}." if alike else "",
        _over_seeds(runs, "Dots and whiskers"),
        "Hollow: newly initialised networks, trained on that task alone." if len(points) > 1 else "",
        "" if alike else "At the right: the last task, and the seeds that count.",
        "" if near is None else f"Grey line: chance level, {near:.3g}.",
        _far_words(chance, near),
        _lost_words(groups),
    ]
    return Figure(
        f"final-{score.field}".replace("_", "-"),
        title or _sentence(f"{score.words} on the last task"),
        (
            Dots(
                "",
                f"{score.axis} ({score.units})",
                tuple(label for _, label, _ in lines),
                tuple(points),
                scale,
                () if list(groups) == [""] else tuple(group for group, _, _ in lines),
                () if alike else tuple(", ".join(place) for place in places),
                near,
            ),
        ),
        " ".join(filter(None, caption)),
    )


def run_figures(folder: Path) -> list[CourseFigure]:
    """The figures of one run folder: the course of the score beside newly initialised networks, and of the test score where there is one.

    Args:
        folder: The run folder, finished or not.

    Returns:
        None where no network finished a task with finite weights.

    Raises:
        RunError: The folder holds no run, or it is damaged.
    """
    outcomes = read_outcomes(folder)
    name, chance = _described(folder)
    kinds: tuple[Examples, Examples] = "task", "test"
    scores: list[tuple[Examples, _Score]] = [(kind, _score({"": {RUN: outcomes}}, kind)) for kind in kinds]
    return [
        courses({RUN: outcomes}, examples=kind, chance=chance, title=f"{name}: {score.words} by task")
        for kind, score in scores
        if any(math.isfinite(getattr(outcome, score.field)) for outcome in outcomes)
    ]


@dataclass(frozen=True)
class _Score:
    """What is drawn of a task: `words` as in a sentence, `axis` and `units` as beside an axis."""

    by_loss: bool
    words: str
    axis: str
    units: str
    test: bool

    @property
    def field(self) -> str:
        """Its name in an outcome."""
        return f"{'test_' * self.test}{'loss' if self.by_loss else 'accuracy'}"

    def of(self, task: TaskSummary) -> tuple[Mean, Mean]:
        """Of the networks that learned all tasks before, and of newly initialised ones."""
        return (task.test, task.test_control) if self.test else (task.score, task.control)


NOTHING = Mean(np.nan, np.nan, 0)


def _score(groups: Mapping[str, Settings], examples: Examples) -> _Score:
    if examples not in ("task", "test"):
        raise UsageError(f'expected examples to be "task" or "test", got {examples!r}')
    kinds: dict[bool, str] = {}
    for settings in groups.values():
        for label, outcomes in settings.items():
            if any(outcome.status == OK for outcome in outcomes):
                kinds.setdefault(scored_by_loss(outcomes), label)
    if len(kinds) > 1:
        raise UsageError(
            f"expected settings that are scored alike, got {plain(kinds[False])!r} scored by accuracy and {plain(kinds[True])!r} by loss; draw "
            "them in figures of their own"
        )
    by_loss, test = True in kinds, examples == "test"
    quantity = ("test " * test) + ("squared error" if by_loss else "accuracy")
    units = "squared units of the targets" if by_loss else "share of test examples" if test else "share of its examples"
    return _Score(by_loss, quantity, f"{quantity} {'after' if test else 'at the end of'} the task", units, test)


def _course(label: str, hue: int, tasks: Sequence[TaskSummary], outcomes: Sequence[Outcome], score: _Score) -> Course:
    controlled = {outcome.task for outcome in outcomes if outcome.network == "control"}
    beside = [task for task in tasks if task.task in controlled]
    control = _curve(CONTROL, "fresh", beside, [score.of(task)[1] for task in beside])
    run = _curve(label, "mean", tasks, [score.of(task)[0] for task in tasks])
    return Course(label, hue, run, None if np.isnan(control.y).all() else control)


def _curve(label: str, role: Role, tasks: Sequence[TaskSummary], means: Sequence[Mean]) -> Curve:
    return Curve(label, role, np.array([float(task.task) for task in tasks]), *_values(means))


def _points(label: str, role: Role, means: Sequence[Mean]) -> Points:
    return Points(label, role, *_values(means))


def _values(means: Sequence[Mean]) -> tuple[Numbers, Numbers, Numbers]:
    """Means, lower and upper ends of their intervals, as an axis can hold them."""
    table = np.array([(mean.value, mean.low, mean.high) for mean in means], dtype=np.float64).reshape(-1, 3)
    value, low, high = (drawable(column) for column in table.T)
    return value, low, high


def _last(outcomes: Sequence[Outcome]) -> TaskSummary | None:
    index = max((outcome.task for outcome in outcomes), default=0)
    return next(iter(summarise([outcome for outcome in outcomes if outcome.task == index])), None)


def _limits(
    curves: Sequence[Curve], scale: Scale, by_loss: bool, chance: float | None
) -> tuple[float, float, float | None]:
    """The ends of the vertical axis, and the chance level where it is within."""
    ends = [v for curve in curves for v in (curve.y, curve.upper) if v is not None]
    # An interval of a positive quantity may reach below zero, where a logarithmic axis has no place: there it ends at the axis.
    lows = [c.lower if scale.kind == "linear" else np.maximum(c.lower, c.y / 10) for c in curves if c.lower is not None]
    shown = np.concatenate([*ends, *lows])
    shown = np.clip(shown[~np.isnan(shown)], 0, None if by_loss else 1)
    low, high = float(shown.min()), float(shown.max())
    near = _near(chance, low, high)
    if near is not None:
        low, high = min(low, near), max(high, near)
    if scale.kind == "log":
        pad = (high / low) ** 0.05
        return low / pad, high * pad, near
    pad = max(0.05 * (high - low), 0.02 * high if by_loss else 0.02) or 0.02
    return low if scale.kind == "symlog" else low - pad, high + pad, near


def _near(chance: float | None, low: float, high: float) -> float | None:
    """The chance level, unless an axis that reaches down to it would spend on that more than 0.1 and more than half of its length."""
    return chance if chance is not None and low - chance <= max(0.1, (high - chance) / 2) else None


def _far_words(chance: float | None, near: float | None) -> str:
    return f"Chance level, {chance:.3g}, lies below the axis." if chance is not None and near is None else ""


def _over_seeds(means: Iterable[Mean], marks: str) -> str:
    counts = {mean.count for mean in means if mean.count}
    if max(counts, default=0) < 2:
        return "One seed alone, so there are no intervals."
    least, most = min(counts), max(counts)
    return f"{marks}: means over {most if least == most else f'{least} to {most}'} seeds and their 95 % Student-t intervals."


def _control_words(curves: Sequence[Curve]) -> str:
    if not any(curve.role == "fresh" for curve in curves):
        return ""
    return "Dashed and hollow: newly initialised networks, trained on that task alone, in the same way and for the same time."


def _lost_words(groups: Mapping[str, Settings]) -> str:
    """Which seeds diverged: without them the mean is of the ones that did well."""
    lost: list[str] = []
    for group, settings in groups.items():
        for label, outcomes in settings.items():
            for network, noun in (("run", "seed"), ("control", "newly initialised network")):
                own = [o for o in outcomes if o.network == network]
                key: Any = (lambda o: o.seed) if network == "run" else (lambda o: (o.seed, o.task))
                astray, count = {key(o) for o in own if o.status != OK}, len({key(o) for o in own})
                if astray:
                    who = " ".join(filter(None, (group, label)))
                    lost.append(f"{shortened(who, 60)}: {len(astray)} of {counted(count, noun)}")
    return f"Diverged, and not in the means from then on: {shortened('; '.join(lost), 600)}." if lost else ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _described(folder: Path) -> tuple[str, float | None]:
    """The name of what a run folder's manifest says was trained, and the chance level."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        protocol, setting = manifest["protocol"] or folder.resolve().name, manifest["setting"]
        name = ", ".join([shortened(protocol, 60), *(remedy["name"] for remedy in setting["remedies"])])
        return name, _chance(setting["stream"]["name"], manifest["architecture"])
    except OSError as error:
        raise RunError(
            f"{folder} holds no training run: {file.name} cannot be read ({error.strerror}); name the folder of a run"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is not what `probe train` writes: {error!r}; name the folder of a run") from error


def _chance(stream: str, architecture: Mapping[str, Any]) -> float | None:
    """What guessing reaches where all classes are equally frequent; None where not every task has all classes, or there are none."""
    outputs = architecture["widths"][-1] if "widths" in architecture else architecture.get("classes", 0)
    return 1 / outputs if stream in EVERY_CLASS and outputs > 1 else None
