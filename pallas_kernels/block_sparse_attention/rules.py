"""Evaluating the element rule of partial tiles: for the whole score matrix, for some tiles, or as packed bits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.lists import BlockLists

Array = Any


def positions(lists: BlockLists) -> tuple[Array, Array]:
    """The positions that rules and ALiBi read: int32 [1 or B, q_len] and [1 or B, kv_len]."""
    q_pos = lists.payload.get("q_pos", np.arange(lists.q_len, dtype=np.int32)[None])
    kv_pos = lists.payload.get("kv_pos", np.arange(lists.kv_len, dtype=np.int32)[None])
    return jnp.asarray(q_pos), jnp.asarray(kv_pos)


def pad_axis(x: Array, size: int, axis: int) -> Array:
    """Zero-pads one axis to `size`; returns x itself where it is that long already."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def known_keys(x: Array, kv_lengths: Array | None) -> Array:
    """Keys or values [B, Sk, ...] with 0 from `kv_lengths` [B] on: weights of 0 there would not hide NaN."""
    if kv_lengths is None:
        return x
    known = jnp.arange(x.shape[1]) < kv_lengths[:, None]
    return jnp.where(known.reshape(known.shape + (1,) * (x.ndim - 2)), x, 0)


def unpack_bits(bits: Array, bk: int) -> Array:
    """uint8 [..., ceil(bk / 8)] -> bool [..., bk], least significant bit first."""
    wide = (bits[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return wide.reshape(*bits.shape[:-1], 8 * bits.shape[-1])[..., :bk].astype(bool)


def pack_bits(mask: Array) -> Array:
    """bool [..., bk] -> uint8 [..., ceil(bk / 8)], the inverse of `unpack_bits`."""
    bytes_ = -(-mask.shape[-1] // 8)
    mask = pad_axis(mask, 8 * bytes_, mask.ndim - 1).reshape(*mask.shape[:-1], bytes_, 8)
    return (mask.astype(jnp.uint8) << jnp.arange(8, dtype=jnp.uint8)).sum(-1, dtype=jnp.uint8)


def apply_rule(lists: BlockLists, q_pos: Array, kv_pos: Array, payload: dict[str, Array]) -> Array:
    """The rule on broadcastable arguments; the bits (as bool), or True, where there is no function."""
    if lists.elem is not None:
        return lists.elem(q_pos, kv_pos, payload)
    return payload.get("bits", jnp.ones((), bool))


def owner_payload(lists: BlockLists, batch: int, kv_heads: int, group: int, split: int) -> dict[str, Array]:
    """Payload laid out for loops over list owners: an owner is one (batch, key head, part of the group of query heads).

    Args:
        lists: the lists.
        batch: B.
        kv_heads: Hk.
        group: query heads of a key head.
        split: owners of a key head: `group` where every query head has its own list, else 1.

    Returns:
        q_* as [owners or 1, nq, bq], kv_* as [owners or 1, nk, bk], head_* as [owners, group / split], batch_* as
        [owners], scalar_* as they are; always with q_pos and kv_pos. Bits are left out.
    """
    q_pos, kv_pos = positions(lists)
    per_batch = kv_heads * split
    out: dict[str, Array] = {}
    for name, value in {**lists.payload, "q_pos": q_pos, "kv_pos": kv_pos}.items():
        if name.startswith(("q_", "kv_")):
            n, b = (lists.nq, lists.bq) if name.startswith("q_") else (lists.nk, lists.bk)
            tiled = pad_axis(jnp.asarray(value), n * b, 1).reshape(-1, n, b)
            out[name] = tiled if tiled.shape[0] == 1 else jnp.repeat(tiled, per_batch, axis=0)
        elif name.startswith("head_"):
            out[name] = jnp.tile(jnp.asarray(value).reshape(per_batch, group // split), (batch, 1))
        elif name.startswith("batch_"):
            out[name] = jnp.repeat(jnp.asarray(value), per_batch)
        elif name.startswith("scalar_"):
            out[name] = jnp.asarray(value)
    return out


def dense_mask(lists: BlockLists, batch: int, heads: int, kv_heads: int) -> Array:
    """The whole mask, bool [1 or B, 1 or H, q_len, kv_len]: an oracle for tests, quadratic in memory."""
    bm, hm, nq, w = lists.idx.shape
    slot = jnp.arange(w)
    kind = jnp.where(slot < lists.n_part[..., None], 1, jnp.where(slot < lists.n_tot[..., None], 2, 0))
    grid = jnp.zeros((bm, hm, nq, lists.nk), jnp.int32)
    where = jnp.ix_(jnp.arange(bm), jnp.arange(hm), jnp.arange(nq))
    grid = grid.at[(*(x[..., None] for x in where), lists.idx)].max(kind)

    def spread(tile_values):  # [bm, hm, nq, nk] -> [bm, 1 or H, q_len, kv_len]
        wide = jnp.repeat(jnp.repeat(tile_values, lists.bq, axis=2), lists.bk, axis=3)[
            ..., : lists.q_len, : lists.kv_len
        ]
        return jnp.repeat(wide, heads // hm, axis=1) if 1 < hm < heads else wide

    kinds = spread(grid)
    if not lists.has_rule:
        return kinds > 0
    payload: dict[str, Array] = {}
    for name, value in lists.payload.items():
        if name == "bits":
            tiles = unpack_bits(value, lists.bk)
            some = jnp.zeros((bm, hm, nq, lists.nk, lists.bq, lists.bk), bool)
            valid = (jnp.arange(tiles.shape[3]) < lists.n_part[..., None])[..., None, None]
            index = (*(x[..., None] for x in where), lists.idx[..., : tiles.shape[3]])
            some = some.at[index].max(tiles & valid)
            some = some.transpose(0, 1, 2, 4, 3, 5).reshape(bm, hm, nq * lists.bq, lists.nk * lists.bk)
            some = some[..., : lists.q_len, : lists.kv_len]
            payload[name] = jnp.repeat(some, heads // hm, axis=1) if 1 < hm < heads else some
        elif name in ("q_pos", "kv_pos"):
            continue
        elif name.startswith("q_"):
            payload[name] = jnp.asarray(value)[:, None, :, None]
        elif name.startswith("kv_"):
            payload[name] = jnp.asarray(value)[:, None, None, :]
        elif name.startswith("head_"):
            payload[name] = jnp.asarray(value)[None, :, None, None]
        elif name.startswith("batch_"):
            payload[name] = jnp.asarray(value)[:, None, None, None]
        else:
            payload[name] = jnp.asarray(value)
    q_pos, kv_pos = positions(lists)
    allowed = apply_rule(lists, q_pos[:, None, :, None], kv_pos[:, None, None, :], payload)
    return (kinds == 2) | ((kinds == 1) & allowed)


def bits_shape(lists: BlockLists, batch: int, heads: int) -> tuple[int, ...]:
    """Shape of what `partial_bits` returns."""
    bm, hm, nq, _ = lists.idx.shape
    if any(name.startswith("batch_") or (name.startswith(("q_", "kv_")) and np.shape(value)[0] > 1)
           for name, value in lists.payload.items()):  # fmt: skip
        bm = batch
    if any(name.startswith("head_") for name in lists.payload):
        hm = heads
    return bm, hm, nq, lists.part_width, lists.bq, -(-lists.bk // 8)


def partial_bits(lists: BlockLists, batch: int, heads: int) -> Array:
    """The rule of every listed partial tile as bits: uint8 [1 or B, 1 or Hk or H, nq, part_width, bq, ceil(bk / 8)].

    One query block at a time, so the working set stays small. Ragged ends are not masked here.
    """
    bm, hm, nq, p, bq, _ = bits_shape(lists, batch, heads)
    idx = lists.idx[..., :p]
    if idx.shape[1] < hm:
        idx = jnp.repeat(idx, hm // idx.shape[1], axis=1)
    idx = jnp.broadcast_to(idx, (bm, hm, nq, p))
    q_pos, kv_pos = positions(lists)
    vectors = {**{k: jnp.asarray(v) for k, v in lists.payload.items()}, "q_pos": q_pos, "kv_pos": kv_pos}
    rows = {
        k: pad_axis(v, nq * bq, 1).reshape(-1, nq, bq).swapaxes(0, 1) for k, v in vectors.items() if k.startswith("q_")
    }
    cols = {
        k: pad_axis(v, lists.nk * lists.bk, 1).reshape(-1, lists.nk, lists.bk)
        for k, v in vectors.items()
        if k.startswith("kv_")
    }
    fixed = {k: v for k, v in vectors.items() if k.startswith("scalar_")}
    fixed |= {k: v[None, :, None, None, None] for k, v in vectors.items() if k.startswith("head_")}
    fixed |= {k: v[:, None, None, None, None] for k, v in vectors.items() if k.startswith("batch_")}
    tile_bits = vectors["bits"].transpose(2, 0, 1, 3, 4, 5) if "bits" in vectors else None

    def one(_, xs):
        ids, row, bits = xs  # ids [bm, hm, p]
        payload = fixed | {k: v[:, None, None, :, None] for k, v in row.items()}
        for name, value in cols.items():
            lead = jnp.arange(bm)[:, None, None] if value.shape[0] > 1 else 0
            payload[name] = value[lead, ids][..., None, :]
        if bits is not None:
            kept = unpack_bits(bits, lists.bk)[:, :, :p]
            kept = jnp.pad(kept, [(0, 0), (0, 0), (0, p - kept.shape[2]), (0, 0), (0, 0)])
            payload["bits"] = jnp.repeat(kept, hm // kept.shape[1], axis=1) if 1 < kept.shape[1] < hm else kept
        allowed = apply_rule(lists, payload.pop("q_pos"), payload.pop("kv_pos"), payload)
        return None, pack_bits(jnp.broadcast_to(allowed, (bm, hm, p, bq, lists.bk)))

    _, out = jax.lax.scan(one, None, (idx.transpose(2, 0, 1, 3), rows, tile_bits))
    return out.transpose(1, 2, 0, 3, 4, 5)


def with_bits(lists: BlockLists, batch: int, heads: int) -> BlockLists:
    """Replaces the rule by its bits, so that calls with the same lists need not evaluate it again.

    Example:
        >>> from pallas_kernels.block_sparse_attention.lists import causal, from_tiles
        >>> lists = from_tiles(np.eye(2, dtype=int), bq=8, bk=8, q_len=16, kv_len=16, elem=causal)
        >>> with_bits(lists, 1, 1).payload["bits"].shape
        (1, 1, 2, 1, 8, 1)
    """
    if lists.elem is None:
        return lists
    bits = partial_bits(lists, batch, heads)
    bm, hm = bits.shape[:2]

    def widen(x):
        if x is None:
            return None
        x = jnp.repeat(x, hm // x.shape[1], axis=1) if x.shape[1] < hm else x
        return jnp.broadcast_to(x, (bm, *x.shape[1:]))

    names = ("idx", "n_part", "n_tot", "t_idx", "t_slot", "t_ptr", "t_part", "t_tot")
    payload = {k: v for k, v in lists.payload.items() if k in ("q_pos", "kv_pos")} | {"bits": bits}
    return dataclasses.replace(lists, **{n: widen(getattr(lists, n)) for n in names}, payload=payload, elem=None)


def bits_bytes(lists: BlockLists, batch: int, heads: int) -> int:
    """Size of `partial_bits` in bytes."""
    return math.prod(bits_shape(lists, batch, heads))
