import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.nystrom import Sketch, nystrom, rank_interval
from plasticity_probe.linalg.ranks import DEFINITIONS, rank

SIZE = 40


def rows_with(spectrum: Tensor, seed: int) -> Tensor:
    """Rows whose Gram matrix has a chosen spectrum."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    return left * spectrum.sqrt()


def sketched(rows: Tensor, landmarks: int, seed: int) -> Sketch:
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:landmarks]]
    cross = rows @ chosen.T
    return nystrom(chosen @ chosen.T, cross.T @ cross, float(rows.square().sum()), len(rows))


SPECTRA = {
    "decaying": 0.7 ** torch.arange(SIZE, dtype=torch.float64),
    "flat": torch.ones(SIZE, dtype=torch.float64),
    "power law": 1 / torch.arange(1, SIZE + 1, dtype=torch.float64) ** 2,
    "low rank": (torch.arange(SIZE) < 3).double(),
    "one": (torch.arange(SIZE) < 1).double() * 1e-20,
    "zero": torch.zeros(SIZE, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_bounds_hold_for_every_draw(name: str) -> None:
    spectrum = SPECTRA[name]
    slack = 1e-6 * float(spectrum[0])
    for seed in range(200):
        sketch = sketched(rows_with(spectrum, seed), 1 + seed % 20, seed)
        assert (sketch.values <= spectrum + slack).all()
        assert (spectrum <= sketch.values + sketch.missing + slack).all()
        assert float(sketch.values.sum()) + sketch.missing == pytest.approx(float(spectrum.sum()), abs=slack)
        for definition in DEFINITIONS:
            cut = 0.013 * float(spectrum[0]) if definition in ("epsilon_rank", "numerical_rank") else None
            low, high = rank_interval(sketch, definition, 0.01, cut)
            true = float((spectrum > cut).sum()) if cut is not None else rank(spectrum, definition, delta=0.01)
            assert low - 1e-4 * low <= true <= high + 1e-4 * high


def test_landmarks_that_span_everything_leave_nothing_out() -> None:
    sketch = sketched(rows_with(SPECTRA["low rank"], 0), 12, 1)
    assert sketch.missing <= 1e-10
    assert torch.allclose(sketch.values, SPECTRA["low rank"], atol=1e-10)
    assert rank_interval(sketch, "threshold_rank") == (3, 3)


def test_without_what_is_missing_the_interval_would_be_wrong() -> None:
    spectrum = SPECTRA["flat"]
    sketch = sketched(rows_with(spectrum, 0), 10, 0)
    assert rank(sketch.values, "threshold_rank") < 11 < rank(spectrum, "threshold_rank")
    low, high = rank_interval(sketch, "threshold_rank")
    assert low <= rank(spectrum, "threshold_rank") <= high == 40


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 10, allow_subnormal=False), min_size=2, max_size=8),
    st.lists(st.floats(0, 10, allow_subnormal=False), min_size=8, max_size=8),
    st.sampled_from([name for name in DEFINITIONS if name not in ("epsilon_rank", "numerical_rank")]),
    st.floats(0.001, 0.3),
)
def test_no_possible_spectrum_leaves_the_interval(
    found: list[float], added: list[float], definition: str, delta: float
) -> None:
    values = torch.tensor(found, dtype=torch.float64).sort(descending=True).values
    true = (values + torch.tensor(added[: len(found)], dtype=torch.float64)).sort(descending=True).values
    sketch = Sketch(values, float(true.sum() - values.sum()))
    if float(true.sum()) < 1e-6 or float(values[0]) < 1e-6:
        return
    assert float(sketch.flattest.sum()) == pytest.approx(float(true.sum()))
    assert float(sketch.plateau.sum()) <= float(true.sum()) * (1 + 1e-9)
    low, high = rank_interval(sketch, definition, delta)
    held = rank(true, definition, delta=delta)
    assert low * (1 - 1e-9) <= held <= high * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 10, allow_subnormal=False), min_size=2, max_size=8),
    st.lists(st.floats(0, 10, allow_subnormal=False), min_size=8, max_size=8),
    st.floats(0.1, 9),
)
def test_no_possible_count_leaves_the_interval(found: list[float], added: list[float], cut: float) -> None:
    values = torch.tensor(found, dtype=torch.float64).sort(descending=True).values
    true = (values + torch.tensor(added[: len(found)], dtype=torch.float64)).sort(descending=True).values
    low, high = rank_interval(Sketch(values, float((true - values).sum()) * (1 + 1e-12)), "epsilon_rank", epsilon=cut)
    assert low <= int((true > cut).sum()) <= high


def test_what_is_not_finite_is_not_hidden_and_mistakes_are_refused() -> None:
    core = torch.eye(2, dtype=torch.float64)
    assert nystrom(core * float("nan"), core, 1.0, 4).values.isnan().all()
    with pytest.raises(UsageError, match="two"):
        nystrom(core, core[:1], 1.0, 4)
    with pytest.raises(UsageError, match="cut-off"):
        rank_interval(nystrom(core, core, 2.0, 4), "numerical_rank")
