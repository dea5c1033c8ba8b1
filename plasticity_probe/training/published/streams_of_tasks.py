"""Protocols in which tasks follow one another: does the network lose the ability to fit new ones?"""

from collections.abc import Mapping

from plasticity_probe.training.published.protocol import MOMENTUM, RESNET18, SMALL_IMAGES, Changes, Protocol
from plasticity_probe.training.remedies.resets import ZeroHead
from plasticity_probe.training.settings import Data, Setting, Training
from plasticity_probe.training.streams.classes import ClassIncremental, ClassPairs
from plasticity_probe.training.streams.regression import SlowlyChangingRegression
from plasticity_probe.training.streams.shifting import PermutedAlphabet, PermutedLabels, PermutedPixels, RandomLabels

_MLP = {"name": "mlp-relu", "hidden": [100, 100]}
_ACTIVATIONS: Mapping[str, Changes] = {
    "relu": {},
    "leaky-relu": {"network.name": "mlp-leaky_relu"},
    "tanh": {"network.name": "mlp-tanh"},
    "identity": {"network.name": "mlp-identity"},
    "crelu": {"network.name": "mlp-crelu"},
}
STREAMS_OF_TASKS = (
    Protocol(
        name="lewandowski-random-label-mnist",
        source="Lewandowski et al. 2023, experiments on Random Label MNIST",
        published="30 runs, 95 % intervals; ReLU and leaky ReLU lose trainability, tanh and linear networks keep it; figures only, no table.",
        ours=(
            "subset of 1200 images and two hidden layers of 100, as in Kumar et al. 2023; the paper's sizes were not found",
            "20 tasks of 50 epochs in batches of 60 with Adam 1e-3; the paper's budget was not found",
        ),
        cost="20 000 updates of 60 examples a seed, and as many for the controls",
        setting=Setting(
            RandomLabels(tasks=20, examples=1200),
            Data("mnist"),
            _MLP,
            Training(epochs=(50,), batch=60, learning_rate=1e-3),
        ),
        seeds=30,
        variants=_ACTIVATIONS,
        small={"stream.tasks": 10, "control_every": 5, "seeds": 10},
    ),
    Protocol(
        name="random-label-digits",
        source="the random labels of Lyle et al. 2023 and Kumar et al. 2023 on data that is always at hand",
        published="nothing: a setting of our own for a quick look.",
        ours=("all of it: 600 scikit-learn digits, 15 tasks of 40 epochs, Adam 3e-3, two hidden layers of 64",),
        cost="6000 updates of 60 examples a seed: seconds",
        setting=Setting(
            RandomLabels(tasks=15, examples=600),
            Data("digits"),
            {"name": "mlp-relu", "hidden": [64, 64]},
            Training(epochs=(40,), batch=60, learning_rate=3e-3),
        ),
        seeds=10,
        variants=_ACTIVATIONS,
        small={"seeds": 5},
    ),
    Protocol(
        name="kumar-random-label-mnist",
        source="Kumar et al. 2023, section on Random Label MNIST",
        published="50 tasks x 1200 images x 400 epochs, batch 16, Adam with 1e-3 or 1e-4, 10 seeds after a sweep of 3; curves of online "
        "accuracy.",
        ours=("the learning rate 1e-3 of the two; their sweep chooses per method",),
        cost="1.5 million updates of 16 examples a seed",
        setting=Setting(
            RandomLabels(tasks=50, examples=1200),
            Data("mnist"),
            _MLP,
            Training(epochs=(400,), batch=16, learning_rate=1e-3),
        ),
        seeds=10,
        variants={
            **_ACTIVATIONS,
            "cifar10": {
                "data.name": "cifar10",
                "network": {"name": "convnet", "channels": [16, 16], "kernel": 5, "hidden": 100},
            },
        },
        small={"stream.tasks": 10, "training.epochs": 50, "training.batch": 60, "control_every": 5, "seeds": 5},
    ),
    Protocol(
        name="kumar-permuted-mnist",
        source="Kumar et al. 2023, section on Permuted MNIST",
        published="500 tasks x 10 000 images, one epoch in batches of 16, Adam, 10 seeds; online accuracy.",
        ours=("each task draws its own 10 000 images",),
        cost="312 500 updates of 16 examples a seed",
        setting=Setting(
            PermutedPixels(tasks=500, examples=10_000, redraw=True),
            Data("mnist"),
            _MLP,
            Training(epochs=(1,), batch=16, learning_rate=1e-3),
            control_every=50,
            checkpoint_every=50,
        ),
        seeds=10,
        variants=_ACTIVATIONS,
        small={"stream.tasks": 20, "stream.examples": 3000, "control_every": 5, "checkpoint_every": 5, "seeds": 5},
    ),
    Protocol(
        name="dohare-permuted-mnist",
        source="Dohare et al. 2024, Online Permuted MNIST",
        published="800 tasks x 60 000 images seen once, batch 1, three hidden layers of 2000, SGD with .01, .003 or .001, 30 runs; at .01 "
        "up to "
        "25 % of units dead by task 800.",
        ours=("weights by PyTorch's default instead of Kaiming's", "the step size .003 of the three"),
        cost="48 million updates of one example a seed",
        setting=Setting(
            PermutedPixels(tasks=800, examples=60_000, redraw=False),
            Data("mnist", normalise="none"),
            {"name": "mlp-relu", "hidden": [2000, 2000, 2000]},
            Training(epochs=(1,), batch=1, learning_rate=3e-3, optimizer="sgd"),
            control_every=100,
            checkpoint_every=50,
        ),
        seeds=30,
        variants={
            "rate-.01": {"training.learning_rate": 0.01},
            "rate-.001": {"training.learning_rate": 0.001},
            "width-100": {"network.hidden": [100, 100, 100], "stream.tasks": 150},
            "width-1000": {"network.hidden": [1000, 1000, 1000], "stream.tasks": 150},
        },
        small={
            "network.hidden": [100, 100, 100],
            "stream.tasks": 10,
            "stream.examples": 3000,
            "training.learning_rate": 0.01,
            "control_every": 5,
            "checkpoint_every": 1,
            "seeds": 5,
        },
    ),
    Protocol(
        name="permuted-labels",
        source="the label-permuted streams of Lewandowski et al. 2023 and Elsayed and Mahmood 2024",
        published="label-permuted CIFAR-10 shows little loss of plasticity (Elsayed and Mahmood 2024).",
        ours=("sizes and budget: those of the random-label protocol",),
        cost="20 000 updates of 60 examples a seed",
        setting=Setting(
            PermutedLabels(tasks=20, examples=1200),
            Data("mnist"),
            _MLP,
            Training(epochs=(50,), batch=60, learning_rate=1e-3),
        ),
        seeds=10,
        variants=_ACTIVATIONS,
        small={"stream.tasks": 10, "training.epochs": 20, "control_every": 5, "seeds": 5},
    ),
    Protocol(
        name="dohare-continual-imagenet",
        source="Dohare et al. 2024, Continual ImageNet",
        published="2000 tasks, each a new pair of classes, 600 + 100 images of 32x32 a class, 250 epochs, batch 100, SGD with momentum "
        ".9, step size "
        ".01, .001 or .0001, head zeroed at each task, 30 runs: 89 % on early tasks, 77 % at task 2000.",
        ours=(
            "the data is a folder of images, one folder a class (--set data.name=...); none is shipped",
            "three convolutions of the channels 32, 64, 128 and one hidden layer of 128",
        ),
        cost="6 million updates of 100 images a seed",
        setting=Setting(
            ClassPairs(tasks=2000, train_per_class=600, test_per_class=100),
            Data("imagenet32"),
            {"name": "convnet", "channels": [32, 64, 128], "kernel": 5, "hidden": 128},
            Training(epochs=(250,), batch=100, learning_rate=0.01, **MOMENTUM),
            remedies=(ZeroHead(),),
            control_every=100,
            checkpoint_every=100,
        ),
        seeds=30,
        variants={"rate-.001": {"training.learning_rate": 0.001}},
        small={
            "data.name": "cifar10",
            "stream.tasks": 10,
            "stream.train_per_class": 100,
            "stream.test_per_class": None,
            "network.channels": [8, 16, 32],
            "training.epochs": 20,
            "control_every": 5,
            "checkpoint_every": 1,
            "seeds": 3,
        },
    ),
    Protocol(
        name="dohare-class-incremental",
        source="Dohare et al. 2024, class-incremental CIFAR-100",
        published="five classes more every 200 epochs, 20 times; ResNet-18, batch 90, step size .1, times .2 after 60, 120 and 160 "
        "epochs, weight "
        "decay 5e-4, momentum .9, crops, mirrors and turns of 15 degrees, 30 runs; better than retraining until 40 classes, about 5 "
        "points worse at 100.",
        ours=("the weights of the last epoch are carried on, not those of the best validation accuracy",),
        cost="4000 epochs a seed, half of all images on average: GPU hours",
        setting=Setting(
            ClassIncremental(tasks=20, classes_per_task=5),
            Data("cifar100"),
            RESNET18,
            Training(
                epochs=(200,),
                batch=90,
                learning_rate=0.1,
                optimizer="sgd",
                optimizer_settings={"momentum": 0.9, "weight_decay": 5e-4},
                milestones=(60, 120, 160),
                augmentation="crop-flip-rotate",
            ),
        ),
        seeds=30,
        small={
            **SMALL_IMAGES,
            "data.name": "cifar10",
            "stream.tasks": 5,
            "stream.classes_per_task": 2,
            "training.epochs": 10,
            "training.milestones": (3, 6, 8),
            "training.augmentation": "none",
        },
    ),
    Protocol(
        name="slowly-changing-regression",
        source="Dohare et al. 2024, Slowly-Changing Regression",
        published="20 input bits, 15 of them slow, a change every 10 000 examples, target a fixed network of 100 threshold units, learner "
        "with 5 hidden "
        "units, up to 3 million examples, 100 runs; squared error in bins of 40 000.",
        ours=(
            "one slow bit flips at a change, as the paper says; the variant redraw-all draws all of them anew, as the published code's "
            "default does",
            "SGD with .01, batch 1; 1 million examples, as in the published configuration",
        ),
        cost="1 million updates of one example a seed",
        setting=Setting(
            SlowlyChangingRegression(tasks=100, examples=10_000, rule="flip_one"),
            Data(""),
            {"name": "mlp-relu", "hidden": [5]},
            Training(epochs=(1,), batch=1, learning_rate=0.01, optimizer="sgd", threshold=1.0),
            control_every=10,
            checkpoint_every=10,
        ),
        seeds=100,
        variants={
            "redraw-all": {"stream.rule": "redraw_all"},
            "tanh": {"network.name": "mlp-tanh"},
            "leaky-relu": {"network.name": "mlp-leaky_relu"},
            "identity": {"network.name": "mlp-identity"},
            "adam": {"training.optimizer": "adam", "training.learning_rate": 1e-3},
        },
        small={"stream.tasks": 20, "stream.examples": 2000, "control_every": 5, "checkpoint_every": 1, "seeds": 20},
    ),
    Protocol(
        name="permuted-alphabet",
        source="our own: permuted inputs (Goodfellow et al. 2013) carried over to text",
        published="nothing: the setting is ours.",
        ours=("all of it: a character transformer learns a text whose characters are renamed in every task",),
        cost="20 000 updates of 32 windows of 64 characters a seed",
        setting=Setting(
            PermutedAlphabet(tasks=10, examples=2000),
            Data("tinyshakespeare.txt", length=64),
            {"name": "char-transformer", "width": 64, "depth": 2, "heads": 4},
            Training(epochs=(32,), batch=32, learning_rate=1e-3, threshold=0.4),
        ),
        seeds=5,
        small={"stream.tasks": 5, "stream.examples": 400, "training.epochs": (10,), "control_every": 4, "seeds": 2},
    ),
)
