"""What to draw of an assessment, as data: which quantity predicts what, how far ahead, and which configuration kept its plasticity."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plasticity_probe.prediction.assessment import Assessment
from plasticity_probe.prediction.resampling import UNKNOWN, Interval
from plasticity_probe.prediction.verdict import LEADS, SMALLEST, Evidence, Judged, Verdict
from plasticity_probe.report.panels import Cloud, Estimates, Forest, Numbers, SignMap, Trail, VerdictFigure, scale_of
from plasticity_probe.report.wording import counted, shortened, told_apart
from plasticity_probe.training.summary import Mean, mean_of

PREDICTORS = 40
"""The most predictors of a figure (our choice: what fits a page); the tables have them all."""
CLOUDS = 6
"""The most predictors that are drawn against the outcome."""
TRAILS = 60
"""The most runs of such a panel: more would cover each other."""
CONFIGURATIONS = 12
"""The most configurations of a figure (our choice: colours and markers of more are hard to tell apart); the tables have them all."""
NAME = 44
"""The most characters of a name beside a figure."""
WITHIN, BETWEEN = "two checkpoints of a run", "two runs at the same task"


@dataclass(frozen=True)
class OutcomeWords:
    """An outcome in words.

    Args:
        kind: The kind of plasticity: "trainability" or "generalisation".
        what: What it is, as a noun phrase.
        axis: Name and units beside an axis.
    """

    kind: str
    what: str
    axis: str


def _words() -> dict[str, OutcomeWords]:
    found: dict[str, OutcomeWords] = {}
    for kind, of, share in (
        ("trainability", "on the task's own examples at its end", "share of its examples"),
        ("generalisation", "on test examples at the end of the task", "share of test examples"),
    ):
        for by_loss in (False, True):
            quantity, units = ("minus the loss", "loss") if by_loss else ("accuracy", share)
            name = f"{kind}{'_by_loss' * by_loss}"
            found[name] = OutcomeWords(kind, f"{quantity} {of}", f"{quantity} [{units}]")
            found[f"{name}_against_fresh"] = OutcomeWords(
                kind,
                f"{quantity} {of}, less that of a newly initialised network with the same task and budget",
                f"{quantity}, less that of a fresh network [{units}]",
            )
    return found


OUTCOME_WORDS: Mapping[str, OutcomeWords] = _words()


@dataclass(frozen=True)
class Course:
    """How one configuration fared: the first task with an outcome, the last one, and the change from one to the other.

    Args:
        configuration: Its name.
        first_task: Index of the first task with an outcome.
        last_task: Index of the last.
        first: Mean over the runs that have both, with its interval.
        last: The same at the last task.
        change: Mean over the same runs of last less first.
    """

    configuration: str
    first_task: int
    last_task: int
    first: Mean
    last: Mean
    change: Mean


def ranked(judged: Iterable[Judged]) -> list[Judged]:
    """Verdicts as a reader wants them: by verdict, and within by the size of the association.

    Args:
        judged: The verdicts on all predictors of an outcome.
    """
    order = list(Verdict)
    return sorted(judged, key=lambda j: (order.index(j.verdict), -_size(j.evidence.association.estimate.value)))


def studied(assessment: Assessment, outcome: str) -> str:
    """How many runs, configurations and tasks an outcome is known of, as a sentence."""
    panel = assessment.aligned.panel
    known = ~np.isnan(panel.outcomes[outcome])
    runs = known.any(axis=1)
    configurations = len({int(at) for at in panel.configuration_of[runs]})
    return (
        f"{counted(int(runs.sum()), 'run')} of {counted(configurations, 'configuration')}, "
        f"{counted(int(known.any(axis=0).sum()), 'task')}."
    )


def forest_figure(assessment: Assessment, outcome: str) -> VerdictFigure | None:
    """The association of every predictor at equal task and history with its interval, coloured by verdict.

    Args:
        assessment: The verdicts.
        outcome: Name of the outcome.

    Returns:
        None where nothing could be assessed.
    """
    assessed = [j for j in ranked(assessment.judged[outcome]) if j.verdict is not Verdict.NOT_ASSESSED]
    shown = assessed[:PREDICTORS]
    if not shown:
        return None
    found = [j.evidence.association.estimate for j in shown]
    values, low, high = columns(found)
    kinds = [verdict for verdict in Verdict if any(j.verdict is verdict for j in shown)]
    estimates: list[Estimates] = []
    for verdict in kinds:
        own = np.array([j.verdict is verdict for j in shown])
        estimates.append(Estimates(verdict, verdict, *(np.where(own, v, np.nan) for v in (values, low, high))))
    reach = min(1.0, max(1.5 * SMALLEST, 1.06 * float(np.nanmax(np.abs([low, high, values])))))
    panel = Forest(
        "",
        "rank correlation at equal task and history [1]",
        names([j.evidence.predictor for j in shown]),
        tuple(estimates),
        notes=tuple(f"q {probability(j.q)}, gain {percent(j.evidence.gain.value)}" for j in shown),
        reference=0.0,
        shaded=(-SMALLEST, SMALLEST),
        limits=(-reach, reach),
    )
    caption = [
        studied(assessment, outcome),
        f"Dot: rank correlation ρ of the predictor at the start of a task with {what(outcome)}, between runs of a configuration "
        "at the same "
        "task, freed from the outcomes before it; whisker: its 95 % bootstrap interval over runs. "
        f"Shaded: |ρ| < {SMALLEST:g}, the smallest association of interest. At the right: q (p after control of the false "
        "discovery rate), and the "
        "share of the squared error that the predictor saves on left-out runs.",
        left_out(len(assessed), len(shown)),
        _unassessed(assessment.judged[outcome]),
    ]
    return VerdictFigure(f"{outcome}-forest", f"What goes with {said(outcome)}", (panel,), joined(caption))


def lead_figure(assessment: Assessment, outcome: str) -> VerdictFigure | None:
    """The association of every predictor at every lead.

    Args:
        assessment: The verdicts.
        outcome: Name of the outcome.

    Returns:
        None where nothing could be assessed.
    """
    assessed = [j for j in ranked(assessment.judged[outcome]) if j.evidence.leads]
    shown = assessed[:PREDICTORS]
    known = [lead for lead in LEADS if any(not math.isnan(_at(j.evidence, lead).value) for j in shown)]
    if not known:
        return None
    table = [[_at(j.evidence, lead) for lead in known] for j in shown]
    panel = SignMap(
        "",
        "lead: tasks between measurement and outcome",
        tuple("after" if lead < 0 else str(lead) for lead in known),
        names([j.evidence.predictor for j in shown]),
        np.array([[e.value for e in line] for line in table]),
        np.array([[e.low > 0 or e.high < 0 for e in line] for line in table]),
        "rank correlation [1]",
        separated=0 if known[0] < 0 else None,
    )
    caption = [
        studied(assessment, outcome),
        f"Rank correlation with {what(outcome)} at equal task and history, by lead: the predictor was measured so many tasks "
        "before the one "
        "that the outcome is of, at its start. The verdict uses lead 0 alone; “after” is a control, where the predictor was "
        "measured after the "
        "outcome. Star: the 95 % bootstrap interval over runs excludes 0, without correction for the number of cells. Grey: unknown.",
        left_out(len(assessed), len(shown)),
    ]
    return VerdictFigure(f"{outcome}-leads", f"How far ahead: {said(outcome)}", (panel,), joined(caption))


def scatter_figure(assessment: Assessment, outcome: str) -> VerdictFigure | None:
    """A few predictors against the outcome: the strongest, and of each other probe its strongest.

    Args:
        assessment: The verdicts.
        outcome: Name of the outcome.

    Returns:
        None where no predictor is known together with the outcome.
    """
    chosen = _chosen(assessment.judged[outcome])
    panel, y = assessment.aligned.panel, assessment.aligned.panel.outcomes[outcome]
    runs = _spread_over(assessment)
    labels = configuration_names(assessment)
    clouds: list[Cloud] = []
    for judged in chosen:
        name = judged.evidence.predictor
        x = panel.predictors[name]
        known = ~np.isnan(x) & ~np.isnan(y) & np.isfinite(x)
        trails = tuple(
            Trail(
                labels[at := int(panel.configuration_of[run])],
                at,
                x[run, known[run]],
                y[run, known[run]],
            )
            for run in runs
            if known[run].any()
        )
        if trails:
            scale = scale_of(*(trail.x for trail in trails))
            title = f"{judged.verdict}: {number_of(judged.evidence.association.estimate)}"
            clouds.append(Cloud(title, shortened(name, NAME), OUTCOME_WORDS[outcome].axis, trails, scale))
    if not clouds:
        return None
    caption = [
        studied(assessment, outcome),
        f"Each dot: one task of one run, the predictor at its start and {what(outcome)}; thin lines join the tasks of a run in "
        "their order. Above: the "
        "verdict, and the rank correlation at equal task and history with its 95 % interval where it is known. Drawn: the "
        "predictor with the largest, and of each other probe "
        "the one with its largest.",
        f"{len(runs)} of {len(panel.runs)} runs are drawn." if len(runs) < len(panel.runs) else "",
    ]
    return VerdictFigure(
        f"{outcome}-scatter", f"Predictor and outcome: {said(outcome)}", tuple(clouds), joined(caption)
    )


def ranking_figure(assessment: Assessment, outcome: str) -> VerdictFigure | None:
    """How often each predictor, and the dull baselines, put two checkpoints in the order of their outcomes.

    Args:
        assessment: The verdicts.
        outcome: Name of the outcome.

    Returns:
        None where nothing could be ranked.
    """
    measured = [j.evidence for j in assessment.judged[outcome] if not math.isnan(j.evidence.ranking.value)]
    measured.sort(key=lambda e: -e.ranking.value)
    dull = [e for e in assessment.dull[outcome] if not math.isnan(e.ranking.value)]
    shown = [*measured[:PREDICTORS], *dull]
    if not shown:
        return None
    estimates = (
        Estimates(WITHIN, "within", *columns([e.ranking for e in shown])),
        Estimates(BETWEEN, "between", *columns([e.ranking_at_equal_task for e in shown])),
    )
    panel = Forest(
        "",
        "share of pairs that are ordered rightly [1]",
        names([e.predictor for e in shown]),
        estimates,
        beside=True,
        groups=(*["measured"] * (len(shown) - len(dull)), *["known without measuring"] * len(dull)),
        reference=0.5,
    )
    caption = [
        studied(assessment, outcome),
        f"Share of pairs of checkpoints that the predictor puts in the order of {what(outcome)} (Wang et al. 2026); .5 is "
        "guessing. Whether high "
        "values are good or bad is learned from the other runs. Whiskers: 95 % bootstrap intervals over runs. A predictor that "
        "merely drifts "
        "orders the checkpoints of a run as well as the number of the task does; at the same task that is of no help.",
        left_out(len(measured), min(len(measured), PREDICTORS)),
    ]
    return VerdictFigure(f"{outcome}-ranking", f"Ranking accuracy: {said(outcome)}", (panel,), joined(caption))


def courses_of(assessment: Assessment, outcome: str) -> list[Course]:
    """First task, last task and change of every configuration that has at least one run with two outcomes; the best change first.

    Args:
        assessment: The verdicts.
        outcome: Name of the outcome.
    """
    panel, values = assessment.aligned.panel, assessment.aligned.panel.outcomes[outcome]
    found: list[Course] = []
    for name, group in zip(panel.configurations, panel.groups, strict=True):
        own = values[group]
        known = np.flatnonzero(~np.isnan(own).all(axis=0))
        if known.size < 2:
            continue
        first, last = own[:, known[0]], own[:, known[-1]]
        both = ~np.isnan(first) & ~np.isnan(last)
        if both.any():
            means = (mean_of(v[both].tolist()) for v in (first, last, last - first))
            found.append(Course(name, panel.tasks[known[0]], panel.tasks[known[-1]], *means))
    return sorted(found, key=lambda course: -course.change.value)


def side_by_side_figure(assessment: Assessment, outcome: str) -> VerdictFigure | None:
    """Configurations side by side: the outcome at the first and at the last task, and the change.

    Args:
        assessment: The verdicts.
        outcome: Name of the outcome.

    Returns:
        None where no run has two outcomes.
    """
    found = courses_of(assessment, outcome)
    shown = found[: 3 * CONFIGURATIONS]
    if not shown:
        return None
    labels = names([course.configuration for course in shown])
    ends = tuple(
        Estimates(f"{label} task", label, *_mean_columns([getattr(course, label) for course in shown]))
        for label in ("first", "last")
    )
    change = (Estimates("change", "change", *_mean_columns([course.change for course in shown])),)
    same = {(course.first_task, course.last_task) for course in shown}
    notes = tuple(
        counted(c.change.count, "run") + ("" if len(same) == 1 else f", tasks {c.first_task}, {c.last_task}")
        for c in shown
    )
    axis = OUTCOME_WORDS[outcome].axis
    tasks = "First task: {}, last task: {} (the first of all is 0).".format(*next(iter(same))) if len(same) == 1 else ""
    caption = [
        studied(assessment, outcome),
        tasks,
        "Dots and whiskers: means over the runs of a configuration that have both, and their 95 % Student-t intervals; the "
        "change is that of each "
        "run, so its interval may exclude 0 where the two others overlap. Above 0, plasticity was gained.",
        left_out(len(found), len(shown), "configurations"),
    ]
    panels = (
        Forest("at the first and the last task", axis, labels, ends, beside=True),
        Forest("change from first to last", axis, labels, change, notes=notes, reference=0.0),
    )
    return VerdictFigure(
        f"{outcome}-configurations", f"Configurations side by side: {said(outcome)}", panels, joined(caption)
    )


def configuration_names(assessment: Assessment) -> tuple[str, ...]:
    """The configurations' names, short enough for a legend and still told apart."""
    return names(assessment.aligned.panel.configurations)


