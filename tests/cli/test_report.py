import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from studies import rows_of, telling, trace_of

from plasticity_probe.report import document
from plasticity_probe.report.work import Drawn


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Drawn(b"\x89PNG", b"%PDF", b"\x89PNG", 10, 10)
    monkeypatch.setattr(document, "drawn", lambda figures, spread: (one for _ in figures))
    monkeypatch.setattr("plasticity_probe.report.work.processors", lambda: 1)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    y, seeing, drifting = telling(12, 8)
    return trace_of(tmp_path / "t.h5", rows_of("labels", y, {"fisher.rank": seeing, "norms.weight": drifting}))


def test_it_prints_verdicts_and_paths(cli, trace: Path, tmp_path: Path) -> None:
    ended = cli("report", trace, "--out", tmp_path / "out", "--quiet")
    assert ended.code == 0
    assert ended.err == ""
    line = next(line for line in ended.out.splitlines() if "fisher.rank" in line)
    assert "predicts" in line
    assert "[" in line
    assert "% [" in line
    assert str(tmp_path / "out" / "index.html") in ended.out
    assert (tmp_path / "out" / "index.html").is_file()


def test_json_is_one_versioned_object_with_paths(cli, trace: Path, tmp_path: Path) -> None:
    ended = cli("report", trace, "-o", tmp_path / "out", "--json", "--quiet", "--seed", 3)
    told = json.loads(ended.out)
    assert told["schema"] == "plasticity_probe.verdict/1"
    assert told["rules"]["seed"] == 3
    assert told["paths"]["page"] == str(tmp_path / "out" / "index.html")
    assert "tables/verdicts.csv" in told["paths"]["files"]
    assert told["outcomes"]["trainability"]["verdicts"][0]["verdict"] == "predicts"


def test_the_page_may_come_alone_and_then_links_to_nothing_that_is_not_there(cli, trace: Path, tmp_path: Path) -> None:
    assert cli("report", trace, "-o", tmp_path / "out", "--quiet", "--page-only").code == 0
    assert sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file()) == [
        "index.html",
        "verdict.json",
    ]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "figures/" not in page
    assert ".csv" not in page
    assert 'href="verdict.json"' in page


def test_layers_are_judged_where_asked_for(cli, trace: Path, tmp_path: Path) -> None:
    names = []
    for extra in ([], ["--layers"]):
        ended = cli("report", trace, "-o", tmp_path / "out", "--json", "--quiet", *extra)
        names.append([v["predictor"] for v in json.loads(ended.out)["outcomes"]["trainability"]["verdicts"]])
    assert set(names[0]) == {"fisher.rank", "norms.weight"}
    assert {"fisher.by_layer[fc1]", "norms.by_layer[fc2]"} <= set(names[1])


def test_the_default_folder_is_called_report(cli, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("report", trace, "--quiet").code == 0
    assert (tmp_path / "report" / "index.html").is_file()


def test_nothing_to_judge_is_exit_code_three_and_a_page(cli, tmp_path: Path) -> None:
    y, seeing, _ = telling(1, 5)
    ended = cli(
        "report", trace_of(tmp_path / "t.h5", rows_of("labels", y, {"a.b": seeing})), "-o", tmp_path / "out", "--quiet"
    )
    assert ended.code == 3
    assert "at least 5 runs of a configuration are needed" in ended.out
    assert (tmp_path / "out" / "index.html").is_file()
    _, seeing, _ = telling(6, 5)
    ended = cli(
        "report",
        trace_of(tmp_path / "n.h5", rows_of("labels", None, {"a.b": seeing})),
        "-o",
        tmp_path / "out",
        "--quiet",
    )
    assert ended.code == 3
    assert "no outcome of any task is known" in ended.out


def test_what_cannot_be_read_or_written_has_its_exit_code(cli, trace: Path, tmp_path: Path) -> None:
    assert cli("report", tmp_path / "none.h5", "-o", tmp_path / "a", "--quiet").code == 5
    empty = cli("report", trace_of(tmp_path / "empty.h5", []), "-o", tmp_path / "a", "--quiet")
    assert (empty.code, "expected measurements" in empty.err) == (4, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    refused = cli("report", trace, "-o", tmp_path / "full", "--quiet")
    assert (refused.code, "found mine.txt" in refused.err) == (5, True)
    (tmp_path / "foreign.h5").write_bytes(b"no trace")
    foreign = cli("report", tmp_path / "foreign.h5", "-o", tmp_path / "a", "--quiet")
    assert (foreign.code, "Traceback" in foreign.err) == (5, False)
    assert cli("report").code == 2
    assert not (tmp_path / "a").exists()


def test_hostile_names_reach_neither_terminal_nor_paths(cli, tmp_path: Path) -> None:
    y, seeing, _ = telling(6, 5)
    rows = rows_of("../[bold]x[/bold]\x1b]0;evil\x07", y, {"[red]probe.rank": seeing}, meaning="\x1b[2J")
    ended = cli("report", trace_of(tmp_path / "t.h5", rows), "-o", tmp_path / "out", "--quiet")
    assert "\x1b" not in ended.out
    assert "[red]probe.rank" in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "t.h5"]
    names = {
        line["configuration"]
        for line in csv.DictReader(io.StringIO((tmp_path / "out" / "tables" / "places.csv").read_text()))
    }
    assert names == {"../[bold]x[/bold]]0;evil"}


@pytest.mark.slow
def test_a_command_of_its_own_shares_the_work_and_gives_the_same_verdicts(tmp_path: Path) -> None:
    y, seeing, drifting = telling(6, 5)
    many = {f"p{at}.value": seeing + at * drifting for at in range(14)}
    trace = trace_of(tmp_path / "t.h5", rows_of("labels", y, many, fresh=0.9))
    done = subprocess.run(
        [sys.executable, "-m", "plasticity_probe", "report", str(trace), "-o", str(tmp_path / "a"), "--quiet", "--json"],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    alone = document.write_report(trace, tmp_path / "b").assessment.to_dict()
    told = json.loads(done.stdout)
    told.pop("paths")
    assert told == json.loads(json.dumps(alone))
    assert np.isfinite(told["outcomes"]["trainability"]["verdicts"][0]["association"]["value"])
