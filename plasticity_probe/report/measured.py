"""What to draw of the measurements of a study, as data: quantities over the tasks, layers and spectra, by configuration."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from plasticity_probe.prediction.alignment import REMEDIED, Aligned
from plasticity_probe.report.figures import PANELS, figures, interval, label_figures, split
from plasticity_probe.report.panels import Curve, Figure, Lines, Numbers, drawable, scale_of
from plasticity_probe.report.quantities import Group, groups
from plasticity_probe.report.spectra import density_figures
from plasticity_probe.report.verdicts import CONFIGURATIONS, names
from plasticity_probe.report.wording import counted, shortened
from plasticity_probe.trace.layout import ROW

IN_DETAIL = 2
"""So many configurations have their layers and spectra drawn (our choice: each has several figures for every probe)."""


def has_courses(aligned: Aligned) -> bool:
    """Whether any quantity is known at the start of two tasks."""
    panel = aligned.panel
    return any(int((~np.isnan(values)).any(axis=0).sum()) > 1 for values in panel.predictors.values())


def trajectory_figures(aligned: Aligned) -> list[Figure]:
    """Every quantity at the starts of tasks, one panel each and one line for each configuration; a figure for each probe.

    Args:
        aligned: The study.
    """
    panel = aligned.panel
    found: list[Figure] = []
    probes = dict.fromkeys(name.split(".", 1)[0] for name in panel.predictors)
    for probe in probes:
        own = [name for name in panel.predictors if name.split(".", 1)[0] == probe]
        panels = [lines for name in own if (lines := _lines(aligned, name)) is not None]
        if not panels:
            continue
        title = f"{shortened(probe, 60)} at the starts of tasks"
        found += split(f"{probe[:60]}-by-task", title, panels, _words(aligned), PANELS)
    return found


def measured_figures(tree: xr.DataTree, aligned: Aligned) -> list[Figure]:
    """Layers and spectral densities, configuration by configuration; where tasks are unknown, all figures of the trace.

    Args:
        tree: As `plasticity_probe.trace.reader.open_trace` returns it.
        aligned: The same trace as a study.
    """
    if not has_courses(aligned):
        return figures(tree)
    panel = aligned.panel
    found: list[Figure] = []
    for group in groups(tree):
        for name, runs in list(zip(names(panel.configurations), panel.groups, strict=True))[:IN_DETAIL]:
            part = _part(group, [panel.runs[run] for run in runs])
            if part is None:
                continue
            for figure in (*density_figures(part), *label_figures(part)):
                title = figure.title if len(panel.configurations) == 1 else f"{figure.title}, {name}"
                found.append(replace(figure, title=title))
    return found


def in_detail_words(aligned: Aligned) -> str:
    """Which configurations `measured_figures` left out, as a sentence; empty if none."""
    count = len(aligned.panel.configurations)
    if count <= IN_DETAIL or not has_courses(aligned):
        return ""
    return f"Layers and spectra of the first {IN_DETAIL} of {count} configurations are drawn; `probe report` of a single trace draws its own."


def _lines(aligned: Aligned, name: str) -> Lines | None:
    panel = aligned.panel
    values = drawable(panel.predictors[name])
    if np.isnan(values).all():
        return None
    tasks = np.array(panel.tasks, dtype=np.float64)
    labels = names(panel.configurations)
    curves: list[Curve] = []
    if len(panel.configurations) == 1:
        curves += [Curve("single runs", "run", tasks, own, hue=0) for own in values]
    for at, group in enumerate(panel.groups[:CONFIGURATIONS]):
        mean, lower, upper = _over_runs(values[group])
        curves.append(Curve(labels[at], "mean", tasks, mean, lower, upper, hue=at))
    quantity = name.split(".", 1)[1]
    scale = scale_of(*(ends for curve in curves for ends in (curve.y, curve.lower, curve.upper)))
    title = shortened(aligned.meanings.get(name, quantity), 100)
    return Lines(title, "task (the first is 0)", shortened(quantity, 44), tuple(curves), None, scale)


def _over_runs(values: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Mean and interval where more than half of the runs have a value: elsewhere the mean would jump between runs."""
    runs = int((~np.isnan(values)).any(axis=1).sum())
    enough = (~np.isnan(values)).sum(axis=0) > runs / 2
    mean, lower, upper = (np.where(enough, ends, np.nan) for ends in interval(values))
    return mean, lower, upper


def _words(aligned: Aligned) -> str:
    panel = aligned.panel
    left_out = len(panel.configurations) - CONFIGURATIONS
    said = [
        f"{counted(len(panel.runs), 'run')} of {counted(len(panel.configurations), 'configuration')}, "
        f"{counted(len(panel.tasks), 'task')}.",
        "Measured on the weights from which the task is about to be learned.",
        "Lines: means over the runs of a configuration, where more than half of them have a value; bands: 95 % Student-t intervals.",
        "Thin lines: single runs." if len(panel.configurations) == 1 else "",
        f"The first {CONFIGURATIONS} of {len(panel.configurations)} configurations are drawn." if left_out > 0 else "",
        "Units, where there are any, stand in brackets above.",
    ]
    return " ".join(filter(None, said))


def _part(group: Group, runs: Sequence[str]) -> Group | None:
    """The checkpoints of a configuration that its tasks were learned from, and the fresh networks measured under the same settings."""
    wanted = set(runs)
    own = np.array([run in wanted for run in group.run.tolist()]) & ~group.fresh
    if not own.any():
        return None
    settings = np.array([str(text) for text in group.dataset["settings"].values.tolist()], dtype=object)
    same = set(settings[own].tolist())
    fresh = group.fresh & np.array([text in same for text in settings.tolist()])
    kept = np.sort([*_starts(group, np.flatnonzero(own)), *np.flatnonzero(fresh).tolist()])
    return Group(group.label, group.dataset.isel({ROW: kept}))


def _starts(group: Group, rows: NDArray[np.int64]) -> Iterator[int]:
    """Of each run and task the first checkpoint, the remedied one of two at the same step; all where tasks are unknown."""
    tasks, steps = group.dataset["task"].values, group.dataset["step"].values
    files = group.dataset["checkpoint"].values.tolist()
    chosen: dict[tuple[str, int], tuple[int, bool, int]] = {}
    for row in rows.tolist():
        if tasks[row] < 0:
            yield row
            continue
        place = str(group.run[row]), int(tasks[row])
        rank = int(steps[row]), not PurePosixPath(str(files[row])).stem.endswith(REMEDIED), row
        chosen[place] = min(rank, chosen.get(place, rank))
    yield from (row for _, _, row in chosen.values())
