"""Exact selection of the largest scores, without a sort.

Scores are read as unsigned integers in the order of the scores. A search over those integers finds the largest
threshold that enough entries reach; each pass counts, in one fused reduction, how many entries reach each of three
thresholds, and so settles two bits. An equal search over positions decides between the entries that tie at the
threshold; it makes no pass where nothing is left to decide. Only whole numbers are summed, and no axis is flattened,
gathered or sorted, so the mask keeps the sharding of the scores and is the same on every topology.
"""

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.masks.keys import sort_keys

# Three thresholds settle two bits a pass; a CPU then still waits for memory, not for the comparisons.
_THRESHOLDS = 3
_MAX_SIZE = 2**31 - 1


def select_top(scores: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Marks exactly the `count` largest scores.

    Ties go to the lower flat (row-major) index, -0.0 equals 0.0, and NaN ranks below everything else, so that it is
    chosen only when nothing else is left. Works under `jit`, `vmap` and automatic or explicit sharding, also with a
    traced `count`; nothing is compiled anew when `count` changes.

    Args:
        scores: real array of any shape: floating, integer or bool.
        count: how many to mark, an int or an integer scalar. More than there are candidates marks them all; a traced
            count below zero marks none.
        where: bool array of the same shape and sharding; only entries where it is True are candidates.

    Returns:
        Bool array with the shape and sharding of `scores`, with `min(count, number of candidates)` entries True.

    Raises:
        TypeError: `scores` is not real, `count` is not an integer, or `where` is not bool.
        ValueError: `count` is an int below zero, `where` has another shape, or there are more than 2**31 - 1 scores.

    Example:
        >>> select_top(jnp.array([[3.0, 1.0, jnp.nan], [3.0, 3.0, 2.0]]), 2).astype(int)
        Array([[1, 0, 0],
               [1, 0, 0]], dtype=int32)
    """
    return select_top_global([scores], count, where=[where])[0]


def select_top_global(
    scores: Sequence[jax.Array], count: int | jax.Array, *, where: Sequence[jax.Array | None] | None = None
) -> list[jax.Array]:
    """Marks exactly the `count` largest scores of several arrays together: one threshold for all of them.

    Ties go to the earlier array, then to the lower flat index; all else is as in `select_top`.

    Args:
        scores: real arrays of any shapes. Floating dtypes may be mixed, other dtypes must agree.
        count: how many to mark in all.
        where: for each array None, or a bool array of its shape that limits the candidates.

    Returns:
        A list of bool arrays with the shapes and shardings of `scores`.

    Raises:
        TypeError: as `select_top`; also when the dtypes have no exact common order.
        ValueError: as `select_top`, with the sizes added up; also when `where` has another length than `scores`.

    Example:
        >>> masks = select_top_global([jnp.array([1.0, 5.0]), jnp.array([4.0, 0.0, 5.0])], 3)
        >>> [mask.tolist() for mask in masks]
        [[False, True], [True, False, True]]
    """
    scores = [jnp.asarray(s) for s in scores]
    where = [None] * len(scores) if where is None else [w if w is None else jnp.asarray(w) for w in where]
    if len(where) != len(scores):
        raise ValueError(f"where has {len(where)} entries for {len(scores)} arrays of scores; give one (or None) each")
    for s, w in zip(scores, where, strict=True):
        if w is not None and w.dtype != jnp.bool_:
            raise TypeError(f"where must be a bool array, got {w.dtype}; compare it with something first")
        if w is not None and w.shape != s.shape:
            raise ValueError(f"where has shape {w.shape}, but the scores have shape {s.shape}; they must agree")
    total = sum(s.size for s in scores)
    if total > _MAX_SIZE:
        raise ValueError(f"{total} scores are more than the {_MAX_SIZE} that 32-bit counts allow; select in parts")
    count = _checked_count(count, total)
    if not scores:
        return []
    dtype = _common_dtype([s.dtype for s in scores])
    return _select(tuple(s.astype(dtype) for s in scores), tuple(where), count)


def refill_top(
    scores: jax.Array, kept: jax.Array, count: int | jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Adds the best of the entries not yet kept, so that `count` are kept in all.

    Args:
        scores: real array of any shape.
        kept: bool array of the same shape: what stays, whatever its score.
        count: how many are kept afterwards; when more are kept already, none is added.
        where: bool array of the same shape; only entries where it is True may be added.

    Returns:
        Bool array: `kept` and the additions.

    Example:
        >>> refill_top(jnp.array([9.0, 1.0, 5.0, 7.0]), jnp.array([False, True, False, False]), 2).tolist()
        [True, True, False, False]
    """
    free = ~kept if where is None else where & ~kept
    missing = jnp.maximum(jnp.asarray(count, jnp.int32) - jnp.sum(kept, dtype=jnp.int32), 0)
    return kept | select_top(scores, missing, where=free)


def _checked_count(count: int | jax.Array, total: int) -> jax.Array:
    if isinstance(count, jax.Array):
        if count.ndim or not jnp.issubdtype(count.dtype, jnp.integer):
            raise TypeError(f"count must be an integer scalar, got {count.dtype} of shape {count.shape}")
        count = count.astype(jnp.int32) if count.dtype.itemsize < 4 else count
        return jnp.clip(count, 0, total).astype(jnp.int32)
    try:
        count = operator.index(count)
    except TypeError:
        raise TypeError(
            f"count must be an integer, got {count!r}; masks.keep_count turns a sparsity into one"
        ) from None
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    return jnp.int32(min(count, total))


def _common_dtype(dtypes: Sequence[jnp.dtype]) -> jnp.dtype:
    if len(set(dtypes)) > 1 and not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
        names = ", ".join(str(d) for d in dtypes)
        raise TypeError(f"scores of dtypes {names} cannot be ranked together exactly; convert them to one dtype")
    return functools.reduce(jnp.promote_types, dtypes)


@jax.jit
def _select(scores: tuple[jax.Array, ...], where: tuple[jax.Array | None, ...], count: jax.Array) -> list[jax.Array]:
    arrays = (scores, where)
    total = sum(s.size for s in scores)
    starts = [sum(s.size for s in scores[:index]) for index in range(len(scores))]
    dtype = jax.eval_shape(sort_keys, scores[0]).dtype
    eligible = [s.size if w is None else jnp.sum(w, dtype=jnp.int32) for s, w in zip(*arrays, strict=True)]
    candidates = jnp.asarray(sum(eligible), jnp.int32)
    count = jnp.minimum(count, candidates)

    def keys(s, w):
        # Thresholds are above 0, so an excluded entry reaches none; `ties` tells it from a candidate whose key is 0.
        return sort_keys(s) if w is None else jnp.where(w, sort_keys(s), dtype.type(0))

    def reaching(arrays, threshold):
        return [keys(s, w) >= threshold for s, w in zip(*arrays, strict=True)]

    low, at_least, above = _search(reaching, arrays, count, candidates, dtype.type(np.iinfo(dtype).max))

    def ties(s, w):
        return keys(s, w) == low if w is None else (keys(s, w) == low) & w

    def early(arrays, threshold):
        # Places are counted from the end, so that the first ties are those with the largest places.
        *arrays, zero = arrays
        last = np.uint32(total) - threshold
        return [
            ties(s, w) & (_flat_index(s.shape, zero) + np.uint32(start) <= last)
            for s, w, start in zip(*arrays, starts, strict=True)
        ]

    with_zero = (*arrays, jnp.uint32(0))
    place, _, _ = _search(early, with_zero, count - above, at_least - above, np.uint32(total))
    return [(keys(s, w) > low) | e for s, w, e in zip(*arrays, early(with_zero, place), strict=True)]


def _search(
    hits: Callable, arrays: tuple, count: jax.Array, candidates: jax.Array, largest: np.unsignedinteger
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the largest threshold from 0 to `largest` that at least `count` entries reach.

    Args:
        hits: `hits(arrays, threshold)` says, array by array, which entries reach a threshold above 0.
        arrays: what `hits` reads.
        count: how many entries must reach the threshold.
        candidates: how many reach 0.
        largest: the upper end, in the dtype of thresholds.

    Returns:
        The threshold, how many entries reach it and how many reach more than it; the search ends early, and the last
        one is too small, where exactly `count` reach the threshold.
    """
    dtype = largest.dtype

    def unsettled(carry):
        low, high, at_least, _ = carry
        return (low < high) & (at_least != count)

    def narrow(carry):
        low, high, at_least, above = carry
        step = (high - low) // dtype.type(_THRESHOLDS + 1) + dtype.type(1)
        thresholds = low + jnp.minimum(jnp.arange(1, _THRESHOLDS + 1, dtype=dtype) * step, high - low)
        # Bound to a value of the loop, the keys are worked out anew in every pass, in registers. The compiler would
        # else compute them once, before the loop; to write and read that array costs more time, and memory.
        held, _ = lax.optimization_barrier((arrays, low))
        counts = jnp.stack(_count([hits(held, thresholds[i]) for i in range(_THRESHOLDS)]))
        reached = counts >= count  # thresholds rise and counts fall: first those that are reached, then the others
        low = jnp.max(jnp.where(reached, thresholds, low))
        at_least = jnp.min(jnp.where(reached, counts, at_least))
        above = jnp.max(jnp.where(reached, above, counts))
        return low, jnp.minimum(high, low + (step - dtype.type(1))), at_least, above

    # Worked out from an argument: constants that a mapped loop starts from have no mesh in their type.
    zero = candidates * 0
    start = (zero.astype(dtype), zero.astype(dtype) + largest, candidates, zero)
    low, _, at_least, above = lax.while_loop(unsettled, narrow, start)
    return low, at_least, above


def _count(hits: list[list[jax.Array]]) -> list[jax.Array]:
    """Counts the True entries of each row of arrays, all in one pass over each column."""
    return [sum(column) for column in zip(*map(_count_together, zip(*hits, strict=True)), strict=True)]


def _count_together(hits: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    # One reduction with several results reads its operands once, and XLA turns it into vector instructions for the
    # CPU; it does neither for several reductions with one result each. Devices then exchange these few numbers only.
    hits = tuple(h.astype(jnp.int32) for h in hits)
    zeros = (jnp.int32(0),) * len(hits)
    return tuple(lax.reduce(hits, zeros, lambda a, b: tuple(map(operator.add, a, b)), tuple(range(hits[0].ndim))))


def _flat_index(shape: tuple[int, ...], zero: jax.Array) -> jax.Array:
    """Row-major positions. All are worked out from `zero`: a loop's own zero keeps them out of memory, too."""
    index = zero
    for axis, size in enumerate(shape):
        index = index * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index
