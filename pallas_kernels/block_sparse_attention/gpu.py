"""Block-sparse attention on Hopper GPUs: Mosaic kernels with one warpgroup that fetches and two that multiply.

A program owns 128 rows of the output's side, 64 for each multiplying warpgroup. The fetching warpgroup reads the block
list from global memory and brings the listed blocks through TMA into a ring of slots in shared memory; the others
multiply with `wgmma`, run softmax in registers, and hand slots back. Loops run over listed blocks only: first those
that the element rule has to look at, then the full ones, in code without masks.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention.lists import BlockLists
from pallas_kernels.block_sparse_attention.options import Extras, Settings
from pallas_kernels.block_sparse_attention.rules import known_keys, pad_axis, positions
from pallas_kernels.compat import gpu_load

Array = Any

ROWS = 64
"""Rows of one wgmma tile."""
WORKERS = 2
LOG2E = math.log2(math.e)
MASKED = -1e30
NOTHING = 1e30
SHARED_BYTES = 128 * 1024
"""Shared memory for the ring."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one kernel; `own` is the side whose blocks are the output's rows."""

    own_block: int
    block: int
    chunk: int
    stages: int
    settings: Settings
    elem: Any
    names: tuple[str, ...]
    alibi: bool
    block_bias: bool
    limited: bool
    by_key: bool
    group: int
    list_batches: int
    list_heads: int
    heads: int
    interpret: Any

    @property
    def pieces(self) -> int:
        """Steps that a listed block takes."""
        return self.block // self.chunk

    @property
    def shape(self) -> tuple[int, int]:
        """A step's tile of logits."""
        return ROWS, self.chunk

    def list_at(self, b, q_head):
        """Leading indices of the list that a query head follows."""
        batch = b if self.list_batches > 1 else 0
        head = lax.div(q_head, jnp.int32(self.heads // self.list_heads)) if self.list_heads > 1 else 0
        return batch, head


def _tiled(shape, dtype):
    """Shared memory in the layout that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _rows(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def _columns(x, shape):
    return lax.broadcast_in_dim(x, shape, [1])


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _full_rows(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _product(shape, a, b_transposed):
    """a b^T of two tiles in shared memory."""

    def run(acc):
        plgpu.wgmma(acc, a, b_transposed.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _add_product(plan: _Plan, acc, a, b):
    """acc + a b, with `a` in registers and `b` in shared memory."""
    if plan.interpret is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))
    # The interpreter has no rule for accumulators in place. What it reads here the ordinary way must be fenced before
    # the slot is fetched into again.
    out = acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return out


def _logits(plan: _Plan, r, s, b, q_head, own_start, start, at, masked):
    """Base-2 logits of a step and the tanh of the soft cap, from the raw products.

    Args:
        plan, r: static facts and references.
        s: products `[64, chunk]`, query rows (key rows if `by_key`).
        b, q_head: indices.
        own_start, start: first token of the rows and of the columns.
        at: index of the listed block in the per-block values.
        masked: whether to evaluate the element rule.
    """
    settings, shape = plan.settings, plan.shape
    capped = None
    if settings.soft_cap is None:
        s = s * (settings.scale * LOG2E)
    else:
        # tanh by exp2: the hardware's own is good to 11 bits only.
        capped = 1 - 2 / (jnp.exp2(s * (2 * LOG2E * settings.scale / settings.soft_cap)) + 1)
        s = capped * (settings.soft_cap * LOG2E)

    def vector(name):
        ref = r[name]
        batch = b if ref.shape[0] > 1 else 0
        if name.startswith("kv_") == plan.by_key:
            part = ref.at[batch, pl.ds(own_start, ROWS)]
            return _rows(gpu_load(part, plgpu.Layout.WGMMA.reduce(1)), shape)
        part = ref.at[batch, pl.ds(start, plan.chunk)]
        return _columns(gpu_load(part, plgpu.Layout.WGMMA.reduce(0)), shape)

    if plan.alibi:
        distance = jnp.abs(vector("q_pos") - vector("kv_pos")).astype(jnp.float32)
        s = s - distance * (r["alibi"][q_head] * LOG2E)
    if plan.block_bias:
        s = s + r["block_bias"][at] * LOG2E
    keep = None
    if masked and plan.elem is not None:
        payload = {}
        for name in plan.names:
            if name.startswith(("q_", "kv_")):
                payload[name] = vector(name)
            else:
                index = {"h": q_head, "b": b, "s": 0}[name[0]]
                payload[name] = plgpu.layout_cast(jnp.full(shape, r[name][index]), plgpu.Layout.WGMMA)
        keep = plan.elem(payload.pop("q_pos"), payload.pop("kv_pos"), payload)
    if plan.limited:
        axis, first = (0, own_start) if plan.by_key else (1, start)
        inside = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) < r["limit"][b] - first
        keep = inside if keep is None else keep & inside
    return s if keep is None else jnp.where(keep, s, MASKED), capped


def _consume(plan: _Plan, part, total, base, step, carry):
    """Runs `step(j, ring slot, masked, carry)` over the ruled, then the full pieces of one list.

    Args:
        plan: static facts.
        part, total: listed blocks to be ruled, and in all.
        base: pieces that passed through the ring before.
        step: the work of one piece.
        carry: what steps hand on.
    """
    split, end = part * plan.pieces, total * plan.pieces

    def piece(masked, j, carry):
        return step(j, lax.rem(base + j, jnp.int32(plan.stages)), masked, carry)

    if plan.elem is None:
        return lax.fori_loop(jnp.int32(0), end, functools.partial(piece, False), carry)
    carry = lax.fori_loop(jnp.int32(0), split, functools.partial(piece, True), carry)
    return lax.fori_loop(split, end, functools.partial(piece, False), carry)


def _token(plan: _Plan, r, first, j):
    """First token of a list's j-th piece, and where its block stands among all lists."""
    at = first + lax.div(j, jnp.int32(plan.pieces))
    return r["idx"][at] * plan.block + lax.rem(j, jnp.int32(plan.pieces)) * plan.chunk, at


def _produce(plan: _Plan, ring, sources):
    """Fetches pieces into slots: `ring` has (slots, full barriers, consumed barriers) of all that moves together."""

    def fetch(count, source):
        slot = lax.rem(count, jnp.int32(plan.stages))
        for (slots, full, consumed), name in zip(ring, sources, strict=True):
            if consumed is not None:

                @pl.when(count >= plan.stages)
                def _(consumed=consumed):
                    plgpu.barrier_wait(consumed.at[slot])

            plgpu.copy_gmem_to_smem(source(name), slots.at[slot], full.at[slot])

    return fetch


def _forward_body(plan: _Plan, names, dtype, *refs):
    *refs, scoped = refs
    r = dict(zip(names, refs, strict=True))
    (q_s, k_s, v_s, lse_s), (q_full, k_full, v_full), (k_free, v_free) = scoped
    h, i, b, worker = (lax.axis_index(a) for a in ("head", "row", "batch", "worker"))
    where = plan.list_at(b, h)
    row = lax.div(i, jnp.int32(plan.own_block // (ROWS * WORKERS)))
    first, part, total = (r[n][(*where, row)] for n in ("ptr", "n_part", "n_tot"))

    @pl.when(worker < WORKERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own_start = i * (ROWS * WORKERS) + worker * ROWS
        tokens = (b, pl.ds(own_start, ROWS), h)
        q = q_s.at[worker]
        plgpu.copy_gmem_to_smem(r["q"].at[tokens], q, q_full.at[worker])
        plgpu.barrier_wait(q_full.at[worker])

        def step(j, slot, masked, carry):
            acc, top, total = carry
            start, at = _token(plan, r, first, j)
            plgpu.barrier_wait(k_full.at[slot])
            s = _product(plan.shape, q, k_s.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            s, _ = _logits(plan, r, s, b, h, own_start, start, at, masked)
            after = jnp.maximum(top, s.max(axis=1))
            shrink = jnp.exp2(top - after)
            p = jnp.exp2(s - _rows(after, s.shape))
            acc = acc * _rows(shrink, acc.shape)
            total = total * shrink + p.sum(axis=1)
            weights = p.astype(dtype)
            plgpu.barrier_wait(v_full.at[slot])
            acc = _add_product(plan, acc, weights, v_s.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, after, total

        carry = _zeros(q.shape), _full_rows(MASKED), _full_rows(0)
        acc, top, total_ = _consume(plan, part, total, jnp.int32(0), step, carry)
        some = (top > MASKED / 2) | (total_ != total_)  # the largest of NaN need not be NaN, the sum is
        safe = jnp.where(some, total_, 1.0)
        o = acc * _rows(jnp.where(some, 1 / safe, 0.0), acc.shape)
        q[...] = o.astype(dtype)
        lse_s.at[worker][...] = jnp.where(some, (top + jnp.log2(safe)) * (1 / LOG2E), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, r["o"].at[tokens])
        plgpu.copy_smem_to_gmem(lse_s.at[worker], r["lse"].at[b, h, pl.ds(own_start, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(worker == WORKERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(h, jnp.int32(plan.group))
        fetch = _produce(plan, ((k_s, k_full, k_free), (v_s, v_full, v_free)), ("k", "v"))

        @pl.loop(0, total * plan.pieces)
        def _(j):
            start, _ = _token(plan, r, first, j)
            fetch(j, lambda name: r[name].at[b, pl.ds(start, plan.chunk), kv_head])


def _dq_body(plan: _Plan, names, dtype, *refs):
    *refs, scoped = refs
    r = dict(zip(names, refs, strict=True))
    (q_s, do_s, k_s, v_s), (own_full, k_full, v_full), (k_free, v_free) = scoped
    h, i, b, worker = (lax.axis_index(a) for a in ("head", "row", "batch", "worker"))
    where = plan.list_at(b, h)
    row = lax.div(i, jnp.int32(plan.own_block // (ROWS * WORKERS)))
    first, part, total = (r[n][(*where, row)] for n in ("ptr", "n_part", "n_tot"))

    @pl.when(worker < WORKERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own_start = i * (ROWS * WORKERS) + worker * ROWS
        tokens = (b, pl.ds(own_start, ROWS), h)
        q, do = q_s.at[worker], do_s.at[worker]
        plgpu.copy_gmem_to_smem(r["q"].at[tokens], q, own_full.at[worker])
        plgpu.copy_gmem_to_smem(r["do"].at[tokens], do, own_full.at[worker])
        lse, delta = (
            gpu_load(r[n].at[b, h, pl.ds(own_start, ROWS)], plgpu.Layout.WGMMA.reduce(1)) for n in ("lse", "delta")
        )
        plgpu.barrier_wait(own_full.at[worker])

        def step(j, slot, masked, acc):
            start, at = _token(plan, r, first, j)
            plgpu.barrier_wait(k_full.at[slot])
            s = _product(plan.shape, q, k_s.at[slot])
            s, capped = _logits(plan, r, s, b, h, own_start, start, at, masked)
            p = jnp.exp2(s - _rows(lse, s.shape))
            plgpu.barrier_wait(v_full.at[slot])
            dp = _product(plan.shape, do, v_s.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            ds = p * (dp - _rows(delta, s.shape))
            if capped is not None:
                ds = ds * (1 - capped * capped)
            acc = _add_product(plan, acc, ds.astype(dtype), k_s.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            return acc

        acc = _consume(plan, part, total, jnp.int32(0), step, _zeros(q.shape))
        q[...] = (acc * plan.settings.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, r["dq"].at[tokens])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(worker == WORKERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(h, jnp.int32(plan.group))
        fetch = _produce(plan, ((k_s, k_full, k_free), (v_s, v_full, v_free)), ("k", "v"))

        @pl.loop(0, total * plan.pieces)
        def _(j):
            start, _ = _token(plan, r, first, j)
            fetch(j, lambda name: r[name].at[b, pl.ds(start, plan.chunk), kv_head])


def _dkv_body(plan: _Plan, names, dtype, *refs):
    # Two accumulators a warpgroup leave no registers for a third one that fetches: the first worker fetches ahead.
    *refs, scoped = refs
    r = dict(zip(names, refs, strict=True))
    (k_s, v_s, q_s, do_s, lse_s, delta_s), (own_full, q_full, do_full), (q_free, do_free) = scoped
    kv_head, i, b, worker = (lax.axis_index(a) for a in ("head", "row", "batch", "worker"))
    row = lax.div(i, jnp.int32(plan.own_block // (ROWS * WORKERS)))

    def member(g):
        """The query head, and where its list starts and ends."""
        h = kv_head * plan.group + g
        where = plan.list_at(b, h)
        return h, *(r[n][(*where, row)] for n in ("ptr", "n_part", "n_tot"))

    own_start = i * (ROWS * WORKERS) + worker * ROWS
    tokens = (b, pl.ds(own_start, ROWS), kv_head)
    k, v = k_s.at[worker], v_s.at[worker]
    plgpu.copy_gmem_to_smem(r["k"].at[tokens], k, own_full.at[worker])
    plgpu.copy_gmem_to_smem(r["v"].at[tokens], v, own_full.at[worker])
    plgpu.barrier_wait(own_full.at[worker])

    def of_member(g, carry):
        h, first, part, total = member(g)
        base, dk, dv = carry
        pieces = total * plan.pieces

        def source(name, start):
            if name in ("lse", "delta"):
                return r[name].at[b, h, pl.ds(start, plan.chunk)]
            return r[name].at[b, pl.ds(start, plan.chunk), h]

        ring = ((q_s, q_full, q_free), (lse_s, q_full, None), (do_s, do_full, do_free), (delta_s, do_full, None))
        into_slot = _produce(plan, ring, ("q", "lse", "do", "delta"))

        def fetch(j):
            @pl.when((worker == 0) & (j < pieces))
            def _():
                start, _ = _token(plan, r, first, j)
                into_slot(base + j, lambda name: source(name, start))

        for j in range(plan.stages - 1):
            fetch(jnp.int32(j))

        def step(j, slot, masked, carry):
            dk, dv = carry
            fetch(j + plan.stages - 1)
            start, at = _token(plan, r, first, j)
            plgpu.barrier_wait(q_full.at[slot])
            s = _product(plan.shape, k, q_s.at[slot])
            s, capped = _logits(plan, r, s, b, h, own_start, start, at, masked)
            lse = gpu_load(lse_s.at[slot], plgpu.Layout.WGMMA.reduce(0))
            p = jnp.exp2(s - _columns(lse, s.shape))
            plgpu.barrier_wait(do_full.at[slot])
            dv = _add_product(plan, dv, p.astype(dtype), do_s.at[slot])
            dp = _product(plan.shape, v, do_s.at[slot])
            delta = gpu_load(delta_s.at[slot], plgpu.Layout.WGMMA.reduce(0))
            plgpu.barrier_arrive(do_free.at[slot])
            ds = p * (dp - _columns(delta, s.shape))
            if capped is not None:
                ds = ds * (1 - capped * capped)
            dk = _add_product(plan, dk, ds.astype(dtype), q_s.at[slot])
            plgpu.barrier_arrive(q_free.at[slot])
            return dk, dv

        dk, dv = _consume(plan, part, total, base, step, (dk, dv))
        return base + pieces, dk, dv

    carry = (jnp.int32(0), _zeros(k.shape), _zeros(k.shape))
    _, dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(plan.group), of_member, carry)
    k[...] = (dk * plan.settings.scale).astype(dtype)
    v[...] = dv.astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k, r["dk"].at[tokens])
    plgpu.copy_smem_to_gmem(v, r["dv"].at[tokens])
    plgpu.wait_smem_to_gmem(0)


def _stages(slot: int) -> int:
    """As many slots, each for two 16-bit tiles of `slot` elements, as fit: at least two, at most four."""
    return max(2, min(4, SHARED_BYTES // (4 * slot)))


def _plan(lists: BlockLists, extras: Extras, settings: Settings, q, k, chunk, by_key, interpret):
    heads, kv_heads = q.shape[2], k.shape[2]
    names: tuple[str, ...] = ()
    if lists.elem is not None:
        names = tuple(sorted({*lists.payload, "q_pos", "kv_pos"}))
    elif extras.alibi is not None:
        names = ("q_pos", "kv_pos")
    return _Plan(
        own_block=lists.bk if by_key else lists.bq,
        block=lists.bq if by_key else lists.bk,
        chunk=chunk,
        stages=_stages(chunk * q.shape[3]),
        settings=settings,
        elem=lists.elem,
        names=names,
        alibi=extras.alibi is not None,
        block_bias=extras.block_bias is not None,
        # Key rows past the end of the sequence are cut off dk and dv; those past a length must be 0.
        limited=extras.kv_lengths is not None or (lists.kv_len % lists.bk != 0 and not by_key),
        by_key=by_key,
        group=heads // kv_heads,
        list_batches=lists.idx.shape[0],
        list_heads=lists.idx.shape[1],
        heads=heads,
        interpret=interpret,
    )


def _operands(plan: _Plan, lists: BlockLists, extras: Extras, batch: int, per_block):
    """Operands besides matrices, by name: lists, payload, slopes, biases, lengths."""
    bm, hm = lists.idx.shape[:2]
    if plan.by_key:
        found = {"idx": lists.t_idx, "ptr": lists.t_ptr, "n_part": lists.t_part, "n_tot": lists.t_tot}
    else:
        size, width = lists.idx.shape[2:]
        ptr = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32) * width, (bm, hm, size))
        idx = lists.idx.reshape(bm, hm, size * width)
        found = {"idx": idx, "ptr": ptr, "n_part": lists.n_part, "n_tot": lists.n_tot}
    # One flat array of all lists, so that a loop over one of them holds a single index in registers.
    each = found["idx"].shape[-1]
    found["ptr"] = found["ptr"] + jnp.arange(bm * hm, dtype=jnp.int32).reshape(bm, hm, 1) * each
    found["idx"] = found["idx"].reshape(-1)
    q_pos, kv_pos = positions(lists)
    values = {**lists.payload, "q_pos": q_pos, "kv_pos": kv_pos}
    for name in plan.names:
        value = jnp.asarray(values[name])
        if name.startswith(("q_", "kv_")):
            block = lists.bq if name.startswith("q_") else lists.bk
            found[name] = pad_axis(value, pl.cdiv(value.shape[1], block) * block, 1)
        else:
            found[name] = value.reshape(-1)
    if plan.alibi:
        found["alibi"] = extras.alibi.astype(jnp.float32)
    if plan.block_bias:
        found["block_bias"] = per_block.astype(jnp.float32).reshape(-1)
    if plan.limited:
        limit = jnp.full((batch,), lists.kv_len, jnp.int32)
        if extras.kv_lengths is not None:
            limit = jnp.minimum(limit, extras.kv_lengths.astype(jnp.int32))
        found["limit"] = limit
    return found


def _launch(body, plan: _Plan, name, dtype, operands, outs, rows, heads, batch, threads, scoped_types):
    names = (*operands, *outs)

    def kernel(*refs):
        pl.run_scoped(lambda *scoped: body(plan, names, dtype, *refs, scoped), *scoped_types, collective_axes="worker")

    kernel.__name__ = name
    kwargs = {} if plan.interpret is None else {"interpret": plan.interpret}
    found = plgpu.kernel(
        kernel,
        out_type=list(outs.values()),
        grid=(heads, rows // (ROWS * WORKERS), batch),
        grid_names=("head", "row", "batch"),
        num_threads=threads,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **kwargs,
    )(*operands.values())
    return compat.vary_alike((found, operands))[0]  # inside jax.shard_map results differ as operands do


def _to_blocks(x, block):
    return pad_axis(x, pl.cdiv(x.shape[1], block) * block, 1)


def forward(
    q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings, *, interpret: Any = None
) -> tuple[Array, Array]:
    """Output [B, Sq, H, D] in the dtype of q and lse float32 [B, H, Sq]; see `block_sparse_attention`.

    Args:
        q, k, v, lists, extras, settings: as `supports` accepts them.
        interpret: None, or `plgpu.InterpretGPUParams(...)` to run on any machine (JAX 0.12).
    """
    q_len = q.shape[1]
    k, v = (_to_blocks(known_keys(x, extras.kv_lengths), lists.bk) for x in (k, v))
    q = _to_blocks(q, lists.bq)
    batch, rows, heads, dim = q.shape
    chunk = 2 * ROWS
    plan = _plan(lists, extras, settings, q, k, chunk, False, interpret)
    bias = None if extras.block_bias is None else extras.block_bias.reshape(*lists.idx.shape[:2], -1)
    operands = {"q": q, "k": k, "v": v, **_operands(plan, lists, extras, batch, bias)}
    outs = {
        "o": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "lse": jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
    }
    ring = _tiled((plan.stages, chunk, dim), q.dtype)
    shared = (_tiled((WORKERS, ROWS, dim), q.dtype), ring, ring, plgpu.SMEM((WORKERS, ROWS), jnp.float32))
    slots, free = plgpu.Barrier(num_barriers=plan.stages), plgpu.Barrier(num_arrivals=WORKERS, num_barriers=plan.stages)
    scoped = (shared, (plgpu.Barrier(num_barriers=WORKERS), slots, slots), (free, free))
    o, lse = _launch(_forward_body, plan, "block_sparse_attention_forward", q.dtype, operands, outs, rows, heads, batch,
                     WORKERS + 1, scoped)  # fmt: skip
    return o[:, :q_len], lse[:, :, :q_len]


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
    interpret: Any = None,
) -> tuple[Array, Array, Array, Extras]:
    """Gradients of q, k and v; those of extras are left None.

    Two kernels: dq over the lists of query blocks, dk and dv over those of key blocks, there over all query heads of a
    key head. Nothing is added atomically, so results do not vary from run to run.
    """
    lists = lists.transposed()
    q_len, kv_len = lists.q_len, lists.kv_len
    delta = jnp.einsum("bqhd,bqhd->bhq", o.astype(jnp.float32), do.astype(jnp.float32)) - dlse
    base2 = jnp.where(lse != -jnp.inf, lse * LOG2E, NOTHING)
    q, do = _to_blocks(q, lists.bq), _to_blocks(do.astype(q.dtype), lists.bq)
    k, v = (_to_blocks(known_keys(x, extras.kv_lengths), lists.bk) for x in (k, v))
    # Rows past the end have do = delta = 0, and every finite lse makes their gradients vanish.
    lse, delta = (pad_axis(x, q.shape[1], 2).astype(jnp.float32) for x in (base2, delta))
    matrices = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta}
    batch, rows, heads, dim = q.shape
    dtype = q.dtype
    pair = _tiled((WORKERS, ROWS, dim), dtype)

    plan = _plan(lists, extras, settings, q, k, ROWS, False, interpret)
    bias = None if extras.block_bias is None else extras.block_bias.reshape(*lists.idx.shape[:2], -1)
    operands = matrices | _operands(plan, lists, extras, batch, bias)
    ring = _tiled((plan.stages, ROWS, dim), dtype)
    slots, free = plgpu.Barrier(num_barriers=plan.stages), plgpu.Barrier(num_arrivals=WORKERS, num_barriers=plan.stages)
    own = plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS)
    scoped = ((pair, pair, ring, ring), (own, slots, slots), (free, free))
    outs = {"dq": jax.ShapeDtypeStruct(q.shape, dtype)}
    (dq,) = _launch(_dq_body, plan, "block_sparse_attention_dq", dtype, operands, outs, rows, heads, batch,
                    WORKERS + 1, scoped)  # fmt: skip

    plan = _plan(lists, extras, settings, q, k, ROWS, True, interpret)
    if bias is not None:
        bias = jnp.take_along_axis(bias, lists.t_idx * lists.width + lists.t_slot, axis=-1)
    operands = matrices | _operands(plan, lists, extras, batch, bias)
    ring = _tiled((plan.stages, ROWS, dim), dtype)
    row = plgpu.SMEM((plan.stages, ROWS), jnp.float32)
    # Rows of q come with their lse, rows of do with their delta.
    slots = plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages)
    free = plgpu.Barrier(num_arrivals=WORKERS, num_barriers=plan.stages)
    outs = {"dk": jax.ShapeDtypeStruct(k.shape, dtype), "dv": jax.ShapeDtypeStruct(v.shape, dtype)}
    scoped = ((pair, pair, ring, ring, row, row), (own, slots, slots), (free, free))
    kv_rows, kv_heads = k.shape[1:3]
    dk, dv = _launch(_dkv_body, plan, "block_sparse_attention_dkv", dtype, operands, outs, kv_rows, kv_heads, batch,
                     WORKERS, scoped)  # fmt: skip
    return dq[:, :q_len], dk[:, :kv_len], dv[:, :kv_len], Extras()


def supports(q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings) -> str | None:
    """None, or why this path refuses the call."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype}; the tensor cores take bfloat16 and float16"
    if q.shape[3] not in (64, 128) or v.shape[3] != q.shape[3]:
        return f"head dimensions {q.shape[3]} and {v.shape[3]}; both must be 64, or both 128"
    if lists.bq % (ROWS * WORKERS) or lists.bk % (ROWS * WORKERS):
        return f"blocks of {lists.bq} x {lists.bk}; on GPU both sides are multiples of {ROWS * WORKERS}"
    if extras.bias is not None:
        return "an element bias would be as large as the score matrix; use block_bias, or implementation='xla'"
    if settings.page_size is not None:
        return "keys and values in pages; implementation='xla' takes a page_table"
    if settings.dropout:
        return "dropout; implementation='xla' has it"
    if "bits" in lists.payload:
        return "a mask given as bits; give an element rule, or implementation='xla'"
    for name, value in lists.payload.items():
        if value.dtype not in (jnp.int32, jnp.float32):
            return f"payload {name!r} of dtype {value.dtype}; int32 and float32 fit the kernels"
    return None
