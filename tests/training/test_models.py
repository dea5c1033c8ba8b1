import json

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from plasticity_probe.checkpoints.architectures import identify, load_network, named_architectures
from plasticity_probe.checkpoints.formats import read_checkpoint, write_checkpoint
from plasticity_probe.checkpoints.networks import MLP, CifarResNet, ConvNet, ResNet18
from plasticity_probe.checkpoints.transformers import CharTransformer, ViT
from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.network.capture import recorded_inputs
from plasticity_probe.training.models import (
    blueprint,
    hidden_layers,
    modules_from_the_top,
    with_activation,
    with_layer_norm,
)

IMAGE = (3, 8, 8)
NETWORKS = {
    **{
        f"mlp-{activation}{'-norm' * norm}": (
            lambda activation=activation, norm=norm: MLP([6, 5, 4, 3], activation, layer_norm=norm),
            (6,),
        )
        for activation in ("relu", "leaky_relu", "tanh", "identity", "crelu")
        for norm in (False, True)
    },
    "mlp-without-bias": (lambda: MLP([6, 5, 4, 3], bias=False, names=["fc1", "fc2", "fc3"]), (6,)),
    **{
        f"convnet-{downsample}-{activation}{'-norm' * norm}": (
            lambda d=downsample, a=activation, norm=norm: ConvNet(
                (4, 5), 3, 3, 8, 6, 3, d, activation=a, layer_norm=norm
            ),
            IMAGE,
        )
        for downsample in ("pool", "stride")
        for activation in ("relu", "crelu")
        for norm in (False, True)
    },
    "resnet18": (lambda: ResNet18(4, 2, 3), IMAGE),
    "cifar": (lambda: CifarResNet(1, "projection", 3), (3, 16, 16)),
    "vit": (lambda: ViT(4, 8, 2, 2, 8, 3, 3), IMAGE),
    "char": (lambda: CharTransformer(7, 5, 8, 2, 2), None),
}
each = pytest.mark.parametrize("case", NETWORKS)


def example(shape):
    return torch.randint(7, (5,)) if shape is None else torch.randn(shape, dtype=torch.float64)


def drawn(case):
    """In float64 and eval mode, with norms and statistics that are no identity, and a batch of examples."""
    torch.manual_seed(0)
    build, shape = NETWORKS[case]
    network = build().double().eval()
    for name, tensor in network.state_dict().items():
        if "norm" in name or "bn" in name or "running" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape))
    for name, parameter in network.named_parameters():
        if "positions" not in name and parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5)
    return network, torch.stack([example(shape) for _ in range(4)])


def parts(network, layer):
    """The tensors whose first axis runs over the units, and the reader's weights with its axis of features first."""
    paths = [layer.incoming] if layer.norm is None else [layer.incoming, layer.norm]
    state = network.state_dict()
    own = [
        tensor for path in paths for name, tensor in state.items() if name.rpartition(".")[0] == path and tensor.ndim
    ]
    return own, state[f"{layer.name}.weight"].transpose(0, 1)


def silenced(case, place, unit):
    """Outputs when a unit is zero at its source.

    Layer norm mixes the units of an example, so behind it only the unit's own scale and shift silence it and leave the others as they are.
    """
    network, x = drawn(case)
    layer = hidden_layers(network)[place]
    norm = network.get_submodule(layer.norm) if layer.norm else None
    mixing = isinstance(norm, nn.LayerNorm | nn.GroupNorm)
    for tensor in norm.state_dict().values() if mixing else parts(network, layer)[0]:
        tensor[unit] = 0
    return network(x)


def unread(case, place, unit):
    """Outputs when nobody reads a unit."""
    network, x = drawn(case)
    layer = hidden_layers(network)[place]
    _, reader = parts(network, layer)
    reader[layer.unit_of == unit] = 0
    return network(x)


@each
@torch.no_grad()
def test_a_unit_silenced_at_its_source_is_a_unit_that_nobody_reads(case):
    network, x = drawn(case)
    outputs, layers = network(x), hidden_layers(network)
    assert layers
    for place, layer in enumerate(layers):
        assert layer.units == len(network.state_dict()[f"{layer.incoming}.weight"])
        assert torch.allclose(silenced(case, place, 1), unread(case, place, 1), rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(unread(case, 0, unit), outputs) for unit in range(3))


