"""`probe train`: carry out a protocol: networks that may lose plasticity, remedies, and how every task went beside fresh networks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plasticity_probe.cli.terminal import console, plain, printable, progress, reported

if TYPE_CHECKING:
    from plasticity_probe.training.feature_world import FeatureWorld
    from plasticity_probe.training.loop import Run
    from plasticity_probe.training.published.protocol import Protocol
    from plasticity_probe.training.remedies.remedy import Remedy
    from plasticity_probe.training.run_plan import RunPlan

Option = typer.Option
SCALES = ("full", "small")
WORLD_QUANTITIES = {
    "test_accuracy": "test accuracy",
    "learned": "features learned",
    "memorised": "examples memorised through their noise",
    "active": "examples with a gradient at the start",
}


@reported
def train(
    protocol: Annotated[str, typer.Argument(help="A protocol's name (probe list protocols).", show_default=False)],
    out: Annotated[
        Path | None, Option(help="Run folder. Default: runs/ and the names of protocol, variant and remedies.")
    ] = None,
    variant: Annotated[str, Option(help="A variant of the protocol, such as tanh.")] = "",
    remedy: Annotated[
        list[str] | None,
        Option(
            help="A remedy to add (probe list remedies), with settings if need be: l2-init:coefficient=1e-3. Repeatable."
        ),
    ] = None,
    scale: Annotated[str, Option(help="full, or small for two CPU cores.")] = "full",
    seeds: Annotated[int | None, Option(help="Number of seeds. Default: the protocol's.", min=1)] = None,
    first_seed: Annotated[int, Option(help="The first seed.", min=0)] = 0,
    change: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="A value to change, such as training.epochs=20 or stream.tasks=5. Repeatable.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with a run that was interrupted.")] = False,
    together: Annotated[
        int | None,
        Option(
            help="Seeds trained as one program. Default: all of them for small networks of linear layers, else 1.",
            min=1,
        ),
    ] = None,
    device: Annotated[
        str | None, Option(help="Where to train, such as cuda. Default: cuda if there is one, else cpu.")
    ] = None,
    plan: Annotated[bool, Option("--plan", help="Print what would be trained, and train nothing.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of the table.")] = False,
    figures: Annotated[bool, Option(help="Draw figures into the run folder.")] = True,
    data_root: Annotated[
        Path | None,
        Option(help="Folder of the named data sets. Default: $PLASTICITY_PROBE_DATA, then the usual caches."),
    ] = None,
    download: Annotated[
        bool, Option("--download", help="Fetch the official archive where the data is missing.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train reference runs: tasks one after the other, with checkpoints, remedies and fresh networks as controls.

    For example:

        probe train lewandowski-random-label-mnist --variant tanh --remedy l2-init --seeds 30 --out runs/tanh

        probe analyze runs/tanh --on next --trace tanh.h5

    Exit codes: 0 ok, 2 usage, 3 done but some seed diverged, 4 input refused, 5 storage, 130 interrupted (go on with --resume).
    """
    from plasticity_probe.training.feature_world import FeatureWorld
    from plasticity_probe.training.protocols import protocol_named, variant_named

    named = protocol_named(protocol)
    if scale not in SCALES:
        raise typer.BadParameter(f"expected --scale to be {' or '.join(SCALES)}, got {scale!r}")
    small = dict(named.small) if scale == "small" else {}
    count = seeds or small.pop("seeds", named.seeds)
    small.pop("seeds", None)
    if isinstance(named.setting, FeatureWorld):
        _refuse_for_world(protocol, variant=variant, remedy=remedy, change=change, resume=resume)
        show_world(named.setting, range(first_seed, first_seed + count), out, as_json)
        return
    setting = named.setting.changed(variant_named(named, variant)).changed(small).changed(changes_in(change or []))
    setting = setting.changed({"remedies": (*setting.remedies, *map(remedy_in, remedy or []))})
    folder = out or Path("runs") / "-".join(
        [protocol, *filter(None, [variant]), *(text.partition(":")[0] for text in remedy or [])]
    )
    label = " ".join(filter(None, [protocol, variant, scale]))
    chosen = tuple(range(first_seed, first_seed + count))
    import torch

    from plasticity_probe.training import loop
    from plasticity_probe.training.run_plan import plan_run

    planned = plan_run(
        setting,
        chosen,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        together=together,
        protocol=label,
        data_root=data_root,
        download=download,
    )
    if plan:
        show_plan(planned, folder, as_json)
        return
    if not quiet:
        typer.echo(
            f"at most {planned.checkpoints:,} checkpoints and {planned.bytes / 1e6:,.1f} MB in {printable(str(folder))}",
            err=True,
        )
    with progress(quiet) as report:
        run = loop.carry_out(planned, folder, resume=resume, report=report)
        report(0, 1, "drawing figures")
        drawn = _drawn(folder) if figures else []
    show_run(run, as_json)
    if drawn and not as_json:
        console().print(plain(f"Figures: {len(drawn)} files in {drawn[0].parent}"), soft_wrap=True)
    if run.diverged:
        raise typer.Exit(3)


