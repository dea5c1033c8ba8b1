"""Streams of tasks, by the names that settings know them by."""

from collections.abc import Mapping
from types import MappingProxyType

from plasticity_probe.training.streams.classes import ClassIncremental, ClassPairs, MultiStage
from plasticity_probe.training.streams.growing import GrowingChunks, NoisyStages, SmoothTransition, TwoStage
from plasticity_probe.training.streams.regression import SlowlyChangingRegression
from plasticity_probe.training.streams.shifting import PermutedAlphabet, PermutedLabels, PermutedPixels, RandomLabels
from plasticity_probe.training.streams.subsets import RandomSubset
from plasticity_probe.training.tasks import Stream

__all__ = ["STREAMS"]

STREAMS: Mapping[str, type[Stream]] = MappingProxyType(
    {
        stream.name: stream
        for stream in (
            RandomLabels,
            PermutedPixels,
            PermutedLabels,
            PermutedAlphabet,
            ClassIncremental,
            ClassPairs,
            MultiStage,
            GrowingChunks,
            TwoStage,
            SmoothTransition,
            NoisyStages,
            SlowlyChangingRegression,
            RandomSubset,
        )
    }
)
"""All streams of this package."""