@each
@torch.no_grad()
def test_units_in_another_order_make_the_same_network(case):
    network, x = drawn(case)
    expected = network(x)
    for layer in hidden_layers(network):
        order = torch.randperm(layer.units)
        own, reader = parts(network, layer)
        before = reader.clone()
        for tensor in own:
            tensor.copy_(tensor[order].clone())
        assert not torch.allclose(network(x), expected)
        for place in range(layer.units):
            reader[layer.unit_of == place] = before[layer.unit_of == order[place]]
        assert torch.allclose(network(x), expected, rtol=1e-9, atol=1e-12)


@each
@torch.no_grad()
def test_the_reader_reads_as_many_features_as_units_are_named_for(case):
    network, x = drawn(case)
    layers = hidden_layers(network)
    with recorded_inputs(network, [layer.name for layer in layers]) as recorded:
        network(x)
    for layer in layers:
        axis = 1 if isinstance(network.get_submodule(layer.name), nn.Conv2d) else -1
        assert recorded[layer.name].shape[axis] == len(layer.unit_of)
        assert layer.unit_of.dtype == torch.int64
        assert torch.equal(layer.unit_of.unique(), torch.arange(layer.units))


def test_units_of_a_flattened_convolution_are_told_by_hand():
    first, second, third = hidden_layers(ConvNet((2, 3), 3, 1, 8, 5, 4))
    assert (first.incoming, first.name, second.incoming, second.name) == (
        "layers.0",
        "layers.3",
        "layers.3",
        "layers.7",
    )
    assert first.unit_of.tolist() == [0, 1]
    assert second.unit_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (third.name, third.units) == ("layers.9", 5)
    _, flattened, linear = hidden_layers(ConvNet((2, 3), 3, 1, 8, 2, 4, activation="crelu", layer_norm=True))
    assert flattened.unit_of.tolist() == 2 * ([0] * 4 + [1] * 4 + [2] * 4)
    assert linear.unit_of.tolist() == [0, 1, 0, 1]
    assert (flattened.norm, linear.norm) == ("layers.3_norm", "layers.7_norm")


def test_hidden_layers_are_named_in_forward_order():
    def names(network):
        return [(layer.incoming, layer.norm, layer.name) for layer in hidden_layers(network)]

    assert names(MLP([4, 3, 3, 2])) == [("layers.0", None, "layers.2"), ("layers.2", None, "layers.4")]
    assert names(MLP([4, 3, 2], layer_norm=True)) == [("layers.0", "layers.0_norm", "layers.2")]
    assert names(MLP([4, 2])) == []
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert names(ResNet18(2)) == [(f"{block}.conv1", f"{block}.bn1", f"{block}.conv2") for block in blocks]
    assert names(ViT(width=4, depth=2)) == [
        (f"blocks.{i}.mlp.expand", None, f"blocks.{i}.mlp.contract") for i in (0, 1)
    ]
    assert hidden_layers(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))) == ()


@each
def test_every_parameter_and_buffer_belongs_to_one_module(case):
    network, _ = drawn(case)
    groups = modules_from_the_top(network)
    for name in network.state_dict():
        holders = [path for group in groups for path in group if name.startswith(f"{path}.")]
        assert len(holders) == 1, name
    paths = [path for group in groups for path in group]
    assert len(paths) == len({*paths})
    assert all(any(name.startswith(f"{path}.") for name in network.state_dict()) for path in paths)


def test_modules_are_those_of_berariu_2021():
    six = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",), ("fc",))
    assert modules_from_the_top(ResNet18(2)) == six
    assert modules_from_the_top(CifarResNet()) == (*six[:4], ("linear",))
    normed = (("layers.0", "layers.0_norm"), ("layers.2",))
    assert modules_from_the_top(MLP([3, 2, 2], layer_norm=True)) == normed
    assert modules_from_the_top(CharTransformer(width=4, depth=1)) == (
        ("tokens", "positions"),
        ("blocks.0",),
        ("norm", "head"),
    )
    with pytest.raises(UsageError, match="got Linear"):
        modules_from_the_top(nn.Linear(2, 2))


