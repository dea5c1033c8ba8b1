import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plasticity_probe.errors import SubjectError, UnknownNameError
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.private_copy import private_copy
from plasticity_probe.network.subject import subject

torch.manual_seed(0)
X, Y = torch.randn(33, 4), torch.randint(0, 3, (33,))
RAGGED = [(X[:32], Y[:32]), (X[32:], Y[32:])]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def test_the_mean_loss_of_a_ragged_loader_is_exact() -> None:
    model = mlp().double()
    made = subject(model, RAGGED)
    exact = F.cross_entropy(model(X.double()), Y).item()
    assert made.mean_loss == pytest.approx(exact, rel=1e-12)
    batches_averaged = sum(F.cross_entropy(model(x.double()), y).item() for x, y in RAGGED) / 2
    assert batches_averaged != pytest.approx(exact, rel=1e-3)


def test_flatten_and_unflatten_are_inverse() -> None:
    made = subject(mlp(), RAGGED)
    vector = torch.arange(float(made.size))
    assert made.size == 43
    assert torch.equal(made.flatten(made.unflatten(vector)), vector)


def test_the_loss_follows_the_given_parameters_also_through_a_custom_loss() -> None:
    made = subject(mlp(), RAGGED, loss=lambda model, batch: model[2](model[1](model[0](batch[0]))).sum(1))
    zero = {name: torch.zeros_like(p) for name, p in made.parameters.items()}
    assert made.losses(zero, (X, Y))[0].abs().sum() == 0


def test_frozen_tied_and_unused_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 3)
            self.unused = nn.Linear(7, 7)
            self.head.bias.requires_grad_(False)

        def forward(self, x):
            return self.head(self.b(torch.relu(self.a(x))))

    made = subject(Odd(), RAGGED)
    assert set(made.parameters) == {"a.weight", "a.bias", "b.bias", "head.weight", "unused.weight", "unused.bias"}


def test_all_frozen_is_an_error_only_when_gradients_are_asked_for() -> None:
    model = mlp().requires_grad_(False)
    made = subject(model, RAGGED)
    assert made.mean_loss > 0
    with pytest.raises(SubjectError, match="all are frozen"):
        _ = made.parameters


def test_the_private_copy_is_unwrapped_upcast_and_in_eval_mode() -> None:
    model = torch.compile(nn.DataParallel(mlp().bfloat16().train()), backend="eager")
    copied = private_copy(model)
    assert isinstance(copied, nn.Sequential)
    assert not copied.training
    assert {p.dtype for p in copied.parameters()} == {torch.float32}
    inner = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 3))
    assert list(dict(private_copy(inner).named_parameters())) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_modules_with_computed_weights_can_be_copied() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))
    model(X)
    assert subject(model, RAGGED).mean_loss == pytest.approx(F.cross_entropy(model(X), Y).item(), rel=1e-6)


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(SubjectError, match=r"0\.weight.* lazy"):
        private_copy(nn.Sequential(nn.LazyLinear(3)))


def test_train_mode_dropout_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    subject(model, RAGGED)
    with isolated(), pytest.raises(SubjectError, match=r"dropout is active in train mode \(1\)"):
        subject(model, RAGGED, mode="train")


def test_a_model_that_does_not_repeat_itself_is_refused() -> None:
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(3)

    with isolated(), pytest.raises(SubjectError, match="draws random numbers"):
        subject(Noisy(4, 3), RAGGED)


def test_a_loss_of_another_model_is_refused() -> None:
    other = mlp()
    with pytest.raises(SubjectError, match="must call the model it is given"):
        subject(mlp(), RAGGED, loss=lambda _, batch: F.cross_entropy(other(batch[0]), batch[1], reduction="none"))


def test_inputs_that_the_model_does_not_take_are_refused_with_their_shapes() -> None:
    with pytest.raises(SubjectError, match=r"does not run on these examples.*\(8, 7\)"):
        subject(mlp(), [(torch.randn(33, 7), Y)])


def test_batchnorm_in_train_mode_leaves_its_buffers_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    made = subject(model, RAGGED, mode="train")
    before = copy.deepcopy(made.model.state_dict())
    first, second = made.mean_loss, made.take(None).mean_loss
    assert first == second == pytest.approx(F.cross_entropy(model.train()(X), Y).item(), rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())


