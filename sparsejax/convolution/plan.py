"""Which engine a sparse convolution should run on, and why."""

import dataclasses
import math
from collections.abc import Sequence

import jax

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

    The borders between engines are estimates for forward passes in 2-D on CPU, not measured with these engines.

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
        ValueError: `density` is not in [0, 1].

    Example:
        >>> print(conv_plan(0.01, shape=(512, 512), kernel=3, channels=32, backend="cpu"))
        sites: at density 0.01 work that follows the sites is least
        >>> print(conv_plan(0.9, shape=(512, 512), kernel=3, channels=32, backend="cpu"))
        masked: at density 0.9 gathering costs more than the zeros that it saves
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}; allowed are 0 to 1")
    dims, backend = len(tuple(shape)), backend or jax.default_backend()
    sides = per_dimension("kernel", kernel, dims)
    at = f"at density {density:g}"
    if math.prod(shape) * channels >= 2**30:
        return ConvPlan("sites", f"a dense array of {tuple(shape)} with {channels} channels is too large")
    if groups > 1:
        if density < 0.02 and backend != "tpu":
            return ConvPlan("sites", f"{at} even a grouped convolution, which waits for memory, gains from few sites")
        return ConvPlan("masked", "a grouped convolution waits for memory, and gathering moves more of it")
    if tile is not None:
        size = per_dimension("tile", tile, dims)
        halo = math.prod((t + k - 1) / t for t, k in zip(size, sides, strict=True))
        if density >= 0.02 and density * halo <= 0.6:
            return ConvPlan("tiles", f"{at} tiles of {size} with their halo read {density * halo:.2g} of the array")
    if backend == "tpu" and (channels % 128 or density > 0.1):
        return ConvPlan("masked", "on TPU gathering rows pays only for few sites and multiples of 128 channels")
    # XLA's convolution in three dimensions on CPU is an order of magnitude slower than in two.
    border = 0.4 if backend == "cpu" and dims > 2 else 0.2
    if density <= border:
        return ConvPlan("sites", f"{at} work that follows the sites is least")
    return ConvPlan("masked", f"{at} gathering costs more than the zeros that it saves")
