import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plasticity_probe.errors import UnknownNameError
from plasticity_probe.training.feature_world import FeatureWorld
from plasticity_probe.training.loop import train
from plasticity_probe.training.protocols import PROTOCOLS, protocol_named, variant_named
from plasticity_probe.training.published.protocol import Protocol
from plasticity_probe.training.remedies import REMEDIES
from plasticity_probe.training.remedies.resets import ResetModules
from plasticity_probe.training.settings import Setting, read, written
from plasticity_probe.training.streams import STREAMS

TRAINED = {name: protocol for name, protocol in PROTOCOLS.items() if isinstance(protocol.setting, Setting)}
VARIANTS = [(name, variant) for name, protocol in TRAINED.items() for variant in ("", *protocol.variants)]


def setting_of(name: str, variant: str = "", scale: str = "full") -> Setting:
    protocol = TRAINED[name]
    assert isinstance(protocol.setting, Setting)
    small = {key: value for key, value in protocol.small.items() if key != "seeds"} if scale == "small" else {}
    return protocol.setting.changed(variant_named(protocol, variant)).changed(small)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_is_a_setting_at_both_scales_and_survives_json(name: str, variant: str) -> None:
    for scale in ("full", "small"):
        setting = setting_of(name, variant, scale)
        assert read(json.loads(json.dumps(written(setting)))) == setting
    assert variant in ("", "relu") or setting_of(name, variant) != setting_of(name) or _is_the_default(name, variant)


