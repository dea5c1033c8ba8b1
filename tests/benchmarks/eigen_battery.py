"""The eigen battery: thousands of eigenproblems with known answers, and how many of them the solver gets silently wrong.

    python tests/benchmarks/eigen_battery.py [PART OF A FAMILY'S NAME...]

Prints one table in Markdown. Each silent error and each exception goes to stderr, with all that is needed to repeat it; the exit code is 1
if there is any.
"""

# pyright: reportMissingImports=false
# The modules of the battery lie beside the tests that share them, on no path that a type checker looks at.

import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "linalg"))

from analyze import machine
from eigen_judge import RAISED, Result, solve
from eigen_problems import FAMILIES, problems

from plasticity_probe.linalg.lanczos import EigenStatus

REFUSALS = [*(status.value for status in EigenStatus if status is not EigenStatus.OK), RAISED]


def main() -> int:
    """Solves, prints, and says by its result whether anything was wrong."""
    parts = sys.argv[1:]
    names = tuple(name for name in FAMILIES if not parts or any(part in name for part in parts))
    start = time.perf_counter()
    results = {name: list(solved(name)) for name in names}
    seconds = time.perf_counter() - start
    print(
        f"{date.today()}, {seconds:.0f} s, torch {torch.__version__}, Python {platform.python_version()}, {machine()}\n"
    )
    print("\n".join(table(results)))
    every = [result for some in results.values() for result in some]
    return int(any(result.silent or result.exception for result in every))


def solved(name: str) -> list[Result]:
    """The results of one family; what is wrong with them goes to stderr."""
    results = [solve(problem) for problem in problems((name,))]
    for result in results:
        if result.silent or result.exception:
            print(
                f"{result.problem}\n  {result.exception or '; '.join(result.complaints)}", file=sys.stderr, flush=True
            )
    return results


def table(results: dict[str, list[Result]]) -> list[str]:
    """Lines of Markdown: a row for each family and one for all together."""
    head = ["family", "problems", "ok and right", *REFUSALS, "silent errors", "products (mean)", "products (max)"]
    every = [result for some in results.values() for result in some]
    rows = [row(name, some) for name, some in results.items()] + [row("**all**", every)]
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def row(name: str, results: Sequence[Result]) -> list[str]:
    """The cells of one row; products are those of problems that have to do without the matrix."""
    silent = sum(result.silent for result in results)
    told = [result.refusal for result in results if not result.silent]
    products = [result.products for result in results if result.problem.matrix_free] or [0]
    counts = [told.count(None), *(told.count(refusal) for refusal in REFUSALS), silent]
    cells = [str(count) if count else "" for count in counts]
    return [
        name,
        str(len(results)),
        *cells[:-1],
        str(silent),
        f"{sum(products) / len(products):.0f}",
        str(max(products)),
    ]


if __name__ == "__main__":
    sys.exit(main())
