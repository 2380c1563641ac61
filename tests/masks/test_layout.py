import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.masks.layout import match_sharding, merge_axis, split_axis, unshard


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_split_and_merge_are_reshapes(axis):
    x = np.arange(96).reshape(8, 12)
    split = split_axis(jnp.asarray(x), axis, 4)
    shape = (2, 4, 12) if axis % 2 == 0 else (8, 3, 4)
    np.testing.assert_array_equal(split, x.reshape(shape))
    np.testing.assert_array_equal(merge_axis(split, axis % 2), x)


def test_an_axis_is_gathered_only_where_groups_cross_devices():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.device_put(np.arange(512.0).reshape(16, 32), NamedSharding(mesh, P("data", ("model",))))
    assert split_axis(x, 0, 4).sharding.spec[0] == "data"
    assert split_axis(x, 0, 8).sharding.spec[0] is None
    assert unshard(x, 1).sharding.spec == P("data", None)
    assert unshard(x, 1, multiple_of=16) is x
    np.testing.assert_array_equal(merge_axis(split_axis(x, 0, 8), 0), x)
    back = match_sharding(merge_axis(split_axis(x, 0, 8), 0), x)
    assert back.sharding.is_equivalent_to(x.sharding, 2)


def test_match_sharding_places_like_another():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    like = jax.device_put(np.zeros((16, 4)), NamedSharding(mesh, P("data")))
    placed = match_sharding(jnp.ones((16, 4)), like)
    assert placed.sharding.is_equivalent_to(like.sharding, 2)
    assert match_sharding(placed, like) is placed
