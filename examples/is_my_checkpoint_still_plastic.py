"""Is my checkpoint still plastic? Measure a checkpoint beside a fresh network, then let a copy of both learn something new.

Run it with `python examples/is_my_checkpoint_still_plastic.py`; it takes a few seconds on one core and writes digits.pt to the current folder.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import plasticity_probe as probe


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def fit(network: nn.Module, inputs: Tensor, labels: Tensor, epochs: int) -> float:
    """Trains a network and returns its accuracy on what it was trained on."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
    return (network(inputs).argmax(1) == labels).double().mean().item()


torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
inputs, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
inputs, held_out_inputs, labels, held_out_labels = inputs[:600], inputs[600:], labels[:600], labels[600:]

# A checkpoint as training leaves it behind: here after many epochs on the digits.
network = build()
fit(network, inputs, labels, epochs=300)
torch.save(network.state_dict(), "digits.pt")

# The checkpoint beside a freshly initialised network, on the data it was trained on.
analysis = probe.analyze(
    "digits.pt",
    DataLoader(TensorDataset(inputs, labels), batch_size=200),
    held_out=DataLoader(TensorDataset(held_out_inputs, held_out_labels), batch_size=200),
    architecture=build,
)
print(analysis)

# What numbers can only hint at, a trial shows: both learn the same random labels with the same effort.
new_labels = torch.randint(10, labels.shape)
trained = fit(copy.deepcopy(network), inputs, new_labels, epochs=40)
fresh = fit(build(), inputs, new_labels, epochs=40)
print(
    f"\nTrial: of 600 new random labels the checkpoint learned {trained:.0%} in 40 epochs, a fresh network {fresh:.0%}."
)
