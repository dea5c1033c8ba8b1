import json
from typing import Annotated

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from plasticity_probe.measurement import (
    Conditions,
    Labels,
    Measurement,
    Quantity,
    Status,
    arrays,
    headlines,
    measurement,
    schema,
)

CONDITIONS = Conditions(33, 10, "squared error (inferred)", "eval", "float32", "cpu", 0)


@measurement
class Example(Measurement):
    layers: Annotated[tuple[str, ...], Labels("layer")]
    width: Annotated[Float[Tensor, " layer"], Quantity("width", units="units", summary="last")]
    table: Annotated[Float[Tensor, "layer pair"], Quantity("entries", summary="mean")]
    hidden: Annotated[Float[Tensor, " layer"], Quantity("not in the table")]
    total: Annotated[float, Quantity("total", units="loss")]
    kind: Annotated[str, Quantity("kind")]


def example(**changes: object) -> Example:
    fields = {
        "layers": ("a", "[/b]<script>"),
        "width": torch.tensor([3.0, 5.0]),
        "table": torch.tensor([[1.0, float("nan")], [2.0, 3.0]]),
        "hidden": torch.zeros(2),
        "total": 7.0,
        "kind": "k",
    }
    return Example(conditions=CONDITIONS, **{**fields, **changes})  # type: ignore[arg-type]


def test_the_annotations_are_the_schema() -> None:
    found = {field.name: (field.dims, field.kind) for field in schema(Example)}
    assert found == {
        "layers": (("layer",), "labels"),
        "width": (("layer",), "number"),
        "table": (("layer", "pair"), "number"),
        "hidden": (("layer",), "number"),
        "total": ((), "number"),
        "kind": ((), "text"),
    }


def test_arrays_are_float64_with_the_dimensions_of_the_schema() -> None:
    found = arrays(example())
    assert found["width"].dtype == np.float64
    assert found["table"].shape == (2, 2)
    assert list(found["layers"]) == ["a", "[/b]<script>"]
    assert found["kind"].item() == "k"


def test_an_array_of_other_dimensions_is_refused() -> None:
    with pytest.raises(TypeError, match=r"width: expected the dimensions \('layer',\)"):
        arrays(example(width=torch.zeros(2, 2)))


def test_headlines_are_scalars_and_summaries_without_nan() -> None:
    found = {line.name: (line.where, line.value) for line in headlines(example())}
    assert found == {"width": ("[/b]<script>", 5.0), "table": ("mean over layers, pairs", 2.0), "total": ("", 7.0)}


def test_a_field_without_meaning_is_refused() -> None:
    @measurement
    class Bare(Measurement):
        value: float

    @measurement
    class Unstorable(Measurement):
        value: Annotated[dict[str, int], Quantity("a mapping")]

    with pytest.raises(TypeError, match=r"Bare.value: expected Annotated"):
        schema(Bare)
    with pytest.raises(TypeError, match=r"Unstorable.value: expected str, int, float"):
        schema(Unstorable)


def test_plain_values_and_representations() -> None:
    shown = example(status=Status.NOT_CONVERGED)
    plain = shown.to_dict()
    assert plain["width"] == [3.0, 5.0]
    assert plain["conditions"]["examples"] == 33
    json.dumps(plain)
    assert "width" in repr(shown)
    assert "not_converged" in repr(shown)
    assert "<script>" not in shown._repr_html_()
