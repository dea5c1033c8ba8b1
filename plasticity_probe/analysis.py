"""analyze: from checkpoints, data and probes to records, a trace, a table and plain sentences."""

import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from plasticity_probe.checkpoints.series import standing
from plasticity_probe.comparison import Table, findings, number, table
from plasticity_probe.errors import InputError
from plasticity_probe.measurement import Measurement, Status
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject
from plasticity_probe.planning import check
from plasticity_probe.probe import Probe
from plasticity_probe.record import Checkpoint, Record, run_probe
from plasticity_probe.run_tasks import RunTasks
from plasticity_probe.study import Model, Network, Study, study
from plasticity_probe.trace.layout import Row, canonical
from plasticity_probe.trace.memory import MemoryTrace
from plasticity_probe.trace.outcome_rows import OUTCOMES
from plasticity_probe.trace.rows import row_of
from plasticity_probe.trace.writer import TraceWriter, open_for_append

Report = Callable[[int, int, str], None]
"""report(done, total, what is being done)."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """What an analysis found. Prints as a table in a terminal and in a notebook.

    Args:
        rows: One row a probe and network, those measured earlier included.
        records: The measurements made now, with their tensors.
        notes: What was identified, loaded and done to the data.
        trace: The file they are stored in, if any.
    """

    rows: tuple[Row, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...]
    trace: Path | None

    @property
    def table(self) -> Table:
        """Every quantity of the checkpoint (of a series: the first and the last) beside a fresh network's, and their ratio."""
        return table(self.rows)

    @property
    def findings(self) -> tuple[str, ...]:
        """What stands out, and what these checkpoints cannot tell."""
        return findings(self.rows)

    @property
    def ok(self) -> bool:
        """Whether every probe of every network ended well."""
        return all(row.status == Status.OK for row in self.rows)

    def __getitem__(self, label: str) -> Measurement:
        """The measurement of a probe on the last checkpoint measured now.

        Raises:
            KeyError: There is none under this label.
        """
        found = [
            r.measurement
            for r in self.records
            if r.label == label and r.checkpoint.network == "checkpoint" and r.measurement
        ]
        if not found:
            raise KeyError(
                f"no measurement labelled {label!r}; there are: {', '.join(dict.fromkeys(r.label for r in self.records))}"
            )
        return found[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, as `probe analyze --json` prints them; undefined numbers are None."""
        shown = self.table
        return {
            "schema": "plasticity_probe.analysis/1",
            "notes": list(self.notes),
            "trace": str(self.trace) if self.trace else None,
            "columns": list(shown.columns),
            "quantities": [
                {
                    **{key: getattr(line, key) for key in ("probe", "name", "where", "meaning", "role")},
                    "values": [*map(_known, line.values)],
                }
                for line in shown.lines
            ],
            "problems": [dict(zip(("probe", "status", "message"), problem, strict=True)) for problem in shown.problems],
            "findings": list(self.findings),
            "measurements": [
                {
                    **{
                        key: getattr(row, key)
                        for key in ("probe", "run", "step", "task", "checkpoint", "sha256", "network", "replicate")
                    },
                    **{key: getattr(row, key) for key in ("status", "message", "seconds", "peak_bytes", "seed")},
                    "conditions": dict(row.conditions),
                }
                for row in self.rows
            ],
        }

    def __repr__(self) -> str:
        shown = self.table
        width = max((len(_name(line)) for line in shown.lines), default=0)
        head = " " * width + "".join(f"{column:>14}" for column in shown.columns)
        lines = [f"{_name(line):<{width}}" + "".join(f"{number(v):>14}" for v in line.values) for line in shown.lines]
        return "\n".join([*self.notes, head, *lines, *self.findings])

    def _repr_html_(self) -> str:
        shown = self.table
        head = "".join(f"<th>{escape(column)}</th>" for column in ("quantity", *shown.columns))
        rows = "".join(
            f"<tr><td style='text-align:left'>{escape(_name(line))}</td>"
            + "".join(f"<td>{number(v)}</td>" for v in line.values)
            + "</tr>"
            for line in shown.lines
        )
        said = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.findings)
        return f"<p>{escape('; '.join(self.notes))}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><ul>{said}</ul>"


def analyze(
    model: Model,
    data: Any = None,
    *,
    probes: Sequence[str | Probe[Any]] | dict[str, Probe[Any]] | None = None,
    trace: str | Path | None = None,
    retry_failed: bool = False,
    progress: Report | None = None,
    **request: Any,
) -> Analysis:
    """Measures a network, a checkpoint or a series of checkpoints on data, beside a freshly initialised network.

    Args:
        model: A module, a checkpoint file, a folder, or several of those.
        data: A name such as "cifar10", a path, a reference, a loader of batches, or a `DataSet`. None for the
            checkpoints of a training run, whose folder knows its tasks (`on="current"`, "next" or "noise").
        probes: Names or probes, or probes by label; by default every registered probe but those whose `default` is False.
        trace: HDF5 file to store every number in; what is there already is not measured again.
        retry_failed: Measure again what is in the trace with a status other than ok.
        progress: Called as report(done, total, text).
        request: Further arguments of `plasticity_probe.study.study`: fresh, examples, split, mean, std, architecture, loss, mode, dtype, device,
            seed, memory, held_out, noisy, initial, ...

    Raises:
        PlanError: The request cannot be carried out; all reasons at once.
        InputError: The data or the only checkpoint is refused.
        TraceError: The trace cannot be written, or holds a label with other settings.
    """
    return run(study(model, data, probes=probes, **request), trace=trace, retry_failed=retry_failed, progress=progress)


def run(
    wanted: Study, *, trace: str | Path | None = None, retry_failed: bool = False, progress: Report | None = None
) -> Analysis:
    """Carries out a study.

    Args:
        wanted: The study.
        trace: HDF5 file to store every number in.
        retry_failed: Measure again what is in the trace with a status other than ok.
        progress: Called as report(done, total, text).
    """
    settings = {label: canonical(wanted.settings(label)) for label in wanted.probes}
    if wanted.tasks is not None:
        settings[OUTCOMES] = canonical(wanted.tasks.outcome_settings)
    if trace is None:
        return _Run(wanted, MemoryTrace(), progress).analysis(None)
    with open_for_append(Path(trace), settings, provenance(wanted), retry_failed=retry_failed) as writer:
        return _Run(wanted, writer, progress).analysis(Path(trace))


class _Run:
    """One analysis under way: the networks in order, each probe on each, rows committed one by one."""

    def __init__(self, wanted: Study, store: MemoryTrace | TraceWriter, report: Report | None) -> None:
        self.wanted, self.store = wanted, store
        self.report = report or (lambda *_: None)
        self.known = {row.key: row for row in store.rows if store.done(row.key)}
        self.rows: list[Row] = []
        self.records: list[Record] = []
        self.notes: list[str] = list(store.notes) if isinstance(store, TraceWriter) else []
        self.done = 0
        self.total = (wanted.size + wanted.fresh) * len(wanted.probes)

    def analysis(self, trace: Path | None) -> Analysis:
        """Measures everything and returns what was found."""
        self.notes.append(f"data: {self.wanted.material.description}")
        build: Callable[[], nn.Module] | None = None
        checked = False
        runs: dict[int, str] = {}
        for index, read in enumerate(self.wanted.networks()):
            network = self._read(read, index)
            if network is None:
                continue
            if self.wanted.tasks is not None:
                runs[self.wanted.tasks.seed_of(Path(network.checkpoint.path))] = network.checkpoint.run
            with isolated():
                made = self._subject(network, index)
            if made is None:
                continue
            if not checked:
                check(self.wanted.probes, made)
                checked = True
                self.notes += network.notes
                build = network.build
            self._measure(made, network.checkpoint)
        if build is not None:
            for replicate in range(self.wanted.fresh):
                self._measure_fresh(build, replicate)
        if self.wanted.tasks is not None:
            self._keep_outcomes(self.wanted.tasks, runs)
        return Analysis(tuple(self.rows), tuple(self.records), tuple(self.notes), trace)

    def _read(self, read: Callable[[], Network], index: int) -> Network | None:
        try:
            return read()
        except InputError as error:
            self._refuse(index, error)
            return None

    def _subject(self, network: Network, index: int) -> Subject | None:
        try:
            return self.wanted.subject_of(network)
        except InputError as error:
            self._refuse(index, error)
            return None

    def _refuse(self, index: int, error: InputError) -> None:
        """One bad file of a series is a status; the only one is an error."""
        if self.wanted.size == 1 or isinstance(self.wanted.model, nn.Module):
            raise error
        path = self.wanted.model[index]
        run, step, task = standing(path, {}, index)
        place = Checkpoint(run, step, task, str(path), f"unreadable:{path}")
        for label, probe in self.wanted.probes.items():
            record = Record(label, probe, place, self.wanted.seed, Status.FAILED, str(error), 0.0, -1, None)
            self._keep(record, label)

    def _measure_fresh(self, build: Callable[[], nn.Module], replicate: int) -> None:
        # In a run the fresh network is measured on the task of the last checkpoint, which another analysis may not have.
        own = f":{self.wanted.material.examples.sha256}" if self.wanted.tasks is not None else ""
        place = Checkpoint("fresh", 0, -1, "", f"fresh:{self.wanted.seed}{own}", "fresh", replicate)
        if all(self._stored(label, place) is not None for label in self.wanted.probes):
            missing: Subject | None = None
        else:
            missing = self.wanted.fresh_subject(build, replicate)
        self._measure(missing, place)

    def _keep_outcomes(self, tasks: RunTasks, runs: Mapping[int, str]) -> None:
        """What became of the tasks goes into the trace too, so that it can be read without the run folder."""
        known = {row.key for row in self.store.rows}
        for row in tasks.outcomes(runs):
            if row.key not in known:
                self.store.append(row)

    def _measure(self, made: Subject | None, place: Checkpoint) -> None:
        for label, probe in self.wanted.probes.items():
            stored = self._stored(label, place)
            if stored is not None:
                self.rows.append(stored)
                self._advance(label)
                continue
            assert made is not None
            self.report(self.done, self.total, f"{place.network} {Path(place.path).name or place.replicate}: {label}")
            self._keep(run_probe(probe, made, label, place), label)

    def _stored(self, label: str, place: Checkpoint) -> Row | None:
        blank = Record(label, self.wanted.probes[label], place, self.wanted.seed, Status.OK, "", 0.0, -1, None)
        return self.known.get(row_of(blank, self.wanted.settings(label)).key)

    def _keep(self, record: Record, label: str) -> None:
        row = row_of(record, self.wanted.settings(label))
        self.store.append(row)
        self.rows.append(row)
        self.records.append(record)
        self._advance(label)

    def _advance(self, label: str) -> None:
        self.done += 1
        self.report(self.done, self.total, label)


def provenance(wanted: Study) -> dict[str, Any]:
    """What produced a trace: versions, data, command, time and revision.

    Args:
        wanted: The study.
    """
    packages = ("plasticity_probe", "torch", "numpy", "scipy", "h5py")
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "data": wanted.material.description,
        "examples_sha256": wanted.material.examples.sha256,
        "seed": wanted.seed,
        "command": sys.argv,
        "git_revision": _revision(),
    }


def _revision() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _name(line: Any) -> str:
    return f"{line.probe}: {line.meaning}" + (f" ({line.where})" if line.where else "")


def _known(value: float) -> float | None:
    return None if value != value else value
