import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.packing import pack_mask, unpack_mask


@hypothesis.given(mask=hnp.arrays(np.bool_, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=19)))
@hypothesis.settings(deadline=None, max_examples=8)
def test_round_trip(mask):
    packed = pack_mask(mask)
    assert packed.shape == (*mask.shape[:-1], -(-mask.shape[-1] // 8))
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, np.packbits(mask, axis=-1))
    unpacked = unpack_mask(packed, mask.shape)
    assert unpacked.dtype == jnp.bool_
    np.testing.assert_array_equal(unpacked, mask)


def test_under_jit_and_vmap():
    mask = jnp.asarray(np.random.default_rng(0).random((3, 5, 13)) < 0.5)
    packed = jax.jit(jax.vmap(pack_mask))(mask)
    np.testing.assert_array_equal(packed, pack_mask(mask))
    np.testing.assert_array_equal(jax.vmap(lambda p: unpack_mask(p, (5, 13)))(packed), mask)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "a mask is a bool array, got float32", lambda: pack_mask(jnp.ones(3))),
        (ValueError, "no axes", lambda: pack_mask(jnp.array(True))),
        (TypeError, "uint8 array, got int32", lambda: unpack_mask(jnp.ones(3, jnp.int32), (3,))),
        (
            ValueError,
            r"shape \(2,\) does not hold a mask of shape \(3,\)",
            lambda: unpack_mask(jnp.ones(2, jnp.uint8), (3,)),
        ),
        (ValueError, "does not hold", lambda: unpack_mask(jnp.ones(2, jnp.uint8), ())),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
