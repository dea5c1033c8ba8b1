"""plasticity_probe: can this trained network still learn, why, and what gives the ability back?

    import plasticity_probe as probe

    rank = probe.curvature_rank(model, loader)
    analysis = probe.analyze("checkpoint.pt", "cifar10")

Everything public is reached from here; nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plasticity_probe.analysis import Analysis, analyze
    from plasticity_probe.example_memorization import ExampleMemorization, memorized_examples
    from plasticity_probe.functional import curvature_rank
    from plasticity_probe.measurement import Labels, Measurement, Quantity, Status
    from plasticity_probe.network.subject import Subject
    from plasticity_probe.probe import Cost, Need, Probe
    from plasticity_probe.probes.features import FeatureRank, feature_rank
    from plasticity_probe.probes.fisher import fisher_rank
    from plasticity_probe.probes.memorization import Memorization, memorization
    from plasticity_probe.probes.norms import GradientNorms, WeightNorms, gradient_norms, weight_norms
    from plasticity_probe.probes.performance import Performance, performance
    from plasticity_probe.probes.readiness import Readiness, readiness
    from plasticity_probe.probes.spectrum import hessian_spectrum
    from plasticity_probe.probes.trainability import Trainability, trainability
    from plasticity_probe.probes.units import UnitActivity, dead_units
    from plasticity_probe.rank import Rank
    from plasticity_probe.spectrum import Spectrum
    from plasticity_probe.trace.reader import open_trace

__version__ = "0.1.0"

_HOMES = {
    "Analysis": "analysis",
    "Cost": "probe",
    "ExampleMemorization": "example_memorization",
    "FeatureRank": "probes.features",
    "GradientNorms": "probes.norms",
    "Labels": "measurement",
    "Measurement": "measurement",
    "Memorization": "probes.memorization",
    "Need": "probe",
    "Performance": "probes.performance",
    "Probe": "probe",
    "Quantity": "measurement",
    "Rank": "rank",
    "Readiness": "probes.readiness",
    "Spectrum": "spectrum",
    "Status": "measurement",
    "Subject": "network.subject",
    "Trainability": "probes.trainability",
    "UnitActivity": "probes.units",
    "WeightNorms": "probes.norms",
    "analyze": "analysis",
    "curvature_rank": "functional",
    "dead_units": "probes.units",
    "feature_rank": "probes.features",
    "fisher_rank": "probes.fisher",
    "gradient_norms": "probes.norms",
    "hessian_spectrum": "probes.spectrum",
    "memorization": "probes.memorization",
    "memorized_examples": "example_memorization",
    "open_trace": "trace.reader",
    "performance": "probes.performance",
    "readiness": "probes.readiness",
    "trainability": "probes.trainability",
    "weight_norms": "probes.norms",
}

__all__ = [
    "Analysis",
    "Cost",
    "ExampleMemorization",
    "FeatureRank",
    "GradientNorms",
    "Labels",
    "Measurement",
    "Memorization",
    "Need",
    "Performance",
    "Probe",
    "Quantity",
    "Rank",
    "Readiness",
    "Spectrum",
    "Status",
    "Subject",
    "Trainability",
    "UnitActivity",
    "WeightNorms",
    "analyze",
    "curvature_rank",
    "dead_units",
    "feature_rank",
    "fisher_rank",
    "gradient_norms",
    "hessian_spectrum",
    "memorization",
    "memorized_examples",
    "open_trace",
    "performance",
    "readiness",
    "trainability",
    "weight_norms",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
