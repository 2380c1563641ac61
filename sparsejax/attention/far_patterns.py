"""Leaves of the mask algebra that reach far by leaving out keys: strides, dilations, grids, powers of two."""

from sparsejax.attention.expressions import KEY, QUERY, FloorDivide, Minus, Remainder
from sparsejax.attention.mask import Mask
from sparsejax.attention.patterns import Chunk, Local, equal, positive
from sparsejax.attention.rules import AtMost, Both, Either


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
    near = AtMost(distance, positive("stride", stride) - 1)
    far = AtMost(Remainder(distance, stride), 0)
    return Mask(Both(AtMost(KEY, QUERY), Either(near, far)), {}, f"Strided({stride})")


def Fixed(stride: int, columns: int) -> Mask:
    """`q // stride == k // stride` or `k % stride >= stride - columns`: Sparse Transformer, fixed (arXiv 1904.10509).

    The paper uses it as `Causal() & Fixed(128, 8)`, also with other strides and 16 or 32 columns.

    Example:
        >>> from sparsejax.attention import Causal
        >>> (Causal() & Fixed(2, 1)).to_dense(4, 4)[0, 0].astype(int)
        Array([[1, 0, 0, 0],
               [1, 1, 0, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 1]], dtype=int32)
    """
    positive("stride", stride)
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
    rule = AtMost(Remainder(Minus(QUERY, KEY), positive("dilation", dilation)), 0)
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
    rows = FloorDivide(QUERY, positive("width", width)), FloorDivide(KEY, width)
    columns = Remainder(QUERY, width), Remainder(KEY, width)
    along_row, along_column = equal(*rows), equal(*columns)
    if positive("stride", stride) > 1:
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
    for i in range(max(1, positive("length", length)).bit_length()):
        mask = mask | Local(2**i, -(2**i))
    return Mask(mask.rule, mask.arrays, f"LogSparse({length})")
