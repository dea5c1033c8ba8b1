"""`probe demo`: the whole way on embedded data: train, checkpoint, measure, draw, and say what was found."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plasticity_probe.cli.analyze import show_analysis
from plasticity_probe.cli.terminal import console, plain, progress, reported

if TYPE_CHECKING:
    from plasticity_probe.demonstration import Demonstration

Option = typer.Option
BAR = 40
"""Characters of a bar that stands for 100 %."""


@reported
def demo(
    out: Annotated[
        Path, Option(help="Folder of checkpoints, trace and figures: a new one, or that of the same demo.")
    ] = Path("probe-demo"),
    tasks: Annotated[int, Option(help="Number of tasks.", min=1)] = 15,
    seed: Annotated[int, Option(help="Seed of every random draw.", min=0)] = 0,
    quiet: Annotated[bool, Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Watch a small network lose its ability to learn, in about two minutes and without a download.

    A ReLU network learns 600 digits with fresh random labels, task after task. Its checkpoints are measured on a further task of that kind,
    the numbers stored in OUT/trace.h5 and drawn beside it.
    """
    from plasticity_probe.demonstration import demonstrate
    from plasticity_probe.report.draw import draw_trace

    with progress(quiet) as report:
        shown = demonstrate(out, tasks=tasks, seed=seed, progress=report)
        report(0, 1, "drawing figures")
        drawn = draw_trace(out / "trace.h5")
    show_demonstration(shown)
    if drawn:
        console().print(plain(f"Figures: {len(drawn)} files in {drawn[0].parent}"), soft_wrap=True)
    if not shown.analysis.ok:
        raise typer.Exit(3)


def show_demonstration(shown: "Demonstration") -> None:
    """Prints the accuracy of each task, the analysis and the findings.

    Args:
        shown: What was found.
    """
    from rich.table import Table

    out = console()
    table = Table(
        box=None,
        pad_edge=False,
        header_style="bold",
        title="Training accuracy at the end of each task",
        title_justify="left",
    )
    table.add_column("task", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("online", justify="right")
    table.add_column("first-epoch loss", justify="right")
    for name, outcome in [
        *((str(outcome.task), outcome) for outcome in shown.outcomes),
        (f"{shown.fresh_start.task}, fresh network", shown.fresh_start),
    ]:
        bar = "█" * round(BAR * outcome.accuracy)
        table.add_row(
            name, f"{outcome.accuracy:.1%}", bar, f"{outcome.online_accuracy:.1%}", f"{outcome.first_epoch_loss:.2f}"
        )
    out.print(table)
    out.print()
    show_analysis(shown.analysis, as_json=False)
    out.print()
    for sentence in shown.findings:
        out.print(plain(f"• {sentence}"))
