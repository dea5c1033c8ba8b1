from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import subject
from plasticity_probe.network.unit_axes import UnitAxes, flat_tensors, matrix, unit_axis_of_product
from plasticity_probe.probes.units import dead_units


class Net(nn.Module):
    """A stem, a change of axes, an activation, and a head that takes anything."""

    def __init__(self, stem: nn.Module, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.between, self.head = stem, between, nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.between(self.stem(x)))
        return self.head(hidden.flatten(1).mean(1, keepdim=True))


IMAGES, VECTORS, TOKENS = (8, 3, 8, 8), (8, 6), (8, 5, 6)
CONV = lambda: nn.Conv2d(3, 8, 3, padding=1)  # noqa: E731 -- eight channels on eight by eight pixels, so that sizes tell nothing

CASES = {
    "conv": (CONV(), lambda h: h, IMAGES, 8, 64),
    "conv then batch norm": (nn.Sequential(CONV(), nn.BatchNorm2d(8)), lambda h: h, IMAGES, 8, 64),
    "conv1d": (nn.Conv1d(5, 7, 1), lambda h: h, TOKENS, 7, 6),
    "crelu": (CONV(), lambda h: torch.cat([h, -h], 1), IMAGES, 16, 64),
    "residual": (CONV(), lambda h: h + 2 * h, IMAGES, 8, 64),
    "permuted square image": (CONV(), lambda h: h[:, :5].permute(0, 2, 3, 1), IMAGES, 5, 64),
    "permuted twice": (CONV(), lambda h: h[:, :5].movedim(1, -1).transpose(1, 3), IMAGES, 5, 64),
    "patches": (CONV(), lambda h: h[:, :5].flatten(2).mT, IMAGES, 5, 64),
    "flattened": (CONV(), lambda h: h.flatten(1), IMAGES, 512, 1),
    "pooled": (CONV(), lambda h: h.mean((2, 3)), IMAGES, 8, 1),
    "linear": (nn.Linear(6, 7), lambda h: h, VECTORS, 7, 1),
    "tokens": (nn.Linear(6, 7), lambda h: h, TOKENS, 7, 5),
    "one token": (nn.Linear(6, 7), lambda h: h[:, 0], TOKENS, 7, 1),
    "channels last": (nn.Linear(8, 7), lambda h: h, IMAGES, 7, 24),
    "channels first after a linear layer": (nn.Linear(8, 7), lambda h: h.permute(0, 3, 1, 2), IMAGES, 7, 24),
    "decoder": (nn.Linear(6, 48), lambda h: h.view(-1, 3, 4, 4), VECTORS, 3, 16),
    "layer norm": (nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7)), lambda h: h, TOKENS, 7, 5),
    "batch norm of vectors": (nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7)), lambda h: h, VECTORS, 7, 1),
    "input": (nn.Identity(), lambda h: h, VECTORS, 6, 1),
    "images as they came": (nn.Identity(), lambda h: h, IMAGES, 3, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_units_and_rows(name: str) -> None:
    stem, between, shape, units, positions = CASES[name]
    activity = dead_units(Net(stem, between), [(torch.randn(shape), torch.zeros(8).long())])
    assert activity.units.tolist() == [units]
    assert activity.rows.tolist() == [8 * positions]


def test_a_channel_that_is_dead_is_one_unit_even_where_the_image_is_permuted() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1)
    with torch.no_grad():
        conv.weight[2] = 0
        conv.bias[2] = -1  # type: ignore[index]
    for between in (lambda h: h, lambda h: h.permute(0, 2, 3, 1)):
        activity = dead_units(Net(conv, between), [(torch.randn(IMAGES), torch.zeros(8).long())])
        assert activity.total_dead_fraction == 1 / 8


def test_products_with_a_parameter_on_either_side() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.w @ x).mean(1) @ self.v

    activity = dead_units(Left(), [(torch.randn(TOKENS), torch.zeros(8).long())])
    assert (activity.units.tolist(), activity.rows.tolist()) == ([7], [48])
    weight, x = torch.randn(4, 4), torch.randn(4, 4)
    weights = frozenset({weight.untyped_storage().data_ptr()})
    assert unit_axis_of_product("mm", (x, weight), weights) == -1
    assert unit_axis_of_product("mm", (weight, x), weights) == -2
    assert unit_axis_of_product("addmm", (weight[0], x, weight), weights) == -1


def test_a_tensor_of_unknown_origin_goes_by_the_latest_layer_and_then_by_its_shape() -> None:
    axes, image, tokens = UnitAxes(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4)
    assert (axes.of(image), axes.of(tokens)) == (1, 2)
    axes.put_last(torch.zeros(2, 3))
    assert axes.of(image) == 3
    axes.follow("conv1d", (tokens,), torch.zeros(2, 3, 4), None, None)
    assert (axes.of(image), axes.of(tokens), axes.of(torch.zeros(3))) == (1, 1, 0)


def test_a_matrix_has_units_as_columns() -> None:
    x = torch.arange(24).view(2, 3, 4)
    assert matrix(x, 1).shape == (8, 3)
    assert matrix(x, 1)[1].tolist() == [1, 5, 9]
    assert torch.equal(matrix(x, 2), x.view(6, 4))


def test_tensors_are_found_in_nested_arguments() -> None:
    a, b = torch.zeros(1), torch.zeros(2)
    assert [t.shape for t in flat_tensors([1, a, (None, [b, "x"])])] == [(1,), (2,)]


def test_sizes_that_say_nothing_would_mislead_a_guess_by_size() -> None:
    """A 16 x 8 x 8 CReLU output after eight channels: by size alone, pixels (8) would pass for channels."""
    net = Net(CONV(), CASES["crelu"][1])
    with isolated():
        made = subject(net, [(torch.randn(IMAGES), torch.zeros(8).long())])
        (hidden,) = (F.relu(net.between(net.stem(batch[0]))) for batch in made.chunks())
    by_size = next(axis for axis in (3, 2, 1) if hidden.shape[axis] == 8)
    assert matrix(hidden, by_size).shape[1] != 16
