"""Against torch's scaled_dot_product_attention with the same boolean mask, values and gradients."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import block_sparse_attention, causal, dense_mask, from_tiles

pytestmark = pytest.mark.peers
if not os.environ.get("SPARSEJAX_REQUIRE_PEERS"):
    pytest.importorskip("torch")


@pytest.mark.parametrize("name", ["reference", "xla", "native"])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_scaled_dot_product_attention(name, seed):
    import torch

    r = np.random.default_rng(seed)
    batch, q_len, kv_len, heads, kv_heads = 2, 70, 90, 4, 2
    tiles = r.integers(0, 3, (batch, heads, 5, 6))
    tiles[..., 0] = 1  # torch gives NaN to queries that see nothing
    lists = from_tiles(tiles, bq=16, bk=16, q_len=q_len, kv_len=kv_len, elem=causal)
    q, k, v, g = (
        r.standard_normal((batch, n, h, 24), dtype=np.float32)
        for n, h in ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads), (q_len, heads))
    )

    def loss(q, k, v):
        o = block_sparse_attention(q, k, v, lists, implementation=name)
        return (o * g).sum(), o

    (_, o), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*map(jnp.asarray, (q, k, v)))
    mask = np.array(np.broadcast_to(dense_mask(lists, batch, heads, kv_heads), (batch, heads, q_len, kv_len)))
    leaves = [torch.from_numpy(x.swapaxes(1, 2).copy()).requires_grad_(True) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=torch.from_numpy(mask), enable_gqa=True)
    (want * torch.from_numpy(g.swapaxes(1, 2).copy())).sum().backward()
    np.testing.assert_allclose(np.asarray(o).swapaxes(1, 2), want.detach().numpy(), atol=2e-6)
    for got, leaf in zip(grads, leaves, strict=True):
        np.testing.assert_allclose(np.asarray(got).swapaxes(1, 2), leaf.grad.numpy(), atol=1e-5)
