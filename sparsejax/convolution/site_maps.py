"""Kernel maps: which input site every tap of a convolution reads for every output site."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_conv import KernelMap, native
from sparsejax.convolution.checks import whole_number
from sparsejax.convolution.shapes import output_shape, pads, per_dimension
from sparsejax.convolution.site_keys import GRID_PLACES, LAST_KEY, check_shape, inside, look_up, ravel, unique
from sparsejax.convolution.sites import Sites


def subm_map(
    sites: Sites, kernel: int | Sequence[int], *, dilation: int | Sequence[int] = 1, search: str | None = None
) -> KernelMap:
    """The map of a submanifold convolution: outputs are at the input's sites, so that sparsity stays as it is.

    Args:
        sites: the sites; features are not read.
        kernel: odd sides of the window.
        dilation: distance of the taps.
        search: how neighbours are found: "native" walks through sorted lists (CPU), "grid" has a table of all places,
            "bisect" halves the list. None takes the first that works here and, for "grid", is small enough. The map is
            the same.

    Returns:
        The map.

    Raises:
        ValueError: a side is even.

    Example:
        >>> from sparsejax.convolution.sites import from_mask
        >>> sites = from_mask(jnp.ones((1, 4, 1)), jnp.array([[True, True, False, True]]), capacity=3)
        >>> subm_map(sites, 3).fwd.tolist()
        [[3, 0, 3], [0, 1, 2], [1, 3, 3]]

    References:
        Graham and van der Maaten, Submanifold Sparse Convolutional Networks, 2017, arXiv:1706.01307, section 2.
    """
    dims = len(sites.shape)
    window, spread = per_dimension("kernel", kernel, dims), per_dimension("dilation", dilation, dims)
    if any(size % 2 == 0 for size in window):
        raise ValueError(
            f"kernel is {window}; a submanifold convolution needs odd sides, use strided_map for even ones"
        )
    low = [size // 2 * d for size, d in zip(window, spread, strict=True)]
    fwd = _neighbours(sites, sites, window, (1,) * dims, [-n for n in low], spread, (1,) * dims, search)
    return KernelMap(fwd, fwd[::-1], sites.count, sites.count, window)


def strided_map(
    sites: Sites,
    kernel: int | Sequence[int],
    stride: int | Sequence[int],
    *,
    padding=None,
    dilation: int | Sequence[int] = 1,
    capacity: int | None = None,
    search: str | None = None,
) -> tuple[Sites, KernelMap]:
    """The map of a convolution whose outputs are at all sites that a kernel reaches.

    With stride 1 it makes the set of sites grow; use `subm_map` to keep it.

    Args:
        sites: the sites; features are not read.
        kernel: sides of the window.
        stride: steps.
        padding: (low, high) or a number for each dimension, one number for all, "SAME" or "VALID". None is "SAME", but
            where kernel equals stride all padding is at the end: site i goes to i // stride, and none is lost.
        dilation: distance of the taps.
        capacity: rows of the output; by default always enough: those of the input times the number of outputs that one
            site can reach (one where kernel equals stride), at most all places.
        search: as in `subm_map`.

    Returns:
        `(output sites, with no features; map)`. The transposed convolution from these back is `map.T`.

    Example:
        >>> from sparsejax.convolution.sites import from_mask
        >>> sites = from_mask(jnp.ones((1, 5, 1)), jnp.array([[True, True, False, False, True]]), capacity=3)
        >>> out, kernel_map = strided_map(sites, 2, 2)
        >>> out.shape, out.keys[:2].tolist(), kernel_map.fwd.tolist()
        ((3,), [0, 2], [[0, 2, 3], [1, 3, 3]])
    """
    dims, shape = len(sites.shape), sites.shape
    window, step, spread = (
        per_dimension(name, value, dims)
        for name, value in (("kernel", kernel), ("stride", stride), ("dilation", dilation))
    )
    around = pads(shape, window, step, spread, padding)
    out_shape = output_shape(shape, window, step, spread, around)
    check_shape(out_shape)
    if capacity is not None:
        capacity = whole_number("capacity", capacity, 0)
    else:
        # Taps that let a site reach an output repeat with a period, shorter if stride and dilation share a factor.
        periods = (s // math.gcd(s, d) for s, d in zip(step, spread, strict=True))
        most = math.prod(-(-side // period) for side, period in zip(window, periods, strict=True))
        capacity = min(sites.capacity * most, sites.batch_size * math.prod(out_shape))
    low, once = tuple(pad for pad, _ in around), (1,) * dims
    back = (once, low, tuple(-d for d in spread), step)
    reached, there = _reached(sites, out_shape, window, *back)
    out_batch, out_keys, count, overflow = unique(
        jnp.where(there, sites.batch, sites.batch_size).reshape(-1),
        jnp.where(there, reached, LAST_KEY).reshape(-1),
        sites.batch_size,
        capacity,
    )
    nothing = jnp.zeros((capacity, 0), sites.feats.dtype)
    out = Sites(out_batch, out_keys, nothing, count, overflow | sites.overflow, out_shape, sites.batch_size)
    fwd = _neighbours(sites, out, window, step, tuple(-n for n in low), spread, once, search)
    by_native = _by_native(search)
    bwd = native.inverse(fwd, sites.capacity) if by_native else _neighbours(out, sites, window, *back, search)
    return out, KernelMap(fwd, bwd, sites.count, out.count, window)


def _reached(rows: Sites, shape, window, scale, shift, spread, divide) -> tuple[jax.Array, jax.Array]:
    """Keys in a grid of places `(coordinate * scale + shift + tap * spread) / divide`, and which are whole and inside.

    Both are (taps, rows). For the outputs of a convolution these places are its inputs; for inputs, outputs.
    """
    taps = np.array(list(itertools.product(*(range(size) for size in window))))
    at = rows.coords * np.array(scale) + (np.array(shift) + taps * np.array(spread))[:, None]
    place = at // np.array(divide)
    there = rows.used[:, 0] & jnp.all(at % np.array(divide) == 0, axis=-1) & inside(place, shape)
    return ravel(jnp.where(there[..., None], place, 0), shape), there


def _by_native(search: str | None) -> bool:
    """Whether the C++ code finds neighbours, checked."""
    if search not in (None, "native", "grid", "bisect"):
        raise ValueError(f"search is {search!r}; allowed are None, 'native', 'grid' and 'bisect'")
    refused = native.unavailable() if search in (None, "native") else search
    if refused is not None and search == "native":
        raise ValueError(f"search='native' does not work here: {refused}")
    return refused is None


def _neighbours(listed: Sites, rows: Sites, window, scale, shift, spread, divide, search) -> jax.Array:
    """The table (taps, rows) of where in a list of sites the places of `_reached` are; C++ divides by 1 alone."""
    if _by_native(search):
        both = ((each.batch, each.keys, each.shape, each.batch_size) for each in (listed, rows))
        return native.neighbours(*both, window, scale=scale, shift=shift, spread=spread)
    keys, there = _reached(rows, listed.shape, window, scale, shift, spread, divide)
    size, batch = math.prod(listed.shape), jnp.broadcast_to(rows.batch, keys.shape)
    grid = listed.batch_size * size <= GRID_PLACES if search is None else search == "grid"
    return look_up(listed.batch, listed.keys, listed.batch_size, size, batch, keys, there, grid=grid)
