"""Random sparse arrays and what every convolution engine must make of them, computed by loops over taps in numpy."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_conv import native
from sparsejax.convolution import (
    SiteMask,
    from_mask,
    from_tiles,
    masked_conv,
    sparse_conv,
    strided_map,
    subm_map,
    tile_conv,
    tile_set,
    to_dense,
    to_tiles,
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """An input that is NaN at inactive sites, weights, and a mask of whole tiles."""

    x: jnp.ndarray
    weights: jnp.ndarray
    coarse: jnp.ndarray
    tile: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def shape(self):
        return self.x.shape[1:-1]

    @property
    def mask(self):
        return np.asarray(SiteMask(self.coarse).at(self.shape))

    @property
    def mask_out(self):
        return np.asarray(SiteMask(self.coarse).at([-(-size // self.stride) for size in self.shape]))


def problem(
    dims=2, kernel=3, stride=1, dilation=1, *, density=0.4, tile=4, grid=3, inputs=3, outputs=4, groups=1, seed=0
):
    random = np.random.default_rng(seed)
    coarse = random.random((2, *[grid] * dims)) < density
    x = random.normal(size=(2, *[grid * tile] * dims, inputs))
    x[~np.asarray(SiteMask(jnp.asarray(coarse)).at(x.shape[1:-1]))] = np.nan
    weights = random.normal(size=(*[kernel] * dims, inputs // groups, outputs)) / (kernel**dims * inputs) ** 0.5
    as_float = lambda array: jnp.asarray(array, jnp.float32)  # noqa: E731
    return Problem(as_float(x), as_float(weights), jnp.asarray(coarse), tile, stride, dilation, groups)


def same_pads(size, side, stride, dilation):
    total = max((-(-size // stride) - 1) * stride + (side - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def by_hand(x, weights, stride=1, dilation=1, groups=1, padding=None):
    """The convolution with "SAME" padding, tap by tap in float64."""
    x, weights = np.nan_to_num(np.asarray(x, np.float64)), np.asarray(weights, np.float64)
    window, shape = weights.shape[:-2], x.shape[1:-1]
    around = padding or [same_pads(size, side, stride, dilation) for size, side in zip(shape, window, strict=True)]
    padded = np.pad(x, ((0, 0), *around, (0, 0)))
    out_shape = [
        (size + low + high - (side - 1) * dilation - 1) // stride + 1
        for size, side, (low, high) in zip(shape, window, around, strict=True)
    ]
    inputs, features = weights.shape[-2] * groups, weights.shape[-1]
    out = np.zeros((len(x), *out_shape, features))
    for tap in itertools.product(*map(range, window)):
        cut = tuple(
            slice(t * dilation, t * dilation + (n - 1) * stride + 1, stride)
            for t, n in zip(tap, out_shape, strict=True)
        )
        rows = padded[(slice(None), *cut)].reshape(len(x), *out_shape, groups, inputs // groups)
        kernel = weights[tap].reshape(inputs // groups, groups, features // groups)
        out += np.einsum("...gi,igo->...go", rows, kernel).reshape(out.shape)
    return out


def gradients_by_hand(p, upstream):
    """Gradients of sum(by_hand * upstream) by x and weights: linear in each, so they are read off basis by basis."""
    x = np.nan_to_num(np.asarray(p.x, np.float64))
    window = p.weights.shape[:-2]
    around = [same_pads(size, side, p.stride, p.dilation) for size, side in zip(p.shape, window, strict=True)]
    padded = np.pad(x, ((0, 0), *around, (0, 0)))
    dx, dw = np.zeros_like(padded), np.zeros(p.weights.shape)
    inputs, features = p.weights.shape[-2], p.weights.shape[-1]
    g = upstream.reshape(*upstream.shape[:-1], p.groups, features // p.groups)
    for tap in itertools.product(*map(range, window)):
        cut = tuple(
            slice(t * p.dilation, t * p.dilation + (n - 1) * p.stride + 1, p.stride)
            for t, n in zip(tap, upstream.shape[1:-1], strict=True)
        )
        rows = padded[(slice(None), *cut)]
        kernel = np.asarray(p.weights[tap], np.float64).reshape(inputs, p.groups, features // p.groups)
        dx[(slice(None), *cut)] += np.einsum("...go,igo->...gi", g, kernel).reshape(rows.shape)
        pairs = rows.reshape(-1, p.groups, inputs), g.reshape(-1, *g.shape[-2:])
        dw[tap] = np.einsum("ngi,ngo->igo", *pairs).reshape(inputs, features)
    inner = tuple(slice(low, low + size) for (low, _), size in zip(around, p.shape, strict=True))
    return dx[(slice(None), *inner)], dw


def masked(p, x, weights):
    return masked_conv(x, weights, SiteMask(p.coarse), stride=p.stride, dilation=p.dilation, groups=p.groups)


def tiled(p, x, weights, implementation=None):
    tiles = tile_set(p.coarse, p.tile, capacity=p.coarse.size)
    out = tile_conv(
        to_tiles(x, tiles),
        weights,
        tiles,
        stride=p.stride,
        dilation=p.dilation,
        groups=p.groups,
        implementation=implementation,
    )
    return from_tiles(out, tiles.strided(p.stride))


def listed(p, x, weights, implementation=None):
    window = p.weights.shape[:-2]
    mask = SiteMask(p.coarse).at(p.shape)
    sites = from_mask(x, mask, capacity=mask.size)
    if p.stride == 1:
        out, kernel_map = sites, subm_map(sites, window, dilation=p.dilation)
    else:
        out, kernel_map = strided_map(sites, window, p.stride, padding="SAME", dilation=p.dilation)
    feats = sparse_conv(sites.feats, weights, kernel_map, groups=p.groups, implementation=implementation)
    dense = to_dense(out.with_feats(feats))
    return jnp.where(SiteMask(p.coarse).at(dense.shape[1:-1])[..., None], dense, 0)


def listed_by_xla(p, x, weights):
    return listed(p, x, weights, "xla")


ENGINES = {"masked": masked, "tiles": tiled, "sites": listed, "sites by XLA": listed_by_xla}
COMPILER = native.unavailable() is None
