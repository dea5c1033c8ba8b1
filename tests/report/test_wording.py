import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_probe.report.wording import file_names, plain, power_of_ten, shortened, told_apart

HOSTILE = "[/b]<script>$x$\x1b[31m\x00\n../../etc\u202e\ud800"


@given(st.text())
def test_plain_text_is_one_line_without_control_characters(text: str) -> None:
    found = plain(text)
    assert not [c for c in found if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Co")]
    assert found == found.strip()


def test_plain_text_keeps_what_can_be_seen() -> None:
    assert plain(HOSTILE) == "[/b]<script>$x$[31m ../../etc"
    assert plain("größe  λ\t1") == "größe λ 1"


@given(st.text(max_size=300), st.integers(2, 50))
def test_shortened_text_fits(text: str, limit: int) -> None:
    assert len(shortened(text, limit)) <= limit


def test_the_middle_makes_room() -> None:
    assert shortened("abcdefghij", 7) == "abc…hij"
    assert shortened("abcdefg", 7) == "abcdefg"


def test_layers_that_differ_in_the_middle_stay_different() -> None:
    names = [f"module.encoder.blocks.{i}.attention.output_projection.weight" for i in range(20)]
    assert len({shortened(name, 40) for name in names}) < 20
    short = told_apart(names, 40)
    assert len(set(short)) == 20
    assert max(map(len, short)) <= 40
    assert short[3] == "…3…"


def test_short_names_stay_as_they_are() -> None:
    assert told_apart(["module.fc1", "module.fc2"], 40) == ("module.fc1", "module.fc2")
    assert told_apart([], 40) == ()


@given(st.lists(st.text("ab.", max_size=60), max_size=8, unique=True))
def test_different_names_stay_different_and_fit(names: list[str]) -> None:
    lines = [plain(name) for name in names]
    short = told_apart(names, 20)
    assert len(set(short)) == len(set(lines))
    assert all(len(name) <= 20 for name in short)


def test_one_long_name_is_shortened() -> None:
    assert len(told_apart(["a." * 100], 40)[0]) <= 40


@given(st.lists(st.text(max_size=200)))
def test_file_names_are_safe_and_different(names: list[str]) -> None:
    found = file_names(names)
    assert len(set(found)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and len(name) < 100 for name in found)


def test_file_names_collide_into_numbers() -> None:
    assert file_names(["A b", "a-B", "../..", "é", "x" * 10_000]) == ["a-b", "a-b-2", "figure", "e", "x" * 80]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (-20.0, "−20"),
        (0.01, "0.01"),
        (1e-5, "10⁻⁵"),
        (-1e5, "−10⁵"),
        (2e-7, "2·10⁻⁷"),
        (-5e12, "−5·10¹²"),
    ],
)
def test_powers_of_ten(value: float, text: str) -> None:
    assert power_of_ten(value) == text
