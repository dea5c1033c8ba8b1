import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from plasticity_probe.errors import BudgetError, SubjectError, UnknownNameError
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.network import curvature as curvature_module
from plasticity_probe.network.curvature import (
    MATRICES,
    curvature,
    eigenpairs,
    fisher,
    ggn,
    graph_bytes,
    hessian,
    keeps_graphs,
    krylov_vectors,
    rank_limit,
    true_fisher,
)
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.losses import cross_entropy_terms
from plasticity_probe.network.subject import Subject, subject

Loader = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _isolated():
    with isolated():
        torch.manual_seed(0)
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 11, classes: int = 3) -> Loader:
    return [(torch.randn(count, 2, 6, 6), torch.randint(0, classes, (count,)))]


def rows(count: int = 11, width: int = 4, classes: int = 3) -> Loader:
    return [(torch.randn(count, width), torch.randint(0, classes, (count,)))]


def tokens(count: int = 5, length: int = 6, vocabulary: int = 7) -> Loader:
    targets = torch.randint(0, vocabulary, (count, length))
    targets[torch.rand(count, length) < 0.3] = -100
    return [(torch.randint(0, vocabulary, (count, length)), targets)]


class Tokens(nn.Module):
    """Embedding, one mixing layer, and a head that may share the embedding's weight."""

    def __init__(self, mix: nn.Module, width: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.mix = mix
        self.head = nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.embedding(x))
        return self.head(mixed[0] if isinstance(mixed, tuple) else mixed)


class WithUnused(nn.Module):
    """A network whose last parameter no output depends on, that returns its scores in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.tanh(self.used(x))}


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


def conv() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    with torch.no_grad():
        net(torch.randn(32, 2, 6, 6) * 2 + 1)
    return net


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Loader]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), rows),
    "relu": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), rows),
    "convolution and BatchNorm": (conv, images),
    "LayerNorm and GELU": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)), rows),
    "attention": (lambda: Tokens(encoder()), tokens),
    "GRU": (lambda: Tokens(nn.GRU(4, 4, batch_first=True)), tokens),
    "tied head": (lambda: Tokens(nn.Tanh(), tied=True), tokens),
    "unused parameter": (WithUnused, rows),
}


def dense_hessian(made: Subject) -> Tensor:
    """The Hessian of the mean over all terms, by forward-free double differentiation of one batch."""
    (batch,) = made.examples.chunks(len(made.examples))

    def loss(vector: Tensor) -> Tensor:
        sums, counts = made.losses(made.unflatten(vector), batch)
        return sums.sum() / counts.sum()

    point = made.flatten(made.parameters).detach()
    return torch.autograd.functional.hessian(loss, point)  # type: ignore[return-value]


def dense_fisher(made: Subject) -> Tensor:
    (batch,) = made.examples.chunks(len(made.examples))
    sums, counts = made.losses(made.parameters, batch)
    scale = len(sums) / counts.sum()
    leaves = list(made.parameters.values())
    gradients = [
        torch.cat(
            [
                g.reshape(-1)
                for g in torch.autograd.grad(
                    s * scale, leaves, retain_graph=True, materialize_grads=True, allow_unused=True
                )
            ]
        )
        for s in sums
    ]
    return torch.stack(gradients).T @ torch.stack(gradients) / len(gradients)


def dense_ggn(made: Subject) -> Tensor:
    """J' H J with the Jacobian and the Hessian of the loss in the outputs formed as matrices."""
    (batch,) = made.examples.chunks(len(made.examples))
    point = made.flatten(made.parameters).detach()
    jacobian = torch.autograd.functional.jacobian(lambda v: made.outputs(made.unflatten(v), batch).reshape(-1), point)
    outputs = made.outputs(made.parameters, batch).detach()

    def loss(flat: Tensor) -> Tensor:
        sums, counts = made.loss.of_outputs(flat.view_as(outputs), batch[1])  # type: ignore[misc]
        return sums.sum() / counts.sum()

    inner = torch.autograd.functional.hessian(loss, outputs.reshape(-1))
    return jacobian.T @ inner @ jacobian  # type: ignore[union-attr, operator]


