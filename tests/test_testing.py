from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import torch

from plasticity_probe import registry
from plasticity_probe.measurement import Measurement, Quantity, measurement
from plasticity_probe.network.curvature import hessian
from plasticity_probe.network.gradients import per_example_gradients
from plasticity_probe.probe import Cost, Need, Probe
from plasticity_probe.registry import PROBES
from plasticity_probe.testing import check_probe, linear_regression, softmax_regression


@pytest.mark.parametrize("name", sorted(registry.registered(PROBES)))
def test_every_registered_probe_keeps_the_contract(name: str) -> None:
    check_probe(registry.load(PROBES, name)())


def test_linear_regression_has_the_hessian_it_says() -> None:
    made, exact = linear_regression()
    assert torch.allclose(hessian(made) @ torch.eye(4, dtype=torch.float64), exact, rtol=1e-12)


def test_softmax_regression_has_the_gradients_and_hessian_it_says() -> None:
    made = softmax_regression(dtype=torch.float64)
    (x, y) = next(iter(made.examples.chunks(100)))
    p = (x @ made.parameters["weight"].T).softmax(1).detach()
    errors = p - torch.nn.functional.one_hot(y, 3)
    assert torch.allclose(
        per_example_gradients(made, (x, y)), torch.einsum("nc,nf->ncf", errors, x).flatten(1), rtol=1e-12, atol=1e-14
    )
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("nab,ni,nj->aibj", inner, x, x).reshape(15, 15) / len(x)
    assert torch.allclose(hessian(made) @ torch.eye(15, dtype=torch.float64), exact, rtol=1e-10, atol=1e-14)


@measurement
class One(Measurement):
    value: Annotated[float, Quantity("a number")]


@dataclass(frozen=True)
class Careless(Probe[One]):
    fault: str = ""

    name: ClassVar[str] = "careless"
    title: ClassVar[str] = "breaks the contract"
    needs: ClassVar[Need] = Need.WEIGHTS
    returns: ClassVar[type[Measurement]] = One

    def cost(self, subject):
        return Cost(forwards=-1 if self.fault == "cost" else 0)

    def measure(self, subject, generator):
        value = 1.0
        if self.fault == "weights":
            with torch.no_grad():
                next(subject.model.parameters()).add_(1)
        if self.fault == "global":
            value = torch.rand(()).item()
        if self.fault == "hook":
            subject.model.register_forward_hook(lambda *_: None)
        if self.fault == "mode":
            subject.model.train()
        return One(conditions=subject.conditions(), value=value)


def test_a_careful_probe_passes_and_every_carelessness_is_found() -> None:
    check_probe(Careless())
    with pytest.raises(AssertionError, match="negative"):
        check_probe(Careless("cost"))
    with pytest.raises(AssertionError, match="differs between two measurements"):
        check_probe(Careless("global"))
    for fault in ("weights", "hook", "mode"):
        with pytest.raises(AssertionError, match="changed the subject"):
            check_probe(Careless(fault))
