import numpy as np
from report_traces import array, number, row, tree

from plasticity_probe.report.quantities import groups, headline_quantities, labelled_quantities


def test_uncertainties_go_to_what_they_belong_to() -> None:
    variables = {
        "matrix_trace": number(10, "sum of all eigenvalues", units="loss"),
        "matrix_trace_sem": number(2, "its standard error", units="loss"),
        "rank": number(5),
        "rank_lower": number(4, shown="False"),
        "rank_upper": number(7, shown="False"),
        "alone_sem": number(1),
        "ceiling": number(512, role="context"),
        "hidden": number(1, shown="False"),
        "spread": number(1, role="uncertainty"),
    }
    (group,) = groups(tree(row("p", variables)))
    found = {quantity.name: quantity for quantity in headline_quantities(group)}
    assert [*found] == ["matrix_trace", "rank", "alone_sem"]
    trace, rank = found["matrix_trace"], found["rank"]
    assert trace.lower is not None
    assert trace.upper is not None
    np.testing.assert_allclose([trace.lower[0], trace.upper[0]], [10 - 3.919928, 10 + 3.919928], rtol=1e-6)
    assert rank.lower is not None
    assert rank.upper is not None
    assert (rank.lower[0], rank.upper[0]) == (4, 7)
    assert trace.axis == "matrix_trace [loss]"
    assert rank.axis == "rank"


def test_only_one_end_is_no_interval() -> None:
    (group,) = groups(tree(row("p", {"rank": number(5), "rank_lower": number(4)})))
    assert [(q.name, q.lower) for q in headline_quantities(group)] == [("rank", None), ("rank_lower", None)]


def test_arrays_show_their_summary_and_rows_keep_their_own_order() -> None:
    def made(names: tuple[str, ...], values: list[float], step: int):
        variables = {
            "rank": array(("layer",), values, "rank", summary="last"),
            "dead": array(("layer",), values, "dead", summary="mean"),
            "quiet": array(("layer",), values, "not in tables"),
        }
        return row("p", variables, step=step, labels={"layer": names})

    (group,) = groups(tree(made(("a", "b"), [1, 2], 0), made(("c", "a"), [5, 7], 1)))
    rank, dead = headline_quantities(group)
    np.testing.assert_array_equal(rank.values, [2, 7])
    np.testing.assert_array_equal(dead.values, [1.5, 6])
    assert rank.meaning == "rank (last)"
    assert dead.meaning == "dead (mean over layers)"
    labelled = labelled_quantities(group)
    assert [q.name for q in labelled] == ["rank", "dead", "quiet"]
    assert labelled[0].labels == ("a", "b", "c")
    np.testing.assert_array_equal(labelled[0].values, [[1, 2, np.nan], [7, np.nan, 5]])


def test_the_first_of_an_unnamed_dimension_needs_no_words() -> None:
    (group,) = groups(tree(row("p", {"top": array(("pair",), [3, 2], "largest eigenvalue", summary="first")})))
    (top,) = headline_quantities(group)
    assert (top.meaning, top.values[0]) == ("largest eigenvalue", 3)
    assert labelled_quantities(group) == []


def test_unreliable_rows_are_gaps_and_are_counted() -> None:
    statuses = ["ok", "nonfinite", "not_converged", "failed"]
    rows = [row("p", {"a": number(n)}, step=n, status=status) for n, status in enumerate(statuses)]
    (group,) = groups(tree(*rows))
    np.testing.assert_array_equal(headline_quantities(group)[0].values, [0, np.nan, 2, np.nan])
    assert "3 of 4 measurements" in group.problems()
    assert "1 not_converged" in group.problems()


def test_checkpoints_stand_at_tasks_steps_or_in_order() -> None:
    def placed(*places: tuple[int, int]):
        rows = [
            row("p", {"a": number(1)}, step=step, task=task, run=f"{at}" if step < 0 else "r")
            for at, (step, task) in enumerate(places)
        ]
        return groups(tree(*rows))[0].place

    assert placed((10, 0), (20, 1))[0] == "task"
    assert placed((10, 0), (20, 0))[0] == "step"
    assert placed((10, -1), (20, 1))[0] == "step"
    name, at = placed((-1, -1), (-1, -1))
    assert name.startswith("checkpoint")
    np.testing.assert_array_equal(at, [1, 1])


def test_conditions_are_one_sentence() -> None:
    def sentence(*conditions: dict[str, str | int | float]) -> str:
        return groups(tree(*(row("p", {"a": number(1)}, step=n, conditions=c) for n, c in enumerate(conditions))))[
            0
        ].conditions()

    one: dict[str, str | int | float] = {"examples": 512, "mode": "eval", "dtype": "float32", "loss": "cross-entropy"}
    assert sentence(one) == "Measured on 512 examples in eval mode, float32, cross-entropy."
    assert "on 256 or 512 examples" in sentence({**one, "examples": 256}, one)
    assert "on 1 to 512 examples" in sentence({**one, "examples": 256}, {**one, "examples": 1}, one)
    assert "an unknown number of examples in an unknown mode" in sentence({})


def test_rows_of_different_settings_are_announced() -> None:
    rows = [row("p", {"a": number(1)}, step=n, settings=f'{{"k":{n}}}') for n in range(2)]
    assert "2 different settings" in groups(tree(*rows))[0].conditions()


def test_fresh_rows_make_no_series() -> None:
    (group,) = groups(
        tree(row("p", {"a": number(1)}), row("p", {"a": number(2)}, fresh=0), row("p", {"a": number(3)}, fresh=1))
    )
    assert not group.series
    assert group.networks == 2
    assert group.runs == ("run",)


def test_an_infinite_layer_is_not_left_out_of_a_mean() -> None:
    def made(values: list[float], summary: str) -> float:
        (group,) = groups(
            tree(row("p", {"a": array(("layer",), values, summary=summary)}, labels={"layer": ("x", "y", "z")}))
        )
        return headline_quantities(group)[0].values[0]

    assert made([1, 3, np.nan], "mean") == 2
    assert np.isnan(made([1, 3, np.inf], "mean"))
    assert np.isnan(made([1, 3, np.inf], "max"))
    assert made([1, 3, np.inf], "first") == 1
