"""Block-sparse attention on TPU: one grid step for every active tile, in flat lists that the scalar core prefetches.

The grid is (batch, head, step) with a dynamic number of steps. A step takes one block of the output's side (queries in
the forward pass and for dq, keys for dk and dv) and `unroll` listed blocks of the other side, each fetched through an
index map of its own: narrow blocks are gathered until a step is about 512 x 512, below which the matrix unit starves.

Layout rules that the bundle counts rest on: row statistics and row vectors live replicated over the 128 lanes and are
widened by repeating registers, never by slicing a column; they are brought into that form once an output row, not once
a step; logits are in base 2, so that the scale and the change of base are one product.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import flat
from pallas_kernels.block_sparse_attention.lists import BlockLists
from pallas_kernels.block_sparse_attention.options import Extras, Settings, keep_mask
from pallas_kernels.block_sparse_attention.rules import known_keys, pad_axis, positions

Array = Any

LANES = 128
LOG2E = math.log2(math.e)
MASKED = -1e30
"""Logit of a masked element: finite, so that differences of two are 0 rather than NaN."""
NOTHING = 1e30
"""Log of the softmax denominator given to rows that see no key: weights come out as 0."""
TILE = 512
MAX_UNROLL = 8
FUSED_BYTES = 24 * 2**20
"""What dq may take of vector memory in the fused backward pass."""
VECTOR_BYTES = 56 * 2**20
"""Limit of vector memory asked for: less than what every generation since v5e has."""
SCALAR_BYTES = 900 * 1024
"""What lists may take of the 1 MiB of scalar memory."""


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Static facts that the kernels and index maps share. `own` is the side whose blocks are the output's rows."""

    bq: int
    bk: int
    unroll: int
    capacity: int
    list_batches: int
    list_heads: int
    batch_from: int
    head_from: int
    grid_batch: int
    grid_heads: int
    kv_heads: int
    group: int
    repeat: int
    settings: Settings
    elem: Any
    own_vectors: tuple[str, ...]
    other_vectors: tuple[str, ...]
    scalars: tuple[str, ...]
    by_key: bool
    alibi: bool
    block_bias: bool
    limited: bool
    q_heads: int

    def entry(self, b, h, t):
        """Index of a step in the packed lists; b, h and t are the grid's."""
        batch = b if self.list_batches > 1 else 0
        head = lax.div(h, self.grid_heads // self.list_heads) if self.list_heads > 1 else 0
        at = t if self.repeat == 1 else lax.div(t, self.repeat)
        return (batch * self.list_heads + head) * self.capacity + at

    def word(self, steps, b, h, t, u=None):
        """The head word of a step, or the word of its u-th block."""
        return steps[self.entry(b, h, t) * (self.unroll + 1) + (0 if u is None else u + 1)]

    def row(self, b, h, t, steps):
        return self.word(steps, b, h, t) >> flat.ROW_SHIFT

    def block(self, b, h, t, steps, u):
        return self.word(steps, b, h, t, u) >> flat.BLOCK_SHIFT

    def out_rows(self, b, h, t, steps):
        """Where the rows `[rows, :]` of an output lie, which holds the call's share only."""
        return b, h, self.row(b, h, t, steps), 0

    def out_row(self, b, h, t, steps):
        return b, h, 0, self.row(b, h, t, steps)

    def batch(self, b):
        return b + self.batch_from

    def member(self, b, h, t, steps):
        """Which query head of its group a step of keys belongs to."""
        if self.repeat > 1:
            return lax.rem(t, self.repeat)
        return (self.word(steps, b, h, t) >> flat.MEMBER_SHIFT) & (flat.MAX_MEMBERS - 1)

    def q_head(self, b, h, t, steps):
        """The query head of a step."""
        h = h + self.head_from
        if not self.by_key or self.group == 1:
            return h
        return h * self.group + self.member(b, h, t, steps)

    def kv_head(self, h):
        h = h + self.head_from
        return h if self.by_key or self.group == 1 else lax.div(h, self.group)


def _dot(a, b, contract):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


_NT = ((1,), (1,))
_NN = ((1,), (0,))


def _widen(x, columns):
    """Lane-replicated [rows, 128] to [rows, columns]: registers are repeated, nothing moves across lanes."""
    return jnp.tile(x, (1, pl.cdiv(columns, LANES)))[:, :columns] if columns != LANES else x


def _stand(x):
    """A row vector [1, n] as a lane-replicated column [n, 128]."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def _scores(tile: _Tile, r, u: int, plain: bool):
    """Base-2 logits of the u-th block, `[bq, bk]` (`[bk, bq]` by key), and the tanh of the soft cap."""
    settings = tile.settings
    shape = (tile.bk, tile.bq) if tile.by_key else (tile.bq, tile.bk)
    q, k = (r[f"q{u}"], r["k"]) if tile.by_key else (r["q"], r[f"k{u}"])
    s = _dot(k[0, 0], q[0, 0], _NT) if tile.by_key else _dot(q[0, 0], k[0, 0], _NT)
    capped = None
    if settings.soft_cap is None:
        s = s * (settings.scale * LOG2E)
    else:
        capped = jnp.tanh(s * (settings.scale / settings.soft_cap))
        s = capped * (settings.soft_cap * LOG2E)

    def vector(name):
        if name in tile.own_vectors:
            return _widen(r["stood_" + name][...], shape[1])
        return jnp.broadcast_to(r[f"{name}{u}"][0], shape)

    if tile.alibi:
        distance = jnp.abs(vector("q_pos") - vector("kv_pos")).astype(jnp.float32)
        s = s - (r["alibi"][r["q_head"]] * LOG2E) * distance
    if tile.block_bias:
        s = s + r["block_bias"][r["entry"] * tile.unroll + u] * LOG2E
    if plain:
        return s, capped
    word = r["words"][u]
    if tile.elem is not None:
        payload = {name: vector(name) for name in tile.own_vectors + tile.other_vectors}
        for name in tile.scalars:
            at = {"h": r["q_head"], "b": r["batch"], "s": 0}[name[0]]
            payload[name] = jnp.full(shape, r[name][at])
        keep = tile.elem(payload.pop("q_pos"), payload.pop("kv_pos"), payload)
        s = lax.select((word & flat.RULED) != 0, jnp.where(keep, s, MASKED), s)
    if tile.limited:
        key = _first_key(tile, r, u) + lax.broadcasted_iota(jnp.int32, shape, 0 if tile.by_key else 1)
        s = jnp.where(key < r["limit"][r["batch"]], s, MASKED)
    if tile.unroll > 1:
        s = lax.select((word & flat.VALID) != 0, s, jnp.full_like(s, MASKED))
    return s, capped


def _first_key(tile, r, u):
    return (r["row"] if tile.by_key else r["words"][u] >> flat.BLOCK_SHIFT) * tile.bk


def _kept(tile: _Tile, r, u: int):
    """Dropout's mask of the u-th block, in the orientation of its logits."""
    shape = (tile.bk, tile.bq) if tile.by_key else (tile.bq, tile.bk)
    block = r["words"][u] >> flat.BLOCK_SHIFT
    q_block = block if tile.by_key else r["row"]
    query = q_block * tile.bq + lax.broadcasted_iota(jnp.int32, shape, 1 if tile.by_key else 0)
    key = _first_key(tile, r, u) + lax.broadcasted_iota(jnp.int32, shape, 0 if tile.by_key else 1)
    seed = (r["seed"][0].astype(jnp.uint32), r["seed"][1].astype(jnp.uint32))
    head = jnp.full(shape, r["batch"] * tile.q_heads + r["q_head"])
    return keep_mask(seed, tile.settings, head, query, key)


def _begin(tile: _Tile, r, steps):
    """Reads the words of this grid step into `r`; returns whether it is the first or last of a row, active, plain."""
    b, h, t = (pl.program_id(axis) for axis in range(3))
    head = tile.word(steps, b, h, t)
    r["batch"], r["entry"], r["row"] = tile.batch(b), tile.entry(b, h, t), head >> flat.ROW_SHIFT
    r["q_head"] = tile.q_head(b, h, t, steps)
    r["member"] = tile.member(b, h, t, steps) if tile.by_key and tile.group > 1 else 0
    r["words"] = [tile.word(steps, b, h, t, u) for u in range(tile.unroll)]
    first, last, active, plain = ((head & flag) != 0 for flag in (flat.FIRST, flat.LAST, flat.ACTIVE, flat.PLAIN))
    if tile.repeat > 1:
        # Members of a group take turns on every entry of a list they share.
        turn = lax.rem(t, tile.repeat)
        first, last = first & (turn == 0), last & (turn == tile.repeat - 1)
    if tile.elem is None and tile.unroll == 1:
        plain = active
    if tile.limited:
        for u in range(1 if tile.by_key else tile.unroll):
            plain &= _first_key(tile, r, u) + tile.bk <= r["limit"][r["batch"]]
    return first, last, active, plain


def _stand_vectors(tile: _Tile, r):
    for name in tile.own_vectors:
        r["stood_" + name][...] = _stand(r[name][0])


def _each_step(tile: _Tile, r, steps, start, body, finish):
    """The frame of every kernel: start of a row, a plain or a masked tile, end of a row."""
    first, last, active, plain = _begin(tile, r, steps)

    @pl.when(first)
    def _():
        _stand_vectors(tile, r)
        start()

    @pl.when(plain)
    def _():
        body(True)

    if tile.elem is not None or tile.unroll > 1 or tile.limited:

        @pl.when(active & ~plain)
        def _():
            body(False)

    @pl.when(last)
    def _():
        finish()


def _forward_kernel(tile: _Tile, names, *refs):
    r = dict(zip(names, refs, strict=True))
    acc, top, total = r["acc"], r["top"], r["total"]

    def start():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    def body(plain):
        s = [_scores(tile, r, u, plain)[0] for u in range(tile.unroll)]
        before = top[...]
        after = jnp.maximum(before, functools.reduce(jnp.maximum, s).max(axis=1, keepdims=True))
        p = [jnp.exp2(x - _widen(after, tile.bk)) for x in s]
        shrink = jnp.exp2(before - after)
        total[...] = shrink * total[...] + functools.reduce(jnp.add, p).sum(axis=1, keepdims=True)
        top[...] = after
        out = acc[...] * _widen(shrink, acc.shape[1])
        for u, weights in enumerate(p):
            if tile.settings.dropout:
                weights = jnp.where(_kept(tile, r, u), weights * (1 / (1 - tile.settings.dropout)), 0)
            v = r[f"v{u}"][0, 0]
            out = out + _dot(weights.astype(v.dtype), v, _NN)
        acc[...] = out

    def finish():
        # A row whose listed tiles are all masked has summed exp2(0) over masked elements: its top tells. The largest of
        # NaN need not be NaN, the sum is.
        some = (top[...] > MASKED / 2) | jnp.isnan(total[...])
        safe = jnp.where(some, total[...], 1.0)
        r["o"][0, 0] = (acc[...] * _widen(jnp.where(some, 1 / safe, 0.0), acc.shape[1])).astype(r["o"].dtype)
        lse = jnp.where(some, (top[...] + jnp.log2(safe)) * (1 / LOG2E), -jnp.inf)
        r["lse"][0, 0] = lse.T[:1]

    _each_step(tile, r, r["steps"], start, body, finish)


def _dq_kernel(tile: _Tile, names, *refs):
    r = dict(zip(names, refs, strict=True))
    acc = r["acc"]

    def start():
        acc[...] = jnp.zeros_like(acc)
        r["stood_lse"][...] = _stand(r["lse"][0, 0])
        r["stood_delta"][...] = _stand(r["delta"][0, 0])

    def body(plain):
        out = acc[...]
        for u in range(tile.unroll):
            s, capped = _scores(tile, r, u, plain)
            p = jnp.exp2(s - _widen(r["stood_lse"][...], tile.bk))
            dp = _dot(r["do"][0, 0], r[f"v{u}"][0, 0], _NT)
            if tile.settings.dropout:
                dp = jnp.where(_kept(tile, r, u), dp * (1 / (1 - tile.settings.dropout)), 0)
            ds = p * (dp - _widen(r["stood_delta"][...], tile.bk))
            if tile.block_bias:
                column = ds.sum(axis=0, keepdims=True)
                pieces = [column[:, i : i + LANES] for i in range(0, tile.bk, LANES)]
                r["dbias"][0, 0, 0, u : u + 1, :] = functools.reduce(jnp.add, pieces)
            if capped is not None:
                ds = ds * (1 - capped * capped)
            k = r[f"k{u}"][0, 0]
            out = out + _dot(ds.astype(k.dtype), k, _NN)
        acc[...] = out

    def finish():
        r["dq"][0, 0] = (acc[...] * tile.settings.scale).astype(r["dq"].dtype)

    _each_step(tile, r, r["steps"], start, body, finish)


def _dkv_kernel(tile: _Tile, names, *refs):
    r = dict(zip(names, refs, strict=True))
    dk, dv = r["dk_acc"], r["dv_acc"]
    fused = "dq" in r
    if fused:
        blocks = r["dq"].shape[2] // tile.bq

        @pl.when(pl.program_id(2) == 0)
        def _():
            @pl.loop(0, blocks)
            def _(i):
                for g in range(tile.group):
                    r["dq_acc"][g, pl.ds(i * tile.bq, tile.bq), :] = jnp.zeros((tile.bq, r["dq"].shape[3]), jnp.float32)

    def start():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def body(plain):
        dk_sum, dv_sum = dk[...], dv[...]
        for u in range(tile.unroll):
            s, capped = _scores(tile, r, u, plain)
            p = jnp.exp2(s - r[f"lse{u}"][0, 0])
            do = r[f"do{u}"][0, 0]
            dp = _dot(r["v"][0, 0], do, _NT)
            weights = p
            if tile.settings.dropout:
                kept, rise = _kept(tile, r, u), 1 / (1 - tile.settings.dropout)
                weights, dp = jnp.where(kept, p * rise, 0), jnp.where(kept, dp * rise, 0)
            dv_sum = dv_sum + _dot(weights.astype(do.dtype), do, _NN)
            ds = p * (dp - r[f"delta{u}"][0, 0])
            if capped is not None:
                ds = ds * (1 - capped * capped)
            q = r[f"q{u}"][0, 0]
            dk_sum = dk_sum + _dot(ds.astype(q.dtype), q, _NN)
            if fused:
                first = pl.multiple_of((r["words"][u] >> flat.BLOCK_SHIFT) * tile.bq, tile.bq)
                rows = (r["member"], pl.ds(first, tile.bq), slice(None))
                r["dq_acc"][rows] += _dot(ds.T.astype(q.dtype), r["k"][0, 0], _NN)
        dk[...], dv[...] = dk_sum, dv_sum

    def finish():
        r["dk"][0, 0] = (dk[...] * tile.settings.scale).astype(r["dk"].dtype)
        r["dv"][0, 0] = dv[...].astype(r["dv"].dtype)

    _each_step(tile, r, r["steps"], start, body, finish)
    if fused:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            @pl.loop(0, blocks)
            def _(i):
                rows = pl.ds(i * tile.bq, tile.bq)
                for g in range(tile.group):
                    r["dq"][0, g, rows, :] = (r["dq_acc"][g, rows, :] * tile.settings.scale).astype(r["dq"].dtype)


class _Call:
    """Collects the operands of one pallas_call, in the order in which its kernel gets their refs."""

    def __init__(self, tile: _Tile, lists: flat.FlatLists):
        self.tile, self.lists = tile, lists
        self.names, self.arrays, self.specs = ["steps"], [lists.steps], []
        self.outs, self.out_specs, self.scratch = [], [], []

    def add(self, name, array, shape, index):
        self.names.append(name)
        self.arrays.append(array)
        self.specs.append(pl.BlockSpec(shape, index))

    def add_scalars(self, name, array):
        self.names.append(name)
        self.arrays.append(array.reshape(-1))
        self.specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))

    def own(self, name, array, rows):
        """A block `[rows, :]` of an array [B, heads, S, D] on the output's side."""
        tile = self.tile
        on_queries = not tile.by_key and name in ("q", "do")

        def index(b, h, t, e):
            head = tile.q_head(b, h, t, e) if on_queries else tile.kv_head(h)
            return tile.batch(b), head, tile.row(b, h, t, e), 0

        self.add(name, array, (1, 1, rows, array.shape[3]), index)

    def other(self, name, array, rows):
        """The step's blocks `[rows, :]` of an array [B, heads, S, D] on the listed side."""
        tile = self.tile
        for u in range(tile.unroll):

            def index(b, h, t, e, u=u):
                head = tile.q_head(b, h, t, e) if tile.by_key else tile.kv_head(h)
                return tile.batch(b), head, tile.block(b, h, t, e, u), 0

            self.add(f"{name}{u}", array, (1, 1, rows, array.shape[3]), index)

    def row_statistic(self, name, array):
        """A statistic [B, H, 1, Sq] of query rows."""
        tile = self.tile
        if not tile.by_key:

            def own(b, h, t, e):
                return tile.batch(b), tile.q_head(b, h, t, e), 0, tile.row(b, h, t, e)

            self.add(name, array, (1, 1, 1, tile.bq), own)
            return
        for u in range(tile.unroll):

            def index(b, h, t, e, u=u):
                return tile.batch(b), tile.q_head(b, h, t, e), 0, tile.block(b, h, t, e, u)

            self.add(f"{name}{u}", array, (1, 1, 1, tile.bq), index)

    def vectors(self, values):
        """The positions and typed vectors [1 or B, S] that the rule reads."""
        tile = self.tile
        for name in tile.own_vectors + tile.other_vectors:
            array = values[name]
            batch = tile.batch if array.shape[0] > 1 else (lambda b: 0)
            size = tile.bq if name.startswith("q_") else tile.bk
            array = pad_axis(array, pl.cdiv(array.shape[1], size) * size, 1)[:, None]
            if name in tile.own_vectors:

                def index(b, h, t, e, batch=batch):
                    return batch(b), 0, tile.row(b, h, t, e)

                self.add(name, array, (1, 1, size), index)
                self.scratch.append(("stood_" + name, pltpu.VMEM((size, LANES), array.dtype)))
                continue
            for u in range(tile.unroll):

                def index(b, h, t, e, u=u, batch=batch):
                    return batch(b), 0, tile.block(b, h, t, e, u)

                self.add(f"{name}{u}", array, (1, 1, size), index)

    def out(self, name, shape, dtype, block, index):
        self.outs.append((name, compat.like_varying(shape, dtype, *self.arrays)))
        self.out_specs.append(pl.BlockSpec(block, index))

    def run(self, kernel, name, products, interpret):
        """Runs the kernel; `products` matrix products of a tile's size are what a step costs."""
        tile = self.tile
        names = tuple(self.names + [n for n, _ in self.outs] + [n for n, _ in self.scratch])
        matrices = [a for a in self.arrays[1:] if a.ndim == 4 and a.shape[2] > 1]  # statistics have one row of all
        width = max(a.shape[-1] for a in matrices)
        steps = tile.grid_batch * tile.grid_heads * tile.capacity * tile.unroll * tile.repeat
        blocks = zip(self.specs, self.arrays[1:], strict=True)
        moved = sum(math.prod(s.block_shape) * a.dtype.itemsize for s, a in blocks if s.block_shape is not None)
        cost = pl.CostEstimate(
            flops=2 * products * steps * tile.bq * tile.bk * width,
            transcendentals=steps * tile.bq * tile.bk,
            bytes_accessed=steps * moved // tile.unroll,
        )
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tile.grid_batch, tile.grid_heads, self.lists.count * tile.repeat),
            in_specs=self.specs,
            out_specs=self.out_specs,
            scratch_shapes=[s for _, s in self.scratch],
        )
        return pl.pallas_call(
            functools.partial(kernel, tile, names),
            grid_spec=grid,
            out_shape=[s for _, s in self.outs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VECTOR_BYTES
            ),
            cost_estimate=cost,
            interpret=interpret,
            name=name,
        )(*self.arrays)