def dense_true_fisher(made: Subject) -> Tensor:
    """The mean over loss terms of what each class would contribute, g g' weighted with the probability that the model gives it."""
    (batch,) = made.examples.chunks(len(made.examples))
    outputs, targets = made.outputs(made.parameters, batch), batch[1]
    scores = outputs.reshape(-1, outputs.shape[-1])[targets.reshape(-1) != -100]
    leaves = list(made.parameters.values())
    total = torch.zeros(made.size, made.size, dtype=torch.float64)
    for term in scores.log_softmax(1):
        for likely in term:
            parts = torch.autograd.grad(-likely, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            g = torch.cat([part.reshape(-1) for part in parts])
            total += float(likely.detach().exp()) * g.outer(g)
    return total / len(scores)


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_is_the_dense_one(name):
    build, data = NETWORKS[name]
    made = subject(build().double(), data())
    assert relative(to_dense(hessian(made)), dense_hessian(made)) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_ggn_is_the_dense_one(name):
    build, data = NETWORKS[name]
    made = subject(build().double(), data())
    found = to_dense(ggn(made))
    assert relative(found, dense_ggn(made)) < 1e-12
    assert torch.linalg.eigvalsh(found)[0] > -1e-14 * found.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_fisher_is_the_dense_one(name):
    build, data = NETWORKS[name]
    made = subject(build().double(), data())
    assert relative(to_dense(fisher(made)), dense_fisher(made)) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_true_fisher_is_the_dense_one_and_takes_no_targets(name):
    build, data = NETWORKS[name]
    net, loader = build().double(), data()
    made = subject(net, loader)
    found = to_dense(true_fisher(made))
    assert relative(found, dense_true_fisher(made)) < 1e-12
    assert relative(found, to_dense(fisher(made))) > 0.1
    inputs, targets = loader[0]
    others = torch.where(targets == -100, targets, (targets + 1) % 3)
    assert torch.equal(to_dense(true_fisher(subject(net, [(inputs, others)]))), found)


def test_true_fisher_of_squared_error_is_that_of_the_gaussian_whose_likelihood_it_is():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    made = subject(net, [(torch.randn(11, 4), torch.randn(11, 2))])
    (batch,) = made.examples.chunks(11)
    outputs = made.outputs(made.parameters, batch).detach()
    noise = torch.randn(11, 2, 200_000, generator=generator(), dtype=torch.float64)
    # The loss |z - t|^2 / 2 has the gradient z - t, whose covariance is that of t: variance 2 / 2 = 1 per output.
    sampled = torch.einsum("nds,nes->nde", noise, noise) / noise.shape[2]
    jacobian = torch.autograd.functional.jacobian(
        lambda v: made.outputs(made.unflatten(v), batch), made.flatten(made.parameters).detach()
    )
    drawn = torch.einsum("ndp,nde,neq->pq", jacobian, sampled, jacobian) / len(outputs)
    exact = torch.einsum("ndp,ndq->pq", jacobian, jacobian) / len(outputs)
    assert relative(to_dense(true_fisher(made)), exact) < 1e-12
    assert relative(drawn, exact) < 0.02


@pytest.mark.parametrize("matrix", MATRICES)
def test_float32_is_close_to_float64(matrix):
    build, data = NETWORKS["convolution and BatchNorm"]
    net, loader = build(), data()
    single = to_dense(curvature(subject(net, loader), matrix))
    double = to_dense(curvature(subject(net, loader, dtype=torch.float64), matrix))
    assert single.dtype == torch.float32
    assert relative(single, double) < 1e-5


def test_linear_regression_on_a_ragged_loader():
    x, y = torch.randn(33, 5).double(), torch.randn(33, 1).double()
    x[32] *= 10
    made = subject(nn.Linear(5, 1, bias=False).double(), [(x[:32], y[:32]), (x[32:], y[32:])])
    truth = 2 * x.T @ x / 33
    assert relative(to_dense(hessian(made)), truth) < 1e-14
    assert relative(to_dense(ggn(made)), truth) < 1e-14
    batches_averaged_equally = (2 * x[:32].T @ x[:32] / 32 + 2 * x[32:].T @ x[32:]) / 2
    assert relative(batches_averaged_equally, truth) > 1


def test_softmax_regression_has_its_closed_form():
    x, y = torch.randn(9, 4).double(), torch.randint(0, 3, (9,))
    net = nn.Linear(4, 3, bias=False).double()
    p = net(x).softmax(1).detach()
    truth = sum(torch.kron(torch.diag(p[i]) - p[i].outer(p[i]), x[i].outer(x[i])) for i in range(9)) / 9
    made = subject(net, [(x, y)])
    assert relative(to_dense(hessian(made)), truth) < 1e-13  # type: ignore[arg-type]
    assert relative(to_dense(ggn(made)), truth) < 1e-13  # type: ignore[arg-type]


def test_ggn_differs_from_the_hessian_of_a_deep_network():
    build, data = NETWORKS["mlp"]
    made = subject(build().double(), data())
    assert relative(to_dense(ggn(made)), dense_hessian(made)) > 0.1


def test_fisher_is_not_the_squared_mean_gradient():
    build, data = NETWORKS["mlp"]
    made = subject(build().double(), data())
    assert torch.linalg.matrix_rank(to_dense(fisher(made))) == 11


def test_language_model_divides_by_all_tokens_not_by_examples():
    build, data = NETWORKS["tied head"]
    loader = data()
    made = subject(build().double(), loader)
    assert made.terms == float((loader[0][1] != -100).sum()) != 5
    short = loader[0][1].clone()
    short[1:] = -100
    only_one = subject(build().double(), [(loader[0][0], short)])
    assert relative(to_dense(hessian(only_one)), dense_hessian(only_one)) < 1e-12


def test_frozen_parameters_are_left_out():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    net.get_parameter("0.weight").requires_grad_(False)
    made = subject(net, rows())
    whole = subject(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), rows())
    assert hessian(made).size == whole.size - 24
    assert relative(to_dense(hessian(made)), dense_hessian(made)) < 1e-12


