import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.training.remedies import REMEDIES, remedy_named
from plasticity_probe.training.remedies.remedy import Remedy
from plasticity_probe.training.settings import (
    AUGMENTATIONS,
    OPTIMIZERS,
    Data,
    Setting,
    Training,
    read,
    stream_named,
    written,
)
from plasticity_probe.training.streams import STREAMS
from plasticity_probe.training.streams.growing import NoisyStages, TwoStage
from plasticity_probe.training.streams.shifting import PermutedLabels, PermutedPixels, RandomLabels

OF_STREAMS: Mapping[str, Mapping[str, Any]] = {
    "random-labels": {"tasks": 4, "examples": 10},
    "permuted-pixels": {"tasks": 4, "redraw": True},
    "permuted-labels": {"tasks": 4},
    "permuted-alphabet": {"tasks": 2, "length": 5},
    "class-incremental": {"tasks": 2, "classes_per_task": 3, "cumulative": False},
    "class-pairs": {"tasks": 3, "train_per_class": 7},
    "multi-stage": {"tasks": 3, "iid_fraction": 0.25},
    "growing-chunks": {"tasks": 3},
    "two-stage": {"fraction": 0.1, "held_out": 0.2},
    "smooth-transition": {"gamma": 0.9},
    "noisy-stages": {"shares": (0.1, 0.2, 0.7), "label_noise": (0.5, 0.25, 0.0), "noise_on": "all"},
    "slowly-changing-regression": {"tasks": 2, "rule": "redraw_all"},
    "random-subset": {"share": 0.5, "label_noise": 0.25, "noise_seed": 3},
}
SOME_REMEDIES: tuple[tuple[Remedy, ...], ...] = (
    (),
    (remedy_named("l2-init", coefficient=1e-3),),
    (remedy_named("shrink-perturb", shrink=0.5, perturb=0.125), remedy_named("fresh-optimizer")),
    tuple(remedy_named(name) for name in ("layer-norm", "redo", "dash", "hare-tortoise")),
)
PLAIN = Setting(RandomLabels(tasks=4))


@pytest.mark.parametrize("remedies", SOME_REMEDIES)
@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_with_remedies_is_json_and_back(name: str, remedies: tuple[Remedy, ...]) -> None:
    setting = Setting(stream_named(name, **OF_STREAMS[name]), remedies=remedies)
    entry = json.loads(json.dumps(written(setting), allow_nan=False))
    assert read(entry) == setting
    assert written(read(entry)) == entry
    assert entry["stream"].items() >= {"name": name, **json.loads(json.dumps(OF_STREAMS[name]))}.items()


@pytest.mark.parametrize("name", REMEDIES)
def test_every_remedy_is_json_and_back(name: str) -> None:
    setting = Setting(TwoStage(), remedies=(remedy_named(name),))
    assert read(written(setting)) == setting


POSITIVE = st.floats(1e-8, 1e8)
TRAININGS = st.builds(
    Training,
    epochs=st.lists(st.integers(1, 500), min_size=1, max_size=4).map(tuple),
    batch=st.integers(1, 4096),
    learning_rate=POSITIVE,
    optimizer=st.sampled_from(["adam", "adamw"]),
    optimizer_settings=st.sampled_from([{}, {"betas": (0.5, 0.75)}, {"weight_decay": 0.5, "amsgrad": True}]),
    milestones=st.lists(st.integers(0, 500), max_size=3).map(tuple),
    factor=POSITIVE,
    warm_up=st.integers(0, 10),
    until=st.none() | st.floats(0, 1, exclude_min=True),
    clip=st.none() | POSITIVE,
    augmentation=st.sampled_from(AUGMENTATIONS),
    threshold=st.floats(-1e3, 1e3),
    test_last=st.integers(1, 100),
    bf16=st.booleans(),
    channels_last=st.booleans(),
)
DATA = st.builds(
    Data,
    name=st.text(max_size=20),
    normalise=st.sampled_from(["none", "standard", "symmetric"]),
    examples=st.none() | st.integers(1, 10**9),
    length=st.integers(2, 10**4),
)


