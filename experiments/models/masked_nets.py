"""Small convnets that run on all of an image or volume, or on its visible patches only, with the same parameters.

They give the features of every stage, as segmentation and masked pre-training need them; `Classifier` adds a head.
"""

import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.channels_last import convolve
from sparsejax.convolution import SiteMask, apply_mask, masked_global_pool
from sparsejax.convolution.shapes import pads
from sparsejax.nn import MaskedBatchNorm, MaskedConv

CONV_INIT = nnx.initializers.he_normal()


def conv_function(dims: int):
    """What computes the convolutions of a network, for `conv_general_dilated` of `nnx.Conv`.

    XLA's own of volumes is slow on CPU, so that there those of their planes are added up.

    Args:
        dims: dimensions of space.
    """
    return jax.lax.conv_general_dilated if dims < 3 else _by_planes


def _by_planes(x, kernel, strides, padding, *, rhs_dilation, feature_group_count, **_):
    around = pads(x.shape[1:-1], kernel.shape[:-2], strides, rhs_dilation, padding)
    return convolve(x, kernel, strides, around, rhs_dilation, feature_group_count)


class MaskedResNet(nnx.Module):
    """A stem, then stages of residual blocks that halve the image from the second on.

    Args:
        channels_in: of the images.
        channels: features of each stage.
        depth: blocks in each stage.
        stem_stride: of the stem.
        dims: dimensions of space.
        rngs: random streams.

    Example:
        >>> def run(images):
        ...     return MaskedResNet(1, (8, 16), rngs=nnx.Rngs(0))(images)
        >>> [each.shape for each in jax.eval_shape(run, jnp.zeros((3, 16, 16, 1)))]
        [(3, 8, 8, 8), (3, 4, 4, 16)]
    """

    norm_type = MaskedBatchNorm

    def __init__(
        self,
        channels_in: int,
        channels: Sequence[int],
        *,
        depth: int = 1,
        stem_stride: int = 2,
        dims: int = 2,
        rngs: nnx.Rngs,
    ):
        self.channels = tuple(channels)
        self.strides = tuple(stem_stride * 2**stage for stage in range(len(channels)))
        self.stem_conv = _conv(channels_in, channels[0], (3,) * dims, stem_stride, rngs)
        self.stem_norm = _norm(channels[0], rngs)
        self.stages = nnx.List()
        for number, (before, width) in enumerate(itertools.pairwise([channels[0], *channels])):
            first = _ResidualBlock(before, width, 2 if number else 1, dims, rngs)
            self.stages.append(
                nnx.List([first, *(_ResidualBlock(width, width, 1, dims, rngs) for _ in range(1, depth))])
            )

    def walk(
        self, x: jax.Array, mask: SiteMask | None = None, *, train: bool = False
    ) -> Iterator[tuple[int, jax.Array]]:
        """Yields (stage, features) after each block."""
        x = nnx.relu(self.stem_norm(self.stem_conv(x, mask), not train, mask=mask))
        for number, stage in enumerate(self.stages):
            for block in stage:
                x = block(x, mask, train)
                yield number, x

    def __call__(self, x: jax.Array, mask: SiteMask | None = None, *, train: bool = False) -> list[jax.Array]:
        """Maps (samples, *shape, channels_in) to the features of each stage, finest first.

        With `train`, batch norms use the batch's statistics and update their running ones; else they use those.
        """
        return list(dict(self.walk(x, mask, train=train)).values())


