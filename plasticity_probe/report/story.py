"""What an assessment says, in plain sentences: the answer, what it rests on, and how to read it."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plasticity_probe.prediction.assessment import Assessment
from plasticity_probe.prediction.association import FEWEST_RUNS, FEWEST_TASKS
from plasticity_probe.prediction.resampling import DRAWS, EXCHANGES
from plasticity_probe.prediction.verdict import LEADS, LEVEL, MISSING, SMALLEST, Judged, Verdict
from plasticity_probe.report.verdicts import OUTCOME_WORDS, number_of, percent, probability, probe_of, ranked
from plasticity_probe.report.wording import counted, plain
from plasticity_probe.trace.layout import Row
from plasticity_probe.trace.outcome_rows import OUTCOMES

SYMBOLS: Mapping[Verdict, str] = {
    Verdict.PREDICTS: "●",
    Verdict.ACCOMPANIES: "▲",
    Verdict.DOES_NOT_PREDICT: "■",
    Verdict.REFUTED: "✖",
    Verdict.INCONCLUSIVE: "◇",
    Verdict.NOT_ASSESSED: "–",
}
"""The mark of each verdict, as in the figures."""
CURVATURE = ("hessian_spectrum", "fisher_rank")
"""Labels of the probes that measure curvature."""
_COUNTED: Mapping[Verdict, tuple[str, str]] = {
    Verdict.PREDICTS: ("predicts it", "predict it"),
    Verdict.ACCOMPANIES: ("accompanies it only", "accompany it only"),
    Verdict.DOES_NOT_PREDICT: ("does not predict it", "do not predict it"),
    Verdict.REFUTED: ("is refuted because its sign flips", "are refuted because their signs flip"),
    Verdict.INCONCLUSIVE: ("is inconclusive", "are inconclusive"),
    Verdict.NOT_ASSESSED: ("could not be assessed", "could not be assessed"),
}


@dataclass(frozen=True)
class Setting:
    """One configuration of a study.

    Args:
        name: Its name.
        runs: Number of its runs.
        outcomes: Number of its runs with outcomes.
        tasks: From which to which task anything is known of it; empty if nothing is.
        about: What it holds (protocol, stream, network, remedies), as far as the traces say.
    """

    name: str
    runs: int
    outcomes: int
    tasks: str
    about: str


@dataclass(frozen=True)
class Probed:
    """What one probe measured.

    Args:
        label: The probe's label.
        measurements: Number of measurements of checkpoints.
        good: How many of them ended well.
        on: Which data they were made on.
        examples: On how many examples.
    """

    label: str
    measurements: int
    good: int
    on: str
    examples: str


def question(assessment: Assessment) -> str:
    """What was asked, as a sentence."""
    count = len(assessment.aligned.panel.predictors)
    return (
        f"Asked was whether {counted(count, 'measured quantity').replace('quantitys', 'quantities')} tell, before a task is "
        "learned, how well it "
        "will be learned: beyond what the number of the task and the outcomes of earlier tasks tell already, and on runs that "
        "were left out."
    )


def answer(assessment: Assessment) -> list[tuple[str, str]]:
    """The answer in plain sentences; where nothing can be said, why, and what would change that.

    Args:
        assessment: The verdicts.

    Returns:
        For each outcome its name and the sentences on it; the name is empty where they are on all.
    """
    panel = assessment.aligned.panel
    if not panel.outcomes:
        return [
            (
                "",
                "Nothing can be said about prediction, because no outcome of any task is known. `probe analyze RUN --on next --trace FILE` of a "
                "run folder that `probe train` wrote keeps its outcomes in the trace. What was measured is shown below.",
            )
        ]
    if not panel.predictors:
        return [
            (
                "",
                "Nothing can be said about prediction, because nothing was measured on the weights that tasks were learned from. `probe analyze "
                "RUN --on next --trace FILE` measures them. How the tasks went is shown below.",
            )
        ]
    return [_of_outcome(outcome, judged) for outcome, judged in assessment.judged.items()]


def reasons(judged: Sequence[Judged]) -> str:
    """Why predictors could not be assessed, the most frequent reason first.

    Args:
        judged: The verdicts on all predictors of an outcome.
    """
    found = Counter(j.evidence.reason for j in judged if j.verdict is Verdict.NOT_ASSESSED).most_common()
    return "; ".join(f"{counted(count, 'predictor')}: {plain(reason)}" for reason, count in found)


def settings(rows: Sequence[Row], assessment: Assessment) -> list[Setting]:
    """The configurations of a study.

    Args:
        rows: Rows of the traces.
        assessment: What was made of them.
    """
    panel = assessment.aligned.panel
    about: dict[str, str] = {}
    for row in rows:
        if row.probe == OUTCOMES and row.run not in about:
            told = ((key, plain(row.conditions.get(key, ""))) for key in ("protocol", "stream", "network", "remedies"))
            about[row.run] = ", ".join(f"{key} {text}" for key, text in told if text)
    known = np.any([~np.isnan(v) for v in panel.outcomes.values()], axis=0) if panel.outcomes else None
    seen = [~np.isnan(v) for v in (*panel.outcomes.values(), *panel.predictors.values())]
    found: list[Setting] = []
    for name, group in zip(panel.configurations, panel.groups, strict=True):
        at = np.flatnonzero(np.any([s[group].any(axis=0) for s in seen], axis=0)) if seen else np.zeros(0, int)
        tasks = f"{panel.tasks[at[0]]} to {panel.tasks[at[-1]]}" if at.size else ""
        told = next((about[panel.runs[run]] for run in group if about.get(panel.runs[run])), "")
        with_outcomes = int(known[group].any(axis=1).sum()) if known is not None else 0
        found.append(Setting(plain(name), len(group), with_outcomes, tasks, told))
    return found


def probed(rows: Sequence[Row]) -> list[Probed]:
    """What each probe measured on checkpoints.

    Args:
        rows: Rows of the traces.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.probe != OUTCOMES and row.network == "checkpoint":
            found.setdefault(row.probe, []).append(row)
    return [
        Probed(
            plain(label),
            len(own),
            sum(row.status == "ok" for row in own),
            ", ".join(_measured_on(text) for text in dict.fromkeys(_on(row) for row in own)),
            _range([row.conditions.get("examples") for row in own]),
        )
        for label, own in found.items()
    ]


