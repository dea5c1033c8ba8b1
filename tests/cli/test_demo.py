import re
from pathlib import Path

import pytest

from plasticity_probe.probes.norms import WeightNormsProbe
from plasticity_probe.trace.reader import read_rows


@pytest.fixture
def only_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plasticity_probe.demonstration._measured", lambda: {"weight_norms": WeightNormsProbe()})


@pytest.mark.usefixtures("only_norms")
def test_a_short_demo_trains_measures_draws_and_tells(cli, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    ended = cli("demo", "--out", out, "--tasks", 2, "--quiet")
    assert ended.code == 0
    assert ended.err == ""
    accuracies = [
        float(found) for found in re.findall(r"^ *[01](?:, fresh network)? +([\d.]+)%", ended.out, re.MULTILINE)
    ]
    assert len(accuracies) == 3
    assert min(accuracies) > 60
    assert "L2 norm of all weights" in ended.out
    assert "no loss of trainability" in ended.out
    assert str(out / "trace.h5") in ended.out
    assert {row.step for row in read_rows(out / "trace.h5")} == {0, 400, 800}
    assert list(out.rglob("*.png"))

    again = cli("demo", "--out", out, "--tasks", 2, "--quiet")
    assert again == ended


@pytest.mark.usefixtures("only_norms")
def test_a_folder_with_other_files_is_refused(cli, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ended = cli("demo", "--out", tmp_path, "--tasks", 2)
    assert ended.code == 2
    assert "no folder of a demonstration" in ended.err
    assert ended.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_the_full_demo_loses_its_trainability_and_says_with_what(cli, tmp_path: Path) -> None:
    ended = cli("demo", "--out", tmp_path / "demo", "--quiet")
    assert ended.code == 0
    said = re.sub(r"\s+", " ", ended.out)
    first, last = map(int, re.search(r"fell: (\d+)% on the first, (\d+)% on task number 15", said).groups())
    fresh = int(re.search(r"same last task reached (\d+)%", said)[1])
    assert first > 70
    assert last < 25
    assert fresh > 70
    assert "a loss of trainability" in said
    for probe in (
        "hessian_spectrum", "fisher_rank", "feature_rank", "dead_units", "weight_norms", "gradient_norms", "readiness",
    ):  # fmt: skip
        assert re.search(rf"• {probe}: .*?: [+-]\d\.\d\d", said)
    assert "Correlation is not prediction" in said
