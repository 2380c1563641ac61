"""A small residual network for small images."""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions with batch norms beside a shortcut, which is a 1x1 convolution where shapes change.

    Args:
        channels_in: features of the input.
        channels: features of the output.
        stride: of the first convolution.
        rngs: random streams.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv(channels_in, channels, 3, stride, rngs)
        self.norm1 = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        self.conv2 = _conv(channels, channels, 3, 1, rngs)
        self.norm2 = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        changes = channels_in != channels or stride != 1
        self.shortcut_conv = _conv(channels_in, channels, 1, stride, rngs) if changes else None

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shortcut = x if self.shortcut_conv is None else self.shortcut_conv(x)
        x = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        x = self.norm2(self.conv2(x), use_running_average=not train)
        return nnx.relu(x + shortcut)


class ResNet(nnx.Module):
    """A 3x3 stem, stages of residual blocks that halve the image from the second on, the mean, a linear head.

    Args:
        image: height, width and channels of the images.
        channels: features of each stage.
        depth: blocks in each stage.
        classes: outputs.
        rngs: random streams.

    Example:
        >>> import jax.numpy as jnp
        >>> model = ResNet(image=(8, 8, 1), channels=(16, 32), depth=1, classes=10, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((3, 8, 8, 1))).shape
        (3, 10)
    """

    def __init__(
        self, *, image: tuple[int, int, int], channels: Sequence[int], depth: int, classes: int, rngs: nnx.Rngs
    ):
        self.stem_conv = _conv(image[-1], channels[0], 3, 1, rngs)
        self.stem_norm = nnx.BatchNorm(channels[0], momentum=0.9, rngs=rngs)
        widths = [channels[0], *[width for width in channels for _ in range(depth)]]
        strides = [2 if stage and not block else 1 for stage in range(len(channels)) for block in range(depth)]
        self.blocks = nnx.List(
            [ResidualBlock(a, b, s, rngs=rngs) for (a, b), s in zip(itertools.pairwise(widths), strides, strict=True)]
        )
        self.head = nnx.Linear(channels[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps (batch, height, width, channels) to logits (batch, classes).

        With `train`, batch norms use the batch's statistics and update their running ones; else they use those.
        """
        x = nnx.relu(self.stem_norm(self.stem_conv(images), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(x.mean(axis=(1, 2)))


def _conv(channels_in: int, channels: int, side: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    init = nnx.initializers.he_normal()
    return nnx.Conv(channels_in, channels, (side, side), strides=stride, use_bias=False, kernel_init=init, rngs=rngs)
