"""BlockMasks chosen at run time: by scores and a budget, from a grid of blocks, from lists, or from cache pages."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention.block_mask import BlockMask, from_kinds, from_order
from sparsejax.attention.budgets import Budget, Forced
from sparsejax.attention.compile import kernel_rule, rule_payload, tile_bounds, tile_kinds
from sparsejax.attention.mask import Mask, is_traced
from sparsejax.attention.patterns import Causal, Full, positive
from sparsejax.attention.tile_bits import add_bits

_NOTHING = Forced()


def from_scores(
    scores: jax.Array,
    budget: Budget,
    base: Mask | None = None,
    *,
    q_len: int,
    kv_len: int,
    bq: int = 128,
    bk: int = 128,
    q_positions=None,
    kv_positions=None,
    forced: Forced = _NOTHING,
) -> BlockMask:
    """Chooses the best blocks of each row of blocks. Everything may be traced; the shapes of the lists are static.

    Args:
        scores: float [1 or B, 1 or Hk or H, nq, nk], one score for each tile; -inf and NaN are never chosen.
        budget: how many each row chooses, see `sparsejax.attention.budgets`.
        base: what may be seen at all; tiles that it leaves empty are never chosen, tiles that it fills in part keep its
            rule. None: everything.
        q_len: number of queries.
        kv_len: number of keys.
        bq: queries in a tile.
        bk: keys in a tile.
        q_positions: int [Sq] or [B, Sq]; None counts from 0.
        kv_positions: int [Sk] or [B, Sk]; None counts from 0.
        forced: blocks that are visited besides, whatever their scores.

    Returns:
        The mask. Ties go to the block of the lower number. The choice has no gradient; to train what makes the scores,
        distil (`seer_loss`), or add log-gates through `block_bias`.

    Raises:
        ValueError: the scores do not have a score for each tile.

    Example:
        >>> from sparsejax.attention import TopK
        >>> scores = jnp.array([[[[0.0, 9.0, 9.0], [3.0, 1.0, 9.0], [3.0, 2.0, 1.0]]]])
        >>> mask = from_scores(scores, TopK(1), Causal(), q_len=6, kv_len=6, bq=2, bk=2, forced=Forced(diagonal=True))
        >>> mask.kinds()[0, 0].tolist()
        [[1, 0, 0], [2, 1, 0], [2, 0, 1]]
    """
    sides = {"bq": bq, "bk": bk, "q_len": q_len, "kv_len": kv_len}
    nq, nk = math.ceil(q_len / bq), math.ceil(kv_len / bk)
    if jnp.ndim(scores) != 4 or scores.shape[2:] != (nq, nk):
        raise ValueError(
            f"scores have shape {jnp.shape(scores)}; {q_len} queries in blocks of {bq} and {kv_len} keys in blocks of "
            f"{bk} need [batch, heads, {nq}, {nk}]"
        )
    base = Full() if base is None else base
    values = base.values(q_len, kv_len, q_positions, kv_positions)
    kinds = tile_kinds(base.rule, values, **sides)
    low_high = [tile_bounds(values[name], block) for name, block in (("q_pos", bq), ("kv_pos", bk))]
    q_bounds, kv_bounds = (
        tuple(bound[at] for bound in pair)
        for pair, at in zip(low_high, [np.s_[:, None, :, None], np.s_[:, None, None, :]], strict=True)
    )
    must = forced.grid(q_bounds, kv_bounds, nq, nk, bk) & (kinds > 0)
    most_forced = forced.width(nk, bq, bk) if is_traced(must) else int(np.asarray(must).sum(-1).max(initial=0))

    if 1 < scores.shape[1] < kinds.shape[1]:
        scores = jnp.repeat(scores, kinds.shape[1] // scores.shape[1], axis=1)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    largest = jnp.finfo(scores.dtype).max
    free = jnp.where((kinds > 0) & ~must & ~jnp.isnan(scores), jnp.minimum(scores, largest), -jnp.inf)
    wanted = jnp.sum(must, -1, dtype=jnp.int32) + budget.count(free)
    ranked = budget.rank(free) if hasattr(budget, "rank") else free
    width = max(1, min(nk, budget.width(nk) + most_forced))
    _, ids = jax.lax.top_k(jnp.where(must, jnp.inf, ranked), width)
    kind = jnp.take_along_axis(jnp.broadcast_to(kinds, free.shape), ids, axis=-1)
    kept = jnp.arange(width) < wanted[..., None]
    return _listed(ids, jnp.where(kept, kind, 0), wanted, base, values, sides, q_positions, kv_positions, budget)


def from_dense_blocks(
    blocks,
    base: Mask | None = None,
    *,
    q_len: int,
    kv_len: int,
    bq: int = 128,
    bk: int = 128,
    q_positions=None,
    kv_positions=None,
    max_blocks: int | None = None,
) -> BlockMask:
    """Visits the tiles that are True in a grid.

    Args:
        blocks: bool [1 or B, 1 or Hk or H, nq, nk], or without the first axes; may be traced.
        base: the rule inside the tiles; tiles that it leaves empty are not visited. None: everything.
        q_len: number of queries.
        kv_len: number of keys.
        bq: queries in a tile.
        bk: keys in a tile.
        q_positions: int [Sq] or [B, Sq]; None counts from 0.
        kv_positions: int [Sk] or [B, Sk]; None counts from 0.
        max_blocks: width of the lists; None: as needed, or nk where something is traced. Of rows that have more, whole
            tiles fall out first, and `overflow` tells.

    Returns:
        The mask.

    Example:
        >>> from_dense_blocks(np.eye(2, dtype=bool), Causal(), q_len=4, kv_len=4, bq=2, bk=2).kinds()[0, 0].tolist()
        [[1, 0], [0, 1]]
    """
    sides = {"bq": bq, "bk": bk, "q_len": q_len, "kv_len": kv_len}
    nq, nk = math.ceil(q_len / bq), math.ceil(kv_len / bk)
    if np.shape(blocks)[-2:] != (nq, nk) or np.ndim(blocks) > 4 or blocks.dtype != bool:
        raise ValueError(
            f"blocks must be bool [batch, heads, {nq}, {nk}] for {q_len} queries in blocks of {bq} and {kv_len} keys "
            f"in blocks of {bk}, not {blocks.dtype}{list(np.shape(blocks))}"
        )
    if max_blocks is not None:
        positive("max_blocks", max_blocks)
    blocks = blocks.reshape((1,) * (4 - blocks.ndim) + blocks.shape)
    base = Full() if base is None else base
    values = base.values(q_len, kv_len, q_positions, kv_positions)
    in_order = q_positions is None and kv_positions is None
    rule = kernel_rule(base.rule, bq, bk) if in_order else base.rule
    kinds = blocks * tile_kinds(base.rule, values, **sides)
    payload = rule_payload(rule, values, in_order)
    text = f"blocks of {base.text}"
    mask = from_kinds(kinds, **sides, elem=rule, payload=payload, max_blocks=max_blocks, text=text)
    return add_bits(mask, base.rule, rule, values)


def from_lists(
    idx,
    count,
    base: Mask | None = None,
    *,
    q_len: int,
    kv_len: int,
    bq: int = 128,
    bk: int = 128,
    q_positions=None,
    kv_positions=None,
) -> BlockMask:
    """Visits listed blocks of keys, as indexers and other libraries give them.

    Args:
        idx: int [1 or B, 1 or Hk or H, nq, W], numbers of blocks of keys, in any order, none twice in a row; what
            stands behind the first `count` is not read.
        count: int [1 or B, 1 or Hk or H, nq].
        base: the rule inside the tiles; tiles that it leaves empty are not visited. None: everything.
        q_len: number of queries.
        kv_len: number of keys.
        bq: queries in a tile.
        bk: keys in a tile.
        q_positions: int [Sq] or [B, Sq]; None counts from 0.
        kv_positions: int [Sk] or [B, Sk]; None counts from 0.

    Returns:
        The mask; never a grid of all tiles.

    Raises:
        ValueError: the shapes do not fit, or lists that are no JAX arrays name a block that is not there, or one twice.

    Example:
        >>> mask = from_lists([[[[1, 0], [1, -1]]]], [[[2, 1]]], Causal(), q_len=4, kv_len=4, bq=2, bk=2)
        >>> mask.kinds()[0, 0].tolist()
        [[1, 0], [0, 1]]
    """
    sides = {"bq": bq, "bk": bk, "q_len": q_len, "kv_len": kv_len}
    nq, nk = math.ceil(q_len / bq), math.ceil(kv_len / bk)
    on_host = not isinstance(idx, jax.Array) and not isinstance(count, jax.Array)
    xp = np if on_host else jnp
    idx, count = xp.asarray(idx, np.int32), xp.asarray(count, np.int32)
    if idx.ndim != 4 or idx.shape[2] != nq or count.shape != idx.shape[:3]:
        raise ValueError(
            f"idx {list(idx.shape)} and count {list(count.shape)} must be [batch, heads, {nq}, W] and [batch, heads, "
            f"{nq}] for {q_len} queries in blocks of {bq}"
        )
    base = Full() if base is None else base
    values = base.values(q_len, kv_len, q_positions, kv_positions)
    kept = np.arange(idx.shape[-1]) < count[..., None]
    if on_host and (wrong := idx[kept & ((idx < 0) | (idx >= nk))]).size:
        raise ValueError(f"idx lists the block {wrong[0]}; {kv_len} keys in blocks of {bk} are blocks 0 to {nk - 1}")
    if on_host:
        ranked = np.sort(np.where(kept, idx, -1), axis=-1)
        twice = (ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)
        if twice.any():
            raise ValueError(f"idx lists the block {ranked[..., 1:][twice][0]} twice in a row")
    idx = jnp.clip(idx, 0, nk - 1)
    kind = tile_kinds(base.rule, values, **sides, columns=idx)
    shape = jnp.broadcast_shapes(kind.shape, idx.shape)
    idx, kept = jnp.broadcast_to(idx, shape), jnp.broadcast_to(kept, shape)
    kind = jnp.where(kept, kind, 0)
    wanted = jnp.sum(kind > 0, -1, dtype=jnp.int32)
    return _listed(idx, kind, wanted, base, values, sides, q_positions, kv_positions, "lists")


def from_pages(pages, count, lengths, *, page_size: int, kv_len: int, q_len: int = 1) -> BlockMask:
    """Decoding: the last few tokens of each example against chosen pages of its cache.

    Args:
        pages: int [B, 1 or Hk or H, W], numbers of pages counted along the example's own sequence (not places in a
            shared pool: those are `page_table` of `sparse_attention`), in any order, none twice.
        count: int [B, 1 or Hk or H], how many of them are chosen.
        lengths: int [B], tokens of each example, the new ones counted.
        page_size: tokens in a page.
        kv_len: room for tokens in the cache.
        q_len: how many of the last tokens ask; each sees no token after itself.

    Returns:
        The mask, with one block of `q_len` queries and blocks of `page_size` keys.

    Raises:
        ValueError: as `from_lists`.

    Example:
        >>> mask = from_pages([[[2, 0]]], [[2]], [9], page_size=4, kv_len=16)
        >>> mask.to_dense()[0, 0, 0].astype(int)
        Array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], dtype=int32)
    """
    lengths = jnp.asarray(lengths, jnp.int32)
    positions = lengths[:, None] - q_len + jnp.arange(q_len, dtype=jnp.int32)
    pages, count = (x if isinstance(x, jax.Array) else np.asarray(x) for x in (pages, count))
    sides = {"q_len": q_len, "kv_len": kv_len, "bq": q_len, "bk": page_size}
    return from_lists(pages[:, :, None], count[:, :, None], Causal(), **sides, q_positions=positions)


def _listed(ids, kind, wanted, base, values, sides, q_positions, kv_positions, source) -> BlockMask:
    """The mask that visits `ids` with the given kinds (0: not at all)."""
    nk = math.ceil(sides["kv_len"] / sides["bk"])
    order = jnp.sort(jnp.where(kind == 0, 2, kind.astype(jnp.int32) - 1) * nk + ids, axis=-1).astype(jnp.int32)
    in_order = q_positions is None and kv_positions is None
    rule = kernel_rule(base.rule, sides["bq"], sides["bk"]) if in_order else base.rule
    payload = rule_payload(rule, values, in_order)
    text = f"{type(source).__name__ if not isinstance(source, str) else source} of {base.text}"
    mask = from_order(order, nk, wanted, **sides, elem=rule, payload=payload, text=text)
    return add_bits(mask, base.rule, rule, values)
