import gzip
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from plasticity_probe.checkpoints.architectures import (
    architecture_named,
    identify,
    load_network,
    match_architectures,
    named_architectures,
)
from plasticity_probe.checkpoints.formats import read_checkpoint, write_checkpoint
from plasticity_probe.checkpoints.networks import MLP, CifarResNet, ConvNet, ResNet18
from plasticity_probe.checkpoints.transformers import CharTransformer, ViT
from plasticity_probe.errors import CheckpointError, UnknownNameError, UsageError

SHARED = os.environ.get("PLASTICITY_PROBE_SHARED")
needs_shared = pytest.mark.skipif(SHARED is None, reason="PLASTICITY_PROBE_SHARED is not set")


def names(found):
    return [architecture.name for architecture in found]


def states_equal(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def foreign(tmp_path, state):
    torch.save(state, tmp_path / "net.pt")
    return read_checkpoint(tmp_path / "net.pt")


def shapes_only(build):
    with torch.device("meta"):
        return build().state_dict()


MLPS = ["mlp-relu", "mlp-leaky_relu", "mlp-tanh", "mlp-identity"]
FITS = [
    (lambda: CifarResNet(3), ["resnet20-cifar"]),
    (lambda: CifarResNet(9, "projection", 100), ["resnet56-cifar"]),
    (lambda: CifarResNet(4), []),
    (lambda: ResNet18(width=8), ["resnet18", "resnet18-max-pool"]),
    (lambda: ResNet18(width=8, depth=3, stem="imagenet", classes=7), ["resnet18", "resnet18-no-pool"]),
    (lambda: MLP([4, 3, 2]), MLPS),
    (lambda: MLP([4, 2]), ["mlp-relu"]),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), MLPS),
    (lambda: nn.Sequential(OrderedDict(fc1=nn.Linear(6, 5), fc2=nn.Linear(5, 4), fc10=nn.Linear(4, 2))), MLPS),
    (lambda: nn.Sequential(OrderedDict(linear1=nn.Linear(6, 5, bias=False), linear2=nn.Linear(5, 4, bias=False))), MLPS),
    (lambda: nn.Sequential(OrderedDict(net=nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))), MLPS),
    (lambda: ConvNet(), ["convnet", "convnet-strided"]),
    (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(4, 2)), []),
    (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), []),
    (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2, bias=False)), []),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, (3, 5)), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 2)), []),
    (lambda: nn.LSTM(3, 4), []),
    (lambda: MLP([4, 3, 2], layer_norm=True), MLPS),
    (lambda: MLP([4, 3, 5, 2], "crelu"), ["mlp-crelu"]),
    (lambda: MLP([4, 3, 5, 2], "crelu", bias=False, layer_norm=True), ["mlp-crelu"]),
    (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(10, 2)), ["mlp-crelu"]),
    (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(10, 3), nn.Linear(3, 2)), []),
    (lambda: ConvNet(activation="crelu"), ["convnet", "convnet-strided"]),
    (lambda: ConvNet(layer_norm=True), ["convnet", "convnet-strided"]),
    (lambda: ConvNet((4,), 3, 1, 8, 5, 3, "stride", activation="crelu", layer_norm=True), ["convnet", "convnet-strided"]),
    (lambda: ViT(2, 4, 1, 2, 8, 1, 3), ["vit"] * 3),
    (lambda: ViT(2, 1, 1, 1, 8, 1, 3), ["vit"]),
    (lambda: CharTransformer(7, 5, 6, 2, 3), ["char-transformer"] * 4),
]  # fmt: skip


@pytest.mark.parametrize(("build", "expected"), FITS)
def test_all_architectures_that_fit_are_found(build, expected):
    assert names(match_architectures(shapes_only(build))) == expected


@pytest.mark.parametrize(("build", "expected"), FITS)
def test_what_fits_is_built_with_the_same_names_and_shapes(build, expected):
    state = build().state_dict()
    for architecture in match_architectures(state):
        loaded = load_network(state, architecture.build())
        assert (loaded.missing, loaded.unexpected) == ((), ())
        assert states_equal(
            loaded.model.state_dict(), {name.removeprefix("net."): value for name, value in state.items()}
        )


