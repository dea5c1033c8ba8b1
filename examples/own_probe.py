"""How do I measure something of my own? A probe is one class with one method; it needs no registration.

Run it with `python examples/own_probe.py`; it takes a few seconds on one core and writes own.h5 to the current folder.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from sklearn.datasets import load_digits
from torch import nn

import plasticity_probe as probe
from plasticity_probe.measurement import measurement


@measurement
class PredictedClasses(probe.Measurement):
    """What a network predicts. The annotations are all that tables, traces and figures need to know."""

    classes: Annotated[float, probe.Quantity("effective number of predicted classes", units="classes")]
    confidence: Annotated[float, probe.Quantity("mean probability of the predicted class")]


@final
@dataclass(frozen=True)
class PredictedClassesProbe(probe.Probe[PredictedClasses]):
    """exp(entropy) of the mean predicted distribution: 10 for an even spread over ten classes, 1 if always the same class is predicted."""

    name: ClassVar[str] = "predicted_classes"
    title: ClassVar[str] = "how many classes are predicted, and how surely"
    needs: ClassVar[probe.Need] = probe.Need.DATA
    returns: ClassVar[type[probe.Measurement]] = PredictedClasses

    examples: int = 1000

    def cost(self, subject: probe.Subject) -> probe.Cost:
        """One forward pass."""
        return probe.Cost(forwards=min(self.examples, len(subject.examples)))

    def measure(self, subject: probe.Subject, generator: torch.Generator) -> PredictedClasses:  # noqa: ARG002 -- nothing random here
        """Runs the network on the first examples, which are a random sample where the data set was shuffled on reading."""
        subject = subject.take(self.examples)
        with torch.no_grad():
            scores = [subject.outputs(subject.parameters, batch) for batch in subject.chunks()]
        predicted = torch.cat(scores).double().softmax(1)
        entropy = torch.special.entr(predicted.mean(0)).sum()
        return PredictedClasses(
            conditions=subject.conditions(),
            classes=entropy.exp().item(),
            confidence=predicted.amax(1).mean().item(),
        )


torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
inputs, labels = torch.tensor(pixels[:600] / 16, dtype=torch.float32), torch.tensor(digits[:600])
network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(inputs), labels).backward()
    optimizer.step()

# The own probe stands beside a built-in one: in the table, and with its units in the trace.
analysis = probe.analyze(network, [(inputs, labels)], probes=["performance", PredictedClassesProbe()], trace="own.h5")
print(analysis)
print()
print(analysis["predicted_classes"])
print()
print(probe.open_trace("own.h5")["predicted_classes"]["classes"])
