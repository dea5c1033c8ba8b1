"""Models as people bring them: wrapped, in half precision, with state and hooks; what comes out is right, and they stay as they were."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from architecture_cases import (
    CASES,
    Plain,
    Stateful,
    Unused,
    convolutional,
    images,
    labelled_words,
    mlp,
    rows,
    spectral,
    words,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import plasticity_probe as probe
from plasticity_probe.errors import SubjectError
from plasticity_probe.network.curvature import fisher, ggn, hessian
from plasticity_probe.network.examples import batch_size, keep
from plasticity_probe.network.gradients import gram, mean_gradient
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.private_copy import private_copy
from plasticity_probe.network.subject import subject

pytestmark = pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*deprecated:FutureWarning")


def same_as_bare(wrapped: nn.Module, bare: nn.Module, loader: list[Any]) -> bool:
    with isolated():
        one, other = subject(wrapped, loader), subject(bare, loader)
        v = torch.randn(one.size)
        return bool(
            list(one.parameters) == list(other.parameters)
            and torch.equal(hessian(one) @ v, hessian(other) @ v)
            and torch.equal(gram(one), gram(other))
        )


# ------------------------------------------------------------------------------------------------------- wrapped models


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")
def test_distributed_models_are_measured_as_what_they_wrap() -> None:
    bare, loader = mlp(), rows()
    wrapped = nn.parallel.DistributedDataParallel(bare)
    assert same_as_bare(wrapped, bare, loader)
    inside = nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))
    copied = private_copy(inside)
    assert [type(module) for module in copied] == [nn.Linear, nn.Tanh, nn.Linear]
    F.cross_entropy(wrapped(loader[0][0]), loader[0][1]).backward()
    assert bare[0].weight.grad is not None  # the reducer of the user's model still works


def test_wrappers_within_wrappers_and_under_two_names() -> None:
    shared = torch.compile(nn.Linear(4, 4), backend="eager")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = shared, shared, nn.DataParallel(nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))

    copied = private_copy(torch.compile(Twice(), backend="eager"))  # type: ignore[arg-type]
    assert type(copied.a) is nn.Linear
    assert copied.a is copied.b
    assert list(dict(copied.named_parameters())) == ["a.weight", "a.bias", "head.weight", "head.bias"]


def test_a_module_compiled_in_place() -> None:
    bare, compiled = mlp(), mlp()
    compiled.load_state_dict(bare.state_dict())
    compiled.compile(backend="aot_eager")
    assert same_as_bare(compiled, bare, rows())
    assert compiled._compiled_call_impl is not None


def test_functions_compiled_within_a_model_run_as_they_are_written() -> None:
    """What torch compiles ahead of time cannot be differentiated twice."""

    class Inside(nn.Sequential):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__(nn.Linear(4, 6), nn.Linear(6, 3))
            self.function = function

        def forward(self, input: Tensor) -> Tensor:
            return self[1](self.function(self[0](input)))

    def gate(x: Tensor) -> Tensor:
        return torch.tanh(x) * x

    bare, compiled = Inside(gate), Inside(torch.compile(gate, backend="aot_eager"))
    compiled.load_state_dict(bare.state_dict())
    assert same_as_bare(compiled, bare, rows())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_compiled_by_inductor() -> None:
    bare, loader = mlp(), rows()
    compiled = torch.compile(bare)
    try:
        compiled(loader[0][0])
    except Exception as error:  # what a missing compiler raises differs from system to system
        pytest.skip(f"inductor does not work here: {error}")
    assert same_as_bare(compiled, bare, loader)  # type: ignore[arg-type]


class Checkpointed(nn.Sequential):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(nn.Linear(4, 6), nn.Linear(6, 3))
        self.use_reentrant = use_reentrant

    def forward(self, input: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: torch.tanh(self[0](x)), input.requires_grad_(), use_reentrant=self.use_reentrant)
        return self[1](hidden)


def test_recomputed_activations_are_measured_as_kept_ones() -> None:
    model, loader = Checkpointed(use_reentrant=False), rows()
    plain = nn.Sequential(model[0], nn.Tanh(), model[1])
    with isolated():
        one, other = subject(model, loader), subject(plain, loader)
        v = torch.randn(one.size)
        assert torch.equal(hessian(one) @ v, hessian(other) @ v)


def test_reentrant_checkpoints_are_refused_as_they_hide_parameters_from_gradients() -> None:
    with pytest.raises(SubjectError, match="use_reentrant=False"):
        probe.fisher_rank(Checkpointed(use_reentrant=True), rows())


# ------------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_measured_in_single_and_say_so(dtype: torch.dtype) -> None:
    case = CASES["BatchNorm"]
    model = case.network().to(dtype)
    found = probe.hessian_spectrum(model, case.data(), k=3, density=False)
    exact = probe.hessian_spectrum(model, case.data(), k=3, density=False, dtype=torch.float64)
    assert found.conditions.dtype == "float32"
    torch.testing.assert_close(found.top, exact.top, rtol=1e-5, atol=0.0)
    assert next(model.parameters()).dtype == dtype


def test_double_precision_stays() -> None:
    found = probe.hessian_spectrum(mlp().double(), rows(), k=3)
    assert found.conditions.dtype == "float64"
    assert probe.fisher_rank(mlp().double(), rows()).conditions.dtype == "float64"


def test_mixed_precision_takes_the_highest() -> None:
    model = nn.Sequential(nn.Linear(4, 6).bfloat16(), nn.Linear(6, 3))
    assert {p.dtype for p in private_copy(model).parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------------- what can and cannot be copied


@pytest.mark.parametrize("container", [tuple, list, lambda state: {"state": tuple(state)}])
def test_models_that_keep_their_state_are_copied(container: Callable[[Any], Any]) -> None:
    model = Stateful()
    F.cross_entropy(model(torch.randn(5, 5, 4)), torch.zeros(5).long())
    model.hidden = kept = container(model.hidden)
    loader = [(torch.randn(5, 5, 4), torch.randint(3, (5,)))]
    assert same_as_bare(model, private_copy(model), loader)
    assert model.hidden is kept


def test_what_cannot_be_copied_is_refused_with_the_remedy() -> None:
    model = mlp()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(SubjectError, match=r"cannot be copied.*lock.*freshly built"):
        probe.fisher_rank(model, rows())


def test_complex_parameters_are_refused_instead_of_losing_their_imaginary_part() -> None:
    model = mlp()
    model.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(SubjectError, match=r"phase are complex.*view_as_complex"):
        probe.fisher_rank(model, rows())


def test_the_fused_weight_normalisation_would_give_a_wrong_hessian() -> None:
    """Why the copy computes it by its formula: torch's own second derivative fails torch's own check."""
    v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, g: torch._weight_norm(v, g, 0), (v, g))
    copied = private_copy(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))).double())
    formula = copied.get_submodule("0.parametrizations.weight.0")
    assert torch.autograd.gradgradcheck(lambda v, g: formula(g, v), (v, g))
    assert torch.allclose(formula(g, v), torch._weight_norm(v, g, 0), rtol=1e-15)
    if torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), (v, g), raise_exception=False):
        pytest.fail("torch has mended _weight_norm: the formula in private_copy is no longer needed")


# -------------------------------------------------------------------------------------------------------- left as it was


def fingerprint(model: nn.Module) -> list[Any]:
    def bits(tensor: Tensor) -> bytes:
        return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()

    hooks = [
        (list(m._forward_hooks.items()), list(m._forward_pre_hooks.items()), list(m._backward_hooks.items()))
        for m in model.modules()
    ]
    return [
        [(name, id(p), p.requires_grad, id(p.grad), bits(p), bits(p.grad)) for name, p in model.named_parameters()],
        [(name, id(b), bits(b)) for name, b in model.named_buffers()],
        [(module.training, type(module)) for module in model.modules()],
        hooks,
        torch.get_rng_state().tolist(),
    ]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = fingerprint(model)
    yield
    assert fingerprint(model) == before


MIXED = [
    "BatchNorm",
    "InstanceNorm with running statistics",
    "spectral_norm",
    "spectral_norm by a hook",
    "weight_norm by a hook",
    "TransformerEncoderLayer",
    "tied head",
    "LSTM that keeps its state",
    "unused and frozen parameters",
]


@pytest.mark.parametrize("name", MIXED)
def test_the_users_model_is_left_bit_for_bit_as_it_was(name: str) -> None:
    case = CASES[name]
    model = case.network()
    model.train()
    next(model.children()).eval()
    loader = case.data()
    with unchanged(model):
        probe.fisher_rank(model, loader)
        probe.gradient_norms(model, loader)
        with isolated():
            made = subject(model, loader)
            for matrix in (hessian, ggn, fisher):
                matrix(made) @ torch.randn(made.size)


def test_also_in_train_mode_with_hooks() -> None:
    model, seen = convolutional(nn.BatchNorm2d(4)), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    loader = images()
    with unchanged(model):
        probe.hessian_spectrum(model, loader, k=3, mode="train")


@pytest.mark.parametrize("failing_call", [1, 3, 6])
def test_also_after_an_error(failing_call: int) -> None:
    calls = 0

    class Failing(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == failing_call:
                raise KeyError("broken")
            return super().forward(input)

    model, loader = Failing(*spectral(legacy=True)).train(), rows()
    with unchanged(model), pytest.raises(KeyError, match="broken"):
        probe.fisher_rank(model, loader)


# ------------------------------------------------------------------------------------------------------ data as it comes


def test_means_are_over_all_tokens_and_a_mean_of_batch_means_would_show() -> None:
    case = CASES["tied head, batches of other lengths"]
    model = case.network()
    plain = Plain(case, model, case.data())
    made = subject(model, case.data(), dtype=torch.float64)
    found = made.flatten(mean_gradient(made))
    alone = [Plain(case, model, [batch]).gradient() for batch in case.data()]
    assert (found - plain.gradient()).norm() < 1e-12 * found.norm()
    assert (sum(alone) / 2 - plain.gradient()).norm() > 0.1 * found.norm()


def test_confident_predictions_keep_their_curvature_in_single_precision() -> None:
    """At a loss near 1e-5, p - 1 cancels: cross-entropy in float32 would lose the fourth digit of the Hessian, and more as the loss falls."""
    model = nn.Linear(4, 3)
    x, y = 0.1 * torch.randn(20, 4), torch.randint(3, (20,))
    x[range(20), y] += 5.0
    with torch.no_grad():
        model.weight.copy_(2.5 * torch.eye(3, 4))
    exact = hessian_of(lambda w: F.cross_entropy(x.double() @ w.T + model.bias.double(), y), model.weight.double())
    careless = hessian_of(lambda w: F.cross_entropy(x @ w.T + model.bias, y), model.weight)
    made = subject(model, [(x, y)])
    assert made.mean_loss < 1e-4
    found = torch.stack([(hessian(made) @ e)[:12] for e in torch.eye(made.size)[:12]])
    assert (found.double() - exact).norm() < 1e-5 * exact.norm()
    assert (careless.double() - exact).norm() > 3e-4 * exact.norm()


def hessian_of(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    found = torch.autograd.functional.hessian(loss, at.detach())
    assert isinstance(found, Tensor)
    return found.reshape(at.numel(), at.numel())


def test_packed_sequences_count_their_sequences() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.GRU(2, 3), nn.Linear(3, 3)

        def forward(self, x: PackedSequence) -> Tensor:
            return self.head(self.inner(x)[1][0])

    lengths, targets = [(4, 2, 3), (1, 5)], [torch.tensor([0, 1, 2]), torch.tensor([1, 1])]
    sequences = [[torch.randn(length, 2) for length in each] for each in lengths]
    packed = [(pack_sequence(s, enforce_sorted=False), y) for s, y in zip(sequences, targets, strict=True)]
    assert [batch_size(batch) for batch in packed] == [3, 2]
    model = Reader().double()
    made = subject(model, packed)
    assert len(made.examples) == 5
    singles = [
        torch.autograd.grad(F.cross_entropy(model(pack_sequence([x.double()])), y[None]), list(model.parameters()))
        for batch, ys in zip(sequences, targets, strict=True)
        for x, y in zip(batch, ys, strict=True)
    ]
    truth = torch.stack([torch.cat([part.reshape(-1) for part in each]) for each in singles])
    v = torch.randn(made.size).double()
    torch.testing.assert_close(gram(made), truth @ truth.T)
    torch.testing.assert_close(fisher(made) @ v, truth.T @ (truth @ v) / 5)


def test_rows_that_are_not_the_examples_are_refused() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.GRU(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)[0][-1])

    with pytest.raises(SubjectError, match=r"one loss per example, 6 for this batch, got 5.*batch_first=True"):
        probe.fisher_rank(TimeFirst(), [(torch.randn(6, 5, 4), torch.randint(3, (5,)))])


def test_mappings_whose_entries_come_in_another_order_are_not_mixed_up() -> None:
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    held = keep([{"a": first, "b": second}, {"b": second, "a": first}])
    for batch in held.chunks(10):
        assert (batch["a"] == 0).all()
        assert (batch["b"] == 1).all()


def test_labels_that_the_model_would_shift_are_refused_and_shifted_ones_measured() -> None:
    case = CASES["causal model with labelled batches"]
    model = case.network()
    ids = torch.randint(1, 9, (6, 5))
    unshifted = ids.clone()
    unshifted[0, 3:] = -100
    with pytest.raises(SubjectError, match=r"shift by one inside.*labels=input_ids\[:, 1:\]"):
        probe.fisher_rank(model, [{"input_ids": ids, "labels": unshifted}])
    found = probe.gradient_norms(model, [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}])
    assert found.status == "ok"
    assert probe.fisher_rank(model, labelled_words()).status == "ok"


def test_a_plain_pair_of_equal_inputs_and_targets_is_no_language_model() -> None:
    ids = words()[0][0]
    assert probe.fisher_rank(CASES["tied head"].network(), [(ids, ids)]).status == "ok"


def test_parameters_that_no_output_depends_on_count_and_have_no_curvature() -> None:
    found = probe.hessian_spectrum(Unused(), rows(), k=3)
    assert found.conditions.parameters == 4 * 5 + 5 + 6 + 3
    assert int((found.nodes.abs() < 1e-6).sum()) >= 6
