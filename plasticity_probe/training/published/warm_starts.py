"""Protocols in which data grows: does a network that was trained before generalise worse than a fresh one?"""

from plasticity_probe.training.feature_world import FeatureWorld
from plasticity_probe.training.published.protocol import MOMENTUM, RESNET18, SMALL_IMAGES, Protocol
from plasticity_probe.training.remedies.resets import FreshOptimizer, ResetModules
from plasticity_probe.training.settings import Data, Setting, Training
from plasticity_probe.training.streams.classes import MultiStage
from plasticity_probe.training.streams.growing import GrowingChunks, NoisyStages, SmoothTransition, TwoStage

WARM_STARTS = (
    Protocol(
        name="berariu-two-stage",
        source="Berariu et al. 2021, two-stage protocol",
        published="CIFAR-10, ResNet-18, batch 128, Adam 1e-3; 350 epochs on a random half, then 500 on all, against 500 from scratch; "
        "optimizer "
        "reset in between; a gap with Adam, RMSprop, SGD and SGD with momentum; test accuracy averaged over the last 100 epochs.",
        ours=("no augmentation", "the usual normalisation of CIFAR-10"),
        cost="337 500 updates of 128 images a seed for both stages, 195 500 for the control: GPU hours",
        setting=Setting(
            TwoStage(fraction=0.5),
            Data("cifar10"),
            RESNET18,
            Training(epochs=(350, 500), batch=128, learning_rate=1e-3, test_last=100),
            remedies=(FreshOptimizer(),),
            inside=6,
        ),
        seeds=5,
        variants={
            "sgd": {"training.optimizer": "sgd", "training.learning_rate": 0.01},
            "sgd-momentum": {
                "training.optimizer": "sgd",
                "training.optimizer_settings": {"momentum": 0.9},
                "training.learning_rate": 0.01,
            },
            "rmsprop": {"training.optimizer": "rmsprop"},
            "pretraining-5": {"training.epochs": (5, 500)},
            "pretraining-10": {"training.epochs": (10, 500)},
        },
        small={**SMALL_IMAGES, "training.epochs": (35, 50), "training.test_last": 10, "inside": 0},
    ),
    Protocol(
        name="berariu-smooth-transition",
        source="Berariu et al. 2021, smooth transition",
        published="one run of about 500 epochs; each example from the full set with probability 1 - gamma^(50 n/N), else from the half; "
        "gamma in "
        "{0.1, ..., 0.9}; a gap still appears.",
        ours=("the comparison with a network from scratch is the run of berariu-two-stage's control",),
        cost="195 500 updates of 128 images a seed",
        setting=Setting(
            SmoothTransition(gamma=0.5),
            Data("cifar10"),
            RESNET18,
            Training(epochs=(500,), batch=128, learning_rate=1e-3, test_last=100),
            inside=6,
        ),
        seeds=5,
        variants={f"gamma-{tenth / 10}": {"stream.gamma": tenth / 10} for tenth in range(1, 10)},
        small={**SMALL_IMAGES, "training.epochs": (50,), "training.test_last": 10, "inside": 0},
    ),
    Protocol(
        name="berariu-multi-stage",
        source="Berariu et al. 2021, appendix A.3",
        published="classes in n + 1 groups, a share r of the data spread evenly over the stages; all stages but the last trained to 100 % "
        "training accuracy; the final test accuracy falls with n, and further as r falls.",
        ours=("at most 350 epochs before the last stage, until an epoch's online accuracy is 100 %, and then 500",),
        cost="up to 350 n + 500 epochs a seed",
        setting=Setting(
            MultiStage(tasks=5, iid_fraction=0.5),
            Data("cifar10"),
            RESNET18,
            Training(epochs=(350, 350, 350, 350, 500), batch=128, learning_rate=1e-3, until=1.0, test_last=100),
            remedies=(FreshOptimizer(),),
        ),
        seeds=5,
        variants={
            **{f"r-{r}": {"stream.iid_fraction": r} for r in (0.0, 0.25, 0.75, 1.0)},
            "n-1": {"stream.tasks": 2, "training.epochs": (350, 500)},
            "n-9": {"stream.tasks": 10, "training.epochs": (*(350,) * 9, 500)},
        },
        small={**SMALL_IMAGES, "training.epochs": (30,), "training.test_last": 5},
    ),
    Protocol(
        name="berariu-reset",
        source="Berariu et al. 2021, appendix A.5",
        published="the last k of six modules of the ResNet-18 drawn anew after stage 1, then 500 epochs; k = 4 and 5 recover the accuracy "
        "from "
        "scratch, fewer do not; accuracies between 70 and 79 %.",
        ours=("as berariu-two-stage",),
        cost="as berariu-two-stage",
        setting=Setting(
            TwoStage(fraction=0.5),
            Data("cifar10"),
            RESNET18,
            Training(epochs=(350, 500), batch=128, learning_rate=1e-3, test_last=100),
            remedies=(FreshOptimizer(), ResetModules(last=4)),
        ),
        seeds=5,
        variants={f"last-{k}": {"remedies": (FreshOptimizer(), ResetModules(last=k))} for k in range(1, 7)},
        small={**SMALL_IMAGES, "training.epochs": (35, 50), "training.test_last": 10},
    ),
    Protocol(
        name="berariu-width-depth",
        source="Berariu et al. 2021, appendix A.4",
        published="ResNet-18 with first module of w channels, then 2w, 4w, 8w, and d blocks in each of four modules; the gap survives at "
        "every width "
        "and depth tried.",
        ours=("the widths and depths of the variants", "as berariu-two-stage"),
        cost="as berariu-two-stage, times the size of the network",
        setting=Setting(
            TwoStage(fraction=0.5),
            Data("cifar10"),
            {**RESNET18, "width": 64, "depth": 2},
            Training(epochs=(350, 500), batch=128, learning_rate=1e-3, test_last=100),
            remedies=(FreshOptimizer(),),
        ),
        seeds=5,
        variants={
            f"w{w}-d{d}": {"network.width": w, "network.depth": d} for w in (16, 32, 64, 128) for d in (1, 2, 3, 4)
        },
        small={
            "data.examples": 4000,
            "training.epochs": (35, 50),
            "training.test_last": 10,
            "network.width": 8,
            "network.depth": 1,
            "seeds": 3,
        },
    ),
    Protocol(
        name="ash-adams-warm-start",
        source="Ash and Adams 2020, section 2; published code",
        published="CIFAR-10, ResNet-18 of 16, 32, 64, 128 channels, half of the data and then all, each until 99 % of an epoch's training "
        "examples are "
        "right; random against warm: SGD 56.2 and 51.7 %, Adam 78.0 and 74.4 %; an MLP of 2x100 with SGD 39.0 and 37.4 %.",
        ours=("at most 350 epochs a stage",),
        cost="up to 91 000 updates of 128 images a stage",
        setting=Setting(
            TwoStage(fraction=0.5, held_out=1 / 3),
            Data("cifar10", normalise="symmetric"),
            {**RESNET18, "width": 16},
            Training(epochs=(350,), batch=128, learning_rate=1e-3, until=0.99),
            remedies=(FreshOptimizer(),),
            inside=4,
        ),
        seeds=5,
        variants={
            "sgd": {"training.optimizer": "sgd"},
            "mlp": {"network": {"name": "mlp-relu", "hidden": [100, 100]}},
            "mlp-sgd": {"network": {"name": "mlp-relu", "hidden": [100, 100]}, "training.optimizer": "sgd"},
        },
        small={
            "data.examples": 6000,
            "network": {"name": "mlp-relu", "hidden": [100, 100]},
            "training.epochs": (100,),
            "inside": 0,
            "seeds": 10,
        },
    ),
    Protocol(
        name="dash-growing",
        source="Shin et al. 2024, standard setting; published code",
        published="50 equal chunks arrive one by one; each time until 99.9 % training accuracy; ResNet-18, SGD with momentum .9, step "
        "size 1e-3, batch "
        "128, no augmentation; cold start on CIFAR-10: 67.5 % at the last chunk, 57.6 % on average (one run, from the published logs).",
        ours=("at most 1000 epochs a chunk where the code allows 10 000",),
        cost="about 140 000 updates of 128 images a seed for a warm start, twice that for the controls",
        setting=Setting(
            GrowingChunks(tasks=50),
            Data("cifar10"),
            {"name": "resnet18-max-pool"},
            Training(epochs=(1000,), batch=128, learning_rate=1e-3, until=0.999, **MOMENTUM),
            control_every=10,
            checkpoint_every=10,
        ),
        seeds=3,
        variants={
            "mlp": {"network": {"name": "mlp-relu", "hidden": [1024, 1024]}, "training.learning_rate": 0.01},
            "sota": {
                "network": {"name": "resnet18"},
                "training.learning_rate": 0.1,
                "training.optimizer_settings": {"momentum": 0.9, "weight_decay": 5e-4},
                "training.epochs": (260,),
                "training.until": None,
                "training.milestones": (60, 120, 160, 200),
                "training.warm_up": 1,
                "training.augmentation": "crop-flip",
            },
        },
        small={
            "data.name": "mnist",
            "data.examples": 2000,
            "stream.tasks": 10,
            "network": {"name": "mlp-relu", "hidden": [100, 100]},
            "training.learning_rate": 0.01,
            "training.epochs": (200,),
            "control_every": 3,
            "checkpoint_every": 1,
            "seeds": 5,
        },
    ),
    Protocol(
        name="dash-synthetic",
        source="Shin et al. 2024, discrete feature-learning framework; published notebook",
        published="a warm start learns almost no new features and tests worse; an ideal one that keeps features and forgets noise equals "
        "a cold start. "
        "Recomputed, 10 seeds, at experiment 50: cold .943, warm .752, ideal .943.",
        ours=("ties between features go to the one of lowest index",),
        cost="seconds on a CPU",
        setting=FeatureWorld(),
        seeds=10,
        small={},
    ),
    Protocol(
        name="lee-warm-start",
        source="Lee et al. 2024, warm-start protocol; published code",
        published="a tenth of CIFAR-10 with half of the labels wrong, then the rest with right ones; 100 epochs a stage, AdamW 1e-3 with "
        "weight decay 1e-3, "
        "gradient norm at most .5, 5 seeds.",
        ours=("batch 256", "no augmentation"),
        cost="21 500 updates of 256 images a seed, as many for the control",
        setting=Setting(
            NoisyStages(shares=(0.1, 0.9), label_noise=(0.5, 0.0), noise_on="all"),
            Data("cifar10"),
            RESNET18,
            Training(
                epochs=(100,),
                batch=256,
                learning_rate=1e-3,
                optimizer="adamw",
                optimizer_settings={"weight_decay": 1e-3},
                clip=0.5,
            ),
        ),
        seeds=5,
        variants={
            "continual": {"stream": NoisyStages.continual(noise_on="all")},
        },
        small={**SMALL_IMAGES, "training.epochs": (20,)},
    ),
)
