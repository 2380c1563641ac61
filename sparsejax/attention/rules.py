"""Element rules: which query may see which key, written as comparisons of whole numbers.

A rule is a tree of frozen dataclasses: hashable, equal by value, and free of arrays, so that a kernel can take it as a
static argument. Its leaves compare integer expressions over named vectors; the arrays behind the names travel apart, in
a dict. Names say what kind of array stands there:

- `q_pos`, `kv_pos`: positions of queries and keys, always present;
- `q_*`, `kv_*`: a number for each query or key; `head_*`, `batch_*`: for each head, or example; `scalar_*`: one number;
- `table_*`: a bool matrix read by `Table`, which no kernel can read (see `tile_bits.py`).

Every rule answers two questions. `rule(q_pos, kv_pos, values)` is the answer element by element, in `jax.numpy`
operations that work inside Pallas kernels. `rule.tile(bounds)` is the answer for a whole tile, from the least and the
greatest value of each vector in it: 0 (no pair), 2 (every pair), or 1 (some pairs, or not known). The tile answer
follows by interval arithmetic and three-valued logic, so 0 and 2 are never wrong.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparsejax.attention.expressions import Bounds, bounds_of, namespace, value


def _kind(full, empty):
    """2 where full, 0 where empty, else 1."""
    return (1 + full * np.int8(1) - empty * np.int8(1)).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class AtMost:
    """`a <= b`, for integer expressions `a` and `b`."""

    a: Any
    b: Any

    def __call__(self, q_pos, kv_pos, values):
        values = {**values, "q_pos": q_pos, "kv_pos": kv_pos}
        return value(self.a, values) <= value(self.b, values)

    def tile(self, bounds: Bounds):
        (a_low, a_high), (b_low, b_high) = bounds_of(self.a, bounds), bounds_of(self.b, bounds)
        return _kind(np.asarray(1, np.int8) * (a_high <= b_low), np.asarray(1, np.int8) * (a_low > b_high))


@dataclasses.dataclass(frozen=True)
class Always:
    """Every query sees every key."""

    def __call__(self, q_pos, kv_pos, values):
        return (q_pos == q_pos) & (kv_pos == kv_pos)

    def tile(self, bounds: Bounds):
        return np.full((), 2, np.int8)


@dataclasses.dataclass(frozen=True)
class Both:
    a: Any
    b: Any

    def __call__(self, q_pos, kv_pos, values):
        return self.a(q_pos, kv_pos, values) & self.b(q_pos, kv_pos, values)

    def tile(self, bounds: Bounds):
        a, b = self.a.tile(bounds), self.b.tile(bounds)
        return namespace(a, b).minimum(a, b)


@dataclasses.dataclass(frozen=True)
class Either:
    a: Any
    b: Any

    def __call__(self, q_pos, kv_pos, values):
        return self.a(q_pos, kv_pos, values) | self.b(q_pos, kv_pos, values)

    def tile(self, bounds: Bounds):
        a, b = self.a.tile(bounds), self.b.tile(bounds)
        return namespace(a, b).maximum(a, b)


@dataclasses.dataclass(frozen=True)
class Opposite:
    a: Any

    def __call__(self, q_pos, kv_pos, values):
        return ~self.a(q_pos, kv_pos, values)

    def tile(self, bounds: Bounds):
        return (2 - self.a.tile(bounds)).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class ByHead:
    """Rule number `values[name]` of `rules`: another rule for each head."""

    name: str
    rules: tuple

    def __call__(self, q_pos, kv_pos, values):
        which = values[self.name]
        kept = [(which == i) & rule(q_pos, kv_pos, values) for i, rule in enumerate(self.rules)]
        result = kept[0]
        for other in kept[1:]:
            result = result | other
        return result

    def tile(self, bounds: Bounds):
        which, _ = bounds[self.name]
        # A head has exactly one rule, so the sum picks the kind of that one.
        return sum((which == i) * rule.tile(bounds) for i, rule in enumerate(self.rules)).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class Function:
    """A user's function of the values of `arguments`; `tile_function`, if given, of their (low, high) bounds."""

    function: Callable
    arguments: tuple
    tile_function: Callable | None = None

    def __call__(self, q_pos, kv_pos, values):
        values = {**values, "q_pos": q_pos, "kv_pos": kv_pos}
        return self.function(*(value(argument, values) for argument in self.arguments))

    def tile(self, bounds: Bounds):
        if self.tile_function is None:
            return np.ones((), np.int8)
        return self.tile_function(*(bounds_of(argument, bounds) for argument in self.arguments)).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class Table:
    """Entry `[row // q_block, column // kv_block]` of the bool matrix `name`; False outside of it."""

    name: str
    row: Any
    column: Any
    q_block: int
    kv_block: int

    def __call__(self, q_pos, kv_pos, values):
        values = {**values, "q_pos": q_pos, "kv_pos": kv_pos}
        table = values[self.name]
        row, column = value(self.row, values) // self.q_block, value(self.column, values) // self.kv_block
        rows, columns = table.shape[-2:]
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        xp = namespace(table, row, column)
        row, column = xp.clip(row, 0, rows - 1), xp.clip(column, 0, columns - 1)
        return xp.asarray(table)[(*_leading(table, row, column), row, column)] & inside

    def tile(self, bounds: Bounds):
        table, _ = bounds[self.name]
        rows, columns = table.shape[-2:]
        xp = namespace(table)
        # Sums over every rectangle from a summed-area table, so that a tile costs four look-ups whatever it covers.
        sums = xp.cumsum(xp.cumsum(table.astype(np.int32), -1), -2)
        sums = xp.pad(sums, [(0, 0)] * (table.ndim - 2) + [(1, 0), (1, 0)])
        (row_low, row_high), (column_low, column_high) = bounds_of(self.row, bounds), bounds_of(self.column, bounds)
        top, bottom = row_low // self.q_block, row_high // self.q_block + 1
        left, right = column_low // self.kv_block, column_high // self.kv_block + 1
        area = (bottom - top) * (right - left)
        xp = namespace(table, area)
        top, bottom = xp.clip(top, 0, rows), xp.clip(bottom, 0, rows)
        left, right = xp.clip(left, 0, columns), xp.clip(right, 0, columns)
        leading = _leading(table, top, left)
        sums = xp.asarray(sums)
        kept = sums[(*leading, bottom, right)] - sums[(*leading, top, right)]
        kept = kept - sums[(*leading, bottom, left)] + sums[(*leading, top, left)]
        return _kind(kept == area, kept == 0)


