"""SparK: masked pre-training of convnets, whose encoder sees visible patches as the only sites that there are."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.masked_nets import conv_function
from sparsejax.convolution import SiteMask, apply_mask
from sparsejax.nn import MaskedBatchNorm


class Spark(nnx.Module):
    """An encoder, mask tokens at every scale, a light U-Net decoder.

    Args:
        encoder: a `MaskedResNet` or `MaskedConvNeXt`; its coarsest stride is the side of a patch.
        channels: of the images.
        width: features of the decoder at the coarsest scale, halved at each finer one.
        masked: whether the encoder knows the mask. If not, it sees zeros where patches are missing, as an ordinary
            convnet must: the control of this method.
        rngs: random streams.

    Example:
        >>> from experiments.models import MaskedResNet
        >>> from sparsejax.convolution import random_patch_mask
        >>> def run(images, mask):
        ...     encoder = MaskedResNet(1, (8, 16), rngs=nnx.Rngs(0))
        ...     return Spark(encoder, 1, width=16, rngs=nnx.Rngs(1))(images, mask)
        >>> mask = random_patch_mask(jax.random.key(0), 3, (4, 4), kept=6)
        >>> jax.eval_shape(run, jnp.zeros((3, 16, 16, 1)), mask).shape
        (3, 16, 16, 1)

    References:
        Tian et al., Designing BERT for Convolutional Networks, 2023, arXiv:2301.03580, section 3.
    """

    def __init__(self, encoder: nnx.Module, channels: int, *, width: int, masked: bool = True, rngs: nnx.Rngs):
        self.encoder, self.masked, self.patch = encoder, masked, encoder.strides[-1]
        self.norms = nnx.List([encoder.norm_type(features, rngs=rngs) for features in encoder.channels])
        self.tokens = nnx.List(
            [nnx.Param(0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, (n,))) for n in encoder.channels]
        )
        self.decoder = Decoder(encoder, channels, width=width, rngs=rngs)

    def __call__(self, images: jax.Array, mask: SiteMask, *, train: bool = False) -> jax.Array:
        """Predicts images (samples, *shape, channels) from their visible patches, patch by patch normalised."""
        known = mask if self.masked else None
        maps = self.encoder(apply_mask(images, mask), known, train=train)
        for level, (x, norm, token) in enumerate(zip(maps, self.norms, self.tokens, strict=True)):
            x = norm(x, not train, mask=known) if isinstance(norm, MaskedBatchNorm) else norm(x)
            maps[level] = jnp.where(mask.at(x.shape[1:-1])[..., None], x, token[...])
        return self.decoder(maps, train=train)


class Segmenter(nnx.Module):
    """An encoder and a decoder: a U-Net, whose encoder may have been trained in `Spark`.

    Args:
        encoder: a `MaskedResNet` or `MaskedConvNeXt`.
        classes: outputs for each pixel.
        width: features of the decoder at the coarsest scale.
        rngs: random streams.
    """

    def __init__(self, encoder: nnx.Module, classes: int, *, width: int, rngs: nnx.Rngs):
        self.encoder = encoder
        self.decoder = Decoder(encoder, classes, width=width, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps (samples, *shape, channels) to logits (samples, *shape, classes)."""
        return self.decoder(self.encoder(images, train=train), train=train)


