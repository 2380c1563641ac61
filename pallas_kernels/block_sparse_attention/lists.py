"""Which tiles of the score matrix an attention kernel visits: index lists per query block, as a pytree.

Query block `i` visits the key blocks `idx[b, h, i, :n_tot[b, h, i]]`. The first `n_part` of them are *partial*: the
element rule decides inside the tile. The others are *full*. A full tile listed as partial gives the same result, only
slower.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
ElementRule = Callable[[Array, Array, Mapping[str, Array]], Array]

_TRANSPOSE = ("t_idx", "t_slot", "t_ptr", "t_part", "t_tot")
_PREFIXES = ("q_", "kv_", "head_", "batch_", "scalar_")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """Lists of key blocks for every query block, with what the element rule of partial tiles needs.

    The leaves may be traced: new lists of the same shapes never recompile. `Bm` is 1 or the batch size, `Hm` is 1, the
    number of key heads or the number of query heads.

    Attributes:
        idx: int32 [Bm, Hm, nq, W], key-block ids, each at most once in a row: partial ones, then full ones, then
            padding that repeats the last valid id (0 in an empty row).
        n_part: int32 [Bm, Hm, nq], slots below it are partial.
        n_tot: int32 [Bm, Hm, nq], slots from `n_part` to it are full, the rest is padding.
        t_idx: int32 [Bm, Hm, N], the transpose, or None: the query-block ids of every key block, key block after key
            block, in each partial ones first. Flat, since a key block that every query sees (a sink) would make
            padded lists quadratic. N is the number of listed tiles; nq * W where the lists are traced.
        t_slot: int32 [Bm, Hm, N], the slot of this key block in the list of that query block, or None.
        t_ptr: int32 [Bm, Hm, nk], where the list of each key block starts in `t_idx`, or None.
        t_part: int32 [Bm, Hm, nk], entries from `t_ptr` on that are partial, or None.
        t_tot: int32 [Bm, Hm, nk], entries from `t_ptr` on that belong to the key block, or None.
        payload: arrays by name. `q_pos` int32 [1 or B, q_len] and `kv_pos` int32 [1 or B, kv_len] are the positions
            that the rule and ALiBi see (default: the indices). Further typed vectors for the rule: `q_*` [1 or B,
            q_len], `kv_*` [1 or B, kv_len], `head_*` [H], `batch_*` [B], `scalar_*` []; `bits` uint8
            [Bm, Hm, nq, P, bq, ceil(bk / 8)]: one bit for every element of slot p < P (least significant first).
        bq: rows of a tile.
        bk: columns of a tile.
        q_len: number of queries; need not be a multiple of bq.
        kv_len: number of keys; need not be a multiple of bk.
        elem: the element rule, a hashable function `elem(q_pos, kv_pos, payload) -> bool` built from elementwise jnp
            operations. Arguments broadcast: queries as [..., bq, 1], keys as [..., 1, bk]; `payload["bits"]` arrives as
            bool [..., bq, bk]. None: a partial tile is what its bits say, or full where there are no bits.
        max_part: static bound on `n_part`, or None for W. Native kernels store a bit for each element of that many
            tiles.

    Example:
        >>> lists = from_tiles(np.array([[1, 0], [2, 1]]), bq=4, bk=4, q_len=8, kv_len=8, elem=causal)
        >>> lists.idx.tolist(), lists.n_part.tolist(), lists.n_tot.tolist()
        ([[[[0, 0], [1, 0]]]], [[[1, 1]]], [[[1, 2]]])
        >>> lists.density
        0.75
    """

    idx: Array
    n_part: Array
    n_tot: Array
    t_idx: Array | None = None
    t_slot: Array | None = None
    t_ptr: Array | None = None
    t_part: Array | None = None
    t_tot: Array | None = None
    payload: dict[str, Array] = dataclasses.field(default_factory=dict)
    bq: int = dataclasses.field(default=0, metadata={"static": True})
    bk: int = dataclasses.field(default=0, metadata={"static": True})
    q_len: int = dataclasses.field(default=0, metadata={"static": True})
    kv_len: int = dataclasses.field(default=0, metadata={"static": True})
    elem: ElementRule | None = dataclasses.field(default=None, metadata={"static": True})
    max_part: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def nq(self) -> int:
        """Number of query blocks."""
        return math.ceil(self.q_len / self.bq)

    @property
    def nk(self) -> int:
        """Number of key blocks."""
        return math.ceil(self.kv_len / self.bk)

    @property
    def width(self) -> int:
        """W: the most key blocks a query block can list."""
        return self.idx.shape[-1]

    @property
    def part_width(self) -> int:
        """Static bound on the number of partial tiles in a row."""
        return self.width if self.max_part is None else min(self.max_part, self.width)

    @property
    def has_rule(self) -> bool:
        """Whether partial tiles differ from full ones at all."""
        return self.part_width > 0 and (self.elem is not None or "bits" in self.payload)

    @property
    def density(self) -> float:
        """Listed share of all tiles (concrete lists only)."""
        return float(np.mean(np.asarray(self.n_tot)) / self.nk)

    def transposed(self) -> "BlockLists":
        """Adds the transposed lists, which backward passes over key blocks read.

        Returns:
            The lists with `t_idx`, `t_slot`, `t_ptr`, `t_part` and `t_tot`; unchanged if they are there already.
        """
        if self.t_idx is not None:
            return self
        concrete = not any(isinstance(x, jax.core.Tracer) for x in (self.idx, self.n_part, self.n_tot))
        if concrete:
            idx, n_part, n_tot = (np.asarray(x) for x in (self.idx, self.n_part, self.n_tot))
            size = max(1, int(n_tot.sum(-1).max(initial=0)))
            parts = _transpose(np, idx, n_part, n_tot, self.nk, size)
        else:
            parts = _transpose(jnp, self.idx, self.n_part, self.n_tot, self.nk, self.nq * self.width)
        return dataclasses.replace(self, **dict(zip(_TRANSPOSE, parts, strict=True)))


def _transpose(xp, idx, n_part, n_tot, nk, size):
    """Sorts the listed tiles by (key block, full, query block), for each batch and head."""
    bm, hm, nq, w = idx.shape
    slot = xp.broadcast_to(xp.arange(w, dtype=np.int32), (bm, hm, nq, w))
    full = slot >= n_part[..., None]
    key = xp.where(slot < n_tot[..., None], 2 * idx + full, 2 * nk).reshape(bm * hm, nq * w)
    order = xp.argsort(key, axis=-1, kind="stable") if xp is np else jnp.argsort(key, axis=-1, stable=True)
    key = xp.take_along_axis(key, order, axis=-1)
    edges = xp.arange(2 * nk + 1)
    if xp is np:
        start = np.stack([np.searchsorted(row, edges) for row in key])
    else:
        start = jax.vmap(lambda row: jnp.searchsorted(row, edges))(key)
    first, middle, last = start[:, 0:-1:2], start[:, 1::2], start[:, 2::2]
    # Behind the last entry, that entry again.
    total = start[:, -1:]
    at = xp.minimum(xp.arange(size), xp.maximum(total, 1) - 1)
    entry = xp.where(total > 0, xp.take_along_axis(order, at, axis=-1), 0)
    ptr = xp.minimum(first, size - 1)
    parts = (entry // w, entry % w, ptr, middle - first, last - first)
    return tuple(x.reshape(bm, hm, -1).astype(np.int32) for x in parts)


def from_tiles(
    tiles: Array,
    *,
    bq: int,
    bk: int,
    q_len: int,
    kv_len: int,
    width: int | None = None,
    elem: ElementRule | None = None,
    payload: Mapping[str, Array] | None = None,
    max_part: int | None = None,
) -> BlockLists:
    """Lists from a grid of tile classes. Meant for grids that are small or chosen at run time.

    Args:
        tiles: integers or bool [..., nq, nk] with up to two leading axes (batch, head): 0 empty, 1 partial, 2 full.
            Bool True means full where `elem` is None and there are no bits, else partial.
        bq: rows of a tile.
        bk: columns of a tile.
        q_len: number of queries.
        kv_len: number of keys.
        width: static W. Default: what the grid needs if it is concrete, nk if it is traced. Rows with more tiles lose
            their last full ones.
        elem: element rule, see `BlockLists`.
        payload: arrays for the rule, see `BlockLists`.
        max_part: static bound on partial tiles in a row. Default: what the grid needs if it is concrete.

    Returns:
        The lists, without transpose.

    Raises:
        ValueError: if the grid does not have ceil(q_len / bq) x ceil(kv_len / bk) tiles.

    Example:
        >>> from_tiles(np.ones((2, 3), bool), bq=8, bk=8, q_len=16, kv_len=20).n_tot.tolist()
        [[[3, 3]]]
    """
    payload = dict(payload or {})
    traced = isinstance(tiles, jax.core.Tracer)
    xp = jnp if traced else np
    tiles = tiles if traced else np.asarray(tiles)
    if tiles.dtype == bool:
        tiles = xp.where(tiles, 1 if elem is not None or "bits" in payload else 2, 0)
    nq, nk = math.ceil(q_len / bq), math.ceil(kv_len / bk)
    if tiles.ndim not in (2, 3, 4) or tiles.shape[-2:] != (nq, nk):
        raise ValueError(
            f"tiles has shape {tiles.shape}; {q_len} queries in blocks of {bq} and {kv_len} keys in blocks of {bk} "
            f"need [(batch, (heads,)) {nq}, {nk}]"
        )
    tiles = tiles.reshape((1,) * (4 - tiles.ndim) + tiles.shape)
    n_part, n_tot = (tiles == 1).sum(-1), (tiles > 0).sum(-1)
    if not traced:
        width = max(1, int(n_tot.max(initial=0))) if width is None else width
        max_part = int(n_part.max(initial=0)) if max_part is None else max_part
    width = nk if width is None else width
    key = xp.where(tiles == 0, 2, xp.where(tiles == 1, 0, 1))
    order = xp.argsort(key, axis=-1, kind="stable") if xp is np else jnp.argsort(key, axis=-1, stable=True)
    n_part, n_tot = xp.minimum(n_part, width), xp.minimum(n_tot, width)
    idx = xp.take_along_axis(order, xp.minimum(xp.arange(width), xp.maximum(n_tot, 1)[..., None] - 1), axis=-1)
    idx = xp.where(n_tot[..., None] == 0, 0, idx)
    idx, n_part, n_tot = (x.astype(np.int32) for x in (idx, n_part, n_tot))
    return BlockLists(
        idx, n_part, n_tot, payload=payload, bq=bq, bk=bk, q_len=q_len, kv_len=kv_len, elem=elem, max_part=max_part
    )


def causal(q_pos: Array, kv_pos: Array, payload: Mapping[str, Array]) -> Array:
    """The element rule of causal attention: a query sees keys at its own position and before."""
    del payload
    return kv_pos <= q_pos


def check_lists(lists: BlockLists, batch: int, heads: int, kv_heads: int) -> None:
    """Checks static shapes against those of an attention call.

    Raises:
        ValueError: naming the leaf, its shape and what is allowed.
    """
    if min(lists.bq, lists.bk, lists.q_len, lists.kv_len) < 1:
        raise ValueError(
            f"bq={lists.bq}, bk={lists.bk}, q_len={lists.q_len}, kv_len={lists.kv_len}: each must be at least 1"
        )
    if lists.idx.ndim != 4:
        raise ValueError(f"lists.idx has shape {lists.idx.shape}; it must be [Bm, Hm, nq, W]")
    bm, hm, nq, w = lists.idx.shape
    if bm not in (1, batch) or hm not in (1, kv_heads, heads) or nq != lists.nq or w < 1:
        raise ValueError(
            f"lists.idx has shape {lists.idx.shape}; with batch {batch}, {heads} query and {kv_heads} key heads it "
            f"must be [1 or {batch}, one of {sorted({1, kv_heads, heads})}, {lists.nq}, at least 1]"
        )
    for name in ("n_part", "n_tot"):
        if getattr(lists, name).shape != (bm, hm, nq):
            raise ValueError(f"lists.{name} has shape {getattr(lists, name).shape}; it must be {(bm, hm, nq)}")
    if lists.t_idx is not None:
        for name in _TRANSPOSE:
            shape = (bm, hm, lists.t_idx.shape[-1] if name in ("t_idx", "t_slot") else lists.nk)
            if getattr(lists, name) is None or getattr(lists, name).shape != shape:
                raise ValueError(f"lists.{name} has shape {np.shape(getattr(lists, name))}; it must be {shape}")
    for name, value in lists.payload.items():
        shape = np.shape(value)
        if name == "bits":
            allowed = [(bm, hm, nq, shape[3] if len(shape) > 3 else 1, lists.bq, -(-lists.bk // 8))]
        elif name.startswith("q_"):
            allowed = [(1, lists.q_len), (batch, lists.q_len)]
        elif name.startswith("kv_"):
            allowed = [(1, lists.kv_len), (batch, lists.kv_len)]
        elif name.startswith("head_"):
            allowed = [(heads,)]
        elif name.startswith("batch_"):
            allowed = [(batch,)]
        elif name.startswith("scalar_"):
            allowed = [()]
        else:
            raise ValueError(f"payload {name!r}: a name is 'bits' or begins with one of {', '.join(_PREFIXES)}")
        if shape not in allowed:
            per_head = "; masks per head need one for every query head" if name.startswith("head_") else ""
            raise ValueError(f"payload {name!r} has shape {shape}; allowed: {' or '.join(map(str, allowed))}{per_head}")
