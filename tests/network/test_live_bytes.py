import gc

import pytest
import torch
from torch import nn

from plasticity_probe.network.live_bytes import Footprint, LiveBytes, footprint


def test_a_storage_counts_from_its_making_until_it_is_freed() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        a = before + 1
        assert live.now == 4000
        view = a[:10]
        b = view.t().contiguous().double()
        assert live.now == 4000 + 80
        before += 1
        a += before
        assert live.now == 4000 + 80
        del a
        assert live.now == 4000 + 80  # the view holds it
        del view
        assert live.now == 80
        del b
    assert live.now == 0
    assert max(live.moments) == 4080


def test_what_a_graph_keeps_is_counted_and_freed_with_it() -> None:
    x = torch.randn(50, 8, requires_grad=True)
    gc.disable()
    try:
        with LiveBytes() as live:
            y = (x.tanh() * 2.0).sum()
            assert live.now == 50 * 8 * 4 + 4  # tanh keeps its result
            (g,) = torch.autograd.grad(y, x)
            assert live.now == 50 * 8 * 4 + 4
            del y, g
            assert live.now == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("examples", [1, 30, 1000])
def test_two_small_runs_tell_the_memory_of_a_large_one_at_every_moment(examples: int) -> None:
    net = nn.Sequential(nn.Linear(20, 50), nn.GELU(), nn.Linear(50, 300), nn.Tanh(), nn.Linear(300, 2))
    parameters = list(net.parameters())

    def moments(count: int) -> list[int]:
        inputs = torch.zeros(count, 20)
        with LiveBytes() as live:
            gradients = torch.autograd.grad(net(inputs).square().sum(), parameters, create_graph=True)
            torch.autograd.grad(gradients, parameters, [torch.ones_like(p) for p in parameters], allow_unused=True)
        return live.moments

    found, truth = footprint(4, 8, moments), moments(examples)
    assert found.peak(examples) == pytest.approx(max(truth), rel=1e-3)
    assert found.at_end(examples) == pytest.approx(truth[-1], rel=1e-3)
    # A peak extrapolated by itself would miss that another moment is the highest for many examples.
    peaks = max(moments(4)), max(moments(8))
    by_itself = peaks[0] + (peaks[1] - peaks[0]) / 4 * (examples - 4)
    assert examples < 1000 or by_itself < 0.99 * max(truth)


def test_one_run_alone_counts_as_growing() -> None:
    assert footprint(3, 3, lambda _: [30, 60, 15]) == Footprint((0.0, 0.0, 0.0), (10.0, 20.0, 5.0))
    assert footprint(1, 2, lambda count: [10] * count) == Footprint((0.0, 0.0), (5.0, 5.0))
    assert Footprint((), ()).peak(7) == Footprint((), ()).at_end(7) == 0
