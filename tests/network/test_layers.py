from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.network.layers import (
    KINDS,
    Call,
    Structure,
    activation_kind,
    affine_kind,
    function_name,
    requested,
    structure_of,
)


def relu(base: str, number: int = 1) -> Call:
    return Call("activation", base, number, "relu")


def linear(base: str, number: int = 1) -> Call:
    return Call("affine", base, number, "linear")


def names(structure: Structure) -> list[str]:
    return [layer.name for layer in structure.hidden]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)),
    "rrelu": F.rrelu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "threshold": lambda x: F.threshold(x, 0.5, -7.0),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": F.softsign,
}


def slopes(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Points off the kinks, the function there, and its derivative by autograd."""
    x = (torch.linspace(-9, 9, 4001, dtype=torch.float64) + 1e-4).requires_grad_()
    y = FUNCTIONS[name](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return x.detach(), y.detach(), slope


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.linear])
def test_on_a_linear_piece_the_slope_is_one_constant_and_not_zero(name: str) -> None:
    x, y, slope = slopes(name)
    for piece in KINDS[name].linear:
        on = piece(x, y)
        assert on.any()
        # The central, negative and positive parts of a shrink or clip have one slope each, which is what makes the piece linear.
        torch.testing.assert_close(slope[on], slope[on][:1].expand_as(slope[on]))
        assert slope[on][0] != 0
    everywhere = torch.stack([piece(x, y) for piece in KINDS[name].linear]).any(0)
    assert not everywhere.all() or name in ("leaky_relu", "prelu", "rrelu")


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softsign", "hardtanh", "hardsigmoid"])
def test_relative_slopes_are_the_derivative_over_its_maximum(name: str) -> None:
    x, y, slope = slopes(name)
    relative = KINDS[name].slope
    assert relative is not None
    torch.testing.assert_close(relative(x, y), slope / {"sigmoid": 0.25, "hardsigmoid": 1 / 6}.get(name, 1.0))


def test_relu6_is_flat_at_its_upper_end_alone() -> None:
    x = torch.tensor([-1.0, 3.0, 7.0])
    assert KINDS["relu6"].slope is not None
    assert KINDS["relu6"].slope(x, F.relu6(x)).tolist() == [1, 1, 0]


def test_functions_have_one_name_in_all_their_variants() -> None:
    variants = [F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_]
    assert {function_name(variant) for variant in variants} == {"relu"}
    assert function_name(F.threshold) == "threshold"
    assert function_name(torch.special.expit) == "sigmoid"
    assert function_name(Tensor.mT.__get__) == "mT"  # type: ignore[attr-defined]
    assert function_name(Tensor.__matmul__) == "matmul"


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "kind"),
    [
        ("hardtanh", (0, -1.0, 1.0), {}, "hardtanh"),
        ("hardtanh", (0,), {"min_val": 0.0, "max_val": 6.0}, "relu6"),
        ("clamp", (0,), {"min": 0}, "relu"),
        ("clamp_min", (0, 0.0), {}, "relu"),
        ("clamp", (0, 0.0, 1.0), {}, None),
        ("clamp", (0,), {"max": 0}, None),
        ("softmax", (0,), {}, None),
        ("log_softmax", (0,), {}, None),
        ("gelu", (0,), {}, "gelu"),
    ],
)
def test_which_activation_function_a_call_is(name: str, args: Any, kwargs: Any, kind: str | None) -> None:
    assert activation_kind(name, args, kwargs) == kind


def test_a_matrix_product_is_affine_only_with_a_parameter() -> None:
    weight, x = torch.randn(3, 4), torch.randn(2, 3)
    weights = frozenset({weight.untyped_storage().data_ptr()})
    assert affine_kind("matmul", (x, weight), weights) == "linear"
    assert affine_kind("mm", (x, weight[:, 1:].T), weights) == "linear"
    assert affine_kind("matmul", (x, x.T), weights) is None
    assert affine_kind("conv_transpose2d", (x, x), weights) == "conv"
    assert affine_kind("add", (x, weight), weights) is None


def test_activations_behind_the_last_affine_layer_are_not_hidden() -> None:
    structure = structure_of([[linear("a"), relu("r"), linear("b"), relu("out")]], {})
    assert names(structure) == ["r"]


def test_repeated_calls_are_numbered_and_single_ones_are_not() -> None:
    calls = [linear("a"), relu("block.relu", 1), relu("act"), relu("block.relu", 2), linear("b")]
    assert names(structure_of([calls], {})) == ["block.relu_1", "act", "block.relu_2"]


def test_layers_never_share_a_name() -> None:
    calls = [linear("a"), relu("relu_1"), relu("relu", 1), relu("relu", 2), linear("b")]
    found = names(structure_of([calls], {}))
    assert len(set(found)) == 3
    assert found[0] == "relu_1"


def test_without_activations_the_affine_layers_but_the_last_are_hidden() -> None:
    attention = Call("affine", "attention", 1, "attention")
    structure = structure_of([[linear("a"), attention, linear("b"), linear("c")]], {linear("c"): [linear("b")]})
    assert names(structure) == ["a", "b"]
    assert {layer.kind for layer in structure.hidden} == {"identity"}
    assert structure.penultimate == structure.hidden[-1]


def test_the_penultimate_layer_is_what_the_last_linear_layer_reads() -> None:
    calls = [linear("a"), relu("r"), linear("fc")]
    read_as_it_is = structure_of([calls], {linear("fc"): [relu("r")]})
    assert read_as_it_is.penultimate == read_as_it_is.hidden[0]
    assert read_as_it_is.features == read_as_it_is.hidden
    pooled = structure_of([calls], {})
    assert [layer.name for layer in pooled.features] == ["r", "fc:input"]
    assert pooled.features[-1].reads


def test_without_a_linear_layer_at_the_end_the_last_hidden_layer_is_penultimate() -> None:
    conv = Call("affine", "head", 1, "conv")
    structure = structure_of([[linear("gate"), relu("r"), conv]], {})
    assert structure.penultimate == structure.hidden[-1]


def test_paths_that_differ_between_passes_are_merged_in_order() -> None:
    first = [linear("a"), relu("r"), linear("b")]
    second = [linear("a"), relu("r"), relu("s"), linear("b")]
    assert names(structure_of([first, second], {})) == ["r", "s"]


def test_nothing_seen_is_no_layer() -> None:
    for forwards in ([], [[]], [[relu("r")]]):
        assert structure_of(forwards, {}).features == ()


@pytest.fixture
def blocks() -> Structure:
    def module(path: str) -> Call:
        return Call("module", path, 1, "module")

    calls = [
        *(linear("b.0.fc"), module("b.0.fc"), relu("b.0.relu"), module("b.0.relu"), module("b.0")),
        *(linear("b.1.fc"), relu("b.1.relu"), relu("[/b]<script>"), linear("head"), module("head"), module("")),
    ]
    return structure_of([calls], {})


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, ["b.0.relu", "b.1.relu", "[/b]<script>", "head:input"]),
        (["b.1.relu"], ["b.1.relu"]),
        (["b.*"], ["b.0.relu", "b.1.relu"]),
        (["[/b]<script>"], ["[/b]<script>"]),
        (["b.0", "head:input"], ["b.0", "head:input"]),
        (["b.?.fc"], ["b.0.fc"]),
        (["b.1.relu", "b.*"], ["b.1.relu", "b.0.relu"]),
    ],
)
def test_layers_are_chosen_by_name_module_path_or_pattern(
    blocks: Structure, wanted: list[str] | None, found: list[str]
) -> None:
    assert [layer.name for layer in blocks.select(blocks.features, wanted)] == found


@pytest.mark.parametrize("wrong", ["b.1.relo", "nothing*", ""])
def test_an_unknown_layer_is_refused_with_near_misses(blocks: Structure, wrong: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        blocks.select(blocks.features, [wrong])
    assert ("b.1.relu" in str(caught.value).split("Known")[0]) == (wrong == "b.1.relo")


def test_requested_layers_become_a_tuple() -> None:
    assert requested(None) is None
    assert requested("relu") == ("relu",)
    assert requested(["a", "b"]) == ("a", "b")
    with pytest.raises(UsageError, match="at least one layer"):
        requested([])
