import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.channel import Channel
from sparsejax.masks.counts import keep_count
from tests.masks.oracles import top_mask


@pytest.mark.parametrize("axis", [-1, 0, 2])
def test_equals_a_selection_of_means(axis):
    scores = np.random.default_rng(0).integers(-8, 8, (4, 8, 16)).astype(np.float32)
    others = tuple(i for i in range(3) if i != axis % 3)
    means = scores.mean(others, keepdims=True)
    for sparsity in (0.0, 0.25, 0.6):
        expected = np.broadcast_to(top_mask(means, keep_count(means.size, sparsity)), scores.shape)
        np.testing.assert_array_equal(Channel(axis).mask(scores, sparsity), expected)


def test_units():
    assert Channel().grid((3, 3, 8, 16)) == (1, 1, 1, 16)
    assert Channel(axis=-2).grid((3, 3, 8, 16)) == (1, 1, 8, 1)
    assert Channel().pool(jnp.ones((4, 2), jnp.bfloat16)).dtype == jnp.float32


def test_equal_channels_are_kept_in_order_and_nan_last():
    assert Channel().mask(jnp.ones((2, 4)), 0.5).tolist() == [[1, 1, 0, 0]] * 2
    assert Channel().mask(jnp.ones((2, 4)).at[0, 0].set(jnp.nan), 0.5).tolist() == [[0, 1, 1, 0]] * 2


def test_choose_and_refill_are_selections_of_channels():
    units, where = jnp.array([[3.0, 1.0, 2.0, 5.0]]), jnp.array([[True, True, True, False]])
    assert Channel().choose(units, 2, where=where).tolist() == [[1, 0, 1, 0]]
    assert Channel().refill(units, ~where, 2).tolist() == [[1, 0, 0, 1]]


def test_vmap():
    scores = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4, 6)), jnp.float32)
    masks = jax.vmap(lambda s: Channel().mask(s, 0.5))(scores)
    np.testing.assert_array_equal(masks, [Channel().mask(s, 0.5) for s in scores])


def test_errors():
    with pytest.raises(ValueError, match=r"fc: shape \(4, 5\) has no axis 2 .* rules=\{'fc': None\}"):
        Channel(axis=2).check((4, 5), "fc")
    with pytest.raises(ValueError, match="has no axis"):
        Channel(axis=2).mask(jnp.ones((4, 5)), 0.5)
    with pytest.raises(ValueError, match="sparsity must be"):
        Channel().mask(jnp.ones((4, 5)), 1.0)
