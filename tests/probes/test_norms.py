import math

import pytest
import torch
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError, UsageError
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.measurement import Status, headlines
from plasticity_probe.network.curvature import hessian
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import subject
from plasticity_probe.probes import norms
from plasticity_probe.probes.norms import GradientNormsProbe, gradient_norms, weight_norms

Loader = list[tuple[Tensor, Tensor]]


def rows(count: int = 20, width: int = 5, classes: int = 3) -> Loader:
    return [(torch.randn(count, width), torch.randint(0, classes, (count,)))]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


def test_every_norm_of_a_matrix_a_convolution_and_a_vector():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 4))
    found = weight_norms(net)
    assert found.status is Status.OK
    assert found.tensors == ("0.weight", "0.bias", "2.weight", "2.bias")
    doubles = [p.detach().double() for p in net.parameters()]
    torch.testing.assert_close(found.l2, torch.stack([p.norm() for p in doubles]), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(
        found.mean_absolute, torch.stack([p.abs().mean() for p in doubles]), rtol=1e-14, atol=0.0
    )
    truth = [torch.linalg.matrix_norm(p.reshape(len(p), -1), 2) if p.ndim > 1 else p.norm() for p in doubles]
    torch.testing.assert_close(found.spectral, torch.stack(truth), rtol=1e-13, atol=0.0)
    assert (found.spectral_error < 1e-12 * found.spectral).all()
    everything = torch.cat([p.reshape(-1) for p in doubles])
    assert found.total_l2 == pytest.approx(float(everything.norm()), rel=1e-14)
    assert found.total_mean_absolute == pytest.approx(float(everything.abs().mean()), rel=1e-14)
    assert found.distance.isnan().all()
    assert math.isnan(found.total_distance)
    assert [line.name for line in headlines(found)] == [
        "total_l2",
        "total_mean_absolute",
        "total_distance",
        "spectral",
    ]


def test_distance_from_initialisation():
    net = mlp()
    initial = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        net.get_parameter("0.weight").add_(0.5)
        net.get_parameter("2.bias")[0] += 2.0
    found = weight_norms(net, initial=initial)
    torch.testing.assert_close(found.distance, torch.tensor([0.5 * math.sqrt(40), 0, 0, 2.0]).double())
    assert found.total_distance == pytest.approx(math.sqrt(0.25 * 40 + 4))
    del initial["2.weight"]
    partly = weight_norms(net, initial=initial)
    assert partly.distance.isnan().tolist() == [False, False, True, False]
    assert math.isnan(partly.total_distance)
    with pytest.raises(SubjectError, match=r"0\.bias"):
        weight_norms(net, initial={"0.bias": torch.zeros(3)})


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_neither_underflow_nor_overflow(scale):
    net = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        plain = net.weight.clone()
        net.weight.mul_(scale)
    found = weight_norms(net)
    assert found.status is Status.OK
    assert found.total_l2 == pytest.approx(scale * float(plain.double().norm()), rel=1e-6)
    truth = scale * float(torch.linalg.matrix_norm(plain.double(), 2))
    assert float(found.spectral[0]) == pytest.approx(truth, rel=1e-6)


def test_large_matrices_are_iterated_with_a_bound_of_the_error(monkeypatch):
    net = nn.Linear(90, 600, bias=False)
    truth = float(torch.linalg.matrix_norm(net.weight.detach().double(), 2))
    exact = weight_norms(net)
    monkeypatch.setattr(norms, "EXACT_SIDE", 50)
    with monkeypatch.context() as patched:
        patched.setattr(norms, "extreme_eigenpairs", lambda *a, **s: search(*a, **s, dense_below=10))
        from plasticity_probe.linalg.lanczos import extreme_eigenpairs as search

        iterated = weight_norms(net)
    assert float(exact.spectral[0]) == pytest.approx(truth, rel=1e-12)
    assert iterated.status is Status.OK
    assert abs(float(iterated.spectral[0]) - truth) <= float(iterated.spectral_error[0]) + 1e-12 * truth
    assert 0 < float(iterated.spectral_error[0]) < 1e-5 * truth


def test_frozen_counts_tied_counts_once_empty_is_skipped():
    net = Tied()
    net.embedding.weight.requires_grad_(False)
    net.register_parameter("nothing", nn.Parameter(torch.empty(0, 3)))
    net.register_parameter("whole", nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False))
    found = weight_norms(net)
    assert found.tensors == ("embedding.weight",)
    assert found.skipped == 2
    assert found.total_l2 == pytest.approx(float(net.embedding.weight.double().norm()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype):
    net = nn.Linear(40, 40).to(dtype)
    with torch.no_grad():
        net.weight.fill_(3e4)
    found = weight_norms(net)
    assert float(found.l2[0]) == pytest.approx(40 * float(net.weight.detach()[0, 0]), rel=1e-12)
    assert net.weight.dtype is dtype


def test_nan_in_one_tensor_is_named_and_leaves_the_others():
    net = mlp()
    with torch.no_grad():
        net.get_parameter("2.weight")[0, 0] = math.inf
    found = weight_norms(net)
    assert found.status is Status.NONFINITE
    assert "2.weight" in found.message
    assert found.l2.isnan().tolist() == [False, False, True, False]
    assert math.isnan(found.total_l2)


def test_zero_weights_have_zero_norms():
    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.zero_()
    found = weight_norms(net)
    assert found.status is Status.OK
    assert found.total_l2 == 0.0
    assert (found.spectral == 0).all()


def test_a_model_without_parameters_has_no_norms():
    found = weight_norms(nn.Tanh())
    assert found.tensors == ()
    assert math.isnan(found.total_l2)


def closed_form(net: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
    """The per-example gradients and the Hessian, dense, in float64."""
    with isolated():
        made = subject(net, loader, dtype=torch.float64)
        (batch,) = made.examples.chunks(len(made.examples))
        sums, counts = made.losses(made.parameters, batch)
        scale, leaves = len(sums) / counts.sum(), list(made.parameters.values())
        each = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(s * scale, leaves, retain_graph=True)]) for s in sums
        ]
        return torch.stack(each), to_dense(hessian(made))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_norms_against_dense_matrices(dtype):
    net, loader = mlp(), [(torch.randn(20, 5), torch.zeros(20, dtype=torch.int64))]
    gradients, curvature = closed_form(net, loader)
    mean = gradients.mean(0)
    found = gradient_norms(net, loader, dtype=dtype)
    close = 1e-3 if dtype is torch.float32 else 1e-9
    assert found.status is Status.OK, found.message
    assert found.total_l2 == pytest.approx(float(mean.norm()), rel=close)
    sizes = [p.numel() for p in net.parameters()]
    torch.testing.assert_close(found.l2, torch.stack([part.norm() for part in mean.split(sizes)]), rtol=close, atol=0.0)
    covariance = float((gradients - mean).square().sum() / 19)
    assert found.noise_trace == pytest.approx(covariance, rel=close)
    assert found.noise_scale == pytest.approx(covariance / (float(mean.square().sum()) - covariance / 20), rel=close)
    values, vectors = torch.linalg.eigh(curvature)
    assert values[-3] > values[-4]
    energy = float((vectors[:, -3:].T @ mean).square().sum() / mean.square().sum())
    assert found.subspace == 3
    assert found.top_energy == pytest.approx(energy, rel=close)
    image = curvature @ mean
    assert found.curvature_cosine == pytest.approx(float(mean @ image / mean.norm() / image.norm()), rel=close)
    biased = covariance / float(mean.square().sum())
    assert abs(biased - found.noise_scale) > 0.05 * biased