def test_unused_parameters_have_zero_rows():
    made = subject(WithUnused().double(), rows())
    matrix = to_dense(hessian(made))
    assert (matrix[-6:] == 0).all()
    assert (matrix[:, -6:] == 0).all()


def test_custom_loss_has_hessian_and_fisher_but_no_ggn():
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]).square().sum(1) - batch[1]).square()

    made = subject(nn.Linear(4, 3).double(), rows(), loss=loss)
    assert relative(to_dense(hessian(made)), dense_hessian(made)) < 1e-12
    assert relative(to_dense(fisher(made)), dense_fisher(made)) < 1e-12
    with pytest.raises(SubjectError, match="loss of outputs and targets"):
        ggn(made)
    with pytest.raises(SubjectError, match="cross-entropy or squared error"):
        true_fisher(made)


def test_unknown_matrix_is_named():
    with pytest.raises(UnknownNameError, match="hessian"):
        curvature(subject(nn.Linear(4, 3), rows()), "hesian")


@pytest.mark.parametrize("matrix", MATRICES)
def test_kept_recomputed_and_chunked_agree(matrix):
    build, data = NETWORKS["convolution and BatchNorm"]
    net, loader = build().double(), data()
    ample = subject(net, loader)
    v = torch.randn(ample.size, 2, dtype=torch.float64)
    kept = curvature(ample, matrix)
    truth = kept @ v
    assert keeps_graphs(ample, matrix)
    assert torch.equal(kept @ v, truth)
    just_too_little = subject(net, loader, memory=2 * graph_bytes(ample, matrix) - 2)
    assert not keeps_graphs(just_too_little, matrix)
    assert relative(curvature(just_too_little, matrix) @ v, truth) < 1e-14