def problems(rows: Sequence[Row], most: int = 8) -> list[str]:
    """What the measurements that did not end well said of themselves, the most frequent first.

    Args:
        rows: Rows of the traces.
        most: At most so many different messages.
    """
    bad = [row for row in rows if row.probe != OUTCOMES and row.status != "ok"]
    found = Counter((plain(row.probe), plain(row.status), plain(row.message)[:400]) for row in bad)
    said = [f"{label}: {count} × {status}. {message}" for (label, status, message), count in found.most_common(most)]
    return said + ([f"… and {len(found) - most} other messages."] if len(found) > most else [])


def rules() -> list[tuple[str, str]]:
    """Each verdict and when it is given, in the order in which the rules are tried."""
    level = f"{LEVEL:g}"
    return [
        (
            Verdict.NOT_ASSESSED,
            f"Fewer than {FEWEST_RUNS} runs in every configuration, fewer than {FEWEST_TASKS} tasks, no outcome, or a predictor "
            "that does not vary, "
            f"or is missing at more than {MISSING:.0%} of the places of those configurations that have it. The reason is said.".replace(
                "%", " %"
            ),
        ),
        (
            Verdict.REFUTED,
            f"The association at equal task and history has both signs among configurations (q ≤ {level}).",
        ),
        (
            Verdict.PREDICTS,
            f"The association at equal task and history has q ≤ {level}, its 90 % interval does not lie within ±{SMALLEST:g}, and the predictor "
            "helps on runs that were left out: the 90 % interval of its gain there lies above 0.",
        ),
        (
            Verdict.REFUTED,
            f"The movement together over the tasks of a run has both signs among configurations (q ≤ {level}).",
        ),
        (
            Verdict.ACCOMPANIES,
            f"The 90 % interval of the association lies within ±{SMALLEST:g}, but predictor and outcome move together over the "
            "tasks of a run (q ≤ "
            f"{level}): curves side by side look alike, which is no prediction.",
        ),
        (
            Verdict.DOES_NOT_PREDICT,
            f"The 90 % interval of the association lies within ±{SMALLEST:g}, and they do not move together.",
        ),
        (
            Verdict.INCONCLUSIVE,
            "Anything else. Too few runs end here: absence of evidence is never called evidence of absence. The text says how "
            "many more would do.",
        ),
    ]


