import gc
import importlib
import math
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticity_probe.errors import BudgetError, SubjectError, UsageError
from plasticity_probe.linalg.inspection import EigenStatus
from plasticity_probe.linalg.matrix_trace import hutchinson
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.network import pyhessian_engine as module
from plasticity_probe.network.curvature import hessian
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.pyhessian_engine import (
    _pyhessian,
    check_pyhessian_request,
    pyhessian_eigenpairs,
    pyhessian_trace,
)
from plasticity_probe.network.subject import Subject, subject


@pytest.fixture(autouse=True)
def _isolated():
    with isolated():
        torch.manual_seed(0)
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def rows(count: int = 33) -> list[tuple[Tensor, Tensor]]:
    x, y = torch.randn(count, 4), torch.randint(0, 3, (count,))
    return [(x[:32], y[:32]), (x[32:], y[32:])]


def quadratic(*curvatures: float, dtype: torch.dtype = torch.float64) -> Subject:
    """f(w) = sum c_i w_i^2 / 2, whose Hessian is diag(c)."""
    c = torch.tensor(curvatures)

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(len(curvatures)))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (0.5 * c.to(model.w) * model.w.square()).sum() * torch.ones_like(batch)  # type: ignore[operator, arg-type]

    return subject(Point(), [torch.zeros(3)], loss=loss, dtype=dtype)


