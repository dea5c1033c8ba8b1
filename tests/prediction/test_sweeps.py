"""Quantities at other thresholds: the ranks of the package's own definitions, read from what a trace stores."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hand_made_rows import NAN, measured, outcome, told
from hypothesis import given
from hypothesis import strategies as st

from plasticity_probe.linalg import ranks
from plasticity_probe.prediction.alignment import align
from plasticity_probe.prediction.sweeps import DELTAS, EPSILONS, swept, threshold_rank
from plasticity_probe.trace.layout import Row, Variable


def holding(**arrays: tuple[tuple[str, ...], object]) -> Row:
    variables = {name: Variable(dims, np.array(data, dtype=float)) for name, (dims, data) in arrays.items()}
    settings = json.dumps({"run_sha256": "s", "on": "next", "delta": 0.03})
    labels = {"layer": ("first", "last"), "tau": ("0", "0.1")}
    return replace(measured(0, 0, 0.0), variables=variables, settings=settings, labels=labels)


@given(
    st.lists(st.floats(-100, 100, allow_subnormal=False).map(lambda v: round(v, 3)), max_size=12),
    st.sampled_from(DELTAS),
)
def test_it_is_the_threshold_rank_of_the_package(values: list[float], delta: float) -> None:
    ours = threshold_rank(np.array(values, dtype=float), delta=delta)
    assert ours == ranks.threshold_rank(torch.tensor(values, dtype=torch.float64), delta)


def test_multiplicities_count_in_part() -> None:
    # 4 x 1 + 6 x 0.5: half of the sum of 7 is reached at 3.5 of the ones, three quarters at 4 and 2.5 of the halves.
    values, weights = np.array([0.5, 1.0]), np.array([6.0, 4.0])
    assert threshold_rank(values, weights, delta=0.5) == pytest.approx(3.5)
    assert threshold_rank(values, weights, delta=0.25) == pytest.approx(4 + 2.5)
    assert threshold_rank(np.zeros(3), delta=0.1) == 0


def test_a_row_with_eigenvalues_is_swept_over_delta() -> None:
    row = holding(eigenvalues=(("index",), [6, 3, 1, NAN]), threshold_rank=((), 3))
    (found,) = swept(row)
    assert (found.quantity, found.symbol, found.fixed) == ("fisher_rank.threshold_rank", "δ", 0.03)
    assert found.values == {0.001: 3, 0.003: 3, 0.01: 3, 0.03: 3, 0.1: 2, 0.3: 2}


def test_features_are_swept_in_their_last_layer() -> None:
    row = holding(
        singular_values=(("layer", "index"), [[9, 9, 9], [1, 0.2, NAN]]),
        threshold_rank=(("layer",), [3, 2]),
        rows=(("layer",), [100, 100]),
    )
    by_delta, by_epsilon = swept(row)
    assert by_delta.values[0.3] == 1
    assert by_delta.values[0.1] == 2
    assert by_epsilon.values == {0.001: 2, 0.003: 2, 0.01: 2, 0.03: 1, 0.1: 0}
    assert tuple(by_epsilon.values) == EPSILONS


def test_dormant_units_are_those_of_all_layers() -> None:
    row = holding(dormant_sweep=(("layer", "tau"), [[0, 0.5], [0.2, 0.4]]), units=(("layer",), [10, 30]))
    (found,) = swept(row)
    assert found.values == {0: pytest.approx(0.15), 0.1: pytest.approx(0.425)}


def test_nodes_of_a_quadrature_give_shares_of_the_spectrum() -> None:
    nodes = [[-1.0, 0.0, 2.0], [4.0, 0.0, NAN]]
    row = holding(
        nodes=(("draw", "node"), nodes),
        weights=(("draw", "node"), [[0.5, 0.25, 0.25], [0.1, 0.9, 0]]),
        threshold_rank=((), 3),
    )
    (found,) = swept(row)
    # First draw: .25 of size 2 and .5 of size 1 add up to 1, of which .9 takes .25 + .4; second: .9 of .4 takes .09.
    assert found.values[0.1] == pytest.approx((0.65 + 0.09) / 2)


def test_measurements_that_did_not_end_well_are_not_swept() -> None:
    row = replace(holding(eigenvalues=(("index",), [1.0]), threshold_rank=((), 1)), status="not_converged")
    assert list(swept(row)) == []


def test_a_study_keeps_its_sweeps_by_run_and_task() -> None:
    spectrum = {"eigenvalues": (("index",), [6, 3, 1]), "threshold_rank": ((), 3)}
    later = replace(holding(**spectrum), step=100, task=1, sha256="later")
    (found,) = align([holding(**spectrum), later, *told([outcome(0, t) for t in range(3)])]).sweeps
    assert found.thresholds == DELTAS
    assert found.values.shape == (6, 1, 3)
    assert found.values[-1, 0].tolist() == pytest.approx([2, 2, NAN], nan_ok=True)


def test_a_sweep_that_is_the_same_on_other_data_stands_once() -> None:
    def on(data: str, least: float) -> Row:
        row = holding(eigenvalues=(("index",), [6, 3, least]), threshold_rank=((), 3))
        return replace(row, settings=json.dumps({"run_sha256": "s", "on": data}))

    told_of = told([outcome(0, 0)])
    assert [s.quantity for s in align([on("noise", 1), on("next", 1), *told_of]).sweeps] == [
        "fisher_rank.threshold_rank on next"
    ]
    assert len(align([on("noise", 0.001), on("next", 1), *told_of]).sweeps) == 2
