"""Which training examples are memorised rather than learned? Many networks that each saw a random 70 % of the digits tell it.

Run it with `python examples/which_examples_are_memorised.py`; it takes about 20 seconds on one core. A tenth of the labels is wrong, and a wrong
label can only be memorised, so it is known what should be found. Beside the estimate of Feldman and Zhang 2020 stand the scores that a single
checkpoint gives. How these compare depends on how far the wrong labels are fitted (`--epochs 15`). Nothing is kept unless --out names a folder.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import plasticity_probe as probe
from plasticity_probe.checkpoints.architectures import identify, load_network
from plasticity_probe.checkpoints.formats import read_checkpoint
from plasticity_probe.prediction.detection import detection_auc
from plasticity_probe.training.loop import train
from plasticity_probe.training.protocols import PROTOCOLS
from plasticity_probe.training.run_folder import checkpoint_path
from plasticity_probe.training.sources import load_source


def scores_of_one(checkpoint: Path, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, np.ndarray]:
    """The loss and the input-loss curvature of each example under a single network."""
    file = read_checkpoint(checkpoint)
    network = load_network(file.state, identify(file).build()).model.eval()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(network(inputs), labels, reduction="none")
    measured = probe.memorization(network, [(inputs, labels)], examples=len(labels))
    return {"loss": loss.numpy(), "input-loss curvature": measured.curvature.numpy()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    protocol = PROTOCOLS["feldman-zhang-subsets"]
    small = {name: value for name, value in protocol.small.items() if name != "seeds"}
    setting = protocol.setting.changed({**small, "stream.label_noise": given.noise, "training.epochs": given.epochs})
    with TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary) / "subsets"
        outcomes = train(setting, range(given.networks), folder, resume=True, protocol=protocol.name).outcomes
        found = probe.memorized_examples(folder)
        # Of a single network the examples count that it was trained on; loss on the others is no question of memory.
        seen = np.flatnonzero(found.members[0])
        inputs = load_source(setting.data).inputs[seen]
        checkpoint = checkpoint_path(folder, found.seeds[0], outcomes[0].step)
        single = scores_of_one(checkpoint, inputs, torch.from_numpy(found.labels[seen]))

    scores = found.scores
    fitted, tested = (np.mean([getattr(o, name) for o in outcomes]) for name in ("accuracy", "test_accuracy"))
    print(scores)
    print(f"  a network predicts {fitted:.1%} of the labels that it was trained on and {tested:.1%} of the test digits")
    print(
        "\nHow well scores tell the wrong labels from the right ones (area under the ROC curve, 95 % interval over examples):\n"
    )
    print("| score | networks | examples | area |\n|---|---|---|---|")
    rows = [("memorization", scores.models, scores.memorization, found.wrong)]
    rows += [("memorization", scores.models, scores.memorization[seen], found.wrong[seen])]
    rows += [(name, 1, values, found.wrong[seen]) for name, values in single.items()]
    for name, networks, values, wrong in rows:
        area = detection_auc(values, wrong)
        print(f"| {name} | {networks} | {len(values)} | {area.value:.3f} [{area.low:.3f}, {area.high:.3f}] |")

    sure = scores.low >= scores.cut
    print(
        f"\nSurely memorised: {sure.sum()} examples, {np.sum(sure & found.wrong)} of them with one of the {found.wrong.sum()} wrong labels."
    )
    print("The rightly labelled digits that are memorised most:")
    for i in [i for i in found.most(len(found.labels)) if not found.wrong[i]][:5]:
        print(
            f"  example {i}, a {found.labels[i]}: {scores.memorization[i]:.2f} [{scores.low[i]:.2f}, {scores.high[i]:.2f}]"
        )


if __name__ == "__main__":
    main()
