"""Protocols in which many networks train on random subsets of one set of examples: which examples are memorised?"""

from plasticity_probe.training.published.protocol import MOMENTUM, RESNET18, Protocol
from plasticity_probe.training.settings import Data, Setting, Training
from plasticity_probe.training.streams.subsets import RandomSubset

SUBSETS = (
    Protocol(
        name="feldman-zhang-subsets",
        source="Feldman and Zhang 2020, estimates of memorization and influence",
        published="ResNet-50, each network on a random 70 % of the training set: 2000 networks on ImageNet (the authors' page), 4000 on "
        "CIFAR-100 (not checked); an example is memorised from .25 on, a pair influential from .15 on (not checked).",
        ours=(
            "ResNet-18 in place of ResNet-50",
            "the budget: 100 epochs in batches of 512, SGD with momentum .9 and step size .4, times .2 after 50, 75 and 90 epochs",
            "the wrong labels of the variants",
        ),
        cost="6900 updates of 512 images a seed, 4000 seeds: GPU weeks",
        setting=Setting(
            RandomSubset(share=0.7),
            Data("cifar100"),
            RESNET18,
            Training(
                epochs=(100,),
                batch=512,
                learning_rate=0.4,
                milestones=(50, 75, 90),
                warm_up=5,
                augmentation="crop-flip",
                **MOMENTUM,
            ),
        ),
        seeds=4000,
        variants={f"noise-{share}": {"stream.label_noise": share} for share in (0.1, 0.2)},
        small={
            "data.name": "digits",
            "network": {"name": "mlp-relu", "hidden": [128]},
            "training.epochs": (60,),
            "training.batch": 60,
            "training.learning_rate": 1e-2,
            "training.optimizer": "adam",
            "training.optimizer_settings": {},
            "training.milestones": (),
            "training.warm_up": 0,
            "training.augmentation": "none",
            "seeds": 200,
        },
    ),
)
