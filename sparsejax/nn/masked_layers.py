"""Flax's convolution and batch norm for arrays of which only some sites count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.convolution.masked import SiteMask, apply_mask
from sparsejax.convolution.norms import masked_batch_norm
from sparsejax.convolution.shapes import pads, per_dimension
from sparsejax.convolution.tiles import TileSet, tile_conv


class MaskedConv(nnx.Conv):
    """`nnx.Conv` that reads active sites only and is zero elsewhere; without a mask it is `nnx.Conv`.

    Arguments and parameters are those of `nnx.Conv`, so that weights that were trained with masks are used without, and
    the other way round.

    Example:
        >>> from sparsejax.convolution import random_patch_mask
        >>> layer = MaskedConv(1, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> mask = random_patch_mask(jax.random.key(0), samples=2, grid=(4, 4), kept=6)
        >>> y = layer(jnp.ones((2, 16, 16, 1)), mask)
        >>> int(jnp.any(y != 0, axis=-1).sum()), 2 * 6 * 4 * 4
        (192, 192)
        >>> layer(jnp.ones((2, 16, 16, 1))).shape
        (2, 16, 16, 4)

    References:
        Tian et al., Designing BERT for Convolutional Networks, 2023, arXiv:2301.03580, section 3.2.
    """

    def __call__(
        self, inputs: jax.Array, mask: SiteMask | TileSet | None = None, *, mask_out: SiteMask | None = None
    ) -> jax.Array:
        """Maps [..., *spatial, in features] to [..., *spatial, out features].

        Args:
            inputs: the array, whose leading axes, none or several, are together the samples of a `SiteMask`; with a
                `TileSet` its active tiles, as `to_tiles` gives them.
            mask: the active sites, or the tiles, which go on as `mask.strided(strides)`; None for an ordinary
                convolution.
            mask_out: the output's active sites; by default those of `mask` at the output's resolution.

        Raises:
            ValueError: with tiles, an option that `tile_conv` lacks.
        """
        if not isinstance(mask, TileSet):
            lead = inputs.shape[: inputs.ndim - len(self.kernel_size) - 1]
            x = inputs.reshape(math.prod(lead), *inputs.shape[len(lead) :])
            y = super().__call__(apply_mask(x, mask))
            y = apply_mask(y, mask if mask_out is None else mask_out)
            return y.reshape(*lead, *y.shape[1:])
        lacking = {
            "padding": self._pads_like_tiles(mask),
            "input_dilation": np.all(np.asarray(self.input_dilation or 1) == 1),
            "mask": self.mask is None,
            "mask_out": mask_out is None,
        }
        for name, fits in lacking.items():
            if not fits:
                raise ValueError(
                    f"{name} is {getattr(self, name, mask_out)!r}, which tiles lack; pass a SiteMask instead"
                )
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return tile_conv(
            inputs,
            kernel,
            mask,
            bias=bias,
            stride=self.strides or 1,
            dilation=self.kernel_dilation or 1,
            groups=self.feature_group_count,
        )

    def _pads_like_tiles(self, tiles: TileSet) -> bool:
        """Whether the padding is that of "SAME", also if it is given in numbers."""
        if isinstance(self.padding, str):
            return self.padding == "SAME"
        shape = tuple(count * size for count, size in zip(tiles.grid, tiles.tile, strict=True))
        steps = per_dimension("strides", self.strides or 1, len(shape))
        spread = per_dimension("kernel_dilation", self.kernel_dilation or 1, len(shape))
        sizes = shape, self.kernel_size, steps, spread
        return pads(*sizes, self.padding) == pads(*sizes, "SAME")


class MaskedBatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` with the statistics of active sites, zero elsewhere; without a mask it is `nnx.BatchNorm`.

    Arguments, parameters and statistics are those of `nnx.BatchNorm`. With `axis_name`, statistics of devices count by
    their active sites.

    Example:
        >>> norm = MaskedBatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))
        >>> x = jnp.array([1.0, 3.0, jnp.nan, 9.0]).reshape(1, 4, 1)
        >>> norm(x, mask=SiteMask(jnp.array([[True, True, False, False]])))[0, :, 0].round(3).tolist()
        [-1.0, 1.0, 0.0, 0.0]
        >>> norm.mean[...].tolist(), norm.var[...].tolist()
        ([2.0], [1.0])
    """

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: SiteMask | TileSet | jax.Array | None = None,
    ) -> jax.Array:
        """Normalises [..., features].

        Args:
            x: [samples, *spatial, features], active tiles, or rows of sites.
            use_running_average: normalise by the running statistics, and leave them; by default as constructed, or as
                `train()` and `eval()` of the model have set it.
            mask: the active sites or tiles, or bool [..., 1] such as `sites.used`; None for all.

        Raises:
            ValueError: with a mask, an `axis` other than the last, `axis_index_groups`, or another number of features.
        """
        if mask is None:
            return super().__call__(x, use_running_average)
        average = self.use_running_average if use_running_average is None else use_running_average
        if average is None or self.axis not in (-1, x.ndim - 1) or self.axis_index_groups is not None:
            raise ValueError(
                f"use_running_average is {average}, axis {self.axis} and axis_index_groups {self.axis_index_groups}; "
                "with a mask, the first must be True or False, the second -1 and the third None"
            )
        if x.shape[-1] != self.num_features:
            raise ValueError(f"x has {x.shape[-1]} features; this layer normalises {self.num_features}")
        if isinstance(mask, TileSet):
            mask = jnp.broadcast_to(mask.used.reshape(-1, *[1] * (x.ndim - 1)), (*x.shape[:-1], 1))
        scale, bias = (None if leaf is None else leaf[...] for leaf in (self.scale, self.bias))
        known = [leaf for leaf in (self.mean[...], self.var[...], scale, bias) if leaf is not None]
        y, (mean, variance) = masked_batch_norm(
            x.astype(self.dtype or jnp.result_type(x, *known)),
            mask,
            scale=scale,
            bias=bias,
            mean=self.mean[...] if average else None,
            variance=self.var[...] if average else None,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
        )
        if not average:
            for running, new in ((self.mean, mean), (self.var, variance)):
                running[...] = self.momentum * running[...] + (1 - self.momentum) * new
        return y
