"""The operations that autograd recorded."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def recorded(results: Sequence[Tensor | None]) -> Iterator[Any]:
    """Every operation that some tensors came from, each once.

    Args:
        results: The tensors; None stands for none.
    """
    waiting = [result.grad_fn for result in results if result is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            yield node
