import math

import pytest
import torch
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError, UnknownNameError, UsageError
from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.linalg.quadrature import cumulative, density, exact_quadrature
from plasticity_probe.measurement import Status, headlines
from plasticity_probe.network import curvature as curvature_module
from plasticity_probe.network.curvature import CurvatureOperator, curvature
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import subject
from plasticity_probe.probe import generator_for
from plasticity_probe.probes.norms import GradientNormsProbe
from plasticity_probe.probes.spectrum import HessianSpectrum, Spectrum, hessian_spectrum

Loader = list[tuple[Tensor, Tensor]]


def rows(count: int = 40, width: int = 8, classes: int = 4) -> Loader:
    return [(torch.randn(count, width), torch.randint(0, classes, (count,)))]


def mlp(hidden: int = 26, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """With 26 hidden units 1040 parameters: above what is solved by forming the matrix."""
    return nn.Sequential(
        nn.Linear(8, hidden), activation(), nn.Linear(hidden, hidden), activation(), nn.Linear(hidden, 4)
    )


def eigenvalues(net: nn.Module, loader: Loader, matrix: str = "hessian") -> Tensor:
    """All eigenvalues, descending, from the dense matrix in float64."""
    with isolated():
        return torch.linalg.eigvalsh(to_dense(curvature(subject(net, loader, dtype=torch.float64), matrix))).flip(0)


def dead_first_layer() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 26), nn.ReLU(), nn.Linear(26, 26), nn.ReLU(), nn.Linear(26, 4))
    with torch.no_grad():
        net.get_parameter("0.bias").fill_(-1000.0)
    return net


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_extreme_eigenvalues_trace_and_weights_of_a_large_matrix(matrix):
    net, loader = mlp().double(), rows()
    truth = eigenvalues(net, loader, matrix)
    assert len(truth) > 512
    found = hessian_spectrum(net, loader, matrix=matrix)
    assert found.status is Status.OK, found.message
    assert found.matrix == matrix
    scale = float(truth[0])
    torch.testing.assert_close(found.top, truth[:10], rtol=1e-6, atol=1e-9 * scale)
    torch.testing.assert_close(found.bottom, truth.flip(0)[:10], rtol=1e-5, atol=1e-9 * scale)
    assert (found.top_residuals <= 1e-3 * found.top.abs()).all()
    assert abs(found.matrix_trace - float(truth.sum())) <= 4 * found.matrix_trace_sem
    assert found.matrix_trace_lower <= float(truth.sum()) <= found.matrix_trace_upper
    torch.testing.assert_close(found.weights.sum(1), torch.ones(len(found.weights), dtype=torch.float64))
    assert found.products < 400


def test_small_matrices_are_exact():
    net, loader = mlp(8).double(), rows()
    truth = eigenvalues(net, loader)
    found = hessian_spectrum(net, loader)
    assert found.status is Status.OK
    torch.testing.assert_close(found.nodes[0], truth.flip(0), rtol=1e-9, atol=1e-13)
    assert found.matrix_trace == pytest.approx(float(truth.sum()), rel=1e-10)
    assert found.matrix_trace_sem == 0.0
    rank = found.rank()
    assert rank.value == ranks.threshold_rank(truth)
    assert rank.interval == (rank.value, rank.value)
    assert rank.effective_rank == pytest.approx(ranks.effective_rank(truth), rel=1e-6)
    torch.testing.assert_close(rank.eigenvalues, truth, rtol=1e-9, atol=1e-13)
    negative = float(truth.clamp(max=0).abs().sum() / truth.abs().sum())
    assert found.negative_share == pytest.approx(negative, rel=1e-8)