class MaskedConvNeXt(nnx.Module):
    """Patches, then stages of depthwise convolutions and pointwise MLPs, halved by 2x2 convolutions between.

    Args:
        channels_in: of the images.
        channels: features of each stage.
        depth: blocks in each stage.
        stem_stride: side of a patch.
        kernel: side of the depthwise windows (7 in the paper).
        rngs: random streams.

    Example:
        >>> def run(images):
        ...     return MaskedConvNeXt(1, (8, 16), rngs=nnx.Rngs(0))(images)
        >>> [each.shape for each in jax.eval_shape(run, jnp.zeros((3, 16, 16, 1)))]
        [(3, 8, 8, 8), (3, 4, 4, 16)]

    References:
        Liu et al., A ConvNet for the 2020s, 2022, arXiv:2201.03545.
    """

    norm_type = nnx.LayerNorm

    def __init__(
        self,
        channels_in: int,
        channels: Sequence[int],
        *,
        depth: int = 1,
        stem_stride: int = 2,
        kernel: int = 7,
        rngs: nnx.Rngs,
    ):
        self.channels = tuple(channels)
        self.strides = tuple(stem_stride * 2**stage for stage in range(len(channels)))
        self.stem_conv = _conv(channels_in, channels[0], (stem_stride,) * 2, stem_stride, rngs, use_bias=True)
        self.stem_norm = nnx.LayerNorm(channels[0], rngs=rngs)
        self.down_norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for width in channels[:-1]])
        self.downs = nnx.List([_conv(a, b, (2, 2), 2, rngs, use_bias=True) for a, b in itertools.pairwise(channels)])
        self.stages = nnx.List(
            [nnx.List([_ConvNeXtBlock(width, kernel, rngs) for _ in range(depth)]) for width in channels]
        )

    def walk(
        self, x: jax.Array, mask: SiteMask | None = None, *, train: bool = False
    ) -> Iterator[tuple[int, jax.Array]]:
        """Yields (stage, features) after each block."""
        x = apply_mask(self.stem_norm(self.stem_conv(x, mask)), mask)
        for number, stage in enumerate(self.stages):
            if number:
                x = self.downs[number - 1](self.down_norms[number - 1](x), mask)
            for block in stage:
                x = block(x, mask)
                yield number, x

    def __call__(self, x: jax.Array, mask: SiteMask | None = None, *, train: bool = False) -> list[jax.Array]:
        """Maps (samples, *shape, channels_in) to the features of each stage, finest first; `train` changes nothing."""
        return list(dict(self.walk(x, mask, train=train)).values())


class Classifier(nnx.Module):
    """An encoder, the mean over its coarsest map, a linear head.

    Args:
        encoder: a `MaskedResNet` or `MaskedConvNeXt`.
        classes: outputs.
        rngs: random streams.
    """

    def __init__(self, encoder: nnx.Module, classes: int, *, rngs: nnx.Rngs):
        self.encoder = encoder
        self.head = nnx.Linear(encoder.channels[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps (samples, *shape, channels) to logits (samples, classes)."""
        return self.head(masked_global_pool(self.encoder(x, train=train)[-1], None))


class _ResidualBlock(nnx.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, dims: int, rngs: nnx.Rngs):
        self.conv1 = _conv(channels_in, channels, (3,) * dims, stride, rngs)
        self.norm1 = _norm(channels, rngs)
        self.conv2 = _conv(channels, channels, (3,) * dims, 1, rngs)
        self.norm2 = _norm(channels, rngs)
        changes = channels_in != channels or stride != 1
        self.shortcut_conv = _conv(channels_in, channels, (1,) * dims, stride, rngs) if changes else None

    def __call__(self, x: jax.Array, mask: SiteMask | None, train: bool) -> jax.Array:
        shortcut = x if self.shortcut_conv is None else self.shortcut_conv(x, mask)
        x = nnx.relu(self.norm1(self.conv1(x, mask), not train, mask=mask))
        return nnx.relu(self.norm2(self.conv2(x, mask), not train, mask=mask) + shortcut)


class _ConvNeXtBlock(nnx.Module):
    def __init__(self, width: int, kernel: int, rngs: nnx.Rngs):
        self.depthwise_conv = MaskedConv(width, width, (kernel, kernel), feature_group_count=width, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.scale = nnx.Param(jnp.full(width, 0.1, jnp.float32))

    def __call__(self, x: jax.Array, mask: SiteMask | None) -> jax.Array:
        y = self.layer_norm(self.depthwise_conv(x, mask))
        y = self.down(nnx.gelu(self.up(y))) * self.scale[...]
        return x + apply_mask(y, mask)


def _conv(channels_in, channels, window, stride, rngs, *, use_bias=False) -> MaskedConv:
    return MaskedConv(
        channels_in,
        channels,
        window,
        stride,
        use_bias=use_bias,
        kernel_init=CONV_INIT,
        conv_general_dilated=conv_function(len(window)),
        rngs=rngs,
    )


def _norm(features: int, rngs: nnx.Rngs) -> MaskedBatchNorm:
    return MaskedBatchNorm(features, momentum=0.9, rngs=rngs)
