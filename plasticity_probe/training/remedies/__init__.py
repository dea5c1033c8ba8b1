"""Remedies against loss of plasticity, by the names that settings and run folders know them by."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.training.kinds import made
from plasticity_probe.training.remedies.architecture import CReLURemedy, LayerNormRemedy
from plasticity_probe.training.remedies.averaging import HareTortoise
from plasticity_probe.training.remedies.penalties import L2, L2Init, Spectral, Wasserstein
from plasticity_probe.training.remedies.remedy import Remedy
from plasticity_probe.training.remedies.resets import FreshOptimizer, ResetModules, ZeroHead
from plasticity_probe.training.remedies.shrinking import Dash, ShrinkPerturb
from plasticity_probe.training.remedies.units import ContinualBackprop, ReDo

__all__ = ["REMEDIES", "read", "remedy_named", "written"]

REMEDIES: Mapping[str, type[Remedy]] = MappingProxyType(
    {
        remedy.name: remedy
        for remedy in (
            L2,
            L2Init,
            Wasserstein,
            Spectral,
            ShrinkPerturb,
            Dash,
            ResetModules,
            ZeroHead,
            FreshOptimizer,
            HareTortoise,
            ReDo,
            ContinualBackprop,
            LayerNormRemedy,
            CReLURemedy,
        )
    }
)
"""All remedies of this package."""


def remedy_named(name: str, /, **settings: Any) -> Remedy:
    """A remedy by name.

    Args:
        name: A name of `REMEDIES`.
        settings: Its settings; those left out have their defaults.

    Raises:
        UnknownNameError: No such remedy.
        UsageError: Settings that it does not have, of another type, or that cannot be.
    """
    if name not in REMEDIES:
        raise UnknownNameError("remedy", name, REMEDIES)
    return made(REMEDIES[name], f"the remedy {name}", settings)


def written(remedy: Remedy) -> dict[str, Any]:
    """Name and settings of a remedy, as JSON.

    Args:
        remedy: The remedy.
    """
    return {"name": remedy.name, **dataclasses.asdict(remedy)}  # type: ignore[call-overload]


def read(settings: Mapping[str, Any]) -> Remedy:
    """The remedy of a name and settings.

    Args:
        settings: What `written` gave, or "name" and some settings.

    Raises:
        UnknownNameError: No such remedy.
        UsageError: No name is given, or settings are unknown or cannot be.
    """
    name, others = settings.get("name"), {key: value for key, value in settings.items() if key != "name"}
    if not isinstance(name, str):
        raise UsageError(f'a remedy is written as {{"name": ..., and its settings}}, got {dict(settings)!r}')
    return remedy_named(name, **others)
