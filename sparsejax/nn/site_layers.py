"""Convolutions and batch norm for lists of sites, with the parameters of Flax's dense ones."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.convolution.checks import whole_number
from sparsejax.convolution.site_conv import sparse_conv
from sparsejax.convolution.site_maps import KernelMap, strided_map, subm_map
from sparsejax.convolution.sites import Sites
from sparsejax.nn.masked_layers import MaskedBatchNorm
from sparsejax.nn.sparse_linear import LECUN_NORMAL


class _SiteConv(nnx.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype=None,
        param_dtype=jnp.float32,
        kernel_init=LECUN_NORMAL,
        bias_init=nnx.initializers.zeros,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.kernel_dilation, self.feature_group_count = kernel_dilation, feature_group_count
        self.dtype, self.implementation = dtype, implementation
        whole_number("feature_group_count", feature_group_count)
        if in_features % feature_group_count or out_features % feature_group_count:
            raise ValueError(
                f"feature_group_count is {feature_group_count}; it must divide in_features {in_features} and "
                f"out_features {out_features}"
            )
        shape = (*self.kernel_size, in_features // feature_group_count, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else nnx.data(None)

    def _features(self, feats: jax.Array, kernel: jax.Array, kernel_map: KernelMap) -> jax.Array:
        dtype = self.dtype or jnp.result_type(feats, kernel)
        return sparse_conv(
            feats.astype(dtype),
            kernel.astype(dtype),
            kernel_map,
            bias=None if self.bias is None else self.bias[...].astype(dtype),
            groups=self.feature_group_count,
            implementation=self.implementation,
        )


class SubmanifoldConv(_SiteConv):
    """A convolution whose outputs are at the sites of its input, so that sparsity stays as it is.

    Parameters are those of `nnx.Conv`, and so is the result at the sites.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: the window, one odd side for each dimension.
        kernel_dilation: distance between the window's positions.
        feature_group_count: groups; `in_features` for a depthwise convolution.
        use_bias: whether there is a bias.
        dtype: of the computation; that of input and kernel together by default.
        param_dtype: of the parameters.
        kernel_init: makes the kernel.
        bias_init: makes the bias.
        implementation: see `sparse_conv`.
        rngs: random streams.

    Example:
        >>> from sparsejax.convolution import from_coords
        >>> sites = from_coords(jnp.zeros(3, int), jnp.array([[7, 7], [7, 8], [900, 4]]), jnp.ones((3, 1)),
        ...     shape=(4096, 4096), batch_size=1, capacity=4)
        >>> layer = SubmanifoldConv(1, 16, (3, 3), rngs=nnx.Rngs(0))
        >>> out = layer(sites)
        >>> out.feats.shape, out.keys.tolist() == sites.keys.tolist()
        ((4, 16), True)

    References:
        Graham and van der Maaten, Submanifold Sparse Convolutional Networks, 2017, arXiv:1706.01307.
    """

    def __call__(self, sites: Sites, kernel_map: KernelMap | None = None) -> Sites:
        """Convolves.

        Args:
            sites: with in_features features.
            kernel_map: `subm_map(sites, kernel_size, dilation=kernel_dilation)`, which all layers of one resolution
                can share; made here if None.
        """
        if kernel_map is None:
            kernel_map = subm_map(sites, self.kernel_size, dilation=self.kernel_dilation)
        return sites.with_feats(self._features(sites.feats, self.kernel[...], kernel_map))


class StridedSparseConv(_SiteConv):
    """A convolution whose outputs are at all sites that it reaches, for a coarser resolution.

    Parameters are those of `nnx.Conv`, and so is the result at the sites, with the same padding.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: the window, one side for each dimension.
        strides: steps of the window.
        padding: as in `strided_map`.
        capacity: rows of the output; by default always enough, as in `strided_map`.
        **options: those of `SubmanifoldConv`.

    Example:
        >>> from sparsejax.convolution import from_mask
        >>> sites = from_mask(jnp.ones((1, 5, 1)), jnp.array([[True, True, False, False, True]]), capacity=3)
        >>> out = StridedSparseConv(1, 8, (2,), 2, rngs=nnx.Rngs(0))(sites)
        >>> out.shape, out.keys[:2].tolist(), out.feats.shape
        ((3,), [0, 2], (3, 8))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int],
        *,
        padding=None,
        capacity: int | None = None,
        **options,
    ):
        super().__init__(in_features, out_features, kernel_size, **options)
        self.strides, self.padding, self.capacity = strides, padding, capacity

    def __call__(self, sites: Sites, out: Sites | None = None, kernel_map: KernelMap | None = None) -> Sites:
        """Convolves.

        Args:
            sites: with in_features features.
            out: the output's sites; with `kernel_map`, what `strided_map` gives. Both are made here if None.
            kernel_map: the map, which the way back (`InverseSparseConv`) needs too.

        Raises:
            ValueError: only one of `out` and `kernel_map` is given.
        """
        if (out is None) != (kernel_map is None):
            raise ValueError("give both out and kernel_map, as strided_map returns them, or neither")
        if kernel_map is None:
            out, kernel_map = strided_map(
                sites,
                self.kernel_size,
                self.strides,
                padding=self.padding,
                dilation=self.kernel_dilation,
                capacity=self.capacity,
            )
        return out.with_feats(self._features(sites.feats, self.kernel[...], kernel_map))


