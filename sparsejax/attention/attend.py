"""Attention under a mask: the front end of the block-sparse kernels."""

import functools

import jax

from pallas_kernels.block_sparse_attention import Choice, block_sparse_attention, explain
from pallas_kernels.block_sparse_attention.options import Aux
from pallas_kernels.mapping import whole
from sparsejax.attention.block_mask import BlockMask
from sparsejax.attention.compile import compile_mask
from sparsejax.attention.mask import Mask
from sparsejax.attention.patterns import Full


def sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | BlockMask | None = None,
    *,
    q_positions=None,
    kv_positions=None,
    bq: int | None = None,
    bk: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi: jax.Array | None = None,
    bias: jax.Array | None = None,
    block_bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout: tuple[float, jax.Array] | None = None,
    page_table: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    return_lse: bool = False,
    return_max_logit: bool = False,
    block_stats: str | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, Aux]:
    """Softmax attention over the pairs that a mask leaves: cost follows the visited tiles, forward and backward.

    The layout is that of `jax.nn.dot_product_attention`. A query that sees no key gets output 0, `lse` -inf and
    gradients of 0.

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, Hk, D], H a multiple of Hk; or a pool of pages [pages, bk, Hk, D] with `page_table`.
        v: [B, Sk, Hk, Dv]; or a pool alike.
        mask: an expression, compiled here (and kept, if it has no arrays), or a compiled mask; None: everything.
        q_positions: int [Sq] or [B, Sq], what masks and ALiBi take for positions; None counts from 0. Only with an
            expression; a compiled mask has its positions.
        kv_positions: int [Sk] or [B, Sk], likewise.
        bq: queries in a tile, with an expression; None: 128.
        bk: keys in a tile, with an expression; None: 128.
        scale: factor on the logits; None: 1 / sqrt(D).
        soft_cap: `soft_cap * tanh(logits / soft_cap)` in place of the logits.
        alibi: [H], `-alibi * |q_pos - kv_pos|` is added to the logits; differentiable.
        bias: [B, H, Sq, Sk] with 1 where it is the same for all; added to the logits; differentiable.
        block_bias: like `mask.lists.idx`, added to every logit of a tile; differentiable, so that a log-gate here
            trains what chooses the tiles.
        sinks: [H], a logit in each denominator that has no value.
        dropout: rate and key for dropping attention weights.
        page_table: int [B, nk], the page of the pool in which each block of keys lies.
        kv_lengths: int [B], keys from this index on are not seen.
        return_lse: also return an `Aux` with `lse` [B, H, Sq]; differentiable.
        return_max_logit: fill `Aux.max_logit` [B, H].
        block_stats: "max", "mean" or "sum" of the attention weights in each visited tile, in `Aux.block_stats`
            [B, H, nq, W] in the order of `mask.lists.idx`; see `stats_grid`.
        implementation: None takes the fastest path that serves the call; "reference", "xla", "native", "tpu" or "gpu"
            works or refuses with the reason. `explain_attention` tells which path is taken and why.

    Returns:
        Output [B, Sq, H, Dv] in the dtype of q, with an `Aux` where something of it is asked for.

    Raises:
        ValueError: something does not fit, or the named implementation refuses.

    Example:
        >>> from sparsejax.attention import Causal, Local, Sink
        >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 256, 2, 16))
        >>> sparse_attention(q, k, v, Causal() & (Local(63) | Sink(4)), bq=64, bk=64).shape
        (1, 256, 2, 16)
    """
    lists = _lists(q, k, mask, q_positions, kv_positions, bq, bk, page_table)
    return block_sparse_attention(
        q,
        k,
        v,
        lists,
        scale=scale,
        soft_cap=soft_cap,
        alibi=alibi,
        bias=bias,
        block_bias=block_bias,
        sinks=sinks,
        dropout=dropout,
        page_table=page_table,
        kv_lengths=kv_lengths,
        return_lse=return_lse,
        return_max_logit=return_max_logit,
        block_stats=block_stats,
        implementation=implementation,
    )


def explain_attention(
    q, k, v, mask: Mask | BlockMask | None = None, *, q_positions=None, kv_positions=None, bq=None, bk=None, **options
) -> Choice:
    """Which path `sparse_attention` takes for these arguments, and why others refuse. Runs no attention.

    Args:
        q: as in `sparse_attention`; a `jax.ShapeDtypeStruct` will do, here and for k and v.
        k: likewise.
        v: likewise.
        mask: likewise.
        q_positions: likewise.
        kv_positions: likewise.
        bq: likewise.
        bk: likewise.
        **options: the other options of the call.

    Returns:
        The choice; print it.
    """
    lists = _lists(q, k, mask, q_positions, kv_positions, bq, bk, options.get("page_table"))
    return explain(q, k, v, lists, **options)


def _lists(q, k, mask, q_positions, kv_positions, bq, bk, page_table):
    if isinstance(mask, BlockMask):
        given = {"q_positions": q_positions, "kv_positions": kv_positions, "bq": bq, "bk": bk}
        wrong = sorted(name for name, value in given.items() if value is not None)
        if wrong:
            raise ValueError(f"{', '.join(wrong)} cannot be given with a compiled mask: give them to compile_mask")
        return mask.lists
    mask = Full() if mask is None else mask
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask, a BlockMask or None, not {type(mask).__name__}; for a bool matrix: Bits")
    if page_table is not None:
        bk = k.shape[1] if bk is None else bk
    q_len, kv_len = q.shape[1], k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
    blocks = {"bq": 128 if bq is None else bq, "bk": 128 if bk is None else bk}
    if q_positions is None and kv_positions is None and not mask.arrays:
        return _compiled(mask.rule, mask.text, q_len, kv_len, **blocks).lists
    mask, q_positions, kv_positions = whole((mask, q_positions, kv_positions))  # their arrays are small
    return compile_mask(
        mask, q_len, kv_len, **blocks, q_positions=q_positions, kv_positions=kv_positions, transpose=False
    ).lists


@functools.lru_cache(maxsize=64)
def _compiled(rule, text: str, q_len: int, kv_len: int, **blocks) -> BlockMask:
    """A mask without arrays, compiled once."""
    return compile_mask(Mask(rule, {}, text), q_len, kv_len, **blocks)
