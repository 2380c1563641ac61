"""Block-sparse attention on abstract arrays, for compilation without data or device."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.lists import BlockLists, causal
from pallas_kernels.block_sparse_attention.options import Extras, Settings


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call; 0 stands for the value that follows from others.

    Attributes:
        batch: B.
        heads: H.
        kv_heads: Hk (0: H).
        q_len: Sq.
        kv_len: Sk (0: Sq).
        dim: D.
        v_dim: Dv (0: D).
        bq: rows of a tile.
        bk: columns of a tile.
        width: key blocks that a query block can list (0: a quarter of all).
        lists: separate lists, 1 or H or Hk.
        dtype: "bfloat16" or "float32".
        causal: 1 to evaluate a causal rule in partial tiles.
        gradient: 1 to compile forward and backward, 0 for the forward pass only.
        fused: 1 to compute dq, dk and dv by one kernel on TPU.
    """

    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    q_len: int = 4096
    kv_len: int = 0
    dim: int = 128
    v_dim: int = 0
    bq: int = 512
    bk: int = 512
    width: int = 0
    lists: int = 1
    dtype: str = "bfloat16"
    causal: int = 1
    gradient: int = 1
    fused: int = 0


SHAPES = {
    "512 x 512": Shape(),
    "512 x 512, fused backward": Shape(fused=1),
    "float32, a list a head": Shape(lists=8, dtype="float32", dim=64),
    "grouped heads": Shape(kv_heads=2, lists=8),
    "gathered 128-wide keys": Shape(bk=128, width=8),
    "128 x 128, ragged": Shape(bq=128, bk=128, q_len=1000, kv_len=1500, dim=64, kv_heads=2, lists=2, batch=2),
    "256 x 256, no rule": Shape(bq=256, bk=256, causal=0),
    "64k tokens": Shape(q_len=65536, heads=2, width=16),
}
"""What is lowered and compiled for every target in tests."""


def abstract_lists(shape: Shape, array: Callable[..., Any]) -> BlockLists:
    """Lists of `array(shape, dtype)` leaves, transposed lists included."""
    kv_len = shape.kv_len or shape.q_len
    nq, nk = math.ceil(shape.q_len / shape.bq), math.ceil(kv_len / shape.bk)
    width = shape.width or max(1, nk // 4)
    rows, ints = (1, shape.lists, nq), jnp.int32
    lists = BlockLists(
        array((*rows, width), ints),
        array(rows, ints),
        array(rows, ints),
        bq=shape.bq,
        bk=shape.bk,
        q_len=shape.q_len,
        kv_len=kv_len,
        elem=causal if shape.causal else None,
    )
    whole = jax.eval_shape(lambda x: x.transposed(), lists)
    return jax.tree.map(lambda x: array(x.shape, x.dtype), whole)


def programs(shape: Shape, implementation: str, array: Callable[..., Any]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Functions and abstract arguments to compile.

    Args:
        shape: the sizes.
        implementation: as for `block_sparse_attention`.
        array: `(shape, dtype) -> ShapeDtypeStruct`.

    Returns:
        "forward", or "forward and backward" where gradients are asked for.
    """
    kv_heads, dtype = shape.kv_heads or shape.heads, jnp.dtype(shape.dtype)
    lists = abstract_lists(shape, array)
    q = array((shape.batch, shape.q_len, shape.heads, shape.dim), dtype)
    k = array((shape.batch, lists.kv_len, kv_heads, shape.dim), dtype)
    v = array((shape.batch, lists.kv_len, kv_heads, shape.v_dim or shape.dim), dtype)

    def attend(q, k, v, lists):
        return block_sparse_attention(q, k, v, lists, implementation=implementation)

    def train(q, k, v, lists):
        return jax.grad(lambda *x: attend(*x, lists).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    def train_fused(q, k, v, lists):
        from pallas_kernels.block_sparse_attention import tpu

        extras, settings = Extras(), Settings(shape.dim**-0.5)
        o, lse = tpu.forward(q, k, v, lists, extras, settings)
        return tpu.backward(
            q, k, v, lists, extras, settings, o, lse, jnp.ones_like(o), jnp.zeros_like(lse), fused=True
        )[:3]

    if not shape.gradient:
        return {"forward": (attend, (q, k, v, lists))}
    train = train_fused if shape.fused and implementation == "tpu" else train
    return {"forward and backward": (train, (q, k, v, lists))}