def test_foreign_mlp_computes_what_it_computed():
    torch.manual_seed(0)
    source = nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)
    ).eval()
    x = torch.randn(3, 6)
    for name in ("mlp-tanh", "mlp-relu"):
        found = load_network(source.state_dict(), architecture_named(name, source.state_dict()).build()).model
        assert torch.allclose(found(x), source(x)) == (name == "mlp-tanh")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.", "module.net._orig_mod."])
def test_prefixes_and_missing_batch_counters_do_not_matter(prefix):
    state = shapes_only(CifarResNet)
    old = {prefix + name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert names(match_architectures(old)) == ["resnet20-cifar"]
    assert names(match_architectures({**old, "n_averaged": torch.tensor(3)})) == ["resnet20-cifar"]


@pytest.mark.parametrize("change", ["missing", "surplus", "shape", "buffer", "empty"])
def test_one_difference_and_it_fits_no_more(change):
    state = dict(shapes_only(CifarResNet))
    if change == "missing":
        del state["layer2.1.bn1.bias"]
    elif change == "buffer":
        del state["layer2.1.bn1.running_mean"]
    elif change == "surplus":
        state["layer2.1.scale"] = torch.ones(1)
    else:
        state["layer2.1.conv1.weight"] = torch.ones(32, 32, 1, 1) if change == "shape" else torch.ones(0)
    assert match_architectures(state) == []


def test_names_that_no_module_can_have_fit_nothing():
    assert match_architectures({"children.0.weight": torch.ones(2, 3)}) == []
    assert names(match_architectures({"apply0.weight": torch.ones(2, 3)})) == ["mlp-relu"]
    assert match_architectures({"1" * 5000 + ".weight": torch.ones(2, 3)}) == []
    assert match_architectures({}) == []


def test_identify_one_fit(tmp_path):
    architecture = identify(foreign(tmp_path, CifarResNet(5).state_dict()))
    assert str(architecture) == "resnet32-cifar (blocks=5, shortcut=pad, classes=10)"


def test_identify_several_fits_lists_them_and_the_remedy(tmp_path):
    with pytest.raises(CheckpointError, match=r"mlp-relu.*mlp-leaky_relu.*mlp-tanh.*mlp-identity.*--model NAME"):
        identify(foreign(tmp_path, MLP([4, 3, 2]).state_dict()))


def test_identify_no_fit_names_the_nearest_and_the_remedy(tmp_path):
    state = dict(CifarResNet(3).state_dict())
    state["fc.weight"], state["fc.bias"] = state.pop("linear.weight"), state.pop("linear.bias")
    message = r"known are mlp-relu.*nearest is resnet20-cifar with 114 of its 116 tensors alike.*pkg.module:factory or --model file.py:factory"
    with pytest.raises(CheckpointError, match=message):
        identify(foreign(tmp_path, state))
    with pytest.raises(CheckpointError, match="none has a tensor in common"):
        identify(foreign(tmp_path, {"strange": torch.ones(3)}))


@pytest.mark.parametrize(
    ("declared", "build"),
    [
        ({"name": "mlp-tanh", "widths": [4, 3, 2], "activation": "tanh"}, lambda: MLP([4, 3, 2], "tanh")),
        ({"name": "mlp-tanh"}, lambda: MLP([4, 2], "tanh")),
        ({"name": "convnet-strided", "image_size": 28}, lambda: ConvNet((4, 6), 3, 1, 28, 8, 10, "stride")),
        ({"name": "convnet"}, lambda: ConvNet((4, 6), 3, 1, 28, 8, 10)),
        ({"name": "resnet18-max-pool", "width": 4}, lambda: ResNet18(4, 1, max_pool=True)),
        ({"name": "resnet18", "max_pool": True}, lambda: ResNet18(4, 1, max_pool=True)),
        ({"name": "convnet", "activation": "tanh"}, lambda: ConvNet((4, 6), 3, 1, 28, 8, 10, activation="tanh")),
        ({"name": "mlp-relu", "layer_norm": True}, lambda: MLP([4, 3, 2], layer_norm=True)),
        ({"name": "mlp-relu", "layer_norm": False}, lambda: MLP([4, 3, 2])),
        ({"name": "vit", "heads": 4}, lambda: ViT(2, 8, 1, 4, 8, 1, 3)),
        ({"name": "char-transformer", "heads": 3, "width": 6}, lambda: CharTransformer(7, 5, 6, 2, 3)),
    ],
)
def test_own_metadata_decides_between_what_fits(tmp_path, declared, build):
    model = build()
    write_checkpoint(tmp_path / "net.safetensors", model.state_dict(), {"architecture": declared, "step": 3})
    file = read_checkpoint(tmp_path / "net.safetensors")
    architecture = identify(file)
    assert architecture.name == declared["name"]
    fresh = architecture.build()
    assert repr(fresh) == repr(model)
    assert states_equal(load_network(file.state, fresh).model.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"name": "mlp-relu", "widths": [10**9, 10**9]}, "contradictory metadata"),
        ({"name": "mlp-relu", "activation": "tanh"}, "contradictory metadata"),
        ({"name": "resnet18"}, "does not fit"),
        ({"name": "os.system"}, "unknown architecture"),
        ({"name": ["mlp-relu"]}, "unknown architecture"),
        ("mlp-relu", "unknown architecture"),
    ],
)
def test_own_metadata_cannot_ask_for_another_network(tmp_path, declared, message):
    write_checkpoint(tmp_path / "net.safetensors", MLP([4, 3, 2]).state_dict(), {"architecture": declared})
    with pytest.raises(CheckpointError, match=message):
        identify(read_checkpoint(tmp_path / "net.safetensors"))