class Decoder(nnx.Module):
    """From the features of every stage back to the image's resolution, doubled and added from scale to scale.

    Args:
        encoder: gives strides and features of the maps.
        channels: of the output.
        width: features at the coarsest scale, halved at each finer one.
        rngs: random streams.
    """

    def __init__(self, encoder: nnx.Module, channels: int, *, width: int, rngs: nnx.Rngs):
        dims = encoder.stem_conv.kernel[...].ndim - 2
        widths = [max(4, width // 2**level) for level in range(encoder.strides[-1].bit_length())]
        self.bridges = nnx.List()
        for level, features in enumerate(reversed(encoder.channels)):
            window = (3 if level else 1,) * dims
            conv = nnx.Conv(features, widths[level], window, conv_general_dilated=conv_function(dims), rngs=rngs)
            self.bridges.append(conv)
        self.blocks = nnx.List([_UpBlock(a, b, dims, rngs) for a, b in itertools.pairwise(widths)])
        self.out = nnx.Conv(widths[-1], channels, (1,) * dims, rngs=rngs)

    def __call__(self, maps: list[jax.Array], *, train: bool = False) -> jax.Array:
        """Maps features of each stage, finest first, to (samples, *shape, channels)."""
        x, *finer = [bridge(each) for bridge, each in zip(self.bridges, reversed(maps), strict=True)]
        for level, block in enumerate(self.blocks):
            x = block(x, train)
            x = x + finer[level] if level < len(finer) else x
        return self.out(x)


class _UpBlock(nnx.Module):
    def __init__(self, channels_in: int, channels: int, dims: int, rngs: nnx.Rngs):
        options = {"use_bias": False, "conv_general_dilated": conv_function(dims), "rngs": rngs}
        # Volumes are repeated voxel by voxel: their transposed convolution costs more than all else.
        self.up = nnx.ConvTranspose(channels_in, channels_in, (4, 4), 2, rngs=rngs) if dims == 2 else None
        self.conv1 = nnx.Conv(channels_in, channels_in, (3,) * dims, **options)
        self.norm1 = nnx.BatchNorm(channels_in, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(channels_in, channels, (3,) * dims, **options)
        self.norm2 = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.up is None:
            for axis in range(1, x.ndim - 1):
                x = jnp.repeat(x, 2, axis=axis)
        else:
            x = self.up(x)
        x = nnx.relu6(self.norm1(self.conv1(x), use_running_average=not train))
        return self.norm2(self.conv2(x), use_running_average=not train)


def patches(images: jax.Array, side: int) -> jax.Array:
    """Cuts images (samples, *shape, channels) into (samples, *grid, side**dims * channels).

    Example:
        >>> patches(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 0].tolist()
        [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    """
    samples, *shape, channels = images.shape
    dims = len(shape)
    cut = images.reshape(samples, *[n for size in shape for n in (size // side, side)], channels)
    order = (0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)
    return cut.transpose(order).reshape(samples, *[size // side for size in shape], side**dims * channels)


def unpatch(cut: jax.Array, side: int, channels: int) -> jax.Array:
    """The inverse of `patches`."""
    samples, *grid, _ = cut.shape
    dims = len(grid)
    x = cut.reshape(samples, *grid, *[side] * dims, channels)
    pairs = [axis for d in range(dims) for axis in (1 + d, 1 + dims + d)]
    return x.transpose(0, *pairs, 2 * dims + 1).reshape(samples, *[n * side for n in grid], channels)


def normalised(cut: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Patches with mean 0 and variance 1 each, their means and their deviations."""
    mean = jnp.mean(cut, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.var(cut, axis=-1, keepdims=True, ddof=1) + 1e-6)
    return (cut - mean) / deviation, mean, deviation


def patch_loss(prediction: jax.Array, images: jax.Array, mask: SiteMask, side: int) -> jax.Array:
    """Mean squared error of hidden patches, each normalised; visible ones do not count.

    Args:
        prediction: float (samples, *shape, channels).
        images: likewise.
        mask: the visible patches, one entry for each.
        side: of a patch.
    """
    error = jnp.mean((patches(prediction, side) - normalised(patches(images, side))[0]) ** 2, axis=-1)
    hidden = ~mask.mask
    return jnp.sum(error * hidden) / (jnp.sum(hidden) + 1e-8)


def reconstruct(model: Spark, images: jax.Array, mask: SiteMask) -> jax.Array:
    """The images with hidden patches as predicted; mean and deviation of a patch are those of the true one."""
    true, guess = patches(images, model.patch), patches(model(images, mask), model.patch)
    _, mean, deviation = normalised(true)
    whole = jnp.where(mask.mask[..., None], true, guess * deviation + mean)
    return unpatch(whole, model.patch, images.shape[-1])


def reached(encoder: nnx.Module, images: jax.Array, mask: SiteMask, *, masked: bool) -> jax.Array:
    """The share of sites that depend on visible patches, after each block.

    Where the encoder knows the mask, it stays the share of visible patches; where it does not, it grows, and the mask
    erodes. A site counts if its features differ from those of an image of zeros.
    """
    visible, known = apply_mask(images, mask), mask if masked else None
    pairs = zip(encoder.walk(visible, known), encoder.walk(jnp.zeros_like(images), known), strict=True)
    return jnp.stack([jnp.mean(jnp.any(jnp.abs(x - nothing) > 1e-6, axis=-1)) for (_, x), (_, nothing) in pairs])


def kept_patches(images: jax.Array, side: int, hidden: float) -> tuple[tuple[int, ...], int]:
    """The grid of patches, and how many of them stay visible."""
    grid = tuple(size // side for size in images.shape[1:-1])
    return grid, round(math.prod(grid) * (1 - hidden))
