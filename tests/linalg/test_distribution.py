import math

import pytest
import torch
from spectra_cases import KNOWN, drawn, spectra, wasserstein
from torch import Tensor

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.distribution import Distribution, Estimate, validity

RANKS = ("threshold_rank", "energy_rank", "effective_rank", "stable_rank", "participation_ratio")


def distribution(nodes: Tensor, weights: Tensor, **settings) -> Distribution:
    given = {"exact": torch.zeros(len(nodes)), "smallest": 1, "largest": 1, "size": 10, "ceiling": 10, "eps": 1e-7}
    return Distribution(nodes, weights, **{**given, **settings})


def test_the_whole_spectrum_is_exact():
    values = torch.tensor([[-3.0, 0.0, 1.0, 2.0]]).double()
    whole = distribution(values, torch.full_like(values, 0.25), size=4, ceiling=4, exact=torch.ones(1))
    assert whole.rank("stable_rank") == Estimate.exact(14 / 9)
    assert whole.negative_share() == 0.5
    assert whole.known_eigenvalues().tolist() == [2.0, 1.0, 0.0, -3.0]
    assert whole.trace() == Estimate.exact(0.0)
    assert whole.density_error() == 0.0
    assert whole.matrix_function_trace(torch.square).value == 14.0


def test_known_zeros_complete_a_spectrum():
    values = torch.tensor([[-3.0, 0.0, 1.0, 2.0]]).double()
    weights = torch.tensor([[0.1, 0.7, 0.1, 0.1]]).double()
    whole = distribution(values, weights, zeros=7, exact=torch.ones(1))
    assert whole.whole
    assert whole.known_eigenvalues().tolist() == [2.0, 1.0, *[0.0] * 7, -3.0]
    for name in RANKS:
        assert whole.rank(name) == Estimate.exact(ranks.rank(torch.tensor([-3.0, 1.0, 2.0]), name))
    assert not distribution(values, weights, zeros=6, exact=torch.ones(1)).whole


def test_rounding_counts_as_zero_and_the_ceiling_cuts():
    nodes = torch.tensor([[-1.0, -1e-9, 1e-9, 1.0], [-1.0, -2e-9, 2e-9, 1.0]]).double()
    weights = torch.tensor([[0.1, 0.4, 0.4, 0.1], [0.1, 0.4, 0.4, 0.1]]).double()
    assert distribution(nodes, weights).rank("effective_rank").value == pytest.approx(2.0)
    assert distribution(nodes, weights, eps=1e-12, ceiling=5).rank("numerical_rank").upper == 5.0


def test_nan_nodes_have_no_rank_and_wrong_settings_are_refused_all_the_same():
    nodes = torch.full((2, 3), math.nan).double()
    broken = distribution(nodes, nodes)
    for name in (*RANKS, "numerical_rank"):
        assert math.isnan(broken.rank(name).value)
    assert math.isnan(broken.trace().value)
    assert math.isnan(broken.density_error())
    for one in (broken, drawn(spectra()["flat"], torch.Generator().manual_seed(0), draws=1, steps=6)):
        with pytest.raises(UsageError, match="delta"):
            one.rank("threshold_rank", 1.0)
        with pytest.raises(UsageError, match="epsilon"):
            one.rank("epsilon_rank")
        with pytest.raises(UnknownNameError, match="stable_rank"):
            one.rank("stabel_rank")


@pytest.mark.parametrize("name", spectra())
def test_without_sampling_error_the_steps_interval_always_holds_the_truth(name):
    """With equal weights at all eigenvalues, Lanczos from the vector of ones, only the steps are left to err."""
    values = spectra(90)[name]
    made = drawn(values, torch.Generator().manual_seed(0), draws=1, steps=7, start=torch.ones(90 - 2 * KNOWN).double())
    for definition in RANKS:
        found, truth = made.rank(definition, 0.05), ranks.rank(values, definition, delta=0.05)
        assert found.steps[0] * (1 - 1e-9) <= truth <= found.steps[1] * (1 + 1e-9), definition
    for function in (torch.exp, torch.abs, lambda x: (x - 0.3).clamp(min=0)):
        found, truth = made.matrix_function_trace(function), float(function(values).sum())
        assert found.steps[0] - 1e-9 <= truth <= found.steps[1] + 1e-9
    assert wasserstein(made, values) <= made.step_error() + 1e-9


def test_the_node_at_zero_counts_what_is_unresolved_as_zero():
    """Most eigenvalues are 1e-6 of the rest: a Gauss node beside zero would stand for all of them."""
    values = spectra()["power law"] ** 4
    errors: list[float] = []
    gauss: list[float] = []
    for seed in range(20):
        made = drawn(values, torch.Generator().manual_seed(seed), draws=1, steps=6)
        truth = ranks.rank(values, "threshold_rank", delta=1e-4)
        errors.append(abs(math.log(made.rank("threshold_rank", 1e-4).value / truth)))
        plain = ranks.rank(made.nodes[0], "threshold_rank", delta=1e-4, weights=made.size * made.weights[0])
        gauss.append(abs(math.log(plain / truth)))
    assert sum(errors) <= sum(gauss)


def test_more_steps_and_draws_make_the_errors_smaller():
    values = spectra(400)["flat"]
    few, long, many = (
        drawn(values, torch.Generator().manual_seed(1), draws=draws, steps=steps)
        for draws, steps in ((1, 10), (1, 40), (9, 10))
    )
    assert long.step_error() < 0.4 * few.step_error()
    assert many.draw_error() < 0.5 * few.draw_error()
    assert few.density_error() >= wasserstein(few, values)
    few_rank, long_rank = few.rank("threshold_rank"), long.rank("threshold_rank")
    assert long_rank.upper - long_rank.lower < few_rank.upper - few_rank.lower


def test_positive_spectra_reach_down_to_zero():
    nodes = torch.tensor([[2.0, 3.0, 5.0]]).double()
    weights = torch.tensor([[0.5, 0.4, 0.1]]).double()
    positive, bounded = (distribution(nodes, weights, smallest=0, positive=positive) for positive in (True, False))
    assert positive.rank("participation_ratio").steps[0] < bounded.rank("participation_ratio").steps[0]


def test_fillers_of_weight_zero_are_ignored():
    nodes = torch.tensor([[-1.0, 0.2, 0.7, 3.0]]).double()
    weights = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).double()
    filled = (
        torch.tensor([[-1.0, 0.2, 0.7, 0.7, 0.7, 3.0]]).double(),
        torch.tensor([[0.1, 0.5, 0.3, 0, 0, 0.1]]).double(),
    )
    for exact in (torch.ones(1), torch.zeros(1)):
        plain = distribution(nodes, weights, exact=exact).rank("effective_rank")
        assert distribution(*filled, exact=exact).rank("effective_rank")[:3] == pytest.approx(plain[:3])


def test_validity_says_what_is_missing():
    def said(value: float, lower: float, upper: float, steps: tuple[float, float]) -> str:
        return validity(Estimate(value, lower, upper, steps), 100, 20, 3)

    assert said(5, 5, 5, (5, 5)) == "exact"
    assert said(100, 100, 100, (100, 100)) == "exact; no rank can exceed 100 here"
    assert said(5, 4, 6, (4, 6)).startswith("determined")
    assert "20 Lanczos steps alone leave 4 to 90 open" in said(5, 3, 95, (4, 90))
    assert "3 random start vectors" in said(5, 2, 9, (5, 6))
    assert said(math.nan, math.nan, math.nan, (math.nan, math.nan)).startswith("not determined")
