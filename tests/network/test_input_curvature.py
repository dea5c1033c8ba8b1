from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian

from plasticity_probe.network.input_curvature import squared_input_products
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def products(made: Subject, draws: int = 4) -> Tensor:
    source = generator()
    found = [squared_input_products(made, batch, draws, source) for batch in made.chunks()]
    return torch.cat([part for part in found if isinstance(part, Tensor)])


def dense(model: nn.Module, x: Tensor, y: Tensor, draws: int) -> Tensor:
    """|H v|^2 with the same v and every Hessian formed in float64, one example at a time."""
    model, source = model.double().eval(), generator()
    rows = []
    for row, target in zip(x.double(), y, strict=True):
        matrix = hessian(lambda v, t=target: F.cross_entropy(model(v[None]), t[None]), row).reshape(row.numel(), -1)
        signs = 2 * torch.randint(0, 2, (draws, row.numel()), generator=source, dtype=torch.int8).double() - 1
        rows.append((signs @ matrix).square().sum(1))
    return torch.stack(rows)


NETS = {
    "linear": lambda: nn.Linear(6, 3),
    "tanh": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(8, 3)
    ),
    "gru": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.GRU(3, 4, batch_first=True), Last(), nn.Linear(4, 3)),
    "attention": lambda: nn.Sequential(
        nn.Linear(6, 8),
        nn.Unflatten(1, (2, 4)),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        nn.Flatten(),
        nn.Linear(8, 3),
    ),
}


class Last(nn.Module):
    def forward(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return outputs[0][:, -1]


@pytest.mark.parametrize("name", NETS)
def test_products_are_those_of_the_dense_hessian(name: str) -> None:
    x, y = torch.randn(9, 6), torch.randint(3, (9,))
    model = NETS[name]()
    with isolated():
        found = products(subject(model, [(x[:8], y[:8]), (x[8:], y[8:])], dtype=torch.float64))
        exact = dense(model, x, y, 4)
    assert torch.allclose(found, exact, rtol=1e-9, atol=1e-15)
    with isolated():
        single = products(subject(model, [(x, y)], dtype=torch.float32))
    assert torch.allclose(single, exact, rtol=1e-3, atol=1e-3 * float(exact.mean()))


def test_products_do_not_depend_on_how_the_examples_are_cut() -> None:
    x, y = torch.randn(17, 6), torch.randint(3, (17,))
    model = NETS["tanh"]()
    together = products(subject(model, [(x, y)], dtype=torch.float64))
    apart = subject(model, [(x, y)], dtype=torch.float64, memory=1)
    assert apart.chunk == 1
    assert torch.allclose(products(apart), together, rtol=1e-12)


def test_a_batch_mean_would_shrink_them() -> None:
    x, y = torch.randn(17, 6), torch.randint(3, (17,))
    model = NETS["tanh"]()

    def mean_over_the_batch(net: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1], reduction="none") / len(batch[0])

    right = products(subject(model, [(x, y)], dtype=torch.float64))
    shrunk = products(subject(model, [(x, y)], dtype=torch.float64, loss=mean_over_the_batch))
    assert torch.allclose(shrunk * 17**2, right, rtol=1e-9)


def test_they_are_the_limit_of_gargs_difference_quotient() -> None:
    x, y = torch.randn(5, 6).double(), torch.randint(3, (5,))
    model = NETS["tanh"]().double()
    source, h = generator(), 1e-3
    signs = 2 * torch.randint(0, 2, (5, 3, 6), generator=source, dtype=torch.int8).double() - 1

    def slope(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)[0]

    quotient = torch.stack([(slope(x + h * signs[:, d]) - slope(x)).square().sum(1) / h**2 for d in range(3)], 1)
    assert torch.allclose(products(subject(model, [(x, y)]), 3), quotient, rtol=0.05)


class Pair(NamedTuple):
    inputs: Any
    targets: Tensor


def test_batches_of_every_form() -> None:
    x, y = torch.randn(5, 6), torch.randint(3, (5,))

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = NETS["tanh"]()

        def forward(self, features: Tensor, flags: Tensor) -> Tensor:
            return self.inner(features)

    torch.manual_seed(1)
    plain = NETS["tanh"]()
    keyword = Keyword()
    keyword.inner.load_state_dict(plain.state_dict())
    expected = products(subject(plain, [(x, y)]))
    for model, batch in (
        (plain, [x, y]),
        (plain, Pair(x, y)),
        (keyword, {"labels": y, "features": x, "flags": torch.ones(5, dtype=torch.long)}),
    ):
        assert torch.equal(products(subject(model, [batch])), expected)


def test_the_target_of_an_autoencoder_does_not_move_with_its_input() -> None:
    x = torch.randn(5, 6)
    model = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 6))
    apart = products(subject(model, [(x, x.clone())]))
    made = subject(model, [(x, x)])
    shared = squared_input_products(made, (x, x), 4, generator())
    assert isinstance(shared, Tensor)
    assert torch.equal(shared, apart)


def reason(made: Subject) -> str:
    found = squared_input_products(made, next(iter(made.chunks())), 2, generator())
    assert isinstance(found, str)
    return found


def test_where_it_is_not_defined_a_sentence_says_why() -> None:
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    tokens = subject(nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 3)), [(torch.randint(9, (6, 2)), y)])
    assert "there are 0 (tokens have none)" in reason(tokens)
    coupled = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    assert "mode='eval'" in reason(subject(coupled, [(x, y)], mode="train"))
    triple = subject(nn.Linear(4, 3), [(x, y, y)], loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    assert "no pairs" in reason(triple)
    batch = {"labels": y, "x": x.expand(2, 6, 4)}
    time_first = subject(nn.Linear(4, 3), [batch], loss=lambda m, b: m(b["x"]).sum((0, 2)))
    assert "no row per example" in reason(time_first)


def test_losses_linear_in_the_input_or_free_of_it_have_none() -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    for judge in (lambda m, b: m(b[0]).sum(1), lambda m, b: m.weight.sum() * b[1][:, 0]):
        assert not products(subject(nn.Linear(4, 1), [(x, y)], loss=judge)).any()


def test_broken_weights_give_no_numbers_instead_of_a_reason() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    assert products(subject(model, [(torch.randn(6, 4), torch.randint(3, (6,)))])).isnan().all()