def _unroll(bq: int, bk: int, most: int) -> int:
    """Blocks a step: as many as make it 512 x 512, but no more than a row can list."""
    wanted = min(MAX_UNROLL, max(1, TILE * TILE // (bq * bk)))
    return min(wanted, 1 << (max(1, most) - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class _Share:
    """The batches and key heads of one kernel call, as (first, past the last)."""

    batches: tuple[int, int]
    kv_heads: tuple[int, int]

    def of_lists(self, array, kv_heads: int):
        """The share of `[Bm, Hm, ...]` lists."""
        if array.shape[0] > 1:
            array = array[slice(*self.batches)]
        if array.shape[1] > 1:
            each = array.shape[1] // kv_heads
            array = array[:, self.kv_heads[0] * each : self.kv_heads[1] * each]
        return array


def _shares(batch: int, kv_heads: int, list_batches: int, list_heads: int, list_bytes: int) -> list[_Share]:
    """Cuts a call whose lists do not fit into scalar memory together, along key heads, then along the batch."""
    room = max(1, SCALAR_BYTES // list_bytes)
    heads, batches = kv_heads, batch
    if list_heads > 1:
        each = list_heads // kv_heads
        heads = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n == 1 or n * each <= room))
        room //= min(room, heads * each)
    if list_batches > 1:
        batches = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n <= room))
    return [
        _Share((b, b + batches), (h, h + heads)) for b in range(0, batch, batches) for h in range(0, kv_heads, heads)
    ]


def _list_bytes(lists: BlockLists, group: int, by_key: bool) -> int:
    """Scalar memory that one list of a query head can take, and a block bias with it."""
    tiles = lists.nq * lists.width
    if by_key:
        unroll = _unroll(lists.bq, lists.bk, lists.nq)
        members = group if lists.idx.shape[1] > 1 else 1
        capacity = members * (lists.nk + (lists.t_idx.shape[-1] if lists.t_idx is not None else tiles) // unroll)
    else:
        unroll = _unroll(lists.bq, lists.bk, lists.width)
        capacity = lists.nq * pl.cdiv(lists.width, unroll)
    return capacity * (2 * unroll + 1) * 4


def _query_lists(lists: BlockLists, share: _Share, kv_heads: int, block_bias):
    """Packed lists of the key blocks of every query block, and the block bias in their order."""
    idx, n_part, n_tot = (share.of_lists(a, kv_heads) for a in (lists.idx, lists.n_part, lists.n_tot))
    bm, hm, nq, width = idx.shape
    unroll = _unroll(lists.bq, lists.bk, width)
    ptr = jnp.broadcast_to(jnp.arange(nq, dtype=jnp.int32) * width, (bm, hm, nq))
    most = nq * pl.cdiv(width, unroll)
    packed = flat.flatten(idx.reshape(bm, hm, nq * width), ptr, n_part, n_tot, most=most, unroll=unroll)
    bias = None if block_bias is None else share.of_lists(block_bias, kv_heads).reshape(bm, hm, -1)
    return packed, bias


def _key_lists(lists: BlockLists, share: _Share, kv_heads: int, group: int, block_bias):
    """Packed lists of the query blocks of every key block, and the block bias in their order."""
    parts = [share.of_lists(a, kv_heads) for a in (lists.t_idx, lists.t_ptr, lists.t_part, lists.t_tot)]
    bm, hm, nk = parts[1].shape
    heads = share.kv_heads[1] - share.kv_heads[0]
    members = group if hm == heads * group and group > 1 else 1
    if members > 1:
        parts = flat.join_group(*parts, group, heads)
    unroll = _unroll(lists.bq, lists.bk, lists.nq)
    most = members * (nk + lists.t_idx.shape[-1] // unroll)
    packed = flat.flatten(*parts, most=most, unroll=unroll, group=members)
    if block_bias is None:
        return packed, None
    slots = share.of_lists(lists.t_idx * lists.width + lists.t_slot, kv_heads)
    bias = jnp.take_along_axis(share.of_lists(block_bias, kv_heads).reshape(bm, hm, -1), slots, axis=-1)
    return packed, bias.reshape(parts[0].shape)


def _tile(
    lists: BlockLists, packed: flat.FlatLists, extras: Extras, settings: Settings, q, k, share: _Share, by_key: bool
) -> _Tile:
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    names: list[str] = []
    if lists.elem is not None:
        names = sorted({*lists.payload, "q_pos", "kv_pos"})
    elif extras.alibi is not None:
        names = ["q_pos", "kv_pos"]
    q_side, kv_side = (tuple(n for n in names if n.startswith(side)) for side in ("q_", "kv_"))
    each = 1 if by_key else group
    return _Tile(
        bq=lists.bq,
        bk=lists.bk,
        unroll=packed.unroll,
        capacity=packed.capacity,
        list_batches=packed.batches,
        list_heads=packed.heads,
        batch_from=share.batches[0],
        head_from=share.kv_heads[0] * each,
        grid_batch=share.batches[1] - share.batches[0],
        grid_heads=(share.kv_heads[1] - share.kv_heads[0]) * each,
        kv_heads=kv_heads,
        group=group,
        repeat=group if by_key and lists.idx.shape[1] != heads else 1,
        settings=settings,
        elem=lists.elem,
        own_vectors=kv_side if by_key else q_side,
        other_vectors=q_side if by_key else kv_side,
        scalars=tuple(n for n in names if n.startswith(("head_", "batch_", "scalar_"))),
        by_key=by_key,
        alibi=extras.alibi is not None,
        block_bias=extras.block_bias is not None,
        # Key rows past the end of the sequence are cut off dk and dv; those past a length must be 0.
        limited=extras.kv_lengths is not None or (lists.kv_len % lists.bk != 0 and not by_key),
        q_heads=heads,
    )


def _call(lists: BlockLists, extras: Extras, settings: Settings, q, k, share: _Share, by_key: bool) -> _Call:
    """A call with the operands that are not matrices."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    if by_key:
        packed, slot_bias = _key_lists(lists, share, kv_heads, group, extras.block_bias)
    else:
        packed, slot_bias = _query_lists(lists, share, kv_heads, extras.block_bias)
    tile = _tile(lists, packed, extras, settings, q, k, share, by_key)
    call = _Call(tile, packed)
    q_pos, kv_pos = positions(lists)
    values = {**lists.payload, "q_pos": q_pos, "kv_pos": kv_pos}
    call.vectors({name: jnp.asarray(a) for name, a in values.items()})
    for name in tile.scalars:
        call.add_scalars(name, jnp.asarray(values[name]))
    if tile.alibi:
        call.add_scalars("alibi", extras.alibi.astype(jnp.float32))
    if tile.block_bias:
        call.add_scalars("block_bias", flat.gather_values(slot_bias.astype(jnp.float32), packed))
    if tile.limited:
        limit = jnp.full((q.shape[0],), lists.kv_len, jnp.int32)
        if extras.kv_lengths is not None:
            limit = jnp.minimum(limit, extras.kv_lengths.astype(jnp.int32))
        call.add_scalars("limit", limit)
    if settings.dropout:
        call.add_scalars("seed", extras.seed.astype(jnp.int32))
    return call


def _heads_first(x, size: int):
    """[B, S, H, D] to [B, H, S', D] with S' a multiple of `size`."""
    return pad_axis(x, pl.cdiv(x.shape[1], size) * size, 1).swapaxes(1, 2)


def _in_shares(run, lists: BlockLists, q, k, by_key: bool):
    """Runs `run(share)` for every share and puts the results `[B, heads, ...]` together."""
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    list_bytes = _list_bytes(lists, heads // kv_heads, by_key)
    shares = _shares(batch, kv_heads, *lists.idx.shape[:2], list_bytes)
    done = [(share, run(share)) for share in shares]
    if len(done) == 1:
        return done[0][1]
    rows: dict[tuple[int, int], list[Any]] = {}
    for share, outs in done:
        rows.setdefault(share.batches, []).append(outs)
    whole = [[jnp.concatenate(parts, axis=1) for parts in zip(*outs, strict=True)] for outs in rows.values()]
    return [jnp.concatenate(parts, axis=0) for parts in zip(*whole, strict=True)]


def forward(
    q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings, *, interpret: Any = False
) -> tuple[Array, Array]:
    """Output [B, Sq, H, Dv] in the dtype of q and lse float32 [B, H, Sq]; see `block_sparse_attention`.

    Args:
        q, k, v, lists, extras, settings: as `supports` accepts them.
        interpret: what `pallas_call` takes: True or `pltpu.InterpretParams(...)` run on any machine.
    """
    k, v = (known_keys(x, extras.kv_lengths) for x in (k, v))
    qh, kh, vh = _heads_first(q, lists.bq), _heads_first(k, lists.bk), _heads_first(v, lists.bk)
    rows, dv = qh.shape[2], v.shape[3]

    def run(share):
        call = _call(lists, extras, settings, qh, kh, share, by_key=False)
        tile = call.tile
        call.own("q", qh, lists.bq)
        call.other("k", kh, lists.bk)
        call.other("v", vh, lists.bk)
        lead = (tile.grid_batch, tile.grid_heads)
        call.out("o", (*lead, rows, dv), q.dtype, (1, 1, lists.bq, dv), tile.out_rows)
        call.out("lse", (*lead, 1, rows), jnp.float32, (1, 1, 1, lists.bq), tile.out_row)
        call.scratch += [
            ("acc", pltpu.VMEM((lists.bq, dv), jnp.float32)),
            ("top", pltpu.VMEM((lists.bq, LANES), jnp.float32)),
            ("total", pltpu.VMEM((lists.bq, LANES), jnp.float32)),
        ]
        return call.run(_forward_kernel, "block_sparse_attention_forward", 2, interpret)

    o, lse = _in_shares(run, lists, qh, kh, by_key=False)
    return o.swapaxes(1, 2)[:, : q.shape[1]], lse[:, :, 0, : q.shape[1]]


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
    *,
    interpret: Any = False,
    fused: bool = False,
) -> tuple[Array, Array, Array, Extras]:
    """Gradients of q, k, v and of `extras.block_bias`; those of other extras are left None.

    Two kernels: dq over the lists of query blocks, dk and dv over those of key blocks. With `fused`, one kernel over
    the lists of key blocks computes all three, which saves two of seven matrix products and needs room in vector
    memory for dq of a key head's group. Nothing is added atomically, so results do not vary from run to run.
    """
    lists = lists.transposed()
    bq, bk = lists.bq, lists.bk
    k, v = (known_keys(x, extras.kv_lengths) for x in (k, v))
    qh, kh, vh = _heads_first(q, bq), _heads_first(k, bk), _heads_first(v, bk)
    doh = _heads_first(do.astype(q.dtype), bq)
    delta = jnp.einsum("bqhd,bqhd->bhq", o.astype(jnp.float32), do.astype(jnp.float32)) - dlse
    base2 = jnp.where(lse != -jnp.inf, lse * LOG2E, NOTHING)
    # Rows past the end have do = delta = 0, and every finite lse makes their gradients vanish.
    base2, delta = (pad_axis(x, qh.shape[2], 2)[:, :, None].astype(jnp.float32) for x in (base2, delta))
    common = (qh, kh, vh, doh, base2, delta, lists, extras, settings, interpret)
    dbias: list[Array] = []
    if fused and not _fuses(qh, kh, extras):
        raise ValueError("dq does not fit into vector memory, or there is a block bias: use fused=False")
    if fused:
        dk, dv, dq = _in_shares(functools.partial(_grad_keys, *common, True), lists, qh, kh, by_key=True)
    else:
        dq, *dbias = _in_shares(functools.partial(_grad_queries, *common), lists, qh, kh, by_key=False)
        dk, dv = _in_shares(functools.partial(_grad_keys, *common, False), lists, qh, kh, by_key=True)
    dq, dk, dv = (x.swapaxes(1, 2)[:, :n] for x, n in ((dq, lists.q_len), (dk, lists.kv_len), (dv, lists.kv_len)))
    if not dbias:
        return dq, dk, dv, Extras()
    # [B, H, nq, W] to the lists' own leading axes.
    bm, hm, nq, width = lists.idx.shape
    per_slot = dbias[0].reshape(q.shape[0], hm, -1, nq, width).sum(2)
    per_slot = per_slot.sum(0, keepdims=True) if bm == 1 else per_slot
    return dq, dk, dv, Extras(block_bias=per_slot.astype(extras.block_bias.dtype))


def _fuses(q, k, extras: Extras) -> bool:
    """Whether dq of a key head's group stays in vector memory, as float32 and twice in the dtype of q."""
    rows = q.shape[1] // k.shape[1] * q.shape[2] * max(q.shape[3], LANES)
    return extras.block_bias is None and rows * (4 + 2 * q.dtype.itemsize) <= FUSED_BYTES


def _grad_queries(q, k, v, do, lse, delta, lists, extras, settings, interpret, share):
    call = _call(lists, extras, settings, q, k, share, by_key=False)
    tile, packed = call.tile, call.lists
    call.own("q", q, lists.bq)
    call.own("do", do, lists.bq)
    call.other("k", k, lists.bk)
    call.other("v", v, lists.bk)
    call.row_statistic("lse", lse)
    call.row_statistic("delta", delta)
    lead, dim = (tile.grid_batch, tile.grid_heads), q.shape[3]
    call.out("dq", (*lead, q.shape[2], dim), q.dtype, (1, 1, lists.bq, dim), tile.out_rows)
    if tile.block_bias:
        # Sums over the rows of each tile; the lanes are added up outside.
        shape = (*lead, packed.capacity, MAX_UNROLL, LANES)
        call.out("dbias", shape, jnp.float32, (1, 1, 1, MAX_UNROLL, LANES), lambda b, h, t, e: (b, h, t, 0, 0))
    call.scratch += [
        ("acc", pltpu.VMEM((lists.bq, dim), jnp.float32)),
        ("stood_lse", pltpu.VMEM((lists.bq, LANES), jnp.float32)),
        ("stood_delta", pltpu.VMEM((lists.bq, LANES), jnp.float32)),
    ]
    dq, *rest = call.run(_dq_kernel, "block_sparse_attention_dq", 3, interpret)
    if not tile.block_bias:
        return [dq]
    per_tile = rest[0][:, :, :, : packed.unroll].sum(-1)
    return [dq, flat.scatter_values(per_tile, packed, share.of_lists(lists.n_tot, k.shape[1]), lists.width)]


def _grad_keys(q, k, v, do, lse, delta, lists, extras, settings, interpret, fused, share):
    call = _call(lists, extras, settings, q, k, share, by_key=True)
    tile = call.tile
    call.own("k", k, lists.bk)
    call.own("v", v, lists.bk)
    call.other("q", q, lists.bq)
    call.other("do", do, lists.bq)
    call.row_statistic("lse", lse)
    call.row_statistic("delta", delta)
    for name, like in (("dk", k), ("dv", v)):
        shape = (tile.grid_batch, tile.grid_heads, *like.shape[2:])
        call.out(name, shape, like.dtype, (1, 1, lists.bk, like.shape[3]), tile.out_rows)
    call.scratch += [(f"{n}_acc", pltpu.VMEM((lists.bk, x.shape[3]), jnp.float32)) for n, x in (("dk", k), ("dv", v))]
    if not fused:
        return call.run(_dkv_kernel, "block_sparse_attention_dkv", 4, interpret)
    block = (tile.group, *q.shape[2:])
    shape = (tile.grid_batch, tile.grid_heads * tile.group, *q.shape[2:])
    call.out("dq", shape, q.dtype, (1, *block), lambda b, h, t, e: (b, h, 0, 0))
    call.scratch.append(("dq_acc", pltpu.VMEM(block, jnp.float32)))
    return call.run(_dkv_kernel, "block_sparse_attention_fused", 5, interpret)


def supports(q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings) -> str | None:
    """None, or why this path refuses the call."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {q.dtype}; the TPU kernels take float32 and bfloat16"
    if lists.bq % LANES or lists.bk % LANES:
        return f"blocks of {lists.bq} x {lists.bk}; on TPU both sides are multiples of {LANES}, best 512"
    if extras.bias is not None:
        return "an element bias would be as large as the score matrix; use block_bias, or implementation='xla'"
    if settings.page_size is not None:
        return "keys and values in pages; implementation='xla' takes a page_table"
    if lists.elem is None and "bits" in lists.payload:
        return "a mask given as bits; give an element rule, or implementation='xla'"
    if "bits" in lists.payload:
        return "a rule that reads bits; implementation='xla' takes it"
    for name, value in lists.payload.items():
        if value.dtype not in (jnp.int32, jnp.float32):
            return f"payload {name!r} of dtype {value.dtype}; int32 and float32 fit the kernels"
    group = q.shape[2] // k.shape[2]
    if group > flat.MAX_MEMBERS:
        return f"{group} query heads a key head; at most {flat.MAX_MEMBERS}"
    if max(lists.nq, lists.nk) > flat.MAX_ROWS:
        return f"{max(lists.nq, lists.nk)} blocks; at most {flat.MAX_ROWS} on a side: use larger blocks"
    needed = max(_list_bytes(lists, group, by_key) for by_key in (False, True))
    if needed > SCALAR_BYTES:
        return (
            f"one list can take {needed // 1024} KiB of scalar memory, which holds {SCALAR_BYTES // 1024}: use larger "
            "blocks or list fewer"
        )
    return None
