"""From a record to a row of a trace: the schema of the measurement becomes variables with dimensions, meaning and units."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from plasticity_probe.measurement import Measurement, arrays, schema
from plasticity_probe.record import Record
from plasticity_probe.trace.layout import Row, Variable, canonical


def row_of(record: Record, settings: Mapping[str, Any]) -> Row:
    """The row that stores a record.

    Args:
        record: A measurement and how it came about.
        settings: What makes two rows of its label comparable.
    """
    measured, place = record.measurement, record.checkpoint
    labels, variables = ({}, {}) if measured is None else _stored(measured)
    return Row(
        probe=record.label,
        settings=canonical(settings),
        run=place.run,
        step=place.step,
        task=place.task,
        checkpoint=place.path,
        sha256=place.sha256,
        network=place.network,
        replicate=place.replicate,
        status=str(record.status),
        message=record.message,
        seconds=record.seconds,
        peak_bytes=float(record.peak_bytes) if record.peak_bytes >= 0 else float("nan"),
        seed=record.seed,
        conditions=asdict(measured.conditions) if measured is not None else {},
        labels=labels,
        variables=variables,
    )


def _stored(measured: Measurement) -> tuple[dict[str, tuple[str, ...]], dict[str, Variable]]:
    values = arrays(measured)
    fields = schema(type(measured))
    labels = {f.dims[0]: tuple(map(str, values[f.name])) for f in fields if f.kind == "labels"}
    variables = {
        f.name: Variable(
            f.dims,
            values[f.name],
            {
                "long_name": f.quantity.meaning,
                "units": f.quantity.units,
                "summary": f.quantity.summary,
                "shown": str(f.quantity.shown),
                "role": f.quantity.role,
            },
        )
        for f in fields
        if f.kind != "labels"
    }
    return labels, variables
