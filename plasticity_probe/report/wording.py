"""Names from traces as text that can be shown and as names of files; whoever wrote the trace may have put anything into them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

FILE_NAME_LENGTH = 80


def plain(text: object) -> str:
    """One line without control, format, private and unassigned characters; runs of white space become one space."""
    kept = ("" if unicodedata.category(c) in _UNPRINTABLE else c for c in re.sub(r"\s+", " ", str(text)))
    return "".join(kept).strip()


def shortened(text: object, limit: int) -> str:
    """Plain text of at most `limit` characters; the middle makes room, because names of layers differ at both ends."""
    line = plain(text)
    if len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return line[: limit - 1 - tail] + "…" + line[len(line) - tail :]


def file_names(names: Iterable[str]) -> list[str]:
    """For each name one for a file, made of a-z, 0-9 and "-" alone; a running number sets equal ones apart."""
    found: list[str] = []
    for name in names:
        stem = _slug(name)
        chosen, number = stem, 2
        while chosen in found:
            chosen, number = f"{stem}-{number}", number + 1
        found.append(chosen)
    return found


def told_apart(names: Sequence[str], limit: int) -> tuple[str, ...]:
    """Names of at most `limit` characters that stay different where they were: what all have in common goes first, then the middle.

    Args:
        names: Names made of parts with dots between them, such as those of parameters.
        limit: The most characters of each.
    """
    lines = [plain(name) for name in names]
    if max(map(len, lines), default=0) <= limit:
        return tuple(lines)
    parts = [line.split(".") for line in lines]
    least = min(map(len, parts)) - 1
    ahead = next((at for at in range(least) if len({part[at] for part in parts}) > 1), least) if len(lines) > 1 else 0
    after = (
        next((at for at in range(least - ahead) if len({part[-1 - at] for part in parts}) > 1), least - ahead)
        if len(lines) > 1
        else 0
    )
    cores = [".".join([*["…"] * bool(ahead), *part[ahead : len(part) - after], *["…"] * bool(after)]) for part in parts]
    short = [shortened(core.replace("….", "…").replace(".…", "…"), limit) for core in cores]
    repeated = {name for name, count in Counter(short).items() if count > 1}
    if not repeated or len(set(lines)) < len(lines):
        return tuple(short)
    return tuple(
        f"{shortened(name, limit - 6)} #{at + 1}" if name in repeated else name for at, name in enumerate(short)
    )


def power_of_ten(value: float) -> str:
    """A tick's number: plain where it is short, else with its power of ten in raised digits."""
    if value == 0 or 1e-3 < abs(value) < 1e4:
        return f"{value:g}".replace("-", "−")
    digits, exponent = f"{value:.0e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = {"1": "", "-1": "−"}.get(digits, f"{digits}·".replace("-", "−"))
    return f"{factor}10{raised}"


def counted(count: int, noun: str) -> str:
    """A number with its noun: one run, 3 runs; the number in digits."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn"}


def _slug(name: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", name[: 10 * FILE_NAME_LENGTH]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:FILE_NAME_LENGTH].strip("-") or "figure"
