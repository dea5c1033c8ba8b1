import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread
from report_traces import array, number, quadrature, row, tree, typical

from plasticity_probe.errors import TraceError, UsageError
from plasticity_probe.report.draw import draw, draw_trace
from plasticity_probe.report.figures import figures
from plasticity_probe.report.panels import LOG, Curve, Dots, Figure, HeatMap, Level, Lines, Points, Scale
from plasticity_probe.report.wording import file_names
from plasticity_probe.trace.tree import rows_of
from plasticity_probe.trace.writer import open_for_append

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