@settings(max_examples=60)
@given(TRAININGS, DATA, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_any_setting_is_json_and_back(training: Training, data: Data, control: int, kept: int, inside: int) -> None:
    network = {"name": "mlp-tanh", "hidden": [3, 4], "bias": False}
    setting = Setting(RandomLabels(tasks=2), data, network, training, (), control, kept, inside)
    assert read(json.loads(json.dumps(written(setting)))) == setting


def test_settings_of_an_optimizer_may_be_any_mapping_and_are_written_in_lists() -> None:
    setting = dataclasses.replace(PLAIN, training=Training(optimizer_settings=MappingProxyType({"betas": (0.8, 0.9)})))
    assert written(setting)["training"]["optimizer_settings"] == {"betas": [0.8, 0.9]}
    assert read(written(setting)).training.optimizer_settings == {"betas": (0.8, 0.9)}


def test_a_written_setting_is_a_copy() -> None:
    entry = written(PLAIN)
    entry["network"]["hidden"].append(5)
    entry["training"]["optimizer_settings"]["amsgrad"] = True
    assert Setting(RandomLabels(tasks=4)) == PLAIN


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    entry = written(dataclasses.replace(PLAIN, remedies=(remedy_named("l2"),)))
    change(entry)
    return entry


@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(Setting)])
@pytest.mark.parametrize(
    "value", [None, 1.5, "x", [], [3], {}, {"name": 3}, {"x": 1}, [{"name": None}], [{}], True, -1]
)
def test_a_part_that_is_nonsense_is_refused(part: str, value: Any) -> None:
    fine = (part == "remedies" and value == []) or (part in ("data", "training", "network") and value == {})
    fine = fine or (part == "network" and isinstance(value, dict))
    entry = broken(lambda whole: whole.update({part: value}))
    if fine:
        read(entry)
    else:
        with pytest.raises(UsageError):
            read(entry)