def spectrum(made: Subject) -> Tensor:
    """The dense eigenvalues, descending."""
    return torch.linalg.eigvalsh(to_dense(hessian(made)).double()).flip(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_power_iteration_converges_it_agrees(dtype):
    made = subject(mlp(), rows(), dtype=dtype)
    truth = spectrum(made)
    top, bottom = pyhessian_eigenpairs(made, k=2, tol=1e-3, generator=generator())
    assert top.status is EigenStatus.OK
    torch.testing.assert_close(top.values, truth[:2], rtol=1e-3, atol=0)
    assert (top.residuals <= 1e-3 * top.values).all()
    assert top.vectors.dtype == dtype
    torch.testing.assert_close(top.vectors.norm(dim=0), torch.ones(2, dtype=dtype))
    assert bottom.values.isnan().all()
    assert bottom.values.shape == (2,)
    assert bottom.vectors.shape == (made.size, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trace_agrees_with_the_dense_one(dtype):
    made = subject(mlp(), rows(), dtype=dtype)
    found = pyhessian_trace(made, draws=60, generator=generator())
    assert abs(found.value - float(spectrum(made).sum())) < 4 * found.standard_error
    ours = hutchinson(hessian(made), 60, generator())
    assert found.standard_error == pytest.approx(ours.standard_error, rel=0.5)
    assert (found.draws, found.products) == (60, 60)


def test_both_signs_go_to_their_ends():
    top, bottom = pyhessian_eigenpairs(quadratic(1, -5, 3, 0.2, -2, 0.1), k=4, tol=1e-2, generator=generator())
    assert top.values[:2].tolist() == pytest.approx([3, 1], rel=1e-3)
    assert bottom.values[:2].tolist() == pytest.approx([-5, -2], rel=1e-3)
    assert top.values[2:].isnan().all()
    assert bottom.residuals[2:].isnan().all()
    for end in (top, bottom):
        reached = bool((end.residuals[:2] <= 1e-2 * end.values[:2].abs()).all())
        assert (end.status is EigenStatus.OK) == reached
    assert top.norm == pytest.approx(5, rel=1e-3)


def test_eigenvalues_of_equal_size_and_opposite_sign_are_not_passed_on_as_converged():
    # With 1, -1 and 0.1 a power iteration stays in a mixture of the first two and names 0.93 or the like.
    made = quadratic(1, -1, 0.1)
    top, bottom = pyhessian_eigenpairs(made, k=2, tol=1e-3, generator=generator())
    assert EigenStatus.NOT_CONVERGED in (top.status, bottom.status)
    values = torch.cat([top.values, bottom.values])
    wrong = (values.abs() - 1).abs() > 1e-3
    residuals = torch.cat([top.residuals, bottom.residuals])
    assert (residuals[wrong & values.isfinite()] > 1e-3).all()


def test_a_hessian_below_its_absolute_constant_is_not_passed_on_as_converged():
    # PyHessian divides by |v| + 1e-6, so that curvature of 1e-12 shortens its vectors.
    top, _ = pyhessian_eigenpairs(quadratic(3e-12, 1e-12, 2e-13), k=1, tol=1e-3, generator=generator())
    assert abs(float(top.values[0]) / 3e-12 - 1) > 0.1
    assert top.status is EigenStatus.NOT_CONVERGED


def test_a_vector_of_length_zero_is_no_evidence():
    top, _ = pyhessian_eigenpairs(quadratic(3, 0, 0), k=2, tol=1e-3, generator=generator())
    assert float(top.values[0]) == pytest.approx(3, rel=1e-5)
    assert float(top.residuals[0]) < 1e-4
    assert top.status is EigenStatus.NOT_CONVERGED


def test_zero_and_nonfinite_matrices_have_their_status():
    top, bottom = pyhessian_eigenpairs(quadratic(0, 0), k=5, tol=1e-3, generator=generator())
    assert (top.status, bottom.status) == (EigenStatus.ZERO_OPERATOR, EigenStatus.ZERO_OPERATOR)
    assert top.values.tolist() == [0, 0]
    top, bottom = pyhessian_eigenpairs(quadratic(math.nan, 1), k=1, tol=1e-3, generator=generator())
    assert (top.status, bottom.status) == (EigenStatus.NONFINITE, EigenStatus.NONFINITE)
    assert top.values.isnan().all()


def test_the_trace_of_a_negative_matrix_takes_all_draws():
    made = quadratic(-1, -2)
    assert pyhessian_trace(made, draws=20, generator=generator()).draws == 20
    with _pyhessian(made, generator()) as run:
        assert len(run.trace(maxIter=20)) == 2, "its own stopping rule divides by the trace with its sign"


def token_terms(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Per sequence the sum of its tokens' losses and their number."""
    losses = F.cross_entropy(model(batch["x"]).movedim(-1, 1), batch["y"], reduction="none", ignore_index=-100)
    return losses.sum(1), (batch["y"] != -100).sum(1)


class Tokens(nn.Module):
    """A tied head, attention, and a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.mix = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.embedding(x)) @ self.embedding.weight.T


def subjects() -> dict[str, Subject]:
    """What PyHessian by itself refuses, or averages over batches as if they were of one size."""
    targets = torch.randint(0, 5, (9, 6)).masked_fill(torch.rand(9, 6) < 0.5, -100)
    sequences = [{"x": torch.randint(0, 5, (9, 6)), "y": targets}]
    ragged = subject(mlp().double(), rows())
    ragged.__dict__["chunk"] = 10
    frozen = mlp().double()
    frozen.get_parameter("0.weight").requires_grad_(False)
    return {
        "ragged chunks": ragged,
        "mappings, tokens, unused and tied parameters": subject(Tokens().double(), sequences, loss=token_terms),
        "frozen parameters": subject(frozen, rows()),
        "a loss that is linear in a parameter": subject(
            nn.Linear(4, 1).double(), rows(), loss=lambda model, batch: model.weight.square().sum() + model(batch[0])[:, 0]
        ),
    }  # fmt: skip


def test_every_kind_of_subject_has_the_hessian_of_its_own_mean_loss():
    for name, made in subjects().items():
        v = torch.randn(made.size, dtype=torch.float64)
        ours = hessian(made) @ v
        with _pyhessian(made, generator()) as run:
            parts = list(made.unflatten(v).values())
            theirs = torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(run.gradsH, run.params, parts, retain_graph=True)]
            )
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-14, msg=name)
        top, bottom = pyhessian_eigenpairs(made, k=1, tol=1e-3, generator=generator(), max_iterations=2000)
        dense = spectrum(made)
        largest = float(dense[dense.abs().argmax()])
        assert float((top if largest > 0 else bottom).values[0]) == pytest.approx(largest, rel=1e-3), name


def test_nothing_is_left_changed():
    net = mlp().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    made = subject(net, rows())
    made.terms  # noqa: B018 -- remembered before the examples are compared
    state = torch.get_rng_state()
    pyhessian_eigenpairs(made, k=2, tol=1e-2, generator=generator())
    pyhessian_trace(made, draws=2, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert not made.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in made.model.state_dict().items())
    assert all(p.grad is None for p in [*net.parameters(), *made.model.parameters(), *made.parameters.values()])


def test_random_state_is_restored_also_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), _pyhessian(quadratic(1, 2), generator()):
        torch.rand(3)[0] + 1 / 0
    assert torch.equal(torch.get_rng_state(), state)


def test_it_repeats_from_one_seed_whatever_the_global_state():
    made = subject(mlp(), rows())
    first = pyhessian_trace(made, draws=3, generator=generator(5))
    torch.manual_seed(77)
    assert pyhessian_trace(made, draws=3, generator=generator(5)) == first
    assert pyhessian_trace(made, draws=3, generator=generator(6)) != first


def test_its_graphs_are_freed_without_the_collector():
    seen: list[weakref.ref[Tensor]] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(x)
            seen.append(weakref.ref(hidden))
            return hidden * hidden

    made = subject(nn.Sequential(nn.Linear(4, 6), Watched(), nn.Linear(6, 3)), rows())
    assert made.terms * made.activation_bytes > 0, "passes of their own, which are not what is watched"
    seen.clear()
    gc.collect()
    gc.disable()
    try:
        with _pyhessian(made, generator()):
            assert seen[-1]() is not None
        pyhessian_eigenpairs(made, k=1, tol=1e-2, generator=generator())
        pyhessian_trace(made, draws=2, generator=generator())
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


def test_products_are_counted():
    top, _ = pyhessian_eigenpairs(quadratic(3, 1), k=2, tol=1e-9, max_iterations=4, generator=generator())
    first, power, residuals = 1, 2 * 4, 2
    assert top.products == first + power + residuals


def test_train_mode_is_refused_rather_than_measured_in_eval_mode():
    made = subject(mlp(), rows(), mode="train")
    with pytest.raises(SubjectError, match="eval mode"):
        pyhessian_eigenpairs(made, k=1, tol=1e-3, generator=generator())
    with pytest.raises(SubjectError, match="eval mode"):
        pyhessian_trace(made, generator=generator())


def test_a_graph_that_does_not_fit_is_refused_before_it_is_built():
    made = subject(mlp(), rows(), memory=5_000)
    with pytest.raises(BudgetError, match="33 examples"):
        pyhessian_trace(made, generator=generator())


def test_density_and_other_matrices_are_refused_with_the_reason():
    check_pyhessian_request("hessian", density=False)
    with pytest.raises(UsageError, match=r"torch\.eig"):
        check_pyhessian_request("hessian", density=True)
    with pytest.raises(UsageError, match="'ggn'"):
        check_pyhessian_request("ggn", density=False)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"tol": 0.0}, {"tol": math.nan}, {"max_iterations": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match="expected k and max_iterations"):
        pyhessian_eigenpairs(quadratic(1, 2), **{"k": 1, "tol": 1e-3, "generator": generator(), **wrong})
    with pytest.raises(UsageError, match="2 draws"):
        pyhessian_trace(quadratic(1, 2), draws=1, generator=generator())


def test_only_who_asks_for_it_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    importlib.reload(module)
    made = quadratic(1, 2)
    with pytest.raises(ImportError):
        module.pyhessian_trace(made, generator=generator())
