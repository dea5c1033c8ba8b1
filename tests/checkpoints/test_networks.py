import math

import pytest
import torch
from torch import nn

from plasticity_probe.checkpoints.networks import ACTIVATIONS, MLP, CifarResNet, ConvNet, ResNet18
from plasticity_probe.errors import UsageError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_its_formula(activation):
    torch.manual_seed(0)
    model = MLP([12, 7, 5, 3], activation).double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    hidden = x.reshape(4, 12)
    functions = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "identity": lambda z: z,
        "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    }
    for layer in (0, 2):
        weight, bias = model.state_dict()[f"layers.{layer}.weight"], model.state_dict()[f"layers.{layer}.bias"]
        hidden = functions[activation](hidden @ weight.T + bias)
    expected = hidden @ model.state_dict()["layers.4.weight"].T + model.state_dict()["layers.4.bias"]
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("wrong", [{"image_size": 30}, {"image_size": 2}, {"channels": ()}, {"downsample": "blur"}])
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