def test_fewer_parameters_than_pairs():
    found = hessian_spectrum(nn.Linear(1, 2, bias=False).double(), rows(width=1, classes=2), k=10)
    assert len(found.top) == len(found.bottom) == 2
    assert found.status is Status.OK
    torch.testing.assert_close(found.top, found.bottom.flip(0))
    assert found.rank("numerical_rank").value == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_interval_of_the_rank_covers_the_dense_one(seed):
    torch.manual_seed(seed)
    net, loader = mlp(activation=nn.ReLU if seed % 2 else nn.Tanh).double(), rows()
    truth = eigenvalues(net, loader)
    found = hessian_spectrum(net, loader, seed=seed)
    for definition in ("threshold_rank", "effective_rank", "stable_rank", "participation_ratio"):
        rank, exact = found.rank(definition), ranks.rank(truth, definition)
        assert rank.lower <= exact <= rank.upper
        assert rank.lower <= float(rank) <= rank.upper
        assert rank.value == pytest.approx(exact, rel=0.35)
    ends = torch.cat([found.top, found.bottom])
    assert ranks.threshold_rank(ends) < found.threshold_rank_lower, "the ends alone would miss most of the sum"


def test_density_is_the_dense_one():
    net, loader = mlp().double(), rows()
    truth = exact_quadrature(eigenvalues(net, loader))
    found = hessian_spectrum(net, loader, density_products=80)
    grid = found.grid(2000)
    assert float(torch.trapezoid(found.density(grid), grid)) == pytest.approx(1.0, abs=1e-3)
    assert found.density().shape == (1000,)
    for t in (0.5 * float(found.top[0]), float(found.top[4]), 0.1 * float(found.top[0]), 0.3 * float(found.bottom[0])):
        at = torch.tensor([t])
        mine = float((found.weights * (found.nodes > t)).sum(1).mean())
        assert mine == pytest.approx(1 - float(cumulative(truth, at)), abs=0.04)
    wide = 0.05 * float(grid[-1] - grid[0])
    smooth, exact = found.density(grid, wide), density(truth, grid, wide)
    # A kernel of slope at most 1 / (wide^2 sqrt(2 pi e)) turns a Wasserstein distance into a largest difference.
    allowed = found.density_error / (wide**2 * math.sqrt(2 * math.pi * math.e))
    assert float((smooth - exact).abs().max()) < min(allowed, 0.05 * float(exact.max()))
    unweighted = exact_quadrature(found.nodes.flatten())
    assert float((density(unweighted, grid, wide) - exact).abs().max()) > max(allowed, 0.1 * float(exact.max()))


def test_steps_beyond_the_rank_make_no_phantoms():
    net, loader = dead_first_layer(), rows()
    truth = eigenvalues(net, loader)
    found = hessian_spectrum(net, loader, density_products=400, accuracy=1e-9)
    assert found.status is Status.OK, found.message
    assert float(found.nodes.max()) == pytest.approx(float(truth[0]), rel=1e-4)
    torch.testing.assert_close(found.top, truth[:10].clamp(min=0), rtol=1e-4, atol=1e-5 * float(truth[0]))
    rank = found.rank()
    assert rank.lower <= ranks.threshold_rank(truth) <= rank.upper < 100
    numerical = found.rank("numerical_rank")
    assert numerical.lower <= float((truth.abs() > 1e-5 * truth[0]).sum()) <= numerical.upper


def test_parameters_on_which_nothing_depends_are_known_zeros():
    net, loader = dead_first_layer().double(), rows()
    truth = eigenvalues(net, loader)
    zero_rows = 8 * 26 + 26
    found = hessian_spectrum(net, loader)
    assert found.zeros >= zero_rows
    assert found.ceiling == len(truth) - found.zeros
    assert float(found.nodes[0, 10]) == 0.0
    assert float(found.weights[0, 10]) == pytest.approx(found.zeros / len(truth))
    assert found.rank().upper <= found.ceiling
    ends = torch.cat([found.top, found.bottom])
    assert found.matrix_trace == pytest.approx(float(truth.sum()), abs=4 * found.matrix_trace_sem + 1e-9)
    assert float((found.weights * found.nodes.square()).sum()) * len(truth) >= float(ends.square().sum()) * (1 - 1e-9)