class InverseSparseConv(_SiteConv):
    """The transposed convolution from the outputs of a strided one back to the sites that it read.

    Parameters are those of `nnx.ConvTranspose`, and so is the result at the sites, with the same padding.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: the window of the strided convolution.
        **options: those of `SubmanifoldConv`.

    Example:
        >>> from sparsejax.convolution import from_mask, strided_map
        >>> sites = from_mask(jnp.ones((1, 5, 1)), jnp.array([[True, True, False, False, True]]), capacity=3)
        >>> out, kernel_map = strided_map(sites, 2, 2)
        >>> down = StridedSparseConv(1, 8, (2,), 2, rngs=nnx.Rngs(0))(sites, out, kernel_map)
        >>> back = InverseSparseConv(8, 4, (2,), rngs=nnx.Rngs(0))(down, sites, kernel_map)
        >>> back.feats.shape, back.keys.tolist() == sites.keys.tolist()
        ((3, 4), True)
    """

    def __call__(self, sites: Sites, out: Sites, kernel_map: KernelMap) -> Sites:
        """Convolves.

        Args:
            sites: with in_features features, at the sites that the strided convolution gave.
            out: the sites that it read; their features do not count.
            kernel_map: its map.
        """
        # nnx.ConvTranspose slides its kernel over the dilated input, so its taps are in the opposite order.
        kernel = jnp.flip(self.kernel[...], axis=range(len(self.kernel_size)))
        return out.with_feats(self._features(sites.feats, kernel, kernel_map.T))


class SiteBatchNorm(MaskedBatchNorm):
    """`nnx.BatchNorm` over the rows that are in use; the others stay zero.

    Arguments, parameters and statistics are those of `nnx.BatchNorm`.

    Example:
        >>> from sparsejax.convolution import from_mask
        >>> sites = from_mask(jnp.arange(4.0).reshape(1, 4, 1), jnp.array([[True, False, True, False]]), capacity=3)
        >>> SiteBatchNorm(1, rngs=nnx.Rngs(0))(sites).feats[:, 0].round(3).tolist()
        [-1.0, 1.0, 0.0]
    """

    def __call__(self, sites: Sites, use_running_average: bool | None = None) -> Sites:
        """Normalises the features; `use_running_average` as in `MaskedBatchNorm`."""
        return sites.with_feats(super().__call__(sites.feats, use_running_average, mask=sites.used))