def _is_the_default(name: str, variant: str) -> bool:
    return (name, variant) in {
        ("berariu-smooth-transition", "gamma-0.5"),
        ("berariu-reset", "last-4"),
        ("berariu-width-depth", "w64-d2"),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_protocol_says_where_it_comes_from_and_what_is_our_choice(protocol: Protocol) -> None:
    assert all(len(text) > 8 for text in (protocol.source, protocol.published, protocol.cost, *protocol.ours))
    assert protocol.ours
    assert protocol.seeds >= 1
    assert isinstance(protocol.setting, FeatureWorld) or protocol.small


def test_every_stream_that_there_is_belongs_to_a_protocol() -> None:
    used = {setting_of(name, variant).stream.name for name, variant in VARIANTS}
    assert used == set(STREAMS)


def test_the_protocols_asked_for_are_there() -> None:
    assert {
        "lewandowski-random-label-mnist", "kumar-random-label-mnist", "dohare-permuted-mnist", "berariu-two-stage", "berariu-multi-stage",
        "berariu-reset", "berariu-width-depth", "ash-adams-warm-start", "dash-growing", "dash-synthetic", "slowly-changing-regression",
        "berariu-smooth-transition", "dohare-continual-imagenet", "dohare-class-incremental", "lee-warm-start",
    } <= set(PROTOCOLS)  # fmt: skip


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    with pytest.raises(UnknownNameError, match="berariu-two-stage"):
        protocol_named("berariu-two-stages")
    with pytest.raises(UnknownNameError, match="tanh"):
        variant_named(protocol_named("lewandowski-random-label-mnist"), "tan")


def test_published_numbers_are_those_of_the_settings() -> None:
    """The settings against the papers' figures, written down a second time."""
    kumar = setting_of("kumar-random-label-mnist")
    assert (kumar.stream.tasks, kumar.training.epochs, kumar.training.batch) == (50, (400,), 16)
    assert kumar.network == {"name": "mlp-relu", "hidden": [100, 100]}
    two = setting_of("berariu-two-stage").training
    assert (two.epochs, two.batch, two.learning_rate, two.optimizer, two.test_last) == (
        (350, 500),
        128,
        1e-3,
        "adam",
        100,
    )
    dohare = setting_of("dohare-class-incremental").training
    assert [round(dohare.step_size(epoch, 1.0), 6) for epoch in (0, 60, 120, 160)] == [0.1, 0.02, 0.004, 0.0008]
    ash = setting_of("ash-adams-warm-start")
    assert (ash.training.until, ash.network["width"], ash.data.normalise) == (0.99, 16, "symmetric")
    dash = setting_of("dash-growing").training
    assert (dash.until, dash.batch, dash.learning_rate, dash.optimizer_settings) == (
        0.999,
        128,
        1e-3,
        {"momentum": 0.9},
    )
    reset = setting_of("berariu-reset", "last-5")
    assert ResetModules(last=5) in reset.remedies


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    draws = np.random.default_rng(0)
    for name, shape in (("grey", (1, 12, 12)), ("colour", (3, 32, 32))):
        images = draws.integers(0, 256, (60, *shape), dtype=np.uint8)
        labels = np.arange(60) % 10
        np.savez(folder / f"{name}.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return {path.stem: str(path) for path in folder.iterdir()}


def tiny(setting: Setting, data: dict[str, str]) -> Setting:
    """A setting small enough for a second: few tasks, one epoch, narrow networks, stand-in data."""
    stand_in = {"mnist": "grey", "digits": "grey", "": "", "tinyshakespeare.txt": "text"}.get(
        setting.data.name, "colour"
    )
    changes: dict[str, Any] = {
        "data.name": data[stand_in] if stand_in else "",
        "data.examples": None,
        "data.length": 8,
        "training.epochs": 1,
        "training.batch": 16,
        "training.milestones": (),
        "training.test_last": 1,
        "control_every": 1,
        "checkpoint_every": 1,
        "inside": 1,
    }
    fields = vars(setting.stream)
    limits = {"examples": 24, "train_per_class": 3, "test_per_class": 1, "classes_per_task": 3}
    changes |= {f"stream.{key}": value for key, value in limits.items() if fields.get(key) is not None}
    if setting.stream.name not in ("two-stage", "smooth-transition", "noisy-stages", "random-subset"):
        changes["stream.tasks"] = 2
    if str(setting.network["name"]).startswith("resnet"):
        changes |= {"network.width": 4, "network.depth": 1}
    if "channels" in setting.network:
        changes["network.channels"] = [4, 4]
    if str(setting.network["name"]).startswith("mlp") and len(setting.network["hidden"]) > 0:
        changes["network.hidden"] = [8] * len(setting.network["hidden"])
    return setting.changed(changes)


@pytest.mark.parametrize("name", TRAINED)
def test_every_protocol_runs_small(tmp_path: Path, data: dict[str, str], name: str) -> None:
    setting = tiny(setting_of(name), data)
    run = train(setting, range(2), tmp_path / "x", protocol=name)
    tasks = setting.stream.tasks
    expected = {(seed, task, "run") for seed in range(2) for task in range(tasks)}
    expected |= {(seed, task, "control") for seed in range(2) for task in range(1, tasks)}
    assert {(o.seed, o.task, o.network) for o in run.outcomes} == expected
    assert all(o.status == "ok" and o.updates > 0 for o in run.outcomes)
    assert len(list((tmp_path / "x").rglob("*.safetensors"))) >= 2 * (tasks + 1)


def test_every_remedy_runs_with_a_stream_by_name(tmp_path: Path, data: dict[str, str]) -> None:
    setting = tiny(setting_of("kumar-random-label-mnist"), data)
    for name, remedy in REMEDIES.items():
        run = train(setting.changed({"remedies": (remedy(),)}), range(2), tmp_path / name)
        assert {o.status for o in run.outcomes} == {"ok"}, name


@pytest.mark.parametrize(
    "network",
    [
        {"name": "mlp-tanh", "hidden": [6]},
        {"name": "mlp-relu", "hidden": [6], "layer_norm": True},
        {"name": "mlp-crelu", "hidden": [6]},
        {"name": "convnet", "channels": [4, 4], "hidden": 8},
        {"name": "resnet18", "width": 4, "depth": 1},
        {"name": "resnet20-cifar"},
        {"name": "vit", "patch": 8, "width": 16, "depth": 1, "heads": 2},
    ],
    ids=lambda network: network["name"] + ("-norm" if "layer_norm" in network else ""),
)
def test_every_network_learns_a_stream_of_images(tmp_path: Path, data: dict[str, str], network: dict[str, Any]) -> None:
    setting = tiny(setting_of("lee-warm-start"), data).changed({"network": network})
    run = train(setting, [0], tmp_path / "x")
    assert {o.status for o in run.outcomes} == {"ok"}
