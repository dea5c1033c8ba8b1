"""Any model, any loader, nothing left changed: what every public function promises, checked on all of them."""

import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import plasticity_probe as probe
from plasticity_probe.errors import PlasticityProbeError

X, Y = torch.randn(33, 6), torch.randint(0, 3, (33,))
RAGGED = [(X[:32], Y[:32]), (X[32:], Y[32:])]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(probe, name)
    for name in (
        "performance",
        "curvature_rank",
        "fisher_rank",
        "hessian_spectrum",
        "feature_rank",
        "dead_units",
        "gradient_norms",
        "memorization",
        "readiness",
    )
}
# A loss given as a function has no classes to draw labels from; two steps are enough to see that nothing is left changed.
FUNCTIONS["trainability"] = partial(
    probe.trainability, targets=("high_frequency", "data"), steps=2, repeats=2, orders=1, learning_rate=1e-3
)


class Odd(nn.Module):
    """Functional activation, BatchNorm, dropout, a tied, a frozen and an unused parameter; any form of output."""

    def __init__(self, form: Callable[[torch.Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.head, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)
        self.second.bias.requires_grad_(False)
        self.form = form

    def forward(self, x: torch.Tensor) -> Any:
        return self.form(self.head(self.drop(F.relu(self.norm(self.second(F.relu(self.first(x))))))))


def everything(model: nn.Module) -> tuple[Any, ...]:
    return (
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        [id(parameter) for parameter in model.parameters()],
        [
            (p.requires_grad, p.dtype, None if p.grad is None else p.grad.tolist(), p._version)
            for p in model.parameters()
        ],
        [module.training for module in model.modules()],
        [list(vars(m)[kind]) for m in model.modules() for kind in vars(m) if kind.endswith("_hooks") and vars(m)[kind]],
        torch.get_rng_state().tolist(),
        repr(np.random.get_state()),
        random.getstate(),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.mha.get_fastpath_enabled()),
        (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.is_grad_enabled()),
        torch.get_num_threads(),
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_changed_not_even_after_an_error(name: str, fail: bool) -> None:
    model = Odd().train()
    model(X).sum().backward()
    model.head.register_forward_hook(lambda *_: None)
    before = everything(model)
    loader = DataLoader(TensorDataset(X, Y + 7 * fail), batch_size=8, shuffle=True)
    if fail:
        with pytest.raises(PlasticityProbeError):
            FUNCTIONS[name](model, loader)
    else:
        FUNCTIONS[name](model, loader)
    assert everything(model) == before


def test_weight_norms_leave_the_model_alone_too() -> None:
    model = Odd().train()
    before = everything(model)
    probe.weight_norms(model)
    assert everything(model) == before


def test_analyze_leaves_everything_alone(tmp_path) -> None:
    model = Odd().train()
    before = everything(model)
    probe.analyze(model, DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), trace=tmp_path / "t.h5")
    assert everything(model) == before


FORMS = {
    "tensor": lambda z: z,
    "tuple": lambda z: (z, "more"),
    "mapping": lambda z: {"loss": None, "logits": z},
    "object": lambda z: SimpleNamespace(logits=z),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_form_of_output_and_batch_gives_the_same_numbers(name: str) -> None:
    torch.manual_seed(1)
    state = Odd().state_dict()

    def measured(form: str, loader: Any, **options: Any) -> dict[str, Any]:
        model = Odd(FORMS[form])
        model.load_state_dict(state)
        found = FUNCTIONS[name](model, loader, dtype=torch.float64, **options).to_dict()
        found.pop("conditions")
        return found

    expected = measured("tensor", RAGGED)
    for form in FORMS:
        same(measured(form, RAGGED), expected)
    same(measured("tensor", [{"x": X[:20], "labels": Y[:20]}, {"x": X[20:], "labels": Y[20:]}]), expected)
    same(measured("tensor", [(X, Y)]), expected)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    custom = measured("tensor", RAGGED, loss=loss)
    for known in (
        "accuracy",
        "accuracy_before",
        "accuracy_after",
        "fresh_accuracy_before",
        "fresh_accuracy_after",
        "learned",
        "fresh_learned",
        "constant_loss",
        "relative_advantage",
        "relative_advantage_sem",
        "chance",
        "training_accuracy",
        "message",
        "subspace",
        "top_energy",
        "products",
        "curvature_cosine",
        "local_redundancy",
        "local_redundancy_sem",
    ):
        custom[known] = expected[known] if known in expected else custom.pop(known, None)
    same({key: value for key, value in custom.items() if key in expected}, expected)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
            assert found[key] == value, key
        else:
            np.testing.assert_allclose(
                np.array(found[key], float), np.array(value, float), rtol=1e-6, atol=1e-9, err_msg=key
            )


def test_the_users_first_call_simply_works() -> None:
    rank = probe.curvature_rank(Odd(), RAGGED)
    assert 0 < float(rank) <= rank.ceiling == 33
    assert rank.interval == (rank.value, rank.value)
    assert rank.status == "ok"
