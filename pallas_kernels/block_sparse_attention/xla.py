"""Block-sparse attention in plain JAX: runs everywhere, work and memory follow the lists.

A scan over query blocks; in it a loop of dynamic length over the listed key blocks, a few at a time, with the online
softmax. All heads whose working set fits in cache advance together, and several query blocks where their lists are
short. Partial tiles come first in a row, so the element rule is evaluated in a loop of its own. The backward pass
recomputes weights from the saved lse and adds dk and dv into its carry, so it needs no transposed lists.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention.lists import BlockLists
from pallas_kernels.block_sparse_attention.options import Extras, Settings, keep_mask
from pallas_kernels.block_sparse_attention.rules import apply_rule, owner_payload, pad_axis, unpack_bits

Array = Any

# Elements of the score tiles that one step works on: what stays in a core's second-level cache.
_STEP_SCORES = 2**18
_STEP_SLOTS = 8


def supports(q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings) -> str | None:
    """None: this path takes every option."""
    del q, k, v, lists, extras, settings
    return None


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a call is cut up. An owner is one (batch, key head, part of its query heads) with a list of its own."""

    batch: int
    heads: int
    kv_heads: int
    split: int  # owners of a key head
    chunks: int  # groups of key heads that follow each other
    slots: int  # listed tiles of one step
    blocks: int  # query blocks that advance together

    @classmethod
    def of(cls, q: Array, kv_heads: int, lists: BlockLists) -> "_Layout":
        batch, _, heads, _ = q.shape
        split = heads // kv_heads if lists.idx.shape[1] == heads else 1
        tile = heads // kv_heads * lists.bq * lists.bk
        total = batch * kv_heads
        known = total if isinstance(total, int) else kv_heads  # jax.export can leave the batch open
        together = max((n for n in range(1, known + 1) if known % n == 0 and n * tile <= _STEP_SCORES), default=1)
        slots = max(1, min(_STEP_SLOTS, lists.width, _STEP_SCORES // (together * tile)))
        blocks = 1
        if slots == lists.width:
            # One step takes a whole list, so query blocks that advance together never wait for each other. XLA:CPU
            # gives several cores only to large operations: two heads with one tile of 128 x 128 each run on one core,
            # eight query blocks of them together on all (their products do from JAX 0.12 on, which splits batches).
            most = max(1, min(lists.nq, _STEP_SCORES // (together * tile * slots)))
            blocks = min(range(most, most // 2, -1), key=lambda n: -lists.nq % n)
        return cls(batch, heads, kv_heads, split, total // together, slots, blocks)

    @property
    def rows(self) -> int:
        """Query heads of an owner."""
        return self.heads // self.kv_heads // self.split

    @property
    def owners(self) -> int:
        """Owners that advance together."""
        return self.batch * self.kv_heads * self.split // self.chunks

    @property
    def lanes(self) -> int:
        """(query block, owner) pairs that advance together, in this order."""
        return self.blocks * self.owners

    def owner(self) -> Array:
        """The owner of every lane."""
        return jnp.arange(self.lanes) % self.owners

    def bundle(self, x: Array) -> Array:
        """[chunks, n, owners, ...] -> [chunks, ceil(n / blocks), lanes, ...], zero-padded."""
        groups = -(-x.shape[1] // self.blocks)
        x = pad_axis(x, groups * self.blocks, 1)
        return x.reshape(self.chunks, groups, self.lanes, *x.shape[3:])

    def unbundle(self, x: Array) -> Array:
        """The inverse of `bundle`, padding included."""
        return x.reshape(self.chunks, x.shape[1] * self.blocks, self.owners, *x.shape[3:])

    def spread(self, x: Array) -> Array:
        """[1 or B, 1 or Hk or H, ...] -> [chunks, owners, ...]."""
        lists = self.kv_heads * self.split
        x = jnp.repeat(x, lists // x.shape[1], axis=1) if x.shape[1] < lists else x
        x = jnp.broadcast_to(x, (self.batch, *x.shape[1:]))
        return x.reshape(self.chunks, self.owners, *x.shape[2:])

    def gather_up(self, x: Array, like: Array) -> Array:
        """The transpose of `spread`: [chunks, owners, ...] summed to the two leading axes of `like`."""
        x = x.reshape(self.batch, self.kv_heads * self.split, *x.shape[2:])
        bm, hm = like.shape[:2]
        x = x.reshape(self.batch, hm, -1, *x.shape[2:]).sum(2)
        return x.sum(0, keepdims=True) if bm < self.batch else x

    def cut(self, x: Array, n: int, b: int) -> Array:
        """Queries [B, S, H, d] -> [chunks, ceil(n / blocks), lanes, rows * b, d], zero-padded."""
        d = x.shape[-1]
        x = pad_axis(x, n * b, 1).reshape(self.batch, n, b, self.kv_heads * self.split, self.rows, d)
        x = x.transpose(0, 3, 1, 4, 2, 5).reshape(self.chunks, self.owners, n, self.rows * b, d)
        return self.bundle(x.swapaxes(1, 2))

    def join(self, x: Array, length: int) -> Array:
        """The inverse of `cut`."""
        x = self.unbundle(x)
        _, n, _, height, d = x.shape
        b = height // self.rows
        x = x.swapaxes(1, 2).reshape(self.batch, self.kv_heads * self.split, n, self.rows, b, d)
        return x.transpose(0, 2, 4, 1, 3, 5).reshape(self.batch, n * b, self.heads, d)[:, :length]

    def cut_keys(self, x: Array, n: int, b: int) -> Array:
        """Keys [B, S, Hk, d] -> [chunks, key heads together, n, b, d], zero-padded."""
        x = pad_axis(x, n * b, 1).reshape(self.batch, n, b, self.kv_heads, -1).transpose(0, 3, 1, 2, 4)
        return x.reshape(self.chunks, self.owners // self.split, n, b, x.shape[-1])

    def join_keys(self, x: Array, length: int) -> Array:
        """The inverse of `cut_keys`."""
        n, b, d = x.shape[2:]
        x = x.reshape(self.batch, self.kv_heads, n, b, d).transpose(0, 2, 3, 1, 4)
        return x.reshape(self.batch, n * b, self.kv_heads, d)[:, :length]


class _Step(NamedTuple):
    """Scores of one step."""

    ids: Array  # [lanes, U] key blocks
    scores: Array  # [lanes, rows, bq, U * bk], -inf where masked
    slope: Array | float  # derivative of the soft cap, same shape
    k: Array  # [lanes, U * bk, D]
    keys: Array  # [lanes, U * bk] indices
    distance: Array | None  # [lanes, 1, bq, U * bk], for ALiBi
    bias_index: Any  # where the tiles lie in the cut bias


class _Call:
    """One attention call, cut up: what a scan over chunks and query blocks reads, and the scores of a step."""

    def __init__(self, q, k, v, lists: BlockLists, extras: Extras, settings: Settings, direct: bool):
        self.lists, self.extras, self.settings = lists, extras, settings
        self.layout = layout = _Layout.of(q, k.shape[2], lists)
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        self.precision = "highest" if q.dtype == self.dtype else "default"
        slots, nq = layout.slots, lists.nq
        self.bits = None
        if "bits" in lists.payload:
            bits = jnp.asarray(lists.payload["bits"]).transpose(2, 0, 1, 3, 4, 5)
            self.bits = pad_axis(bits, -(-bits.shape[3] // slots) * slots, 3)
        self.bias = None if extras.bias is None else self.cut_bias(extras.bias)
        width = -(-lists.width // slots) * slots
        per_block = {
            "i": jnp.broadcast_to(jnp.arange(nq)[:, None], (layout.chunks, nq, layout.owners)),
            "idx": layout.spread(pad_axis(jnp.asarray(lists.idx), width, 3)).swapaxes(1, 2),
            "n_part": layout.spread(jnp.asarray(lists.n_part)).swapaxes(1, 2),
            "n_tot": layout.spread(jnp.asarray(lists.n_tot)).swapaxes(1, 2),
        }
        if extras.block_bias is not None:
            per_block["block_bias"] = layout.spread(pad_axis(extras.block_bias, width, 3)).swapaxes(1, 2)
        head = jnp.arange(layout.batch * layout.heads).reshape(layout.chunks, layout.owners, layout.rows)
        head = jnp.tile(head, (1, layout.blocks, 1))
        chunk = {"batch": head[..., 0] // layout.heads, "head": head % layout.heads}
        for name, value in owner_payload(
            lists, layout.batch, layout.kv_heads, layout.heads // layout.kv_heads, layout.split
        ).items():
            if name.startswith("scalar_"):
                value = jnp.broadcast_to(value, (layout.chunks,))
            elif value.shape[0] > 1 or layout.owners * layout.chunks == 1:
                value = value.reshape(layout.chunks, -1, *value.shape[1:])
            else:
                value = jnp.broadcast_to(value, (layout.chunks, *value.shape))
            if name.startswith("q_"):
                value = value.swapaxes(1, 2)
                per_block[name] = jnp.broadcast_to(value, (*value.shape[:2], layout.owners, lists.bq))
            elif name.startswith(("head_", "batch_")):
                chunk[name] = jnp.tile(value, (1, layout.blocks) + (1,) * (value.ndim - 2))
            else:
                chunk[name] = value
        self.direct = direct
        if direct:
            # Few queries: fetch the listed tiles from where they lie and touch nothing else of k and v.
            if extras.page_table is None:
                k, v = (pad_axis(x, lists.nk * lists.bk, 1).reshape(-1, lists.bk, *x.shape[2:]) for x in (k, v))
                pages = jnp.arange(k.shape[0], dtype=jnp.int32).reshape(layout.batch, lists.nk)
            else:
                pages = extras.page_table
            self.k, self.v, self.pages = k, v, pages
        else:
            chunk["k"], chunk["v"] = (layout.cut_keys(x, lists.nk, lists.bk) for x in (k, v))
        self.rows = {name: layout.bundle(x) for name, x in per_block.items()}
        self.rows["q"] = layout.cut(q, nq, lists.bq)
        self.chunk = chunk

    def dot(self, spec: str, a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a.astype(self.dtype), b.astype(self.dtype), precision=self.precision)

    def fetch(self, chunk: dict[str, Array], name: str, ids: Array) -> Array:
        """The tiles `ids` [lanes, U] of k or v as [lanes, U * bk, d]."""
        if self.direct:
            page = self.pages[chunk["batch"][:, None], ids]
            kv_head = chunk["head"][:, :1] // (self.layout.heads // self.layout.kv_heads)
            tiles = (self.k if name == "k" else self.v)[page, :, kv_head]
        else:
            tiles = chunk[name][self.layout.owner()[:, None] // self.layout.split, ids]
        tiles = tiles.reshape(self.layout.lanes, -1, tiles.shape[-1])
        if self.extras.kv_lengths is not None:
            # Weights of 0 would not hide NaN.
            known = self.key_indices(ids) < self.extras.kv_lengths[chunk["batch"]][:, None]
            tiles = jnp.where(known[..., None], tiles, 0)
        return tiles

    def key_indices(self, ids: Array) -> Array:
        """[lanes, U * bk] of the tiles `ids` [lanes, U]."""
        bk = self.lists.bk
        return (ids[:, :, None] * bk + jnp.arange(bk)).reshape(self.layout.lanes, -1)

    def cut_bias(self, bias: Array) -> Array:
        """[b, h, Sq or 1, Sk or 1] -> [b, h, nq or 1, bq or 1, nk or 1, bk or 1]."""
        lists = self.lists
        b, h, rows, cols = bias.shape
        if rows > 1 or lists.q_len == 1:
            bias, rows = pad_axis(bias, lists.nq * lists.bq, 2), (lists.nq, lists.bq)
        else:
            rows = (1, 1)
        if cols > 1 or lists.kv_len == 1:
            bias, cols = pad_axis(bias, lists.nk * lists.bk, 3), (lists.nk, lists.bk)
        else:
            cols = (1, 1)
        return bias.reshape(b, h, *rows, *cols)

    def join_bias(self, cut: Array) -> Array:
        """The inverse of `cut_bias`."""
        b, h, n, height, m, width = cut.shape
        shape = self.extras.bias.shape
        return cut.reshape(b, h, n * height, m * width)[:, :, : shape[2], : shape[3]]

    def bias_index(self, chunk, row, ids) -> tuple:
        b, h, n, _, m, _ = self.bias.shape
        batch = chunk["batch"][:, None, None] if b > 1 else 0
        head = chunk["head"][:, :, None] if h > 1 else 0
        i = row["i"][:, None, None] if n > 1 else 0
        return (batch, head, i, slice(None), ids[:, None, :] if m > 1 else ids[:, None, :] * 0)

    def step(self, chunk: dict[str, Array], row: dict[str, Array], j: Array, partial: bool) -> _Step:
        """Scores of slots j * U to (j + 1) * U of query blocks row["i"]; `partial`: the element rule is in force."""
        lists, extras, settings, layout = self.lists, self.extras, self.settings, self.layout
        u, bq, bk = layout.slots, lists.bq, lists.bk
        ids = jax.lax.dynamic_slice_in_dim(row["idx"], j * u, u, axis=1)
        slot = j * u + jnp.arange(u)
        k = self.fetch(chunk, "k", ids)
        s = self.dot("ord,okd->ork", row["q"], k) * settings.scale
        s = s.reshape(layout.lanes, layout.rows, bq, u * bk)
        slope: Array | float = 1.0
        if settings.soft_cap is not None:
            capped = jnp.tanh(s / settings.soft_cap)
            s, slope = settings.soft_cap * capped, 1 - capped * capped

        def wide(x):  # one value a slot -> one a key
            return jnp.repeat(x, bk, axis=-1)[:, None, None, :]

        def per_key(name):  # [owners or 1, nk, bk] -> [lanes, 1, 1, U * bk]
            value = chunk[name]
            owner = layout.owner()[:, None] if value.shape[0] > 1 else 0
            return value[owner, ids].reshape(layout.lanes, 1, 1, u * bk)

        distance = bias_index = None
        if extras.alibi is not None:
            distance = jnp.abs(row["q_pos"][:, None, :, None] - per_key("kv_pos")).astype(self.dtype)
            s = s - extras.alibi.astype(self.dtype)[chunk["head"]][:, :, None, None] * distance
        if self.bias is not None:
            bias_index = self.bias_index(chunk, row, ids)
            tiles = self.bias[bias_index].astype(self.dtype)  # [lanes, 1 or rows, U, bq or 1, bk or 1]
            tiles = jnp.broadcast_to(tiles.swapaxes(2, 3), (*tiles.shape[:2], tiles.shape[3], u, bk))
            s = s + tiles.reshape(*tiles.shape[:3], u * bk)
        if extras.block_bias is not None:
            tile_bias = jax.lax.dynamic_slice_in_dim(row["block_bias"], j * u, u, axis=1)
            s = s + wide(tile_bias.astype(self.dtype))

        keys = self.key_indices(ids)
        limit = lists.kv_len
        if extras.kv_lengths is not None:
            limit = jnp.minimum(limit, extras.kv_lengths[chunk["batch"]])[:, None]
        allowed = (keys < limit)[:, None, None, :] & wide(slot < row["n_tot"][:, None])
        if partial:
            payload = {name: value[:, None, :, None] for name, value in row.items() if name.startswith("q_")}
            payload |= {name: per_key(name) for name in chunk if name.startswith("kv_")}
            payload |= {name: chunk[name][:, :, None, None] for name in chunk if name.startswith("head_")}
            payload |= {name: chunk[name][:, None, None, None] for name in chunk if name.startswith("batch_")}
            payload |= {name: chunk[name] for name in chunk if name.startswith("scalar_")}
            if self.bits is not None:
                payload["bits"] = self.tile_bits(chunk, row["i"], j)
            rule = apply_rule(lists, payload.pop("q_pos"), payload.pop("kv_pos"), payload)
            allowed = allowed & (rule | wide(slot >= row["n_part"][:, None]))
        return _Step(ids, jnp.where(allowed, s, -jnp.inf), slope, k, keys, distance, bias_index)

    def tile_bits(self, chunk, i, j) -> Array:
        """Bits of one step as bool [lanes, 1, bq, U * bk]."""
        _, bm, hm, _, bq, _ = self.bits.shape
        layout, bk = self.layout, self.lists.bk
        # Bits that all owners share are unpacked once.
        shared = bm * hm == 1
        lane = slice(None, None, layout.owners if shared else None)
        batch = chunk["batch"][lane, None] if bm > 1 else 0
        head = chunk["head"][lane, :1] // (layout.heads // hm)
        slots = j * layout.slots + jnp.arange(layout.slots)
        tiles = unpack_bits(self.bits[i[lane, None], batch, head, slots], bk)
        tiles = tiles.transpose(0, 2, 1, 3).reshape(-1, 1, bq, layout.slots * bk)
        return jnp.repeat(tiles, layout.owners, axis=0) if shared else tiles

    def loop(self, row: dict[str, Array], body, carry):
        """Runs body(j, carry, partial) over all steps of some query blocks, partial ones first."""
        u = self.layout.slots
        carry, done = compat.vary_alike((carry, row["q"]))[0], 0
        if self.lists.has_rule:
            done = -(-jnp.max(row["n_part"]) // u)
            carry = jax.lax.fori_loop(0, done, lambda j, c: body(j, c, True), carry)
        return jax.lax.fori_loop(done, -(-jnp.max(row["n_tot"]) // u), lambda j, c: body(j, c, False), carry)

    def dropped(self, chunk, row, step: _Step, weights: Array) -> Array:
        """Dropout of weights [lanes, rows, bq, U * bk]."""
        if not self.settings.dropout:
            return weights
        head = (chunk["batch"][:, None] * self.layout.heads + chunk["head"])[:, :, None, None]
        query = (row["i"][:, None] * self.lists.bq + jnp.arange(self.lists.bq))[:, None, :, None]
        kept = keep_mask(self.extras.seed, self.settings, head, query, step.keys[:, None, None, :])
        return jnp.where(kept, weights / (1 - self.settings.dropout), 0)

    def flat(self, x: Array) -> Array:
        """[lanes, rows, bq, n] -> [lanes, rows * bq, n]."""
        return x.reshape(x.shape[0], -1, x.shape[-1])


def forward(q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings) -> tuple[Array, Array]:
    """Output [B, Sq, H, Dv] and lse [B, H, Sq], at least float32; see `block_sparse_attention`."""
    call = _Call(q, k, v, lists, extras, settings, direct=extras.page_table is not None or lists.nq == 1)
    layout, dtype = call.layout, call.dtype
    height = layout.rows * lists.bq

    def block(chunk, row):
        def body(j, carry, partial):
            acc, top, total = carry
            step = call.step(chunk, row, j, partial)
            new_top = jnp.maximum(top, step.scores.max(-1))
            origin = jnp.where(new_top != -jnp.inf, new_top, 0)
            p = jnp.exp(step.scores - origin[..., None])
            shrink = jnp.exp(top - origin)
            weights = call.flat(call.dropped(chunk, row, step, p))
            values = call.dot("ork,okd->ord", weights, call.fetch(chunk, "v", step.ids))
            acc = acc * shrink.reshape(layout.lanes, height, 1) + values
            return acc, new_top, total * shrink + p.sum(-1)

        some = (layout.lanes, layout.rows, lists.bq)
        start = (
            jnp.zeros((layout.lanes, height, v.shape[-1]), dtype),
            jnp.full(some, -jnp.inf, dtype),
            jnp.zeros(some, dtype),
        )
        acc, top, total = call.loop(row, body, start)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        # Where a query sees nothing, padding has brought in a value, which may be NaN.
        o = jnp.where(empty.reshape(layout.lanes, height, 1), 0, acc / safe.reshape(layout.lanes, height, 1))
        lse = jnp.where(empty, -jnp.inf, jnp.where(empty, 0, top) + jnp.log(safe))
        return o, lse.reshape(layout.lanes, height, 1)

    def chunk_pass(_, xs):
        chunk, rows = xs
        return None, jax.lax.scan(lambda _, row: (None, block(chunk, row)), None, rows)[1]

    _, (o, lse) = jax.lax.scan(chunk_pass, None, (call.chunk, call.rows))
    return layout.join(o, lists.q_len), layout.join(lse, lists.q_len)[..., 0].swapaxes(1, 2)


def backward(
    q: Array,
    k: Array,
    v: Array,
    lists: BlockLists,
    extras: Extras,
    settings: Settings,
    o: Array,
    lse: Array,
    do: Array,
    dlse: Array,
) -> tuple[Array, Array, Array, Extras]:
    """Gradients of q, k, v and of the differentiable extras, from saved output and lse."""
    call = _Call(q, k, v, lists, extras, settings, direct=False)
    layout, dtype = call.layout, call.dtype
    delta = (o.astype(dtype) * do.astype(dtype)).sum(-1, keepdims=True) - dlse.swapaxes(1, 2)[..., None]
    # Where a query sees nothing, exp(scores - inf) = 0 keeps its gradients zero.
    denominator = jnp.where(lse != -jnp.inf, lse, jnp.inf).swapaxes(1, 2)[..., None]
    rows = call.rows | {
        name: layout.cut(x, lists.nq, lists.bq) for name, x in (("do", do), ("delta", delta), ("lse", denominator))
    }
    width = rows["idx"].shape[-1]
    grid = (layout.lanes, layout.rows, lists.bq, layout.slots * lists.bk)

    def block(carry, row, chunk):
        dk, dv, dbias = carry
        of_key = layout.owner()[:, None] // layout.split

        def body(j, carry, partial):
            dq, dk, dv, dbias, dblock, dalibi = carry
            step = call.step(chunk, row, j, partial)
            p = jnp.exp(step.scores - row["lse"].reshape(*grid[:3], 1))
            dp = call.dot("ord,okd->ork", row["do"], call.fetch(chunk, "v", step.ids)).reshape(grid)
            weights = call.flat(call.dropped(chunk, row, step, p))
            ds = p * (call.dropped(chunk, row, step, dp) - row["delta"].reshape(*grid[:3], 1))
            tiles = ds.reshape(*grid[:3], layout.slots, lists.bk)
            if dblock is not None:
                dblock = jax.lax.dynamic_update_slice_in_dim(dblock, tiles.sum((1, 2, 4)), j * layout.slots, axis=1)
            if dalibi is not None:
                dalibi = dalibi - (ds * step.distance).sum((2, 3))
            if dbias is not None:
                tiles = tiles.swapaxes(2, 3)  # [lanes, rows, U, bq, bk]
                tiles = tiles.sum(1, keepdims=True) if dbias.shape[1] == 1 else tiles
                tiles = tiles.sum(3, keepdims=True) if dbias.shape[3] == 1 else tiles
                tiles = tiles.sum(4, keepdims=True) if dbias.shape[5] == 1 else tiles
                dbias = dbias.at[step.bias_index].add(tiles)
            dz = call.flat(ds * step.slope) * settings.scale
            dq = dq + call.dot("ork,okd->ord", dz, step.k)
            add_k = call.dot("ork,ord->okd", dz, row["q"]).reshape(layout.lanes, layout.slots, lists.bk, -1)
            add_v = call.dot("ork,ord->okd", weights, row["do"]).reshape(layout.lanes, layout.slots, lists.bk, -1)
            return dq, dk.at[of_key, step.ids].add(add_k), dv.at[of_key, step.ids].add(add_v), dbias, dblock, dalibi

        start = (
            jnp.zeros(row["q"].shape, dtype),
            dk,
            dv,
            dbias,
            None if extras.block_bias is None else jnp.zeros((layout.lanes, width), dtype),
            None if extras.alibi is None else jnp.zeros((layout.lanes, layout.rows), dtype),
        )
        dq, dk, dv, dbias, dblock, dalibi = call.loop(row, body, start)
        dq = jnp.where(row["lse"] == jnp.inf, 0, dq)
        return (dk, dv, dbias), (dq.astype(q.dtype), dblock, dalibi)

    def chunk_pass(dbias, xs):
        chunk, rows = xs
        start = (jnp.zeros(chunk["k"].shape, dtype), jnp.zeros(chunk["v"].shape, dtype), dbias)
        start = compat.vary_alike((start, chunk["k"]))[0]
        (dk, dv, dbias), out = jax.lax.scan(lambda carry, row: block(carry, row, chunk), start, rows)
        return dbias, (dk.astype(k.dtype), dv.astype(v.dtype), *out)

    dbias = None if call.bias is None else jnp.zeros(call.bias.shape, dtype)
    dbias = compat.vary_alike((dbias, q))[0]
    dbias, (dk, dv, dq, dblock, dalibi) = jax.lax.scan(chunk_pass, dbias, (call.chunk, rows))
    grads = Extras()
    if extras.bias is not None:
        grads = grads._replace(bias=call.join_bias(dbias).astype(extras.bias.dtype))
    if extras.block_bias is not None:
        dblock = layout.gather_up(layout.unbundle(dblock).swapaxes(1, 2)[:, :, : lists.nq, : lists.width], lists.idx)
        grads = grads._replace(block_bias=dblock.astype(extras.block_bias.dtype))
    if extras.alibi is not None:
        dalibi = layout.unbundle(dalibi).sum(1).reshape(layout.batch, layout.heads).sum(0)
        grads = grads._replace(alibi=dalibi.astype(extras.alibi.dtype))
    return (
        layout.join(dq, lists.q_len),
        layout.join_keys(dk, lists.kv_len),
        layout.join_keys(dv, lists.kv_len),
        grads,
    )


def block_stats(
    q: Array, k: Array, lists: BlockLists, extras: Extras, settings: Settings, lse: Array, kind: str
) -> tuple[Array, Array]:
    """Statistics of attention weights over each listed tile, [B, H, nq, W], and the largest logit, [B, H]."""
    call = _Call(q, k, k, lists, extras, settings, direct=extras.page_table is not None or lists.nq == 1)
    layout, dtype = call.layout, call.dtype
    denominator = jnp.where(lse != -jnp.inf, lse, jnp.inf).swapaxes(1, 2)[..., None].astype(dtype)
    rows = call.rows | {"lse": layout.cut(denominator, lists.nq, lists.bq)}
    width = rows["idx"].shape[-1]

    def block(chunk, row):
        # Rows that only fill up the last block must not count as queries.
        query = row["i"][:, None] * lists.bq + jnp.arange(lists.bq)
        real = (query < lists.q_len)[:, None, :, None]

        def body(j, carry, partial):
            stats, top = carry
            step = call.step(chunk, row, j, partial)
            scores = jnp.where(real, step.scores, -jnp.inf)
            p = jnp.exp(scores - row["lse"].reshape(layout.lanes, layout.rows, lists.bq, 1))
            p = p.reshape(*p.shape[:3], layout.slots, lists.bk)
            found = p.max((2, 4)) if kind == "max" else p.sum((2, 4))
            stats = jax.lax.dynamic_update_slice_in_dim(stats, found, j * layout.slots, axis=2)
            return stats, jnp.maximum(top, scores.max((2, 3)))

        start = (
            jnp.zeros((layout.lanes, layout.rows, width), dtype),
            jnp.full((layout.lanes, layout.rows), -jnp.inf, dtype),
        )
        return call.loop(row, body, start)

    def chunk_pass(_, xs):
        chunk, rows = xs
        return None, jax.lax.scan(lambda _, row: (None, block(chunk, row)), None, rows)[1]

    _, (stats, top) = jax.lax.scan(chunk_pass, None, (call.chunk, rows))
    stats, top = layout.unbundle(stats)[:, : lists.nq], layout.unbundle(top)
    stats = stats.swapaxes(1, 2)[..., : lists.width]  # [chunks, owners, nq, rows, W]
    stats = stats.swapaxes(2, 3).reshape(layout.batch, layout.heads, lists.nq, lists.width)
    if kind == "mean":
        height = jnp.minimum(lists.bq, lists.q_len - lists.bq * jnp.arange(lists.nq))
        length = jnp.minimum(lists.bk, lists.kv_len - lists.bk * jnp.asarray(lists.idx))
        area = height[:, None] * jnp.repeat(length, layout.heads // length.shape[1], axis=1)
        stats = stats / area
    return stats, top.max(1).reshape(layout.batch, layout.heads)
