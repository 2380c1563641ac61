"""Leaves of the mask algebra that depend on positions only.

`q` and `k` are the positions of a query and a key; they count from 0 unless other positions are given when the mask is
compiled. Parameters may be ints or (traced) integer scalars: a new traced value compiles nothing anew.
"""

import jax
import numpy as np

from sparsejax.attention.mask import Mask, jnp_or_np
from sparsejax.attention.rules import (
    KEY,
    QUERY,
    Always,
    AtMost,
    Both,
    Either,
    FloorDivide,
    Minus,
    Plus,
    Remainder,
    Vector,
)


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
    (offset_,), arrays, text = _numbers(offset)
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
    (left_, right_), arrays, _ = _numbers(left, right)
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
    return Mask(_equal(FloorDivide(QUERY, _positive("size", size)), FloorDivide(KEY, size)), {}, f"Chunk({size})")


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


def Strided(stride: int) -> Mask:
    """`k <= q` and (`q - k < stride` or `(q - k) % stride == 0`): Sparse Transformer, strided (arXiv 1904.10509).

    Args:
        stride: near the square root of the length.

    Returns:
        The causal pattern with both heads' keys merged. For keys at multiples of a stride alone, see `Dilated`.

    Example:
        >>> Strided(2).to_dense(5, 5)[0, 0].astype(int)
        Array([[1, 0, 0, 0, 0],
               [1, 1, 0, 0, 0],
               [1, 1, 1, 0, 0],
               [0, 1, 1, 1, 0],
               [1, 0, 1, 1, 1]], dtype=int32)
    """
    distance = Minus(QUERY, KEY)
    near = AtMost(distance, _positive("stride", stride) - 1)
    far = AtMost(Remainder(distance, stride), 0)
    return Mask(Both(AtMost(KEY, QUERY), Either(near, far)), {}, f"Strided({stride})")


def Fixed(stride: int, columns: int) -> Mask:
    """`q // stride == k // stride` or `k % stride >= stride - columns`: Sparse Transformer, fixed (arXiv 1904.10509).

    The paper uses it as `Causal() & Fixed(128, 8)`, also with other strides and 16 or 32 columns.

    Example:
        >>> (Causal() & Fixed(2, 1)).to_dense(4, 4)[0, 0].astype(int)
        Array([[1, 0, 0, 0],
               [1, 1, 0, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 1]], dtype=int32)
    """
    _positive("stride", stride)
    summary = AtMost(stride - columns, Remainder(KEY, stride))
    return Mask(Either(Chunk(stride).rule, summary), {}, f"Fixed({stride}, {columns})")


def Dilated(window: int | None, dilation: int) -> Mask:
    """`(q - k) % dilation == 0` and `|q - k| < window * dilation`: Longformer's upper layers (arXiv 2004.05150).

    Args:
        window: how many keys to each side, the own position counted; None: without bound.
        dilation: the distance between neighbouring keys.

    Returns:
        The mask.

    Example:
        >>> Dilated(2, 2).to_dense(5, 5)[0, 0].astype(int)[2]
        Array([1, 0, 1, 0, 1], dtype=int32)
    """
    rule = AtMost(Remainder(Minus(QUERY, KEY), _positive("dilation", dilation)), 0)
    if window is not None:
        reach = window * dilation - 1
        rule = Both(rule, Both(AtMost(Minus(QUERY, KEY), reach), AtMost(Minus(KEY, QUERY), reach)))
    return Mask(rule, {}, f"Dilated({window}, {dilation})")


def GridAxial(width: int, stride: int = 1) -> Mask:
    """Tokens of an image, row by row: every `stride`-th pixel of the query's own row and of its own column.

    Axial attention with `stride=1`; the graph of MobileViG (arXiv 2307.00395) without wrap-around with `stride=2`.

    Args:
        width: pixels in a row.
        stride: distance between neighbouring keys in a row or column.

    Returns:
        The mask; the own pixel is always visible.

    Example:
        >>> GridAxial(3).to_dense(9, 9)[0, 0][4].reshape(3, 3).astype(int)
        Array([[0, 1, 0],
               [1, 1, 1],
               [0, 1, 0]], dtype=int32)
    """
    rows = FloorDivide(QUERY, _positive("width", width)), FloorDivide(KEY, width)
    columns = Remainder(QUERY, width), Remainder(KEY, width)
    along_row, along_column = _equal(*rows), _equal(*columns)
    if _positive("stride", stride) > 1:
        along_row = Both(along_row, AtMost(Remainder(Minus(*columns), stride), 0))
        along_column = Both(along_column, AtMost(Remainder(Minus(*rows), stride), 0))
    return Mask(Either(along_row, along_column), {}, f"GridAxial({width}{f', {stride}' if stride > 1 else ''})")


def LogSparse(length: int) -> Mask:
    """`q - k` is 0 or a power of two: log-many keys for each query (Li et al., arXiv 1907.00235).

    Args:
        length: the longest distance that is of interest; keys further back than that are never seen.

    Returns:
        The causal mask.

    Example:
        >>> LogSparse(8).to_dense(8, 8)[0, 0].astype(int)[7]
        Array([0, 0, 0, 1, 0, 1, 1, 1], dtype=int32)
    """
    mask = Local(0, 0)
    for i in range(max(1, _positive("length", length)).bit_length()):
        mask = mask | Local(2**i, -(2**i))
    return Mask(mask.rule, mask.arrays, f"LogSparse({length})")


def _range(side: Vector, low, high, text: str) -> Mask:
    last = high - 1 if isinstance(high, int) else high
    (low_, last_), arrays, _ = _numbers(low, last)
    rules = []
    if low is not None:
        rules.append(AtMost(low_, side))
    if high is not None:
        rules.append(AtMost(side, last_) if isinstance(high, int) else AtMost(Plus(side, 1), last_))
    rule = Always() if not rules else rules[0] if len(rules) == 1 else Both(*rules)
    return Mask(rule, arrays, text)


def _equal(a, b) -> Both:
    return Both(AtMost(a, b), AtMost(b, a))


def _numbers(*numbers):
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
            parts.append(None if number is None else int(number))
    return parts, arrays, ", ".join(map(_text, numbers))


def _text(number) -> str:
    return "traced" if isinstance(number, jax.Array) else str(number)


def _positive(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, not {number}")
    return number
