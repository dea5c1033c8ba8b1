"""What a protocol is: a setting that a source describes, and what is known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plasticity_probe.training.feature_world import FeatureWorld
from plasticity_probe.training.settings import Setting

Changes = Mapping[str, Any]
"""New values of a setting by dotted name, as `Setting.changed` takes them."""


MOMENTUM: Changes = {"optimizer": "sgd", "optimizer_settings": {"momentum": 0.9}}
"""SGD with momentum 0.9, as fields of `Training`."""
RESNET18: Changes = {"name": "resnet18"}
"""The network of most papers on images."""
SMALL_IMAGES: Changes = {
    "data.examples": 4000,
    "network.width": 8,
    "network.depth": 1,
    "seeds": 3,
}


@dataclass(frozen=True)
class Protocol:
    """A setting that a source describes.

    Args:
        name: What `probe train` calls it.
        source: Where it is described, as author, year and section.
        published: What the source reports.
        ours: What the source does not say and we chose, and where we depart from it.
        cost: What the full scale takes, in words.
        setting: The setting at full scale, or a simulated world.
        seeds: How many seeds the source ran (or we run).
        variants: Further settings of the same source, as changes.
        small: The changes that make it fit two CPU cores; `seeds` among them.
    """

    name: str
    source: str
    published: str
    ours: tuple[str, ...]
    cost: str
    setting: Setting | FeatureWorld
    seeds: int
    variants: Mapping[str, Changes] = field(default_factory=dict)
    small: Changes = field(default_factory=dict)
