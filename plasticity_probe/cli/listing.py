"""`probe list`: the names of probes, models, data sets, protocols and remedies, this package's and everybody else's."""

from typing import Annotated, Any

import typer

from plasticity_probe.cli.terminal import console, plain, reported

KINDS = ("probes", "models", "data", "protocols", "remedies")


@reported
def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(help="probes, models, data, protocols or remedies; all by default.", show_default=False),
    ] = None,
) -> None:
    """List the names that --probes, --model, --data, `probe train` and --remedy know."""
    from plasticity_probe.errors import UnknownNameError

    if kind is not None and kind not in KINDS:
        raise UnknownNameError("list", kind, KINDS)
    from rich.table import Table

    out = console()
    for wanted in [kind] if kind else KINDS:
        table = Table(
            box=None, pad_edge=False, show_header=False, title=wanted, title_justify="left", title_style="bold"
        )
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in _NAMES[wanted]():
            table.add_row(plain(f"  {name}", "cyan"), plain(text))
        out.print(table)


def _probes() -> list[tuple[str, str]]:
    from plasticity_probe import registry

    found = sorted(registry.load_all(registry.PROBES).items())
    return [(name, kind.title if kind.default else f"{kind.title} (only with --probes {name})") for name, kind in found]


def _models() -> list[tuple[str, str]]:
    from plasticity_probe import registry
    from plasticity_probe.checkpoints.architectures import named_architectures

    own = [(name, _network(build)) for name, build in sorted(named_architectures().items())]
    return own + [(name, f"from {entry.value}") for name, entry in sorted(registry.registered(registry.MODELS).items())]


def _data() -> list[tuple[str, str]]:
    from plasticity_probe import registry
    from plasticity_probe.data.sources import NAMED

    own = [
        (name, "built in") if name == "digits" else (name, "official files in the data root, or --download")
        for name in sorted(NAMED)
    ]
    return own + [(name, f"from {entry.value}") for name, entry in sorted(registry.registered(registry.DATA).items())]


def _protocols() -> list[tuple[str, str]]:
    from plasticity_probe.cli.train import protocol_rows
    from plasticity_probe.training.protocols import PROTOCOLS

    return protocol_rows(PROTOCOLS)


def _remedies() -> list[tuple[str, str]]:
    from dataclasses import fields

    from plasticity_probe.training.remedies import REMEDIES

    rows: list[tuple[str, str]] = []
    for name, kind in sorted(REMEDIES.items()):
        settings = ", ".join(f"{entry.name} = {entry.default}" for entry in fields(kind))  # type: ignore[arg-type]
        rows.append((name, f"{kind.title} ({kind.source})" + (f"; {settings}" if settings else "")))
    return rows


def _network(build: Any) -> str:
    """What a name stands for: the network's own description, and the settings that the name fixes."""
    text = (build.func.__doc__ or "").strip().split("\n")[0].rstrip(".")
    fixed = ", ".join(f"{key} = {value}" for key, value in build.keywords.items())
    return f"{text} ({fixed})" if fixed else text


_NAMES = {"probes": _probes, "models": _models, "data": _data, "protocols": _protocols, "remedies": _remedies}
