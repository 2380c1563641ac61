import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.keys import as_float, sort_keys

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_order_floats_like_the_floats(dtype):
    values = jnp.array([-jnp.inf, -3.0, -1.0, -0.25, -0.0, 0.0, 0.25, 1.0, 3.0, jnp.inf]).astype(dtype)
    values = values[jnp.isfinite(values.astype(jnp.float32))]
    keys = np.asarray(sort_keys(values)).astype(np.int64)
    steps = np.diff(np.asarray(values.astype(jnp.float32)))
    np.testing.assert_array_equal(np.diff(keys) > 0, steps > 0)
    assert (keys > 0).all()
    assert int(sort_keys(jnp.array([jnp.nan, -jnp.nan]).astype(dtype)).max()) == 0


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int4", "uint4"])
def test_keys_order_integers_like_the_integers(dtype):
    info = jnp.iinfo(dtype)
    numbers = sorted({info.min, info.min + 1, 0, 1, info.max})
    keys = sort_keys(jnp.asarray(np.array(numbers, np.int32 if info.min < 0 else np.uint32)).astype(dtype))
    assert jnp.issubdtype(keys.dtype, jnp.unsignedinteger)
    assert (np.diff(np.asarray(keys).astype(np.int64)) > 0).all()


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(jnp.float32, "float32"), (jnp.bfloat16, "float32"), (jnp.float8_e5m2, "float32"), (jnp.int32, "float32")],
)
def test_as_float(dtype, wide):
    assert as_float(jnp.ones(2).astype(dtype)).dtype == wide
