"""The command line `probe`: one file a command; a command parses, makes one call and prints. torch is imported by no module here."""

import re
import sys

import typer

from plasticity_probe.cli import analyze, demo, listing, report, show, train

app = typer.Typer(
    name="probe",
    help="Measures whether a trained neural network can still learn.\n\nFor example:  probe analyze checkpoint.pt --data cifar10 --trace run.h5",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("analyze")(analyze.analyze)
app.command("train")(train.train)
app.command("report")(report.report)
app.command("show")(show.show)
app.command("list")(listing.list_names)
app.command("demo")(demo.demo)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from plasticity_probe import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with its code.

    Args:
        arguments: The arguments; those of the process by default.
    """
    app(with_joined_numbers(sys.argv[1:] if arguments is None else arguments))


def with_joined_numbers(arguments: list[str]) -> list[str]:
    """Lets --mean and --std take one number or one per channel, as in `--mean .485 .456 .406`.

    Args:
        arguments: Arguments as typed.
    """
    joined: list[str] = []
    collecting = False
    for argument in arguments:
        if collecting and _NUMBER.fullmatch(argument):
            joined[-1] = f"{joined[-1]} {argument}".strip()
            continue
        collecting = argument in ("--mean", "--std")
        joined.append(argument)
        if collecting:
            joined.append("")
    return joined


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
