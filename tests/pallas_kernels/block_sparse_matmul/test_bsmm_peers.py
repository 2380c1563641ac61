"""Against scipy's block format and torch's compressed rows, and torch's gradients of the masked dense product."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_matmul import block_lists, block_sparse_matmul, from_dense, to_dense

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", ["reference", "xla", "native"])
def test_equals_scipy_and_torch(peer, name):
    scipy_sparse, torch = peer("scipy.sparse"), peer("torch")
    r = np.random.default_rng(0)
    places = r.choice(24, 9, replace=False)
    lists = block_lists(places[None] // 6, places[None] % 6, grid=(4, 6))
    values = r.standard_normal((1, 9, 16, 8), dtype=np.float32)
    x, dy = r.standard_normal((5, 64), dtype=np.float32), r.standard_normal((5, 48), dtype=np.float32)
    w = np.array(to_dense(jnp.asarray(values), lists, (64, 48)))
    call = lambda x, v: block_sparse_matmul(x, v, lists, shape=(64, 48), implementation=name)  # noqa: E731
    y, pull = jax.vjp(call, jnp.asarray(x), jnp.asarray(values))
    dx, dvalues = pull(jnp.asarray(dy))
    np.testing.assert_allclose(y, (scipy_sparse.bsr_matrix(w.T, blocksize=(8, 16)) @ x.T).T, atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse tensors a beta version
        rows = torch.from_numpy(w.T.copy()).to_sparse_csr()
    np.testing.assert_allclose(y, (rows @ torch.from_numpy(x.T.copy())).numpy().T, atol=2e-5)
    left, right = torch.from_numpy(x).requires_grad_(), torch.from_numpy(w).requires_grad_()
    (left @ right).backward(torch.from_numpy(dy))
    np.testing.assert_allclose(dx, left.grad.numpy(), atol=2e-5)
    np.testing.assert_allclose(dvalues, from_dense(jnp.asarray(right.grad.numpy()), lists, (16, 8)), atol=2e-5)
