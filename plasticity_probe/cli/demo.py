"""`probe demo`: the whole way on embedded data: train, checkpoint, measure, judge, and show it on a page."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plasticity_probe.cli.report import show_report
from plasticity_probe.cli.terminal import console, plain, print_whole, progress, reported

if TYPE_CHECKING:
    from plasticity_probe.demonstration import Demonstration
    from plasticity_probe.training.summary import Mean

Option = typer.Option
LEVELS = "▁▂▃▄▅▆▇█"
"""Marks of accuracies, each an eighth of 100 %."""


@reported
def demo(
    out: Annotated[Path, Option(help="Folder of runs, traces and report: a new one, or that of the same demo.")] = Path(
        "probe-demo"
    ),
    seeds: Annotated[int, Option(help="Runs of each configuration.", min=1)] = 10,
    tasks: Annotated[int, Option(help="Number of tasks.", min=1)] = 20,
    first_seed: Annotated[int, Option(help="The first seed.", min=0)] = 0,
    jobs: Annotated[
        int | None,
        Option(help="Processes that share the work. Default: the processors at hand, at most 4.", min=1),
    ] = None,
    quiet: Annotated[bool, Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Watch networks lose their ability to learn, and see what predicts it: two minutes on two cores, no download.

    Networks with ReLU, leaky ReLU and tanh, and ReLU with the remedy l2-init, learn 600 digits with fresh random labels, task after task. Every
    checkpoint is measured on the task that comes next, and every quantity gets its verdict. The page is OUT/report/index.html. The same command
    goes on with what was interrupted.

    Exit codes: 0 ok, 2 usage, 3 done but some probe not ok or too few runs to judge, 5 storage, 6 a process was killed, 130 interrupted.
    """
    from plasticity_probe.demonstration import demonstrate
    from plasticity_probe.report.document import write_report
    from plasticity_probe.report.folder import check_folder
    from plasticity_probe.report.work import processors

    processes = processors() if jobs is None else jobs
    check_folder(out / "report")
    with progress(quiet) as report:
        shown = demonstrate(out, tasks=tasks, seeds=seeds, first_seed=first_seed, processes=processes, progress=report)
        written = write_report(shown.traces, out / "report", processes=processes, progress=report)
    show_demonstration(shown)
    show_report(written, as_json=False)
    if not (shown.ok and written.ok):
        raise typer.Exit(3)


def show_demonstration(shown: "Demonstration") -> None:
    """Prints how each configuration learned its tasks, and the findings.

    Args:
        shown: What was found.
    """
    from rich.table import Table

    from plasticity_probe.report.wording import counted

    out = console()
    runs, tasks = shown.courses[0].first.count, len(shown.courses[0].by_task)
    title = f"Training accuracy at the end of a task [%], mean over {counted(runs, 'run')}"
    out.print(plain(title + (" ± 95 % interval" if runs > 1 else "")), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("configuration", no_wrap=True)
    table.add_column(f"tasks 1 to {tasks}", no_wrap=True)
    for name in ("first task", "last task", "fresh"):
        table.add_column(name, justify="right", no_wrap=True)
    for course in shown.courses:
        means = (course.first, course.last, course.fresh)
        table.add_row(plain(course.name), marks(course.by_task), *map(percent, means))
    print_whole(out, table)
    out.print("fresh: newly initialised networks, trained on the last task alone in the same way", soft_wrap=True)
    out.print()
    for sentence in shown.findings:
        out.print(plain(f"• {sentence}"), soft_wrap=True)
    out.print()


def marks(shares: Iterable[float]) -> str:
    """Numbers from 0 to 1 as a line of marks, a blank where one is unknown.

    Args:
        shares: The numbers.
    """
    return "".join(" " if math.isnan(s) else LEVELS[min(int(s * len(LEVELS)), len(LEVELS) - 1)] for s in shares)


def percent(mean: "Mean") -> str:
    """A mean share in percent with its interval.

    Args:
        mean: The mean.
    """
    if math.isnan(mean.value):
        return "–"
    ends = "" if math.isnan(mean.half_width) else f" ± {100 * mean.half_width:.1f}"
    return f"{100 * mean.value:.1f}{ends}"
