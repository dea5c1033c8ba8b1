import itertools
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text
from report_traces import array, number, quadrature, row, tree, typical

from plasticity_probe.errors import RunError, TraceError, UsageError
from plasticity_probe.report import draw as module
from plasticity_probe.report.canvas import HUES, style
from plasticity_probe.report.courses import CourseFigure, course_grid, courses
from plasticity_probe.report.draw import draw, draw_courses, draw_run, draw_trace
from plasticity_probe.report.figures import figures
from plasticity_probe.report.panels import LOG, Curve, Dots, Figure, HeatMap, Level, Lines, Points, Scale
from plasticity_probe.report.wording import file_names
from plasticity_probe.trace.tree import rows_of
from plasticity_probe.trace.writer import open_for_append
from plasticity_probe.training.outcomes import Outcome, as_json

HOSTILE = "[/b]<script>$x$\x1b[31m \\frac{ $$ \ud800 \u202e 漢字 \U0001f600"
LONG = "$" + "x" * 10_000


def drawn(figure: Figure, folder: Path) -> np.ndarray:
    """The picture as an array, after a look at both files."""
    png, pdf = draw(figure, folder / "figure")
    assert (png.name, pdf.name) == ("figure.png", "figure.pdf")
    assert pdf.read_bytes().startswith(b"%PDF")
    picture = imread(png)[..., :3]
    assert 0.005 < (picture < 0.9).mean() < 0.9
    return picture


def simple(text: str = "text") -> Figure:
    x = np.arange(3.0)
    curve = Curve(text, "checkpoint", x, x, x - 1, x + 1, x > 1)
    lines = Lines(text, text, text, (curve,), Level(text, 1.0, 0.5, 1.5))
    return Figure(text, text, (lines,), text)


def store(path: Path, *rows) -> Path:
    with open_for_append(path) as trace:
        for entry in rows:
            trace.append(entry)
    return path


def test_every_figure_of_a_series_is_drawn_twice(tmp_path: Path) -> None:
    rows = rows_of(typical([("run", 100 * n, -1) for n in range(4)], fresh=2))
    path = store(tmp_path / "run.h5", *(entry for entry in rows if entry.probe == "dead_units"))
    paths = draw_trace(path)
    assert {p.parent for p in paths} == {tmp_path / "run-figures"}
    names = ("dead-units-series", "dead-units-layer")
    assert [p.name for p in paths if p.suffix == ".png"] == [f"{name}.png" for name in names]
    assert all(p.with_suffix(".pdf") in paths for p in paths)
    for p in paths:
        if p.suffix == ".png":
            assert (imread(p)[..., :3] < 0.9).mean() > 0.005


def test_one_checkpoint_is_drawn_into_a_folder_of_ones_own(tmp_path: Path) -> None:
    path = store(tmp_path / "run.h5", row("p", {"a": number(2)}), row("p", {"a": number(1)}, fresh=0))
    assert [p.name for p in draw_trace(path, tmp_path / "a" / "b")] == [
        "checkpoint-and-fresh.png",
        "checkpoint-and-fresh.pdf",
    ]
    assert (tmp_path / "a" / "b" / "checkpoint-and-fresh.pdf").exists()


def test_a_trace_without_numbers_makes_no_folder(tmp_path: Path) -> None:
    path = store(tmp_path / "run.h5", row("p", {"a": number(np.nan)}), row("p", {"a": number(np.inf)}, step=1))
    assert draw_trace(path) == []
    assert not (tmp_path / "run-figures").exists()


def test_the_same_figure_gives_the_same_bytes_at_200_dots_per_inch(tmp_path: Path) -> None:
    one, two = (draw(simple(), tmp_path / name) for name in ("one", "two.png"))
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert not re.search(rb"/(CreationDate|Producer)", one[1].read_bytes())
    assert b"Software" not in one[0].read_bytes()
    assert imread(one[0]).shape[1] == 1080