def _leading(table, *indices) -> tuple:
    """Indices of the example and head axes of a table [B, H, ., .]: the first two axes of what looks it up."""
    ndim = max(4, *(np.ndim(index) for index in indices))
    return tuple(
        np.arange(n).reshape((1,) * axis + (-1,) + (1,) * (ndim - axis - 1)) for axis, n in enumerate(table.shape[:-2])
    )


def rename(node, names: Mapping[str, str]):
    """The rule or expression with its arrays renamed; names that are not in `names` stay."""
    if isinstance(node, tuple):
        return tuple(rename(part, names) for part in node)
    if not dataclasses.is_dataclass(node):
        return node
    changes = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if "name" in changes:
        changes["name"] = names.get(changes["name"], changes["name"])
    parts = ("a", "b", "row", "column", "rules", "arguments")
    return type(node)(**{key: rename(part, names) if key in parts else part for key, part in changes.items()})


def names_in(node) -> set[str]:
    """Names of the arrays that a rule or an expression reads."""
    if isinstance(node, tuple):
        return set().union(*map(names_in, node))
    if not dataclasses.is_dataclass(node):
        return set()
    found = {node.name} if hasattr(node, "name") else set()
    return found.union(*(names_in(getattr(node, field.name)) for field in dataclasses.fields(node)))
