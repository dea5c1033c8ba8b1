"""Whether the graphs of a curvature operator are kept or built anew at every product, in which chunks, and how much memory they take."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plasticity_probe.network.examples import batch_size
from plasticity_probe.network.live_bytes import Footprint, LiveBytes, footprint
from plasticity_probe.network.products import Graph
from plasticity_probe.network.subject import Subject

TRIED = 8
"""Examples on which a product is tried to see what it holds, and half as many (our choice: the two extrapolate exactly, as every tensor grows in
proportion to the examples or not at all)."""

RESERVE_ON_CPU = 3
"""Resident bytes for each byte that a product holds for a while. The C library's allocator does not reuse all the gaps that tensors of mixed
lifetimes leave: measured with glibc, 2 to 3 for residual networks and 2 to 3.5 for MLPs, and 1 where every tensor is mapped by itself. An
accelerator's allocator is not counted so."""


@dataclass(frozen=True)
class GraphPlan:
    """How the graphs of all examples are held.

    Args:
        kept: Whether all of them are kept from product to product.
        chunk: Examples per graph.
        bytes: Memory at the peak of a product, the graphs and the product itself included.
    """

    kept: bool
    chunk: int
    bytes: int


def graph_plan(subject: Subject, graph: Graph) -> GraphPlan:
    """Keeps the graphs where they fit half the subject's memory; otherwise cuts them so that one at a time does.

    What a product holds is measured on a few examples, once for a subject and a kind of product.

    Args:
        subject: The network, its loss and its examples.
        graph: Builds the graph of a chunk.
    """
    return subject.once(("graphs", graph.__name__), lambda: _planned(subject, graph))


@dataclass(frozen=True)
class _Held:
    """What is held while the graph of a chunk is built, and during a product with it, by number of examples."""

    building: Footprint
    product: Footprint
    reserve: int

    def graph(self, examples: int) -> float:
        """Bytes of the graph itself."""
        return self.building.at_end(examples)

    def beside(self, examples: int) -> float:
        """Bytes for what is held for a while beside it."""
        most = max(self.building.peak(examples), self.product.peak(examples))
        return self.reserve * (most - self.graph(examples))

    def most_examples(self, largest: int, limit: float) -> int:
        """The largest chunk, up to a number, of which graph and product stay within a limit; at least 1."""
        fitting, failing = 1, largest + 1
        while failing - fitting > 1:
            middle = (fitting + failing) // 2
            fits = self.graph(middle) + self.beside(middle) <= limit
            fitting, failing = (middle, failing) if fits else (fitting, middle)
        return fitting


def _planned(subject: Subject, graph: Graph) -> GraphPlan:
    held, sizes = _held(subject, graph), _sizes(subject)
    result = subject.size * subject.dtype.itemsize
    allowed = subject.memory // 2 - result
    largest = max(sizes)
    kept = sum(map(held.graph, sizes)) + held.beside(largest)
    if kept <= allowed:
        return GraphPlan(True, largest, int(kept) + result)
    whole = subject.mode == "train" or not subject.examples.sliceable
    chunk = largest if whole else held.most_examples(largest, allowed)
    return GraphPlan(False, chunk, int(held.graph(chunk) + held.beside(chunk)) + result)


def _sizes(subject: Subject) -> list[int]:
    """The numbers of examples of the chunks."""
    examples = subject.examples
    if not examples.sliceable:
        return [batch_size(batch) for batch in examples.read()]
    chunk = len(examples) if subject.mode == "train" else subject.chunk
    return [min(chunk, len(examples) - start) for start in range(0, len(examples), chunk)]


def _held(subject: Subject, graph: Graph) -> _Held:
    few, more = (_first(subject, count) for count in (max(1, TRIED // 2), TRIED))
    built: list[int] = []

    def run(count: int) -> Sequence[int]:
        moments, stop = _moments(few if count == len(few.examples) else more, graph)
        built.append(stop)
        return moments

    whole = footprint(len(few.examples), len(more.examples), run)
    stop = built[0]
    return _Held(
        Footprint(whole.fixed[:stop], whole.each[:stop]),
        Footprint(whole.fixed[stop:], whole.each[stop:]),
        RESERVE_ON_CPU if subject.device.type == "cpu" else 1,
    )


def _first(subject: Subject, count: int) -> Subject:
    """The subject on its first examples, as many as can be run at once."""
    batch = next(iter(subject.examples.chunks(count)))
    return subject.take(batch_size(batch))


def _moments(subject: Subject, graph: Graph) -> tuple[list[int], int]:
    """The bytes held after each operation of building a graph and of a product, and how many of those belong to the building."""
    subject.terms  # noqa: B018 -- computed now, so that what it takes is not counted
    vectors = [torch.zeros_like(parameter) for parameter in subject.parameters.values()]
    batch = next(iter(subject.chunks(len(subject.examples))))
    with torch.enable_grad(), LiveBytes() as live:
        product = graph(subject, batch)
        stop = len(live.moments)
        product(vectors)
    return live.moments, stop
