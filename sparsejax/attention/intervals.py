"""Sets of tiles as sorted intervals, and the tiles of a mask found without looking at every tile.

A tile (i, j) of a grid with nk columns is the number i * nk + j, so a set of tiles is a set of intervals on a line. A
comparison whose sides rise or fall along the keys, as for every pattern of positions in order, has one boundary in
each row of tiles, found by bisection for all rows at once. Only what has no such order (remainders, unsorted ids,
tables) is looked at tile by tile, and only where the rest of the expression leaves it open.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from sparsejax.attention.expressions import FloorDivide, Minus, Plus, Remainder, Vector
from sparsejax.attention.rules import Always, AtMost, Both, ByHead, Either, Opposite

_CHUNK = 1 << 19


class Intervals(NamedTuple):
    """Whole numbers in `start[i] <= x < end[i]`: int64, sorted, disjoint, not empty."""

    start: np.ndarray
    end: np.ndarray

    def size(self) -> int:
        """How many numbers the intervals hold."""
        return int((self.end - self.start).sum())

    def numbers(self) -> np.ndarray:
        """All numbers, sorted."""
        return next(self.chunks(max(1, self.size())), np.zeros(0, np.int64))

    def chunks(self, size: int = _CHUNK) -> Iterator[np.ndarray]:
        """All numbers, sorted, at most `size` at a time."""
        length = self.end - self.start
        before = np.cumsum(length) - length
        total = self.size()
        for first in range(0, total, size):
            rank = np.arange(first, min(first + size, total), dtype=np.int64)
            inside = np.searchsorted(before, rank, side="right") - 1
            yield rank + (self.start - before)[inside]


def whole(size: int) -> Intervals:
    """All of 0 ... size - 1."""
    return Intervals(np.zeros(min(size, 1), np.int64), np.full(min(size, 1), size, np.int64))


def of_numbers(numbers: np.ndarray) -> Intervals:
    """Intervals of sorted, distinct numbers."""
    jump = np.flatnonzero(np.diff(numbers) != 1)
    return Intervals(
        numbers[np.concatenate([[0], jump + 1])] if numbers.size else numbers,
        numbers[np.concatenate([jump, [-1]])] + 1 if numbers.size else numbers,
    )


def of_pieces(start: np.ndarray, end: np.ndarray) -> Intervals:
    """Intervals of sorted, disjoint pieces, some of which may be empty or touch."""
    some = start < end
    start, end = start[some], end[some]
    apart = start[1:] != end[:-1]
    first, last = np.concatenate([[True], apart])[: len(start)], np.concatenate([apart, [True]])[: len(end)]
    return Intervals(start[first], end[last])


def union(a: Intervals, b: Intervals) -> Intervals:
    """Numbers in a or in b."""
    return _sweep(a, b, 1)


def common(a: Intervals, b: Intervals) -> Intervals:
    """Numbers in both."""
    return _sweep(a, b, 2)


def without(a: Intervals, b: Intervals) -> Intervals:
    """Numbers in a that are not in b."""
    if not len(a.start) or not len(b.start):
        return a
    low, high = min(a.start[0], b.start[0]), max(a.end[-1], b.end[-1])
    gaps = of_pieces(np.concatenate([[low], b.end]), np.concatenate([b.start, [high]]))
    return common(a, gaps)


def _sweep(a: Intervals, b: Intervals, needed: int) -> Intervals:
    position = np.concatenate([a.start, b.start, a.end, b.end])
    # Stable, starts first: intervals that touch are one interval.
    order = np.argsort(position, kind="stable")
    opens = order < len(a.start) + len(b.start)
    count = np.cumsum(np.where(opens, 1, -1))
    inside = count >= needed
    before = np.concatenate([[False], inside[:-1]])[: len(inside)]
    position = position[order]
    return of_pieces(position[inside & ~before], position[~inside & before])


@dataclasses.dataclass(frozen=True)
class TileGrid:
    """Least and greatest value of every array in each row and each column of tiles.

    Attributes:
        rows: `q_*` arrays: (low, high), int64 [nq].
        columns: `kv_*` arrays: (low, high), int64 [nk].
        fixed: arrays that have one value (of the head and example at hand): (value, value); tables as they are.
        nq: rows of tiles.
        nk: columns of tiles.
    """

    rows: Mapping[str, tuple]
    columns: Mapping[str, tuple]
    fixed: Mapping[str, tuple]
    nq: int
    nk: int

    def at(self, row: np.ndarray, column: np.ndarray) -> dict[str, tuple]:
        """The bounds at given tiles."""
        bounds = dict(self.fixed)
        bounds |= {name: (low[row], high[row]) for name, (low, high) in self.rows.items()}
        return bounds | {name: (low[column], high[column]) for name, (low, high) in self.columns.items()}

    def rising(self) -> frozenset[str]:
        """The `kv_*` arrays whose bounds never fall from a tile to the next."""
        return frozenset(n for n, pair in self.columns.items() if all((np.diff(bound) >= 0).all() for bound in pair))


def find_tiles(rule, grid: TileGrid) -> tuple[Intervals, Intervals]:
    """Tiles that may hold a pair, and tiles that are known to hold every pair; the second are among the first."""
    return _find(rule, grid, grid.rising(), whole(grid.nq * grid.nk))


def _find(rule, grid: TileGrid, rising: frozenset[str], within: Intervals) -> tuple[Intervals, Intervals]:
    """The tiles among `within`."""
    match rule:
        case Always():
            return within, within
        case Both(a, b):
            if _unordered(a, rising) and not _unordered(b, rising):
                a, b = b, a
            some_a, all_a = _find(a, grid, rising, within)
            some, all_b = _find(b, grid, rising, some_a)
            return some, common(all_a, all_b)
        case Either(a, b):
            if _unordered(a, rising) and not _unordered(b, rising):
                a, b = b, a
            some_a, all_a = _find(a, grid, rising, within)
            some_b, all_b = _find(b, grid, rising, without(within, all_a))
            return union(some_a, some_b), union(all_a, all_b)
        case Opposite(a):
            some, every = _find(a, grid, rising, within)
            return without(within, every), without(within, some)
        case ByHead(name, rules):
            return _find(rules[int(grid.fixed[name][0])], grid, rising, within)
        case AtMost(a, b) if not _unordered(rule, rising):
            falls = -1 in (_slope(b, rising), -(_slope(a, rising) or 0))
            some, every = (common(_ordered(rule, grid, level, falls), within) for level in (1, 2))
            return some, every
    found = [(np.zeros(0, np.int64),) * 2]
    for tiles in within.chunks():
        kind = np.broadcast_to(rule.tile(grid.at(tiles // grid.nk, tiles % grid.nk)), tiles.shape)
        found.append((tiles[kind > 0], tiles[kind == 2]))
    some, every = zip(*found, strict=True)
    return of_numbers(np.concatenate(some)), of_numbers(np.concatenate(every))


def _ordered(rule, grid: TileGrid, level: int, falls: bool) -> Intervals:
    """Tiles of at least this kind, for a rule whose kind only rises (or only falls) along each row."""
    row = np.arange(grid.nq)
    low, high = np.zeros(grid.nq, np.int64), np.full(grid.nq, grid.nk, np.int64)
    for _ in range(grid.nk.bit_length()):
        middle = (low + high) // 2
        kind = rule.tile(grid.at(row, np.minimum(middle, grid.nk - 1)))
        # The boundary is the first tile that reaches the level, or the first that no longer does.
        reached = ((kind >= level) != falls) & (middle < grid.nk)
        low, high = np.where(reached | (low >= high), low, middle + 1), np.where(reached, middle, high)
    first = row * grid.nk
    return of_pieces(first, first + low) if falls else of_pieces(first + low, first + grid.nk)


def _slope(expression, rising: frozenset[str]) -> int | None:
    """1 if the expression rises along the keys, -1 if it falls, 0 if it stays, None if nothing is known."""
    match expression:
        case Vector(name):
            return (1 if name in rising else None) if name.startswith("kv_") else 0
        case Plus(a, b) | Minus(a, b):
            first, second = _slope(a, rising), _slope(b, rising)
            if first is None or second is None:
                return None
            second = -second if isinstance(expression, Minus) else second
            return None if first * second < 0 else first or second
        case FloorDivide(a, _):
            return _slope(a, rising)
        case Remainder(a, _):
            return 0 if _slope(a, rising) == 0 else None
    return 0


def _unordered(rule, rising: frozenset[str]) -> bool:
    """Whether the rule has a part that has to be looked at tile by tile."""
    match rule:
        case AtMost(a, b):
            slopes = _slope(a, rising), _slope(b, rising)
            return None in slopes or slopes[0] * slopes[1] > 0
        case Both(a, b) | Either(a, b):
            return _unordered(a, rising) or _unordered(b, rising)
        case Opposite(a):
            return _unordered(a, rising)
        case ByHead(_, rules):
            return any(_unordered(part, rising) for part in rules)
        case Always():
            return False
    return True