def test_repeated_eigenvalues_are_all_found():
    net = nn.Linear(700, 1, bias=False).double()
    x = torch.zeros(20, 700).double()
    x[torch.arange(20), torch.arange(20)] = math.sqrt(20.0)
    found = hessian_spectrum(net, [(x, torch.zeros(20, 1).double())], k=10)
    torch.testing.assert_close(found.top, torch.full((10,), 2.0, dtype=torch.float64))
    assert found.rank("numerical_rank").value == pytest.approx(20.0, rel=0.5)
    assert found.matrix_trace == pytest.approx(40.0, abs=max(1e-9, 4 * found.matrix_trace_sem))


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_scale_of_the_loss_does_not_matter(factor):
    net, loader = mlp().double(), rows()

    def scaled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return factor * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    plain, other = hessian_spectrum(net, loader), hessian_spectrum(net, loader, loss=scaled)
    assert other.status is Status.OK
    torch.testing.assert_close(other.top, factor * plain.top, rtol=1e-6, atol=0.0)
    assert other.rank().effective_rank == pytest.approx(plain.rank().effective_rank, rel=1e-6)


def test_a_tiny_budget_is_no_silent_number():
    net, loader = mlp(), rows()
    found = hessian_spectrum(net, loader, max_products=24)
    assert found.status is Status.NOT_CONVERGED
    assert "max_products (now 24)" in found.message
    assert "did not converge" in found.message
    assert found.rank().status is Status.NOT_CONVERGED
    assert (found.bottom_residuals > 1e-3 * found.bottom.abs()).any()


def test_zero_hessian_has_rank_zero():
    net = nn.Sequential(nn.Linear(8, 80), nn.ReLU(), nn.Linear(80, 1, bias=False)).double()
    with torch.no_grad():
        net.get_parameter("0.bias").fill_(-1000.0)
    found = hessian_spectrum(net, [(torch.randn(12, 8), torch.randn(12, 1))])
    assert found.status is Status.OK
    assert found.message == ""
    assert (found.top == 0).all()
    assert (found.bottom == 0).all()
    assert found.matrix_trace == found.matrix_trace_sem == 0.0
    assert found.rank().value == 0.0
    assert found.rank().interval == (0.0, 0.0)
    assert found.effective_rank == 0.0
    assert math.isnan(found.negative_share)
    assert float(torch.trapezoid(found.density(), found.grid())) == pytest.approx(1.0, abs=1e-3)


def test_nan_weights_are_a_status():
    net = mlp()
    with torch.no_grad():
        net.get_parameter("2.weight")[0, 0] = math.nan
    found = hessian_spectrum(net, rows())
    assert found.status is Status.NONFINITE
    assert "NaN" in found.message
    assert found.top.isnan().all()
    assert math.isnan(found.matrix_trace)
    assert math.isnan(found.matrix_trace_sem)
    assert math.isnan(float(found.rank()))
    assert found.rank().status is Status.NONFINITE


def test_without_density_there_are_eigenvalues_and_trace_but_no_rank():
    net, loader = mlp().double(), rows()
    truth = eigenvalues(net, loader)
    found = hessian_spectrum(net, loader, density=False)
    assert found.status is Status.OK
    assert abs(found.matrix_trace - float(truth.sum())) <= 4 * found.matrix_trace_sem
    assert math.isnan(found.threshold_rank)
    with pytest.raises(UsageError, match="density=True"):
        found.density()
    with pytest.raises(UsageError, match="density=True"):
        found.rank()


def test_known_eigenvalues_add_no_variance_to_the_trace():
    net, x = nn.Linear(700, 1, bias=False).double(), torch.randn(64, 700).double()
    x[:, :8] *= 100
    truth = torch.linalg.eigvalsh(2 * x.T @ x / 64).flip(0)
    found = hessian_spectrum(net, [(x, torch.randn(64, 1).double())], accuracy=1e-4, density_products=30)
    assert abs(found.matrix_trace - float(truth.sum())) <= 4 * found.matrix_trace_sem + 1e-9
    without_deflation, with_it = (math.sqrt(2 * float(part.square().sum()) / 10) for part in (truth, truth[10:]))
    assert found.matrix_trace_sem < 3 * with_it < 0.01 * without_deflation


