"""The built-in networks, each initialised as in its source, so that a fresh one can be drawn under `torch.manual_seed`.

They are ordinary modules whose parameter names are those of public checkpoints, and their last layer is an `nn.Linear`.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from plasticity_probe.errors import UsageError


class CReLU(nn.Module):
    """Concatenated ReLU (Shang et al. 2016, definition 2.1): z to [relu(z), relu(-z)], so that one half of every unit stays open.

    The network after it reads twice as many inputs, first all units' positive parts, then all negative ones. Abbas et al. 2023 use it
    against the loss of plasticity.
    """

    def forward(self, z: Tensor) -> Tensor:
        """(N, C, ...) to (N, 2C, ...)."""
        return functional.relu(torch.cat([z, -z], 1))


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
    "crelu": CReLU,
}
"""The activation functions of `MLP` and `ConvNet`, by the names that settings use."""


def features_per_unit(activation: str) -> int:
    """How many features each unit hands on behind an activation function: two behind CReLU, one behind any other.

    Args:
        activation: A name of `ACTIVATIONS`.
    """
    return 2 if activation == "crelu" else 1


class MLP(nn.Sequential):
    """A fully connected network; inputs of any shape are flattened.

    Initialised by PyTorch's default for linear layers: uniform on ±1/√fan_in for weights and biases (LeCun et al. 1998, as in torch).

    Args:
        widths: Inputs, hidden widths (units, before CReLU doubles them) and outputs; at least two numbers.
        activation: "relu", "leaky_relu" (slope 0.01), "tanh", "identity" or "crelu" (see `CReLU`), after every layer but the last.
        bias: Whether the linear layers have biases.
        names: The names of the linear layers in the state dict, all of them below the same module; by default layers.0, layers.2, ...
        layer_norm: Whether an `nn.LayerNorm`, named "layers.0_norm" after its linear layer, normalises the pre-activations of every hidden
            layer, over its units. Lyle et al. 2023 name layer norm, not its place; before the activation is our choice, because there it
            also works against units that are dead on every example.

    Raises:
        UsageError: Too few widths, an unknown activation, or as many names as there are layers are not given.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str = "relu",
        bias: bool = True,
        names: Sequence[str] | None = None,
        layer_norm: bool = False,
    ) -> None:
        if len(widths) < 2 or activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UsageError(
                f"an MLP needs at least two widths and an activation out of {known}; got {list(widths)}, {activation!r}"
            )
        copies = features_per_unit(activation)
        linears = [
            nn.Linear(copies * inputs if index else inputs, outputs, bias=bias)
            for index, (inputs, outputs) in enumerate(pairwise(widths))
        ]
        names = names or [f"layers.{2 * index}" for index in range(len(linears))]
        super().__init__(_placed(names, linears, activation, layer_norm, first=[nn.Flatten()]))


