"""What the documents say is true: code runs, links lead somewhere, every quantity is explained."""

import doctest
import re
from pathlib import Path

import pytest

from plasticity_probe import registry
from plasticity_probe.measurement import schema
from plasticity_probe.registry import PROBES
from plasticity_probe.training.remedies import REMEDIES
from plasticity_probe.training.streams import STREAMS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_the_readme_is_a_doctest_of_about_fifteen_lines() -> None:
    text = (ROOT / "README.md").read_text()
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 12
    assert result.failed == 0
    assert text.count(">>>") <= 16


def test_the_readme_holds_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -e . -c constraints.txt && probe demo" in lines
    assert 'pip install -e ".[test]" -c constraints.txt && pytest' in lines


@pytest.mark.parametrize("page", ["getting-started.md", "curvature.md", "adding-a-probe.md", "training.md"])
def test_python_blocks_run_one_after_the_other(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    assert blocks
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", sorted(registry.registered(PROBES)))
def test_every_quantity_of_every_probe_is_in_the_glossary(name: str) -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "glossary.md").read_text(), flags=re.M)
    own = next(section for section in sections if section.startswith(name))
    words = set(re.findall(r"`(\w+)`", own))
    missing = [
        field.name
        for field in schema(registry.load(PROBES, name).returns)
        if field.kind == "number" and field.name not in words
    ]
    assert not missing


def test_every_document_is_reached_from_the_readme_or_the_index() -> None:
    linked = "".join(page.read_text() for page in (ROOT / "README.md", ROOT / "docs" / "index.md"))
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in linked or page.name == "index.md", page.name


def test_the_page_on_training_names_every_stream_and_remedy() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in (*STREAMS, *REMEDIES) if name not in text] == []
