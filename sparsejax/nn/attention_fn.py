"""Sparse attention for modules that take an `attention_fn`."""

import dataclasses

import jax.numpy as jnp

from sparsejax.attention.attend import sparse_attention
from sparsejax.attention.expressions import Vector
from sparsejax.attention.mask import Mask
from sparsejax.attention.patterns import Causal, Full
from sparsejax.attention.rules import Table


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """Made by `attention_fn`."""

    pattern: Mask
    bq: int
    bk: int
    implementation: str | None

    def __hash__(self):
        return hash((self.pattern.rule, self.bq, self.bk, self.implementation))

    def __call__(
        self,
        query,
        key,
        value,
        bias=None,
        mask=None,
        broadcast_dropout: bool = True,
        dropout_rng=None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype=None,
        precision=None,
        module=None,
        is_causal: bool = False,
    ):
        """Attends as `nnx.dot_product_attention` does, under the pattern besides."""
        if precision is not None:
            raise ValueError(f"precision={precision}: the kernels accumulate in float32; only None is supported")
        if module is not None:
            raise ValueError("attention weights are never formed here, so they cannot be sown")
        lead, q_len, kv_len = query.shape[:-3], query.shape[-3], key.shape[-3]
        if q_len != kv_len and self.pattern.rule != Full().rule:
            raise ValueError(
                f"{q_len} queries and {kv_len} keys: their positions are not known here, so the pattern "
                f"{self.pattern} cannot be applied; use sparsejax.nn.SparseAttention, which decodes from a cache"
            )
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (x.astype(dtype).reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        allowed = self.pattern & Causal() if is_causal else self.pattern
        if mask is not None:
            allowed = allowed & by_index(mask, lead, q_len, kv_len)
        out = sparse_attention(
            query,
            key,
            value,
            allowed,
            bq=min(self.bq, q_len),
            bk=self.bk,
            bias=None if bias is None else four_axes(bias, lead, q_len, kv_len),
            dropout=(dropout_rate, dropout_rng) if dropout_rate > 0 and not deterministic else None,
            implementation=self.implementation,
        )
        return out.reshape(*lead, *out.shape[1:])


def attention_fn(
    pattern: Mask | None = None, *, bq: int = 128, bk: int = 128, implementation: str | None = None
) -> AttentionFn:
    """An `attention_fn=` for `nnx.MultiHeadAttention` and other modules that take one.

    Args:
        pattern: what may be seen; None: everything.
        bq: queries in a tile.
        bk: keys in a tile.
        implementation: see `sparse_attention`.

    Returns:
        A function with the signature of `nnx.dot_product_attention`. What it cannot do (sown weights, other precision,
        a pattern in decoding) is an error. Dropout is drawn for every example on its own. A `mask` array given to the
        call costs a bit for each pair.

    Example:
        >>> from flax import nnx
        >>> from sparsejax.attention import Local
        >>> f = attention_fn(Causal() & Local(15), bq=16, bk=16)
        >>> layer = nnx.MultiHeadAttention(2, 16, attention_fn=f, decode=False, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 32, 16))).shape
        (2, 32, 16)
    """
    return AttentionFn(Full() if pattern is None else pattern, bq, bk, implementation)


def by_index(mask, lead, q_len: int, kv_len: int) -> Mask:
    """Query i sees key j where `mask[..., i, j]` is True, whatever their positions are.

    Args:
        mask: bool [batch..., heads, Sq, Sk], axes of 1 or left out.
        lead: the batch axes of queries.
        q_len: number of queries.
        kv_len: number of keys.

    Returns:
        The mask, of a bit for each pair.
    """
    arrays = {"table_0": four_axes(mask, lead, q_len, kv_len).astype(bool)}
    arrays |= {"q_0": jnp.arange(q_len, dtype=jnp.int32), "kv_0": jnp.arange(kv_len, dtype=jnp.int32)}
    return Mask(Table("table_0", Vector("q_0"), Vector("kv_0"), 1, 1), arrays, "mask")


def four_axes(x, lead, q_len: int, kv_len: int):
    """[batch..., heads, Sq, Sk], axes of 1 or left out, as four axes of which the last two are whole."""
    full = (*lead, "heads", q_len, kv_len)
    if x.ndim > len(full) or any(
        n not in (1, m) for n, m in zip(x.shape[::-1], full[::-1], strict=False) if m != "heads"
    ):
        raise ValueError(
            f"a mask or bias has shape {x.shape}; it must be [{', '.join(map(str, full))}], or 1 in places"
        )
    x = x.reshape((1,) * (len(full) - x.ndim) + x.shape)
    x = jnp.broadcast_to(
        x, (*(x.shape[:-3] if max(x.shape[:-3], default=1) == 1 else lead), x.shape[-3], q_len, kv_len)
    )
    return x.reshape(-1, *x.shape[-3:])
