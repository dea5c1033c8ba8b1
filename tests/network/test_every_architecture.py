"""Every architecture that people bring, against first derivatives of a loss written out by hand, and left as it was."""

import pytest
import torch
from architecture_cases import BATCH_STATISTICS, CASES, Case, Plain
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.curvature import fisher, ggn, hessian
from plasticity_probe.network.gradients import gram, mean_gradient
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


def measured(case: Case, model: nn.Module, dtype: torch.dtype | None = torch.float64) -> Subject:
    return subject(case.wrap(model), case.data(), mode=case.mode, dtype=dtype)  # type: ignore[arg-type]


def vectors(size: int) -> list[Tensor]:
    drawn = torch.randn(3, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return list(drawn / drawn.norm(dim=1, keepdim=True))


def close(found: Tensor, truth: Tensor, tolerance: float) -> bool:
    return bool((found.double() - truth).norm() <= tolerance * truth.norm())


@pytest.mark.parametrize("name", CASES)
def test_everything_is_what_first_derivatives_give(name: str) -> None:
    case = CASES[name]
    model = case.network()
    plain = Plain(case, model, case.data())
    with isolated():
        made = measured(case, model)
        assert made.mean_loss == pytest.approx(plain.mean_loss, rel=1e-12)
        assert close(made.flatten(mean_gradient(made)), plain.gradient(), 1e-12)
        rows = plain.gradients()
        assert close(gram(made), rows @ rows.T, 1e-12)
        with hessian(made) as h, ggn(made) as g, fisher(made) as f:
            for v in vectors(made.size):
                assert close(h @ v, plain.hessian_times(v), case.tolerance)
                assert close(g @ v, plain.ggn_times(v), case.tolerance)
                assert close(f @ v, rows.T @ (rows @ v) / len(rows), 1e-11)


@pytest.mark.parametrize("name", CASES)
def test_single_precision_gives_the_same_up_to_rounding(name: str) -> None:
    """Other kernels run here: fused recurrent layers and attention know float32 alone."""
    case = CASES[name]
    model = case.network()
    plain = Plain(case, model, case.data())
    with isolated():
        made = measured(case, model, dtype=None)
        assert made.dtype == torch.float32
        assert close(made.flatten(mean_gradient(made)), plain.gradient(), 1e-5)
        rows = plain.gradients()
        assert close(gram(made), rows @ rows.T, 1e-5)
        with hessian(made) as h, ggn(made) as g, fisher(made) as f:
            for v in vectors(made.size):
                assert close(h @ v.float(), plain.hessian_times(v), 1e-4)
                assert close(g @ v.float(), plain.ggn_times(v), 1e-4)
                assert close(f @ v.float(), rows.T @ (rows @ v) / len(rows), 1e-4)


@pytest.mark.parametrize("name", BATCH_STATISTICS)
def test_train_mode_is_the_curvature_of_the_loss_with_batch_statistics(name: str) -> None:
    case = BATCH_STATISTICS[name]
    model = case.network()
    plain = Plain(case, model, case.data())
    with isolated():
        made = measured(case, model)
        running = subject(model, case.data(), dtype=torch.float64)
        assert made.mean_loss == pytest.approx(plain.mean_loss, rel=1e-12)
        assert close(made.flatten(mean_gradient(made)), plain.gradient(), 1e-12)
        with hessian(made) as h, ggn(made) as g, hessian(running) as other:
            for v in vectors(made.size):
                assert close(h @ v, plain.hessian_times(v), case.tolerance)
                assert close(g @ v, plain.ggn_times(v), case.tolerance)
                assert not close(other @ v, plain.hessian_times(v), 0.01)
        with pytest.raises(SubjectError, match="BatchNorm uses the statistics of the batch"):
            gram(made)
