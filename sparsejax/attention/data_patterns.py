"""Leaves of the mask algebra that read arrays: segments, prefixes, chosen tokens, matrices, and users' functions."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from sparsejax.attention.expressions import KEY, QUERY, Plus, Vector
from sparsejax.attention.mask import Mask, jnp_or_np
from sparsejax.attention.patterns import equal, numbers, positive
from sparsejax.attention.rules import AtMost, Both, Either, Function, Table


def Segment(q_ids, kv_ids=None) -> Mask:
    """`id(q) == id(k)` and `id >= 0`: packed documents. Negative ids are padding, which sees nothing and is not seen.

    Args:
        q_ids: int [Sq] or [B, Sq].
        kv_ids: int [Sk] or [B, Sk]; None takes `q_ids`.

    Returns:
        The mask. Tiles are skipped by the least and greatest id in them, so ids that increase along the sequence skip
        the most.

    Example:
        >>> Segment(np.array([0, 0, 1, -1])).to_dense(4, 4)[0, 0].astype(int)
        Array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [0, 0, 1, 0],
               [0, 0, 0, 0]], dtype=int32)
    """
    q_ids = _vector("q_ids", q_ids, np.integer)
    kv_ids = q_ids if kv_ids is None else _vector("kv_ids", kv_ids, np.integer)
    q, k = Vector("q_0"), Vector("kv_0")
    return Mask(Both(equal(q, k), AtMost(0, q)), {"q_0": q_ids, "kv_0": kv_ids}, "Segment(...)")


def Prefix(length) -> Mask:
    """`k <= q` or `k < length`: a prefix in both directions, then causal (prefix language model).

    Args:
        length: int, integer scalar, or one length for each example, int [B]; may be traced.

    Returns:
        The mask.

    Example:
        >>> Prefix(2).to_dense(3, 3)[0, 0].astype(int)
        Array([[1, 1, 0],
               [1, 1, 0],
               [1, 1, 1]], dtype=int32)
    """
    if np.ndim(length) == 0:
        (number,), arrays, text = numbers(length)
    else:
        number, arrays, text = Vector("batch_0"), {"batch_0": _vector("length", length, np.integer)}, "..."
        if arrays["batch_0"].ndim != 1:
            raise ValueError(f"length must be an int or int [B], not of shape {arrays['batch_0'].shape}")
    return Mask(Either(AtMost(KEY, QUERY), AtMost(Plus(KEY, 1), number)), arrays, f"Prefix({text})")


def Lengths(lengths) -> Mask:
    """`k < lengths[b]`: keys past each example's length are not seen (padding at the end, half-filled caches).

    Args:
        lengths: int [B]; may be traced.

    Returns:
        The mask.

    Example:
        >>> Lengths(np.array([1, 2])).to_dense(1, 3)[:, 0, 0].astype(int)
        Array([[1, 0, 0],
               [1, 1, 0]], dtype=int32)
    """
    arrays = {"batch_0": _vector("lengths", lengths, np.integer)}
    return Mask(AtMost(Plus(KEY, 1), Vector("batch_0")), arrays, "Lengths(...)")


def Tokens(q=None, kv=None) -> Mask:
    """Pairs of a marked query and a marked key. `Tokens(kv=m)` is a padding mask; `Tokens(q=g) | Tokens(kv=g)` makes
    the tokens of `g` global.

    Args:
        q: bool [Sq] or [B, Sq]; None marks all.
        kv: bool [Sk] or [B, Sk]; None marks all.

    Returns:
        The mask.

    Example:
        >>> Tokens(kv=np.array([True, False, True])).to_dense(2, 3)[0, 0].astype(int)
        Array([[1, 0, 1],
               [1, 0, 1]], dtype=int32)
    """
    rules, arrays = [], {}
    for side, marks in (("q", q), ("kv", kv)):
        if marks is not None:
            arrays[f"{side}_0"] = _vector(side, marks, np.bool_).astype(np.int32)
            rules.append(AtMost(1, Vector(f"{side}_0")))
    if not rules:
        raise ValueError("Tokens needs q, kv or both; for every pair, use Full()")
    given = ", ".join(f"{name.split('_')[0]}=..." for name in arrays)
    return Mask(rules[0] if len(rules) == 1 else Both(*rules), arrays, f"Tokens({given})")


def BlockDense(blocks, q_block: int, kv_block: int | None = None) -> Mask:
    """Pair (q, k) is visible where `blocks[q // q_block, k // kv_block]` is True.

    Args:
        blocks: bool [nq, nk], [H, nq, nk] or [B, H, nq, nk] (1 stands for all); positions outside of it see nothing.
        q_block: queries in a block.
        kv_block: keys in a block; None: as `q_block`.

    Returns:
        The mask. Compiled with the same blocks, it costs nothing inside kernels where it is combined by `&` only;
        elsewhere the rule of partial tiles is stored as bits.

    Example:
        >>> BlockDense(np.eye(2, dtype=bool), 2).to_dense(4, 4)[0, 0].astype(int)
        Array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [0, 0, 1, 1],
               [0, 0, 1, 1]], dtype=int32)
    """
    kv_block = q_block if kv_block is None else kv_block
    rule = Table("table_0", QUERY, KEY, positive("q_block", q_block), positive("kv_block", kv_block))
    return Mask(rule, {"table_0": table("blocks", blocks)}, f"BlockDense(..., {q_block}, {kv_block})")


def Bits(matrix) -> Mask:
    """Pair (q, k) is visible where `matrix[q, k]` is True: for what no rule describes; costs a bit for each pair.

    Args:
        matrix: bool [Sq, Sk], [H, Sq, Sk] or [B, H, Sq, Sk]; positions outside of it see nothing.

    Returns:
        The mask. Kernels get the bits of partial tiles only.

    Example:
        >>> from sparsejax.attention import Causal
        >>> (Bits(np.ones((2, 2), bool)) & Causal()).to_dense(2, 2)[0, 0].astype(int)
        Array([[1, 0],
               [1, 1]], dtype=int32)
    """
    return Mask(Table("table_0", QUERY, KEY, 1, 1), {"table_0": table("matrix", matrix)}, "Bits(...)")


def from_fn(
    function: Callable, *, q_vectors: Sequence = (), kv_vectors: Sequence = (), tile: Callable | None = None
) -> Mask:
    """A mask by a function of one's own.

    Args:
        function: `function(q, k, *q_vectors, *kv_vectors) -> bool`, from elementwise `jax.numpy` operations; its
            arguments broadcast ([..., Sq, 1] and [..., 1, Sk]). It runs inside kernels and must not capture arrays:
            pass them as vectors. Give the same function object each time, or everything compiles anew.
        q_vectors: int arrays [Sq] or [B, Sq].
        kv_vectors: int arrays [Sk] or [B, Sk].
        tile: optional function of the (least, greatest) value of the same arguments in a tile that returns 0 where the
            tile has no pair, 2 where it has all, else 1; elementwise. Without it no tile can be skipped: combine with a
            mask that skips.

    Returns:
        The mask.

    Example:
        >>> from_fn(lambda q, k: (q + k) % 2 == 0).to_dense(2, 3)[0, 0].astype(int)
        Array([[1, 0, 1],
               [0, 1, 0]], dtype=int32)
    """
    arrays = {f"q_{i}": _vector(f"q_vectors[{i}]", v, np.integer) for i, v in enumerate(q_vectors)}
    arrays |= {f"kv_{i}": _vector(f"kv_vectors[{i}]", v, np.integer) for i, v in enumerate(kv_vectors)}
    rule = Function(function, (QUERY, KEY, *map(Vector, arrays)), tile)
    return Mask(rule, arrays, f"from_fn({getattr(function, '__name__', 'function')})")


def _vector(name: str, array, kind) -> jax.Array:
    array = jnp_or_np(array)
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, kind):
        wanted = "bool" if kind is np.bool_ else "int"
        raise ValueError(f"{name} must be {wanted} [length] or [batch, length], not {array.dtype}{list(array.shape)}")
    return array


def table(name: str, array) -> jax.Array:
    """A bool table as [batch, heads, rows, columns]; raises `ValueError` where it is none."""
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.dtype != bool or array.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name} must be bool with 2 to 4 axes ([batch, [heads,]] rows, columns), not "
            f"{array.dtype}{list(array.shape)}"
        )
    return array.reshape((1,) * (4 - array.ndim) + array.shape)
