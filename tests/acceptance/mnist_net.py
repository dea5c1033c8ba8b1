"""The small MNIST network of locuslab/convex_adversarial, as `--model mnist_net.py:build` names it."""

from torch import nn


def build() -> nn.Module:
    """Two strided convolutions and two linear layers; inputs in [0, 1]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
