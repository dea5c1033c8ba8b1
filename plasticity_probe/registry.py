"""Names of probes, models and data sets, through entry points: what this package brings is registered like everybody else's."""

import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from plasticity_probe.errors import UnknownNameError

PROBES, MODELS, DATA = "plasticity_probe.probes", "plasticity_probe.models", "plasticity_probe.data"
KINDS = {PROBES: "probe", MODELS: "model", DATA: "data set"}
OWN = "plasticity_probe"


@cache
def registered(group: str) -> Mapping[str, EntryPoint]:
    """The entry points of a group by name, this package's own first; a name taken twice is warned about and kept once."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(
        entry_points(group=group), key=lambda entry: (not entry.value.startswith(OWN + "."), entry.name)
    ):
        if entry.name in found and found[entry.name].value != entry.value:
            warnings.warn(
                f"{KINDS[group]} {entry.name!r} is registered twice, by {found[entry.name].value} and {entry.value}; the first is used.",
                stacklevel=2,
            )
        found.setdefault(entry.name, entry)
    return found


def load(group: str, name: str) -> Any:
    """What is registered under a name.

    Args:
        group: `PROBES`, `MODELS` or `DATA`.
        name: The registered name.

    Raises:
        UnknownNameError: No such name; the message lists near misses.
    """
    entries = registered(group)
    if name not in entries:
        raise UnknownNameError(KINDS[group], name, entries)
    return entries[name].load()


def load_all(group: str) -> dict[str, Any]:
    """Everything registered in a group; a plug-in that cannot be imported is warned about and left out."""
    found: dict[str, Any] = {}
    for name, entry in registered(group).items():
        try:
            found[name] = entry.load()
        except Exception as error:
            if entry.value.startswith(OWN + "."):
                raise
            warnings.warn(
                f"{KINDS[group]} {name!r} from {entry.value} cannot be loaded and is left out: {error!r}", stacklevel=2
            )
    return found