def test_graphs_are_kept_up_to_half_the_memory():
    build, data = NETWORKS["convolution and BatchNorm"]
    net, loader = build().double(), data()
    needed = graph_bytes(subject(net, loader))
    enough, one_byte_less = (subject(net, loader, memory=2 * (needed - less)) for less in (0, 1))
    assert keeps_graphs(enough)
    assert graph_bytes(enough) == needed
    assert not keeps_graphs(one_byte_less)
    assert graph_bytes(one_byte_less) < needed


def test_little_memory_recomputes_in_chunks_that_fit():
    build, data = NETWORKS["convolution and BatchNorm"]
    net, loader = build().double(), data()
    ample = subject(net, loader)
    memory = graph_bytes(ample)
    scarce = subject(net, loader, memory=memory)
    assert graph_bytes(scarce) <= memory // 2 < graph_bytes(ample)
    assert relative(to_dense(hessian(scarce)), to_dense(hessian(ample))) < 1e-12
    hardly_any = subject(net, loader, memory=1)
    assert relative(to_dense(hessian(hardly_any)), to_dense(hessian(ample))) < 1e-12


def test_recomputed_graphs_are_built_once_for_all_vectors_and_freed_before_the_next():
    built: list[weakref.ref[Tensor]] = []
    together: list[int] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(x)
            built.append(weakref.ref(hidden))
            together.append(sum(each() is not None for each in built))
            return hidden * hidden

    made = subject(nn.Sequential(nn.Linear(4, 6), Watched(), nn.Linear(6, 3)), rows(), memory=1)
    operator = hessian(made)
    made.terms  # noqa: B018 -- the forward pass that counts the terms is not what is watched
    built.clear()
    together.clear()
    operator @ torch.randn(made.size, 5)
    assert len(built) == 11  # the examples, one at a time
    assert max(together) == 1


def test_graphs_are_built_once_and_kept():
    calls: list[int] = []

    class Counting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(input)

    made = subject(Counting(4, 3), rows())
    operator = hessian(made)
    operator @ torch.ones(made.size)
    before = len(calls)
    operator @ torch.ones(made.size)
    assert len(calls) == before


def test_leaving_the_context_frees_the_graphs_without_the_collector():
    seen: list[weakref.ref[Tensor]] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(x)
            seen.append(weakref.ref(hidden))
            return hidden * hidden  # a product keeps its factors for the backward pass

    made = subject(nn.Sequential(nn.Linear(4, 6), Watched(), nn.Linear(6, 3)), rows())
    for build in (hessian, ggn, fisher):
        made.terms  # noqa: B018 -- the forward pass that counts the terms is not what is watched
        gc.collect()
        gc.disable()
        try:
            with build(made) as operator:
                operator @ torch.ones(made.size)
                assert seen[-1]() is not None
            assert seen[-1]() is None
            operator = build(made)
            operator @ torch.ones(made.size)
            del operator
            assert seen[-1]() is None
        finally:
            gc.enable()


def test_products_with_several_vectors_go_column_by_column():
    build, data = NETWORKS["mlp"]
    made = subject(build().double(), data())
    operator, block = hessian(made), torch.randn(made.size, 3, dtype=torch.float64)
    together = operator @ block
    assert together.shape == block.shape
    for j in range(3):
        assert torch.equal(together[:, j], operator @ block[:, j])
    assert (operator @ block[:, :0]).shape == (made.size, 0)


def test_the_network_is_left_alone():
    net = conv().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    made = subject(net, images())
    hessian(made) @ torch.ones(made.size)
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is None for p in made.parameters.values())


def test_train_mode_is_the_hessian_with_batch_statistics():
    net, loader = conv().double(), images()
    made = subject(net, loader, mode="train")
    names, x, y = list(made.parameters), loader[0][0].double(), loader[0][1]

    def loss(vector: Tensor) -> Tensor:
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        return F.cross_entropy(functional_call(net.train(), {**buffers, **made.unflatten(vector)}, (x,)), y)

    assert names
    truth = torch.autograd.functional.hessian(loss, made.flatten(made.parameters).detach())
    assert relative(to_dense(hessian(made)), truth) < 1e-12  # type: ignore[arg-type]
    assert relative(to_dense(hessian(subject(net, loader))), truth) > 0.1  # type: ignore[arg-type]


