"""Six small networks from initialisation to collapse: what is measured in float32 is what the dense float64 matrix says."""

from functools import cache

import pytest
import six_networks
import torch
from six_networks import (
    COLLAPSED,
    DELTA,
    NETWORKS,
    SINGLE,
    STATES,
    Comparison,
    compared,
    dense_ranks,
    mean_loss,
    networks,
    row,
    truth,
)

import plasticity_probe as probe
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.network.curvature import DENSE_BELOW, curvature
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import subject

QUICK = [("MLP", "collapsed"), ("tied character LM", "collapsed"), ("conv + BatchNorm", "dead layer")]
GRID = [(name, state) for name in NETWORKS for state in STATES]
FISHER_FLOOR = ((six_networks.EXAMPLES + 1024) * SINGLE) ** 2
"""Share of the largest eigenvalue of the Fisher that rounding of the gradients may make, from the docstring of `noise_floor`."""

in_the_grid = cache(compared)

NEXT = 1.5
"""Factor by which a rank may lie outside of its interval, which holds it in 19 of 20 runs; how often is a test of its own."""


def check(found: Comparison, standard_errors: float) -> None:
    """Both ends within 1e-3 (or 1e-6 of the norm), the trace within its standard errors, every rank of a Hessian in its interval.

    Ranks of the other matrices lie in theirs or next to them.

    The status is ok; or, where not even an ideal Krylov method would converge within the products allowed, or where no gap divides the smallest
    eigenvalues, it says so, and every value lies as close to an eigenvalue as its residual says.
    """
    assert found.trace <= standard_errors
    assert not found.missed or found.spectrum.matrix != "hessian", found.missed
    assert all(low / NEXT <= dense <= high * NEXT for low, high, dense in found.missed.values()), found.missed
    if found.spectrum.status == "not_converged":
        assert beyond_reach(found) or without_a_gap(found)
        assert residuals_are_honest(found)
        return
    assert found.spectrum.status == "ok", found.spectrum.message
    assert bool(((found.top <= 1e-3) | (found.top_in_norms <= 1e-6)).all()), (found.top, found.top_in_norms)
    assert bool(((found.bottom <= 1e-3) | (found.bottom_in_norms <= 1e-6)).all()), (found.bottom, found.bottom_in_norms)


def residuals_are_honest(found: Comparison) -> bool:
    values = torch.cat([found.spectrum.top, found.spectrum.bottom])
    residuals = torch.cat([found.spectrum.top_residuals, found.spectrum.bottom_residuals])
    nearest = (values[:, None] - found.exact.eigenvalues).abs().amin(1)
    return bool((nearest <= residuals + 1e-4 * values.abs() + 1e-6 * found.exact.norm).all())


def without_a_gap(found: Comparison) -> bool:
    """Whether many more eigenvalues than were asked for are the smallest one to rounding: a random vector never tells that none is smaller."""
    values, k = found.exact.eigenvalues, len(found.spectrum.bottom)
    return int((values - values[0] <= SINGLE * found.exact.norm).sum()) > 5 * k


def beyond_reach(found: Comparison, products: int = 300, tol: float = 1e-3) -> bool:
    """Whether the Krylov space of as many exact products leaves some of the extreme pairs open: no restart or block does better."""
    values, norm, k = found.exact.eigenvalues, found.exact.norm, len(found.spectrum.top)
    basis = torch.linalg.qr(
        torch.randn(len(values), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    for _ in range(products):
        following = values * basis[:, -1]
        for _ in range(2):
            following = following - basis @ (basis.T @ following)
        if following.norm() <= 1e-12 * norm:
            return False
        basis = torch.cat([basis, (following / following.norm())[:, None]], 1)
    projected = basis[:, :-1].T @ (values[:, None] * basis[:, :-1])
    ritz, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    pairs = basis[:, :-1] @ vectors
    residuals = (values[:, None] * pairs - pairs * ritz).norm(dim=0)
    open_ones = residuals > tol * ritz.abs() + 64 * SINGLE * norm
    return bool(open_ones[:k].any() or open_ones[-k:].any())


@pytest.mark.parametrize(("name", "state"), QUICK)
def test_a_few_hessians(name: str, state: str) -> None:
    check(compared(name, state, "hessian"), 4)


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize(("name", "state"), GRID)
def test_the_whole_grid(name: str, state: str, matrix: str) -> None:
    check(in_the_grid(name, state, matrix), 4)


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_intervals_of_ranks_miss_as_rarely_as_they_say(matrix: str) -> None:
    """Of 24 spectra one in ten has one of seven ranks outside of its 95 % interval, as they hang together; more than 7 hardly ever have."""
    assert sum(bool(in_the_grid(name, state, matrix).missed) for name, state in GRID) <= 7


@pytest.mark.slow
def test_errors_of_the_trace_are_what_their_standard_errors_say() -> None:
    """Of 24 traces nine in ten lie within 3 of their standard errors, and not all within a fifth of one: then those would be too wide."""
    errors = sorted(compared(name, state, "hessian", seed=1).trace for name, state in GRID)
    assert errors[21] <= 3
    assert errors[-1] >= 0.2


@pytest.mark.parametrize(("name", "state"), [QUICK[0], pytest.param(*QUICK[1], marks=pytest.mark.slow)])
def test_the_quick_fisher_ranks(name: str, state: str) -> None:
    check_fisher_rank(name, state)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "state"), GRID)
