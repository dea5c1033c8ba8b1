import dataclasses
import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.errors import RunError, UsageError
from plasticity_probe.training.outcomes import Outcome
from plasticity_probe.training.remedies import remedy_named
from plasticity_probe.training.run_folder import (
    Manifest,
    check_room,
    checkpoint_path,
    drop_state,
    group_name,
    is_run_folder,
    leftovers,
    load_state,
    make_folder,
    open_run,
    read_manifest,
    run_name,
    save_state,
    save_weights,
    store_outcomes,
    stored_outcomes,
    write_text,
)
from plasticity_probe.training.settings import Setting
from plasticity_probe.training.streams.shifting import RandomLabels

MANIFEST = Manifest(
    protocol="one small",
    setting=Setting(RandomLabels(tasks=3), remedies=(remedy_named("l2"),)),
    seeds=(0, 1),
    together=2,
    architecture={"name": "mlp-relu", "widths": [4, 5, 2]},
    data="digits",
    source_sha256="ab" * 32,
    device="cpu",
)
OUTCOME = Outcome(0, 0, "task", "run", "ok", 60, 20, 4, 0.5, 0.75, 1.5, 0.25, 2.0, 10.0, 0.625, 0.875)


def parts_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".part")]


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    entry = stored(folder)
    change(entry)
    (folder / "manifest.json").write_text(json.dumps(entry), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    open_run(tmp_path / "run", MANIFEST, resume=False)
    return tmp_path / "run"


def test_a_new_folder_and_an_empty_one_become_that_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "a" / "b" / "new", tmp_path / "empty"):
        open_run(place, MANIFEST, resume=False)
        assert os.listdir(place) == ["manifest.json"]
        assert is_run_folder(place)
        assert read_manifest(place).__dict__ == MANIFEST.__dict__
    open_run(tmp_path / "resumed", MANIFEST, resume=True)
    assert is_run_folder(tmp_path / "resumed")


def test_the_manifest_says_what_wrote_it(run: Path) -> None:
    entry = stored(run)
    assert entry["schema"] == "plasticity_probe.run/1"
    assert entry["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(entry["versions"]) == {"plasticity_probe", "torch", "numpy"}
    assert {"created_at", "python", "platform"} <= set(entry)


def test_the_same_run_goes_on_with_resume_alone(run: Path) -> None:
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="holds this run already; go on with --resume, or choose a new folder"):
        open_run(run, MANIFEST, resume=False)
    open_run(run, MANIFEST, resume=True)
    assert (run / "manifest.json").read_bytes() == before


def test_what_is_only_for_the_record_may_differ(run: Path) -> None:
    rewritten(run, lambda e: e.update(protocol="other", created_at="", python="2", versions={}, data="other words"))
    open_run(run, MANIFEST, resume=True)
    open_run(run, dataclasses.replace(MANIFEST, protocol="third"), resume=True)


