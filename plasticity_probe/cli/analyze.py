"""`probe analyze`: measure checkpoints and print what they show."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plasticity_probe.cli.terminal import console, plain, progress, reported

if TYPE_CHECKING:
    from plasticity_probe.analysis import Analysis
    from plasticity_probe.planning import Plan

Option = typer.Option


@reported
def analyze(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoint files and folders, measured in order.", show_default=False)
    ],
    data: Annotated[
        str | None,
        Option(
            help="digits, mnist, fashion_mnist, kmnist, cifar10, cifar100, a .npz file, an image folder, pkg.module:factory or file.py:factory. "
            "Default: the tasks of a training run, else digits."
        ),
    ] = None,
    on: Annotated[
        str, Option(help="For a training run, the task each checkpoint is measured on: current, next or noise.")
    ] = "current",
    model: Annotated[
        str | None,
        Option(
            help="Network: a name (probe list models), pkg.module:factory or file.py:factory. Default: found by names and shapes."
        ),
    ] = None,
    trace: Annotated[
        Path | None, Option(help="Store every number in this HDF5 file; a second run goes on where the first stopped.")
    ] = None,
    probes: Annotated[
        str | None,
        Option(
            help="Comma-separated names (probe list probes). Default: all that are not marked there as only by name."
        ),
    ] = None,
    split: Annotated[str | None, Option(help="Split of the data set. Default: train.")] = None,
    mean: Annotated[str, Option(help="Mean to subtract, one number or one per channel.", metavar="NUMBERS")] = "",
    std: Annotated[str, Option(help="Standard deviation to divide by.", metavar="NUMBERS")] = "",
    examples: Annotated[int, Option(help="Read at most this many examples, drawn at random.")] = 10_000,
    fresh: Annotated[
        int, Option(help="Freshly initialised networks measured beside as the yardstick; 0 for none.")
    ] = 1,
    initial: Annotated[
        Path | None, Option(help="Checkpoint with the weights at initialisation, for the distance from it.")
    ] = None,
    loss: Annotated[
        str | None,
        Option(help="pkg.module:loss or file.py:loss, (model, batch) -> one loss per example. Default: inferred."),
    ] = None,
    parameters: Annotated[
        str | None,
        Option(
            help="Measure only these parameters: comma-separated patterns of names, such as layer1.*. Default: all."
        ),
    ] = None,
    mode: Annotated[str, Option(help="eval or train: how BatchNorm and dropout behave.")] = "eval",
    plan: Annotated[bool, Option("--plan", help="Print what it would cost, and measure nothing.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of the table.")] = False,
    figures: Annotated[bool, Option(help="Draw figures beside the trace.")] = True,
    seed: Annotated[int, Option(help="Seed of every random draw.")] = 0,
    device: Annotated[
        str | None, Option(help="Where to compute, such as cuda. Default: cuda if there is one, else cpu.")
    ] = None,
    dtype: Annotated[
        str | None, Option(help="float32 or float64. Default: the checkpoint's own, at least float32.")
    ] = None,
    memory: Annotated[
        float | None, Option(help="Gigabytes a measurement may use. Default: half of what is free.")
    ] = None,
    data_root: Annotated[
        Path | None,
        Option(help="Folder of the named data sets. Default: $PLASTICITY_PROBE_DATA, then the usual caches."),
    ] = None,
    download: Annotated[
        bool, Option("--download", help="Fetch the official archive where the data is missing.")
    ] = False,
    trust_pickle: Annotated[
        bool, Option("--trust-pickle", help="Let code in the checkpoint run. Only for files you made yourself.")
    ] = False,
    retry_failed: Annotated[
        bool, Option("--retry-failed", help="Measure again what the trace holds with a status other than ok.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure checkpoints: curvature, ranks, dead units, norms, memorization and readiness, beside a fresh network.

    For example:

        probe analyze resnet20.pt --data cifar10 --split test --mean .485 .456 .406 --std .229 .224 .225 --trace run.h5

        probe analyze runs/mlp/*.pt --data mnist --trace mlp.h5

        probe analyze runs/random-labels --on next --trace next.h5

    Exit codes: 0 ok, 2 usage, 3 done but some probe not ok, 4 input refused, 5 storage, 6 over the memory budget, 130 interrupted (resumable).
    """
    import torch

    from plasticity_probe.analysis import run
    from plasticity_probe.checkpoints.formats import read_checkpoint
    from plasticity_probe.planning import plan as planned
    from plasticity_probe.references import resolve
    from plasticity_probe.study import is_run, study

    wanted = study(
        checkpoints,
        data or (None if is_run(checkpoints) else "digits"),
        on=on,
        architecture=model,
        probes=_names(probes),
        fresh=fresh,
        examples=examples,
        split=split,
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
        data_root=data_root,
        download=download,
        seed=seed,
        trust_pickle=trust_pickle,
        loss=resolve(loss) if loss else None,
        mode=_one_of(mode, "--mode", ("eval", "train")),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=getattr(torch, _one_of(dtype, "--dtype", ("float32", "float64"))) if dtype else None,
        memory=int(memory * 1e9) if memory else None,
        parameters=_names(parameters),
        initial=read_checkpoint(initial, trust_pickle=trust_pickle).state if initial else None,
    )
    if plan:
        show_plan(planned(wanted), as_json)
        return
    with progress(quiet) as report:
        analysis = run(wanted, trace=trace, retry_failed=retry_failed, progress=report)
        if trace and figures:
            from plasticity_probe.report.draw import draw_trace

            report(0, 1, "drawing figures")
            drawn = draw_trace(trace)
        else:
            drawn = []
    show_analysis(analysis, as_json)
    if drawn and not as_json:
        console().print(plain(f"Figures: {len(drawn)} files in {drawn[0].parent}"), soft_wrap=True)
    if not analysis.ok:
        raise typer.Exit(3)


