"""From the lazy mask to lists of tiles: on the host where every value is known, else inside the traced program."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.lists import BlockLists
from sparsejax.attention.block_mask import BlockMask, from_kinds
from sparsejax.attention.expressions import KEY, QUERY
from sparsejax.attention.intervals import TileGrid, find_tiles, without
from sparsejax.attention.mask import Mask, is_traced, jnp_or_np
from sparsejax.attention.patterns import positive
from sparsejax.attention.rules import Both, Table, names_in
from sparsejax.attention.tile_bits import Elements, add_bits, host_bits, pick, reads_tables, refine_tiles


def compile_mask(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    bq: int = 128,
    bk: int = 128,
    q_positions=None,
    kv_positions=None,
    max_blocks: int | None = None,
    refine: bool = False,
    transpose: bool = True,
) -> BlockMask:
    """Finds the tiles that a mask visits.

    Where all values are known (no tracer), this runs on the host and builds the lists from intervals: for patterns of
    positions in order, time and memory follow the number of visited tiles, not that of all tiles. Where a value is
    traced, a grid of tile kinds [nq, nk] is computed in the program and the width of the lists has to be bounded.

    Args:
        mask: the mask.
        q_len: number of queries, any number.
        kv_len: number of keys, any number.
        bq: queries in a tile.
        bk: keys in a tile.
        q_positions: int [Sq] or [B, Sq], positions of the queries; None counts from 0.
        kv_positions: int [Sk] or [B, Sk], positions of the keys; None counts from 0. A compacted or paged cache, a
            shard of the sequence, or decoding at an offset is a matter of positions alone.
        max_blocks: width of the lists for traced masks; None: all nk. What does not fit is reported by `overflow`.
        refine: look inside of every partial tile and drop or promote those that are empty or full; for composite masks,
            where interval arithmetic may leave a tile open; host only.
        transpose: also build the lists that backward passes read.

    Returns:
        The compiled mask, with Bm or Hm above 1 where the mask differs between examples or heads.

    Raises:
        ValueError: an array of the mask does not fit the lengths, or an argument is out of range.

    Example:
        >>> from sparsejax.attention import Causal, Local, Sink
        >>> compiled = compile_mask(Causal() & (Local(7) | Sink(1)), 32, 32, bq=8, bk=8)
        >>> compiled.lists.idx[0, 0].tolist(), compiled.lists.n_tot[0, 0].tolist()
        ([[0, 0, 0], [0, 1, 1], [0, 1, 2], [0, 2, 3]], [1, 2, 3, 3])
    """
    for name, number in (("q_len", q_len), ("kv_len", kv_len), ("bq", bq), ("bk", bk)):
        positive(name, number)
    if max_blocks is not None:
        positive("max_blocks", max_blocks)
    values = mask.values(q_len, kv_len, q_positions, kv_positions)
    sides = {"bq": bq, "bk": bk, "q_len": q_len, "kv_len": kv_len}
    in_order = q_positions is None and kv_positions is None
    rule = kernel_rule(mask.rule, bq, bk) if in_order else mask.rule
    if is_traced(values):
        if refine:
            raise ValueError(f"refine=True needs known values, and arrays of {mask.text} are traced")
        payload = rule_payload(rule, values, in_order)
        compiled = from_kinds(
            tile_kinds(mask.rule, values, **sides),
            **sides,
            elem=rule,
            payload=payload,
            max_blocks=max_blocks,
            text=mask.text,
        )
        compiled = add_bits(compiled, mask.rule, rule, values)
    else:
        values = {name: np.asarray(array) for name, array in values.items()}
        compiled = _compile_on_host(mask, rule, values, sides, in_order, refine, max_blocks)
    return compiled.with_transpose() if transpose else compiled


def tile_kinds(rule, values: Mapping[str, jax.Array], *, bq: int, bk: int, q_len: int, kv_len: int, columns=None):
    """The kind of every tile, int8 [Bm, Hm, nq, nk], from arrays as `Mask.values` returns them; may be traced.

    With `columns`, int [B or 1, H or 1, nq, W], only that of these tiles of each row.
    """
    bounds = {}
    for name, array in values.items():
        side = name.split("_")[0]
        if side in ("q", "kv"):
            low, high = tile_bounds(array, bq if side == "q" else bk)
            if side == "kv" and columns is not None:
                example = np.arange(low.shape[0]).reshape(-1, 1, 1, 1)
                bounds[name] = jnp.asarray(low)[example, columns], jnp.asarray(high)[example, columns]
                continue
            at = (slice(None), None, slice(None), None) if side == "q" else (slice(None), None, None, slice(None))
            bounds[name] = low[at], high[at]
        else:
            at = {"head": (slice(None), None, None), "batch": (slice(None), None, None, None)}.get(side, ...)
            bounds[name] = array[at], array[at]
    kinds = rule.tile(bounds)
    blocks = (1, 1, math.ceil(q_len / bq), math.ceil(kv_len / bk))
    shape = np.broadcast_shapes(np.shape(kinds), blocks if columns is None else columns.shape)
    return jnp.broadcast_to(kinds, shape) if isinstance(kinds, jax.Array) else np.broadcast_to(kinds, shape)


def tile_bounds(array, block: int):
    """Least and greatest value of each block of the last axis; the last block may be shorter."""
    xp = jnp if isinstance(array, jax.Array) else np
    padded = xp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % block)], mode="edge")
    tiles = padded.reshape(*array.shape[:-1], -1, block)
    return tiles.min(-1), tiles.max(-1)


def _compile_on_host(mask, rule, values, sides, in_order, refine, max_blocks) -> BlockMask:
    bq, bk, q_len, kv_len = (sides[name] for name in ("bq", "bk", "q_len", "kv_len"))
    nq, nk = math.ceil(q_len / bq), math.ceil(kv_len / bk)
    used = {name: array for name, array in values.items() if name in names_in(mask.rule)}
    batch = max([1, *(a.shape[0] for n, a in used.items() if n.startswith(("q_", "kv_", "batch_", "table_")))])
    heads = max([1, *(a.shape[0] for n, a in used.items() if n.startswith("head_"))])
    heads = max([heads, *(a.shape[1] for n, a in used.items() if n.startswith("table_"))])
    wide = {n: a.astype(np.int64) if a.dtype != bool else a for n, a in used.items()}
    blocks = {"q": bq, "kv": bk}
    bounds = {n: tile_bounds(a, blocks[n.split("_")[0]]) for n, a in wide.items() if n.startswith(("q_", "kv_"))}
    rows, found = [], {}
    for b in range(batch):
        for h in range(heads):
            at = {n: pick(n, a, b, h) for n, a in wide.items() if not n.startswith(("q_", "kv_"))}
            # Heads and examples that read the same values have the same tiles.
            key = (b if batch > 1 else 0, *(a.tobytes() for a in at.values()))
            if key not in found:
                own = {n: tuple(bound[b % bound.shape[0]] for bound in pair) for n, pair in bounds.items()}
                grid = TileGrid(
                    rows={n: pair for n, pair in own.items() if n.startswith("q_")},
                    columns={n: pair for n, pair in own.items() if n.startswith("kv_")},
                    fixed={n: (a, a) for n, a in at.items()},
                    nq=nq,
                    nk=nk,
                )
                some, every = find_tiles(mask.rule, grid)
                full = every.numbers()
                partial = without(some, every).numbers()
                if refine:
                    partial, promoted = refine_tiles(mask.rule, partial, Elements(wide, b, h, sides), nk)
                    full = np.union1d(full, promoted)
                found[key] = partial, full
            rows.append(found[key])
    lists, wanted = _lists(rows, (batch, heads, nq, nk), max_blocks, sides, rule, rule_payload(rule, values, in_order))
    compiled = BlockMask(lists, wanted, mask.text)
    return host_bits(compiled, mask.rule, wide) if rule is not None and reads_tables(rule) else compiled


def _lists(rows, shape, max_blocks, sides, rule, payload):
    """Padded lists from the sorted tile numbers (partial, full) of each example and head."""
    batch, heads, nq, nk = shape
    n_part = np.stack([np.bincount(partial // nk, minlength=nq) for partial, _ in rows])
    wanted = n_part + np.stack([np.bincount(full // nk, minlength=nq) for _, full in rows])
    needed = max(1, int(wanted.max(initial=0)))
    width = needed if max_blocks is None else min(needed, max_blocks)
    n_part, n_tot = np.minimum(n_part, width), np.minimum(wanted, width)
    idx = np.zeros((len(rows), nq, width), np.int32)
    for i, tiles in enumerate(rows):
        first = np.zeros(nq, np.int64)
        for numbers in tiles:
            row, column = numbers // nk, numbers % nk
            count = np.bincount(row, minlength=nq)
            slot = np.arange(len(numbers)) - (np.cumsum(count) - count)[row] + first[row]
            kept = slot < width
            idx[i, row[kept], slot[kept]] = column[kept]
            first += count
        last = np.take_along_axis(idx[i], np.maximum(n_tot[i] - 1, 0)[:, None], axis=1)
        idx[i] = np.where(np.arange(width) < n_tot[i][:, None], idx[i], last)
    leaves = [a.astype(np.int32).reshape(batch, heads, *a.shape[1:]) for a in (idx, n_part, n_tot, wanted)]
    lists = BlockLists(*leaves[:3], payload=payload, **sides, elem=rule, max_part=int(n_part.max(initial=0)))
    return lists, leaves[3]


def kernel_rule(rule, bq: int, bk: int):
    """The rule without tables for which every tile is all or nothing, so that it says nothing inside; None: empty."""
    match rule:
        case Table(_, row, column, q_block, kv_block):
            inside = row == QUERY and column == KEY and q_block % bq == 0 and kv_block % bk == 0
            return None if inside else rule
        case Both(a, b):
            a, b = kernel_rule(a, bq, bk), kernel_rule(b, bq, bk)
            return b if a is None else a if b is None else Both(a, b)
    return rule


def rule_payload(rule, values, in_order: bool) -> dict:
    """What kernels need: the arrays of the rule, tables left out, and positions where they are not 0, 1, 2, ..."""
    names = set() if rule is None or reads_tables(rule) else names_in(rule)
    names = {name for name in names if name not in ("q_pos", "kv_pos")} | (set() if in_order else {"q_pos", "kv_pos"})
    return {name: jnp_or_np(values[name]) for name in sorted(names)}