def terms() -> list[tuple[str, str]]:
    """The words of the tables and what they mean."""
    share = f"{SMALLEST**2:.0%}".replace("%", " %")
    return [
        (
            "predictor",
            "One number measured on the weights from which a task is about to be learned: of a run with a remedy, on the weights "
            "that the remedy made.",
        ),
        (
            "association",
            "Rank correlation of predictor and outcome between runs of a configuration at the same task, freed by least squares "
            "from the last "
            "outcome and the mean of all outcomes before; the plain mean over configurations. Brackets: 95 % interval, "
            "bias-corrected and "
            f"accelerated bootstrap over whole runs, {DRAWS} draws.",
        ),
        (
            "smallest association of interest",
            f"±{SMALLEST:g}: below it a predictor explains less than {share} of what task and history leave open.",
        ),
        (
            "q",
            f"p of the association ({EXCHANGES} exchanges of whole runs within configurations), after control of the false "
            "discovery rate over all "
            f"predictors of an outcome; at most {LEVEL:g} counts.",
        ),
        (
            "gain on left-out runs",
            "Share of the squared error that the predictor saves where each run in turn is predicted by a model fitted to the "
            "others, which knows "
            "task and history already. A useless predictor loses a little.",
        ),
        (
            "beside the best rival",
            "The same gain where the best predictor of any other probe is known already: does this one tell anything new?",
        ),
        (
            "moving together",
            "Spearman's rank correlation over the tasks of each run, averaged. What two curves side by side show; it says "
            "nothing about prediction.",
        ),
        (
            "lead",
            f"How many tasks lie between measurement and outcome; leads {LEADS[1]} to {LEADS[-1]} are shown, and as a control the "
            "measurement after "
            "the outcome. Verdicts use lead 0 alone.",
        ),
        (
            "dull baselines",
            "The number of the task and the previous outcome, which are known without measuring. They are what is held fixed, so "
            "they have no "
            "association of their own, and every predictor must beat them.",
        ),
    ]


def _of_outcome(outcome: str, judged: Sequence[Judged]) -> tuple[str, str]:
    counts = Counter(j.verdict for j in judged)
    listed = [f"{counts[v]} {_COUNTED[v][counts[v] > 1]}" for v in Verdict if counts[v]]
    if len(listed) == 1 and len(judged) > 1:
        listed = [f"all {listed[0]}"]
    name, what = outcome.replace("_", " "), OUTCOME_WORDS[outcome].what
    title = f"{name[:1].upper()}{name[1:]}"
    head = f"({what}): of {counted(len(judged), 'predictor')}, {_listed(listed)}."
    assessed = [j for j in ranked(judged) if j.verdict is not Verdict.NOT_ASSESSED]
    if not assessed:
        reasons = Counter(j.evidence.reason for j in judged).most_common(1)
        return title, f"{head} The reason: {reasons[0][0]}." if reasons else head
    best = assessed[0]
    if best.verdict is not Verdict.PREDICTS:
        best = max(assessed, key=lambda j: abs(_or_zero(j.evidence.association.estimate.value)))
    e = best.evidence
    shown = best.verdict is Verdict.PREDICTS
    lead = "The strongest is" if shown else "None was shown to predict it; the largest association is that of"
    numbers = (
        f"{number_of(e.association.estimate)} at equal task and history (q {_equals(best.q)}), "
        f"a gain of {percent(e.gain.value)} [{percent(e.gain.low)}, {percent(e.gain.high)}] of the squared error on left-out runs"
    )
    verdict = "" if shown else f"; verdict: {best.verdict}"
    return title, f"{head} {lead} {plain(e.predictor)}: {numbers}{verdict}.{_needed(best)}{_of_curvature(assessed)}"


def _of_curvature(assessed: Sequence[Judged]) -> str:
    """The same for the ranks and the spectrum of curvature alone: whether their collapse foretells anything is what is asked most."""
    own = [j for j in assessed if probe_of(j.evidence) in CURVATURE]
    if not own or len(own) == len(assessed):
        return ""
    counts = Counter(j.verdict for j in own)
    listed = _listed([f"{counts[v]} {_COUNTED[v][counts[v] > 1]}" for v in Verdict if counts[v]])
    top = max(own, key=lambda j: abs(_or_zero(j.evidence.association.estimate.value)))
    return (
        f" Of its {counted(len(own), 'measure')} of curvature, {listed}; the largest association is that of {plain(top.evidence.predictor)}, "
        f"{number_of(top.evidence.association.estimate)}."
    )


def _needed(best: Judged) -> str:
    if best.more_runs is None:
        return ""
    return (
        f" About {best.more_runs} more runs in each configuration would settle it if the estimate stayed where it is."
    )


def _equals(q: float) -> str:
    text = probability(q)
    return text if text.startswith("<") else f"= {text}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _on(row: Row) -> str:
    return str(json.loads(row.settings).get("on", ""))


def _measured_on(on: str) -> str:
    known = {"next": "the next task", "current": "the current task", "noise": "random labels", "": "the data named"}
    return known.get(on, plain(on)[:40])


def _range(values: Sequence[str | int | float | None]) -> str:
    found = sorted({int(v) for v in values if isinstance(v, int | float) and math.isfinite(v)})
    return "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