class ConvNet(nn.Sequential):
    """A small convolutional network: convolutions that halve the image each, one hidden linear layer, one output layer.

    Initialised by PyTorch's default for each layer (uniform on ±1/√fan_in). The network of Kumar et al. 2023 has two 5x5 convolutions of
    16 channels and 100 hidden units: ConvNet(channels=(16, 16), kernel=5, hidden=100).

    Args:
        channels: Output channels of each convolution, before CReLU doubles them.
        kernel: Side of the square kernels.
        in_channels: Channels of the images.
        image_size: Side of the square images, a multiple of 2 ** len(channels), so that the weights' shapes tell it back.
        hidden: Units of the hidden linear layer.
        classes: Outputs.
        downsample: "pool" (stride 1, padding kernel // 2, then 2x2 max pooling) or "stride" (stride 2, padding (kernel - 1) // 2).
        names: The names of the convolutions and linear layers in the state dict, all below the same module; by default layers.0, ...
        activation: As in `MLP`, after every layer but the last.
        layer_norm: Whether pre-activations are normalised: those of a convolution by `nn.GroupNorm(1, channels)`, over channels and positions of
            an example with one scale per channel, those of the hidden linear layer by `nn.LayerNorm`. Names and place as in `MLP`.
            That one group is layer norm for images is Wu and He 2018, section 3; using it here is our choice.

    Raises:
        UsageError: An image that cannot be halved that often, or an unknown `downsample` or activation.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32),
        kernel: int = 3,
        in_channels: int = 3,
        image_size: int = 32,
        hidden: int = 128,
        classes: int = 10,
        downsample: str = "pool",
        names: Sequence[str] | None = None,
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        side, rest = divmod(image_size, 2 ** len(channels))
        if rest or side == 0 or not channels or downsample not in ("pool", "stride"):
            expected = 'images that can be halved once a convolution, and "pool" or "stride"'
            raise UsageError(
                f"a ConvNet needs {expected}; got side {image_size}, {len(channels)} convolutions and {downsample!r}"
            )
        if activation not in ACTIVATIONS:
            raise UsageError(f"a ConvNet needs an activation out of {', '.join(ACTIVATIONS)}; got {activation!r}")
        copies = features_per_unit(activation)
        stride, padding = (1, kernel // 2) if downsample == "pool" else (2, (kernel - 1) // 2)
        layers: list[nn.Module] = [
            nn.Conv2d(copies * inputs if index else inputs, outputs, kernel, stride=stride, padding=padding)
            for index, (inputs, outputs) in enumerate(pairwise((in_channels, *channels)))
        ]
        layers += [nn.Linear(copies * channels[-1] * side**2, hidden), nn.Linear(copies * hidden, classes)]
        step = 3 if downsample == "pool" else 2
        starts = [step * index for index in range(len(channels))]
        names = names or [f"layers.{index}" for index in (*starts, step * len(channels) + 1, step * len(channels) + 3)]
        super().__init__(_placed(names, layers, activation, layer_norm, pool=downsample == "pool"))


def _placed(
    names: Sequence[str],
    layers: Sequence[nn.Module],
    activation: str,
    layer_norm: bool,
    first: Iterable[nn.Module] = (),
    pool: bool = False,
) -> OrderedDict[str, nn.Module]:
    """The layers under their names, with what lies between them under names of its own."""
    if len(names) != len(layers):
        raise UsageError(f"{len(layers)} layers need as many names; got {len(names)}")
    *parents, _ = names[0].split(".")
    inner: OrderedDict[str, nn.Module] = OrderedDict(("flatten", module) for module in first)
    for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
        leaf = name.rpartition(".")[2]
        if isinstance(layer, nn.Linear) and index and isinstance(layers[index - 1], nn.Conv2d):
            inner["flatten"] = nn.Flatten()
        inner[leaf] = layer
        if index < len(layers) - 1:
            if layer_norm:
                inner[f"{leaf}_norm"] = _layer_norm(layer)
            inner[f"{leaf}_activation"] = ACTIVATIONS[activation]()
        if pool and isinstance(layer, nn.Conv2d):
            inner[f"{leaf}_pool"] = nn.MaxPool2d(2)
    for parent in reversed(parents):
        inner = OrderedDict({parent: nn.Sequential(inner)})
    return inner


def _layer_norm(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return nn.GroupNorm(1, layer.out_channels)
    assert isinstance(layer, nn.Linear)
    return nn.LayerNorm(layer.out_features)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output: half the side where its stride is 2."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 with free width and depth: a convolution, four modules of `depth` basic blocks, one linear layer.

    The modules have w, 2w, 4w and 8w channels; w = 64 and depth 2 are the ResNet-18 of He et al. 2016, and width and depth vary as in
    Berariu et al. 2021, appendix A.4. Names are those of torchvision. Initialised as there: convolutions normal with
    variance 2/fan_out (He et al. 2015), BatchNorm at 1 and 0, the linear layer by PyTorch's default.

    Args:
        width: Channels of the first module.
        depth: Basic blocks in each module.
        classes: Outputs.
        in_channels: Channels of the images.
        stem: "cifar" (3x3 convolution, stride 1) or "imagenet" (7x7, stride 2).
        max_pool: Whether a 3x3 max pooling of stride 2 follows the stem; by default only after the ImageNet stem (He et al. 2016, table 1;
            on 32x32 images it is customary to leave it out).

    Raises:
        UsageError: An unknown stem.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 2,
        classes: int = 10,
        in_channels: int = 3,
        stem: str = "cifar",
        max_pool: bool | None = None,
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise UsageError(f'the stem of a ResNet is "cifar" or "imagenet"; got {stem!r}')
        kernel, stride, padding = (3, 1, 1) if stem == "cifar" else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride=stride, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        pooled = stem == "imagenet" if max_pool is None else max_pool
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pooled else nn.Identity()
        self.layer1 = _module(width, width, depth, stride=1)
        self.layer2 = _module(width, 2 * width, depth, stride=2)
        self.layer3 = _module(2 * width, 4 * width, depth, stride=2)
        self.layer4 = _module(4 * width, 8 * width, depth, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (N, classes), of images of shape (N, in_channels, side, side)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _module(inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*(_BasicBlock(outputs if i else inputs, outputs, 1 if i else stride) for i in range(depth)))


class _CifarBlock(nn.Module):
    """The basic block of the CIFAR-10 networks of He et al. 2016, section 4.2, whose shortcut may be free of parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs and shortcut == "pad":
            self.shortcut = _PaddedShortcut(outputs - inputs)
        elif inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output: half the side where its stride is 2."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class _PaddedShortcut(nn.Module):
    """Option A of He et al. 2016: every second pixel, and zeros for the new channels, half of them on either side."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + added, H/2, W/2)."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))


class CifarResNet(nn.Module):
    """The CIFAR-10 ResNets of He et al. 2016, section 4.2: 6 * blocks + 2 layers, with 16, 32 and 64 channels.

    Names and initialisation are those of github.com/akamaster/pytorch_resnet_cifar10: convolutions and the linear layer normal with
    variance 2/fan_in (He et al. 2015), the linear bias by PyTorch's default. Inputs are 3x32x32 images.

    Args:
        blocks: Basic blocks in each of the three modules: 3 for ResNet-20, 5 for 32, 7 for 44, 9 for 56, 18 for 110.
        shortcut: "pad" (option A of the paper, free of parameters) or "projection" (option B, a 1x1 convolution with BatchNorm).
        classes: Outputs.

    Raises:
        UsageError: An unknown shortcut.
    """

    def __init__(self, blocks: int = 3, shortcut: str = "pad", classes: int = 10) -> None:
        super().__init__()
        if shortcut not in ("pad", "projection"):
            raise UsageError(f'the shortcut of a CIFAR ResNet is "pad" or "projection"; got {shortcut!r}')
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _cifar_module(16, 16, blocks, shortcut)
        self.layer2 = _cifar_module(16, 32, blocks, shortcut)
        self.layer3 = _cifar_module(32, 64, blocks, shortcut)
        self.linear = nn.Linear(64, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (N, classes), of images of shape (N, 3, 32, 32)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def _cifar_module(inputs: int, outputs: int, blocks: int, shortcut: str) -> nn.Sequential:
    stride = 1 if inputs == outputs else 2
    return nn.Sequential(
        *(_CifarBlock(outputs if i else inputs, outputs, 1 if i else stride, shortcut) for i in range(blocks))
    )
