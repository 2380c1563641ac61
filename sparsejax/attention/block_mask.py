"""The compiled mask: for each block of queries, which blocks of keys attention visits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.lists import BlockLists
from pallas_kernels.block_sparse_attention.rules import dense_mask
from sparsejax.attention.drawing import draw_picture, draw_text
from sparsejax.attention.mask import Mask, is_traced, jnp_or_np
from sparsejax.attention.rules import rename


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """What attention kernels take: lists of tiles, and the rule inside those that are visible in part.

    Made by `compile_mask` from a `Mask`, or at run time by `from_scores`, `from_dense_blocks`, `from_lists` and
    `from_pages`. A pytree; its leaves may be traced, and new lists of the same shapes never recompile anything.

    Attributes:
        lists: the tiles, see `pallas_kernels.block_sparse_attention.BlockLists`: `idx` [Bm, Hm, nq, W] holds key-block
            ids, partial ones first; Bm is 1 or B; Hm is 1, the number of key heads, or that of query heads.
        wanted: int32 [Bm, Hm, nq], how many tiles each row asked for; more than it got where W was too small.
        text: where the mask came from.

    Example:
        >>> from sparsejax.attention import Causal, Local, compile_mask
        >>> compile_mask(Causal() & Local(4), 16, 16, bq=4, bk=4)
        BlockMask(Causal() & Local(4), 16 queries in blocks of 4, 16 keys in blocks of 4, up to 2 tiles a row,
            density 0.438)
    """

    lists: BlockLists
    wanted: jax.Array
    text: str = dataclasses.field(default="BlockMask", metadata={"static": True})

    def __repr__(self) -> str:
        size = f"{self.q_len} queries in blocks of {self.lists.bq}, {self.kv_len} keys in blocks of {self.lists.bk}"
        density = "" if is_traced(self.lists.n_tot) else f", density {float(self.density()):.3g}"
        return f"BlockMask({self.text}, {size}, up to {self.lists.idx.shape[-1]} tiles a row{density})"

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.lists.q_len

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.lists.kv_len

    @property
    def overflow(self) -> jax.Array:
        """How many tiles were wanted and left out because the lists are too narrow: int32 scalar, 0 if all is well."""
        return jnp.sum(jnp.asarray(self.wanted) - self.lists.n_tot)

    def kinds(self) -> jax.Array:
        """The grid of tiles, int8 [Bm, Hm, nq, nk]: 0 not visited, 1 visited with the rule, 2 visited whole."""
        lists = self.lists
        slot = jnp.arange(lists.idx.shape[-1])
        listed = slot < jnp.asarray(lists.n_tot)[..., None]
        kind = jnp.where(slot < jnp.asarray(lists.n_part)[..., None], 1, jnp.where(listed, 2, 0)).astype(jnp.int8)
        shape = (*lists.idx.shape[:3], lists.nk)
        lead = jnp.ogrid[: shape[0], : shape[1], : shape[2]]
        return jnp.zeros(shape, jnp.int8).at[(*(axis[..., None] for axis in lead), jnp.asarray(lists.idx))].max(kind)

    def to_dense(self, batch: int = 1, heads: int = 1, kv_heads: int | None = None) -> jax.Array:
        """The mask as a matrix: for looking at small ones, and for tests.

        Args:
            batch: batch size; only read where a part of the mask has it.
            heads: number of query heads, likewise.
            kv_heads: number of key heads; None: as `heads`.

        Returns:
            bool [1 or batch, 1 or heads, Sq, Sk].
        """
        batch, heads = max(batch, self.lists.idx.shape[0]), max(heads, self.lists.idx.shape[1])
        dense = dense_mask(self.lists, batch, heads, kv_heads or heads)
        return jnp.broadcast_to(dense, np.broadcast_shapes(dense.shape, (1, 1, self.q_len, self.kv_len)))

    def density(self) -> jax.Array:
        """Visited share of all tiles; attention costs this share of dense attention."""
        return jnp.mean(jnp.asarray(self.lists.n_tot)) / self.lists.nk

    def flops(self, batch: int, heads: int, head_dim: int, v_head_dim: int | None = None, *, backward: bool = False):
        """Floating-point operations of the matrix products over visited tiles, whole tiles counted.

        Args:
            batch: batch size.
            heads: number of query heads.
            head_dim: dimension of queries and keys.
            v_head_dim: dimension of values; None: as `head_dim`.
            backward: count the backward pass (which computes the scores again) instead of the forward pass.

        Returns:
            float scalar; `2 * bq * bk * (head_dim + v_head_dim)` a tile forward.
        """
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        lists = self.lists
        tile = 2.0 * lists.bq * lists.bk * ((3 * head_dim + 2 * v_head_dim) if backward else (head_dim + v_head_dim))
        return jnp.mean(jnp.sum(jnp.asarray(lists.n_tot, jnp.float32), -1)) * batch * heads * tile

    def transpose(self) -> "BlockMask":
        """The mask with queries and keys in each other's place: `to_dense()` of the result is that of this, transposed.

        Raises:
            ValueError: the rule of partial tiles is stored as bits.
        """
        lists = self.lists
        if "bits" in lists.payload:
            raise ValueError(f"{self.text}: partial tiles are stored as bits, which cannot be transposed")
        names = {name: _other_side(name) for name in (*lists.payload, "q_pos", "kv_pos")}
        payload = {names[name]: array for name, array in lists.payload.items()}
        kinds = jnp.swapaxes(self.kinds(), 2, 3)
        elem = None if lists.elem is None else rename(lists.elem, names)
        sides = {"bq": lists.bk, "bk": lists.bq, "q_len": lists.kv_len, "kv_len": lists.q_len}
        return from_kinds(kinds, **sides, elem=elem, payload=payload, text=f"transpose of {self.text}")

    def with_transpose(self) -> "BlockMask":
        """The same mask with the lists that backward passes read, so that they are not computed again in each step."""
        return dataclasses.replace(self, lists=self.lists.transposed())

    def slice_rows(self, first: int, blocks: int) -> "BlockMask":
        """Only the blocks of queries `first ... first + blocks - 1`, against all keys; positions stay what they are.

        Raises:
            ValueError: the rows are not all there.
        """
        lists = self.lists
        if first < 0 or blocks < 1 or first + blocks > lists.nq:
            raise ValueError(f"rows {first} to {first + blocks - 1} of a mask that has {lists.nq} blocks of queries")
        start, end = first * lists.bq, min((first + blocks) * lists.bq, lists.q_len)
        rows = slice(first, first + blocks)
        payload = {n: (a[:, start:end] if n.startswith("q_") else a) for n, a in lists.payload.items()}
        if "q_pos" not in payload:
            payload["q_pos"] = np.arange(start, end, dtype=np.int32)[None]
        if "bits" in payload:
            payload["bits"] = payload["bits"][:, :, rows]
        cut = {name: getattr(lists, name)[:, :, rows] for name in ("idx", "n_part", "n_tot")}
        new = BlockLists(
            **cut,
            payload=payload,
            bq=lists.bq,
            bk=lists.bk,
            q_len=end - start,
            kv_len=lists.kv_len,
            elem=lists.elem,
            max_part=lists.max_part,
        )
        return BlockMask(new, self.wanted[:, :, rows], f"rows {first}:{first + blocks} of {self.text}")

    def with_positions(self, q_positions=None, kv_positions=None) -> "BlockMask":
        """The same tiles with other positions, which the rule of partial tiles and ALiBi read.

        Which tiles are visited, and which of them as a whole, does not change: it is on the caller that this is still
        right. To choose tiles by the new positions, compile the mask with them.

        Args:
            q_positions: int [Sq] or [B, Sq]; None keeps what there is.
            kv_positions: int [Sk] or [B, Sk]; None keeps what there is.

        Returns:
            The mask.
        """
        payload = dict(self.lists.payload)
        given = {"q_pos": (q_positions, self.q_len), "kv_pos": (kv_positions, self.kv_len)}
        for name, (positions, length) in given.items():
            if positions is not None:
                positions = jnp_or_np(positions)
                positions = positions[None] if positions.ndim == 1 else positions
                if positions.ndim != 2 or positions.shape[1] != length:
                    raise ValueError(f"{name} has shape {positions.shape}: give [{length}] or [batch, {length}]")
                payload[name] = positions
        return dataclasses.replace(self, lists=dataclasses.replace(self.lists, payload=payload))

    def show(self, *, batch: int = 0, head: int = 0, size: int = 64) -> str:
        """The tiles drawn as text, see `draw_text` in `sparsejax.attention.drawing`; print it."""
        return draw_text(self, batch=batch, head=head, size=size)

    def picture(self, *, batch: int = 0, head: int = 0, ax=None):
        """The tiles drawn by matplotlib, a figure: dark visited whole, light with a rule inside, white skipped."""
        return draw_picture(self, batch=batch, head=head, ax=ax)

    def __and__(self, other: "BlockMask") -> "BlockMask":
        """Tiles of both; inside partial ones, both rules.

        Raises:
            ValueError: lengths or blocks differ, or a rule is stored as bits.
        """
        a, b = self.lists, other.lists
        sizes = [(x.bq, x.bk, x.q_len, x.kv_len) for x in (a, b)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"BlockMasks differ in (bq, bk, q_len, kv_len): {sizes[0]} and {sizes[1]}")
        if "bits" in a.payload or "bits" in b.payload:
            raise ValueError("a BlockMask whose rule is stored as bits cannot be combined: combine the Masks instead")
        positions = {}
        for name in ("q_pos", "kv_pos"):
            found = [x.payload[name] for x in (a, b) if name in x.payload]
            if found:
                positions[name] = found[0]
        arrays = [{n: v for n, v in x.payload.items() if n not in ("q_pos", "kv_pos")} for x in (a, b)]
        masks = [Mask(x.elem, own, m.text) for x, own, m in zip((a, b), arrays, (self, other), strict=True)]
        masks = [m for m in masks if m.rule is not None]
        both = masks[0] if len(masks) == 1 else masks[0] & masks[1] if masks else None
        kinds = jnp.minimum(*jnp.broadcast_arrays(self.kinds(), other.kinds()))
        elem, payload = (None, {}) if both is None else (both.rule, dict(both.arrays))
        sides = {"bq": a.bq, "bk": a.bk, "q_len": a.q_len, "kv_len": a.kv_len}
        text = f"({self.text}) & ({other.text})"
        return from_kinds(kinds, **sides, elem=elem, payload=payload | positions, text=text)


def from_kinds(
    kinds,
    *,
    bq: int,
    bk: int,
    q_len: int,
    kv_len: int,
    elem=None,
    payload=None,
    max_blocks: int | None = None,
    text: str = "from_kinds",
) -> BlockMask:
    """A BlockMask from a grid of tile kinds.

    Args:
        kinds: int8 [Bm, Hm, nq, nk]: 0 not visited, 1 visited with the rule, 2 visited whole; may be traced.
        bq: queries in a block.
        bk: keys in a block.
        q_len: number of queries.
        kv_len: number of keys.
        elem: the rule of partial tiles, or None.
        payload: what the rule reads.
        max_blocks: width of the lists. None: as wide as needed, or nk where the grid is traced. A row that has more
            keeps its partial tiles first; `overflow` tells.
        text: where the mask came from.

    Returns:
        The mask.
    """
    if is_traced(kinds):
        xp, width = jnp, math.ceil(kv_len / bk)
    else:
        xp, kinds = np, np.asarray(kinds)
        width = max(1, int((kinds > 0).sum(-1).max(initial=0)))
    width = width if max_blocks is None else max_blocks
    kinds = kinds.astype(np.int32)
    nk = kinds.shape[-1]
    # One key orders a row: partial tiles, full tiles, the rest; each in the order of the keys.
    key = xp.where(kinds == 0, 2, kinds - 1) * nk + xp.arange(nk, dtype=np.int32)
    order = xp.sort(key, axis=-1)[..., :width]
    wanted = (kinds > 0).sum(-1).astype(np.int32)
    sides = {"bq": bq, "bk": bk, "q_len": q_len, "kv_len": kv_len}
    return from_order(order, nk, wanted, **sides, elem=elem, payload=payload, text=text)


def from_order(order, nk: int, wanted, *, bq, bk, q_len, kv_len, elem, payload, text: str) -> BlockMask:
    """A BlockMask from sorted keys `class * nk + id`, int32 [Bm, Hm, nq, W]; class 0 is partial, 1 full, 2 padding."""
    xp = jnp if isinstance(order, jax.Array) else np
    n_part = (order < nk).sum(-1).astype(np.int32)
    n_tot = (order < 2 * nk).sum(-1).astype(np.int32)
    width = order.shape[-1]
    last = xp.minimum(xp.arange(width, dtype=np.int32), xp.maximum(n_tot, 1)[..., None] - 1)
    idx = xp.take_along_axis(order % nk, last, axis=-1)
    idx = xp.where(n_tot[..., None] > 0, idx, 0).astype(np.int32)
    max_part = int(n_part.max(initial=0)) if xp is np else None
    sides = {"bq": bq, "bk": bk, "q_len": q_len, "kv_len": kv_len, "elem": elem, "max_part": max_part}
    return BlockMask(BlockLists(idx, n_part, n_tot, payload=dict(payload or {}), **sides), wanted, text)


def _other_side(name: str) -> str:
    side, rest = name.split("_", 1)
    other = {"q": "kv", "kv": "q"}.get(side, side)
    return f"{other}_{rest}"
