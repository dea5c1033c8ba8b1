"""Trains one run in a folder, saving its state after every epoch; the process that tests kill."""

import sys
from pathlib import Path

from plasticity_probe.training.loop import train
from plasticity_probe.training.remedies.averaging import HareTortoise
from plasticity_probe.training.remedies.units import ReDo
from plasticity_probe.training.settings import Data, Setting, Training
from plasticity_probe.training.streams.shifting import RandomLabels

SETTING = Setting(
    RandomLabels(tasks=4, examples=300),
    Data("digits"),
    {"name": "mlp-relu", "hidden": [32, 32]},
    Training(epochs=(12,), batch=20, learning_rate=1e-3),
    remedies=(HareTortoise(decay=0.9, every=2), ReDo(every=50)),
    inside=3,
)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    train(SETTING, range(3), folder, resume=folder.exists(), save_every=float(sys.argv[2]))
