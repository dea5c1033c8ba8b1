"""A trace that is kept in memory: what the file's writer builds on, and what the file is tested against."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import xarray as xr

from plasticity_probe.errors import TraceError
from plasticity_probe.trace.layout import Key, Row, canonical, canonical_settings
from plasticity_probe.trace.tree import Template, dataset_tree


class MemoryTrace:
    """A trace that is kept in memory, with the interface of the file's writer.

    Args:
        settings: The settings of each probe label that will be measured, as JSON objects.
        provenance: What wrote the rows: versions, seeds, revision; plain data.
        retry_failed: Whether a row whose status is not "ok" counts as not done.
    """

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        *,
        retry_failed: bool = False,
    ) -> None:
        self.provenance = canonical(provenance or {})
        self.retry_failed = retry_failed
        self._rows: dict[Key, Row] = {}
        self._settings: dict[str, str] = {}
        self._templates: dict[str, Template] = {}
        self.expect(settings or {})

    @property
    def rows(self) -> list[Row]:
        """All rows in the order of their first measurement."""
        return list(self._rows.values())

    def done(self, key: Key) -> bool:
        """Whether this measurement was made already, failed ones included unless they are to be retried."""
        row = self._rows.get(key)
        return row is not None and (row.status == "ok" or not self.retry_failed)

    def append(self, row: Row) -> None:
        """Adds a row; one with the same key takes the place of the older one.

        Raises:
            TraceError: Its label has rows with other settings, or its quantities have another form than theirs.
        """
        self.keep(self.checked(row))

    def tree(self) -> xr.DataTree:
        """The rows as `dataset_tree`."""
        return dataset_tree(self._rows.values())

    def expect(self, settings: Mapping[str, str]) -> None:
        """Refuses settings that differ from those of the rows at hand.

        Raises:
            TraceError: For each label that differs, both values of each key that differs.
        """
        problems = [self._difference(label, canonical_settings(text)) for label, text in settings.items()]
        if any(problems):
            raise TraceError("\n".join(filter(None, problems)))
        self._settings.update({label: canonical_settings(text) for label, text in settings.items()})

    def checked(self, row: Row) -> Row:
        """The row as it would be kept; raises what `append` raises and keeps nothing."""
        self.expect({row.probe: row.settings})
        self._templates.setdefault(row.probe, Template(row.probe)).admit(row)
        return row if row.provenance != "{}" else replace(row, provenance=self.provenance)

    def keep(self, row: Row) -> None:
        """Keeps a row that was checked."""
        self._rows[row.key] = row

    def _difference(self, label: str, settings: str) -> str:
        known = self._settings.get(label, settings)
        if known == settings:
            return ""
        before, now = json.loads(known), json.loads(settings)
        keys = sorted(key for key in {*before, *now} if before.get(key, _ABSENT) != now.get(key, _ABSENT))
        lines = [f"  {key}: {_shown(before, key)} in the trace, {_shown(now, key)} now" for key in keys]
        return "\n".join(
            [f"the trace holds {label!r} with other settings; use another trace file or another label:", *lines]
        )


_ABSENT = object()


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "absent"
