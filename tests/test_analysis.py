import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plasticity_probe as probe
from plasticity_probe.checkpoints.formats import write_checkpoint
from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.errors import BudgetError, CheckpointError, DataError, PlanError, TraceError
from plasticity_probe.measurement import Status
from plasticity_probe.planning import plan
from plasticity_probe.study import study
from plasticity_probe.trace.reader import read_rows

QUICK = ["performance", "fisher_rank", "weight_norms"]
X, Y = torch.randn(40, 8), torch.randint(0, 3, (40,))
LOADER = [(X[:32], Y[:32]), (X[32:], Y[32:])]


def mlp() -> MLP:
    return MLP([8, 6, 3])


def saved(folder: Path, step: int, state: dict[str, Tensor] | None = None) -> Path:
    path = folder / f"step_{step}.safetensors"
    architecture = {"name": "mlp-relu", "widths": [8, 6, 3]}
    write_checkpoint(
        path, state or mlp().state_dict(), {"run": "r", "step": step, "task": 0, "architecture": architecture}
    )
    return path


def test_a_module_and_a_loader_give_a_table_with_a_fresh_network_beside() -> None:
    analysis = probe.analyze(mlp(), LOADER, probes=QUICK)
    assert analysis.ok
    assert analysis.table.columns == ("checkpoint", "fresh", "ratio")
    assert analysis["fisher_rank"].conditions.examples == 40
    assert "fisher_rank" in repr(analysis)
    assert "<table>" in analysis._repr_html_()
    json.dumps(analysis.to_dict(), allow_nan=False)


def test_the_fresh_network_is_not_the_users_own_seed() -> None:
    torch.manual_seed(0)
    values = probe.analyze(mlp(), LOADER, probes=["weight_norms"]).table.lines[0].values
    assert values[0] != values[1]


def test_a_seed_repeats_everything_bit_for_bit_and_does_not_depend_on_other_probes() -> None:
    model = mlp()
    one, two = (
        probe.analyze(model, LOADER, probes=["hessian_spectrum"], seed=3).to_dict()["quantities"] for _ in range(2)
    )
    more = probe.analyze(model, LOADER, probes=[*QUICK, "hessian_spectrum"], seed=3).to_dict()["quantities"]
    assert one == two
    assert [q for q in more if q["probe"] == "hessian_spectrum"] == one


def test_a_series_is_measured_in_order_and_resumed(tmp_path: Path) -> None:
    for step in (2, 10, 0):
        saved(tmp_path / "run" if (tmp_path / "run").mkdir(exist_ok=True) is None else tmp_path, step)
    trace = tmp_path / "out.h5"
    first = probe.analyze(tmp_path / "run", LOADER, probes=QUICK, trace=trace)
    assert [row.step for row in first.rows if row.probe == "performance" and row.network == "checkpoint"] == [0, 2, 10]
    saved(tmp_path / "run", 20)
    again = probe.analyze(tmp_path / "run", LOADER, probes=QUICK, trace=trace)
    assert {record.checkpoint.step for record in again.records} == {20}
    assert len(again.rows) == len(first.rows) + len(QUICK)
    assert {row.key for row in read_rows(trace)} == {row.key for row in again.rows}
    assert again.table.columns == ("step 0", "step 20", "fresh", "ratio")


def test_a_trace_with_other_settings_is_refused_and_both_are_shown(tmp_path: Path) -> None:
    trace = tmp_path / "out.h5"
    probe.analyze(mlp(), LOADER, probes=QUICK, trace=trace)
    before = trace.read_bytes()
    with pytest.raises(TraceError, match="seed"):
        probe.analyze(mlp(), LOADER, probes=QUICK, trace=trace, seed=1)
    assert trace.read_bytes() == before


def test_settings_are_the_same_in_the_next_process_and_differ_with_the_data() -> None:
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def settings(data=LOADER, **options):
        return study(mlp(), data, probes=["memorization"], **options).settings("memorization")

    assert " at 0x" not in str(settings(loss=loss))
    assert settings(loss=loss) == settings(loss=loss)
    others = [
        settings(mode="train"),
        settings(seed=1),
        settings(held_out=LOADER),
        settings([(X + 1, Y)]),
        settings(initial=mlp().state_dict()),
    ]
    assert len({str(each) for each in [settings(), settings(loss=loss), *others]}) == 7


def test_non_finite_weights_are_a_status_and_the_other_probes_still_run() -> None:
    model = mlp()
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    analysis = probe.analyze(
        model, LOADER, probes=["fisher_rank", "weight_norms", "feature_rank", "dead_units"], fresh=0
    )
    status = {record.label: record.status for record in analysis.records}
    assert status["fisher_rank"] == Status.NONFINITE
    assert not analysis.ok
    assert len(status) == 4
    assert any("diverged" in sentence for sentence in analysis.findings)


