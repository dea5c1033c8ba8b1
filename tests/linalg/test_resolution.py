import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.krylov import lanczos
from plasticity_probe.linalg.operator import DenseOperator
from plasticity_probe.linalg.quadrature import quadrature_from_krylov
from plasticity_probe.linalg.resolution import Distribution, rank_bounds


def ranked(name: str):
    return lambda values, counts: ranks.rank(values, name, weights=counts)


def seen_exactly(values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The Gauss nodes of the measure with equal mass at each value: Lanczos from the vector of ones."""
    krylov = lanczos(DenseOperator(torch.diag(values)), torch.ones_like(values), steps)
    quadrature = quadrature_from_krylov(krylov)
    return quadrature.nodes[0], len(values) * quadrature.weights[0]


@given(st.integers(0, 10_000), st.integers(3, 12), st.sampled_from([0.3, 1.0, 3.0]))
@settings(deadline=None, max_examples=20)
def test_bounds_hold_for_the_spectrum_the_nodes_came_from(seed, steps, tail):
    """With equal masses there is no sampling error: what is left is the error of few steps, which the bounds must cover."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    values = (values.sign() * values.abs() ** (1 / tail)).sort()[0]
    nodes, counts = seen_exactly(values, steps)
    ends = values[[0]], values[[-1]]
    nodes = torch.cat([ends[0], nodes, ends[1]])
    counts = torch.cat([torch.zeros(1), counts, torch.zeros(1)]).double()
    known = torch.zeros(len(nodes), dtype=torch.bool)
    known[[0, -1]] = True
    for name in ("threshold_rank", "effective_rank", "stable_rank", "participation_ratio", "energy_rank"):
        lower, upper = rank_bounds(nodes, counts, known, ranked(name))
        truth = ranks.rank(values, name)
        assert lower <= truth * (1 + 1e-9)
        assert truth <= upper * (1 + 1e-9)


def test_known_nodes_leave_nothing_open():
    nodes, counts = torch.tensor([-1.0, 0.5, 4.0]).double(), torch.tensor([2.0, 5.0, 1.0]).double()
    bounds = rank_bounds(nodes, counts, torch.ones(3, dtype=torch.bool), ranked("effective_rank"))
    assert bounds.lower == bounds.upper == ranks.effective_rank(nodes, counts)


def test_bounds_by_hand():
    # Mass 2 at 1 between the known 0 and 3: it may all lie at 3 or at 0, or one half each way.
    nodes, counts = torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([1.0, 2.0, 1.0]).double()
    known = torch.tensor([True, False, True])
    bounds = rank_bounds(nodes, counts, known, ranked("participation_ratio"))
    assert bounds == (1.0, 3.0)


def test_positive_spectra_reach_down_to_zero():
    nodes, counts = torch.tensor([2.0, 3.0]).double(), torch.tensor([5.0, 1.0]).double()
    known = torch.tensor([False, True])
    assert rank_bounds(nodes, counts, known, ranked("participation_ratio"), positive=True).lower == 1.0
    assert rank_bounds(nodes, counts, known, ranked("participation_ratio")).lower > 5.0


def distribution(nodes: Tensor, weights: Tensor, **settings) -> Distribution:
    given = {"exact": torch.zeros(len(nodes)), "smallest": 1, "largest": 1, "size": 10, "ceiling": 10, "eps": 1e-7}
    return Distribution(nodes, weights, **{**given, **settings})


def test_the_whole_spectrum_is_exact():
    values = torch.tensor([[-3.0, 0.0, 1.0, 2.0]]).double()
    whole = distribution(values, torch.full_like(values, 0.25), size=4, ceiling=4, exact=torch.ones(1))
    assert whole.rank("stable_rank", 0.01) == (14 / 9, 14 / 9, 14 / 9)
    assert whole.negative_share() == 0.5
    assert whole.known_eigenvalues().tolist() == [2.0, 1.0, 0.0, -3.0]


def test_rounding_counts_as_zero_and_the_ceiling_cuts():
    nodes = torch.tensor([[-1e-9, 1e-9, 1.0], [-2e-9, 2e-9, 1.0]]).double()
    weights = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.8, 0.1]]).double()
    assert distribution(nodes, weights).rank("effective_rank", 0.01).value == pytest.approx(1.0)
    fine = distribution(nodes, weights, eps=1e-12, size=10**9, ceiling=5)
    assert fine.rank("effective_rank", 0.01) == (5.0, pytest.approx(5.0), 5.0)


def test_nan_nodes_have_no_rank():
    nodes = torch.full((2, 1), math.nan).double()
    assert all(math.isnan(part) for part in distribution(nodes, nodes).rank("threshold_rank", 0.01))


def test_weight_zero_fillers_are_ignored():
    nodes = torch.tensor([[-1.0, 0.2, 0.7, 3.0]]).double()
    weights = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).double()
    filled = (
        torch.tensor([[-1.0, 0.2, 0.7, 0.7, 0.7, 3.0]]).double(),
        torch.tensor([[0.1, 0.5, 0.3, 0, 0, 0.1]]).double(),
    )
    both = torch.ones(1), torch.zeros(1)
    for exact in both:
        plain = distribution(nodes, weights, exact=exact).rank("effective_rank", 0.01)
        assert distribution(*filled, exact=exact).rank("effective_rank", 0.01) == pytest.approx(plain)