def test_global_settings_are_left_alone_and_do_not_matter(tmp_path: Path) -> None:
    plain = draw(simple(), tmp_path / "plain")[0].read_bytes()
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "text.usetex": True, "savefig.dpi": 17}):
        before = dict(mpl.rcParams)
        assert draw(simple(), tmp_path / "other")[0].read_bytes() == plain
        assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("text", [HOSTILE, LONG, "\x00", "a\nb\n" * 100], ids=["hostile", "long", "null", "lines"])
def test_hostile_texts_do_no_harm(text: str, tmp_path: Path) -> None:
    assert drawn(simple(text), tmp_path).shape[0] < 2000


def test_texts_are_no_formulas(tmp_path: Path) -> None:
    shapes = [drawn(simple(text), tmp_path).tobytes() for text in ("$x$", "x")]
    assert shapes[0] != shapes[1]


def test_hostile_names_of_a_trace_do_no_harm(tmp_path: Path) -> None:
    label = "../[/b]<script>$x$"
    values = {
        "a": number(1, HOSTILE[:28], units="$u$"),
        "b": array(("layer",), [1.0, 2.0], LONG[:5000], summary="last"),
    }
    rows = [row("[b]$x$ <i>", values, run=LONG, step=n, labels={"layer": (HOSTILE, LONG)}) for n in range(2)]
    found = figures(tree(*rows))
    assert len(found) == 2
    for name, figure in zip(file_names(figure.name for figure in found), found, strict=True):
        assert re.fullmatch("[a-z0-9-]+", name)
        drawn(figure, tmp_path)
    assert file_names([label]) == ["b-script-x"]


EDGES = {
    "one point": Lines(
        "t", "x", "y", (Curve("c", "mean", np.array([1.0]), np.array([2.0]), np.array([1.0]), np.array([3.0])),)
    ),
    "constant": Lines("t", "x", "y", (Curve("c", "run", np.arange(3.0), np.full(3, 1e-9)),)),
    "gaps": Lines(
        "t", "x", "y", (Curve("c", "checkpoint", np.arange(4.0), np.array([1, np.nan, 2, np.nan])),), None, LOG
    ),
    "nothing": Lines("t", "x", "y", (Curve("c", "checkpoint", np.arange(2.0), np.full(2, np.nan)),), None, LOG),
    "symlog": Lines(
        "t",
        "x",
        "y",
        (Curve("c", "checkpoint", np.arange(3.0), np.array([-1e9, 0, 1e9])),),
        None,
        Scale("symlog", 1e-3),
    ),
    "huge": Lines("t", "x", "y", (Curve("c", "checkpoint", np.arange(2.0), np.array([-1e140, 1e140])),)),
    "empty heat map": HeatMap("t", "x", ("0",), ("l",), np.array([[np.nan]]), np.array([np.nan]), "v"),
    "symlog heat map": HeatMap("t", "x", ("0", "1"), ("l",), np.array([[0.0, 1e9]]), None, "v", Scale("symlog", 1.0)),
    "signed symlog heat map": HeatMap(
        "t", "x", ("0", "1"), ("l",), np.array([[-1e9, 1e9]]), None, "v", Scale("symlog", 1.0)
    ),
    "log heat map": HeatMap("t", "x", ("0", "1"), ("l",), np.array([[1e-9, 1e9]]), np.array([1.0]), "v", LOG),
    "many columns": HeatMap("t", "x", tuple(map(str, range(2000))), ("l", "m"), np.ones((2, 2000)), None, "v"),
    "no ratio": Dots("", "x", ("l",), (Points("p", "fresh", np.array([np.nan])),), LOG, ("g",), ("1 : 0",), 1.0),
    "symlog dots": Dots("", "x", ("l", "m"), (Points("p", "fresh", np.array([-1e9, 1e9])),), Scale("symlog", 1.0)),
}


@pytest.mark.parametrize("kind", [Lines, HeatMap, Dots])
def test_edge_cases_are_drawn(kind: type, tmp_path: Path) -> None:
    panels = tuple(panel for panel in EDGES.values() if isinstance(panel, kind))
    drawn(Figure("f", "title", panels, "caption"), tmp_path)