def test_a_probe_that_raises_is_a_status_and_the_others_still_run() -> None:
    class Broken(type(probe.analyze(mlp(), LOADER, probes=["performance"], fresh=0).records[0].probe)):  # type: ignore[misc]
        name = "broken"

        def measure(self, subject, generator):
            raise ZeroDivisionError("by accident")

    analysis = probe.analyze(mlp(), LOADER, probes=[Broken(), "weight_norms"], fresh=0)
    assert [record.status for record in analysis.records] == [Status.FAILED, Status.OK]
    assert "ZeroDivisionError: by accident" in analysis.records[0].message


def test_one_bad_file_of_a_series_is_a_status_and_the_only_one_an_error(tmp_path: Path) -> None:
    saved(tmp_path, 0)
    (tmp_path / "step_1.pt").write_bytes(b"nonsense")
    analysis = probe.analyze(tmp_path, LOADER, probes=QUICK, fresh=0)
    assert not analysis.ok
    assert [row.status for row in analysis.rows] == ["ok"] * 3 + ["failed"] * 3
    with pytest.raises(CheckpointError):
        probe.analyze(tmp_path / "step_1.pt", LOADER, probes=QUICK)


def test_every_problem_of_a_request_is_told_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        study(mlp(), LOADER, probes=["fischer_rank"], fresh=-1, architecture="mpl-relu")
    text = str(caught.value)
    assert "Did you mean 'fisher_rank'" in text
    assert "fresh must be at least 0" in text
    assert "'mlp-relu'" in text


def test_frozen_networks_and_small_budgets_are_found_before_any_work() -> None:
    with pytest.raises(PlanError, match="all parameters of the network are frozen, but fisher_rank need"):
        probe.analyze(mlp().requires_grad_(False), LOADER, probes=QUICK)
    assert probe.analyze(mlp().requires_grad_(False), LOADER, probes=["performance", "weight_norms"], fresh=0).ok
    with pytest.raises(BudgetError, match="hessian_spectrum"):
        probe.analyze(mlp(), LOADER, probes=["hessian_spectrum"], memory=1000)


def test_a_plan_measures_nothing_and_says_what_it_would_cost() -> None:
    planned = plan(study(mlp(), LOADER, fresh=2))
    by_label = {line.label: line for line in planned.lines}
    assert planned.fresh == 2
    assert by_label["fisher_rank"].cost.gradients >= 40
    assert by_label["hessian_spectrum"].cost.products > 40
    assert planned.seconds > 0
    json.dumps(planned.to_dict())


def test_a_plan_counts_what_probes_share_once() -> None:
    lines = plan(study(mlp(), LOADER, probes=["hessian_spectrum", "gradient_norms"])).lines
    alone = plan(study(mlp(), LOADER, probes=["gradient_norms"])).lines
    assert lines[1].cost.products < alone[0].cost.products
    assert lines[1].cost.products >= 0


def test_data_sets_give_training_and_held_out_examples_in_a_random_order(tmp_path: Path) -> None:
    x, y = np.arange(80, dtype=np.float32).reshape(80, 1), np.repeat([0, 1], 40)
    np.savez(tmp_path / "sorted.npz", train_x=x, train_y=y, test_x=-x[:30], test_y=y[:30])
    made = study(mlp(), str(tmp_path / "sorted.npz"), probes=QUICK, examples=50)
    m = made.material
    assert (len(m.examples), len(m.training), len(m.held_out)) == (50, 50, 30)
    assert 0 < float(torch.cat([b[1].float() for b in m.examples.take(10).chunks(10)]).mean()) < 1
    test = study(mlp(), str(tmp_path / "sorted.npz"), probes=QUICK, split="test").material
    assert len(test.examples) == 30
    with pytest.raises(DataError, match="has no split 'valid'; it has: "):
        study(mlp(), str(tmp_path / "sorted.npz"), probes=QUICK, split="valid")


def test_a_fresh_networks_batchnorm_has_the_datas_statistics() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    made = study(model, [(X * 50 + 20, Y)], probes=QUICK)
    build = next(made.networks())().build
    settled = made.fresh_subject(build, 0)
    hidden = settled.model[0](X * 50 + 20)
    assert torch.allclose(settled.model[1].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-3)
    assert torch.allclose(settled.model[1].running_var, hidden.var(0), rtol=1e-4)
    assert not any(module.training for module in settled.model.modules())