def test_products_spent_on_the_density_give_the_trace_too():
    net, loader = mlp().double(), rows()
    truth = eigenvalues(net, loader)
    sloppy = hessian_spectrum(net, loader, accuracy=0.5)
    fine = hessian_spectrum(net, loader, accuracy=0.03, density_products=300)
    spent = fine.products - sloppy.products
    assert 0 < spent < 300
    assert fine.accuracy_reached == sloppy.accuracy_reached == 1.0
    assert fine.matrix_trace_sem <= 0.03 * float(truth.abs().sum()) * 1.3
    assert fine.density_error <= 0.03 * float(fine.top[-1] - fine.bottom[-1])
    for found in (sloppy, fine):
        assert abs(found.matrix_trace - float(truth.sum())) <= 4 * found.matrix_trace_sem
    out_of_reach = hessian_spectrum(net, loader, accuracy=1e-4)
    assert out_of_reach.accuracy_reached == 0.0
    assert out_of_reach.status is Status.OK
    assert out_of_reach.density_error > 1e-4 * float(fine.top[-1] - fine.bottom[-1])


def test_why_a_rank_is_wide_is_said_and_a_larger_share_settles_it():
    net, loader = mlp().double(), rows()
    truth = eigenvalues(net, loader)
    found = hessian_spectrum(net, loader, density_products=150)
    rank = found.rank()
    assert rank.upper > 2 * rank.lower
    assert rank.validity.startswith("hardly determined")
    assert "Lanczos steps" in rank.validity
    swept = found.rank_sweep([0.01, 0.05, 0.2, 0.5])
    assert float(swept.value[0]) == rank.value
    for delta, lower, upper in zip(swept.deltas, swept.lower, swept.upper, strict=True):
        assert lower <= ranks.threshold_rank(truth, float(delta)) <= upper
    assert (swept.value.diff() < 0).all()
    assert float(swept.upper[2] / swept.lower[2]) < 2.5 < float(swept.upper[0] / swept.lower[0])
    with pytest.raises(UsageError, match="energy_rank"):
        found.rank_sweep([0.1], "stable_rank")
    with pytest.raises(UsageError, match="at least one delta"):
        found.rank_sweep([])
    with pytest.raises(UsageError, match="rank_sweep"):
        rank.sweep([0.1])


@pytest.mark.parametrize(("matrix", "ceiling"), [("fisher", 40), ("ggn", 120)])
def test_examples_limit_the_rank(matrix, ceiling):
    net, loader = mlp().double(), rows()
    truth = eigenvalues(net, loader, matrix)
    found = hessian_spectrum(net, loader, matrix=matrix)
    assert (found.bottom == 0).all()
    assert (found.bottom_residuals == 0).all()
    rank = found.rank()
    assert rank.ceiling == ceiling
    assert rank.lower <= ranks.threshold_rank(truth) <= rank.upper <= ceiling
    assert rank.value <= ceiling
    few = hessian_spectrum(net, loader, matrix=matrix, density_products=10).rank()
    assert few.lower <= ranks.threshold_rank(truth) <= few.upper
    assert few.upper - few.lower >= rank.upper - rank.lower


def test_ragged_loader_weighs_examples_not_batches():
    net = nn.Linear(5, 1, bias=False).double()
    x, y = torch.randn(33, 5).double(), torch.randn(33, 1).double()
    x[32] *= 10
    found = hessian_spectrum(net, [(x[:32], y[:32]), (x[32:], y[32:])])
    truth = torch.linalg.eigvalsh(2 * x.T @ x / 33)
    torch.testing.assert_close(found.top, truth.flip(0), rtol=1e-10, atol=0.0)


