"""For authors of probes: the contract that every probe keeps, as one check, and subjects whose curvature is known in closed form."""

import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plasticity_probe.measurement import Measurement, arrays, schema
from plasticity_probe.network.examples import Batch
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject, subject
from plasticity_probe.probe import Probe, generator_for


def check_probe(probe: Probe[Any], made: Subject | None = None) -> Measurement:
    """Checks that a probe keeps the contract; an assertion fails with the reason where it does not.

    The probe repeats itself bit for bit from one generator seed, whatever the global random states are; leaves the subject's weights,
    buffers, modes, gradients, hooks and examples as they were; returns what it says it returns, with numbers of the shapes of its schema
    that can be stored; has settings that are plain data; and predicts a cost.

    Args:
        probe: The probe with its settings.
        made: The subject to try it on; softmax regression on 40 examples by default.

    Returns:
        The measurement, for further checks of its numbers.
    """
    tried = made if made is not None else softmax_regression()
    before = _state(tried)
    json.dumps(probe.settings())
    cost = probe.cost(tried)
    assert min(cost.forwards, cost.gradients, cost.products, cost.vectors, cost.bytes) >= 0, (
        f"cost() must not be negative, got {cost}"
    )
    first, second = _measured(probe, tried, 1), _measured(probe, tried, 2)
    assert _state(tried) == before, "measure() changed the subject's model, gradients, hooks or examples"
    assert type(first) is probe.returns, (
        f"measure() returned {type(first).__name__}, returns says {probe.returns.__name__}"
    )
    _check_storable(first)
    for name, values in arrays(first).items():
        same = np.array_equal(values, arrays(second)[name], equal_nan=values.dtype.kind == "f")
        assert same, (
            f"{name} differs between two measurements from one generator seed: is there another source of randomness?"
        )
    return first


def linear_regression(
    examples: int = 33, features: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Subject, Tensor]:
    """A linear model without bias under squared error, and the Hessian of its mean loss, 2 XᵀX / N.

    The loader is ragged: its last batch holds one example where `examples` is 33.

    Args:
        examples: Number of examples N.
        features: Number of inputs, and so of parameters.
        seed: Seed of inputs, targets and weights.
        dtype: Type to compute in.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, features, generator=generator, dtype=torch.float64)
    targets = torch.randn(examples, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(features, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, features, generator=generator))
    made = subject(model.to(dtype), _batches(inputs, targets), dtype=dtype)
    return made, 2 * inputs.T @ inputs / examples


def softmax_regression(
    examples: int = 40, features: int = 5, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Subject:
    """A linear classifier under cross-entropy.

    Its per-example gradient is (p − e_y) xᵀ and its Hessian the mean of (diag p − p pᵀ) ⊗ x xᵀ, p the predicted probabilities; the generalised
    Gauss-Newton matrix is the same.

    Args:
        examples: Number of examples.
        features: Number of inputs.
        classes: Number of classes.
        seed: Seed of inputs, targets and weights.
        dtype: Type to compute in.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, features, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, classes, (examples,), generator=generator)
    model = nn.Linear(features, classes, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(classes, features, generator=generator))
    return subject(model.to(dtype), _batches(inputs, targets), dtype=dtype)


def _batches(inputs: Tensor, targets: Tensor) -> list[Batch]:
    return list(zip(inputs.split(32), targets.split(32), strict=True))


def _measured(probe: Probe[Any], made: Subject, global_seed: int) -> Measurement:
    made.memo.clear()
    with isolated():
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002 -- a probe may draw from it by mistake
        return probe.measure(made, generator_for(0, probe.name))


def _check_storable(measured: Measurement) -> None:
    values = arrays(measured)
    sizes: dict[str, int] = {}
    for field in schema(type(measured)):
        for dim, size in zip(field.dims, values[field.name].shape, strict=True):
            known = sizes.setdefault(dim, size)
            assert known == size, f"{field.name} has {size} entries along {dim}, others have {known}"
    json.dumps(measured.to_dict())
    assert measured.message or measured.status == "ok", "a status other than ok needs a message"


def _state(made: Subject) -> tuple[Any, ...]:
    model = made.model
    return (
        {name: (tensor.dtype, tensor.tolist()) for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        [len(vars(m)[kind]) for m in model.modules() for kind in vars(m) if kind.endswith("_hooks") and vars(m)[kind]],
        made.examples.sha256,
    )