def test_a_gap_is_drawn_otherwise_than_a_zero(tmp_path: Path) -> None:
    def picture(value: float) -> bytes:
        curve = Curve("c", "checkpoint", np.arange(3.0), np.array([0.0, value, 2.0]))
        return drawn(Figure("f", "t", (Lines("t", "x", "y", (curve,)),), ""), tmp_path).tobytes()

    assert picture(np.nan) != picture(0.0)


def test_extreme_numbers_of_a_trace_are_drawn(tmp_path: Path) -> None:
    values = [1e-320, 1e308, np.inf, np.nan, -1e200, 0.0, 1e-200]
    rng = np.random.default_rng(0)
    rows = [
        row(
            "p",
            {"a": number(v), "b": array(("layer",), [v, -v, 1.0], summary="mean"), **quadrature(rng)},
            step=n,
            labels={"layer": tuple("xyz")},
        )
        for n, v in enumerate(values)
    ]
    for figure in figures(tree(*rows, row("p", {"a": number(1e300)}, fresh=0))):
        drawn(figure, tmp_path)


def test_a_figure_that_cannot_be_written_is_a_trace_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="expected to write"):
        draw(simple(), tmp_path / "missing" / "figure")
    path = store(tmp_path / "run.h5", row("p", {"a": number(2)}), row("p", {"a": number(1)}, fresh=0))
    with pytest.raises(TraceError, match="expected to make the folder"):
        draw_trace(path, path / "inside")


def test_a_figure_without_panels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one panel"):
        draw(Figure("f", "t", (), ""), tmp_path / "figure")


def trained(tasks: int = 3, end: float = 0.2, every: int = 1, seeds: int = 2, loss: bool = False) -> list[Outcome]:
    """Accuracies that fall to `end`, with controls on every so many-th task and on the last one."""
    found: list[Outcome] = []
    for seed, task in itertools.product(range(seeds), range(tasks)):
        value = 0.9 + (end - 0.9) * task / max(tasks - 1, 1) + 0.03 * seed
        for network, score in (("run", value), ("control", 0.9 - 0.02 * seed)):
            if network == "run" or (task and (task % every == 0 or task == tasks - 1)):
                kind, accuracy = ("run", "control")[network == "control"], np.nan if loss else score
                found.append(Outcome(seed, task, "t", kind, "ok", 1, 1, 1, score, accuracy, *[np.nan] * 6))
    return found


TWENTY = courses({f"a remedy of number {n}": trained(12, 0.04 * n, 5) for n in range(20)}, chance=0.1)
COURSES = {
    "twenty": TWENTY,
    "grid": course_grid({f"panel {p}": {f"label {n}": trained(8, 0.1 * n) for n in range(8)} for p in range(5)}),
    "two tasks": courses({f"remedy {n}": trained(2, 0.1 * n) for n in range(6)}),
    "one task and seed": courses({"a": trained(1, seeds=1)}),
    "long": courses({"a": trained(100, every=30), "b": trained(100, 0.5, every=999)}, chance=0.1),
    "losses": courses({"a": trained(5, 1e-4, loss=True), "b": trained(5, 10, loss=True)}),
    "long labels": courses({"x" * 90: trained(), "y" * 200: trained()}),
}


@pytest.mark.parametrize("name", COURSES)
def test_no_text_of_courses_covers_another_or_leaves_the_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_texts: dict[Text, None] = {}
    original = Text.draw

    def draw_and_note(text: Text, *given: Any, **named: Any) -> None:
        drawn_texts[text] = None
        original(text, *given, **named)

    monkeypatch.setattr(Text, "draw", draw_and_note)  # an axis also has labels that are never drawn
    with style():
        canvas = module._courses_laid_out(COURSES[name])
        canvas.draw_without_rendering()
        found = {text: text.get_window_extent() for text in drawn_texts if text.get_visible()}
    boxes = {text: box for text, box in found.items() if text.get_text().strip()}
    assert len(boxes) > 8
    for box in boxes.values():
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= canvas.bbox.x1
        assert box.y1 <= canvas.bbox.y1
    for (one, first), (two, second) in itertools.combinations(boxes.items(), 2):
        both = min(first.x1, second.x1) - max(first.x0, second.x0), min(first.y1, second.y1) - max(first.y0, second.y0)
        # Boxes hold the room for letters that reach below the line, so lines of a list may touch.
        assert min(both) < 2, (one.get_text(), two.get_text())


