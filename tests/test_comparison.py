import math

import numpy as np
import pytest

from plasticity_probe.comparison import findings, headline_values, number, table
from plasticity_probe.trace.layout import Row, Variable


def row(
    probe="fisher_rank",
    network="checkpoint",
    step=0,
    status="ok",
    message="",
    replicate=0,
    labels=None,
    run="r",
    **values,
) -> Row:
    variables = {
        name: Variable(dims, np.asarray(data, float), {"long_name": name.replace("_", " "), **attrs})
        for name, (dims, data, attrs) in values.items()
    }
    return Row(
        probe=probe, settings="{}", run=run, step=step, task=-1, checkpoint=f"c{step}", sha256=str(step), network=network, replicate=replicate,
        status=status, message=message, seconds=1.0, peak_bytes=0, seed=0, labels=labels or {}, variables=variables,
    )  # fmt: skip


def scalar(value, **attrs):
    return ((), value, attrs)


def test_a_checkpoint_stands_beside_the_mean_of_the_fresh_networks() -> None:
    shown = table(
        [row(rank=scalar(3)), row(network="fresh", rank=scalar(5)), row(network="fresh", replicate=1, rank=scalar(7))]
    )
    assert shown.columns == ("checkpoint", "fresh", "ratio")
    assert [line.values for line in shown.lines] == [(3, 6, 0.5)]


def test_a_series_shows_its_first_and_last_checkpoint() -> None:
    rows = [row(step=step, rank=scalar(step + 1)) for step in (9, 0, 4)]
    assert table(rows).columns == ("step 0", "step 9", "ratio")
    assert table(rows).lines[0].values == (1, 10, 10)
    with_fresh = table([*rows, row(network="fresh", rank=scalar(5))])
    assert with_fresh.columns == ("step 0", "step 9", "fresh", "ratio")
    assert with_fresh.lines[0].values == (1, 10, 5, 2)


def test_several_runs_are_averaged_at_their_own_first_and_last_checkpoint() -> None:
    rows = [
        row(run=run, step=step, rank=scalar(value))
        for run, step, value in (("a", 0, 1), ("a", 9, 3), ("b", 5, 3), ("b", 7, 5))
    ]
    assert table(rows).columns == ("first of 2 runs", "last of 2 runs", "ratio")
    assert table(rows).lines[0].values == (2, 4, 2)
    ends = [row(run="a", rank=scalar(1)), row(run="b", step=3, rank=scalar(5))]
    assert table(ends).columns == ("mean of 2 runs",)
    assert table(ends).lines[0].values == (3,)


def test_arrays_show_by_their_summary_and_hidden_ones_not() -> None:
    found = headline_values(
        row(
            labels={"layer": ("a", "b")},
            last=(("layer",), [1, 2], {"summary": "last"}),
            mean=(("layer",), [1, math.nan], {"summary": "mean"}),
            none=(("layer",), [1, 2], {"summary": "none"}),
            hidden=scalar(1, shown="False"),
        )
    )
    assert found == {"last": ("b", 2), "mean": ("mean over layers", 1)}


def test_missing_numbers_and_failed_probes_leave_no_number_behind() -> None:
    rows = [row(rank=scalar(math.nan)), row(network="fresh", status="failed", message="it broke")]
    shown = table(rows)
    assert math.isnan(shown.lines[0].values[1])
    assert shown.problems == (("fisher_rank (fresh network 0)", "failed", "it broke"),)
    assert any("ended as failed: it broke" in sentence for sentence in findings(rows))


def test_what_stands_out_is_said_and_what_does_not_is_not() -> None:
    def rows(a, b):
        return [
            row(rank=scalar(a), size=scalar(9, role="context")),
            row(network="fresh", rank=scalar(b), size=scalar(1, role="context")),
        ]

    assert "Rank (fisher_rank): 2 against 10 in a fresh network, 5 times less." in findings(rows(2, 10))
    assert "Rank (fisher_rank): 0 against 10 in a fresh network." in findings(rows(0, 10))
    assert not any("Rank" in sentence or "Size" in sentence for sentence in findings(rows(9, 10)))


def test_estimates_whose_intervals_overlap_are_no_finding() -> None:
    def rows(upper):
        own = row(
            rank=scalar(2), rank_lower=scalar(1, role="uncertainty"), rank_upper=scalar(upper, role="uncertainty")
        )
        fresh = row(
            network="fresh",
            rank=scalar(10),
            rank_lower=scalar(8, role="uncertainty"),
            rank_upper=scalar(12, role="uncertainty"),
        )
        return [own, fresh]

    assert any(sentence.startswith("Rank (") for sentence in findings(rows(7)))
    assert not any(sentence.startswith("Rank (") for sentence in findings(rows(9)))


def test_a_series_without_a_fresh_network_is_compared_with_its_start() -> None:
    assert "Rank (fisher_rank): 3 against 12 in step 0, 4 times less." in findings(
        [row(step=0, rank=scalar(12)), row(step=5, rank=scalar(3))]
    )


def test_an_accuracy_no_better_than_untrained_questions_the_normalisation() -> None:
    def rows(own, fresh):
        return [row("performance", accuracy=scalar(own)), row("performance", network="fresh", accuracy=scalar(fresh))]

    assert "--mean" in findings(rows(0.11, 0.1))[0]
    assert not any("--mean" in sentence for sentence in findings(rows(0.9, 0.1)))


def test_the_limits_are_always_said() -> None:
    assert "One checkpoint shows a state" in findings([row(rank=scalar(1))])[-2]
    assert "--fresh" in findings([row(rank=scalar(1))])[-1]
    assert "not what caused it" in findings([row(step=s, rank=scalar(1)) for s in (0, 1)])[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "–"),
        (3.0, "3"),
        (0.0, "0"),
        (1234567.0, "1.235e+06"),
        (0.123456, "0.1235"),
        (math.inf, "inf"),
        (-2.0, "-2"),
    ],
)
def test_numbers_are_printed_short(value, text) -> None:
    assert number(value) == text
