import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.capture import Activation, observe, survey
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.layers import KINDS, Layer
from plasticity_probe.network.subject import Subject, subject

X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 2


class Kept:
    """Keeps everything; computes with functions that would count as activations of the model if it were not left alone."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.outputs, self.inputs = layer, [], []

    def add(self, activation: Activation) -> None:
        torch.relu(activation.output) @ torch.ones(activation.output.shape[-1], 1)
        self.outputs.append(activation.matrix.clone())
        self.inputs.append(None if activation.input is None else activation.input.clone())


def kept(made: Subject, layers: list[str] | None = None) -> dict[str, Kept]:
    with isolated():
        _, gathered = observe(made, lambda structure: structure.select(structure.features, layers), Kept)
    return {layer.name: accumulator for layer, accumulator in gathered}


def seen(
    model: nn.Module, x: Tensor = X, y: Tensor = Y, layers: list[str] | None = None, **options: Any
) -> dict[str, Kept]:
    return kept(subject(model, [(x, y)], **options), layers)


def hidden(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> list[tuple[str, str]]:
    with isolated():
        return [(layer.name, layer.kind) for layer in survey(subject(model, [(x, y)])).hidden]


class Functional(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))) + x)


MODULES = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "prelu": nn.PReLU(),
    "rrelu": nn.RReLU(),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "selu": nn.SELU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "softsign": nn.Softsign(),
    "hardtanh": nn.Hardtanh(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardswish": nn.Hardswish(),
    "threshold": nn.Threshold(0.1, 0.0),
    "hardshrink": nn.Hardshrink(),
    "softshrink": nn.Softshrink(),
    "tanhshrink": nn.Tanhshrink(),
    "log_sigmoid": nn.LogSigmoid(),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_activation_module_is_seen_under_its_path(name: str) -> None:
    assert hidden(nn.Sequential(nn.Linear(6, 5), MODULES[name], nn.Linear(5, 2))) == [("1", name)]


def test_the_table_of_kinds_is_covered() -> None:
    assert set(MODULES) | {"glu"} == set(KINDS)


def test_glu_halves_its_units_and_has_no_pre_activation_of_their_shape() -> None:
    (glu,) = seen(nn.Sequential(nn.Linear(6, 10), nn.GLU(), nn.Linear(5, 2))).values()
    assert (glu.layer.kind, glu.outputs[0].shape, glu.inputs) == ("glu", (10, 5), [None])


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.relu_(), "relu"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: F.relu(x, True), "relu"),
        (lambda x: torch.relu_(x), "relu"),
        (lambda x: x.clamp(min=0), "clamp"),
        (lambda x: x.clamp_(0), "clamp"),
        (lambda x: torch.tanh(x, out=x), "tanh"),
        (F.gelu, "gelu"),
        (lambda x: F.leaky_relu_(x), "leaky_relu"),
        (lambda x: x.sigmoid(), "sigmoid"),
        (torch.special.expit, "sigmoid"),
    ],
)
def test_functional_activations_count_like_modules(function: Callable[[Tensor], Tensor], name: str) -> None:
    model = Functional(function).requires_grad_(False)
    found = seen(model)
    assert list(found) == [name]
    pre = model.first(X).detach()
    torch.testing.assert_close(found[name].inputs[0], pre)
    torch.testing.assert_close(found[name].outputs[0], function(pre.clone()))


def test_names_are_the_path_of_the_enclosing_module_with_running_numbers() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 2))
    assert hidden(model) == [(f"{block}.relu_{number}", "relu") for block in (0, 1) for number in (1, 2)]


def test_top_level_functions_have_no_path() -> None:
    class Top(Block):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(super().forward(x))

    assert hidden(Top()) == [("relu_1", "relu"), ("relu_2", "relu")]
    assert hidden(Functional(F.relu)) == [("relu", "relu")]


def test_a_module_used_several_times_gets_call_numbers() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))

    found = seen(Reused())
    assert {name: accumulator.outputs[0].shape for name, accumulator in found.items()} == {
        "act_1": (10, 5),
        "act_2": (10, 4),
    }


def test_tied_modules_are_one_module_under_its_first_path() -> None:
    shared, act = nn.Linear(6, 6), nn.Tanh()
    assert hidden(nn.Sequential(shared, act, shared, act, nn.Linear(6, 2))) == [("1_1", "tanh"), ("1_2", "tanh")]


def test_activations_of_the_output_are_not_hidden() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2), nn.Sigmoid(), nn.Softmax(-1))
    assert hidden(model) == [("1", "relu")]


def test_softmax_is_no_hidden_activation() -> None:
    assert hidden(nn.Sequential(nn.Linear(6, 5), nn.Softmax(-1), nn.Linear(5, 2))) == [("0", "identity")]


def test_a_function_of_a_parameter_is_no_activation() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rho, self.a, self.b = nn.Parameter(torch.zeros(5, 6)), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(F.linear(x, F.softplus(self.rho)) + self.a(x)))

    assert hidden(Scaled()) == [("relu", "relu")]


def test_networks_written_with_matrix_products_have_hidden_layers() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v, self.bias = (nn.Parameter(torch.randn(*shape)) for shape in ((6, 5), (5, 2), (2,)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, torch.relu(x @ self.w), self.v)

    found = seen(Products())
    assert list(found) == ["relu"]
    assert found["relu"].outputs[0].shape == (10, 5)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_parameters_make_no_difference(frozen: bool) -> None:
    model = Functional(torch.relu)
    model.requires_grad_(not frozen)
    assert list(seen(model)) == ["relu"]


class HandwrittenGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.5, self.training)


class CReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), F.relu(-x)], 1)


def test_a_handwritten_activation_module_is_one_activation_and_not_what_it_is_made_of() -> None:
    model = nn.Sequential(nn.Linear(6, 5), HandwrittenGELU(), nn.Linear(5, 2))
    found = seen(model)
    assert [(name, each.layer.kind) for name, each in found.items()] == [("1", "custom")]
    pre = model[0](X).detach()
    torch.testing.assert_close(found["1"].outputs[0], F.gelu(pre, approximate="tanh"))
    torch.testing.assert_close(found["1"].inputs[0], pre)


def test_a_module_around_one_function_keeps_the_function() -> None:
    assert hidden(nn.Sequential(nn.Linear(6, 5), Wrapped(), nn.Linear(5, 2))) == [("1.relu", "relu")]


def test_a_concatenated_relu_has_both_halves() -> None:
    found = seen(nn.Sequential(nn.Linear(6, 5), CReLU(), nn.Linear(10, 2)))
    assert [name for name in found if ":" not in name] == ["1.relu_1", "1.relu_2"]
    joined = Functional(lambda h: F.relu(torch.cat([h, -h], 1)))
    joined.last = nn.Linear(10, 2)
    (both,) = seen(joined).values()
    halves = torch.cat([found["1.relu_1"].outputs[0], found["1.relu_2"].outputs[0]], 1)
    assert both.outputs[0].shape == halves.shape == (10, 10)


def test_a_linear_network_has_the_outputs_of_its_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 4), nn.Linear(4, 2))
    found = seen(model)
    assert [(name, each.layer.kind) for name, each in found.items()] == [("0", "identity"), ("2", "identity")]
    torch.testing.assert_close(found["2"].outputs[0], model[:3](X).detach())
    assert found["0"].inputs == [None]


def test_a_linear_classifier_has_only_what_it_reads() -> None:
    found = seen(nn.Sequential(nn.Flatten(), nn.Linear(6, 2)))
    assert list(found) == ["1:input"]
    assert torch.equal(found["1:input"].outputs[0], X)
    assert list(seen(nn.Linear(6, 2))) == ["linear:input"]


IMAGES = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("between", "width", "extra"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 5, True),
        (nn.Flatten(), 80, True),
        (nn.Sequential(nn.Flatten(), nn.Linear(80, 7), nn.Tanh(), nn.Dropout()), 7, False),
    ],
)
def test_the_penultimate_layer_is_added_unless_it_is_the_last_activation(
    between: nn.Module, width: int, extra: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), between, nn.Linear(width, 2))
    found = seen(model, IMAGES)
    last = list(found)[-1]
    assert (last == "3:input") is extra
    torch.testing.assert_close(found[last].outputs[0], model.eval()[:3](IMAGES).detach())


def test_maps_of_one_pixel_are_the_penultimate_layer_themselves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(5, 2))
    assert list(seen(model, IMAGES)) == ["1"]


def test_the_input_of_the_last_linear_layer_is_taken_before_it_is_overwritten() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            h += 1
            out = self.b(h)
            h.zero_()
            return out

    model = Overwriting().requires_grad_(False)
    found = seen(model)
    expected = F.relu(model.a(X)).detach()
    torch.testing.assert_close(found["relu"].outputs[0], expected)
    torch.testing.assert_close(found["b:input"].outputs[0], expected + 1)


def test_transformers_count_tokens_as_rows_and_attention_as_nothing() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, activation="gelu")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x))

    model = Model()
    found = seen(model, torch.randn(8, 5, 6), torch.zeros(8, 5).long())
    shapes = {name: each.outputs[0].shape for name, each in found.items()}
    assert shapes == {"encoder.layers.0.gelu": (40, 12), "encoder.layers.1.gelu": (40, 12), "head:input": (40, 6)}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_count_by_their_output_sequence(kind: type[nn.RNNBase]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = kind(6, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)[0][:, -1])

    model, x = Model(), torch.randn(10, 5, 6)
    found = seen(model, x)
    assert [(name, each.layer.kind) for name, each in found.items()] == [
        ("inner", "recurrent"),
        ("head:input", "input"),
    ]
    torch.testing.assert_close(found["inner"].outputs[0], model.inner(x)[0].detach().reshape(50, 8))


def test_packed_sequences_and_cells() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.cell, self.head = nn.GRU(6, 4), nn.LSTMCell(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_sequence(list(x))
            return self.head(self.cell(self.inner(packed)[1][0])[0])

    found = seen(Packed(), torch.randn(10, 5, 6))
    assert {name: each.outputs[0].shape for name, each in found.items()} == {"inner": (50, 4), "cell": (10, 3)}


def test_any_module_can_be_asked_for() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 2))
    found = seen(model, layers=["1", "0.a"])
    torch.testing.assert_close(found["1"].outputs[0], model[:2](X).detach())
    torch.testing.assert_close(found["0.a"].outputs[0], model[0].a(X).detach())  # type: ignore[operator,union-attr]


def test_untrusted_names_stay_as_they_are() -> None:
    model = Functional(lambda x: x)
    model.add_module("[/b]<script>", nn.ReLU())
    model.function = model._modules["[/b]<script>"]  # type: ignore[assignment]
    assert list(seen(model)) == ["[/b]<script>"]


def test_outputs_in_dictionaries_and_tuples() -> None:
    class Dictionary(Functional):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x), "extra": None}

    class Pair(Functional):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    assert list(seen(Dictionary(F.relu))) == list(seen(Pair(F.relu))) == ["relu"]


def test_a_custom_loss_may_call_parts_of_the_model() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(6, 5), nn.ReLU()), "head": nn.Linear(5, 2)})

    def loss(net: Any, batch: Any) -> Tensor:
        logits = net["head"](net["body"](batch[0]))
        return F.cross_entropy(torch.relu(logits), batch[1], reduction="none")

    found = seen(model, loss=loss)
    assert list(found) == ["body.1"]
    assert len(found["body.1"].outputs[0]) == 10


def test_a_custom_loss_that_calls_the_model_twice_gives_twice_the_rows() -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        return (net(batch[0]) - net(-batch[0])).square().sum(1)

    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2), nn.Tanh())
    found = seen(model, loss=loss)
    assert list(found) == ["1"]
    assert sum(map(len, found["1"].outputs)) == 20


class Experts(nn.Module):
    """Each example goes to the expert that the sign of its first input names; the second is first seen late."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 5)
        for index, expert in enumerate(self.experts):
            mine = (x[:, 0] > 0) == bool(index)
            if mine.any():
                hidden[mine] = expert(x[mine])
        return self.head(hidden)