@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(Setting)])
def test_a_part_that_is_missing_is_named(part: str) -> None:
    with pytest.raises(UsageError, match=rf"none of the name {part}$"):
        read(broken(lambda whole: whole.pop(part)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(more=1), "a setting has no 'more'; it has stream, data"),
        (lambda e: e["stream"].pop("name"), 'a stream is written as {"name"'),
        (lambda e: e["stream"].pop("tasks"), "the stream random-labels needs a value of tasks"),
        (lambda e: e["stream"].update(tasks="4"), "tasks should be a whole number, got '4'"),
        (lambda e: e["stream"].update(tasks=2.5), "tasks should be a whole number, got 2.5"),
        (lambda e: e["stream"].update(tasks=0), "tasks >= 1"),
        (lambda e: e["stream"].update(taks=4), "the stream random-labels has no 'taks'; it has tasks, examples"),
        (lambda e: e["data"].update(nam="x"), "data has no 'nam'; it has name, normalise, examples, length"),
        (lambda e: e["data"].update(normalise="big"), "normalise should be 'none' or 'standard' or 'symmetric', got 'big'"),
        (lambda e: e["data"].update(normalise=["none"]), "normalise should be"),
        (lambda e: e["data"].update(examples=0), "at least one example"),
        (lambda e: e["data"].update(length=1), "at least two characters"),
        (lambda e: e["training"].update(epochs=5), "epochs should be a list of a whole number, got 5"),
        (lambda e: e["training"].update(epochs=[5, None]), "epochs should be a list"),
        (lambda e: e["training"].update(epochs=[]), "at least one each"),
        (lambda e: e["training"].update(batch=True), "batch should be a whole number, got True"),
        (lambda e: e["training"].update(bf16=1), "bf16 should be true or false, got 1"),
        (lambda e: e["training"].update(learning_rate="1"), "learning_rate should be a number"),
        (lambda e: e["training"].update(learning_rate=math.nan), "positive and finite"),
        (lambda e: e["training"].update(optimizer=["adam"]), "optimizer should be a text"),
        (lambda e: e["training"].update(optimizer_settings=3), "optimizer_settings should be an object, got 3"),
        (lambda e: e["training"].update(optimizer_settings={"beta": 1}), r"adam cannot take \{'beta': 1\}"),
        (lambda e: e["training"].update(lr=1), "training has no 'lr'"),
        (lambda e: e["remedies"].append({"name": "l2"}), "each remedy can act once; got l2, l2"),
        (lambda e: e["remedies"].append("l2"), "a remedy should be an object"),
        (lambda e: e["remedies"].append({"coefficient": 1}), "a remedy is written as"),
        (lambda e: e["remedies"][0].update(coefficient="much"), "the remedy l2 cannot be so: coefficient"),
        (lambda e: e.update(remedies={"name": "l2"}), "remedies should be a list"),
        (lambda e: e.update(inside=-1), "inside is a number from 0 on, 0 for never; got -1"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_name(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(broken(change))


@pytest.mark.parametrize("entry", [None, 5, "stream", [], [["stream", 1]], {}, {1: 2}])
def test_what_is_no_object_is_no_setting(entry: Any) -> None:
    with pytest.raises(UsageError, match="a setting"):
        read(entry)


@pytest.mark.parametrize(("part", "name"), [("stream", "random-label"), ("remedies", "l2-inti"), ("training", "adamm")])
def test_unknown_names_say_what_was_meant(part: str, name: str) -> None:
    value: Any = {"stream": {"name": name}, "remedies": [{"name": name}], "training": {"optimizer": name}}[part]
    with pytest.raises(UnknownNameError, match="Did you mean"):
        read(broken(lambda whole: whole.update({part: value})))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    (part, name)
    for part, values in written(dataclasses.replace(PLAIN, remedies=())).items()
    for name in ([None, *values] if isinstance(values, dict) else [None])
]


@settings(max_examples=200)
@given(st.sampled_from(PLACES), JSON)
def test_whatever_stands_anywhere_is_read_or_refused_in_words(place: tuple[str, str | None], value: Any) -> None:
    part, name = place
    entry = written(PLAIN)
    if name is None:
        entry[part] = value
    else:
        entry[part][name] = value
    try:
        setting = read(entry)
    except UsageError as error:
        assert len(str(error)) > 20  # noqa: PT017 -- either outcome is right
    else:
        written(setting)


def test_streams_are_made_by_name_from_json() -> None:
    stream = stream_named("noisy-stages", shares=[0.5, 0.5], label_noise=[0.25, 0])
    assert stream == NoisyStages((0.5, 0.5), (0.25, 0))
    with pytest.raises(UnknownNameError, match="noisy-stages"):
        stream_named("noisy-stage")
    with pytest.raises(
        UsageError, match="the stream class-pairs needs a value of tasks; it has tasks, train_per_class"
    ):
        stream_named("class-pairs")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PLAIN),
        ({"control_every": 7}, dataclasses.replace(PLAIN, control_every=7)),
        ({"stream.tasks": 9}, dataclasses.replace(PLAIN, stream=RandomLabels(tasks=9))),
        ({"stream": TwoStage()}, dataclasses.replace(PLAIN, stream=TwoStage())),
        ({"stream": TwoStage(), "stream.fraction": 0.25}, dataclasses.replace(PLAIN, stream=TwoStage(0.25))),
        ({"stream.fraction": 0.25, "stream": TwoStage()}, dataclasses.replace(PLAIN, stream=TwoStage(0.25))),
        ({"data.name": "mnist", "data.examples": 5}, dataclasses.replace(PLAIN, data=Data("mnist", examples=5))),
        ({"data.examples": None}, PLAIN),
        ({"training.epochs": 3}, dataclasses.replace(PLAIN, training=Training(epochs=(3,)))),
        ({"training.epochs": [3, 4]}, dataclasses.replace(PLAIN, training=Training(epochs=(3, 4)))),
        ({"training.epochs": (3, 4)}, dataclasses.replace(PLAIN, training=Training(epochs=(3, 4)))),
        ({"training.milestones": 2}, dataclasses.replace(PLAIN, training=Training(milestones=(2,)))),
        ({"training.milestones": []}, PLAIN),
        ({"network.hidden": [5]}, dataclasses.replace(PLAIN, network={"name": "mlp-relu", "hidden": [5]})),
        ({"network.bias": False}, dataclasses.replace(PLAIN, network={**PLAIN.network, "bias": False})),
        ({"network": {"name": "vit"}}, dataclasses.replace(PLAIN, network={"name": "vit"})),
        ({"network": {"name": "vit"}, "network.heads": 2}, dataclasses.replace(PLAIN, network={"name": "vit", "heads": 2})),
        ({"remedies": [SOME_REMEDIES[1][0]]}, dataclasses.replace(PLAIN, remedies=SOME_REMEDIES[1])),
        ({"remedies": SOME_REMEDIES[1][0]}, dataclasses.replace(PLAIN, remedies=SOME_REMEDIES[1])),
    ],
)  # fmt: skip
def test_values_are_replaced_by_dotted_name(changes: dict[str, Any], expected: Setting) -> None:
    assert PLAIN.changed(changes) == expected
    assert Setting(RandomLabels(tasks=4)) == PLAIN


