import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from plasticity_probe.analysis import run
from plasticity_probe.errors import BudgetError, UnknownNameError
from plasticity_probe.network.curvature import graph_bytes, krylov_vectors
from plasticity_probe.network.subject import Subject
from plasticity_probe.planning import memory_of, plan
from plasticity_probe.probe import Cost, Probe
from plasticity_probe.probes.norms import WeightNormsProbe
from plasticity_probe.probes.performance import Performance, PerformanceProbe
from plasticity_probe.probes.spectrum import HessianSpectrum, hessian_spectrum
from plasticity_probe.study import study


@dataclass(frozen=True)
class Priced(Probe[Performance]):
    """A probe that does nothing, at a price."""

    price: Cost

    def cost(self, subject: Subject) -> Cost:
        return self.price

    def measure(self, subject: Subject, generator: torch.Generator) -> Performance:
        raise NotImplementedError


X, Y = torch.randn(50, 30), torch.randint(0, 3, (50,))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))


def test_the_memory_of_a_probe_is_its_vectors_and_graphs_and_a_pass() -> None:
    wanted = study(mlp(), [(X, Y)], fresh=0)
    made = wanted.subject(mlp())
    a_pass, graphs = made.chunk * made.activation_bytes, graph_bytes(made)
    for cost, expected in (
        (Cost(vectors=3, bytes=10, graphs=graphs), 3 * 4 * made.size + 10 + max(graphs, a_pass)),
        (Cost(gradients=50), a_pass),
    ):
        assert memory_of(Priced(cost), made) == expected
    assert memory_of(HessianSpectrum(examples=50), made) > krylov_vectors(made, 10, 300) * made.size * 4
    assert memory_of(PerformanceProbe(), made) == made.chunk * made.activation_bytes
    assert memory_of(WeightNormsProbe(), made) == 3 * 8 * 1200


def test_a_plan_names_the_memory_of_its_largest_probe() -> None:
    planned = plan(study(mlp(), [(X, Y)], fresh=0, probes=["performance", "hessian_spectrum"]))
    assert planned.bytes == max(line.bytes for line in planned.lines) == planned.lines[1].bytes
    assert json.loads(json.dumps(planned.to_dict()))["predicted_bytes"] == planned.bytes


def test_too_little_memory_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(BudgetError, match=r"hessian_spectrum: expected memory for 64 vectors of 1363 parameters"):
        plan(study(mlp(), [(X, Y)], fresh=0, probes=["hessian_spectrum"], memory=300_000))


def test_the_chosen_parameters_go_through_plan_measurement_and_settings() -> None:
    options = {"fresh": 1, "probes": {"spectrum": HessianSpectrum(density=False)}}
    wanted = study(mlp(), [(X, Y)], parameters="2", **options)
    assert plan(wanted).parameters == 123
    analysis = run(wanted)
    assert [record.measurement.conditions.parameters for record in analysis.records] == [123, 123]  # type: ignore[union-attr]
    assert wanted.settings("spectrum")["parameters"] == "2"
    assert "parameters" not in study(mlp(), [(X, Y)], **options).settings("spectrum")
    measured = hessian_spectrum(mlp(), [(X, Y)], parameters=["2.weight"], density=False)
    assert measured.conditions.parameters == 120
    with pytest.raises(UnknownNameError, match="parameter or module"):
        hessian_spectrum(mlp(), [(X, Y)], parameters="3")
