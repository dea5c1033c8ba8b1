"""What to draw of how tasks went, as data: every configuration's courses, beside newly initialised networks, from the rows of traces."""

from collections.abc import Iterable
from dataclasses import replace

from plasticity_probe.prediction.panel import Panel
from plasticity_probe.report.courses import CourseFigure, Examples, courses
from plasticity_probe.report.verdicts import CONFIGURATIONS, names
from plasticity_probe.report.wording import counted
from plasticity_probe.trace.layout import Row
from plasticity_probe.trace.outcome_rows import outcomes_of_rows
from plasticity_probe.training.outcomes import OK, Outcome
from plasticity_probe.training.summary import scored_by_loss

KINDS: tuple[tuple[str, Examples], ...] = (("trainability", "task"), ("generalisation", "test"))


def course_figures(rows: Iterable[Row], panel: Panel) -> dict[str, list[CourseFigure]]:
    """The outcomes of every configuration by task, for each kind of plasticity that has any.

    Accuracies and losses are never in one figure.

    Args:
        rows: Rows of the traces.
        panel: What was made of them.
    """
    every = _by_configuration(rows, panel)
    own = dict(list(every.items())[:CONFIGURATIONS])
    left_out = len(every) - len(own)
    found: dict[str, list[CourseFigure]] = {}
    for kind, examples in KINDS:
        for by_loss in (False, True):
            field = f"{'test_' * (examples == 'test')}{'loss' if by_loss else 'accuracy'}"
            settings = {
                label: outcomes
                for label, outcomes in own.items()
                if scored_by_loss(outcomes) is by_loss and any(_known(o, field) for o in outcomes)
            }
            if not settings:
                continue
            runs = len({(label, o.seed) for label, outcomes in settings.items() for o in outcomes})
            drawn = courses(settings, examples=examples)
            said = f"{counted(runs, 'run')} of {counted(len(settings), 'configuration')}. {drawn.caption}"
            more = f" The first {len(own)} of {len(every)} configurations are drawn." if left_out > 0 else ""
            found.setdefault(kind, []).append(replace(drawn, caption=said + more))
    return found


def _by_configuration(rows: Iterable[Row], panel: Panel) -> dict[str, list[Outcome]]:
    """Outcomes by configuration. Runs of several traces may have the same seed, so each run counts as a seed of its own."""
    labels = names(panel.configurations)
    at = {run: number for number, run in enumerate(panel.runs)}
    found: dict[str, list[Outcome]] = {label: [] for label in labels}
    for run, outcomes in outcomes_of_rows(rows).items():
        label = labels[int(panel.configuration_of[at[run]])]
        found[label] += [replace(outcome, seed=at[run]) for outcome in outcomes]
    return {label: outcomes for label, outcomes in found.items() if outcomes}


def _known(outcome: Outcome, field: str) -> bool:
    value = getattr(outcome, field)
    return outcome.status == OK and outcome.network == "run" and value == value
