"""The table of protocols: named, complete settings of the papers, as data, and what each becomes on two CPU cores."""

from collections.abc import Mapping
from types import MappingProxyType

from plasticity_probe.errors import UnknownNameError
from plasticity_probe.training.published.protocol import Changes, Protocol
from plasticity_probe.training.published.streams_of_tasks import STREAMS_OF_TASKS
from plasticity_probe.training.published.subsets import SUBSETS
from plasticity_probe.training.published.warm_starts import WARM_STARTS

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {each.name: each for each in (*STREAMS_OF_TASKS, *WARM_STARTS, *SUBSETS)}
)
"""Every protocol by name."""


def protocol_named(name: str) -> Protocol:
    """A protocol by name.

    Args:
        name: A name of `PROTOCOLS`.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in PROTOCOLS:
        raise UnknownNameError("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def variant_named(protocol: Protocol, name: str) -> Changes:
    """The changes of a variant.

    Args:
        protocol: The protocol.
        name: The variant's name; empty for the protocol as it is.

    Raises:
        UnknownNameError: There is none.
    """
    if name and name not in protocol.variants:
        raise UnknownNameError(f"variant of {protocol.name}", name, protocol.variants)
    return protocol.variants[name] if name else {}
