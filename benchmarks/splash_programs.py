"""JAX's splash attention kernels as programs for `pallas_kernels.aot.compile_for`, to set our static figures beside."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call with a random mask of whole tiles, so that no element masks are compiled in.

    Attributes:
        heads: H.
        seq_len: tokens.
        dim: D.
        block: rows and columns of a tile, also in both backward kernels.
        fused: 1 for the backward kernel that computes dq with dk and dv, 0 for separate ones.
    """

    heads: int = 8
    seq_len: int = 4096
    dim: int = 128
    block: int = 512
    fused: int = 0


def programs(shape: Shape, implementation: str, array: Callable[..., Any]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Forward and backward in bfloat16; see `pallas_kernels.block_sparse_attention.programs`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    if implementation != "tpu":
        raise ValueError(f"implementation {implementation!r}: splash attention is for TPU")
    tiles = shape.seq_len // shape.block
    keep = np.random.default_rng(0).random((tiles, tiles)) < 0.25
    np.fill_diagonal(keep, True)
    mask = splash_attention_mask.NumpyMask(np.kron(keep, np.ones((shape.block, shape.block), bool)))
    names = ["q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute"] + ([] if shape.fused else ["q_dq", "kv_dq"])
    sizes = splash_attention_kernel.BlockSizes(
        **{f"block_{name}": shape.block for name in names}, use_fused_bwd_kernel=bool(shape.fused)
    )
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * shape.heads), head_shards=1, q_seq_shards=1, block_sizes=sizes
    )

    def train(q, k, v):
        return jax.grad(lambda *x: kernel(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    x = array((shape.heads, shape.seq_len, shape.dim), jnp.bfloat16)
    return {"forward and backward": (train, (x, x, x))}
