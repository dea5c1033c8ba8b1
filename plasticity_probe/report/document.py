"""The report on one or several traces: a page that needs nothing else, its figures and tables as files, the verdicts as JSON."""

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from plasticity_probe.errors import InputError, PlasticityProbeError
from plasticity_probe.prediction.alignment import Aligned, align
from plasticity_probe.prediction.assessment import Assessment
from plasticity_probe.prediction.verdict import Evidence, Judged, Verdict
from plasticity_probe.report import story
from plasticity_probe.report.by_task import course_figures
from plasticity_probe.report.canvas import DPI
from plasticity_probe.report.folder import PAGE, VERDICT, check_folder, write_folder
from plasticity_probe.report.measured import has_courses, in_detail_words, measured_figures, trajectory_figures
from plasticity_probe.report.panels import LARGEST, VerdictFigure, drawable
from plasticity_probe.report.robustness import setting_figures, sweep_figure
from plasticity_probe.report.tables import Table, as_csv, tables
from plasticity_probe.report.verdicts import (
    OUTCOME_WORDS,
    courses_of,
    forest_figure,
    lead_figure,
    number_of,
    percent,
    probability,
    ranked,
    ranking_figure,
    scatter_figure,
    side_by_side_figure,
)
from plasticity_probe.report.wording import file_names, plain
from plasticity_probe.report.work import Drawable, Drawn, assessed, drawn, workers
from plasticity_probe.trace.layout import Row
from plasticity_probe.trace.outcome_rows import OUTCOMES
from plasticity_probe.trace.reader import joined_rows
from plasticity_probe.trace.tree import dataset_tree

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int, str], None]
CSS_DPI = 96
"""Dots of a page that an inch has."""


def _one(draw: Callable[[Assessment, str], VerdictFigure | None]) -> Callable[[Assessment, str], list[VerdictFigure]]:
    return lambda assessment, outcome: [figure] if (figure := draw(assessment, outcome)) else []


PARTS: Mapping[str, Callable[[Assessment, str], list[VerdictFigure]]] = MappingProxyType(
    {
        "forest": _one(forest_figure),
        "settings": setting_figures,
        "lead": _one(lead_figure),
        "scatter": _one(scatter_figure),
        "ranking": _one(ranking_figure),
        "thresholds": _one(sweep_figure),
        "side_by_side": _one(side_by_side_figure),
    }
)
"""The figures of an outcome, in the order in which the page shows them."""


@dataclass(frozen=True, eq=False)
class Report:
    """What was reported and where it lies.

    Args:
        assessment: The verdicts.
        folder: The folder of the report.
        files: The files within it, the page first.
    """

    assessment: Assessment
    folder: Path
    files: tuple[str, ...]

    @property
    def page(self) -> Path:
        """The page."""
        return self.folder / PAGE

    @property
    def ok(self) -> bool:
        """Whether any predictor of any outcome could be assessed."""
        judged = self.assessment.judged.values()
        return any(j.verdict is not Verdict.NOT_ASSESSED for own in judged for j in own)


@dataclass(frozen=True, eq=False)
class Section:
    """Figures under a heading, before they are drawn.

    Args:
        key: Where they stand on the page.
        figures: What to draw.
    """

    key: str
    figures: tuple[Drawable, ...]