def test_a_loss_linear_in_its_parameters_has_no_curvature():
    made = subject(nn.Linear(4, 1), rows(), loss=lambda model, batch: model(batch[0])[:, 0])
    assert (hessian(made) @ torch.ones(5) == 0).all()
    assert (fisher(made) @ torch.ones(5)).abs().sum() > 0


def test_eigenpairs_are_shared_and_repeat():
    build, data = NETWORKS["relu"]
    made = subject(build().double(), data())
    first = eigenpairs(made, k=3, generator=generator())
    assert eigenpairs(made, k=3, generator=generator(1)) is first
    assert eigenpairs(made, k=2, generator=generator()) is not first
    truth = torch.linalg.eigvalsh(dense_hessian(made))
    torch.testing.assert_close(first.top.values, truth.flip(0)[:3], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first.bottom.values, truth[:3], rtol=1e-10, atol=1e-12)


def test_eigenpairs_of_opposite_sign_and_equal_size_are_both_found():
    # f(w) = w1^2 - w2^2 + 0.1 w3^2 has the eigenvalues 2, -2 and 0.2, a tie for the power iteration.
    class Saddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(600, dtype=torch.float64))
            self.scale = torch.cat([torch.tensor([1.0, -1.0, 0.1]), torch.zeros(597)]).double()

        def forward(self, _: Tensor) -> Tensor:
            return (self.scale * self.w.square()).sum()

    made = subject(
        Saddle(),
        [(torch.zeros(2, 1), torch.zeros(2))],
        loss=lambda model, batch: model(batch[0]).expand(len(batch[0])),
    )
    found = eigenpairs(made, k=1, generator=generator())
    assert float(found.top.values[0]) == pytest.approx(2.0, rel=1e-6)
    assert float(found.bottom.values[0]) == pytest.approx(-2.0, rel=1e-6)


def test_too_little_memory_for_the_eigenvectors_is_refused():
    made = subject(nn.Linear(600, 3), [(torch.randn(8, 600), torch.randint(0, 3, (8,)))], memory=100_000)
    with pytest.raises(BudgetError, match="more memory"):
        eigenpairs(made, k=10, generator=generator())


def test_the_search_for_eigenpairs_stays_within_a_quarter_of_the_memory(monkeypatch):
    made = subject(nn.Linear(600, 3), [(torch.randn(8, 600), torch.randint(0, 3, (8,)))])
    vector = 4 * made.size
    assert krylov_vectors(made, 10, 300) == 340
    monkeypatch.setattr(curvature_module, "SMALL_BASIS", 0)
    assert krylov_vectors(made, 10, 300) == 180
    tight = subject(made.model, made.examples, memory=4 * vector * 90)
    assert krylov_vectors(tight, 10, 300) == 90
    assert eigenpairs(tight, k=10, generator=generator()).top.status == "ok"


@pytest.mark.parametrize("name", ["mlp", "unused parameter", "tied head"])
def test_no_matrix_has_a_larger_rank_than_its_limit(name):
    build, data = NETWORKS[name]
    made = subject(build().double(), data())
    limits = {matrix: rank_limit(made, matrix) for matrix in MATRICES}
    for matrix, limit in limits.items():
        assert torch.linalg.matrix_rank(to_dense(curvature(made, matrix)), hermitian=True) <= limit
    assert limits["ggn"] == limits["true_fisher"] <= int(made.terms) * (6 if made.terms != 11 else 2)


