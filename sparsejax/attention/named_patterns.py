"""Patterns of published models, put together from the leaves."""

from collections.abc import Sequence

import numpy as np

from sparsejax.attention.data_patterns import BlockDense, Segment, Tokens
from sparsejax.attention.expressions import QUERY
from sparsejax.attention.mask import Mask
from sparsejax.attention.patterns import Causal, Local, Sink
from sparsejax.attention.rules import AtMost


def Longformer(window: int, is_global) -> Mask:
    """`|q - k| <= window // 2`, or one of both is a global token (arXiv 2004.05150).

    Args:
        window: tokens in the window (512 in the paper).
        is_global: bool [S] or [B, S].

    Returns:
        The mask, in both directions.
    """
    mask = Local(window // 2, window // 2) | Tokens(q=is_global) | Tokens(kv=is_global)
    return Mask(mask.rule, mask.arrays, f"Longformer({window}, ...)")


def BigBird(blocks: int, block: int = 64, *, window: int = 3, edges: int = 2, random: int = 3, seed: int = 0) -> Mask:
    """Window, first and last blocks (as rows and as columns) and random blocks (arXiv 2007.14062).

    Args:
        blocks: number of blocks in the sequence.
        block: tokens in a block.
        window: blocks of the window around the diagonal, odd.
        edges: how many blocks are global, counted from both ends in turn: 2 are the first and the last.
        random: further blocks of each row, drawn without replacement from those that are left.
        seed: seed of the draw; give another for each layer.

    Returns:
        The mask, in both directions; one random pattern for all heads (use `per_head` for several).

    Example:
        >>> int(BigBird(8, 1).to_dense(8, 8)[0, 0, 3].sum())
        8
    """
    i = np.arange(blocks)
    kept = np.abs(i[:, None] - i) <= window // 2
    first, last = (edges + 1) // 2, edges // 2
    ends = (i < first) | (i >= blocks - last)
    kept |= ends[:, None] | ends
    generator = np.random.default_rng(seed)
    for row in kept:
        free = np.flatnonzero(~row)
        row[generator.permutation(free)[:random]] = True
    return Mask(BlockDense(kept, block).rule, {"table_0": kept[None, None]}, f"BigBird({blocks}, {block})")


def AShape(sink: int, window: int) -> Mask:
    """Causal, the first `sink` keys and a window of `window` tokens (MInference's A-shape, arXiv 2407.02490).

    Example:
        >>> AShape(1, 2).to_dense(4, 4)[0, 0].astype(int)[3]
        Array([1, 0, 1, 1], dtype=int32)
    """
    mask = Causal() & (Sink(sink) | Local(window - 1))
    return Mask(mask.rule, mask.arrays, f"AShape({sink}, {window})")


def TriShape(sink: int, window: int, last_from: int) -> Mask:
    """`AShape`, and queries from position `last_from` on see all keys before them (arXiv 2412.10319).

    Example:
        >>> TriShape(1, 1, 3).to_dense(4, 4)[0, 0].astype(int)[2:]
        Array([[1, 0, 1, 0],
               [1, 1, 1, 1]], dtype=int32)
    """
    rows = AtMost(last_from, QUERY)
    mask = Causal() & (Sink(sink) | Local(window - 1) | Mask(rows))
    return Mask(mask.rule, mask.arrays, f"TriShape({sink}, {window}, {last_from})")


def Documents(lengths: Sequence[int]) -> Mask:
    """Documents of the given lengths, packed one after the other: `Segment` from lengths.

    Example:
        >>> Documents([2, 1]).to_dense(3, 3)[0, 0].astype(int)
        Array([[1, 1, 0],
               [1, 1, 0],
               [0, 0, 1]], dtype=int32)
    """
    mask = Segment(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
    return Mask(mask.rule, mask.arrays, f"Documents({list(lengths)})")
