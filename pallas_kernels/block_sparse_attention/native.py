"""Block-sparse attention by the C++ kernels of cpu.cc: float32 arithmetic on XLA's thread pool.

XLA evaluates the element rule into bits for listed partial tiles only, so the C++ needs to know no rule.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat, native
from pallas_kernels.block_sparse_attention.lists import BlockLists
from pallas_kernels.block_sparse_attention.options import Extras, Settings
from pallas_kernels.block_sparse_attention.rules import bits_bytes, partial_bits, positions

Array = Any

SOURCE = Path(__file__).with_name("cpu.cc")
TARGETS = ("bsa_forward", "bsa_backward", "bsa_decode")

# Bits of partial tiles that a call may need; more means that most tiles are partial, or that max_part is not given.
MAX_BITS_BYTES = 2**29
# Query rows of a list up to which keys are read where they lie instead of being packed first.
_DECODE_ROWS = 16
# Keys that a task of the decode kernel has at least.
_DECODE_KEYS = 1024
# Tasks of a pass whose results are added up, whatever the number of threads, so that sums are always formed alike. The
# backward pass has fewer where rows are short: adding up costs as much as a few tiles a row.
_TASKS = 8
_TASKS_OF_SHORT_ROWS = 4

_BITS, _ALIBI, _BLOCK_BIAS = 1, 2, 4


def supports(q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings) -> str | None:
    """None, or why this path refuses the call."""
    del v
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU, and the default backend is {jax.default_backend()}"
    if q.dtype == jnp.float64:
        return "it computes in float32, and q is float64"
    if extras.bias is not None:
        return "it takes no dense bias; give block_bias, or use implementation='xla'"
    if _few_queries(q, k, lists, settings) and q.dtype != jnp.float32:
        return f"it would turn the whole cache from {q.dtype} into float32, and few queries read only parts of it"
    if settings.page_size is not None and lists.nq > 1:
        return f"it takes pages for one block of queries, and {lists.q_len} queries in blocks of {lists.bq} are more"
    if lists.has_rule:
        size = bits_bytes(lists, q.shape[0], q.shape[2])
        if size > MAX_BITS_BYTES:
            return (
                f"bits for up to {lists.part_width} partial tiles a row would take {size / 2**20:.0f} MiB, more than "
                f"{MAX_BITS_BYTES / 2**20:.0f}; give lists.max_part if fewer tiles are partial"
            )
    return native.unavailable(SOURCE, TARGETS)


def _inputs(q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings):
    """Operands and attributes that both handlers share. Absent options become empty stand-ins that flags switch off."""
    batch, _, heads, _ = q.shape
    flags = 0
    bits = jnp.zeros((1,) * 6, jnp.uint8)
    if lists.has_rule:
        flags |= _BITS
        bits = partial_bits(lists, batch, heads)
    alibi = block_bias = jnp.zeros((1,), jnp.float32)
    if extras.alibi is not None:
        flags, alibi = flags | _ALIBI, extras.alibi.astype(jnp.float32)
    if extras.block_bias is not None:
        flags, block_bias = flags | _BLOCK_BIAS, extras.block_bias.astype(jnp.float32)
    limits = jnp.full((batch,), lists.kv_len, jnp.int32)
    if extras.kv_lengths is not None:
        limits = jnp.minimum(limits, extras.kv_lengths.astype(jnp.int32))
    seed = jnp.zeros((2,), jnp.uint32) if extras.seed is None else extras.seed
    q_pos, kv_pos = (x.astype(jnp.int32) for x in positions(lists))
    index = (jnp.asarray(x).astype(jnp.int32) for x in (lists.idx, lists.n_part, lists.n_tot))
    operands = (
        *(x.astype(jnp.float32) for x in (q, k, v)),
        *index,
        bits,
        alibi,
        q_pos,
        kv_pos,
        block_bias,
        seed,
        limits,
    )
    attributes = {
        "bq": np.int64(lists.bq),
        "bk": np.int64(lists.bk),
        "scale": np.float32(settings.scale),
        "soft_cap": np.float32(settings.soft_cap or 0.0),
        "keep_scale": np.float32(1 / (1 - settings.dropout)),
        "threshold": np.int64(settings.threshold),
        "flags": np.int64(flags),
    }
    return operands, attributes


def _padded(size: int) -> int:
    """`size` rounded up to the widest panel that cpu.cc may be compiled for."""
    return math.ceil(size / 32) * 32


def _call(name: str, shapes: list[tuple[int, ...]], operands: tuple, attributes: dict) -> list[Array]:
    outputs = [compat.like_varying(shape, jnp.float32, *operands) for shape in shapes]
    return jax.ffi.ffi_call(name, outputs, vmap_method="sequential")(*operands, **attributes)


def forward(q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings) -> tuple[Array, Array]:
    """Output [B, Sq, H, Dv] and lse [B, H, Sq] in float32; see `block_sparse_attention`."""
    batch, q_len, heads, _ = q.shape
    v_dim = v.shape[3]
    operands, attributes = _inputs(q, k, v, lists, extras, settings)
    if _few_queries(q, k, lists, settings):
        return _decode(q, k, v, lists, extras, operands, attributes)
    o, lse = _call("bsa_forward", [(batch, q_len, heads, v_dim), (batch, heads, q_len)], operands, attributes)
    return o, lse


def _few_queries(q: Array, k: Array, lists: BlockLists, settings: Settings) -> bool:
    """Whether keys are read where they lie rather than packed first."""
    return settings.page_size is not None or (lists.nq == 1 and _rows(q, k, lists) <= _DECODE_ROWS)


def _rows(q: Array, k: Array, lists: BlockLists) -> int:
    """Query rows that share a list."""
    heads = q.shape[2]
    return q.shape[1] if lists.idx.shape[1] == heads else q.shape[1] * heads // k.shape[2]


def _decode(q, k, v, lists, extras, operands, attributes) -> tuple[Array, Array]:
    batch, q_len, heads, _ = q.shape
    v_dim, rows = v.shape[3], _rows(q, k, lists)
    owners = batch * heads * q_len // rows
    parts = max(1, min(math.ceil(_TASKS / owners), lists.width * lists.bk // _DECODE_KEYS))
    pages = jnp.zeros((0,), jnp.int32) if extras.page_table is None else extras.page_table.astype(jnp.int32)
    shapes = [(*q.shape[:3], v_dim), (batch, heads, q_len), (owners, parts, rows, _padded(v_dim) + 2)]
    attributes = attributes | {"parts": np.int64(parts), "kv_len": np.int64(lists.kv_len)}
    o, lse, _ = _call("bsa_decode", shapes, (*operands, pages), attributes)
    return o, lse


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
    batch, _, heads, _ = q.shape
    operands, attributes = _inputs(q, k, v, lists, extras, settings)
    block_shape = (batch, heads, lists.nq, lists.width) if extras.block_bias is not None else (1,)
    kv_heads, nk = k.shape[2], math.ceil(lists.kv_len / lists.bk)
    tiles_a_row = lists.width * heads // kv_heads
    tasks = min(_TASKS, max(_TASKS_OF_SHORT_ROWS, tiles_a_row))
    parts = min(nk, math.ceil(tasks / (batch * kv_heads)))
    alibi_shape = (batch, kv_heads, parts, heads // kv_heads) if extras.alibi is not None else (1,)
    shapes = [q.shape, k.shape, v.shape, block_shape, alibi_shape]
    attributes["parts"] = np.int64(parts)
    saved = (o.astype(jnp.float32), lse, do.astype(jnp.float32), dlse)
    dq, dk, dv, dblock, dalibi = _call("bsa_backward", shapes, (*operands, *saved), attributes)
    grads = Extras()
    if extras.block_bias is not None:
        # Padding slots are not written.
        repeat = heads // lists.idx.shape[1]
        listed = jnp.repeat(jnp.arange(lists.width) < jnp.asarray(lists.n_tot)[..., None], repeat, axis=1)
        dblock = jnp.where(listed, dblock, 0).reshape(batch, -1, repeat, lists.nq, lists.width).sum(2)
        dblock = dblock.sum(0, keepdims=True) if lists.idx.shape[0] < batch else dblock
        grads = grads._replace(block_bias=dblock.astype(extras.block_bias.dtype))
    if extras.alibi is not None:
        grads = grads._replace(alibi=dalibi.sum((0, 2)).reshape(heads).astype(extras.alibi.dtype))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), grads
