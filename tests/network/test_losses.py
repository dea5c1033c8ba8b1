from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.losses import (
    cross_entropy_terms,
    custom_loss,
    infer_loss,
    outputs_of,
    squared_error_terms,
)

torch.manual_seed(0)
X = torch.randn(6, 4)
LINEAR = nn.Linear(4, 3)


class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.linear, self.form = LINEAR, form

    def forward(self, x):
        return self.form(self.linear(x))


@pytest.mark.parametrize(
    "form",
    [
        lambda z: z,
        lambda z: (z, "aux"),
        lambda z: [z],
        lambda z: {"logits": z, "x": 1},
        lambda z: SimpleNamespace(logits=z),
    ],
)
def test_outputs_are_found_in_every_common_form(form) -> None:
    assert torch.equal(outputs_of(Returns(form), (X, None)), LINEAR(X))


@pytest.mark.parametrize("form", [lambda z: {"scores": z}, lambda z: "text", lambda z: ()])
def test_other_outputs_are_refused_with_the_remedy(form) -> None:
    with pytest.raises(SubjectError, match="Pass loss="):
        outputs_of(Returns(form), (X, None))


def test_cross_entropy_of_classes_tokens_and_pixels_matches_torch() -> None:
    scores, classes = torch.randn(6, 3), torch.randint(0, 3, (6,))
    assert torch.allclose(cross_entropy_terms(scores, classes)[0].mean(), F.cross_entropy(scores, classes))
    tokens, targets = torch.randn(6, 5, 3), torch.randint(0, 3, (6, 5))
    targets[0, :3] = -100
    sums, counts = cross_entropy_terms(tokens, targets)
    assert counts.tolist() == [2, 5, 5, 5, 5, 5]
    assert torch.allclose(sums.sum() / counts.sum(), F.cross_entropy(tokens.flatten(0, 1), targets.flatten()))
    pixels, labels = torch.randn(6, 3, 2, 2), torch.randint(0, 3, (6, 2, 2))
    sums, counts = cross_entropy_terms(pixels, labels)
    assert torch.allclose(sums.sum() / counts.sum(), F.cross_entropy(pixels, labels))


def test_square_token_outputs_are_read_as_tokens_last_dimension_classes() -> None:
    outputs, targets = torch.randn(2, 3, 3), torch.randint(0, 3, (2, 3))
    sums, _ = cross_entropy_terms(outputs, targets)
    assert torch.allclose(sums.sum() / 6, F.cross_entropy(outputs.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize(
    ("outputs", "targets"), [((6, 1), (6,)), ((6,), (6, 1)), ((6, 2), (6, 2)), ((6, 2, 2), (6, 2, 2))]
)
def test_squared_error_is_mse_and_never_broadcasts(outputs, targets) -> None:
    a, b = torch.randn(outputs), torch.randn(targets)
    terms, _ = squared_error_terms(a, b)
    assert terms.shape == (6,)
    assert torch.allclose(terms.mean(), F.mse_loss(a.reshape(targets), b))


def infer(targets, model=LINEAR):
    return infer_loss(model, (X, targets), [(X, targets)])


def test_the_loss_is_inferred_and_says_so() -> None:
    assert infer(torch.zeros(6, dtype=torch.long)).name == "cross-entropy (inferred)"
    assert infer(torch.zeros(6, 3)).name == "squared error (inferred)"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 7, 0]), "expected labels from 0 to 2.*2 of 6 lie outside: 3, 7"),
        (torch.tensor([0, -1, 2, 0, 0, 0]), "1 of 6 lie outside: -1"),
        (torch.zeros(6), r"make them integers: y\.long\(\)"),
        (torch.zeros(6, 2), "do not match outputs"),
        (torch.zeros(6, 2, dtype=torch.long), "neither class scores"),
        (None, "expected targets beside the inputs"),
    ],
)
def test_targets_that_fit_no_loss_are_refused_with_the_remedy(targets, message) -> None:
    with pytest.raises(SubjectError, match=message):
        infer(targets)


def test_binary_outputs_are_ambiguous() -> None:
    with pytest.raises(SubjectError, match="cannot tell the loss"):
        infer(torch.zeros(6, dtype=torch.long), nn.Linear(4, 1))


def test_labels_out_of_range_in_a_late_batch_are_found() -> None:
    good, bad = torch.zeros(6, dtype=torch.long), torch.full((6,), 9)
    with pytest.raises(SubjectError, match="6 of 6 lie outside"):
        infer_loss(LINEAR, (X, good), [(X, good), (X, bad)])


def test_a_custom_loss_gives_one_value_per_example_or_sums_and_counts() -> None:
    assert custom_loss(lambda m, b: m(b[0]).sum(1)).of_batch(LINEAR, (X,))[1].tolist() == [1] * 6
    sums, counts = custom_loss(lambda m, b: (m(b[0]).sum(1), torch.full((6,), 3))).of_batch(LINEAR, (X,))
    assert counts.dtype == sums.dtype
    assert counts.tolist() == [3] * 6


@pytest.mark.parametrize("value", [lambda m, b: m(b[0]).mean(), lambda m, b: m(b[0]), lambda m, b: 0.5])
def test_a_custom_loss_of_another_shape_is_refused(value) -> None:
    with pytest.raises(SubjectError, match="one value per example"):
        custom_loss(value).of_batch(LINEAR, (X,))


def test_a_loss_module_is_refused_with_the_remedy() -> None:
    with pytest.raises(SubjectError, match="reduction='none'"):
        custom_loss(nn.CrossEntropyLoss())
