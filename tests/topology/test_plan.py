import jax.numpy as jnp
import pytest

import sparsejax
from sparsejax.topology.plan import plan

PARAMS = {
    "conv1": {"kernel": jnp.ones((3, 3, 4, 8))},
    "dense": {"kernel": jnp.ones((32, 16)), "bias": jnp.ones(16)},
}


def test_counts_and_steps_of_the_end():
    planned = plan(PARAMS, sparsejax.gradual(0.75, begin=5, end=40, update_every=10))
    assert planned.nnz == {"conv1/kernel": 72, "dense/kernel": 128}
    assert (planned.first, planned.last, planned.updates) == (5, 40, 5)
    steps = sparsejax.gradual(0.75, begin=5, end=40, update_every=10).steps
    assert planned.updates == sum(bool(steps.due(step)) for step in range(100))


def test_it_prints_every_leaf_with_its_axes():
    text = str(plan(PARAMS, sparsejax.rigl(0.5), {"dense/kernel": sparsejax.NM(2, 4)}))
    assert "window window in out" in text
    assert "NM(" in text
    assert "dense/bias" in text
    assert "masks move first at step 100 and until training ends" in text


def test_blocks_are_shown_in_elements():
    planned = plan(PARAMS, sparsejax.static(0.5, structure=sparsejax.Block((4, 4)), distribution=sparsejax.uniform))
    assert planned.nnz["dense/kernel"] == 256
    assert planned.first is None


def test_a_pool_shows_its_own_count():
    planned = plan(PARAMS, sparsejax.global_magnitude(0.5))
    assert planned.pooled_nnz == 400
    assert "share 400 units" in str(planned)


def test_given_masks_are_counted():
    masks = {"dense": {"kernel": jnp.zeros((32, 16), bool).at[0].set(True)}}
    assert plan(PARAMS, sparsejax.from_masks(masks)).nnz == {"dense/kernel": 16}


def test_an_algorithm_that_comes_too_late_is_an_error():
    with pytest.raises(ValueError, match="first move at step 100, but training ends after 50 steps"):
        plan(PARAMS, sparsejax.rigl(0.5), steps=50)
    with pytest.raises(ValueError, match="the target would never be reached"):
        plan(PARAMS, sparsejax.gradual(0.5, begin=0, end=100), steps=50)
    assert plan(PARAMS, sparsejax.rigl(0.5), steps=101).first == 100