def write_report(
    traces: PathLike | Sequence[PathLike],
    out: PathLike = "report",
    *,
    seed: int = 0,
    layers: bool = False,
    page_only: bool = False,
    processes: int = 1,
    progress: Progress = lambda *_: None,
) -> Report:
    """Judges every predictor that traces hold, and writes the report.

    Args:
        traces: The trace file, or several that are read as one.
        out: The folder; a new or empty one, or that of an older report, which is replaced.
        seed: Seed of every random draw of the statistics.
        layers: Whether each layer's numbers are predictors of their own, beside the summaries over layers.
        page_only: Whether to write the page and the verdicts alone, without figures and tables as files beside them.
        processes: How many processes share the work; with more than one, the caller's program must be one that may be imported.
        progress: Called with what is done, how much there is and what is being done.

    Raises:
        InputError: The traces hold no measurement, or outcomes that no run can have.
        TraceError: There is no such trace, or it is damaged, foreign or of a newer version.
        ReportError: The folder holds other things, or cannot be written.
        BudgetError: A process was killed.
    """
    given = [traces] if isinstance(traces, str | os.PathLike) else traces
    paths = [str(os.fspath(path)) for path in given]
    folder = Path(out)
    check_folder(folder)
    progress(0, 0, "reading")
    rows, sources = joined_rows(paths)
    if not rows:
        raise InputError(
            f"expected measurements in {', '.join(paths) or 'at least one trace'}, found none; `probe analyze RUN --on next "
            "--trace FILE` writes them"
        )
    with workers(processes) as spread:
        progress(0, 0, "judging predictors")
        assessment = assessed(usable(_aligned(rows, layers)), seed, spread)
        sections = list(sections_of(rows, dataset_tree(rows, sources), assessment))
        wanted = [figure for section in sections for figure in section.figures]
        rendered: list[Drawn] = []
        for done in drawn(wanted, spread):
            rendered.append(done)
            progress(len(rendered), len(wanted), "drawing figures")
    stems = file_names(figure.name for figure in wanted)
    files = {} if page_only else _files(stems, rendered, tables(assessment))
    shown = iter([_shown(*part, linked=not page_only) for part in zip(stems, wanted, rendered, strict=True)])
    figures = {section.key: [next(shown) for _ in section.figures] for section in sections}
    page = page_of(rows, assessment, figures, list(files), paths)
    told = {**assessment.to_dict(), "traces": [plain(path) for path in paths], "files": sorted(files)}
    files[VERDICT] = json.dumps(told, indent=1, allow_nan=False).encode() + b"\n"
    files[PAGE] = page.encode("utf-8", "replace")
    progress(1, 1, "writing")
    write_folder(folder, files)
    return Report(assessment, folder, (PAGE, VERDICT, *sorted(set(files) - {PAGE, VERDICT})))


def _aligned(rows: Sequence[Row], layers: bool) -> Aligned:
    try:
        return align(rows, layers=layers)
    except PlasticityProbeError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"expected outcomes and settings as `probe analyze RUN` stores them (docs/trace-schema.md), got something else: {error!r:.200}; "
            "measure the run folder again into a new trace"
        ) from error


def usable(aligned: Aligned) -> Aligned:
    """A study in which numbers that no statistic can hold, infinite ones above all, count as missing; a note says how many.

    Args:
        aligned: The study.
    """
    panel = aligned.panel
    bounded = {name: drawable(values) for name, values in panel.predictors.items()}
    lost = sum(int((np.isnan(bounded[name]) & ~np.isnan(values)).sum()) for name, values in panel.predictors.items())
    if not lost:
        return aligned
    note = f"{lost} numbers that are infinite, or beyond {LARGEST:g}, count as missing"
    return replace(aligned, panel=replace(panel, predictors=bounded), notes=(*aligned.notes, note))


def sections_of(rows: Sequence[Row], tree: xr.DataTree, assessment: Assessment) -> Iterator[Section]:
    """All figures of a report, by the place where they stand.

    Args:
        rows: Rows of the traces.
        tree: The same as a tree.
        assessment: The verdicts on them.
    """
    aligned = assessment.aligned
    for kind, found in course_figures(rows, aligned.panel).items():
        yield Section(f"{kind} courses", tuple(found))
    for outcome in aligned.panel.outcomes:
        for part, draw in PARTS.items():
            yield Section(f"{outcome} {part}", tuple(draw(assessment, outcome)))
    yield Section("trajectories", tuple(trajectory_figures(aligned)) if has_courses(aligned) else ())
    yield Section("measured", tuple(measured_figures(tree, aligned)))


def page_of(
    rows: Sequence[Row],
    assessment: Assessment,
    figures: Mapping[str, Sequence[Mapping[str, Any]]],
    files: Sequence[str],
    traces: Sequence[str],
) -> str:
    """The page.

    Args:
        rows: Rows of the traces.
        assessment: The verdicts on them.
        figures: By the keys of `sections_of`, what the template needs of each figure.
        files: Files beside the page, by their paths.
        traces: The traces, as they were named.
    """
    aligned = assessment.aligned
    kinds: dict[str, list[dict[str, Any]]] = {}
    for outcome in aligned.panel.outcomes:
        kinds.setdefault(OUTCOME_WORDS[outcome].kind, []).append(_outcome(assessment, outcome, figures))
    return _environment().from_string(_template()).render(
        question=story.question(assessment) if aligned.panel.predictors and aligned.panel.outcomes else "",
        answer=story.answer(assessment),
        settings=story.settings(rows, assessment),
        probed=story.probed(rows),
        problems=story.problems(rows),
        notes=aligned.notes,
        traces=traces,
        counts=_counts(assessment, rows),
        kinds=kinds,
        courses={kind: figures.get(f"{kind} courses", ()) for kind in ("trainability", "generalisation")},
        trajectories=figures.get("trajectories", ()),
        measured=figures.get("measured", ()),
        detail=in_detail_words(aligned),
        rules=[(_badge(verdict), text) for verdict, text in story.rules()],
        terms=story.terms(),
        csv=[name for name in files if name.endswith(".csv")],
        verdict=VERDICT,
        version=_version(),
        seed=assessment.seed,
    )  # fmt: skip


