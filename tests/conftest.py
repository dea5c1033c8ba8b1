"""What several test files share: where real data lies, and a small network with data."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real checkpoints and data; tests that need it skip where it is not named."""
    folder = os.environ.get("PLASTICITY_PROBE_SHARED")
    if not folder:
        pytest.skip("PLASTICITY_PROBE_SHARED names no folder with real checkpoints")
    return Path(folder)