def test_layers_that_only_later_examples_reach_are_found() -> None:
    x = torch.randn(60, 6)
    x[:, 0] = -1
    x[50:, 0] = 1
    found = seen(Experts(), x, torch.zeros(60).long())
    assert [sum(map(len, each.outputs)) for each in found.values()] == [50, 10, 60]


def test_a_network_whose_path_is_random_is_refused() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(6, 5), nn.Linear(5, 2), [0]

        def forward(self, x: Tensor) -> Tensor:
            self.calls[0] += 1
            h = F.relu(self.a(x))
            for _ in range(self.calls[0]):
                h = F.relu(h)
            return self.b(h)

    with pytest.raises(SubjectError, match="second pass"):
        seen(Random())


def test_a_layer_whose_width_changes_is_refused() -> None:
    class Varying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x[..., None])[..., 0]).mean(1, keepdim=True))

    batches = [(torch.randn(4, 5), torch.zeros(4).long()), (torch.randn(4, 7), torch.zeros(4).long())]
    with pytest.raises(SubjectError, match="'relu' had before"):
        kept(subject(Varying(), batches))


def test_train_mode_runs_all_examples_at_once_and_keeps_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    made = subject(model, [(X, Y)], mode="train")
    before = {name: buffer.clone() for name, buffer in made.model.named_buffers()}
    found = kept(made)
    with torch.no_grad():
        expected = F.relu(F.batch_norm(model[0](X), None, None, training=True))
    torch.testing.assert_close(found["2"].outputs[0], expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in made.model.named_buffers())


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_behind_even_after_an_error() -> None:
    class Failing(Functional):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise RuntimeError("no gradients, no forward")
            return super().forward(x)

    class Picky(Kept):
        def add(self, activation: Activation) -> None:
            raise KeyError("nothing pleases me")

    failing, healthy = (
        subject(Failing(F.relu), [(X, Y)], loss=lambda m, b: m(b[0]).sum(1)),
        subject(Block(), [(X, Y)], loss=lambda m, b: m(b[0]).sum(1)),
    )
    with pytest.raises(RuntimeError, match="no forward"):
        kept(failing)
    with pytest.raises(KeyError):
        observe(healthy, lambda structure: structure.hidden, Picky)
    kept(healthy)
    for made in (failing, healthy):
        assert hooks_on(made.model) == 0
    assert _get_current_function_mode_stack() == []


def test_an_error_that_the_model_handles_does_not_confuse_the_paths() -> None:
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    class Patient(Functional):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.moody = Moody()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.moody(x)
            except ValueError:
                return super().forward(x)

    assert list(seen(Patient())) == ["relu"]


def test_the_survey_is_made_once_for_all_probes() -> None:
    made = subject(Functional(F.relu), [(X, Y)])
    kept(made)
    (structure,) = [made.memo[key] for key in made.memo if isinstance(key, tuple) and key[0] == "structure"]
    kept(made)
    assert made.memo["structure", False] is structure


def test_hooks_on_activation_modules_alone_would_see_nothing_here() -> None:
    model = Functional(F.relu)
    assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert list(seen(model)) == ["relu"]
