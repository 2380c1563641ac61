"""Static sizes of an N:M matrix, as every path sees them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A matrix W of K inputs and N outputs that stores n of every m neighbouring inputs of a column.

    Attributes:
        inputs: K, a multiple of m.
        outputs: N, a multiple of share.
        n: values stored of a group.
        m: inputs of a group.
        share: neighbouring columns that have one pattern in common.
    """

    inputs: int
    outputs: int
    n: int
    m: int
    share: int

    @property
    def groups(self) -> int:
        """K / m: groups of a column."""
        return self.inputs // self.m

    @property
    def stored(self) -> int:
        """K n / m: rows of the stored values."""
        return self.groups * self.n
