"""Leaves of the mask algebra that depend on positions only.

`q` and `k` are the positions of a query and a key; they count from 0 unless other positions are given when the mask is
compiled. Parameters may be ints or (traced) integer scalars: a new traced value compiles nothing anew.
"""

import jax
import numpy as np

from sparsejax.attention.expressions import KEY, QUERY, FloorDivide, Minus, Plus, Vector
from sparsejax.attention.mask import Mask, jnp_or_np
from sparsejax.attention.rules import Always, AtMost, Both


def Full() -> Mask:
    """Every query sees every key."""
    return Mask(Always(), {}, "Full()")


def Empty() -> Mask:
    """No query sees any key: a head that is skipped, whose output is 0."""
    return Mask((~Full()).rule, {}, "Empty()")


def Causal(offset: int | jax.Array = 0) -> Mask:
    """`k <= q + offset`.

    Args:
        offset: 0 aligns the first query with the first key ("top left"). Where queries are the last ones of a longer
            sequence and their positions are not given, `kv_len - q_len` aligns the last of both ("bottom right").

    Returns:
        The mask.

    Example:
        >>> Causal().to_dense(2, 3)[0, 0].astype(int)
        Array([[1, 0, 0],
               [1, 1, 0]], dtype=int32)
        >>> Causal(offset=1).to_dense(2, 3)[0, 0].astype(int)
        Array([[1, 1, 0],
               [1, 1, 1]], dtype=int32)
    """
    (offset_,), arrays, text = numbers(offset)
    right = QUERY if offset_ == 0 else Plus(QUERY, offset_)
    return Mask(AtMost(KEY, right), arrays, f"Causal({'' if offset_ == 0 else text})")


def Local(left: int | jax.Array | None, right: int | jax.Array | None = None) -> Mask:
    """`-right <= q - k <= left`: a sliding window; both bounds are inclusive, so `left + right + 1` keys.

    A "window of w tokens" of most libraries, which counts the query's own position, is `Local(w - 1)`.

    Args:
        left: how far back a query sees; None: without bound.
        right: how far ahead; None: without bound (combine with `Causal()`).

    Returns:
        The mask.

    Example:
        >>> (Causal() & Local(1)).to_dense(3, 3)[0, 0].astype(int)
        Array([[1, 0, 0],
               [1, 1, 0],
               [0, 1, 1]], dtype=int32)
    """
    (left_, right_), arrays, _ = numbers(left, right)
    distance = Minus(QUERY, KEY)
    rules = []
    if left is not None:
        rules.append(AtMost(distance, left_))
    if right is not None:
        rules.append(AtMost(Minus(KEY, QUERY), right_))
    rule = Always() if not rules else rules[0] if len(rules) == 1 else Both(*rules)
    return Mask(rule, arrays, f"Local({_text(left)}{'' if right is None else ', ' + _text(right)})")


def Chunk(size: int) -> Mask:
    """`q // size == k // size`: blocks on the diagonal. Llama 4's chunked attention is `Causal() & Chunk(size)`.

    Example:
        >>> Chunk(2).to_dense(3, 3)[0, 0].astype(int)
        Array([[1, 1, 0],
               [1, 1, 0],
               [0, 0, 1]], dtype=int32)
    """
    return Mask(equal(FloorDivide(QUERY, positive("size", size)), FloorDivide(KEY, size)), {}, f"Chunk({size})")


def KeyRange(low: int | jax.Array | None, high: int | jax.Array | None) -> Mask:
    """`low <= k < high`; None leaves a side open. The same keys for every query (Longformer's global keys).

    Example:
        >>> KeyRange(1, 3).to_dense(1, 4)[0, 0].astype(int)
        Array([[0, 1, 1, 0]], dtype=int32)
    """
    return _range(KEY, low, high, f"KeyRange({_text(low)}, {_text(high)})")


def QueryRange(low: int | jax.Array | None, high: int | jax.Array | None) -> Mask:
    """`low <= q < high`; None leaves a side open. Queries that see every key (Longformer's global queries).

    Example:
        >>> (Causal() | QueryRange(0, 1)).to_dense(2, 3)[0, 0].astype(int)
        Array([[1, 1, 1],
               [1, 1, 0]], dtype=int32)
    """
    return _range(QUERY, low, high, f"QueryRange({_text(low)}, {_text(high)})")


def Sink(n: int | jax.Array) -> Mask:
    """`0 <= k < n`: the first tokens, which every query sees.

    StreamingLLM (arXiv 2309.17453) is `Causal() & (Local(window - 1) | Sink(4))`.

    Example:
        >>> (Causal() & (Local(0) | Sink(1))).to_dense(3, 3)[0, 0].astype(int)
        Array([[1, 0, 0],
               [1, 1, 0],
               [1, 0, 1]], dtype=int32)
    """
    return _range(KEY, 0, n, f"Sink({_text(n)})")


def _range(side: Vector, low, high, text: str) -> Mask:
    last = high - 1 if isinstance(high, int) else high
    (low_, last_), arrays, _ = numbers(low, last)
    rules = []
    if low is not None:
        rules.append(AtMost(low_, side))
    if high is not None:
        rules.append(AtMost(side, last_) if isinstance(high, int) else AtMost(Plus(side, 1), last_))
    rule = Always() if not rules else rules[0] if len(rules) == 1 else Both(*rules)
    return Mask(rule, arrays, text)


def equal(a, b) -> Both:
    """Both at most the other."""
    return Both(AtMost(a, b), AtMost(b, a))


def numbers(*numbers):
    """Each number as an int, or as the name of a scalar array."""
    parts, arrays = [], {}
    for number in numbers:
        if isinstance(number, jax.Array | np.ndarray) and not isinstance(number, np.generic):
            if number.ndim or not np.issubdtype(number.dtype, np.integer):
                raise ValueError(
                    f"a bound must be an int or an integer scalar, not {number.dtype}{list(number.shape)}: for one "
                    f"value per head use per_head([...]); for one per example, Prefix(lengths) or Segment(ids)"
                )
            name = f"scalar_{len(arrays)}"
            arrays[name] = jnp_or_np(number)
            parts.append(Vector(name))
        else:
            if not isinstance(number, int | np.integer | None):
                raise ValueError(f"a bound must be an int or an integer scalar, not {number!r}")
            parts.append(None if number is None else int(number))
    return parts, arrays, ", ".join(map(_text, numbers))


def _text(number) -> str:
    return "traced" if isinstance(number, jax.Array) else str(number)


def positive(name: str, number: int) -> int:
    """The number; raises `ValueError` where it is no int, or below 1."""
    if not isinstance(number, int | np.integer):
        raise ValueError(f"{name} must be an int, not {number!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, not {number}")
    return number