def test_noise_scale_is_unbiased_where_the_truth_is_known():
    # For a linear model with loss (w - x)^2 the gradient of an example is 2 (w - x): mean 2 (w - 3), variance 4 a dimension.
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w - x

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(batch[0]).square().sum(1)

    draws = [gradient_norms(Point(), [(3 + torch.randn(32, 4),)], loss=loss, dtype=torch.float64) for _ in range(40)]
    traces = torch.tensor([found.noise_trace for found in draws])
    assert abs(float(traces.mean()) - 16.0) < 4 * float(traces.std()) / math.sqrt(40)
    scales = torch.tensor([found.noise_scale for found in draws])
    assert abs(float(scales.mean()) - 16.0 / 144.0) < 4 * float(scales.std()) / math.sqrt(40) + 0.002


def test_ragged_loader_weighs_examples_not_batches():
    x, y = torch.randn(33, 5), torch.randint(0, 3, (33,))
    net = mlp().double()
    whole = gradient_norms(net, [(x, y)])
    ragged = gradient_norms(net, [(x[:32], y[:32]), (x[32:], y[32:])])
    assert ragged.total_l2 == pytest.approx(whole.total_l2, rel=1e-12)
    assert ragged.noise_scale == pytest.approx(whole.noise_scale, rel=1e-9)


def test_only_trainable_tensors_have_gradients():
    net = mlp()
    net[0].requires_grad_(False)
    assert gradient_norms(net, rows()).tensors == ("2.weight", "2.bias")
    tied = Tied()
    x = torch.randint(0, 7, (6, 4))
    assert gradient_norms(tied, [(x, torch.randint(0, 7, (6, 4)))]).tensors == ("embedding.weight",)


def test_zero_gradient_has_no_direction():
    net = nn.Linear(3, 1, bias=False)
    x = torch.randn(6, 3)
    found = gradient_norms(net, [(x, net(x).detach())], dtype=torch.float64)
    assert found.total_l2 == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        net.weight.zero_()
    zero = gradient_norms(net, [(x, torch.zeros(6, 1))])
    assert zero.status is Status.OK
    assert zero.total_l2 == 0.0
    assert math.isnan(zero.top_energy)
    assert math.isnan(zero.curvature_cosine)
    assert math.isnan(zero.noise_scale)
    assert "exactly zero" in zero.message


def test_zero_hessian_has_no_top_direction():
    found = gradient_norms(nn.Linear(3, 1), rows(width=3), loss=lambda model, batch: model(batch[0])[:, 0])
    assert found.status is Status.OK
    assert math.isnan(found.top_energy)
    assert "Hessian is exactly zero" in found.message
    assert found.total_l2 > 0


def test_noise_without_signal_is_said():
    x = torch.tensor([[1.0], [-1.0]])
    found = gradient_norms(nn.Linear(1, 1, bias=False).double(), [(x, torch.tensor([[9.0], [9.0]]))])
    assert math.isnan(found.noise_scale)
    assert "more examples" in found.message


def test_nan_weights_are_a_status():
    net = mlp()
    with torch.no_grad():
        net.get_parameter("0.weight")[0, 0] = math.nan
    found = gradient_norms(net, rows())
    assert found.status is Status.NONFINITE
    assert "0.weight" in found.message
    assert math.isnan(found.total_l2)
    assert found.l2.isnan().all()


def test_eigenvectors_that_did_not_converge_are_a_status():
    net = nn.Sequential(nn.Linear(5, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 3))
    found = gradient_norms(net, rows(), k=10, max_products=24)
    assert found.status is Status.NOT_CONVERGED
    assert "max_products" in found.message
    assert found.total_l2 > 0


@pytest.mark.parametrize(
    "settings", [{"k": 0}, {"tol": 0.0}, {"examples": 0}, {"max_products": 23}, {"k": 40, "max_products": 80}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(UsageError):
        GradientNormsProbe(**settings)
