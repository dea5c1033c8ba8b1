import pytest
import torch
from torch import Tensor, nn

import plasticity_probe as probe
from plasticity_probe.errors import SubjectError, UnknownNameError
from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.measurement import Status
from plasticity_probe.network.curvature import curvature
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import subject

Loader = list[tuple[Tensor, Tensor]]


def problem() -> tuple[nn.Module, Loader]:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return net, [(torch.randn(32, 6), torch.randint(0, 3, (32,))), (torch.randn(1, 6), torch.randint(0, 3, (1,)))]


def truth(net: nn.Module, loader: Loader, matrix: str) -> Tensor:
    with isolated():
        return torch.linalg.eigvalsh(to_dense(curvature(subject(net, loader, dtype=torch.float64), matrix))).flip(0)


def test_the_first_call_of_a_user_simply_works():
    net, loader = problem()
    rank = probe.curvature_rank(net, loader)
    assert float(rank) == ranks.threshold_rank(truth(net, loader, "fisher").clamp(min=0))
    assert rank.matrix == "fisher"
    assert rank.ceiling == 33
    assert rank.interval == (float(rank), float(rank))
    assert rank.status is Status.OK
    assert callable(probe.curvature_rank), "the name is a function the second time too"


@pytest.mark.parametrize("matrix", ["fisher", "hessian", "ggn"])
@pytest.mark.parametrize("definition", ["threshold_rank", "effective_rank", "stable_rank"])
def test_every_matrix_and_definition(matrix, definition):
    net, loader = problem()
    rank = probe.curvature_rank(net, loader, matrix=matrix, definition=definition, delta=0.05, dtype=torch.float64)
    exact = ranks.rank(truth(net, loader, matrix), definition, delta=0.05)
    assert float(rank) == pytest.approx(exact, rel=1e-6)
    assert (rank.matrix, rank.definition, rank.delta) == (matrix, definition, 0.05)
    assert rank.lower <= float(rank) <= rank.upper


def test_fisher_spectrum_and_gram_agree_on_the_rank():
    net, loader = problem()
    spectrum = probe.hessian_spectrum(net, loader, matrix="fisher", dtype=torch.float64)
    assert float(spectrum.rank()) == float(probe.curvature_rank(net, loader, dtype=torch.float64))


def test_options_reach_subject_and_probe():
    net, loader = problem()
    assert probe.curvature_rank(net, loader, examples=7).conditions.examples == 7
    few = probe.curvature_rank(net, loader, matrix="hessian", examples=7, k=2, density_products=8)
    assert few.conditions.examples == 7


def test_unknown_matrix_is_named():
    with pytest.raises(UnknownNameError, match="fisher"):
        probe.curvature_rank(*problem(), matrix="fischer")


def test_unknown_definition_is_named_before_any_work():
    net, _ = problem()
    with pytest.raises(UnknownNameError, match="effective_rank"):
        probe.curvature_rank(net, [], matrix="hessian", definition="efective_rank")


def test_ggn_of_a_custom_loss_is_refused():
    net, loader = problem()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).square().sum(1)

    assert probe.curvature_rank(net, loader, loss=loss).status is Status.OK
    with pytest.raises(SubjectError):
        probe.curvature_rank(net, loader, loss=loss, matrix="ggn")


def test_sweeps_over_the_share_left_out_agree_with_the_rank_itself():
    net, loader = problem()
    exact = probe.curvature_rank(net, loader)
    swept = exact.sweep([0.01, 0.1, 0.5])
    assert float(swept.value[0]) == exact.value
    assert torch.equal(swept.lower, swept.value)
    assert torch.equal(swept.upper, swept.value)
    for delta, value in zip(swept.deltas, swept.value, strict=True):
        assert float(value) == ranks.threshold_rank(exact.eigenvalues, float(delta))
    hessian = probe.hessian_spectrum(net, loader).rank_sweep([0.01, 0.1, 0.5], "energy_rank")
    assert hessian.definition == "energy_rank"
    assert (hessian.value.diff() <= 0).all()
