"""The page says what the verdicts say, whatever the traces hold, and a report that fails leaves an older one as it was."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
from studies import rows_of, telling, trace_of

from plasticity_probe.errors import InputError, ReportError, TraceError
from plasticity_probe.prediction.verdict import LEVEL, SMALLEST
from plasticity_probe.report import document, folder, work
from plasticity_probe.report.document import write_report
from plasticity_probe.report.tables import Table, as_csv

RUNS, TASKS = 6, 5


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are tested elsewhere; here one stands for all, except where a test undoes this."""
    one = work.Drawn(b"\x89PNG", b"%PDF", b"\x89PNG", 10, 10)
    monkeypatch.setattr(document, "drawn", lambda figures, spread: (one for _ in figures))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    y, seeing, drifting = telling(RUNS, TASKS)
    return trace_of(
        tmp_path / "t.h5", rows_of("labels", y, {"fisher.rank": seeing, "norms.weight": drifting}, fresh=0.9)
    )


class Page(HTMLParser):
    """The elements, their attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def urls(self) -> list[str]:
        return [
            str(attrs[name]) for _, attrs in self.tags for name in ("src", "href", "srcset", "action") if name in attrs
        ]


def page(report) -> Page:
    return Page(report.page.read_text(encoding="utf-8"))


def test_page_figures_tables_and_verdicts_agree(trace: Path, tmp_path: Path) -> None:
    report = write_report(trace, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert told["schema"] == "plasticity_probe.verdict/1"
    assert report.ok
    on_disk = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert on_disk == set(report.files) == {*told["files"], "index.html", "verdict.json"}
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "tables" / "verdicts.csv").read_text())))
    flat = {(o, v["predictor"]): v for o, own in told["outcomes"].items() for v in own["verdicts"]}
    assert {(line["outcome"], line["predictor"]): line["verdict"] for line in lines} == {
        k: v["verdict"] for k, v in flat.items()
    }
    for line in lines:
        assert float(line["association"]) == flat[line["outcome"], line["predictor"]]["association"]["value"]
    text = page(report).text
    for v in flat.values():
        assert v["text"] in text
        assert v["verdict"] in text
    assert "6 runs of 1 configuration" in text


def test_the_page_needs_nothing_else(trace: Path, tmp_path: Path) -> None:
    report = write_report(trace, tmp_path / "out")
    found = page(report)
    assert not [tag for tag, _ in found.tags if tag in ("script", "iframe", "link", "object", "embed", "form")]
    for url in found.urls():
        assert url.startswith(("data:image/png;base64,", "#")) or (tmp_path / "out" / url).is_file(), url
    raw = report.page.read_text(encoding="utf-8")
    assert "default-src 'none'" in raw
    assert "prefers-color-scheme: dark" in raw
    assert "http:" not in raw
    assert "https:" not in raw
    targets = {attrs.get("id") for _, attrs in found.tags}
    assert all(url[1:] in targets for url in found.urls() if url.startswith("#"))


def test_rules_come_from_the_statistics(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"within ±{SMALLEST:g}" in page(write_report(trace, tmp_path / "a")).text
    monkeypatch.setattr("plasticity_probe.report.story.LEVEL", 0.123)
    assert "q ≤ 0.123" in page(write_report(trace, tmp_path / "b")).text
    assert LEVEL != 0.123


def test_the_same_trace_gives_the_same_report(trace: Path, tmp_path: Path) -> None:
    one, two = (write_report(trace, tmp_path / name) for name in ("a", "b"))
    assert [(tmp_path / "a" / f).read_bytes() for f in one.files] == [
        (tmp_path / "b" / f).read_bytes() for f in two.files
    ]


def test_figures_are_drawn_and_the_page_holds_them(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "drawn", work.drawn)
    report = write_report(trace, tmp_path / "out")
    pictures = [attrs for tag, attrs in page(report).tags if tag == "img"]
    pngs = [name for name in report.files if name.endswith(".png")]
    assert len(pictures) == len(pngs) == len([name for name in report.files if name.endswith(".pdf")])
    assert {"figures/trainability-forest.png", "figures/trainability-leads.png", "figures/course-accuracy.png"} <= set(
        pngs
    )
    assert all(attrs["alt"] and int(str(attrs["width"])) > 200 for attrs in pictures)


def test_several_traces_are_several_configurations(tmp_path: Path) -> None:
    paths: list[Path] = []
    for at, name in enumerate(("plain", "l2-init")):
        y, seeing, drifting = telling(RUNS, TASKS, seed=at)
        paths.append(
            trace_of(tmp_path / f"{name}.h5", rows_of(name, y, {"fisher.rank": seeing, "norms.weight": drifting}))
        )
    report = write_report(paths, tmp_path / "out")
    assert report.assessment.to_dict()["configurations"] == {"plain": RUNS, "l2-init": RUNS}
    assert "l2-init" in page(report).text


def test_seeds_of_two_traces_are_not_mixed_up(tmp_path: Path) -> None:
    y, seeing, _ = telling(RUNS, TASKS)
    rows = [
        trace_of(tmp_path / f"{at}.h5", [_moved(row, at) for row in rows_of("labels", y - 0.1 * at, {"a.b": seeing})])
        for at in range(2)
    ]
    report = write_report(rows, tmp_path / "out")
    assert report.assessment.to_dict()["runs"] == 2 * RUNS
    assert f"means over {2 * RUNS} seeds" in page(report).text


def _moved(row, at: int):
    return replace(row, run=f"{row.run} of {at}", sha256=f"{row.sha256} {at}")


def test_a_single_run_is_not_judged(tmp_path: Path) -> None:
    y, seeing, _ = telling(1, TASKS)
    report = write_report(trace_of(tmp_path / "t.h5", rows_of("labels", y, {"a.b": seeing})), tmp_path / "out")
    assert not report.ok
    text = page(report).text
    assert "could not be assessed" in text
    assert "No predictor could be assessed." in text
    assert "at least 5 runs of a configuration are needed, there are at most 1" in text
    assert "predicts it" not in text


def test_without_outcomes_the_measurements_are_shown_and_the_remedy_is_said(tmp_path: Path) -> None:
    _, seeing, _ = telling(RUNS, TASKS)
    report = write_report(trace_of(tmp_path / "t.h5", rows_of("labels", None, {"a.b": seeing})), tmp_path / "out")
    text = page(report).text
    assert not report.ok
    assert "no outcome of any task is known" in text
    assert "probe analyze RUN --on next" in text
    assert "figures/a-by-task.png" in report.files


def test_without_measurements_the_outcomes_are_shown(tmp_path: Path) -> None:
    y, _, _ = telling(RUNS, TASKS)
    report = write_report(trace_of(tmp_path / "t.h5", rows_of("labels", y, {})), tmp_path / "out")
    assert not report.ok
    assert "nothing was measured" in page(report).text
    assert "figures/course-accuracy.png" in report.files


def test_a_predictor_that_does_not_vary_gets_no_verdict(tmp_path: Path) -> None:
    y, seeing, _ = telling(RUNS, TASKS)
    rows = rows_of("labels", y, {"a.constant": np.ones_like(y), "b.rank": seeing})
    report = write_report(trace_of(tmp_path / "t.h5", rows), tmp_path / "out")
    (constant, _) = report.assessment.to_dict()["outcomes"]["trainability"]["verdicts"]
    assert constant["verdict"] == "not assessed"
    assert "the predictor does not vary" in page(report).text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_none_and_outcomes_that_never_came(tmp_path: Path, value: float) -> None:
    y, seeing, drifting = telling(RUNS, TASKS)
    broken = seeing.copy()
    broken[0, 1:3] = value
    rows = [
        *rows_of("labels", y, {"a.rank": broken, "c.weight": drifting}),
        *rows_of("labels", None, {"failed.rank": seeing * np.nan}, status="failed"),
    ]
    report = write_report(trace_of(tmp_path / "t.h5", rows), tmp_path / "out")
    verdicts = {v["predictor"]: v for v in report.assessment.to_dict()["outcomes"]["trainability"]["verdicts"]}
    assert verdicts["failed.rank"]["verdict"] == "not assessed"
    text = page(report).text
    assert "30 of 90 measurements did not end well" in text
    assert "30 × failed. something happened" in text
    json.loads((tmp_path / "out" / "verdict.json").read_text(), parse_constant=pytest.fail)


def test_checkpoints_without_tasks_are_shown_as_they_are(tmp_path: Path) -> None:
    _, seeing, _ = telling(2, 3)
    rows = [replace(row, task=-1) for row in rows_of("series", None, {"a.rank": seeing})]
    report = write_report(trace_of(tmp_path / "t.h5", rows), tmp_path / "out")
    assert not report.ok
    assert "figures/a-series.png" in report.files


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected measurements in .*empty\.h5, found none"):
        write_report(trace_of(tmp_path / "empty.h5", []), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outcomes_that_no_run_can_have_are_refused(tmp_path: Path) -> None:
    y, seeing, _ = telling(2, 3)
    rows = rows_of("labels", y, {"a.rank": seeing}, fresh=0.9)
    foreign = [replace(rows[0], variables={"loss": rows[0].variables["loss"]})]
    with pytest.raises(InputError, match=r"as `probe analyze RUN` stores them .*; measure the run folder again"):
        write_report(trace_of(tmp_path / "t.h5", foreign), tmp_path / "out")


def test_runs_that_left_controls_alone_are_not_judged(tmp_path: Path) -> None:
    y, seeing, _ = telling(2, 3)
    rows = rows_of("labels", y, {"a.rank": seeing}, fresh=0.9)
    strangers = [replace(row, run="stranger") for row in rows if row.probe == "outcomes" and row.network == "fresh"]
    assert not write_report(trace_of(tmp_path / "t.h5", strangers), tmp_path / "out").ok


def test_a_newer_schema_version_is_refused_with_the_readers_message(trace: Path, tmp_path: Path) -> None:
    content = bytearray(trace.read_bytes())
    newer = tmp_path / "newer.h5"
    newer.write_bytes(content[: content.rindex(b"\nplasticity_probe trace sha256 ")])
    with h5py.File(newer, "r+") as file:
        file.attrs["schema_version"] = 2
    with pytest.raises(TraceError, match="version"):
        write_report(newer, tmp_path / "out")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    y, seeing, drifting = telling(RUNS, TASKS)
    evil = "<script>alert(1)</script>"
    rows = rows_of(
        f"../../{evil}&amp;\u202e\x1b[31m", y, {f"{evil.replace('/', '')}.rank": seeing, f"{'l' * 190}.norm": drifting},
        meaning='"><img src=x onerror=alert(1)>', layers=("../../etc/passwd", "=HYPERLINK(1)"),
    )  # fmt: skip
    report = write_report(trace_of(tmp_path / "t.h5", rows), tmp_path / "out")
    raw, found = report.page.read_text(encoding="utf-8"), page(report)
    assert "script" not in {tag for tag, _ in found.tags}
    assert not [attrs for _, attrs in found.tags if "onerror" in attrs]
    assert evil in found.text
    assert not re.search("[\u202e\x1b\x00]", raw)
    assert all(
        re.fullmatch(r"(index\.html|verdict\.json|(figures|tables)/[a-z0-9-]+\.(png|pdf|csv))", f) for f in report.files
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "t.h5"]


def test_texts_that_spreadsheets_would_compute_are_made_harmless() -> None:
    content = as_csv(Table("t", ("=1+1", "b"), (("=HYPERLINK(1)", float("nan")), ('@x,\n"', 1), ("ok", -0.5))))
    assert list(csv.reader(io.StringIO(content.decode()))) == [
        ["'=1+1", "b"],
        ["'=HYPERLINK(1)", ""],
        ["'@x, \"", "1"],
        ["ok", "-0.5"],
    ]


def test_an_older_report_is_replaced_and_what_else_lies_there_is_kept(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = write_report(trace, out)
    (out / "notes.txt").write_text("mine")
    (out / "figures" / "mine.png").write_text("mine")
    y, seeing, _ = telling(RUNS, TASKS)
    other = trace_of(tmp_path / "other.h5", rows_of("labels", y, {"other.rank": seeing}))
    second = write_report(other, out)
    stale = set(first.files) - set(second.files)
    assert "figures/fisher-by-task.png" in stale
    assert not [name for name in stale if (out / name).exists()]
    assert (out / "notes.txt").read_text() == (out / "figures" / "mine.png").read_text() == "mine"


def test_a_folder_with_other_things_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ReportError, match=r"found thesis\.tex; name another folder"):
        write_report(tmp_path / "none.h5", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(ReportError, match="found a file"):
        write_report(tmp_path / "none.h5", tmp_path / "out" / "thesis.tex")


def test_an_older_verdict_cannot_name_files_to_remove_elsewhere(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_report(trace, out)
    victim = tmp_path / "victim.csv"
    victim.write_text("mine")
    told = json.loads((out / "verdict.json").read_text())
    told["files"] += ["../victim.csv", str(victim), "tables/../../victim.csv"]
    (out / "verdict.json").write_text(json.dumps(told))
    write_report(trace, out)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("fails_at", [0, 5])
def test_a_report_that_fails_leaves_the_older_one_as_it_was(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    out = tmp_path / "out"
    write_report(trace, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    original, written = folder._write, 0

    def full(path: Path, content: bytes) -> None:
        nonlocal written
        written += 1
        if written > fails_at:
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(folder, "_write", full)
    with pytest.raises(ReportError, match="No space left on device; make room or name another folder"):
        write_report(trace, out, seed=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