SETTING = MANIFEST.setting


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"setting": SETTING.changed({"stream.tasks": 4})}, "setting.stream.tasks: 3 there, 4 now"),
        ({"setting": SETTING.changed({"training.batch": 7})}, "setting.training.batch: 60 there, 7 now"),
        (
            {"setting": SETTING.changed({"training.batch": 7, "data.name": "mnist"})},
            "setting.data.name: digits there, mnist now, setting.training.batch: 60 there, 7 now",
        ),
        ({"setting": SETTING.changed({"network.bias": False})}, "setting.network.bias: None there, False now"),
        ({"setting": SETTING.changed({"remedies": []})}, "setting.remedies: [{'name': 'l2', 'coefficient': 0.005}] there, [] now"),
        ({"seeds": (0, 1, 2)}, "seeds: [0, 1] there, [0, 1, 2] now"),
        ({"together": 1}, "together: 2 there, 1 now"),
        ({"source_sha256": "cd"}, f"source_sha256: {'ab' * 32} there, cd now"),
        ({"architecture": {"name": "mlp-relu", "widths": [4, 6, 2]}}, "architecture.widths: [4, 5, 2] there, [4, 6, 2] now"),
        ({"device": "cuda"}, "device: cpu there, cuda now"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("resume", [False, True])
def test_another_run_is_refused_with_the_difference(
    run: Path, change: dict[str, Any], difference: str, resume: bool
) -> None:
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(UsageError) as caught:
        open_run(run, dataclasses.replace(MANIFEST, **change), resume=resume)
    assert str(caught.value) == f"{run} holds another run ({difference}); choose a new folder with --out"
    assert (run / "manifest.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        for resume in (False, True):
            with pytest.raises(UsageError, match="is no empty folder and holds no run; choose a new one with --out"):
                open_run(place, MANIFEST, resume=resume)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(RunError, match="cannot be made: Not a directory; choose another"):
        open_run(tmp_path / "notes.txt" / "inside", MANIFEST, resume=False)


def test_a_kill_while_the_first_file_was_written_blocks_no_folder(tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.x1.part").write_text('{"sch')
    open_run(tmp_path, MANIFEST, resume=False)
    assert is_run_folder(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"schema": "plasticity_probe.run/2"}', '{"schema": [1]}']
)
def test_a_manifest_that_is_damaged_or_of_another_version_is_refused(run: Path, text: str) -> None:
    (run / "manifest.json").write_text(text)
    message = r"is not what a training run of this version writes; expected the schema plasticity_probe\.run/1, got|is damaged"
    for call in (lambda: open_run(run, MANIFEST, resume=True), lambda: read_manifest(run)):
        with pytest.raises(RunError, match=message):
            call()
    assert not is_run_folder(run)
    assert (run / "manifest.json").read_text() == text


def test_bytes_that_are_no_text_are_no_manifest(run: Path) -> None:
    (run / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        read_manifest(run)
    assert not is_run_folder(run)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Manifest)])
@pytest.mark.parametrize("value", ["nothing", None, {"a": 1}, [None], 1.5])
def test_a_manifest_with_nonsense_in_a_part_is_refused(run: Path, key: str, value: Any) -> None:
    fine = (key, value) in [("architecture", {"a": 1})] or (
        value == "nothing" and isinstance(getattr(MANIFEST, key), str)
    )
    rewritten(run, lambda entry: entry.update({key: value}))
    if fine:
        assert getattr(read_manifest(run), key) == value
        return
    with pytest.raises(RunError, match=r"manifest\.json was not written by this version of the package: "):
        read_manifest(run)
    rewritten(run, lambda entry: entry.pop(key))
    with pytest.raises(RunError, match=key):
        read_manifest(run)


def test_a_manifest_with_an_unknown_remedy_names_it(run: Path) -> None:
    rewritten(run, lambda entry: entry["setting"]["remedies"].append({"name": "l3"}))
    with pytest.raises(RunError, match="there is no remedy named 'l3'"):
        read_manifest(run)


def test_a_folder_without_a_manifest_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no training run: manifest\.json cannot be read \(No such file"):
        read_manifest(tmp_path)
    assert not is_run_folder(tmp_path)
    assert not is_run_folder(tmp_path / "nowhere")
    (tmp_path / "manifest.json").mkdir()
    assert not is_run_folder(tmp_path)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, name, fail)


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_else(
    run: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_outcomes(run, [OUTCOME])
    save_state(run, "seeds_0", {"w": torch.ones(3)}, {"task": 1})
    save_weights(checkpoint_path(run, 0, 0), {"w": torch.ones(3)}, {})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    failing(monkeypatch, call, FULL)
    for write in (
        lambda: store_outcomes(run, [OUTCOME, OUTCOME]),
        lambda: save_state(run, "seeds_0", {"w": torch.zeros(3)}, {"task": 2}),
        lambda: save_weights(checkpoint_path(run, 0, 0), {"w": torch.zeros(3)}, {}),
        lambda: write_text(run / "manifest.json", "{}"),
        lambda: write_text(run / "new.json", "{}"),
    ):
        with pytest.raises(RunError, match=r"cannot be written.*No space left on device.*saved before is whole"):
            write()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert parts_in(run) == []


def test_a_new_run_that_cannot_be_written_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "replace", FULL)
    with pytest.raises(RunError, match=r"manifest\.json cannot be written: No space left on device"):
        open_run(tmp_path / "run", MANIFEST, resume=False)
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no text")])
def test_an_interrupted_write_leaves_nothing_half_written(
    run: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(run / "text", "old")
    failing(monkeypatch, "fsync", error)
    with pytest.raises(type(error)):
        write_text(run / "text", "new")
    assert (run / "text").read_text() == "old"
    assert parts_in(run) == []


def test_a_file_appears_only_when_it_is_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, str]] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append((Path(target).exists(), Path(source).read_text(encoding="utf-8")))
        assert Path(source).parent == Path(target).parent  # only inside one file system a renaming is atomic
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_text(run / "text", "naïve\n")
    assert seen == [(False, "naïve\n")]
    assert (run / "text").read_bytes() == "naïve\n".encode()


