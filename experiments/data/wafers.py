"""Synthetic wafer maps: places of defects on a wafer, far finer than any image of it."""

from collections.abc import Callable

import numpy as np


def _disc(random, count):
    angle, radius = random.uniform(0, 2 * np.pi, count), np.sqrt(random.uniform(0, 1, count))
    return radius * np.stack([np.cos(angle), np.sin(angle)])


def _ring(random, count, size):
    angle = random.uniform(0, 2 * np.pi, count)
    radius = random.uniform(0.3, 0.75) + random.normal(0, 0.02, count)
    return radius * np.stack([np.cos(angle), np.sin(angle)]) + random.normal(0, 0.03, (2, 1))


def _edge(random, count, size):
    angle = random.uniform(0, 2 * np.pi) + random.uniform(-1, 1, count) * random.uniform(0.5, 1.5)
    return (0.97 - np.abs(random.normal(0, 0.02, count))) * np.stack([np.cos(angle), np.sin(angle)])


def _cluster(random, count, size):
    return _disc(random, 1) * 0.7 + random.normal(0, random.uniform(0.02, 0.06), (2, count))


def _scratch(random, count, size):
    # Defects side by side along a thin curve, as wide as a single position.
    start, heading, bend = _disc(random, 1)[:, 0] * 0.6, random.uniform(0, 2 * np.pi), random.normal(0, 0.6)
    along = np.arange(count) * random.uniform(1.0, 1.5) * 2 / size
    direction = heading + bend * along / along[-1]
    return start[:, None] + np.cumsum(np.stack([np.cos(direction), np.sin(direction)]), axis=1) * along[1]


def _grid(random, count, size):
    # A small lattice, too fine for an image of the wafer: from afar it is a cluster.
    pitch, columns = random.integers(2, 9), max(1, int(np.sqrt(count)))
    row, column = np.divmod(np.arange(count), columns)
    return _disc(random, 1) * 0.7 + np.stack([row, column]) * pitch * 2 / size


def _random(random, count, size):
    return _disc(random, count)


# Each maps (numpy generator, points, positions across the wafer) to places (2, points) in the unit disc.
PATTERNS: dict[str, Callable] = {
    "ring": _ring,
    "edge": _edge,
    "cluster": _cluster,
    "random": _random,
    "scratch": _scratch,
    "grid": _grid,
}


def make_wafers(
    kinds: np.ndarray, *, size: int, points: tuple[int, int], seed: int, noise: float = 0.15
) -> list[np.ndarray]:
    """Makes one wafer for each entry of `kinds`.

    Args:
        kinds: int (wafers,), numbers of `PATTERNS` in their order.
        size: positions along each side of the square around the wafer.
        points: fewest and most defects of a wafer.
        seed: the same seed gives the same wafers.
        noise: share of defects that lie anywhere.

    Returns:
        For each wafer its defects, int32 (defects, 2), inside the wafer.

    Example:
        >>> [wafer] = make_wafers(np.array([0]), size=4096, points=(200, 300), seed=0)
        >>> wafer.dtype, 100 < len(wafer) <= 300, bool((wafer >= 0).all() and (wafer < 4096).all())
        (dtype('int32'), True, True)
    """
    random = np.random.default_rng(seed)
    patterns = list(PATTERNS.values())
    wafers = []
    for kind in kinds:
        count = int(random.integers(points[0], points[1] + 1))
        stray = int(noise * count)
        places = np.concatenate([patterns[kind](random, count - stray, size), _disc(random, stray)], axis=1)
        places = places[:, np.sum(places**2, axis=0) < 1]
        wafers.append(np.minimum((places.T + 1) / 2 * size, size - 1).astype(np.int32))
    return wafers


def stack_wafers(wafers: list[np.ndarray], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """One list of points for all wafers: the wafer of each, int32 (capacity,), and its place, int32 (capacity, 2).

    Unused rows are of wafer -1.

    Raises:
        ValueError: there are more points than rows.
    """
    count = sum(map(len, wafers))
    if count > capacity:
        raise ValueError(f"{len(wafers)} wafers have {count} defects; capacity is {capacity}, pass at least that")
    batch, coords = np.full(capacity, -1, np.int32), np.zeros((capacity, 2), np.int32)
    batch[:count] = np.repeat(np.arange(len(wafers)), [len(wafer) for wafer in wafers])
    coords[:count] = np.concatenate(wafers)
    return batch, coords


def bin_wafers(wafers: list[np.ndarray], size: int, bins: int) -> np.ndarray:
    """Counts of defects in bins x bins squares, float32 (wafers, bins, bins, 1), as log(1 + count)."""
    maps = np.zeros((len(wafers), bins, bins), np.float32)
    for each, wafer in zip(maps, wafers, strict=True):
        np.add.at(each, tuple((wafer.astype(np.int64) * bins // size).T), 1)
    return np.log1p(maps)[..., None]
