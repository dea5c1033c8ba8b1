import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_probe.errors import RunError, UsageError
from plasticity_probe.training.outcomes import NUMBERS, Outcome, as_json, in_order, outcome_of, read_outcomes

ONE = Outcome(3, 2, "task", "run", "ok", 60, 20, 4, 0.5, 0.75, 1.5, 0.25, 2.0, 10.0, 0.625, 0.875)
COUNTS = st.integers(0, 10**9)
OUTCOMES = st.builds(
    Outcome,
    seed=COUNTS, task=COUNTS, name=st.text(max_size=9), network=st.sampled_from(["run", "control"]),
    status=st.sampled_from(["ok", "diverged"]), step=COUNTS, updates=COUNTS, epochs=COUNTS,
    **{name: st.floats() for name in NUMBERS},
)  # fmt: skip


def known(outcome: Outcome) -> dict[str, Any]:
    """An outcome in which all that is not finite is one and the same text."""
    return {k: "unknown" if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(outcome).items()}


def written(folder: Path, *lines: str) -> Path:
    path = folder / "outcomes.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@given(OUTCOMES)
def test_an_outcome_is_strict_json_and_back_with_unknown_numbers_nan(outcome: Outcome) -> None:
    found = outcome_of(json.loads(json.dumps(as_json(outcome), allow_nan=False)))
    assert known(found) == known(outcome)
    assert all(math.isnan(v) for v in vars(found).values() if isinstance(v, float) and not math.isfinite(v))


def test_all_numbers_and_nothing_else_may_be_unknown() -> None:
    assert set(NUMBERS) == {
        "loss", "accuracy", "online_loss", "online_accuracy", "first_epoch_loss", "updates_to_threshold", "test_loss",
        "test_accuracy",
    }  # fmt: skip
    for key, value in as_json(ONE).items():
        entry = {**as_json(ONE), key: None}
        if key in NUMBERS:
            assert math.isnan(getattr(outcome_of(entry), key))
        else:
            with pytest.raises(UsageError, match=f"{key} should be"):
                outcome_of(entry)
        assert value is not None


@pytest.mark.parametrize(("number", "stored"), [(math.inf, None), (-math.inf, None), (math.nan, None), (0.0, 0.0)])
def test_numbers_that_are_not_finite_are_stored_as_null(number: float, stored: float | None) -> None:
    assert as_json(replace(ONE, loss=number))["loss"] == stored


def test_outcomes_are_read_in_order_of_seed_task_and_network(tmp_path: Path) -> None:
    places = [(seed, task, network) for seed in (0, 2, 10) for task in (0, 1, 11) for network in ("run", "control")]
    outcomes = [replace(ONE, seed=seed, task=task, network=network) for seed, task, network in places]  # type: ignore[arg-type]
    shuffled = outcomes[::2][::-1] + outcomes[1::2]
    assert shuffled != outcomes
    assert in_order(shuffled) == tuple(outcomes)
    path = written(tmp_path, *(json.dumps(as_json(outcome)) for outcome in shuffled))
    assert read_outcomes(path) == read_outcomes(tmp_path) == read_outcomes(str(tmp_path)) == tuple(outcomes)
    written(tmp_path)
    assert read_outcomes(tmp_path) == ()


def test_names_with_any_character_stay_on_their_line(tmp_path: Path) -> None:
    outcomes = tuple(
        replace(ONE, seed=n, name=f"a{c}b") for n, c in enumerate("\n\r\x0b\x1c\x85\u2028\u2029é\U0001f600")
    )
    written(tmp_path, *(json.dumps(as_json(outcome)) for outcome in outcomes))
    assert read_outcomes(tmp_path) == outcomes


GOOD = as_json(ONE)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        json.dumps(GOOD)[:-9],
        "null",
        "5",
        "[]",
        "[[1, 2]]",
        "{}",
        json.dumps({**GOOD, "more": 1}),
        json.dumps({key: value for key, value in GOOD.items() if key != "loss"}),
        json.dumps({**GOOD, "seed": "0"}),
        json.dumps({**GOOD, "seed": 0.5}),
        json.dumps({**GOOD, "seed": True}),
        json.dumps({**GOOD, "task": None}),
        json.dumps({**GOOD, "loss": "0.5"}),
        json.dumps({**GOOD, "loss": [0.5]}),
        json.dumps({**GOOD, "network": "fresh"}),
        json.dumps({**GOOD, "network": ["run"]}),
        json.dumps({**GOOD, "status": "fine"}),
        json.dumps({**GOOD, "name": 3}),
    ],
)
def test_a_damaged_line_is_refused_with_the_file_and_the_remedy(line: str, tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(GOOD), line, json.dumps(GOOD))
    for place in (path, tmp_path):
        with pytest.raises(RunError) as caught:
            read_outcomes(place)
        assert str(caught.value).startswith(f"{path} is no file of outcomes: ")
        assert "name the folder of a run" in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outcomes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="is no file of outcomes"):
        read_outcomes(tmp_path)


def test_a_folder_without_outcomes_is_named(tmp_path: Path) -> None:
    for place, missing in ((tmp_path, tmp_path / "outcomes.jsonl"), (tmp_path / "no", tmp_path / "no")):
        with pytest.raises(RunError) as caught:
            read_outcomes(place)
        assert (
            str(caught.value)
            == f"the outcomes {missing} cannot be read: No such file or directory; name the folder of a run"
        )


@pytest.mark.parametrize("module", ["outcomes", "summary"])
def test_outcomes_are_read_and_summarised_without_torch(module: str, tmp_path: Path) -> None:
    written(tmp_path, json.dumps(GOOD))
    code = (
        f"import sys, plasticity_probe.training.{module}\n"
        "from plasticity_probe.training.outcomes import read_outcomes\n"
        "read_outcomes(sys.argv[1])\n"
        "print(sorted({'torch', 'h5py', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
