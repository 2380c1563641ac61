"""Attention with the mask written out, and random inputs for it."""

import math

import jax
import jax.numpy as jnp


def qkv(q_len: int, kv_len: int, heads: int = 4, kv_heads: int = 2, batch: int = 2, dim: int = 8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, q_len, heads, dim), (batch, kv_len, kv_heads, dim), (batch, kv_len, kv_heads, dim)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def dense(q, k, v, mask):
    """Attention with the mask written out: output [B, S, H, D] and lse [B, H, S]."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits, 0)), 0)
    total = weights.sum(-1)
    o = jnp.einsum("bhqk,bkhd->bqhd", weights / jnp.where(total > 0, total, 1)[..., None], v)
    return o, jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