def names(full: Sequence[str]) -> tuple[str, ...]:
    """Names short enough to stand beside a figure, still told apart.

    Args:
        full: The names.
    """
    return tuple(shortened(name, NAME) for name in full) if len(full) < 2 else told_apart(full, NAME)


def probability(value: float) -> str:
    """A p or q as it is printed."""
    return "–" if math.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def percent(value: float) -> str:
    """A share in percent."""
    return "–" if math.isnan(value) else f"{100 * value:z.1f} %".replace("-", "−")


def signed(value: float) -> str:
    """A correlation or a change as it is printed."""
    return "–" if math.isnan(value) else f"{value:+z.2f}".replace("-", "−")


def number_of(found: Interval) -> str:
    """An estimate with the ends of its 95 % interval."""
    return "–" if math.isnan(found.value) else f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}]"


def _size(value: float) -> float:
    return -1.0 if math.isnan(value) else abs(value)


def _at(evidence: Evidence, lead: int) -> Interval:
    return evidence.leads.get(lead, UNKNOWN)


def columns(found: Sequence[Interval]) -> tuple[Numbers, Numbers, Numbers]:
    """Estimates, lower and upper ends of their 95 % intervals, each of shape (n,)."""
    table = np.array([(e.value, e.low, e.high) for e in found], dtype=float).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _mean_columns(found: Sequence[Mean]) -> tuple[Numbers, Numbers, Numbers]:
    table = np.array([(m.value, m.low, m.high) for m in found], dtype=float).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _chosen(judged: Sequence[Judged]) -> list[Judged]:
    """The strongest predictor, then the strongest of each other probe, then what is strongest of the rest."""
    known = [j for j in judged if j.evidence.places > 0]
    by_size = sorted(known, key=lambda j: -_size(j.evidence.association.estimate.value))
    best: dict[str, Judged] = {}
    for j in by_size:
        best.setdefault(probe_of(j.evidence), j)
    rest = [j for j in by_size if j not in best.values()]
    return [*best.values(), *rest][:CLOUDS]


