"""Two small transformers, for images and for characters, initialised as GPT-2, so that a fresh one can be drawn under `torch.manual_seed`.

Both are pre-norm (Xiong et al. 2020): x + attention(norm(x)), then x + MLP(norm(x)). They have no dropout (our choice: a forward pass then
repeats itself), can be differentiated twice and run under `torch.func.vmap`; every module with weights knows how to draw them anew.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from plasticity_probe.errors import UsageError

STD = 0.02
"""Standard deviation of initial weights (Radford et al. 2018, section 4.1, kept in GPT-2)."""
EXPANSION = 4
"""Hidden units of a block's MLP per unit of width (Vaswani et al. 2017, section 3.3)."""


class ViT(nn.Module):
    """A vision transformer: patches as tokens, pre-norm blocks, the mean over tokens, one linear layer.

    After Dosovitskiy et al. 2021, section 3.1, with one difference: the tokens' mean after the last norm is classified instead of a class token
    (our choice, as Beyer et al. 2022; one tensor less, and the number of positions tells the image size). Sizes are for 32x32 images.

    Initialised as GPT-2 (Radford et al. 2019, section 2.3): weights normal with standard deviation 0.02, the two layers of each block that
    write to the residual stream with 0.02 / √(2 depth); biases 0, norms 1 and 0. That patches and positions follow the same rule is our choice.

    Args:
        patch: Side of the square patches.
        width: Features of a token.
        depth: Blocks.
        heads: Attention heads, a divisor of the width.
        image_size: Side of the square images, a multiple of `patch`.
        in_channels: Channels of the images.
        classes: Outputs.

    Raises:
        UsageError: A size below 1, heads that do not divide the width, or patches that do not divide the image.
    """

    def __init__(
        self,
        patch: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        image_size: int = 32,
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        _check_sizes("a ViT", patch, width, depth, heads, image_size, in_channels, classes)
        _check_heads("a ViT", width, heads)
        if image_size % patch:
            raise UsageError(
                f"a ViT needs images that patches of side {patch} divide; got side {image_size}. Choose another patch"
            )
        super().__init__()
        self.patches = _Patches(in_channels, width, patch, stride=patch)
        self.positions = _Positions((image_size // patch) ** 2, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, depth, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = _Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (N, classes), of images of shape (N, in_channels, image_size, image_size)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        if tokens.shape[1] != len(self.positions.weight):
            raise UsageError(
                f"this ViT reads images of {len(self.positions.weight)} patches, got {tokens.shape[1]} from images of shape "
                f"{tuple(images.shape)}; build it with their image_size"
            )
        tokens = self.norm(self.blocks(self.positions(tokens)))
        return self.head(tokens.mean(1))


class CharTransformer(nn.Module):
    """A causal transformer that predicts the next character at every position.

    A decoder of pre-norm blocks with learned positions (Radford et al. 2019, section 2.3) in the size that small character models have; the
    output layer has weights of its own and a bias (our choice: GPT-2 ties it to the embedding, which would hide a layer from remedies).

    Initialised as GPT-2 (Radford et al. 2019, section 2.3): weights, embeddings and positions normal with standard deviation 0.02, the two
    layers of each block that write to the residual stream with 0.02 / √(2 depth); biases 0, norms 1 and 0.

    Args:
        vocabulary: Different characters.
        context: Longest sequence.
        width: Features of a token.
        depth: Blocks.
        heads: Attention heads, a divisor of the width.

    Raises:
        UsageError: A size below 1, or heads that do not divide the width.
    """

    def __init__(
        self, vocabulary: int = 65, context: int = 64, width: int = 64, depth: int = 4, heads: int = 4
    ) -> None:
        _check_sizes("a character transformer", vocabulary, context, width, depth, heads)
        _check_heads("a character transformer", width, heads)
        super().__init__()
        self.tokens = _Embedding(vocabulary, width)
        self.positions = _Positions(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, depth, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = _Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, shape (N, T, vocabulary), of int64 tokens of shape (N, T), T at most `context`."""
        if tokens.shape[1] > len(self.positions.weight):
            raise UsageError(
                f"this transformer reads at most {len(self.positions.weight)} tokens, got {tokens.shape[1]}; cut the sequences or build it "
                "with a longer context"
            )
        return self.head(self.norm(self.blocks(self.positions(self.tokens(tokens)))))


class _Block(nn.Module):
    """Attention and a two-layer MLP, each behind a norm and added to what it read: (N, T, width) to the same."""

    def __init__(self, width: int, heads: int, depth: int, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, depth, causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = _TwoLayers(width, depth)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream after this block."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class _Attention(nn.Module):
    """Multi-head attention of a sequence on itself (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, width: int, heads: int, depth: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = _Linear(width, 3 * width)
        self.out = _Linear(width, width, std=STD / math.sqrt(2 * depth))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to the same; queries, keys and values are the thirds of `qkv`, each with its heads one after the other."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        # The fused kernels have no second derivative, and on the CPU no rule for vmap.
        with sdpa_kernel(SDPBackend.MATH):
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _TwoLayers(nn.Module):
    """A block's MLP; its GELU is the exact one, x Φ(x) (Hendrycks and Gimpel 2016)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.expand = _Linear(width, EXPANSION * width)
        self.activation = nn.GELU()
        self.contract = _Linear(EXPANSION * width, width, std=STD / math.sqrt(2 * depth))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        return self.contract(self.activation(self.expand(x)))


class _Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, std: float = STD) -> None:
        self.std = std
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        """Weights normal, biases 0."""
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class _Patches(nn.Conv2d):
    def reset_parameters(self) -> None:
        """Weights normal, biases 0."""
        nn.init.normal_(self.weight, std=STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Rows normal."""
        nn.init.normal_(self.weight, std=STD)


class _Positions(nn.Module):
    """Adds a learned vector to each position of a sequence (N, T, width)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Vectors normal."""
        nn.init.normal_(self.weight, std=STD)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens with their positions."""
        return x + self.weight[: x.shape[1]]


def _check_sizes(what: str, *sizes: int) -> None:
    if any(size < 1 for size in sizes):
        raise UsageError(f"{what} needs sizes of at least 1; got {', '.join(map(str, sizes))}")


def _check_heads(what: str, width: int, heads: int) -> None:
    if width % heads:
        raise UsageError(f"{what} needs heads that divide its width; got width {width} and {heads} heads")
