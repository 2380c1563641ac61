"""Slow and plain counterparts of selection and structures, in NumPy and Python loops."""

import itertools

import numpy as np


def top_mask(scores, count, where=None):
    """Stable sort: candidates first, then numbers before NaN, larger before smaller, lower flat index before higher."""
    values = np.asarray(scores)
    values = values.astype(np.int64 if values.dtype.kind in "iub" else np.float64).reshape(-1)
    allowed = np.ones(values.size, bool) if where is None else np.asarray(where).reshape(-1)
    rank = sorted(range(values.size), key=lambda i: (not allowed[i], np.isnan(values[i]), _descending(values[i])))
    mask = np.zeros(values.size, bool)
    mask[rank[: min(count, int(allowed.sum()))]] = True
    return mask.reshape(np.shape(scores))


def sorted_mask(scores, count):
    """`top_mask` for large arrays of numbers without NaN."""
    values = np.asarray(scores).reshape(-1)
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-values.astype(np.int32 if values.dtype.kind in "iu" else np.float64), kind="stable")[:count]] = (
        True
    )
    return mask.reshape(np.shape(scores))


def nm_mask(scores, n, m, axis, share=1):
    """Group by group, column by column."""
    scores = np.asarray(scores, np.float64)
    mask = np.zeros(scores.shape, bool)
    pooled = scores.reshape(*scores.shape[:-1], -1, share).sum(-1)
    moved, out = np.moveaxis(pooled, axis, -1), np.moveaxis(np.zeros(pooled.shape, bool), axis, -1)
    for index in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], m):
            group = moved[index][start : start + m]
            for i in sorted(range(m), key=lambda i: (-group[i], i))[:n]:
                out[(*index, start + i)] = True
    mask[:] = np.repeat(np.moveaxis(out, -1, axis), share, axis=-1)
    return mask


def block_mask(scores, block, pooling, count):
    """Block by block, over the elements that each really has."""
    scores = np.asarray(scores, np.float64)
    function = {"mean": np.mean, "max": np.max, "l2": lambda x: np.sqrt(np.sum(x**2))}[pooling]
    rows = range(0, scores.shape[-2], block[0])
    columns = range(0, scores.shape[-1], block[1])
    places = [
        (*lead, slice(r, r + block[0]), slice(c, c + block[1]))
        for lead, r, c in itertools.product(np.ndindex(scores.shape[:-2]), rows, columns)
    ]
    ranked = sorted(places, key=lambda place: -function(scores[place]))  # stable: lower flat index first
    mask = np.zeros(scores.shape, bool)
    for place in ranked[:count]:
        mask[place] = True
    return mask


def _descending(value):
    return 0 if np.isnan(value) else -value