BLOCKS: dict[str, tuple[str, str | list[str], list[str]]] = {
    "a layer by its module": ("relu", "2", ["2.weight", "2.bias"]),
    "a block by a pattern": ("convolution and BatchNorm", "[01].*", ["0.weight", "0.bias", "1.weight", "1.bias"]),
    "several patterns": ("relu", ["0.weight", "4"], ["0.weight", "4.weight", "4.bias"]),
    "all weights": ("mlp", "*weight", ["0.weight", "2.weight"]),
    "one of two tied names": ("tied head", "head", ["embedding.weight"]),
}


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_some_parameters_give_the_diagonal_block_of_the_matrix(case, matrix):
    name, pattern, names = BLOCKS[case]
    build, data = NETWORKS[name]
    net, loader = build().double(), data()
    whole, block = subject(net, loader), subject(net, loader, parameters=pattern)
    assert list(block.parameters) == names
    assert hessian(block).size == block.conditions().parameters == sum(net.get_parameter(n).numel() for n in names)
    marks = whole.flatten({n: torch.full_like(p, n in names) for n, p in whole.parameters.items()}).bool()
    dense = to_dense(curvature(whole, matrix))[marks][:, marks]
    assert relative(to_dense(curvature(block, matrix)), dense) < 1e-12


class ThroughTime(nn.Module):
    """A recurrent layer and a head on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(2, 2, num_layers=2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x[:, :, 0].mT)[0][:, -1])


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


def normalised(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    net = nn.Sequential(norm(nn.Conv2d(2, 3, 3)), nn.Tanh(), nn.Flatten(), norm(nn.Linear(48, 3)))
    net(torch.randn(2, 2, 6, 6))
    return net


HARD: dict[str, Callable[[], nn.Module]] = {
    "LSTM": ThroughTime,
    "weight_norm": lambda: normalised(nn.utils.parametrizations.weight_norm),
    "spectral_norm": lambda: normalised(nn.utils.parametrizations.spectral_norm),
    "GroupNorm": grouped,
}


@pytest.mark.parametrize("name", HARD)
def test_products_repeat_with_other_vectors_where_linearisation_fails(name):
    made = subject(HARD[name]().double(), images())
    truth, g = dense_hessian(made), generator()
    with hessian(made) as operator:
        for _ in range(3):
            v = torch.randn(made.size, generator=g, dtype=torch.float64)
            assert relative(operator @ v, truth @ v) < 1e-12


def test_cudnn_is_off_where_a_recurrent_layer_runs_and_nowhere_else():
    seen: list[bool] = []

    class Head(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(input)

    recurrent = ThroughTime()
    recurrent.head = Head(2, 3)
    made = subject(recurrent, images())
    seen.clear()
    assert made.mean_loss > 0
    assert set(seen) == {False}
    made = subject(nn.Sequential(nn.Flatten(), Head(72, 3)), images())
    seen.clear()
    assert made.mean_loss > 0
    assert set(seen) == {True}
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("matrix", MATRICES)
def test_a_product_reads_nothing_from_the_device(matrix, memory, monkeypatch):
    build, data = NETWORKS["convolution and BatchNorm"]
    made = subject(build(), data(), memory=memory)
    operator, v = curvature(made, matrix), torch.randn(made.size)
    made.terms  # noqa: B018 -- read once for a subject

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a number was read from the device")

    readers = (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__float__",
        "__int__",
        "__bool__",
        "__array__",
        "nonzero",
        "__index__",
    )
    for name in readers:
        monkeypatch.setattr(Tensor, name, refuse)
    first = operator @ v
    again = operator @ v
    monkeypatch.undo()
    assert torch.equal(first, again)
    assert first.abs().sum() > 0


def test_tf32_is_off_in_products_unless_asked():
    seen: list[str] = []

    class Watched(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return super().forward(input)

    def precision(allow: bool) -> str:
        made = subject(Watched(4, 3), rows(), allow_tf32=allow)
        operator = hessian(made)
        seen.clear()
        operator @ torch.ones(made.size)
        return seen[-1]

    assert precision(False) == "ieee"
    assert precision(True) == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_cross_entropy_is_the_loss_under_test():
    assert subject(nn.Linear(4, 3), rows()).loss.of_outputs is cross_entropy_terms