def test_text_in_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"x\.json cannot be written: No such file or directory; make room or choose"):
        write_text(tmp_path / "no" / "x.json", "{}")


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    weight = torch.nn.Parameter(torch.randn(2, 3))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    (held,) = optimizer.state_dict()["state"].values()
    state: dict[str, Tensor] = {
        "weight": weight,
        **{f"optimizer/{name}": value for name, value in held.items()},
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "mature": torch.tensor([True, False, True]),
        "ages": torch.tensor([[2**62, -1]]),
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "unknown": torch.tensor([float("nan"), float("inf"), -float("inf")]),
        "whole": whole, "again": whole, "row": whole[1], "column": whole[:, 1], "turned": whole.t(),
        "spread": torch.tensor([7.0]).expand(3), "nothing": torch.zeros(0, 4), "other": torch.zeros(0, 4),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }  # fmt: skip
    place = {"task": 1, "nested": {"lost": [1, 2], "none": None}, "number": 0.1}
    save_state(tmp_path, "seeds_0", state, place)
    found = load_state(tmp_path, "seeds_0")
    assert found is not None
    assert found[1] == place
    assert set(found[0]) == set(state)
    for name, tensor in state.items():
        assert found[0][name].dtype == tensor.dtype, name
        assert found[0][name].shape == tensor.shape, name
        assert torch.equal(found[0][name].nan_to_num(7), tensor.detach().nan_to_num(7)), name
    assert held["step"].ndim == 0
    assert torch.equal(weight.detach(), found[0]["weight"])


def test_tensors_that_shared_memory_come_back_apart(tmp_path: Path) -> None:
    whole = torch.zeros(3, 4)
    save_state(tmp_path, "x", {"a": whole, "b": whole, "c": whole[0], "d": whole.view(-1)}, {})
    found = load_state(tmp_path, "x")
    assert found is not None
    found[0]["a"].fill_(1)
    assert not any(found[0][name].any() for name in "bcd")