def test_every_fisher_rank(name: str, state: str) -> None:
    check_fisher_rank(name, state)


def check_fisher_rank(name: str, state: str) -> None:
    rank = probe.fisher_rank(networks(name)[state], NETWORKS[name].loader())
    exact = truth(name, state, "fisher")
    dense = exact.eigenvalues.flip(0)[: len(rank.eigenvalues)].clamp(min=0)
    torch.testing.assert_close(rank.eigenvalues, dense, rtol=1e-3, atol=1e-6 * exact.norm)
    exact_ranks = dense_ranks(dense)
    for definition in ("effective_rank", "stable_rank", "participation_ratio"):
        assert getattr(rank, definition) == pytest.approx(exact_ranks[definition], rel=1e-3)
    shares = (dense / dense.sum()).cumsum(0)
    fewest, most = (int((shares < 1 - DELTA + slack).sum()) + 1 for slack in (-1e-5, 1e-5))
    assert fewest <= rank.threshold_rank <= most
    floor = max(FISHER_FLOOR * float(dense[0]), SINGLE * float(dense.sum()))
    above = [int((dense > factor * floor).sum()) for factor in (4.0, 0.25)]
    assert above[0] <= rank.numerical_rank <= above[1]


@pytest.mark.parametrize("name", [name for name, _ in QUICK])
def test_the_states_are_what_they_are_called(name: str) -> None:
    states = networks(name)
    x, y = NETWORKS[name].data()
    losses = {state: float(mean_loss(net(x), y).detach()) for state, net in states.items()}
    assert losses["initialisation"] > losses["mid-training"] > 100 * COLLAPSED
    assert COLLAPSED / 10 < truth(name, "collapsed", "hessian").loss <= COLLAPSED * 1.001
    sizes = {sum(p.numel() for p in net.parameters()) for net in states.values()}
    assert DENSE_BELOW < min(sizes) == max(sizes) < 2500


def test_a_layer_that_is_dead_passes_nothing_on() -> None:
    net = networks("MLP")["dead layer"]
    x, _ = NETWORKS["MLP"].data()
    assert not net[:3](x).any()
    assert float(probe.dead_units(net, NETWORKS["MLP"].loader()).dead_fraction[0]) == 1.0


def test_a_mean_of_batch_means_would_show() -> None:
    """The second batch holds one example, so averaging batches equally gives it 48 times its weight."""
    whole = truth("MLP", "mid-training", "hessian").eigenvalues
    net, batches = networks("MLP")["mid-training"], NETWORKS["MLP"].loader()
    with isolated():
        traces = [
            float(to_dense(curvature(subject(net, [batch], dtype=torch.float64), "hessian")).trace())
            for batch in batches
        ]
    equally = sum(traces) / len(traces)
    assert abs(equally - float(whole.sum())) > 0.05 * float(whole.sum())


def test_one_line_of_the_table() -> None:
    cells = [cell.strip() for cell in row("conv + BatchNorm", "dead layer", "hessian").strip("|").split("|")]
    assert len(cells) == len(six_networks.COLUMNS)
    assert cells[:5] == ["conv + BatchNorm", "dead layer", "hessian", "844", cells[4]]