def looks(figure: CourseFigure) -> list[tuple[str, str, str]]:
    """Colour, marker and stroke of each line with a marker."""
    lines = module._course_handles(figure).values()
    return [(mpl.colors.to_hex(line.get_color()), str(line.get_marker()), str(line.get_linestyle())) for line in lines]


def test_twenty_courses_look_different_and_none_like_the_chance_level() -> None:
    found = looks(TWENTY)
    assert len(found) == len(set(found)) == 22
    # Colours alone would not do: there are fewer of them than courses.
    assert len({colour for colour, _, _ in found[:20]}) == 7
    assert found[21][0] not in {colour for colour, _, _ in found[:20]}


def test_a_control_has_the_colour_of_its_run_and_is_dashed_and_hollow(tmp_path: Path) -> None:
    with style():
        canvas = module._courses_laid_out(courses({"a": trained(4), "b": trained(4, 0.5)}))
    lines = canvas.axes[0].lines
    dashed = [line for line in lines if line.get_linestyle() == "--"]
    solid = [line for line in lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 4]
    assert [mpl.colors.to_hex(line.get_color()) for line in dashed] == [mpl.colors.to_hex(h) for h in HUES[:2]]
    assert [line.get_color() for line in dashed] == [line.get_color() for line in solid]
    marks = [line for line in lines if line.get_linestyle() == "None"]
    assert [line.get_markerfacecolor() == "white" for line in marks] == [True, False, True, False]
    np.testing.assert_allclose(np.asarray(dashed[0].get_ydata(), float), [0.89] * 3)
    np.testing.assert_allclose(np.asarray(solid[1].get_ydata(), float), np.linspace(0.915, 0.515, 4))


@pytest.mark.parametrize("text", [HOSTILE, LONG, "\x00", "a\nb\n" * 100], ids=["hostile", "long", "null", "lines"])
def test_hostile_labels_of_courses_do_no_harm(text: str, tmp_path: Path) -> None:
    png, pdf = draw_courses(course_grid({text: {text: trained()}}, title=text), tmp_path / "a.png")
    assert imread(png).shape[0] < 2000
    assert pdf.read_bytes().startswith(b"%PDF")


def test_courses_without_a_panel_are_refused(tmp_path: Path) -> None:
    empty = CourseFigure("f", "t", "x", "y", "u", (), "", None, LOG, (1, 2), (0, 1), True)
    with pytest.raises(UsageError, match="at least one panel"):
        draw_courses(empty, tmp_path / "a")


def test_the_figures_of_a_run_folder_lie_in_it_and_are_the_same_each_time(tmp_path: Path) -> None:
    manifest = {
        "protocol": "p",
        "setting": {"remedies": [], "stream": {"name": "random-labels"}},
        "architecture": {"widths": [1, 10]},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    lines = "".join(json.dumps(as_json(one)) + "\n" for one in trained())
    (tmp_path / "outcomes.jsonl").write_text(lines)
    paths = draw_run(tmp_path)
    assert paths == [tmp_path / "figures" / f"course-accuracy.{kind}" for kind in ("png", "pdf")]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in draw_run(tmp_path)] == before
    assert 0.005 < (imread(paths[0])[..., :3] < 0.9).mean() < 0.9
    (tmp_path / "outcomes.jsonl").write_text("")
    assert draw_run(tmp_path) == []


def test_a_run_folder_whose_figures_have_no_place_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        draw_run(tmp_path)
    test_the_figures_of_a_run_folder_lie_in_it_and_are_the_same_each_time(tmp_path)
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(as_json(one)) + "\n" for one in trained()))
    for path in (tmp_path / "figures").iterdir():
        path.unlink()
    (tmp_path / "figures").rmdir()
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(RunError, match="expected to make the folder"):
        draw_run(tmp_path)
