"""Overlap of masks against sets of indices; the in-time over-parameterisation rate against a union by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.analysis.overlap import (
    MaskChange,
    exploration_init,
    exploration_rate,
    exploration_rates,
    exploration_update,
    mask_overlap,
)

DENSE = optax.MaskedNode()


def masks_from(bits):
    return {"a": {"kernel": np.array(bits[:4]).reshape(2, 2), "bias": DENSE}, "b": [np.array(bits[4:])]}


bit_lists = st.lists(st.booleans(), min_size=9, max_size=9)


@settings(deadline=None, max_examples=25)
@given(bit_lists, bit_lists)
def test_counts_are_those_of_index_sets(old, new):
    before, after = {i for i, b in enumerate(old) if b}, {i for i, b in enumerate(new) if b}
    total = mask_overlap(masks_from(old), masks_from(new)).total
    assert (total.size, total.old_nnz, total.nnz) == (9, len(before), len(after))
    assert (total.added, total.dropped, total.kept) == (len(after - before), len(before - after), len(before & after))
    assert total.hamming == len(before ^ after)
    assert total.jaccard == (len(before & after) / len(before | after) if before | after else 1.0)
    assert total.churn == (len(before - after) / len(before) if before else 0.0)


def test_layers_are_named_and_sum_to_the_total():
    result = mask_overlap(masks_from(np.array([1, 0, 1, 0, 1, 1, 0, 0, 0], bool)), masks_from(np.zeros(9, bool)))
    assert list(result.layers) == ["a/kernel", "b/0"]
    assert result.layers["a/kernel"] == MaskChange(size=4, old_nnz=2, nnz=0, added=0, dropped=2)
    assert result.total == MaskChange(size=9, old_nnz=4, nnz=0, added=0, dropped=4)


def test_a_dense_model_has_an_empty_overlap():
    result = mask_overlap({"kernel": DENSE}, {"kernel": DENSE})
    assert (result.layers, result.total.size, result.total.jaccard, result.total.churn) == ({}, 0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"kernel": DENSE}, r"\['kernel'\] are masked in one only"),
        ({"kernel": jnp.ones((3, 2), bool)}, r"kernel: the masks have shapes \(2, 3\) and \(3, 2\)"),
        ({"kernel": jnp.ones((2, 3))}, "new: the mask of kernel must be a bool array, not float32"),
        ({"kernel": 1}, "new: the mask of kernel must be a bool array, not int"),
    ],
)
def test_trees_that_do_not_fit_are_refused(new, message):
    with pytest.raises(ValueError, match=message):
        mask_overlap({"kernel": jnp.ones((2, 3), bool)}, new)


def test_masks_sharded_over_an_explicit_mesh_are_counted_in_place():
    mesh = jax.make_mesh((8,), ("x",))
    mask = jnp.arange(64).reshape(16, 4) % 3 == 0
    sharded = jax.device_put(mask, NamedSharding(mesh, PartitionSpec("x")))
    with jax.set_mesh(mesh):
        total = mask_overlap({"w": sharded}, {"w": jnp.logical_not(sharded)}).total
        rate = exploration_rate(exploration_update(exploration_init({"w": sharded}), {"w": jnp.logical_not(sharded)}))
    assert (total.old_nnz, total.nnz, total.kept, rate) == (22, 42, 0, 1.0)


def test_exploration_is_the_union_over_time_under_scan():
    steps = np.random.default_rng(0).random((5, 4, 6)) < 0.2

    def step(state, mask):
        return exploration_update(state, {"w": mask, "bias": DENSE}), None

    start = exploration_init({"w": jnp.asarray(steps[0]), "bias": DENSE})
    state, _ = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))(start, jnp.asarray(steps[1:]))
    assert exploration_rate(state) == steps.any(0).mean()
    assert exploration_rates(state) == {"w": steps.any(0).mean()}


def test_exploration_survives_donation_of_the_masks():
    masks = {"w": jnp.array([True, False])}
    state = exploration_init(masks)
    jax.jit(lambda m: jax.tree.map(jnp.logical_not, m), donate_argnums=0)(masks)
    assert exploration_rate(state) == 0.5


def test_exploration_of_a_dense_model_is_zero():
    assert exploration_rate(exploration_init({"w": DENSE})) == 0.0
