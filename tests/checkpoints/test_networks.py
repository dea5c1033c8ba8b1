import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from plasticity_probe.checkpoints.networks import ACTIVATIONS, MLP, CifarResNet, ConvNet, CReLU, ResNet18
from plasticity_probe.errors import UsageError

FUNCTIONS = {
    "relu": lambda z: torch.where(z > 0, z, 0),
    "tanh": torch.tanh,
    "identity": lambda z: z,
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "crelu": lambda z: torch.cat([torch.where(z > 0, z, 0), torch.where(z < 0, -z, 0)], 1),
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def normalised(z, network, name):
    """Layer norm over everything but the first axis, with one scale and shift for each unit or channel on axis 1."""
    scale, shift = (network.state_dict()[f"{name}.{kind}"] for kind in ("weight", "bias"))
    flat = z.flatten(1)
    mean, variance = flat.mean(1), flat.var(1, unbiased=False)
    ones = [1] * (z.ndim - 2)
    spread = (slice(None), *([None] * (z.ndim - 1)))
    standard = (z - mean[spread]) / torch.sqrt(variance[spread] + 1e-5)
    return standard * scale.view(1, -1, *ones) + shift.view(1, -1, *ones)


def drawn(network):
    """In float64 and with norms that are no identity."""
    network = network.double()
    for name, parameter in network.named_parameters():
        if "_norm" in name:
            nn.init.normal_(parameter)
    return network


def test_crelu_is_both_halves_of_each_unit_one_half_after_the_other():
    z = torch.tensor([[1.0, -2.0, 0.0]])
    assert CReLU()(z).tolist() == [[1.0, 0.0, 0.0, 0.0, 2.0, 0.0]]
    assert CReLU()(torch.ones(2, 3, 4, 4)).shape == (2, 6, 4, 4)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_its_formula(activation, layer_norm):
    torch.manual_seed(0)
    model = drawn(MLP([12, 7, 5, 3], activation, layer_norm=layer_norm))
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    hidden = x.reshape(4, 12)
    for layer in (0, 2):
        weight, bias = model.state_dict()[f"layers.{layer}.weight"], model.state_dict()[f"layers.{layer}.bias"]
        hidden = hidden @ weight.T + bias
        hidden = FUNCTIONS[activation](normalised(hidden, model, f"layers.{layer}_norm") if layer_norm else hidden)
    expected = hidden @ model.state_dict()["layers.4.weight"].T + model.state_dict()["layers.4.bias"]
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("downsample", ["pool", "stride"])
def test_convnet_is_its_formula(activation, layer_norm, downsample):
    torch.manual_seed(0)
    model = drawn(ConvNet((3, 4), 3, 2, 8, 5, 3, downsample, activation=activation, layer_norm=layer_norm))
    state = model.state_dict()
    numbers = [0, 3, 7, 9] if downsample == "pool" else [0, 2, 5, 7]

    def activated(z, number):
        return FUNCTIONS[activation](normalised(z, model, f"layers.{number}_norm") if layer_norm else z)

    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    hidden = x
    for number in numbers[:2]:
        weight, bias = state[f"layers.{number}.weight"], state[f"layers.{number}.bias"]
        patches = functional.unfold(hidden, 3, padding=1).unflatten(1, (-1, 9))
        side = hidden.shape[-1]
        hidden = torch.einsum("ockl,nckl->nol", weight.flatten(2)[..., None].expand(-1, -1, -1, side**2), patches)
        hidden = (hidden + bias[:, None]).unflatten(2, (side, side))
        if downsample == "stride":
            hidden = hidden[:, :, ::2, ::2]
        hidden = activated(hidden, number)
        if downsample == "pool":
            hidden = hidden.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    hidden = activated(
        hidden.reshape(2, -1) @ state[f"layers.{numbers[2]}.weight"].T + state[f"layers.{numbers[2]}.bias"], numbers[2]
    )
    expected = hidden @ state[f"layers.{numbers[3]}.weight"].T + state[f"layers.{numbers[3]}.bias"]
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)


def test_layer_norm_makes_an_example_independent_of_the_scale_of_its_pre_activations():
    torch.manual_seed(0)
    plain, normed = (MLP([6, 5, 3], bias=False, layer_norm=layer_norm).double() for layer_norm in (False, True))
    x = torch.randn(2, 6, dtype=torch.float64)
    assert torch.allclose(normed(1000 * x), normed(x), atol=1e-4)
    assert not torch.allclose(plain(1000 * x), plain(x), atol=1e-4)


