"""What an attention call carries besides q, k, v and lists, and the dropout mask that every path computes alike."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Array = Any

DROPOUT_BITS = 24
_HEAD = np.uint32(0x9E3779B9)  # between the hashes of one head and the next


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static options of a call.

    Attributes:
        scale: factor on q . k.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap) before biases are added, or None.
        dropout: probability of dropping an attention weight.
        page_size: rows of a page where k and v are page pools [pages, page_size, Hk, D], else None.
    """

    scale: float
    soft_cap: float | None = None
    dropout: float = 0.0
    page_size: int | None = None

    @property
    def threshold(self) -> int:
        """Hashes of `DROPOUT_BITS` bits below this are dropped."""
        return round(self.dropout * 2**DROPOUT_BITS)


class Extras(NamedTuple):
    """Optional arrays of a call; also the type of their gradients.

    Attributes:
        alibi: [H] slopes; -slope * |q_pos - kv_pos| is added to logits.
        bias: broadcastable to [B, H, Sq, Sk].
        block_bias: [Bm, Hm, nq, W], added to every logit of a listed tile.
        seed: uint32 [2], what dropout is drawn from.
        kv_lengths: int32 [B], keys from this index on are masked.
        page_table: int32 [B, nk], the page in the pool of every key block.
    """

    alibi: Array | None = None
    bias: Array | None = None
    block_bias: Array | None = None
    seed: Array | None = None
    kv_lengths: Array | None = None
    page_table: Array | None = None


class Aux(NamedTuple):
    """What `block_sparse_attention` returns besides the output.

    Attributes:
        lse: [B, H, Sq], log of the softmax denominator, -inf where a query sees no key. Differentiable.
        max_logit: [B, H], largest logit that is attended to, -inf where there is none; None unless asked for.
        block_stats: [B, H, nq, W], statistics of attention weights over each listed tile, 0 in padding; None unless
            asked for.
    """

    lse: Array
    max_logit: Array | None = None
    block_stats: Array | None = None


def _mix(x):
    """A 32-bit finaliser (lowbias32 of C. Wellons' hash prospector)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_mask(seed: Array, settings: Settings, head: Array, query: Array, key: Array) -> Array:
    """Which attention weights dropout keeps: a hash of seed, head and element, so that all passes agree.

    Args:
        seed: uint32 [2].
        settings: gives the rate.
        head: batch index * H + head, broadcastable.
        query: index of the query in the sequence, broadcastable.
        key: index of the key in the sequence, broadcastable.

    Returns:
        bool of the broadcast shape.
    """
    head, query, key = (jnp.asarray(x).astype(jnp.uint32) for x in (head, query, key))
    row = _mix(_mix(seed[0] + head * _HEAD) ^ (seed[1] + query * np.uint32(0x85EBCA6B)))
    return (_mix(row + key * np.uint32(0xC2B2AE35)) >> (32 - DROPOUT_BITS)) >= np.uint32(settings.threshold)


def seed_from(seed: Array, head: Array) -> Array:
    """The seed under which head 0 keeps what `head` keeps under `seed`: for calls on some heads of several."""
    return seed.at[0].add(jnp.asarray(head).astype(jnp.uint32) * _HEAD)