@each
@torch.no_grad()
def test_stacked_copies_under_vmap_are_each_network_alone(case):
    network, x = drawn(case)
    other, _ = drawn(case)
    for parameter in other.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    states = [dict(made.named_parameters()) | dict(made.named_buffers()) for made in (network, other)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    together = vmap(lambda state: functional_call(network, state, (x,)))(stacked)
    for outputs, made in zip(together, (network, other), strict=True):
        assert torch.allclose(outputs, made(x), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(together[0], together[1])


DIGIT, PHOTO, TEXT = torch.zeros(1, 8, 8), torch.zeros(3, 32, 32), torch.zeros(5, dtype=torch.int64)
SETTINGS = [
    ({"name": "mlp-relu"}, DIGIT, {"widths": [64, 100, 100, 7]}),
    ({"name": "mlp-relu", "hidden": []}, DIGIT, {"widths": [64, 7]}),
    ({"name": "mlp-tanh", "hidden": (5,), "bias": False}, torch.zeros(4), {"widths": [4, 5, 7], "bias": False}),
    ({"name": "mlp-crelu", "hidden": [5, 4], "layer_norm": True}, DIGIT, {"widths": [64, 5, 4, 7], "layer_norm": True}),
    ({"name": "convnet"}, DIGIT, {"in_channels": 1, "image_size": 8, "classes": 7}),
    (
        {"name": "convnet-strided", "channels": [16, 16], "kernel": 5, "hidden": 100, "activation": "crelu"},
        PHOTO,
        {"channels": [16, 16], "in_channels": 3, "image_size": 32, "activation": "crelu"},
    ),
    ({"name": "resnet18", "width": 2, "depth": 1}, DIGIT, {"in_channels": 1, "classes": 7, "width": 2}),
    ({"name": "resnet18", "width": 2, "max_pool": True, "stem": None}, PHOTO, {"max_pool": True}),
    ({"name": "resnet18-no-pool", "width": 2, "stem": "imagenet"}, PHOTO, {"max_pool": False}),
    ({"name": "resnet20-cifar", "shortcut": "projection"}, PHOTO, {"blocks": 3, "classes": 7}),
    ({"name": "vit", "width": 8, "heads": 2, "patch": 2}, DIGIT, {"patch": 2, "image_size": 8, "in_channels": 1}),
    ({"name": "char-transformer", "width": 8, "heads": 4, "depth": 1}, TEXT, {"vocabulary": 7, "context": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "given", "expected"), SETTINGS)
def test_a_setting_and_an_example_give_a_network_that_its_checkpoint_gives_back(tmp_path, settings, given, expected):
    made = blueprint(settings, given, 7)
    assert expected.items() <= dict(made.architecture).items()
    assert json.loads(json.dumps(made.architecture)) == made.architecture
    torch.manual_seed(3)
    network = made.build().eval()
    torch.manual_seed(3)
    name, *_ = settings.values()
    again = named_architectures()[name](**{k: v for k, v in made.architecture.items() if k != "name"})
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())

    write_checkpoint(tmp_path / "net.safetensors", network.state_dict(), {"architecture": made.architecture})
    file = read_checkpoint(tmp_path / "net.safetensors")
    loaded = load_network(file.state, identify(file).build()).model.eval()
    batch = torch.stack([given, given])
    assert network(batch).shape == ((2, 5, 7) if given is TEXT else (2, 7))
    assert torch.equal(loaded(batch), network(batch))


def test_every_named_network_has_a_blueprint():
    for name in named_architectures():
        network = blueprint({"name": name}, TEXT if name == "char-transformer" else PHOTO, 7).build
        with torch.device("meta"):
            assert isinstance(list(network().modules())[-1], nn.Linear)


def test_a_digit_of_8x8_is_read_by_every_network_but_those_of_cifar_and_text():
    small = {"resnet18": {"width": 2}, "vit": {"width": 4, "heads": 2}}
    for name in named_architectures():
        settings = {"name": name, **small.get(name.partition("-")[0], {})}
        if name.endswith("-cifar") or name == "char-transformer":
            with pytest.raises(UsageError):
                blueprint(settings, DIGIT, 10)
        else:
            assert blueprint(settings, DIGIT, 10).build().eval()(DIGIT[None]).shape == (1, 10)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"name": "mlp-relu", "width": 3}, DIGIT, "settings of mlp-relu are hidden, bias, layer_norm; got width"),
        ({"name": "mlp-relu", "activation": "tanh"}, DIGIT, "got activation, which its name"),
        ({"name": "convnet", "image_size": 8}, DIGIT, "got image_size"),
        (
            {"name": "resnet18-no-pool", "max_pool": True},
            DIGIT,
            "settings of resnet18-no-pool are width, depth, stem; got",
        ),
        ({"name": "mlp-relu", "hidden": 100}, DIGIT, "hidden of mlp-relu should be a list of whole numbers.*got 100"),
        ({"name": "mlp-relu", "hidden": [0]}, DIGIT, r"got \[0\]"),
        ({"name": "vit", "heads": True}, DIGIT, "heads of vit should be a whole number of at least 1; got True"),
        ({"name": "convnet", "layer_norm": 1}, DIGIT, "layer_norm of convnet should be true or false; got 1"),
        ({"name": "convnet", "activation": "swish"}, DIGIT, "activation out of relu.*got 'swish'"),
        ({"name": "vit", "heads": 3}, DIGIT, "heads that divide its width"),
        ({"name": "vit", "patch": 3}, DIGIT, "patches of side 3 divide"),
        ({"name": "convnet"}, torch.zeros(1, 6, 6), "halved"),
        ({"name": "convnet"}, torch.zeros(1, 8, 4), "square floating-point images"),
        ({"name": "resnet18"}, torch.zeros(20), r"resnet18 reads .*got examples of shape \(20,\).*choose mlp-relu"),
        ({"name": "resnet20-cifar"}, DIGIT, r"3x32x32, got examples of shape \(1, 8, 8\).*choose resnet18"),
        ({"name": "char-transformer"}, DIGIT, "sequences of int64 tokens"),
        ({"name": "mlp-relu"}, TEXT, "for text choose char-transformer"),
        ({"name": "mlp-relu"}, torch.tensor(1.0), "at least one axis"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(settings, given, message):
    with pytest.raises(UsageError, match=message):
        blueprint(settings, given, 7)


def test_names_that_do_not_exist_and_data_without_classes_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'mlp-relu'"):
        blueprint({"name": "mlp-rely"}, DIGIT, 7)
    with pytest.raises(UnknownNameError):
        blueprint({"hidden": [3]}, DIGIT, 7)
    with pytest.raises(UsageError, match="at least one output, got 0"):
        blueprint({"name": "mlp-relu"}, DIGIT, 0)


def test_a_blueprint_draws_nothing_and_leaves_its_settings_alone():
    settings = {"name": "mlp-relu", "hidden": [3]}
    before = torch.get_rng_state()
    blueprint(settings, DIGIT, 7)
    assert torch.equal(before, torch.get_rng_state())
    assert settings == {"name": "mlp-relu", "hidden": [3]}


def test_another_activation_is_another_name_of_an_mlp_and_a_setting_of_a_convnet():
    settings = {"name": "mlp-relu", "hidden": [3]}
    assert with_activation(settings, "crelu") == {"name": "mlp-crelu", "hidden": [3]}
    assert settings["name"] == "mlp-relu"
    assert with_activation({"name": "convnet"}, "tanh") == {"name": "convnet", "activation": "tanh"}
    for name in ("resnet18", "resnet20-cifar", "vit", "char-transformer"):
        with pytest.raises(UsageError, match=f"activation of {name} cannot be chosen"):
            with_activation({"name": name}, "crelu")
    with pytest.raises(UnknownNameError, match="activation named 'swish'"):
        with_activation(settings, "swish")
    with pytest.raises(UnknownNameError, match="model named 'mlp'"):
        with_activation({"name": "mlp"}, "relu")


def test_layer_norm_is_added_where_there_is_none():
    assert with_layer_norm({"name": "mlp-tanh", "hidden": [3]}) == {
        "name": "mlp-tanh",
        "hidden": [3],
        "layer_norm": True,
    }
    assert with_layer_norm({"name": "convnet-strided"})["layer_norm"] is True
    for name, own in (("resnet18", "BatchNorm"), ("resnet20-cifar", "BatchNorm"), ("vit", "LayerNorm")):
        with pytest.raises(UsageError, match=f"{name} has {own} already"):
            with_layer_norm({"name": name})
    made = blueprint(with_layer_norm(with_activation({"name": "mlp-relu", "hidden": [3]}, "crelu")), DIGIT, 7)
    assert [tuple(p.shape) for p in made.build().parameters()] == [(3, 64), (3,), (3,), (3,), (7, 6), (7,)]
