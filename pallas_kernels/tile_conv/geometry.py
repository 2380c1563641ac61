"""How a convolution reaches from a tile into its neighbours."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution over tiles, one number for each dimension.

    Args:
        tile: sides of an input tile.
        window: sides of the kernel.
        stride: must divide the tile's sides.
        dilation: distance of the taps.
        low: padding before the first place, as of the whole array.
        groups: feature groups.
    """

    tile: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    low: tuple[int, ...]
    groups: int = 1

    @property
    def dims(self) -> int:
        """Dimensions of space."""
        return len(self.tile)

    @property
    def tile_out(self) -> tuple[int, ...]:
        """Sides of an output tile."""
        return tuple(size // step for size, step in zip(self.tile, self.stride, strict=True))

    @property
    def high(self) -> tuple[int, ...]:
        """How far the last window reaches beyond the tile; negative where it ends before."""
        return tuple(
            (out - 1) * step - low + (window - 1) * dilation + 1 - size
            for out, step, low, window, dilation, size in zip(
                self.tile_out, self.stride, self.low, self.window, self.dilation, self.tile, strict=True
            )
        )

    def check(self) -> None:
        """Raises a ValueError if a window reaches farther than the next tile, or tiles do not come out even."""
        for size, step, low, high in zip(self.tile, self.stride, self.low, self.high, strict=True):
            if size % step:
                raise ValueError(f"tiles of {size} are no multiple of the stride {step}; take larger tiles")
            if not 0 <= low <= size or high > size:
                raise ValueError(
                    f"a window reaches {low} before and {high} behind a tile of {size}, farther than the next tile; "
                    "take larger tiles or a smaller kernel"
                )
