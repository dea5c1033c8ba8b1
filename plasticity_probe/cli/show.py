"""`probe show`: what a trace holds, as a table, CSV or JSON. Needs no torch."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plasticity_probe.cli.terminal import console, plain, printable, reported

if TYPE_CHECKING:
    from rich.table import Table

    from plasticity_probe.trace.layout import Row

WHO = ("probe", "run", "step", "task", "checkpoint", "network", "replicate", "status")


@reported
def show(
    traces: Annotated[list[Path], typer.Argument(help="Trace files.", show_default=False)],
    as_csv: Annotated[bool, typer.Option("--csv", help="One line a number: comma-separated values.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what traces hold: for every checkpoint and probe its status and its headline numbers.

    The table leaves standard errors and ceilings out; --csv and --json have them.
    """
    from plasticity_probe.trace.reader import read_rows

    rows = [row for path in traces for row in read_rows(path)]
    if as_json:
        entries = [
            {**{key: getattr(row, key) for key in WHO}, "message": row.message, "quantities": _quantities(row)}
            for row in rows
        ]
        typer.echo(json.dumps({"schema": "plasticity_probe.show/1", "rows": entries}))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([*WHO, "quantity", "where", "value", "units", "meaning"])
        writer.writerows(_lines(rows))
    else:
        _print(rows)


def _quantities(row: "Row") -> dict[str, Any]:
    from plasticity_probe.comparison import headline_values

    return {
        name: {"where": where, "value": None if value != value else value, **row.variables[name].attrs}
        for name, (where, value) in headline_values(row).items()
    }


def _lines(rows: Sequence["Row"]) -> Iterator[list[Any]]:
    for row in rows:
        who = [printable(str(getattr(row, key))) for key in WHO]
        for name, found in _quantities(row).items():
            yield [
                *who,
                name,
                printable(found["where"]),
                found["value"],
                found.get("units", ""),
                found.get("long_name", ""),
            ]
        if not row.variables:
            yield [*who, "", "", None, "", printable(row.message)]


def _print(rows: Sequence["Row"]) -> None:
    out = console()
    for label in dict.fromkeys(row.probe for row in rows):
        own = sorted(
            (row for row in rows if row.probe == label), key=lambda row: (row.network, row.run, row.step, row.replicate)
        )
        table = _table(label, own)
        # Numbers are never cut: a table wider than the terminal runs on.
        unbounded = out.options.update(max_width=10_000)
        out.width = max(out.width, out.measure(table, options=unbounded).maximum)
        out.print(table)
        for message in dict.fromkeys(row.message for row in own if row.message):
            out.print(plain(f"• {message}"))


def _table(label: str, rows: Sequence["Row"]) -> "Table":
    from rich.table import Table

    from plasticity_probe.comparison import headline_values, number, quantity_of

    measured = [row for row in rows if row.variables]
    names = [
        name
        for name in dict.fromkeys(name for row in measured for name in headline_values(row))
        if any(name in row.variables and quantity_of(row.variables[name].attrs).role == "value" for row in measured)
    ]
    table = Table(box=None, pad_edge=False, header_style="bold", title=plain(label, "bold cyan"), title_justify="left")
    for column in ("run", "step", "task", "network", "status"):
        table.add_column(column, no_wrap=True, vertical="bottom")
    for name in names:
        table.add_column(plain(name.replace("_", "\n")), justify="right", no_wrap=True)
    for row in rows:
        found = headline_values(row)
        values = [number(found[name][1]) if name in found else "–" for name in names]
        network = row.network if row.network == "checkpoint" else f"{row.network} {row.replicate}"
        table.add_row(
            plain(row.run), str(row.step), "–" if row.task < 0 else str(row.task), network, row.status, *values
        )
    return table
