"""The slow parts of a report, spread over processes: verdicts outcome by outcome, drawings figure by figure."""

import io
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from PIL import Image

from plasticity_probe.errors import BudgetError
from plasticity_probe.prediction.alignment import Aligned
from plasticity_probe.prediction.assessment import Assessment, assess_aligned
from plasticity_probe.report.courses import CourseFigure
from plasticity_probe.report.draw import render as render_measured
from plasticity_probe.report.draw_verdicts import render as render_verdicts
from plasticity_probe.report.panels import Figure, VerdictFigure

Drawable = Figure | CourseFigure | VerdictFigure
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
WORTH_IT = 24
"""So many verdicts or figures take longer than starting processes does (our choice)."""


MOST = 4
"""More processes would take memory, about 0.3 GB each, for little time (our choice)."""


def processors() -> int:
    """How many processes are worth having here: as many as processors that this one may use, at most `MOST`."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MOST)


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure as its files, and as a page shows it.

    Args:
        png: The PNG file.
        pdf: The PDF file.
        picture: A PNG file without the caption, which is text on a page, and of at most 256 colours.
        width: Dots across the picture.
        height: Dots down.
    """

    png: bytes
    pdf: bytes
    picture: bytes
    width: int
    height: int


@contextmanager
def workers(count: int) -> Iterator[Map]:
    """A function like the built-in map, over so many processes.

    Args:
        count: How many; with one, everything happens in this process.

    Raises:
        BudgetError: A process was killed, most likely for want of memory.
    """
    if count < 2:
        yield map
        return
    # A fork of a process with threads may hang; one that is started anew needs nothing of them.
    with ProcessPoolExecutor(count, get_context("spawn"), _ignore_interrupts) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise BudgetError(
                "a process that computed a part of the report was killed, most likely for want of memory; free some, or report on fewer traces "
                "at once"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def assessed(aligned: Aligned, seed: int, spread: Map) -> Assessment:
    """All verdicts on a study, the same as `assess_aligned` gives.

    Args:
        aligned: The study.
        seed: Seed of every random draw.
        spread: As `workers` yields it.
    """
    panel = aligned.panel
    if len(panel.predictors) * len(panel.outcomes) < WORTH_IT:
        return assess_aligned(aligned, seed)
    parts = [
        _Part(replace(aligned, panel=replace(panel, outcomes={outcome: values})), seed)
        for outcome, values in panel.outcomes.items()
    ]
    judged: dict[str, Any] = {}
    dull: dict[str, Any] = {}
    over: dict[str, Any] = {}
    sweeps: dict[str, Any] = {}
    for found in spread(_assess, parts):
        judged.update(found.judged)
        dull.update(found.dull)
        over.update(found.over_rivals)
        sweeps.update(found.sweeps)
    return Assessment(aligned, judged, dull, over, sweeps, seed)


def drawn(figures: Sequence[Drawable], spread: Map) -> Iterator[Drawn]:
    """All figures, in order.

    Args:
        figures: What to draw.
        spread: As `workers` yields it.
    """
    return spread(_render, figures) if len(figures) >= WORTH_IT // 3 else map(_render, figures)


@dataclass(frozen=True, eq=False)
class _Part:
    aligned: Aligned
    seed: int


def _assess(part: _Part) -> Assessment:
    return assess_aligned(part.aligned, part.seed)


def _render(figure: Drawable) -> Drawn:
    found = render_verdicts(figure) if isinstance(figure, VerdictFigure) else render_measured(figure)
    with Image.open(io.BytesIO(found.png)) as image:
        cut = image.crop((0, 0, image.width, image.height - found.foot)).convert("RGB")
    content = io.BytesIO()
    cut.quantize(256, Image.Quantize.FASTOCTREE).save(content, format="PNG")
    return Drawn(found.png, found.pdf, content.getvalue(), cut.width, cut.height)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
