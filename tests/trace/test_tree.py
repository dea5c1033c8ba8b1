# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
# What h5py and xarray return by name has no useful type.

import json
import time

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from trace_rows import META, failed, groups, row

from plasticity_probe.errors import TraceError
from plasticity_probe.trace.layout import Row, Variable
from plasticity_probe.trace.tree import Template, dataset_tree, rows_of


def one(step: int, labels: tuple[str, ...], values: list[float]) -> Row:
    return row(step, labels={"layer": labels}, variables={"norm": Variable(("layer",), np.array(values))})


@settings(max_examples=50, deadline=None)
@given(groups())
def test_rows_come_back_from_their_tree(rows: list[Row]) -> None:
    tree = dataset_tree(rows)
    assert rows_of(tree) == rows
    xr.testing.assert_identical(dataset_tree(rows_of(tree)), tree)


def test_labels_stand_in_order_of_first_appearance_and_rows_keep_their_own() -> None:
    rows = [one(0, ("z", "b"), [1, 2]), one(1, ("b", "a", "z"), [3, 4, 5]), one(2, (), [])]
    group = dataset_tree(rows)["spectrum"]
    assert group["layer"].values.tolist() == ["z", "b", "a"]
    nan = float("nan")
    np.testing.assert_array_equal(group["norm"], [[1, 2, nan], [5, 3, 4], [nan, nan, nan]])
    assert group["position_of_layer"].values.tolist() == [[0, 1, -1], [2, 0, 1], [-1, -1, -1]]
    assert group["length_of_layer"].values.tolist() == [2, 3, 0]
    assert rows_of(dataset_tree(rows)) == rows


def test_a_label_held_twice_is_two_entries() -> None:
    rows = [one(0, ("a", "a"), [1, 2]), one(1, ("b", "a"), [3, 4])]
    group = dataset_tree(rows)["spectrum"]
    assert group["layer"].values.tolist() == ["a", "a", "b"]
    np.testing.assert_array_equal(group["norm"], [[1, 2, np.nan], [4, np.nan, 3]])
    assert rows_of(dataset_tree(rows)) == rows


def test_dimensions_without_labels_are_padded_to_the_longest() -> None:
    rows = [row(i, variables={"x": Variable(("pair",), np.ones(n))}, labels={}) for i, n in enumerate([2, 0, 3])]
    group = dataset_tree([*rows, failed(3)])["spectrum"]
    assert group["x"].shape == (4, 3)
    assert np.isnan(group["x"]).sum(axis=1).values.tolist() == [1, 3, 0, 3]
    assert group["length_of_pair"].values.tolist() == [2, 0, 3, -1]
    assert group["measured"].values.tolist() == [1, 1, 1, 0]


def test_an_unknown_number_and_a_missing_entry_are_told_apart() -> None:
    rows = [one(0, ("a", "b"), [float("nan"), 1]), one(1, ("b",), [2])]
    group = dataset_tree(rows)["spectrum"]
    assert np.isnan(group["norm"].values[:, 0]).all()
    assert (group["position_of_layer"].values[:, 0] >= 0).tolist() == [True, False]


def test_a_group_holds_one_probe_in_order_of_measurement_with_meaning_and_settings() -> None:
    rows = [row(0), row(0, "units"), row(1, conditions={"examples": 128}), failed(2)]
    tree = dataset_tree(rows)
    assert list(tree.children) == ["spectrum", "units"]
    group = tree["spectrum"]
    assert group["number"].values.tolist() == [0, 2, 3]
    assert group["step"].values.tolist() == [0, 1, 2]
    assert group["top"].attrs == META
    assert group["seconds"].attrs["units"] == "s"
    assert list(group.data_vars) == ["top", "norm", "overlap", "total", "choice"]
    assert group.attrs["quantities"].split() == list(group.data_vars)
    assert json.loads(group.attrs["settings"]) == {"k": 3, "loss": "cross-entropy"}
    assert json.loads(tree["units"].attrs["conditions"]) == dict(row(0).conditions)
    assert json.loads(group.attrs["conditions"]) == {}
    assert tree.attrs == {"schema": "plasticity_probe trace", "schema_version": 1}


def test_rows_know_the_session_that_wrote_them() -> None:
    rows = [
        row(0, provenance='{"torch":"2.10"}'),
        row(1, provenance='{"torch":"2.13"}'),
        row(2, provenance='{"torch":"2.10"}'),
    ]
    tree = dataset_tree(rows)
    assert [json.loads(text)["torch"] for text in tree["provenance"].values] == ["2.10", "2.13"]
    assert tree["spectrum"]["session"].values.tolist() == [0, 1, 0]


def test_quantities_keep_the_order_in_which_they_first_appeared() -> None:
    a, b = Variable((), np.array(1)), Variable((), np.array(2))
    rows = [row(0, variables={"b": b, "a": a}), row(1, variables={"c": b, "a": a, "b": b})]
    assert list(dataset_tree(rows)["spectrum"].data_vars) == ["b", "a", "c"]


def test_a_quantity_that_an_older_row_did_not_have_comes_back_as_unknown() -> None:
    new = row(1, labels={}, variables={"x": Variable((), np.array(1)), "said": Variable((), np.array("b"))})
    old = row(0, labels={}, variables={"x": Variable((), np.array(2))})
    back = rows_of(dataset_tree([old, new]))
    assert back[1] == new
    assert back[0].variables["said"].data.item() == ""
    assert back[0].variables["x"].data == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"variables": {"top": Variable(("pair", "layer"), np.ones((3, 3)))}},
        {"variables": {"top": Variable((), np.array("text"))}},
        {"variables": {"top": Variable(("pair",), np.ones(3), META | {"units": "1"})}},
        {"variables": {"x": Variable(("top",), np.ones(3))}},
        {"variables": {"pair": Variable((), np.array(1))}},
        {"labels": {"layer": ("a",), "pair": ("x",)}, "variables": {}},
        {"labels": {}, "variables": {"norm": Variable(("layer",), np.ones(3), {"units": "1"})}},
    ],
)
def test_rows_of_one_label_that_mean_different_things_are_refused(changed: dict[str, dict[str, Variable]]) -> None:
    template = Template("spectrum")
    template.admit(row(0))
    known = dict(template.variables), dict(template.labelled)
    with pytest.raises(TraceError, match=r"group 'spectrum'.*Use another label"):
        template.admit(row(1, **changed))
    assert known == (template.variables, template.labelled)


def test_a_tree_that_lacks_a_column_is_refused() -> None:
    tree = dataset_tree([row(0)])
    tree["spectrum"] = xr.DataTree(tree["spectrum"].to_dataset(inherit=False).drop_vars("sha256"))
    with pytest.raises(TraceError, match="lacks sha256"):
        rows_of(tree)


def test_four_thousand_rows_take_seconds_at_most() -> None:
    rows = [row(step, f"probe {number}") for step in range(500) for number in range(8)]
    start = time.perf_counter()
    back = rows_of(dataset_tree(rows))
    assert len(back) == 4000
    assert time.perf_counter() - start < 30
