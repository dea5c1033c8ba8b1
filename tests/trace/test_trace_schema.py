import re
from pathlib import Path

import pytest
from trace_rows import failed, row

from plasticity_probe.trace.guard import MARK
from plasticity_probe.trace.layout import ATTRIBUTES, COLUMNS, LENGTH_OF, POSITION_OF, SCHEMA, SCHEMA_VERSION
from plasticity_probe.trace.writer import open_for_append

PAGE = (Path(__file__).parents[2] / "docs" / "trace-schema.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (0, "largest eigenvalues in loss\n{0: 3.0, 1: 3.0, 2: 3.0}\n"),
        (1, "[ 0.  1.  2. nan]\n{'k': 3, 'loss': 'cross-entropy'}\n{'seed': 0}\n"),
        (2, "['spectrum'] [0 2 1 3]\n"),
    ],
)
def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], block: int, said: str
) -> None:
    rows = [row(0), row(2), row(1)] if block != 1 else [row(0), row(1), row(2)]
    with open_for_append(tmp_path / "run.h5", provenance={"seed": 0}) as trace:
        for one in (*rows, failed(3)):
            trace.append(one)
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[block], {})
    assert capsys.readouterr().out == said


def test_the_page_names_what_the_file_holds() -> None:
    assert len(BLOCKS) == 3
    columns = re.findall(r"^\| `(\w+)` \| (text|int|float)", PAGE, re.MULTILINE)
    assert columns == [(name, column.kind) for name, column in COLUMNS.items()]
    assert re.findall(r"^\| `(\w+)` \|", PAGE.split("### Quantities")[1], re.MULTILINE) == list(ATTRIBUTES)
    assert f"Schema version: **{SCHEMA_VERSION}**" in PAGE
    for word in (SCHEMA, LENGTH_OF, POSITION_OF, MARK.decode().strip()):
        assert word in PAGE