SETTINGS = {
    "mlp": {"widths": [6, 5, 4, 3], "bias": False, "layer_norm": True},
    "convnet": {
        "channels": [3, 4],
        "kernel": 5,
        "in_channels": 2,
        "image_size": 8,
        "hidden": 5,
        "classes": 3,
        "layer_norm": True,
    },
    "resnet18": {"width": 2, "depth": 1, "classes": 3, "in_channels": 1, "stem": "imagenet"},
    "vit": {"patch": 2, "width": 12, "depth": 2, "heads": 6, "image_size": 8, "in_channels": 2, "classes": 3},
    "char": {"vocabulary": 7, "context": 5, "width": 12, "depth": 2, "heads": 4},
}
CHOICES = [
    *((name, SETTINGS["mlp"]) for name in [*MLPS, "mlp-crelu"]),
    ("mlp-tanh", {"widths": [6, 3], "layer_norm": True}),
    *(
        (name, SETTINGS["convnet"] | {"activation": activation, "layer_norm": layer_norm})
        for name in ("convnet", "convnet-strided")
        for activation in ("relu", "leaky_relu", "tanh", "identity", "crelu")
        for layer_norm in (False, True)
    ),
    *((name, SETTINGS["resnet18"]) for name in ("resnet18", "resnet18-max-pool", "resnet18-no-pool")),
    ("resnet18", SETTINGS["resnet18"] | {"max_pool": False}),
    ("resnet20-cifar", {"shortcut": "projection", "classes": 3}),
    *(("vit", SETTINGS["vit"] | {"heads": heads}) for heads in (1, 6, 12)),
    *(("char-transformer", SETTINGS["char"] | {"heads": heads}) for heads in (1, 4, 12)),
]