def test_values_that_depend_on_each_other_change_together_in_any_order() -> None:
    changes = {"training.optimizer_settings.momentum": 0.5, "training.optimizer": "sgd"}
    for order in (changes, dict(reversed(changes.items()))):
        setting = PLAIN.changed(order)
        assert setting.training == Training(optimizer="sgd", optimizer_settings={"momentum": 0.5})
    back = setting.changed({"training.optimizer": "adam", "training.optimizer_settings": {}})
    assert back.training == Training()
    stages = dataclasses.replace(PLAIN, stream=NoisyStages())
    shares = {"stream.shares": [0.25, 0.25, 0.5], "stream.label_noise": [0.5, 0.25, 0], "stream.tasks": 3}
    assert stages.changed(shares).stream == NoisyStages((0.25, 0.25, 0.5), (0.5, 0.25, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainin.epochs": 3}, "no 'trainin': expected one of stream, data, network, training, remedies"),
        ({"training.epoch": 3}, "no 'training.epoch': expected one of epochs, batch, learning_rate"),
        ({"stream.name": "two-stage"}, "no 'stream.name': expected one of tasks, examples"),
        ({"training.epochs.first": 3}, "no 'training.epochs.first': training.epochs has no parts"),
        ({"network.name.x": 3}, "no 'network.name.x': network.name has no parts"),
        ({"network.new.x": 3}, "no 'network.new.x': network.new has no parts"),
        ({"remedies.l2.coefficient": 3}, "no 'remedies.l2': remedies has no parts"),
        ({"": 3}, "no ''; names are joined by single dots"),
        ({"data.": 3}, "no 'data.'; names are joined"),
        ({".data": 3}, "no '.data'; names are joined"),
        ({"data..name": 3}, "no 'data..name'; names are joined"),
        ({"training.epochs": "many"}, "epochs should be a list of a whole number, got .'many',."),
        ({"training.epochs": 1.5}, "epochs should be a list of a whole number"),
        ({"training.epochs": None}, "epochs should be a list"),
        ({"training.batch": "60"}, "batch should be a whole number, got '60'"),
        ({"training.learning_rate": "fast"}, "learning_rate should be a number"),
        ({"training.learning_rate": 0}, "positive and finite"),
        ({"training.optimizer": "adamm"}, "Did you mean 'adam'"),
        ({"training.optimizer_settings.beta": 1}, "adam cannot take"),
        ({"training": 5}, "training should be a Training, got 5"),
        ({"data": "mnist"}, "data should be a Data, got 'mnist'"),
        ({"network": "resnet18"}, "network should be an object, got 'resnet18'"),
        ({"stream": "two-stage"}, "stream should be a Stream"),
        ({"remedies": ["l2"]}, "remedies should be a list of a Remedy"),
        ({"stream.tasks": "3"}, "tasks should be a whole number, got '3'"),
        ({"stream.tasks": 2.5}, "tasks should be a whole number, got 2.5"),
        ({"control_every": True}, "control_every should be a whole number, got True"),
        ({"inside": -2}, "inside is a number from 0 on"),
        ({"data.length": "long"}, "length should be a whole number"),
    ],
)  # fmt: skip
def test_names_and_values_that_cannot_be_are_refused_with_what_can(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PLAIN.changed(changes)


def test_a_stream_that_was_made_with_values_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(UsageError, match=r"tasks should be a whole number, got 2\.0"):
        Setting(RandomLabels(tasks=2.0))  # type: ignore[arg-type]


def test_the_step_size_follows_its_schedule() -> None:
    training = Training(learning_rate=0.8, warm_up=2, milestones=(3, 5), factor=0.5)
    schedule = {
        (0, 0.25): 0.1, (0, 0.5): 0.2, (0, 1.0): 0.4,
        (1, 0.5): 0.6, (1, 1.0): 0.8,
        (2, 0.1): 0.8, (2, 1.0): 0.8,
        (3, 0.1): 0.4, (4, 1.0): 0.4,
        (5, 0.1): 0.2, (99, 1.0): 0.2,
    }  # fmt: skip
    for (epoch, share), value in schedule.items():
        assert training.step_size(epoch, share) == pytest.approx(value, rel=1e-12)


def test_milestones_inside_the_warm_up_and_none_at_all_count_too() -> None:
    assert Training(learning_rate=1.0, warm_up=4, milestones=(1,), factor=0.25).step_size(1, 1.0) == 0.5 * 0.25
    assert all(Training(learning_rate=0.3).step_size(epoch, share) == 0.3 for epoch in (0, 9) for share in (0.01, 1.0))


def test_the_last_number_of_epochs_holds_for_all_further_tasks() -> None:
    assert [Training(epochs=(5, 3, 2)).epochs_of(task) for task in range(5)] == [5, 3, 2, 2, 2]
    assert [Training(epochs=(7,)).epochs_of(task) for task in range(3)] == [7, 7, 7]


@pytest.mark.parametrize(
    ("optimizer", "own"),
    [
        ("sgd", {"momentum": 0.5}),
        ("adam", {"betas": (0.5, 0.75)}),
        ("adamw", {"weight_decay": 0.5}),
        ("rmsprop", {"alpha": 0.5}),
    ],
)
def test_an_optimizer_is_torchs_with_the_settings_asked_for(optimizer: str, own: dict[str, Any]) -> None:
    def after(made: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> torch.Tensor:
        weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        steps = made([weight])
        for number in range(3):
            weight.grad = weight.detach() * (number + 1)
            steps.step()
        return weight.detach()

    training = Training(learning_rate=0.01, optimizer=optimizer, optimizer_settings=own)
    kind = OPTIMIZERS[optimizer]
    torch.testing.assert_close(after(training.make_optimizer), after(lambda held: kind(held, lr=0.01, **own)))
    plain = after(lambda held: kind(held, lr=0.01))
    assert not torch.allclose(after(training.make_optimizer), plain)


@pytest.mark.parametrize(
    ("optimizer", "own"),
    [
        ("adam", {"momentum": 0.9}),
        ("sgd", {"momentum": -1}),
        ("sgd", {"momentum": "big"}),
        ("adam", {"lr": 1}),
        ("adam", {"betas": 0.9}),
        ("adam", {"fused": False}),
        ("adam", {"foreach": True}),
        ("adamw", {"differentiable": True}),
        ("rmsprop", {"params": []}),
    ],
)
def test_what_torchs_optimizer_does_not_take_is_refused_at_once(optimizer: str, own: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{optimizer} cannot take"):
        Training(optimizer=optimizer, optimizer_settings=own)


def test_everything_that_is_wrong_with_training_is_said_together() -> None:
    with pytest.raises(UsageError) as caught:
        Training(
            epochs=(1, 0), batch=0, learning_rate=math.inf, until=1.5, clip=0, factor=-1, warm_up=-1, test_last=0,
            augmentation="blur",
        )  # fmt: skip
    for name in ["epochs", "batch", "learning_rate", "until", "clip", "factor", "warm_up", "test_last", "augmentation"]:
        assert f"{name} = " in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "every", "expected"),
    [(6, 1, [1, 2, 3, 4, 5]), (6, 2, [2, 4, 5]), (6, 3, [3, 5]), (6, 9, [5]), (6, 0, []), (1, 1, []), (2, 5, [1])],
)
def test_controls_are_trained_on_every_so_many_th_task_and_the_last_but_never_on_the_first(
    tasks: int, every: int, expected: list[int]
) -> None:
    setting = Setting(PermutedLabels(tasks=tasks), control_every=every)
    assert [task for task in range(tasks) if setting.has_control(task)] == expected
    assert all(isinstance(setting.has_control(task), bool) for task in range(tasks))


@pytest.mark.parametrize(
    ("tasks", "every", "expected"),
    [(4, 1, [0, 1, 2, 3, 4]), (4, 2, [0, 2, 4]), (5, 2, [0, 2, 4, 5]), (5, 9, [0, 5]), (5, 0, []), (1, 1, [0, 1])],
)
def test_weights_are_kept_at_the_start_of_every_so_many_th_task_and_at_the_end(
    tasks: int, every: int, expected: list[int]
) -> None:
    setting = Setting(PermutedPixels(tasks=tasks), checkpoint_every=every)
    assert [task for task in range(tasks + 1) if setting.has_checkpoints(task)] == expected


def test_remedies_change_the_architecture_in_their_order_and_act_once() -> None:
    remedied = dataclasses.replace(PLAIN, remedies=(remedy_named("layer-norm"), remedy_named("crelu")))
    expected = remedy_named("crelu").architecture(remedy_named("layer-norm").architecture(PLAIN.network))
    assert remedied.architecture == expected
    assert remedied.architecture != dict(PLAIN.network) == PLAIN.architecture
    assert PLAIN.network == {"name": "mlp-relu", "hidden": [100, 100]}
    with pytest.raises(UsageError, match="each remedy can act once; got redo, l2, redo"):
        dataclasses.replace(PLAIN, remedies=tuple(remedy_named(name) for name in ("redo", "l2", "redo")))


def test_every_stream_has_a_case_here() -> None:
    assert set(OF_STREAMS) == set(STREAMS)