def _outcome(
    assessment: Assessment, outcome: str, figures: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    judged = ranked(assessment.judged[outcome])
    assessed = any(j.verdict is not Verdict.NOT_ASSESSED for j in judged)
    return {
        "id": outcome,
        "name": outcome.replace("_", " "),
        "what": OUTCOME_WORDS[outcome].what,
        "verdicts": [_line(assessment, outcome, j) for j in judged] if assessed else [],
        "nothing": "" if assessed else story.reasons(judged),
        "dull": [_dull(e) for e in assessment.dull[outcome]],
        "figures": {part: figures.get(f"{outcome} {part}", ()) for part in PARTS},
        "courses": [
            {
                "name": c.configuration,
                "runs": c.change.count,
                "tasks": f"{c.first_task}, {c.last_task}",
                **{name: _mean(getattr(c, name)) for name in ("first", "last", "change")},
            }
            for c in courses_of(assessment, outcome)
        ],
    }


def _line(assessment: Assessment, outcome: str, j: Judged) -> dict[str, Any]:
    e, over = j.evidence, assessment.over_rivals[outcome].get(j.evidence.predictor)
    return {
        "name": e.predictor,
        "meaning": assessment.aligned.meanings.get(e.predictor, ""),
        "badge": _badge(j.verdict),
        "text": j.text,
        "association": number_of(e.association.estimate),
        "q": probability(j.q),
        "gain": _shares(e.gain.value, e.gain.low, e.gain.high),
        "transfer": percent(e.transfer.mean),
        "over": _shares(over.gain.value, over.gain.low, over.gain.high) if over and over.rival else "–",
        "rival": over.rival if over else "",
        "together": number_of(e.together.estimate),
    }


def _dull(e: Evidence) -> dict[str, Any]:
    return {
        "name": e.predictor,
        "together": number_of(e.together.estimate),
        "ranking": _shares(e.ranking.value, e.ranking.low, e.ranking.high),
    }


def _badge(verdict: str) -> dict[str, str]:
    found = Verdict(verdict)
    return {"text": str(found), "symbol": story.SYMBOLS[found], "css": found.name.lower().replace("_", "-")}


def _shares(value: float, low: float, high: float) -> str:
    return "–" if value != value else f"{percent(value)} [{percent(low)}, {percent(high)}]"


def _mean(mean: Any) -> str:
    if mean.value != mean.value:
        return "–"
    ends = "" if mean.half_width != mean.half_width else f" [{mean.low:.3f}, {mean.high:.3f}]"
    return f"{mean.value:.3f}{ends}".replace("-", "−")


def _counts(assessment: Assessment, rows: Sequence[Row]) -> dict[str, int]:
    panel = assessment.aligned.panel
    checkpoints = {(r.run, r.step, r.sha256) for r in rows if r.network == "checkpoint" and r.probe != OUTCOMES}
    return {
        "configurations": len(panel.configurations),
        "runs": len(panel.runs),
        "tasks": len(panel.tasks),
        "checkpoints": len(checkpoints),
        "predictors": len(panel.predictors),
    }


def _files(stems: Iterable[str], rendered: Iterable[Drawn], found: Iterable[Table]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for stem, drawing in zip(stems, rendered, strict=True):
        files[f"figures/{stem}.png"], files[f"figures/{stem}.pdf"] = drawing.png, drawing.pdf
    return files | {f"tables/{table.name}.csv": as_csv(table) for table in found}


def _shown(stem: str, figure: Drawable, drawing: Drawn, *, linked: bool) -> dict[str, Any]:
    """What the page needs of a figure, with links to its files where there are any."""
    return {
        "source": Markup("data:image/png;base64,") + Markup(base64.b64encode(drawing.picture).decode()),
        "width": round(drawing.width * CSS_DPI / DPI),
        "height": round(drawing.height * CSS_DPI / DPI),
        "title": figure.title,
        "caption": figure.caption,
        "files": {name: f"figures/{stem}.{name.lower()}" for name in ("PNG", "PDF")} if linked else {},
    }


def _environment() -> Environment:
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_without_controls
    )


def _without_controls(value: Any) -> Any:
    """Texts from files on one line and without characters that would turn the direction of what follows."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _template() -> str:
    return resources.files("plasticity_probe.report").joinpath("page.html.j2").read_text(encoding="utf-8")


def _version() -> str:
    try:
        return version("plasticity_probe")
    except PackageNotFoundError:
        return "unknown"