def test_a_saved_state_does_not_change_with_what_it_was_saved_from(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    save_state(tmp_path, "x", {"w": weight}, {"task": 0})
    weight.fill_(5)
    found = load_state(tmp_path, "x")
    assert found is not None
    assert not found[0]["w"].any()
    save_state(tmp_path, "x", {"v": weight}, {"task": 1})
    found = load_state(tmp_path, "x")
    assert found is not None
    assert (list(found[0]), found[1]) == (["v"], {"task": 1})


def test_there_may_be_no_state(tmp_path: Path) -> None:
    assert load_state(tmp_path, "seeds_0") is None
    drop_state(tmp_path, "seeds_0")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_finished_goes_and_others_stay(tmp_path: Path) -> None:
    for name in ("seeds_0", "seeds_1"):
        save_state(tmp_path, name, {"w": torch.zeros(2)}, {"name": name})
    drop_state(tmp_path, "seeds_0")
    assert load_state(tmp_path, "seeds_0") is None
    found = load_state(tmp_path, "seeds_1")
    assert found is not None
    assert found[1] == {"name": "seeds_1"}
    drop_state(tmp_path, "seeds_1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: b"", lambda data: data[:-1] + bytes([data[-1] ^ 1])]
)
def test_a_damaged_state_is_refused_with_the_remedy(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    save_state(tmp_path, "seeds_0", {"w": torch.ones(20)}, {})
    path = tmp_path / "state" / "seeds_0.state"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=rf"{re.escape(str(path))}.*Remove it to begin these seeds anew$"):
        load_state(tmp_path, "seeds_0")


def test_a_file_of_tensors_that_no_run_wrote_is_no_state(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "state" / "seeds_0.state")
    with pytest.raises(RunError, match=r"is not what a training run writes\. Remove it"):
        load_state(tmp_path, "seeds_0")


def test_weights_are_checkpoints_of_the_packages_own_format(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 7, 1200)
    assert path == tmp_path / "seed_7" / "step_00001200.safetensors"
    assert checkpoint_path(tmp_path, 7, 1200, remedied=True).name == "step_00001200_remedied.safetensors"
    tied = torch.randn(2, 3)
    save_weights(path, {"a": tied, "b": tied}, {"step": 1200, "run": "x seed 7"})
    file = read_checkpoint(path)
    assert file.metadata["step"] == 1200
    assert torch.equal(file.state["a"], tied)
    assert file.state["a"].data_ptr() == file.state["b"].data_ptr()


def test_checkpoints_are_in_order_of_their_names() -> None:
    names = [
        checkpoint_path(Path(), 0, step, remedied).name for step in (0, 9, 10, 99_999_999) for remedied in (False, True)
    ]
    assert sorted(names, key=lambda name: name.removesuffix(".safetensors")) == names


def test_outcomes_are_stored_in_order_and_replaced_as_a_whole(run: Path) -> None:
    assert stored_outcomes(run) == ()
    others = [dataclasses.replace(OUTCOME, seed=seed) for seed in (3, 1, 2)]
    store_outcomes(run, others)
    assert [outcome.seed for outcome in stored_outcomes(run)] == [1, 2, 3]
    store_outcomes(run, iter([OUTCOME]))
    assert stored_outcomes(run) == (OUTCOME,)
    store_outcomes(run, [])
    assert stored_outcomes(run) == ()
    (run / "outcomes.jsonl").write_text("{")
    with pytest.raises(RunError, match="is no file of outcomes"):
        stored_outcomes(run)


def test_a_run_that_the_disk_has_no_room_for_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 2_500_000_000))
    check_room(tmp_path, 2_500_000_000)
    with pytest.raises(RunError) as caught:
        check_room(tmp_path, 2_500_000_001)
    assert str(caught.value) == (
        f"the run needs up to 2,500.0 MB in {tmp_path}, where 2,500.0 MB are free; make room, choose another folder, or keep fewer checkpoints "
        "(--set checkpoint_every=5, --set inside=0)"
    )


def test_the_room_is_that_of_the_disk(tmp_path: Path) -> None:
    check_room(tmp_path, 0)
    with pytest.raises(RunError, match="the run needs up to"):
        check_room(tmp_path, shutil.disk_usage(tmp_path).total + 1)


def test_groups_of_seeds_have_short_names_of_their_own() -> None:
    assert group_name([4]) == "seeds_4"
    assert group_name([0, 1, 2]) == "seeds_0_1_2"
    assert group_name(range(10, 74)) == "seeds_10_to_73"
    # Lists that agree in their ends and their length.
    lists = [[0, *middle, 7] for size in range(7) for middle in combinations(range(1, 7), size)]
    lists += [[0, 2, 1, 3], [0, 1, 2, 3], [3, 2, 1, 0], [0, 1], [0, 11], [0, 1, 11], [1, 11], [11, 1], [111]]  # fmt: skip
    names = {group_name(seeds) for seeds in lists}
    assert len(names) == len({tuple(seeds) for seeds in lists})
    assert len(group_name([2**62 + 3 * n for n in range(64)])) < 100


@given(*[st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True)] * 2)
def test_two_groups_share_a_name_only_if_they_are_one(first: list[int], second: list[int]) -> None:
    assert (group_name(first) == group_name(second)) == (first == second)
    assert re.fullmatch(r"\w+", group_name(first))


def test_leftovers_are_the_half_written_files_alone(run: Path) -> None:
    (run / "seed_0").mkdir()
    half = [run / ".manifest.json.a1.part", run / "seed_0" / ".step_00000000.safetensors.b2.part"]
    for path in [*half, run / "seed_0" / "step_00000000.safetensors", run / "x.part"]:
        path.write_text("")
    (run / ".folder.part").mkdir()
    assert sorted(leftovers(run)) == sorted(half)


def test_a_run_is_named_by_its_folder_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tanh").mkdir()
    monkeypatch.chdir(tmp_path / "tanh")
    assert run_name(tmp_path / "tanh", 3) == run_name(Path(), 3) == run_name(Path("../tanh"), 3) == "tanh seed 3"


def test_a_folder_is_made_once_with_its_parents(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(RunError, match=r"cannot be made: .*; choose another with --out"):
            make_folder(place)
    assert (tmp_path / "a" / "b").is_dir()
