"""Stored weights: exact conversion, products, what they look like, and checkpoints on other meshes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import treescope
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.checkpoint import Checkpointer
from sparsejax.masks.block import Block
from sparsejax.masks.nm import NM
from sparsejax.masks.roles import Roles, convolution_roles
from sparsejax.parameters import BlockSparse, NMSparse, apply_updates, to_dense, to_sparse, value_and_grad
from sparsejax.topology.dynamic import from_masks
from sparsejax.transforms.sparsify import sparsify


def weight(shape, structure, sparsity=0.5, seed=0, **options):
    array = jax.random.normal(jax.random.key(seed), shape)
    mask = structure.mask(jax.random.uniform(jax.random.key(seed + 1), shape), sparsity)
    rules = {"kernel": structure}
    if len(shape) > 2:
        rules = [("kernel", convolution_roles), ("kernel", structure)]
    return array * mask, to_sparse({"kernel": array}, {"kernel": mask}, rules, **options)["kernel"]


@pytest.mark.parametrize(("shape", "block", "sparsity"), [((16, 12), (4, 4), 0.4), ((13, 15), (2, 4), 0.9)])
def test_the_way_there_and_back_is_exact(shape, block, sparsity):
    dense, stored = weight(shape, Block(block), sparsity)
    assert isinstance(stored, BlockSparse)
    assert (stored.shape, stored.dtype, stored.ndim, stored.size) == (dense.shape, dense.dtype, 2, dense.size)
    np.testing.assert_array_equal(stored.to_dense(), dense)
    assert stored.nnz == np.count_nonzero(dense)
    x = jax.random.normal(jax.random.key(9), (3, shape[0]))
    np.testing.assert_allclose(x @ stored, x @ dense, atol=1e-5)


def test_whole_trees_are_converted_by_rules_or_by_what_is_zero():
    params = {
        "conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 8))},
        "query": {"kernel": jax.random.normal(jax.random.key(1), (8, 2, 4))},
        "out": {"kernel": jax.random.normal(jax.random.key(2), (8, 8)), "bias": jnp.ones(8)},
        "stack": jax.random.normal(jax.random.key(3), (3, 8, 8)),
    }
    stack = Roles(in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    rules = [("*kernel", Block((4, 4))), ("out/kernel", NM(2, 4)), ("stack", stack), ("stack", Block((4, 4)))]
    params["conv"]["kernel"] = params["conv"]["kernel"].at[:, :, :, :4].set(0)
    params["out"]["kernel"] *= NM(2, 4).mask(params["out"]["kernel"])
    params["stack"] = params["stack"].at[1, :4, 4:].set(0)
    stored = to_sparse(params, None, rules)
    kinds = jax.tree.map(type, stored, is_leaf=lambda leaf: isinstance(leaf, BlockSparse | NMSparse))
    assert kinds["conv"]["kernel"] is kinds["query"]["kernel"] is kinds["stack"] is BlockSparse
    assert kinds["out"]["kernel"] is NMSparse
    assert stored["conv"]["kernel"].shape == (3, 3, 4, 8)
    assert stored["stack"].batch == (3,)
    chex.assert_trees_all_equal(to_dense(stored), params)


@pytest.mark.parametrize("share", [1, 4])
def test_nm_weights_come_back_exactly(share):
    dense, stored = weight((16, 8), NM(2, 8, share=share), 0.75)
    assert stored.values.shape == (4, 8)
    assert stored.positions.shape == (4, 8 // share)
    assert (stored.positions.dtype, repr(stored)[:9]) == (np.uint8, "NMSparse(")
    np.testing.assert_array_equal(stored.to_dense(), dense)
    x = jax.random.normal(jax.random.key(9), (3, 16))
    np.testing.assert_allclose(x @ stored, x @ dense, atol=1e-5)
    _, grads = value_and_grad(lambda w: jnp.sum(jnp.sin(x @ w)))(stored)
    expected = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(dense) * (dense != 0)
    np.testing.assert_allclose(dataclasses.replace(stored, values=grads.values).to_dense(), expected, atol=1e-5)


def test_edges_are_zero_and_get_no_gradient():
    dense, stored = weight((10, 7), Block((4, 4)), 0.0)
    inside = np.broadcast_to(stored.live(stored.active), stored.values.shape)
    assert inside.sum() == 70
    assert not np.asarray(stored.values)[~inside].any()
    x = jax.random.normal(jax.random.key(3), (5, 10))
    _, grads = value_and_grad(lambda w: jnp.sum(jnp.sin(x @ w)))(stored)
    assert not np.asarray(grads.values)[~inside].any()
    expected = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(dense)
    np.testing.assert_allclose(dataclasses.replace(stored, values=grads.values).to_dense(), expected, atol=1e-5)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads.lists))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_probe_measures_every_block_when_it_is_asked_to(pooling):
    structure = Block((4, 4), pooling)
    dense, stored = weight((10, 12), structure)
    x = jax.random.normal(jax.random.key(3), (5, 10))
    loss = lambda w: jnp.sum(jnp.sin(x @ w))  # noqa: E731
    expected = structure.pool(jnp.abs(jax.grad(loss)(dense)))
    for when in (0, 1):
        asked = dataclasses.replace(stored, probe_when=jnp.int32(when))
        _, grads = jax.jit(value_and_grad(loss))(asked)
        np.testing.assert_allclose(grads.probe, expected * when, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")  # treescope walks through all of numpy
def test_it_looks_like_an_array_in_print():
    _, stored = weight((16, 32), Block((4, 4), "l2", groups=2), 0.75, capacity=0.5)
    assert repr(stored) == "BlockSparse(float32[16,32], 8 of 32 blocks of 4x4, l2, 2 groups)"
    assert stored.capacity == 16
    assert "room for 16" in repr(jax.eval_shape(lambda: stored))
    assert repr(jax.tree.map(lambda _: None, stored)).startswith("BlockSparse(")
    assert "BlockSparse" in treescope.render_to_text(stored)


def test_stacked_layers_scan():
    rules = [("stack", Roles(in_axes=(1,), out_axes=(2,), batch_axes=(0,))), ("stack", Block((4, 4)))]
    dense = jax.random.normal(jax.random.key(0), (3, 8, 8)).at[:, :4, 4:].set(0)
    stored = to_sparse({"stack": dense}, None, rules)["stack"]
    x = jax.random.normal(jax.random.key(1), (2, 8))
    out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stored)
    expected = x
    for layer in dense:
        expected = jnp.tanh(expected @ layer)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    with pytest.raises(ValueError, match="stacks layers"):
        x @ stored


@pytest.mark.parametrize(("mask", "fits"), [((slice(4), slice(4)), True), ((slice(8), slice(4)), False), (0, False)])
def test_under_jit_what_does_not_fit_is_nan(mask, fits):
    mask = jnp.zeros((8, 8), bool).at[mask].set(True)
    store = lambda mask: to_sparse({"kernel": jnp.ones((8, 8))}, {"kernel": mask}, Block((4, 4)), capacity=0.25)  # noqa: E731
    dense = to_dense(jax.jit(store)(mask))["kernel"]
    np.testing.assert_array_equal(dense, jnp.where(mask, 1.0, 0.0) if fits else jnp.where(dense == 0, 0.0, jnp.nan))
    assert fits or np.isnan(dense).any()


def test_it_is_no_array():
    _, stored = weight((8, 8), Block((4, 4)))
    with pytest.raises(TypeError, match=r"to_dense\(weight\) makes one"):
        np.asarray(stored)
    with pytest.raises(TypeError, match="write x @ weight, with inputs as rows"):
        stored @ jnp.ones((8, 2))


@pytest.mark.parametrize("structure", [Block((4, 4), pooling="l2"), NM(2, 4)])
def test_second_derivatives_are_those_of_the_dense_weight(structure):
    with jax.enable_x64(True):
        dense, stored = weight((8, 12), structure)
        x, along = (jax.random.normal(jax.random.key(seed), (5, 8)) for seed in (7, 8))

        def product(loss_grad, weight):
            return jax.grad(lambda w, x: jnp.vdot(loss_grad(w, x), along), argnums=(0, 1), allow_int=True)(weight, x)

        loss_grad = jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2), argnums=1)
        by_weight, by_x = product(loss_grad, stored)
        dense_by_weight, dense_by_x = product(loss_grad, dense)
        np.testing.assert_allclose(by_x, dense_by_x, atol=1e-12)
        got = dataclasses.replace(stored, values=by_weight.values).to_dense()
        kept = dataclasses.replace(stored, values=jnp.ones_like(stored.values)).to_dense()
        np.testing.assert_allclose(got, dense_by_weight * kept, atol=1e-12)


def test_checkpoints_come_back_on_another_mesh(tmp_path):
    _, stored = weight((16, 32), Block((4, 4), groups=4), 0.75)
    mesh = jax.make_mesh((4,), ("model",))
    state = {"kernel": stored}
    place = lambda leaf: NamedSharding(mesh, PartitionSpec("model") if leaf.ndim == 4 else PartitionSpec())  # noqa: E731
    with Checkpointer(tmp_path / "here") as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), state)
        restored = checkpoints.restore(like)
    chex.assert_trees_all_equal(restored, state)
    assert restored["kernel"].sharding.spec[0] == "model"
    assert restored["kernel"].structure == stored.structure


@pytest.mark.parametrize(("structure", "wrapped"), [(Block((4, 4)), False), (NM(2, 4), False), (NM(2, 4), True)])
def test_patterns_that_stay_are_trained_by_any_optimizer(structure, wrapped):
    """Weight decay of an optimizer that knows nothing of indices does not move them."""
    dense, stored = weight((8, 12), structure)
    mask = dense != 0
    x = jax.random.normal(jax.random.key(5), (6, 8))
    optimizer = plain = optax.adamw(0.1, weight_decay=0.5)
    if wrapped:
        optimizer = sparsify(plain, from_masks({"kernel": mask}))

    @functools.partial(jax.jit, static_argnums=0)
    def train(optimizer, params, mask):
        state = optimizer.init(params)
        for _ in range(3):
            _, grads = value_and_grad(lambda params: jnp.sum(jnp.sin(x @ params["kernel"])))(params)
            grads = grads if mask is None else {"kernel": grads["kernel"] * mask}
            updates, state = optimizer.update(grads, state, params)
            params = apply_updates(params, updates)
        return to_dense(params)

    got = train(optimizer, {"kernel": stored}, None)
    chex.assert_trees_all_close(got, train(plain, {"kernel": dense}, mask), atol=1e-5)


@pytest.mark.parametrize("structure", [Block((4, 4)), NM(2, 4)])
def test_indices_that_were_taken_for_weights_are_noticed(structure):
    _, stored = weight((8, 12), structure)
    params = {"kernel": stored}
    optimizer = optax.adamw(0.1, weight_decay=0.5)

    def step(params):
        value, grads = value_and_grad(lambda params: jnp.sum(jnp.ones((2, 8)) @ params["kernel"]))(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return value, optax.apply_updates(params, updates)

    value, damaged = step(params)
    assert jnp.isfinite(value)
    with pytest.raises(ValueError, match=r"kernel: .* has damaged indices.*apply_updates"):
        step(damaged)
    assert jnp.isnan(jax.jit(step)(damaged)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, None, Block((16, 16))), "kernel: a block of"),
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, {"bias": jnp.ones(8, bool)}, Block((4, 4))), "bias"),
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, {"kernel": jnp.ones((8, 8))}, Block((4, 4))), "bool"),
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, None, Block((4, 4)), capacity=0.25), "larger capacity"),
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, None, Block((4, 4)), capacity="all"), "capacity is all"),
        (
            lambda: to_sparse({"kernel": jnp.ones((8, 8))}, {"kernel": jnp.eye(8, dtype=bool)}, Block((4, 4))),
            "kernel: the mask keeps parts of blocks of 4x4.*make masks with",
        ),
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, None, "block"), "'block' cannot be stored"),
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, {}, Block((4, 4))), r"masks are given for \[\]"),
        (lambda: weight((8, 8), Block((4, 4)))[1].astype(int), "must be floating, not int"),
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, None, NM(2, 4)), "keeps 4 of 4"),
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, None, {}), "no leaf would be stored"),
        (lambda: Block((4, 4), groups=3).mask(jnp.ones((8, 8)), 0.5), "equal groups"),
        (lambda: to_sparse({"kernel": jnp.ones((8, 8))}, optax.MaskedNode(), Block((4, 4))), "no leaf would be stored"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
