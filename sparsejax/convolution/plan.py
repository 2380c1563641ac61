"""Which engine a sparse convolution should run on, and why."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from pallas_kernels.sparse_conv import native
from sparsejax.convolution.checks import whole_number
from sparsejax.convolution.shapes import per_dimension


@dataclasses.dataclass(frozen=True)
class ConvPlan:
    """A choice of `conv_plan`; printed, it explains itself.

    Args:
        engine: "masked" (`masked_conv`), "tiles" (`tile_conv`) or "sites" (`sparse_conv`).
        reason: in words.
    """

    engine: str
    reason: str

    def __str__(self) -> str:
        return f"{self.engine}: {self.reason}"


def conv_plan(
    density: float,
    *,
    shape: Sequence[int],
    kernel: int | Sequence[int],
    channels: int,
    groups: int = 1,
    tile: int | Sequence[int] | None = None,
    backend: str | None = None,
) -> ConvPlan:
    """Chooses the engine; it never runs one, and no engine switches to another by itself.

    On CPU times are estimated from how many products an engine computes and from what one costs, as measured by
    benchmarks/convolution.py. On GPU and TPU the borders are not measured.

    Args:
        density: fraction of sites that is active.
        shape: sizes of space.
        kernel: sides of the window.
        channels: input channels.
        groups: feature groups.
        tile: sides of tiles that are active as a whole; None if sites are scattered.
        backend: "cpu", "gpu" or "tpu"; the default backend's by default.

    Returns:
        A `ConvPlan`.

    Raises:
        ValueError: `density` is not in [0, 1], a size is no whole number, or `backend` is another.

    Example:
        >>> print(conv_plan(0.01, shape=(512, 512), kernel=3, channels=32, backend="gpu"))
        sites: at density 0.01 work that follows the sites is least
        >>> print(conv_plan(0.9, shape=(512, 512), kernel=3, channels=32, backend="gpu"))
        masked: at density 0.9 gathering costs more than the zeros that it saves
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}; allowed are 0 to 1")
    if backend not in (None, "cpu", "gpu", "tpu"):
        raise ValueError(f"backend is {backend!r}; allowed are 'cpu', 'gpu', 'tpu' and None")
    channels, groups = whole_number("channels", channels), whole_number("groups", groups)
    if channels % groups:
        raise ValueError(f"groups is {groups}; it must divide the {channels} channels")
    shape, dims, backend = per_dimension("shape", shape, len(shape)), len(shape), backend or jax.default_backend()
    sides = per_dimension("kernel", kernel, dims)
    at = f"at density {density:g}"
    if math.prod(shape) * channels >= 2**30:
        return ConvPlan("sites", f"a dense array of {tuple(shape)} with {channels} channels is too large")
    if groups > 1:
        if density < 0.02 and backend != "tpu":
            return ConvPlan("sites", f"{at} even a grouped convolution, which waits for memory, gains from few sites")
        return ConvPlan("masked", "a grouped convolution waits for memory, and gathering moves more of it")
    size = None if tile is None else per_dimension("tile", tile, dims)
    # A window must not reach farther than the next tile.
    fits = size is not None and all(side // 2 <= t for side, t in zip(sides, size, strict=True))
    halo = 1.0 if size is None else math.prod((t + k - 1) / t for t, k in zip(size, sides, strict=True))
    if backend == "cpu":
        costs = _cpu_costs(density, dims, math.prod(sides), None if size is None else halo)
        if not fits:
            costs.pop("tiles", None)
        engine = min(costs, key=costs.get)
        others = ", ".join(f"{name} {cost:.2g}" for name, cost in costs.items())
        return ConvPlan(engine, f"{at} estimated times are {others}")
    if fits and density >= 0.02 and density * halo <= 0.6:
        return ConvPlan("tiles", f"{at} tiles of {size} with their halo read {density * halo:.2g} of the array")
    if backend == "tpu" and (channels % 128 or density > 0.1):
        return ConvPlan("masked", "on TPU gathering rows pays only for few sites and multiples of 128 channels")
    if density <= 0.2:
        return ConvPlan("sites", f"{at} work that follows the sites is least")
    return ConvPlan("masked", f"{at} gathering costs more than the zeros that it saves")


# Times of the same products on a CPU, that of `masked_conv` being 1: over rows, in two dimensions and in more, where
# XLA's is longer; over rows without the C++ kernel, in times of those with it; over tiles.
_ROWS_FLAT, _ROWS_SOLID, _ROWS_BY_XLA, _TILES = 0.8, 0.6, 9.0, 3.0


def _cpu_costs(density: float, dims: int, taps: int, halo: float | None) -> dict[str, float]:
    """Estimated times of the engines."""
    rows = _ROWS_FLAT if dims < 3 else _ROWS_SOLID
    if native.unavailable() is not None:
        rows *= _ROWS_BY_XLA
    # Neighbours of a site in an active tile are active, nearly all; those of scattered ones as often as any.
    present = density if halo is None else 1.0
    costs = {"masked": 1.0, "sites": rows * density * (1 + (taps - 1) * present) / taps}
    return costs if halo is None else costs | {"tiles": _TILES * density * halo}
