"""Which networks lose the ability to fit new random labels, and which remedies keep it? Four activations times five settings (or more).

Run it with `python examples/who_keeps_learning.py`: the digits, three seeds, half a minute. The same with thirty seeds takes minutes; on MNIST
(1200 images, two hidden layers of 100) with thirty seeds and twenty tasks, as many as Lewandowski et al. 2023 ran, about an hour on two cores:

    python examples/who_keeps_learning.py --seeds 30 --tasks 15 --epochs 40
    python examples/who_keeps_learning.py --data mnist --seeds 30 --tasks 20 --epochs 30

Every setting is a run folder below --out, trained by a process with one thread, as many at a time as there are cores; what is finished is not
trained again. Writes scores.csv there, and figures.
"""

import argparse
import csv
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from plasticity_probe.report.courses import course_grid, final_scores
from plasticity_probe.report.draw import draw, draw_courses
from plasticity_probe.training.loop import train
from plasticity_probe.training.outcomes import Outcome
from plasticity_probe.training.protocols import PROTOCOLS
from plasticity_probe.training.remedies import remedy_named
from plasticity_probe.training.summary import summarise

ACTIVATIONS = ("relu", "leaky-relu", "tanh", "identity")
REMEDIES = ("none", "l2-init", "shrink-perturb", "layer-norm", "redo")
PROTOCOL_OF = {"digits": "random-label-digits", "mnist": "lewandowski-random-label-mnist"}


def learn(given: argparse.Namespace, activation: str, remedy: str) -> tuple[Outcome, ...]:
    torch.set_num_threads(1)
    protocol = PROTOCOLS[PROTOCOL_OF[given.data]]
    setting = protocol.setting.changed(protocol.variants[activation]).changed(
        {
            "stream.tasks": given.tasks,
            "training.epochs": given.epochs,
            "remedies": () if remedy == "none" else (remedy_named(remedy),),
            # A fresh network on the last task alone tells what could have been reached there.
            "control_every": given.tasks,
            "checkpoint_every": 0,
        }
    )
    folder = given.out / given.data / f"{activation}-{remedy}"
    return train(setting, range(given.seeds), folder, resume=True, protocol=protocol.name).outcomes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices=PROTOCOL_OF, default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--remedies", nargs="+", default=REMEDIES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/who-keeps-learning"))
    given = parser.parse_args()

    settings = [(activation, remedy) for activation in ACTIVATIONS for remedy in given.remedies]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as workers:
        learned = list(workers.map(learn, [given] * len(settings), *zip(*settings, strict=True)))
    found: dict[str, dict[str, tuple[Outcome, ...]]] = {activation: {} for activation in ACTIVATIONS}
    for (activation, remedy), outcomes in zip(settings, learned, strict=True):
        found[activation][remedy] = outcomes

    folder = given.out / given.data
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["activation", "remedy", "task", "seed", "network", "status", "accuracy", "online_accuracy"])
        for (activation, remedy), outcomes in zip(settings, learned, strict=True):
            for o in outcomes:
                writer.writerow(
                    [activation, remedy, o.task, o.seed, o.network, o.status, o.accuracy, o.online_accuracy]
                )

    print("| activation | remedy | first task | last task | fresh network on the last task | lost |")
    print("|---|---|---|---|---|---|")
    for (activation, remedy), outcomes in zip(settings, learned, strict=True):
        first, *_, last = summarise(outcomes)
        print(f"| {activation} | {remedy} | {first.score} | {last.score} | {last.control} | {last.gap} |")

    draw_courses(course_grid(found, chance=1 / 10), folder / "courses.png")
    draw(final_scores(found, chance=1 / 10), folder / "last_task.png")


if __name__ == "__main__":
    main()