def test_norms_are_named_after_their_layer_and_the_others_keep_their_names():
    norms = {f"layers.{n}_norm.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    assert {*MLP([2, 3, 4, 5], layer_norm=True).state_dict()} == {*MLP([2, 3, 4, 5]).state_dict()} | norms
    norms = {f"layers.{n}_norm.{kind}" for n in (0, 3, 7) for kind in ("weight", "bias")}
    assert {*ConvNet(layer_norm=True).state_dict()} == {*ConvNet().state_dict()} | norms
    assert "fc1_norm.weight" in MLP([2, 3, 4], names=["fc1", "fc2"], layer_norm=True).state_dict()


def test_behind_crelu_a_layer_reads_twice_as_many_inputs():
    shapes = [tuple(p.shape) for p in MLP([6, 5, 4, 3], "crelu", bias=False).parameters()]
    assert shapes == [(5, 6), (4, 10), (3, 8)]
    shapes = [tuple(p.shape) for p in ConvNet((16, 16), 5, 1, 28, 100, activation="crelu").parameters() if p.ndim > 1]
    assert shapes == [(16, 1, 5, 5), (16, 32, 5, 5), (100, 32 * 49), (10, 200)]


# 16*3*25+16, 16*16*25+16, 16*64*100+100, 100*10+10: two 5x5 convolutions of 16 channels, 100 hidden units (Kumar et al. 2023).
def test_the_convolutional_network_of_kumar_2023():
    assert parameters(ConvNet((16, 16), 5, hidden=100)) == 1_216 + 6_416 + 102_500 + 1_010


def test_mlp_settings():
    assert list(MLP([2, 3, 4], bias=False).state_dict()) == ["layers.0.weight", "layers.2.weight"]
    assert list(MLP([2, 3, 4], names=["fc1", "fc2"], bias=False).state_dict()) == ["fc1.weight", "fc2.weight"]
    assert list(MLP([2, 3, 4], names=["a.b.0", "a.b.3"], bias=False).state_dict()) == ["a.b.0.weight", "a.b.3.weight"]


@pytest.mark.parametrize(
    "wrong", [{"widths": [3]}, {"widths": [3, 2], "activation": "swish"}, {"widths": [3, 2], "names": ["a", "b"]}]
)
def test_mlp_refuses(wrong):
    with pytest.raises(UsageError):
        MLP(**wrong)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("downsample", ["pool", "stride"])
def test_every_convolution_halves_the_image(kernel, downsample):
    model = ConvNet((4, 6), kernel, 1, 28, 8, 10, downsample)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linears] == [6 * 7 * 7, 8]


@pytest.mark.parametrize(("downsample", "numbers"), [("pool", [0, 3, 7, 9]), ("stride", [0, 2, 5, 7])])
def test_convnet_names_are_those_of_a_plain_sequence(downsample, numbers):
    names = {key.rpartition(".")[0] for key in ConvNet(downsample=downsample).state_dict()}
    assert names == {f"layers.{number}" for number in numbers}


@pytest.mark.parametrize(
    "wrong", [{"image_size": 30}, {"image_size": 2}, {"channels": ()}, {"downsample": "blur"}, {"activation": "swish"}]
)
def test_convnet_refuses_images_that_cannot_be_halved_and_unknown_ways(wrong):
    with pytest.raises(UsageError):
        ConvNet(**wrong)


# Parameter counts: He et al. 2016, table 6 (0.27M, 0.46M, 0.66M, 0.85M, 1.7M), exactly as github.com/akamaster/pytorch_resnet_cifar10.
@pytest.mark.parametrize(("blocks", "count"), [(3, 269_722), (5, 464_154), (7, 658_586), (9, 853_018), (18, 1_727_962)])
def test_cifar_resnets_have_the_published_size(blocks, count):
    assert parameters(CifarResNet(blocks)) == count


def test_padded_shortcut_takes_every_second_pixel_and_pads_with_zeros_on_both_sides():
    shortcut = CifarResNet().get_submodule("layer2.0.shortcut")
    x = torch.randn(2, 16, 8, 8)
    out = shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_cifar_resnet_shortcuts():
    projected = CifarResNet(shortcut="projection")
    assert "layer2.0.shortcut.0.weight" in projected.state_dict()
    assert projected.eval()(IMAGES).shape == (2, 10)
    with pytest.raises(UsageError):
        CifarResNet(shortcut="none")


# 11 689 512 parameters: torchvision's resnet18 with 1000 classes; 11 173 962: the customary variant for CIFAR-10.
@pytest.mark.parametrize(("settings", "count"), [({"stem": "imagenet", "classes": 1000}, 11_689_512), ({}, 11_173_962)])
def test_resnet18_has_the_published_size(settings, count):
    with torch.device("meta"):
        assert parameters(ResNet18(**settings)) == count


@pytest.mark.parametrize(
    ("settings", "side"),
    [({}, 4), ({"max_pool": True}, 2), ({"stem": "imagenet"}, 1), ({"stem": "imagenet", "max_pool": False}, 2)],
)
def test_stem_and_pooling_set_the_side_of_the_last_module(settings, side):
    model = ResNet18(width=4, depth=1, **settings).eval()
    seen = []
    model.layer4.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    assert model(IMAGES).shape == (2, 10)
    assert seen == [(2, 32, side, side)]


def test_resnet18_width_and_depth():
    names = ResNet18(width=4, depth=3).state_dict()
    assert names["layer4.2.conv2.weight"].shape == (32, 32, 3, 3)
    assert "layer4.3.conv1.weight" not in names
    assert "layer1.0.downsample.0.weight" not in names
    with pytest.raises(UsageError):
        ResNet18(stem="tiny")


def test_fresh_networks_follow_the_seed_and_the_published_variance():
    def drawn(seed, network):
        torch.manual_seed(seed)
        return network().state_dict()

    def wide():
        return ResNet18(width=32, depth=1)

    weight = drawn(0, CifarResNet)["layer2.0.conv1.weight"]
    assert torch.equal(weight, drawn(0, CifarResNet)["layer2.0.conv1.weight"])
    assert not torch.equal(weight, drawn(1, CifarResNet)["layer2.0.conv1.weight"])
    # Standard deviations of n normal draws lie within 4 standard errors, 1/sqrt(2n), of the truth.
    for drawing, fan in ((weight, 16 * 9), (drawn(0, wide)["layer2.0.conv1.weight"], 64 * 9)):
        error = 4 / math.sqrt(2 * drawing.numel())
        assert abs(drawing.std().item() * math.sqrt(fan / 2) - 1) < error
        assert abs(drawing.std().item() * math.sqrt(fan) - 1) > error
