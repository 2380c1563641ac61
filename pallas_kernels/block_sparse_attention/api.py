"""Block-sparse attention: one function, a path for each platform, and the reasons for the choice."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import choice as choices
from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import reference, xla
from pallas_kernels.block_sparse_attention.lists import BlockLists, check_lists
from pallas_kernels.block_sparse_attention.options import Aux, Extras, Settings
from pallas_kernels.block_sparse_attention.sharded import on_parts, split_of
from pallas_kernels.choice import Choice

Array = Any

KERNEL = "block_sparse_attention"


def _prepare(q, k, v, lists, scale, soft_cap, alibi, bias, block_bias, sinks, dropout, page_table, kv_lengths):
    """Checks every argument and sorts them into Extras and Settings."""
    q_shape, k_shape, v_shape = jnp.shape(q), jnp.shape(k), jnp.shape(v)
    if len(q_shape) != 4 or len(k_shape) != 4 or len(v_shape) != 4:
        raise ValueError(
            f"q, k and v must have four axes [batch, length, heads, dim]; got {q_shape}, {k_shape}, {v_shape}"
        )
    batch, q_len, heads, dim = q_shape
    if k_shape[3] != dim or k_shape[:3] != v_shape[:3] or (page_table is None and k_shape[0] != batch):
        raise ValueError(
            f"k {k_shape} and v {v_shape} do not fit q {q_shape}: batch, key length, key heads or dim differ"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    kv_heads = k_shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if page_table is None and k_shape[1] != lists.kv_len:
        raise ValueError(f"k has {k_shape[1]} keys; the lists were built for kv_len={lists.kv_len}")
    if q_len != lists.q_len:
        raise ValueError(f"q has {q_len} queries; the lists were built for q_len={lists.q_len}")
    check_lists(lists, batch, heads, kv_heads)
    if page_table is not None:
        if k_shape[1] != lists.bk:
            raise ValueError(f"pages of k hold {k_shape[1]} keys; the lists have key blocks of bk={lists.bk}")
        if jnp.shape(page_table) != (batch, lists.nk):
            raise ValueError(f"page_table has shape {jnp.shape(page_table)}; it must be {(batch, lists.nk)}")
    if kv_lengths is not None and jnp.shape(kv_lengths) != (batch,):
        raise ValueError(f"kv_lengths has shape {jnp.shape(kv_lengths)}; it must be {(batch,)}")
    for name, value in (("alibi", alibi), ("sinks", sinks)):
        if value is not None and jnp.shape(value) != (heads,):
            raise ValueError(f"{name} has shape {jnp.shape(value)}; it must be {(heads,)}, one value a query head")
    if block_bias is not None and jnp.shape(block_bias) != lists.idx.shape:
        raise ValueError(f"block_bias has shape {jnp.shape(block_bias)}; it must be {lists.idx.shape} as lists.idx")
    if bias is not None:
        full = (batch, heads, q_len, lists.kv_len)
        if jnp.ndim(bias) != 4 or any(x not in (1, y) for x, y in zip(jnp.shape(bias), full, strict=True)):
            raise ValueError(f"bias has shape {jnp.shape(bias)}; it must broadcast to {full} with four axes")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}; it must be positive, or None")
    for name, value in (("kv_lengths", kv_lengths), ("page_table", page_table)):
        if value is not None and not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {value.dtype}; it must be an integer array")
    if isinstance(scale, jax.core.Tracer):
        raise ValueError(f"scale={scale}; it must be a known number: multiply q by one that is traced")
    if dropout is not None and not (isinstance(dropout, tuple | list) and len(dropout) == 2):
        raise ValueError(f"dropout={dropout}; it must be (rate, key), or None")
    rate, key = dropout or (0.0, None)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout=({rate}, key): the rate must be at least 0 and below 1")
    if rate and key is None:
        raise ValueError(f"dropout=({rate}, None): a jax.random key is needed, jax.random.key(0) for one")
    settings = Settings(
        scale=1 / math.sqrt(dim) if scale is None else float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        dropout=float(rate),
        page_size=None if page_table is None else lists.bk,
    )
    extras = Extras(
        alibi=alibi,
        bias=bias,
        block_bias=block_bias,
        seed=jax.random.bits(key, (2,), jnp.uint32) if rate else None,
        kv_lengths=kv_lengths,
        page_table=page_table,
    )
    return extras, settings


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(name, settings, q, k, v, lists, extras):
    return choices.path(KERNEL, name).forward(q, k, v, lists, extras, settings)


def _attend_fwd(name, settings, q, k, v, lists, extras):
    # Not yet rounded to the dtype of q where the path computes in float32: the gradient is a difference of large terms
    # that the rounding of o would not leave equal.
    o, lse = choices.path(KERNEL, name).forward(q, k, v, lists, extras, settings)
    o = checkpoint_name(o, "block_sparse_attention_output")
    lse = checkpoint_name(lse, "block_sparse_attention_lse")
    return (o, lse), (q, k, v, lists, extras, o, lse)


def _attend_bwd(name, settings, residuals, cotangents):
    q, k, v, lists, extras, o, lse = residuals
    if settings.page_size is not None:
        raise NotImplementedError(
            f"implementation={name!r} has no gradient for paged keys and values; implementation='reference' has"
        )
    do, dlse = cotangents
    # A query without keys has lse = -inf: whatever arrives there belongs to no key.
    dlse = jnp.where(lse != -jnp.inf, dlse, 0).astype(lse.dtype)
    dq, dk, dv, grads = choices.path(KERNEL, name).backward(q, k, v, lists, extras, settings, o, lse, do, dlse)
    missing = [
        f for f in ("alibi", "bias", "block_bias") if getattr(extras, f) is not None and getattr(grads, f) is None
    ]
    if missing:
        # A separate pass, which the compiler drops where nobody reads these gradients.
        rest = xla.backward(q, k, v, lists, extras, settings, o, lse, do, dlse)[3]
        grads = grads._replace(**{f: getattr(rest, f) for f in missing})
    return dq, dk, dv, None, grads._replace(seed=None, kv_lengths=None, page_table=None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    lists: BlockLists,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi: Array | None = None,
    bias: Array | None = None,
    block_bias: Array | None = None,
    sinks: Array | None = None,
    dropout: tuple[float, Array] | None = None,
    page_table: Array | None = None,
    kv_lengths: Array | None = None,
    return_lse: bool = False,
    return_max_logit: bool = False,
    block_stats: str | None = None,
    implementation: str | None = None,
) -> Array | tuple[Array, Aux]:
    """Softmax attention over the listed tiles only; time follows their number.

    logits = soft_cap * tanh(scale q . k / soft_cap) - alibi |q_pos - kv_pos| + bias + block_bias. Sums are
    accumulated in float32 (float64 for float64). A query that sees no key gets output 0, lse -inf and zero gradients.
    Gradients flow to q, k, v, alibi, bias, block_bias and sinks, also from lse; gradients of gradients, and forward
    mode, are those of implementation="reference" only.

    Where the types of q, k and v say that a mesh splits their batch or heads (`jax.sharding.AxisType.Explicit`), each
    device computes its part, and the results are split alike; lists and options may lie as they like. Inside
    `jax.shard_map` a call is one of a device; where the compiler chooses shardings it cannot split the kernels.

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, Hk, D], or the page pool [pages, lists.bk, Hk, D] with `page_table`; H is a multiple of Hk.
        v: [B, Sk, Hk, Dv], or a pool alike.
        lists: the tiles, see `BlockLists`. Sq and Sk need not be multiples of the block sizes.
        scale: default 1 / sqrt(D).
        soft_cap: cap on logits before biases.
        alibi: [H], positive slopes.
        bias: four axes that broadcast to [B, H, Sq, Sk]. Paths "reference" and "xla" only.
        block_bias: as lists.idx, added to every logit of the tile. The gradient is the sum over the tile, so gates that
            choose tiles can be trained through it.
        sinks: [H], a logit in each softmax denominator that has no value. lse then counts it too.
        dropout: (rate, key) drops attention weights; the mask depends on key, head and element only.
        page_table: int32 [B, nk], for every key block the page that holds it. No gradient except on "reference".
        kv_lengths: int32 [B], keys from this index on are masked; what is there, NaN too, has no effect.
        return_lse: also return Aux with lse.
        return_max_logit: fill Aux.max_logit, by a pass of its own over the tiles.
        block_stats: "max", "mean" or "sum" of attention weights over each listed tile, by a pass of its own, without
            gradient; the mean counts all elements of the tile that are inside q_len x kv_len. [B, H, nq, W] as
            lists.idx.
        implementation: None takes the fastest that supports the call (`explain` tells which and why); "reference",
            "xla", "native" (CPU), "tpu" or "gpu" works or raises.

    Returns:
        Output [B, Sq, H, Dv] in the dtype of q; with an Aux if return_lse, return_max_logit or block_stats ask for it.

    Raises:
        ValueError: if shapes do not fit, or the named implementation does not support the call.

    Example:
        >>> import numpy as np
        >>> from pallas_kernels.block_sparse_attention import causal, from_tiles
        >>> lists = from_tiles(np.array([[1, 0], [2, 1]]), bq=4, bk=4, q_len=8, kv_len=8, elem=causal)
        >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 8, 2, 16))
        >>> o, aux = block_sparse_attention(q, k, v, lists, return_lse=True)
        >>> o.shape, aux.lse.shape, bool(jnp.allclose(o[:, 0], v[:, 0], atol=1e-6))
        ((1, 8, 2, 16), (1, 2, 8), True)
    """
    if block_stats not in (None, "max", "mean", "sum"):
        raise ValueError(f"block_stats={block_stats!r}; allowed: None, 'max', 'mean', 'sum'")
    q, k, v = (x if isinstance(x, jax.Array) else jnp.asarray(x) for x in (q, k, v))
    alibi, bias, block_bias, kv_lengths, page_table = (
        None if x is None else jnp.asarray(x) for x in (alibi, bias, block_bias, kv_lengths, page_table)
    )
    extras, settings = _prepare(
        q, k, v, lists, scale, soft_cap, alibi, bias, block_bias, sinks, dropout, page_table, kv_lengths
    )
    run = functools.partial(_run, settings, implementation, return_max_logit, block_stats)
    arguments = (q, k, v, lists, extras, None if sinks is None else jnp.asarray(sinks))
    split = split_of(q, k, v, extras, settings)
    o, lse, top, stats = run(*arguments) if split is None else on_parts(run, split, *arguments)
    if not (return_lse or return_max_logit or block_stats):
        return o
    return o, Aux(lse, top, stats)


def _run(settings, implementation, return_max_logit, block_stats, q, k, v, lists, extras, sinks):
    """Output, lse, and the largest logit and statistics of tiles where they are asked for."""
    platform = choices.platform_of(q, k, v)
    name = choices.settled(choices.choose(KERNEL, implementation, platform, q, k, v, lists, extras, settings))
    q, k, v, lists, extras = compat.vary_alike((q, k, v, lists, extras))
    if name == "reference":
        o, lse = reference.forward(q, k, v, lists, extras, settings)
    else:
        o, lse = _attend(name, settings, q, k, v, lists, extras)
    if sinks is not None:
        sink = sinks.astype(lse.dtype)[:, None]
        share = jax.nn.sigmoid(lse - sink).swapaxes(1, 2)[..., None]
        o = o.astype(lse.dtype) * share
        lse = jnp.logaddexp(lse, sink)
    o = o.astype(q.dtype)
    if not block_stats and not return_max_logit:
        return o, lse, None, None
    where = reference if name == "reference" and settings.page_size is None else xla
    still = jax.lax.stop_gradient
    stats, top = where.block_stats(still(q), still(k), lists, still(extras), settings, still(lse), block_stats or "max")
    return o, lse, top if return_max_logit else None, stats if block_stats else None


def explain(q: Array, k: Array, v: Array, lists: BlockLists, *, implementation: str | None = None, **options) -> Choice:
    """Which path `block_sparse_attention` takes for these arguments, and why others refuse. Runs no attention.

    Args:
        q: as in `block_sparse_attention`; ShapeDtypeStructs will do, here and for the other arrays.
        k: likewise.
        v: likewise.
        lists: likewise.
        implementation: likewise.
        **options: the other options of the call.

    Returns:
        A Choice, readable when printed.

    Example:
        >>> import numpy as np
        >>> from pallas_kernels.block_sparse_attention import from_tiles
        >>> lists = from_tiles(np.ones((1, 1), int), bq=8, bk=8, q_len=8, kv_len=8)
        >>> x = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
        >>> explain(x, x, x, lists, implementation="xla").name
        'xla'
    """
    names = ("scale", "soft_cap", "alibi", "bias", "block_bias", "sinks", "dropout", "page_table", "kv_lengths")
    results = ("return_lse", "return_max_logit", "block_stats")
    unknown = sorted(set(options) - set(names) - set(results))
    if unknown:
        raise TypeError(f"unknown options {unknown}; allowed: {', '.join(names + results)}")
    extras, settings = _prepare(q, k, v, lists, *(options.get(name) for name in names))
    platform = choices.platform_of(q, k, v)
    return choices.choose(KERNEL, implementation, platform, q, k, v, lists, extras, settings)