def probe_of(evidence: Evidence) -> str:
    """The label of the probe that measured a predictor."""
    return evidence.predictor.split(".", 1)[0]


def _spread_over(assessment: Assessment) -> list[int]:
    """The runs that are drawn: of each configuration alike many, the first ones."""
    panel = assessment.aligned.panel
    groups = panel.groups[:CONFIGURATIONS]
    each = max(1, TRAILS // max(len(groups), 1))
    return [int(run) for group in groups for run in group[:each]]


def what(outcome: str) -> str:
    """The outcome with what it is, as a noun phrase."""
    return f"the outcome ({OUTCOME_WORDS[outcome].what})"


def said(outcome: str) -> str:
    """The outcome's name in words."""
    return outcome.replace("_", " ")


def left_out(known: int, shown: int, what: str = "predictors") -> str:
    """How many of them a figure shows, as a sentence; empty where it is all."""
    return "" if known == shown else f"The first {shown} of {known} {what} are drawn; the tables have all."


def _unassessed(judged: Sequence[Judged]) -> str:
    count = sum(j.verdict is Verdict.NOT_ASSESSED for j in judged)
    return (
        f"{counted(count, 'predictor')} could not be assessed and {'is' if count == 1 else 'are'} not drawn."
        if count
        else ""
    )


def joined(parts: Iterable[str]) -> str:
    """Sentences as one text; empty ones are left out."""
    return " ".join(filter(None, parts))
