import pytest


@pytest.fixture(autouse=True)
def _no_usual_roots(monkeypatch, tmp_path_factory):
    """Keep the tests away from the data of whoever runs them."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    monkeypatch.delenv("PLASTICITY_PROBE_DATA", raising=False)
