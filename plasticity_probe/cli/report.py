"""`probe report`: what predicts what, as one page with its figures and tables. Needs no torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plasticity_probe.cli.terminal import console, plain, print_whole, progress, reported

if TYPE_CHECKING:
    from rich.table import Table

    from plasticity_probe.prediction.assessment import Assessment
    from plasticity_probe.report.document import Report

Option = typer.Option


@reported
def report(
    traces: Annotated[
        list[Path],
        typer.Argument(
            help="Trace files of training runs, read together; a configuration each, say.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        Option(
            "--out",
            "-o",
            help="Folder of the report: a new or empty one, or that of an older report, which is replaced.",
        ),
    ] = Path("report"),
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of the table.")] = False,
    quiet: Annotated[bool, Option("--quiet", help="No progress bar.")] = False,
    seed: Annotated[int, Option(help="Seed of every random draw of the statistics.")] = 0,
    page_only: Annotated[
        bool,
        Option("--page-only", help="Write index.html and verdict.json alone, without figures and tables as files."),
    ] = False,
    layers: Annotated[
        bool, Option("--layers", help="Judge each layer's numbers too, beside the summaries over layers.")
    ] = False,
) -> None:
    """Judge what predicts the loss of plasticity, and write the report: index.html, figures, tables, verdict.json.

    For example:

        probe report plain.h5 l2-init.h5 -o report

    Exit codes: 0 ok, 3 done but nothing could be assessed, 4 no measurements, 5 storage.
    """
    from plasticity_probe.report.document import write_report
    from plasticity_probe.report.work import processors

    with progress(quiet) as tell:
        found = write_report(
            traces, out, seed=seed, layers=layers, page_only=page_only, processes=processors(), progress=tell
        )
    show_report(found, as_json)
    if not found.ok:
        raise typer.Exit(3)


def show_report(found: "Report", as_json: bool) -> None:
    """Prints the verdicts and where the report lies.

    Args:
        found: The report.
        as_json: Print one JSON object instead.
    """
    if as_json:
        paths = {"page": str(found.page), "folder": str(found.folder), "files": list(found.files)}
        typer.echo(json.dumps({**found.assessment.to_dict(), "paths": paths}, allow_nan=False))
        return
    from plasticity_probe.report.story import answer

    out = console()
    for table in verdict_tables(found.assessment):
        print_whole(out, table)
        out.print()
    for name, sentence in answer(found.assessment):
        out.print(plain(f"• {name} {sentence}" if name else f"• {sentence}"), soft_wrap=True)
    for note in found.assessment.aligned.notes:
        out.print(plain(f"• {note}."), soft_wrap=True)
    figures = sum(name.startswith("figures/") for name in found.files)
    tables = sum(name.startswith("tables/") for name in found.files)
    out.print(plain(f"Report: {found.page}"), soft_wrap=True)
    others = f", {figures} files in figures, {tables} in tables" if figures or tables else ""
    out.print(plain(f"Beside it: verdict.json{others}"), soft_wrap=True)


def verdict_tables(assessment: "Assessment") -> "list[Table]":
    """The verdicts as tables for a terminal, one for each outcome of which anything could be assessed.

    Args:
        assessment: The verdicts.
    """
    from rich.table import Table

    from plasticity_probe.prediction.verdict import Verdict
    from plasticity_probe.report.verdicts import number_of, percent, probability, ranked

    found: list[Table] = []
    for outcome, judged in assessment.judged.items():
        table = Table(
            box=None, pad_edge=False, header_style="bold", title=plain(outcome, "bold cyan"), title_justify="left"
        )
        table.add_column("predictor", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for name in ("association [95 %]", "q", "gain on left-out runs [95 %]"):
            table.add_column(plain(name), justify="right", no_wrap=True)
        for j in ranked(judged):
            gain = j.evidence.gain
            ends = "" if gain.value != gain.value else f" [{percent(gain.low)}, {percent(gain.high)}]"
            cells = (
                j.evidence.predictor,
                str(j.verdict),
                number_of(j.evidence.association.estimate),
                probability(j.q),
                percent(gain.value) + ends,
            )
            table.add_row(*map(plain, cells))
        if any(j.verdict is not Verdict.NOT_ASSESSED for j in judged):
            found.append(table)
    return found
