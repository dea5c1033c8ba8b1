import pytest
import torch
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.curvature import graph_bytes, hessian, keeps_graphs
from plasticity_probe.network.graphs import RESERVE_ON_CPU, GraphPlan, graph_plan
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.live_bytes import LiveBytes
from plasticity_probe.network.products import fisher_product, ggn_product, hessian_product
from plasticity_probe.network.subject import Subject, subject


@pytest.fixture(autouse=True)
def _isolated():
    with isolated():
        yield


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))


def made(count: int = 60, **options: object) -> Subject:
    return subject(net(), [(torch.randn(count, 2, 6, 6), torch.randint(0, 3, (count,)))], **options)  # type: ignore[arg-type]


def held(of: Subject, product: object, chunk: int) -> tuple[int, int]:
    """Bytes of the graphs of all examples, and the most that is held beside them during a product."""
    of.terms  # noqa: B018
    vectors = [torch.zeros_like(parameter) for parameter in of.parameters.values()]
    with LiveBytes() as live:
        kept = [product(of, batch) for batch in of.chunks(chunk)]  # type: ignore[operator]
        graphs = live.now
        for each in kept:
            each(vectors)
    return graphs, max(live.moments) - graphs


@pytest.mark.parametrize("product", [hessian_product, ggn_product, fisher_product])
def test_the_plan_counts_what_all_graphs_and_a_product_hold(product) -> None:
    whole = made()
    plan = graph_plan(whole, product)
    graphs, beside = held(whole, product, plan.chunk)
    assert plan == GraphPlan(True, 60, plan.bytes)
    assert plan.bytes == pytest.approx(graphs + RESERVE_ON_CPU * beside + 4 * whole.size, rel=0.02)
    without_a_product = graphs + 4 * whole.size
    assert plan.bytes > 1.2 * without_a_product


def test_chunks_shrink_with_the_memory_until_one_example_is_left() -> None:
    plans = [graph_plan(made(memory=memory), hessian_product) for memory in (10**9, 500_000, 100_000, 1)]
    assert [plan.kept for plan in plans] == [True, False, False, False]
    assert plans[0].chunk == 60 > plans[1].chunk > plans[2].chunk > plans[3].chunk == 1
    for plan, memory in zip(plans[:3], (10**9, 500_000, 100_000), strict=True):
        assert plan.bytes <= memory // 2
    larger = made(memory=500_000)
    larger.__dict__["chunk"] = plans[1].chunk + 1
    graphs, beside = held(larger.take(plans[1].chunk + 1), hessian_product, plans[1].chunk + 1)
    assert graphs + RESERVE_ON_CPU * beside + 4 * larger.size > 250_000


def test_train_mode_is_never_cut() -> None:
    scarce = made(mode="train", memory=100_000)
    assert graph_plan(scarce, hessian_product).chunk == 60
    assert not keeps_graphs(scarce)
    ample = made(mode="train")
    assert keeps_graphs(ample)
    assert graph_plan(ample, hessian_product).chunk == 60


def test_batches_that_cannot_be_cut_count_as_they_are() -> None:
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    batches = [{"x": x[:10], "y": y[:10], "scale": torch.ones(3)}, {"x": x[10:], "y": y[10:], "scale": torch.ones(3)}]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]) * batch["scale"], batch["y"], reduction="none")

    model = nn.Linear(4, 3)
    whole = subject(model, batches, loss=loss)
    assert not whole.examples.sliceable
    assert graph_plan(whole, hessian_product).chunk == 20
    scarce = subject(model, batches, loss=loss, memory=1)
    assert graph_plan(scarce, hessian_product).chunk == 20
    v = torch.randn(15)
    torch.testing.assert_close(hessian(scarce) @ v, hessian(whole) @ v)


def test_a_network_without_a_second_derivative_has_no_graph_bytes_and_says_so_when_asked_for_a_product() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    class Model(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return Once.apply(super().forward(input))  # type: ignore[return-value]

    single = subject(Model(4, 3), [(torch.randn(8, 4), torch.randint(0, 3, (8,)))])
    assert graph_bytes(single) == 0
    with pytest.raises(SubjectError, match="once_differentiable"):
        hessian(single) @ torch.ones(single.size)