def show_analysis(analysis: "Analysis", as_json: bool) -> None:
    """Prints an analysis: the header, the table, what stands out and what it cannot tell.

    Args:
        analysis: What was measured.
        as_json: Print one JSON object instead.
    """
    if as_json:
        typer.echo(json.dumps(analysis.to_dict()))
        return
    from rich.table import Table

    from plasticity_probe.comparison import number

    out = console()
    for note in analysis.notes:
        out.print(plain(note), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("quantity", overflow="fold", ratio=1)
    for column in analysis.table.columns:
        table.add_column(plain(column), justify="right", no_wrap=True)
    label = None
    for line in analysis.table.lines:
        if line.probe != label:
            table.add_row(plain(line.probe, "bold cyan"), *[""] * len(analysis.table.columns))
            label = line.probe
        where = f" ({line.where})" if line.where else ""
        table.add_row(plain(f"  {line.meaning}{where}"), *(number(value) for value in line.values))
    out.print(table)
    for sentence in analysis.findings:
        out.print(plain(f"• {sentence}"))
    if analysis.trace:
        out.print(plain(f"Trace: {analysis.trace}"), soft_wrap=True)


def show_plan(plan: "Plan", as_json: bool) -> None:
    """Prints what an analysis would cost.

    Args:
        plan: The predicted cost.
        as_json: Print one JSON object instead.
    """
    if as_json:
        typer.echo(json.dumps({"schema": "plasticity_probe.plan/1", **plan.to_dict()}))
        return
    from rich.table import Table

    out = console()
    out.print(plain(plan.description), soft_wrap=True)
    out.print(
        f"{plan.networks} checkpoint(s) and {plan.fresh} fresh network(s) of {plan.parameters:,} trainable parameters"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("probe", "left"),
        *((name, "right") for name in ("forwards", "gradients", "products", "memory", "seconds")),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for line in plan.lines:
        cost = line.cost
        counts = (f"{count:,}" for count in (cost.forwards, cost.gradients, cost.products))
        table.add_row(plain(line.label), *counts, f"{line.bytes / 1e6:,.0f} MB", f"{line.seconds:.1f}")
    out.print(table)
    out.print(
        "forwards, gradients and products count examples; products are examples times curvature-vector products, for one network."
    )
    out.print(
        f"Together at most about {plan.seconds / 60:.1f} minutes and {plan.bytes / 1e9:.2f} GB beyond weights and examples; a measurement "
        f"may use {plan.memory / 1e9:.1f} GB. Nothing was measured.",
        soft_wrap=True,
    )


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def _numbers(text: str, option: str) -> list[float] | None:
    try:
        return [float(part) for part in text.replace(",", " ").split()] or None
    except ValueError:
        raise typer.BadParameter(f"expected numbers after {option}, such as .485 .456 .406, got {text!r}") from None


def _one_of(value: Any, option: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise typer.BadParameter(f"expected {option} to be {' or '.join(allowed)}, got {value!r}")
    return value
