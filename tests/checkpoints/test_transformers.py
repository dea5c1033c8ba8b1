import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from plasticity_probe.checkpoints.transformers import CharTransformer, ViT
from plasticity_probe.errors import UsageError
from plasticity_probe.functional import fisher_rank
from plasticity_probe.network.fresh import fresh_network, reinitialised

SMALL_VIT = {"patch": 2, "width": 6, "depth": 2, "heads": 3, "image_size": 4, "in_channels": 2, "classes": 5}
SMALL_CHAR = {"vocabulary": 7, "context": 5, "width": 6, "depth": 2, "heads": 3}
CASES = {
    "vit": (lambda: ViT(**SMALL_VIT), lambda: torch.randn(3, 2, 4, 4, dtype=torch.float64)),
    "char": (lambda: CharTransformer(**SMALL_CHAR), lambda: torch.randint(7, (3, 5))),
}
both = pytest.mark.parametrize("case", CASES)


def drawn(build):
    """In float64, with weights so large that attention is far from uniform and norms are no identity."""
    network = build().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def linear(x, state, name):
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(state[f"{name}.weight"], state[f"{name}.bias"], strict=True)
    ]


def normed(x, state, name):
    x = torch.stack(list(x))
    standard = (x - x.sum() / len(x)) / torch.sqrt(((x - x.sum() / len(x)) ** 2).sum() / len(x) + 1e-5)
    return standard * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(sequence, state, name, heads, causal):
    """One token after the other, one head after the other, with the softmax written out."""
    width = len(sequence[0])
    size = width // heads
    projected = [torch.stack(linear(x, state, f"{name}.qkv")) for x in sequence]
    results = []
    for place in range(len(sequence)):
        mixed = []
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            query = projected[place][:width][columns]
            seen = range(place + 1) if causal else range(len(sequence))
            scores = [(query * projected[other][width : 2 * width][columns]).sum() / math.sqrt(size) for other in seen]
            total = sum(torch.exp(score - max(scores)) for score in scores)
            shares = [torch.exp(score - max(scores)) / total for score in scores]
            mixed.append(
                sum(share * projected[other][2 * width :][columns] for share, other in zip(shares, seen, strict=True))
            )
        results.append(torch.stack(linear(torch.cat(mixed), state, f"{name}.out")))
    return results


def blocks(sequence, state, depth, heads, causal):
    for index in range(depth):
        name = f"blocks.{index}"
        read = [normed(x, state, f"{name}.attention_norm") for x in sequence]
        sequence = [
            x + y for x, y in zip(sequence, attention(read, state, f"{name}.attention", heads, causal), strict=True)
        ]
        for place, x in enumerate(sequence):
            hidden = torch.stack(linear(normed(x, state, f"{name}.mlp_norm"), state, f"{name}.mlp.expand"))
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            sequence[place] = x + torch.stack(linear(hidden, state, f"{name}.mlp.contract"))
    return [normed(x, state, "norm") for x in sequence]


@torch.no_grad()
def test_the_vision_transformer_is_its_definition_token_by_token():
    network, images = drawn(CASES["vit"][0]), CASES["vit"][1]()
    state = network.state_dict()
    for image, found in zip(images, network(images), strict=True):
        corners = [(row, column) for row in (0, 2) for column in (0, 2)]
        patches = [image[:, row : row + 2, column : column + 2] for row, column in corners]
        sequence = [
            torch.stack([(kernel * patch).sum() for kernel in state["patches.weight"]])
            + state["patches.bias"]
            + position
            for patch, position in zip(patches, state["positions.weight"], strict=True)
        ]
        tokens = blocks(sequence, state, 2, 3, causal=False)
        expected = torch.stack(linear(sum(tokens) / len(tokens), state, "head"))
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_character_transformer_is_its_definition_token_by_token():
    network, tokens = drawn(CASES["char"][0]), torch.randint(7, (2, 4))
    state = network.state_dict()
    for row, found in zip(tokens, network(tokens), strict=True):
        sequence = [
            state["tokens.weight"][token] + position
            for token, position in zip(row, state["positions.weight"], strict=False)
        ]
        expected = [torch.stack(linear(x, state, "head")) for x in blocks(sequence, state, 2, 3, causal=True)]
        assert torch.allclose(found, torch.stack(expected), rtol=1e-10, atol=1e-10)
        blind = blocks([x.clone() for x in sequence], state, 2, 3, causal=False)
        assert not torch.allclose(found, torch.stack([torch.stack(linear(x, state, "head")) for x in blind]), atol=1e-3)


@torch.no_grad()
def test_a_later_character_changes_no_earlier_logit_by_a_single_bit():
    network = drawn(CASES["char"][0])
    tokens = torch.randint(7, (4, 5))
    for place in range(5):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 7
        before, after = network(tokens), network(changed)
        assert torch.equal(before[:, :place], after[:, :place])
        assert (before[:, place:] != after[:, place:]).any(-1).all()


@torch.no_grad()
def test_short_sequences_give_the_beginning_of_long_ones():
    network, tokens = drawn(CASES["char"][0]), torch.randint(7, (2, 5))
    assert torch.allclose(network(tokens[:, :2]), network(tokens)[:, :2], rtol=1e-12, atol=1e-12)