@pytest.mark.parametrize(("name", "settings"), CHOICES)
def test_a_written_network_comes_back_as_the_same_function(tmp_path, name, settings):
    torch.manual_seed(0)
    model = named_architectures()[name](**settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # so that heads and activations matter
    architecture = {"name": name, **settings}
    write_checkpoint(tmp_path / "net.safetensors", model.state_dict(), {"architecture": architecture})
    file = read_checkpoint(tmp_path / "net.safetensors")
    loaded = load_network(file.state, identify(file).build()).model
    x = {
        "mlp": torch.randn(2, 6),
        "convnet": torch.randn(2, 2, 8, 8),
        "resnet18": torch.randn(2, 1, 32, 32),
        "resnet20": torch.randn(2, 3, 32, 32),
        "vit": torch.randn(2, 2, 8, 8),
        "char": torch.randint(7, (2, 5)),
    }[name.partition("-")[0]]
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert repr(loaded) == repr(model)


@pytest.mark.parametrize(
    ("declared", "build"),
    [
        ({"name": "vit", "heads": 3}, lambda: ViT(2, 8, 1, 4, 8, 1, 3)),
        ({"name": "vit", "heads": True}, lambda: ViT(2, 8, 1, 1, 8, 1, 3)),
        ({"name": "vit", "heads": 4.0}, lambda: ViT(2, 8, 1, 4, 8, 1, 3)),
        ({"name": "vit", "heads": 0}, lambda: ViT(2, 8, 1, 4, 8, 1, 3)),
        ({"name": "vit", "heads": [4]}, lambda: ViT(2, 8, 1, 4, 8, 1, 3)),
        ({"name": "vit", "heads": 4, "depth": 10**9}, lambda: ViT(2, 8, 1, 4, 8, 1, 3)),
        ({"name": "convnet", "activation": "crelu"}, lambda: ConvNet((4,), 3, 1, 8, 5, 3)),
        ({"name": "convnet", "activation": "relu"}, lambda: ConvNet((4,), 3, 1, 8, 5, 3, activation="crelu")),
        ({"name": "convnet", "activation": "os.system"}, lambda: ConvNet((4,), 3, 1, 8, 5, 3)),
        ({"name": "convnet", "layer_norm": True}, lambda: ConvNet((4,), 3, 1, 8, 5, 3)),
        ({"name": "mlp-relu", "layer_norm": False}, lambda: MLP([4, 3, 2], layer_norm=True)),
        ({"name": "resnet18-no-pool", "max_pool": True}, lambda: ResNet18(4, 1)),
    ],
)
def test_what_the_tensors_contradict_is_refused(tmp_path, declared, build):
    write_checkpoint(tmp_path / "net.safetensors", build().state_dict(), {"architecture": declared})
    with pytest.raises(CheckpointError, match="contradictory metadata"):
        identify(read_checkpoint(tmp_path / "net.safetensors"))


def test_heads_that_nothing_tells_are_listed_and_not_guessed(tmp_path):
    state = ViT(2, 8, 1, 4, 8, 1, 3).state_dict()
    message = r"several architectures fit.*heads=1\).*heads=2\).*heads=4\).*heads=8\)\. Say which in the metadata"
    with pytest.raises(CheckpointError, match=message):
        identify(foreign(tmp_path, state))
    with pytest.raises(CheckpointError, match=r"vit fits the state dict with several settings.*heads=8\)"):
        architecture_named("vit", state)
    write_checkpoint(tmp_path / "net.safetensors", state, {"architecture": {"name": "vit"}})
    with pytest.raises(CheckpointError, match="vit fits the state dict with several settings"):
        identify(read_checkpoint(tmp_path / "net.safetensors"))


def test_a_convnet_of_crelu_is_not_taken_for_one_of_relu():
    state = ConvNet((4, 6), 3, 1, 8, 5, 3, activation="crelu").state_dict()
    assert architecture_named("convnet", state).settings["activation"] == "crelu"
    assert architecture_named("convnet", ConvNet().state_dict()).settings["activation"] == "relu"
    with pytest.raises(CheckpointError, match="mlp-relu does not fit"):
        architecture_named("mlp-relu", MLP([4, 3, 2], "crelu").state_dict())


def test_transformers_without_their_blocks_or_positions_fit_nothing():
    for network in (ViT(2, 8, 1, 4, 8, 1, 3), CharTransformer(7, 5, 6, 2, 3)):
        state = network.state_dict()
        assert match_architectures({name: t for name, t in state.items() if not name.startswith("blocks")}) == []
        assert match_architectures({name: t for name, t in state.items() if not name.startswith("positions")}) == []
        odd = {**state, "positions.weight": torch.ones(3, 5)}
        assert match_architectures(odd) == []


def test_own_metadata_in_a_foreign_file_decides_nothing(tmp_path):
    saved = {"state_dict": MLP([4, 3, 2]).state_dict(), "architecture": "mlp-relu"}
    with pytest.raises(CheckpointError, match="several architectures fit"):
        identify(foreign(tmp_path, saved))


def test_architecture_named_reads_the_settings_off_the_shapes():
    state = ResNet18(width=4, depth=1, classes=3, in_channels=1, stem="imagenet").state_dict()
    expected = {"width": 4, "depth": 1, "classes": 3, "in_channels": 1, "stem": "imagenet"}
    assert architecture_named("resnet18", state).settings == expected | {"max_pool": True}
    assert architecture_named("resnet18-max-pool", state).settings == expected | {"max_pool": True}
    assert architecture_named("resnet18-no-pool", state).settings == expected | {"max_pool": False}
    with pytest.raises(UnknownNameError, match="resnet18"):
        architecture_named("resnet81", state)
    with pytest.raises(CheckpointError, match=r"resnet20-cifar does not fit.*resnet18"):
        architecture_named("resnet20-cifar", state)


def test_every_name_draws_a_network_with_a_linear_output_layer():
    given = {"mlp": {"widths": [6, 4, 2]}}
    for name, network in named_architectures().items():
        with torch.device("meta"):
            model = network(**given.get(name.partition("-")[0], {}))
        assert isinstance(list(model.modules())[-1], nn.Linear), name


def test_matching_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    match_architectures(shapes_only(CifarResNet))
    assert torch.equal(before, torch.get_rng_state())


def test_load_network_repairs_prefixes_on_either_side():
    torch.manual_seed(0)
    source = MLP([4, 3, 2])
    plain = source.state_dict()
    wrapped = {f"module.{name}": value for name, value in plain.items()} | {"n_averaged": torch.tensor(2)}
    loaded = load_network(wrapped, MLP([4, 3, 2]))
    assert states_equal(loaded.model.state_dict(), plain)
    assert loaded.unexpected == ("n_averaged",)
    model = nn.Sequential(OrderedDict(_orig_mod=MLP([4, 3, 2])))
    for state in (plain, wrapped, {f"model.{name}": value for name, value in plain.items()}):
        loaded = load_network(state, model)
        assert loaded.loaded == tuple(f"_orig_mod.{name}" for name in plain)
        assert states_equal(loaded.model.get_submodule("_orig_mod").state_dict(), plain)


def test_load_network_lists_shapes_that_differ():
    state = {**MLP([4, 5, 2]).state_dict(), "layers.0.weight": torch.ones(3, 4), "layers.0.bias": torch.ones(3)}
    with pytest.raises(
        CheckpointError, match=r"2 of 4 tensors .*layers\.0\.weight expected \(5, 4\), found \(3, 4\)"
    ) as caught:
        load_network(state, MLP([4, 5, 2]))
    assert "layers.0.bias expected (5,), found (3,)" in str(caught.value)
    deep = MLP([4] * 30)
    with pytest.raises(CheckpointError) as caught:
        load_network({name: torch.ones(7) for name in deep.state_dict()}, deep)
    assert str(caught.value).count("expected") == 10


def test_load_network_changes_nothing_when_it_refuses():
    model = MLP([4, 3, 2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {**MLP([4, 3, 2]).state_dict(), "layers.2.bias": torch.ones(7)}
    with pytest.raises(CheckpointError):
        load_network(state, model)
    assert states_equal(before, model.state_dict())


def test_load_network_refuses_what_is_foreign_or_incomplete():
    with pytest.raises(CheckpointError, match=r"no tensor .*layers\.0\.weight.*strange"):
        load_network({"strange": torch.ones(2)}, MLP([4, 3, 2]))
    state = MLP([4, 3, 2]).state_dict()
    del state["layers.2.bias"]
    with pytest.raises(CheckpointError, match=r"lacks 1 parameters of the network: layers\.2\.bias"):
        load_network(state, MLP([4, 3, 2]))
    loaded = load_network(state, MLP([4, 3, 2]), strict=False)
    assert loaded.missing == ("layers.2.bias",)


def test_load_network_allows_missing_buffers_and_surplus_tensors():
    state = dict(CifarResNet().state_dict())
    del state["bn1.num_batches_tracked"], state["bn1.running_mean"]
    loaded = load_network({**state, "loss.weight": torch.ones(1)}, CifarResNet())
    assert loaded.missing == ("bn1.running_mean", "bn1.num_batches_tracked")
    assert loaded.unexpected == ("loss.weight",)


def test_load_network_counts_a_tied_weight_as_loaded():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    loaded = load_network({"embed.weight": torch.ones(4, 3)}, Tied())
    assert loaded.missing == ("head.weight",)
    assert torch.equal(loaded.model.get_parameter("head.weight"), torch.ones(4, 3))


def test_load_network_casts_and_keeps_values_that_are_not_finite():
    state = {name: value.to(torch.bfloat16) for name, value in MLP([4, 3]).state_dict().items()}
    state["layers.0.weight"][0, 0] = float("nan")
    model = load_network(state, MLP([4, 3])).model
    assert model.state_dict()["layers.0.weight"].dtype == torch.float32
    assert model.state_dict()["layers.0.weight"].isnan().sum() == 1


def test_load_network_refuses_parameters_without_a_shape():
    with pytest.raises(CheckpointError, match="run one batch"):
        load_network({"weight": torch.ones(2, 3)}, nn.LazyLinear(2))


def test_networks_refuse_nonsense_as_usage_errors():
    with pytest.raises(UsageError):
        named_architectures()["mlp-relu"](widths=[3])


@needs_shared
def test_published_resnet20_is_identified_and_scores_what_it_should():
    root = Path(str(SHARED))
    file = read_checkpoint(root / "checkpoints/resnet20_cifar10/resnet20-12fca82f.th")
    assert file.format == "torch-legacy"
    assert file.metadata["unwrapped"] == "state_dict"
    assert round(file.metadata["best_prec1"], 2) == 91.78
    assert names(match_architectures(file.state)) == ["resnet20-cifar"]
    loaded = load_network(file.state, identify(file).build())
    assert loaded.unexpected == ()
    assert all(name.endswith("num_batches_tracked") for name in loaded.missing)
    with np.load(root / "cifar10/cifar10_lossless.npz", allow_pickle=False) as data:
        images, labels = torch.from_numpy(data["test_x"]).float() / 255, torch.from_numpy(data["test_y"]).long()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        predicted = loaded.model.eval()((images - mean[:, None, None]) / std[:, None, None]).argmax(1)
    assert (int((predicted == labels).sum()), len(labels)) == (932, 1017)


@needs_shared
def test_published_mnist_network_is_refused_by_shapes_alone_and_right_by_name():
    root = Path(str(SHARED))
    file = read_checkpoint(root / "checkpoints/convex_adversarial_mnist/mnist.pth")
    with pytest.raises(CheckpointError, match=r"several architectures fit.*convnet .*convnet-strided"):
        identify(file)
    images, labels = (
        gzip.decompress((root / f"mnist/t10k-{kind}-ubyte.gz").read_bytes()) for kind in ("images-idx3", "labels-idx1")
    )
    x = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).reshape(-1, 1, 28, 28).float() / 255
    y = torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8)

    def accuracy(name, count):
        model = load_network(file.state, architecture_named(name, file.state).build()).model.eval()
        with torch.no_grad():
            return float((model(x[:count]).argmax(1) == y[:count]).double().mean())

    assert accuracy("convnet-strided", 10_000) == pytest.approx(0.9820)
    assert accuracy("convnet", 500) < 0.9
