"""What changes along a run? Save checkpoints while a network learns task after task, measure them into a trace, and read the trace back.

Run it with `python examples/watch_a_run.py`; it takes a few seconds on one core and writes run/ and run.h5 to the current folder.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import plasticity_probe as probe

TASKS, EPOCHS = 9, 40


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
inputs = torch.tensor((pixels[:600] - pixels.mean()) / pixels.std(), dtype=torch.float32)

# Training: the same digits with new random labels in every task, and a checkpoint before each of them.
Path("run").mkdir(exist_ok=True)
network = build()
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
accuracies = []
for task in range(TASKS):
    torch.save(network.state_dict(), f"run/task{task}.pt")
    labels = torch.randint(10, (len(inputs),))
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(labels)).split(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
    accuracies.append((network(inputs).argmax(1) == labels).double().mean().item())

# Measuring: every checkpoint on one more task of this kind. Run again, and what run.h5 holds is not measured again.
new_task = [(inputs, torch.randint(10, (len(inputs),)))]
probe.analyze("run", new_task, architecture=build, probes=["fisher_rank", "weight_norms"], trace="run.h5")

# Reading: one group for each probe, one row for each checkpoint; the fresh network's row is left out here.
trace = probe.open_trace("run.h5")
rank = trace["fisher_rank"].to_dataset()
norm = trace["weight_norms"].to_dataset()
checkpoints = (rank["network"] == "checkpoint").values
print("task  accuracy at its end  rank of the Fisher before it  weight norm before it")
for task, accuracy, value, size in zip(
    rank["step"].values[checkpoints],
    accuracies,
    rank["threshold_rank"].values[checkpoints],
    norm["total_l2"].values[(norm["network"] == "checkpoint").values],
    strict=True,
):
    print(f"{task:4d}  {accuracy:19.0%}  {value:28.0f}  {size:21.1f}")
print(f"\n{rank['threshold_rank'].attrs['long_name']} (of {rank['ceiling'].values[0]:.0f} examples)")
