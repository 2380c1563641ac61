"""Static sizes of a block-sparse matrix, as every path sees them."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A matrix W of K inputs and N outputs in blocks, whose block columns are split into equal groups.

    Attributes:
        inputs: K.
        outputs: N.
        bk: rows of a block.
        bn: columns of a block.
        groups: G, groups of block columns with a capacity each.
        capacity: C, slots of a group.
    """

    inputs: int
    outputs: int
    bk: int
    bn: int
    groups: int
    capacity: int

    @property
    def rows(self) -> int:
        """Kb: blocks along the inputs, the last one possibly ragged."""
        return math.ceil(self.inputs / self.bk)

    @property
    def columns(self) -> int:
        """Nb: blocks along the outputs, the last one possibly ragged."""
        return math.ceil(self.outputs / self.bn)

    @property
    def group_columns(self) -> int:
        """Nb / G: block columns of a group."""
        return self.columns // self.groups

    @property
    def density(self) -> float:
        """Stored share of all blocks if every slot is in use."""
        return self.groups * self.capacity / (self.rows * self.columns)
