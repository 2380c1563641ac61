"""The dense computation with the same options: oracle of all other paths, quadratic in memory, twice differentiable."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.lists import BlockLists
from pallas_kernels.block_sparse_attention.options import Extras, Settings, keep_mask
from pallas_kernels.block_sparse_attention.rules import dense_mask, known_keys, positions

Array = Any
MAX_SCORES = 2**30


def supports(q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings) -> str | None:
    """None, or why this path refuses the call."""
    del v, k, extras, settings
    scores = q.shape[0] * q.shape[2] * lists.q_len * lists.kv_len
    if isinstance(scores, int) and scores > MAX_SCORES:  # jax.export can leave sizes open
        return f"the dense score matrix would have {scores} elements, more than {MAX_SCORES}"
    return None


def _spread_block_bias(block_bias: Array, lists: BlockLists, heads: int) -> Array:
    """[Bm, Hm, nq, W] -> [Bm, 1 or H, q_len, kv_len]."""
    bm, hm, nq, w = lists.idx.shape
    listed = jnp.arange(w) < lists.n_tot[..., None]
    lead = (jnp.arange(bm)[:, None, None, None], jnp.arange(hm)[:, None, None], jnp.arange(nq)[:, None])
    grid = (
        jnp.zeros((bm, hm, nq, lists.nk), block_bias.dtype).at[(*lead, lists.idx)].add(jnp.where(listed, block_bias, 0))
    )
    wide = jnp.repeat(jnp.repeat(grid, lists.bq, axis=2), lists.bk, axis=3)[..., : lists.q_len, : lists.kv_len]
    return jnp.repeat(wide, heads // hm, axis=1) if 1 < hm < heads else wide


def logits_and_mask(
    q: Array, k: Array, lists: BlockLists, extras: Extras, settings: Settings, dtype: Any
) -> tuple[Array, Array]:
    """All logits [B, H, Sq, Sk] in `dtype`, and the mask that broadcasts to them."""
    batch, _, heads, _ = q.shape
    kv_heads = k.shape[2]
    k = jnp.repeat(k, heads // kv_heads, axis=2)
    s = jnp.einsum("bqhd,bkhd->bhqk", q.astype(dtype), k.astype(dtype), precision="highest") * settings.scale
    if settings.soft_cap is not None:
        s = settings.soft_cap * jnp.tanh(s / settings.soft_cap)
    if extras.alibi is not None:
        q_pos, kv_pos = positions(lists)
        distance = jnp.abs(q_pos[:, None, :, None] - kv_pos[:, None, None, :]).astype(dtype)
        s = s - extras.alibi.astype(dtype)[:, None, None] * distance
    if extras.bias is not None:
        s = s + extras.bias.astype(dtype)
    if extras.block_bias is not None:
        s = s + _spread_block_bias(extras.block_bias.astype(dtype), lists, heads)
    mask = dense_mask(lists, batch, heads, kv_heads)
    if extras.kv_lengths is not None:
        mask = mask & (jnp.arange(lists.kv_len) < extras.kv_lengths[:, None, None, None])
    return s, mask


def forward(q: Array, k: Array, v: Array, lists: BlockLists, extras: Extras, settings: Settings) -> tuple[Array, Array]:
    """Output [B, Sq, H, Dv] and lse [B, H, Sq], at least float32; see `block_sparse_attention`."""
    batch, q_len, heads, _ = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    if extras.page_table is not None:
        k, v = (x[extras.page_table].reshape(batch, -1, *x.shape[2:])[:, : lists.kv_len] for x in (k, v))
    k, v = (known_keys(x, extras.kv_lengths) for x in (k, v))
    s, mask = logits_and_mask(q, k, lists, extras, settings, dtype)
    s = jnp.where(mask, s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf))
    some = jnp.any(s != -jnp.inf, axis=-1, keepdims=True)  # of NaN too, which the largest need not show
    # Both branches of every `where` stay finite, so that empty rows give zero gradients rather than NaN.
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, s - jnp.where(some, top, 0), 0)), 0)
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(some, total, 1)
    lse = jnp.where(some, jnp.log(safe) + jnp.where(some, top, 0), -jnp.inf)[..., 0]
    weights = weights / safe
    if settings.dropout:
        head = (jnp.arange(batch)[:, None] * heads + jnp.arange(heads))[..., None, None]
        kept = keep_mask(extras.seed, settings, head, jnp.arange(q_len)[:, None], jnp.arange(lists.kv_len))
        weights = jnp.where(kept, weights / (1 - settings.dropout), 0)
    v = jnp.repeat(v, heads // v.shape[2], axis=2).astype(dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest"), lse


def block_stats(
    q: Array, k: Array, lists: BlockLists, extras: Extras, settings: Settings, lse: Array, kind: str
) -> tuple[Array, Array]:
    """Statistics of attention weights over each listed tile, [B, H, nq, W], and the largest logit, [B, H]."""
    batch, _, heads, _ = q.shape
    dtype = lse.dtype
    s, mask = logits_and_mask(q, k, lists, extras, settings, dtype)
    mask = jnp.broadcast_to(mask, s.shape)
    p = jnp.where(mask, jnp.exp(jnp.where(mask, s - jnp.where(lse != -jnp.inf, lse, 0)[..., None], 0)), 0)
    rows, cols = lists.nq * lists.bq, lists.nk * lists.bk
    p = jnp.pad(p, [(0, 0), (0, 0), (0, rows - lists.q_len), (0, cols - lists.kv_len)])
    p = p.reshape(batch, heads, lists.nq, lists.bq, lists.nk, lists.bk)
    grid = p.max((3, 5)) if kind == "max" else p.sum((3, 5))
    if kind == "mean":
        height = jnp.minimum(lists.bq, lists.q_len - lists.bq * jnp.arange(lists.nq))
        length = jnp.minimum(lists.bk, lists.kv_len - lists.bk * jnp.arange(lists.nk))
        grid = grid / (height[:, None] * length)
    idx = jnp.repeat(lists.idx, heads // lists.idx.shape[1], axis=1)
    listed = jnp.repeat(jnp.arange(lists.width) < lists.n_tot[..., None], heads // lists.idx.shape[1], axis=1)
    stats = jnp.take_along_axis(grid, jnp.broadcast_to(idx, (batch, *idx.shape[1:])), axis=-1)
    top = jnp.max(jnp.where(mask, s, -jnp.inf), axis=(2, 3), initial=-jnp.inf)
    return jnp.where(listed, stats, 0), top