def changes_in(texts: list[str]) -> dict[str, Any]:
    """Changes as typed: name=value, the value JSON or else a text.

    Args:
        texts: Such as "training.epochs=20" or "data.name=mnist".

    Raises:
        BadParameter: A text without an equals sign.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"expected NAME=VALUE after --set, such as training.epochs=20, got {text!r}")
        found[name.strip()] = _value(value.strip())
    return found


def remedy_in(text: str) -> "Remedy":
    """A remedy as typed: its name, and settings after a colon.

    Args:
        text: Such as "l2-init" or "shrink-perturb:shrink=0.6,perturb=0.01".

    Raises:
        UnknownNameError: No such remedy.
        UsageError: A setting that it does not have.
    """
    from plasticity_probe.training.remedies import remedy_named

    name, _, rest = text.partition(":")
    return remedy_named(name, **changes_in([part for part in rest.split(",") if part]))


def show_run(run: "Run", as_json: bool) -> None:
    """Prints how the tasks of a run went.

    Args:
        run: The run.
        as_json: Print one JSON object instead.
    """
    from rich.table import Table

    from plasticity_probe.training.outcomes import as_json as written
    from plasticity_probe.training.summary import as_rows, scored_by_loss, sentences, summarise

    tasks, said = summarise(run.outcomes), sentences(run.outcomes)
    if as_json:
        entry = {
            "schema": "plasticity_probe.train/1",
            "folder": str(run.folder),
            "protocol": run.manifest.protocol,
            "seeds": list(run.manifest.seeds),
            "diverged": list(run.diverged),
            "tasks": as_rows(tasks),
            "outcomes": [written(outcome) for outcome in run.outcomes],
            "findings": said,
        }
        typer.echo(json.dumps(entry))
        return
    what = "loss" if scored_by_loss(run.outcomes) else "accuracy"
    columns = {
        "score": what,
        "control": f"fresh {what}",
        "gap": "lost",
        "online": "online",
        "test": "test",
        "test_control": "fresh test",
    }
    shown = [name for name in columns if any(getattr(task, name).count for task in tasks)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task", justify="right")
    for name in shown:
        table.add_column(columns[name], justify="right", no_wrap=True)
    for task in tasks:
        table.add_row(str(task.task), *(str(getattr(task, name)) for name in shown))
    out = console()
    out.print(
        plain(f"{run.manifest.protocol or 'run'}: {len(run.manifest.seeds)} seeds, {run.manifest.data}"), soft_wrap=True
    )
    out.print(table)
    out.print(
        "Means over seeds ± half of the 95 % interval, at the end of each task; fresh: newly initialised, trained on this task alone."
    )
    for sentence in said:
        out.print(plain(f"• {sentence}"))
    out.print(plain(f"Run folder: {run.folder}"), soft_wrap=True)


def show_plan(plan: "RunPlan", folder: Path, as_json: bool) -> None:
    """Prints what would be trained, and what it takes.

    Args:
        plan: The run.
        folder: Where it would be.
        as_json: Print one JSON object instead.
    """
    from plasticity_probe.training.settings import written

    known, setting = plan.manifest, written(plan.setting)
    if as_json:
        entry = {"schema": "plasticity_probe.train-plan/1", "protocol": known.protocol, "seeds": list(known.seeds)}
        counts = {name: getattr(plan, name) for name in ("parameters", "updates", "checkpoints", "bytes")}
        typer.echo(
            json.dumps({**entry, "folder": str(folder), "together": known.together, **counts, "setting": setting})
        )
        return
    out = console()
    out.print(
        plain(f"{known.protocol}: {len(known.seeds)} seeds, {known.together} at a time, into {folder}"), soft_wrap=True
    )
    out.print(plain(f"  data: {known.data}"), soft_wrap=True)
    for name, value in setting.items():
        text = (
            ", ".join(f"{key} = {_shown(item)}" for key, item in value.items())
            if isinstance(value, Mapping)
            else _shown(value)
        )
        out.print(plain(f"  {name}: {text}"), soft_wrap=True)
    out.print(
        f"{plan.parameters:,} parameters; at most {plan.updates:,} updates of {plan.setting.training.batch} examples a seed, controls included; "
        f"at most {plan.checkpoints:,} checkpoints and {plan.bytes / 1e6:,.0f} MB on disk. Nothing was trained.",
        soft_wrap=True,
    )


def show_world(world: "FeatureWorld", seeds: range, out: Path | None, as_json: bool) -> None:
    """Simulates the feature-learning world and prints its table beside the published one.

    Args:
        world: Its settings.
        seeds: Seeds of the simulations.
        out: Folder for the table as JSON; none by default.
        as_json: Print one JSON object instead.
    """
    from dataclasses import asdict

    from rich.table import Table

    from plasticity_probe.training.feature_world import STARTS, published, rows, simulate, summary
    from plasticity_probe.training.run_folder import make_folder, write_text

    courses = [simulate(world, start, seed) for seed in seeds for start in STARTS]
    found = summary(courses)
    entry = {
        "schema": "plasticity_probe.feature-world/1",
        "settings": asdict(world),
        "seeds": list(seeds),
        "table": [asdict(line) for line in found],
        "published": [asdict(line) for line in published()],
        "courses": rows(courses),
    }
    if out is not None:
        make_folder(out)
        write_text(out / "feature_world.json", json.dumps(entry))
    if as_json:
        typer.echo(json.dumps(entry))
        return
    known = {(line.start, line.quantity, line.experiment): line for line in published()}
    own = {(line.start, line.quantity, line.experiment): line for line in found}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("after experiment", "", *STARTS):
        table.add_column(column, justify="right" if column in STARTS else "left", no_wrap=True)
    for quantity, words in WORLD_QUANTITIES.items():
        table.add_row(plain(words, "bold cyan"))
        for at in dict.fromkeys(line.experiment for line in found if line.quantity == quantity):
            for label, style, numbers in (("here", "", own), ("published", "dim", known)):
                lines = [numbers.get((start, quantity, at)) for start in STARTS]
                if any(lines):
                    first = "" if numbers is known else f"  {at or 'mean of all'}"
                    table.add_row(
                        first, label, *(_spread(line.mean, line.sd) if line else "" for line in lines), style=style
                    )
    screen = console()
    screen.print(f"Mean ± standard deviation over {len(seeds)} seeds")
    screen.print(table)
    screen.print(plain(f"Published: {published()[0].source}."), soft_wrap=True)
    if out is not None:
        screen.print(plain(f"Every experiment of every seed: {out / 'feature_world.json'}"), soft_wrap=True)


def _spread(mean: float, sd: float | None) -> str:
    digits = 3 if mean < 1 else 1 if mean < 1000 else 0
    return f"{mean:,.{digits}f}" + ("" if sd is None else f" ± {sd:,.{digits}f}")


def _refuse_for_world(protocol: str, **given: Any) -> None:
    """A simulated world has no network, so what changes networks cannot be asked for."""
    from plasticity_probe.errors import UsageError

    asked = [f"--{name.replace('change', 'set')}" for name, value in given.items() if value]
    if asked:
        raise UsageError(f"{protocol} simulates features and trains no network; leave out {', '.join(asked)}")


def _drawn(folder: Path) -> list[Path]:
    from plasticity_probe.report.draw import draw_run

    return draw_run(folder)


def _shown(value: Any) -> str:
    return ", ".join(map(_shown, value)) or "none" if isinstance(value, list) else str(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def protocol_rows(protocols: Mapping[str, "Protocol"]) -> list[tuple[str, str]]:
    """Every protocol with its source, what was published, its cost, its small version and what is our choice.

    Args:
        protocols: By name.
    """
    rows: list[tuple[str, str]] = []
    for name, protocol in protocols.items():
        small = ", ".join(f"{key} = {value}" for key, value in protocol.small.items()) or "the same"
        parts = [
            protocol.source,
            f"Published: {protocol.published}",
            f"Cost: {protocol.cost}; {protocol.seeds} seeds.",
            f"--scale small: {small}.",
            f"Our choice: {'; '.join(protocol.ours)}.",
        ]
        if protocol.variants:
            parts.insert(4, f"--variant: {', '.join(protocol.variants)}.")
        rows.append((name, "\n".join(parts)))
    return rows