def test_initial_weights_are_found_under_any_prefix_and_foreign_ones_refused() -> None:
    model = mlp()
    made = subject(model, RAGGED, initial={f"module.{name}": value for name, value in mlp().state_dict().items()})
    assert set(made.initial or ()) == set(dict(model.named_parameters()))
    with pytest.raises(SubjectError, match="expected initial weights with names such as"):
        subject(model, RAGGED, initial={"elsewhere": torch.zeros(1)})


def test_a_memo_is_kept_per_set_of_examples() -> None:
    made = subject(mlp(), RAGGED)
    calls = []
    for _ in range(2):
        made.take(5).once("key", lambda: calls.append(1))
        made.take(6).once("key", lambda: calls.append(1))
    assert len(calls) == 2


def test_an_unknown_pattern_of_parameters_is_refused_with_what_exists() -> None:
    with pytest.raises(UnknownNameError, match=r"no parameter or module named '1'.*0\.weight"):
        subject(mlp(), RAGGED, parameters=["0", "1"])
    names = "stem", "layer1", "layer2", "head"
    deep = nn.ModuleDict({name: nn.ModuleList(nn.Linear(4, 4) for _ in range(20)) for name in names})
    listed = r"Did you mean 'layer2' or 'layer1'\?.*Known: head, layer1, layer2, stem\."
    with pytest.raises(UnknownNameError, match=listed):
        subject(deep, RAGGED, parameters="layer.*")


def test_a_pattern_that_fits_only_frozen_parameters_is_refused() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    assert set(subject(model, RAGGED, parameters="*weight").parameters) == {"2.weight"}
    with pytest.raises(SubjectError, match="those that fit 0, but they are frozen"):
        subject(model, RAGGED, parameters="0")


def test_the_choice_of_parameters_leaves_the_users_model_alone() -> None:
    model = mlp()
    subject(model, RAGGED, parameters="0")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pass_holds_at_most_an_eighth_of_the_memory_and_at_least_one_example() -> None:
    ample, scarce, none = (subject(mlp(), RAGGED, memory=memory) for memory in (None, 16 * 8 * 100, 1))
    assert ample.chunk == 1024
    assert scarce.chunk == 16 * 100 // scarce.activation_bytes
    assert none.chunk == 1


class _Fails(Exception):
    pass


@pytest.mark.parametrize("fail", [False, True])
def test_isolation_restores_every_global_bit(fail: bool) -> None:
    torch.backends.cudnn.benchmark = True
    before = _global_state()
    try:
        with isolated():
            torch.rand(3), np.random.rand(3), random.random()
            assert not torch.backends.mha.get_fastpath_enabled()
            if fail:
                raise _Fails
    except _Fails:
        pass
    assert _global_state() == before
    torch.backends.cudnn.benchmark = False


_PRECISIONS = tuple(
    getattr(backend, kind) for backend in (torch.backends.cudnn, torch.backends.mkldnn) for kind in ("conv", "rnn")
)


@pytest.mark.parametrize("wish", ["highest", "high", "medium"])
def test_isolation_multiplies_float32_with_all_bits_whatever_was_asked_for(wish: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wish)
    try:
        state = _global_state()
        with isolated():
            assert {each.fp32_precision for each in (torch.backends.cuda.matmul, *_PRECISIONS)} == {"ieee"}
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert _global_state() == state
        assert torch.get_float32_matmul_precision() == wish
    finally:
        torch.set_float32_matmul_precision(before)


def _global_state() -> tuple:
    cudnn = torch.backends.cudnn
    switches = (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        *(each.fp32_precision for each in (torch.backends.cuda.matmul, *_PRECISIONS)),
    )
    sdp = torch.backends.cuda
    attention = (
        sdp.flash_sdp_enabled(),
        sdp.mem_efficient_sdp_enabled(),
        sdp.math_sdp_enabled(),
        sdp.cudnn_sdp_enabled(),
    )
    return (
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),
        random.getstate(),
        switches,
        attention,
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
