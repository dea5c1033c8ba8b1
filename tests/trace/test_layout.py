import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from trace_rows import row

from plasticity_probe.errors import UsageError
from plasticity_probe.trace.layout import COLUMNS, TEXT_LIMIT, Row, Variable, canonical, canonical_settings, check_label


def test_a_key_is_what_was_measured_and_not_how_it_ended_or_where_the_file_lay() -> None:
    one = row(3)
    assert one.key == replace(one, status="failed", seconds=9.0, checkpoint="elsewhere.pt", seed=1).key
    others: dict[str, Any] = {
        "probe": "b", "settings": "{}", "run": "b", "step": 4, "sha256": "0", "network": "fresh", "replicate": 1
    }  # fmt: skip
    assert all(replace(one, **{name: value}).key != one.key for name, value in others.items())


def test_settings_in_another_spelling_are_the_same_settings() -> None:
    one = row(settings='{"b": [1, 2.50], "a": "\\u00e9"}')
    assert one.settings == row(settings='{"a":"é","b":[1,2.5]}').settings
    assert json.loads(one.settings) == {"a": "é", "b": [1, 2.5]}


def test_rows_compare_by_content_and_nan_equals_nan() -> None:
    one = row(1, variables={"x": Variable((), np.array(np.nan))})
    assert one == row(1, variables={"x": Variable((), np.array(np.nan))})
    assert one != row(1, variables={"x": Variable((), np.array(0.0))})
    assert one != row(1, variables={"x": Variable((), np.array(np.nan), {"units": "1"})})
    assert one != row(1, variables={})
    assert one != "a row"
    assert Variable((), np.array("a")) != Variable((), np.array(1.0))


def test_data_is_copied_to_float64_and_protected() -> None:
    source = np.array([1, 2], dtype=np.float32)
    made = Variable(("pair",), source)
    source[0] = 7
    assert made.data.dtype == np.float64
    assert made.data.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        made.data[0] = 3


def test_numpy_numbers_become_plain_ones() -> None:
    made = row(seed=np.int64(3), seconds=np.float32(0.5), task=np.int32(4))
    assert [type(value) for value in (made.seed, made.seconds, made.task)] == [int, float, int]


@pytest.mark.parametrize(
    "label",
    ["", "a/b", "/", ".", "..", "../x", " a", "a ", "a\nb", "a\x00", "\ud800", "provenance", "row", "x" * 201],
)
def test_labels_that_could_be_paths_or_hide_something_are_refused(label: str) -> None:
    with pytest.raises(UsageError, match="probe's label"):
        check_label(label)


@pytest.mark.parametrize("label", ["spectrum", "spectrum (next task)", "λ", "<b>", "a.b", "x" * 200])
def test_printable_labels_are_taken(label: str) -> None:
    check_label(label)
    assert row(probe=label).probe == label


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variables": {"step": Variable((), np.array(1))}}, "taken by the trace"),
        ({"variables": {"length_of_x": Variable((), np.array(1))}}, "taken by the trace"),
        ({"variables": {"a b": Variable((), np.array(1))}}, "identifier"),
        ({"variables": {"a/b": Variable((), np.array(1))}}, "identifier"),
        ({"variables": {"x": Variable(("row",), np.ones(1))}}, "taken by the trace"),
        ({"variables": {"layer": Variable((), np.array(1))}}, "both a quantity and a dimension"),
        ({"variables": {"x": Variable(("layer",), np.ones(2))}}, "expected 3 entries along layer, got 2"),
        ({"labels": {"layer": (1, 2)}}, "texts as labels"),
        ({"seed": 2**63}, "64-bit integer as seed"),
        ({"task": 1.5}, "64-bit integer as task"),
        ({"run": 3}, "text as run"),
        ({"seconds": "long"}, "float as seconds"),
        ({"settings": "[1]"}, "JSON object"),
        ({"settings": "{"}, "JSON object"),
        ({"settings": json.dumps({"a": "x" * TEXT_LIMIT})}, "at most"),
        ({"conditions": {"a": [1]}}, "as condition 'a'"),
        ({"conditions": {"a": "x" * TEXT_LIMIT}}, "conditions"),
        ({"variables": {f"q{i}": Variable((), np.array(1)) for i in range(300)}}, "at most 256"),
    ],
)
def test_rows_that_could_not_be_stored_are_refused_at_once(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        row(**changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((("a",), np.array(1)), "dimensions"),
        (((), np.ones(2)), "dimensions"),
        ((("a",), np.array(["x", "y"])), "one text"),
        (((), np.array(None, dtype=object)), "one text"),
        (((), np.array(1), {"note": "x"}), "short text"),
        (((), np.array(1), {"units": 3}), "short text"),
        (((), np.array(1), {"long_name": "x" * TEXT_LIMIT}), "short text"),
        (((), np.array(1), {"units": "seconds since start"}), "dates"),
    ],
)
def test_variables_that_could_not_be_stored_are_refused_at_once(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Variable(*arguments)


def test_what_is_no_plain_data_has_no_canonical_form() -> None:
    with pytest.raises(UsageError, match="plain data"):
        canonical({"a": object()})
    with pytest.raises(UsageError, match="JSON object"):
        canonical_settings("[" * 100_000)


def test_every_plain_field_of_a_row_is_a_column_and_the_other_columns_are_derived() -> None:
    fields = set(Row.__dataclass_fields__) - {"probe", "labels", "variables", "provenance"}
    assert set(COLUMNS) - fields == {"number", "session", "measured"}
    assert fields <= set(COLUMNS)