@both
def test_number_of_heads_matters_and_leaves_the_tensors_alone(case):
    build, inputs = CASES[case]
    network, x = drawn(build), inputs()
    kind, settings = type(network), SMALL_VIT if case == "vit" else SMALL_CHAR
    other = kind(**{**settings, "heads": 2}).double()
    other.load_state_dict(network.state_dict())
    assert not torch.allclose(other(x), network(x), atol=1e-3)


@both
def test_stacked_copies_under_vmap_are_each_network_alone(case):
    build, inputs = CASES[case]
    networks, x = [drawn(build) for _ in range(2)], torch.stack([inputs(), inputs()])
    stacked = {
        name: torch.stack([dict(n.named_parameters())[name] for n in networks])
        for name, _ in networks[0].named_parameters()
    }

    def loss(weights, x):
        return functional_call(networks[0], weights, (x,)).square().sum()

    def outputs(weights, x):
        return functional_call(networks[0], weights, (x,))

    together, gradients = vmap(outputs)(stacked, x), vmap(grad(loss))(stacked, x)
    for index, network in enumerate(networks):
        assert torch.allclose(together[index], network(x[index]), rtol=1e-10, atol=1e-10)
        alone = torch.autograd.grad(network(x[index]).square().sum(), list(network.parameters()))
        for (name, _), gradient in zip(network.named_parameters(), alone, strict=True):
            assert torch.allclose(gradients[name][index], gradient, rtol=1e-8, atol=1e-8)


@both
def test_second_derivatives_are_the_differences_of_first_ones(case):
    build, inputs = CASES[case]
    network, x = build().double(), inputs()
    parameters = list(network.parameters())
    along = [torch.randn_like(parameter) for parameter in parameters]

    def gradient(**more):
        return torch.autograd.grad(functional.log_softmax(network(x), -1)[..., 0].sum(), parameters, **more)

    found = torch.autograd.grad(gradient(create_graph=True), parameters, grad_outputs=along)
    sides = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, direction in zip(parameters, along, strict=True):
                parameter += step * direction
        sides.append(gradient())
    differences = [(up - down) / 2e-6 for up, down in zip(*sides, strict=True)]
    distance = sum((a - b).square().sum() for a, b in zip(found, differences, strict=True)).sqrt()
    assert distance < 1e-6 * sum(a.square().sum() for a in found).sqrt()


@both
def test_initial_weights_are_those_of_gpt2(case):
    wide = {"vit": lambda: ViT(4, 64, 8, 4), "char": lambda: CharTransformer(65, 64, 64, 8, 4)}[case]
    for name, value in fresh_network(wide, 3).state_dict().items():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value))
        elif name.endswith("bias"):
            assert not value.any()
        else:
            residual = name.endswith(("attention.out.weight", "mlp.contract.weight"))
            expected = 0.02 / 4 if residual else 0.02  # sqrt(2 * 8 blocks) = 4
            # The standard deviation of n normal draws has standard error 1/sqrt(2n).
            assert abs(value.std().item() / expected - 1) < 5 / math.sqrt(2 * value.numel()), name


@both
def test_fresh_networks_follow_the_seed_and_a_trained_one_can_be_drawn_anew(case):
    build, _ = CASES[case]
    first, again, other = (fresh_network(build, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())
    anew = fresh_network(reinitialised(drawn(build)), 1).state_dict()
    assert all(value.abs().max() < 0.1 for name, value in anew.items() if "norm" not in name)
    assert all(value.std() > 0.002 for name, value in anew.items() if "norm" not in name and name.endswith("weight"))


@both
def test_the_package_measures_them_with_the_gradients_of_single_examples(case):
    build, inputs = CASES[case]
    network, x = drawn(build), inputs()
    targets = torch.randint(5, (3,)) if case == "vit" else torch.randint(7, (3, 5))
    rows = []
    for example, target in zip(x, targets, strict=True):
        outputs = network(example[None])
        losses = functional.cross_entropy(outputs.flatten(0, -2), target.reshape(-1), reduction="sum")
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses, list(network.parameters()))]))
    expected = torch.linalg.eigvalsh(torch.stack(rows) @ torch.stack(rows).T).flip(0)
    found = torch.as_tensor(fisher_rank(network, [(x, targets)], dtype=torch.float64).eigenvalues)
    assert torch.allclose(found / found.sum(), expected / expected.sum(), rtol=1e-8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViT(width=10, heads=4), "heads that divide its width"),
        (lambda: ViT(patch=5), "patches of side 5 divide"),
        (lambda: ViT(depth=0), "at least 1"),
        (lambda: CharTransformer(width=10, heads=4), "heads that divide its width"),
        (lambda: CharTransformer(vocabulary=0), "at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(build, message):
    with pytest.raises(UsageError, match=message):
        build()


def test_inputs_of_another_size_are_refused():
    with pytest.raises(UsageError, match="reads images of 4 patches, got 1"):
        ViT(**SMALL_VIT)(torch.randn(1, 2, 2, 2))
    with pytest.raises(UsageError, match="reads at most 5 tokens, got 6"):
        CharTransformer(**SMALL_CHAR)(torch.zeros(1, 6, dtype=torch.int64))