def test_same_seed_same_numbers_and_other_seed_other_draws():
    net, loader = mlp(), rows()
    first, again, other = (hessian_spectrum(net, loader, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.nodes, again.nodes)
    assert not torch.equal(first.weights, other.weights)
    torch.testing.assert_close(first.top, other.top, rtol=1e-3, atol=0.0)


def test_nothing_is_left_changed():
    net = mlp().train()
    net.get_parameter("0.weight").grad = torch.ones_like(net.get_parameter("0.weight"))
    loader, before = rows(), {n: p.clone() for n, p in net.named_parameters()}
    state = torch.random.get_rng_state()
    hessian_spectrum(net, loader, k=2)
    assert net.training
    gradient = net.get_parameter("0.weight").grad
    assert gradient is not None
    assert (gradient == 1).all()
    assert net.get_parameter("2.weight").grad is None
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_spectrum_and_gradient_norms_share_one_search(monkeypatch):
    searches: list[int] = []
    search = curvature_module.extreme_eigenpairs

    def counted(operator: CurvatureOperator, *args, **settings):
        searches.append(1)
        return search(operator, *args, **settings)

    monkeypatch.setattr(curvature_module, "extreme_eigenpairs", counted)
    with isolated():
        made = subject(mlp(), rows(150))
        spectrum = HessianSpectrum().measure(made, generator_for(0, "hessian_spectrum"))
        gradient = GradientNormsProbe().measure(made, generator_for(0, "gradient_norms"))
        assert len(searches) == 1
        alone = HessianSpectrum().measure(subject(made.model, rows_of(made)), generator_for(0, "hessian_spectrum"))
    assert spectrum.conditions.examples == gradient.conditions.examples == 128
    assert torch.equal(alone.top, spectrum.top)


def rows_of(made) -> Loader:
    (batch,) = made.examples.chunks(len(made.examples))
    return [batch]


def test_table_is_short_and_cost_counts_products():
    net, loader = mlp(), rows()
    found = hessian_spectrum(net, loader)
    assert [line.name for line in headlines(found)] == [
        "top",
        "bottom",
        "matrix_trace",
        "matrix_trace_sem",
        "threshold_rank",
        "threshold_rank_lower",
        "threshold_rank_upper",
        "effective_rank",
        "negative_share",
    ]
    made = subject(net, loader)
    cost = HessianSpectrum().cost(made)
    assert cost.products >= 40 * found.products
    assert cost.vectors > 0
    assert cost.graphs > 0


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"matrix": "hesian"}, UnknownNameError, "hessian"),
        ({"k": 0}, UsageError, "k"),
        ({"tol": 0.0}, UsageError, "tol"),
        ({"max_products": 23}, UsageError, "24"),
        ({"density_products": 4}, UsageError, "density_products"),
        ({"accuracy": 0.0}, UsageError, "accuracy"),
        ({"engine": "pyhesian"}, UnknownNameError, "engine"),
    ],
)
def test_wrong_settings_are_refused(settings, error, text):
    with pytest.raises(error, match=text):
        HessianSpectrum(**settings)


def test_ggn_of_a_custom_loss_is_refused():
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).square().sum(1)

    with pytest.raises(SubjectError, match="loss of outputs and targets"):
        hessian_spectrum(mlp(), rows(), loss=loss, matrix="ggn")


def test_unknown_rank_definition_is_named():
    found = hessian_spectrum(mlp(4), rows())
    with pytest.raises(UnknownNameError, match="threshold_rank"):
        found.rank("treshold_rank")


def test_epsilon_rank_needs_its_epsilon():
    net, loader = mlp(8).double(), rows()
    found: Spectrum = hessian_spectrum(net, loader)
    assert float(found.rank("epsilon_rank", epsilon=1e-3)) == float((eigenvalues(net, loader).abs() > 1e-3).sum())
    with pytest.raises(UsageError, match="epsilon"):
        found.rank("epsilon_rank")
