"""Kernel maps: which input site every tap of a convolution reads for every output site."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_conv import PairLists, from_table
from sparsejax.convolution.shapes import output_shape, pads, per_dimension
from sparsejax.convolution.site_keys import LAST_KEY, check_shape, inside, look_up, ravel, unique
from sparsejax.convolution.sites import Sites


@functools.partial(jax.tree_util.register_dataclass, data_fields=("fwd", "bwd", "pairs"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class KernelMap:
    """Neighbours of sites under a kernel: `fwd[o, k] == i` exactly if `bwd[i, k] == o`.

    A map is a value: make it once for each resolution, pass it to every layer there.

    Args:
        fwd: int32 (capacity_out, taps), the input row of each output row and tap; the input's capacity for none.
        bwd: int32 (capacity_in, taps), the output row of each input row and tap; the output's capacity for none.
        pairs: the same as lists for each tap, which leave out what is missing.
    """

    fwd: jax.Array
    bwd: jax.Array
    pairs: PairLists

    @property
    def T(self) -> "KernelMap":
        """The map of the transposed convolution, from the output sites back to the input sites."""
        return KernelMap(self.bwd, self.fwd, self.pairs.T)


def subm_map(sites: Sites, kernel: int | Sequence[int], *, dilation: int | Sequence[int] = 1, grid=None) -> KernelMap:
    """The map of a submanifold convolution: outputs are at the input's sites, so that sparsity stays as it is.

    Args:
        sites: the sites; features are not read.
        kernel: odd sides of the window.
        dilation: distance of the taps.
        grid: how rows are found, by a table (True) or a search (False); None chooses by size. The map is the same.

    Returns:
        The map.

    Raises:
        ValueError: a side is even.

    Example:
        >>> from sparsejax.convolution.sites import from_mask
        >>> sites = from_mask(jnp.ones((1, 4, 1)), jnp.array([[True, True, False, True]]), capacity=3)
        >>> subm_map(sites, 3).fwd.tolist()
        [[3, 0, 1], [0, 1, 3], [3, 2, 3]]

    References:
        Graham and van der Maaten, Submanifold Sparse Convolutional Networks, 2017, arXiv:1706.01307, section 2.
    """
    dims = len(sites.shape)
    window, spread = per_dimension("kernel", kernel, dims), per_dimension("dilation", dilation, dims)
    if any(size % 2 == 0 for size in window):
        raise ValueError(
            f"kernel is {window}; a submanifold convolution needs odd sides, use strided_map for even ones"
        )
    reach = (taps(window) - np.array(window) // 2) * np.array(spread)
    fwd = _rows(sites, sites.batch, sites.coords + reach[:, None], sites.used[:, 0], grid)
    return KernelMap(fwd, fwd[:, ::-1], from_table(fwd, sites.capacity, sites.count, sites.count))


def strided_map(
    sites: Sites,
    kernel: int | Sequence[int],
    stride: int | Sequence[int],
    *,
    padding=None,
    dilation: int | Sequence[int] = 1,
    capacity: int | None = None,
    grid=None,
) -> tuple[Sites, KernelMap]:
    """The map of a convolution whose outputs are at all sites that a kernel reaches.

    With stride 1 it makes the set of sites grow; use `subm_map` to keep it.

    Args:
        sites: the sites; features are not read.
        kernel: sides of the window.
        stride: steps.
        padding: (low, high) for each dimension, one number for all, or "SAME". None is "SAME", but where kernel equals
            stride all padding is at the end: site i goes to i // stride, and none is lost.
        dilation: distance of the taps.
        capacity: rows of the output; by default always enough: those of the input times the number of outputs that one
            site can reach (one where kernel equals stride), at most all places.
        grid: as in `subm_map`.

    Returns:
        `(output sites, with no features; map)`. The transposed convolution from these back is `map.T`.

    Example:
        >>> from sparsejax.convolution.sites import from_mask
        >>> sites = from_mask(jnp.ones((1, 5, 1)), jnp.array([[True, True, False, False, True]]), capacity=3)
        >>> out, kernel_map = strided_map(sites, 2, 2)
        >>> out.shape, out.keys[:2].tolist(), kernel_map.fwd[:2].tolist()
        ((3,), [0, 2], [[0, 1], [2, 3]])
    """
    dims, shape = len(sites.shape), sites.shape
    window, step, spread = (
        per_dimension(name, value, dims)
        for name, value in (("kernel", kernel), ("stride", stride), ("dilation", dilation))
    )
    around = pads(shape, window, step, spread, padding)
    out_shape = output_shape(shape, window, step, spread, around)
    check_shape(out_shape)
    if capacity is None:
        # Taps that let a site reach an output repeat with a period, shorter if stride and dilation share a factor.
        periods = (s // math.gcd(s, d) for s, d in zip(step, spread, strict=True))
        most = math.prod(-(-side // period) for side, period in zip(window, periods, strict=True))
        capacity = min(sites.capacity * most, sites.batch_size * math.prod(out_shape))
    low, steps = np.array([pad for pad, _ in around]), np.array(step)
    reach = (taps(window) * np.array(spread))[:, None]
    at = sites.coords + low - reach
    reached = at // steps
    there = sites.used[:, 0] & jnp.all(at % steps == 0, axis=-1) & inside(reached, out_shape)
    reached = jnp.where(there[..., None], reached, 0)
    out_batch, out_keys, count, overflow = unique(
        jnp.where(there, sites.batch, sites.batch_size).reshape(-1),
        jnp.where(there, ravel(reached, out_shape), LAST_KEY).reshape(-1),
        sites.batch_size,
        capacity,
    )
    nothing = jnp.zeros((capacity, 0), sites.feats.dtype)
    out = Sites(out_batch, out_keys, nothing, count, overflow | sites.overflow, out_shape, sites.batch_size)
    bwd = _rows(out, sites.batch, reached, there, grid)
    fwd = _rows(sites, out.batch, out.coords * steps - low + reach, out.used[:, 0], grid)
    return out, KernelMap(fwd, bwd, from_table(fwd, sites.capacity, sites.count, out.count))


def taps(window: tuple[int, ...]) -> np.ndarray:
    """The taps of a kernel, int (taps, dimensions), in the order of its weights reshaped to (taps, in, out)."""
    return np.array(list(itertools.product(*(range(size) for size in window))))


def _rows(sites: Sites, batch, coords, wanted, grid) -> jax.Array:
    """The rows at coordinates (taps, n, dimensions) of samples (n,), as a table (n, taps)."""
    wanted = wanted & inside(coords, sites.shape)
    keys = ravel(jnp.where(wanted[..., None], coords, 0), sites.shape)
    batch = jnp.broadcast_to(batch, keys.shape)
    size = math.prod(sites.shape)
    return look_up(sites.batch, sites.keys, sites.batch_size, size, batch, keys, wanted, grid=grid).T
