import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.block import Block
from sparsejax.masks.counts import keep_count
from tests.masks.oracles import block_mask, top_mask

SHAPES = [((4, 4), (8, 12)), ((4, 4), (5, 4)), ((2, 3), (7, 8)), ((1, 8), (3, 3, 5, 17)), ((8, 1), (2, 9, 4))]


@pytest.mark.parametrize("pooling", ["mean", "max", "l2"])
@pytest.mark.parametrize(("block", "shape"), SHAPES)
def test_equals_loops_over_blocks(block, shape, pooling):
    # Quarters add up exactly in any order, so that ties are ties in both; norms are told apart by random numbers.
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(shape) if pooling == "l2" else rng.integers(-8, 8, shape) / 4
    structure = Block(block, pooling)
    units = int(np.prod(structure.grid(shape)))
    for sparsity in (0.0, 0.3, 0.75):
        mask = structure.mask(jnp.asarray(scores, jnp.float32), sparsity)
        np.testing.assert_array_equal(mask, block_mask(scores, block, pooling, keep_count(units, sparsity)))


@hypothesis.given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 9),
)
@hypothesis.settings(deadline=None, max_examples=12)
def test_spread_of_units_covers_exactly_their_elements(rows, columns, block, seed):
    hypothesis.assume(block[0] <= rows and block[1] <= columns)
    structure = Block(block)
    units = np.random.default_rng(seed).random(structure.grid((rows, columns))) < 0.5
    expected = [[units[r // block[0], c // block[1]] for c in range(columns)] for r in range(rows)]
    np.testing.assert_array_equal(structure.spread(jnp.asarray(units), (rows, columns)), expected)


def test_grid_keeps_leading_axes():
    assert Block((4, 4)).grid((3, 5, 9, 8)) == (3, 5, 3, 2)


def test_equal_blocks_are_kept_in_order():
    mask = Block((2, 2)).mask(jnp.ones((4, 4)), 0.5)
    assert mask.tolist() == [[1, 1, 1, 1]] * 2 + [[0, 0, 0, 0]] * 2


def test_partial_blocks_are_judged_by_what_they_have():
    scores = jnp.array([[1.0, 1.0, 2.0]])
    assert Block((1, 2), "mean").pool(scores).tolist() == [[1.0, 2.0]]
    assert Block((1, 2), "max").pool(-scores).tolist() == [[-1.0, -2.0]]
    np.testing.assert_allclose(Block((1, 2), "l2").pool(scores), [[2**0.5, 2.0]], rtol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "max", "l2"])
def test_a_block_with_a_nan_is_kept_last(pooling):
    scores = jnp.ones((2, 4)).at[0, 0].set(jnp.nan)
    assert Block((2, 2), pooling).mask(scores, 0.5).tolist() == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.bool_, jnp.float8_e4m3fn])
def test_every_real_dtype(dtype):
    scores = jnp.eye(4).astype(dtype)
    for pooling in ("mean", "max", "l2"):
        assert Block((2, 2), pooling).mask(scores, 0.5).tolist() == np.kron(np.eye(2), np.ones((2, 2))).tolist()


def test_choose_and_refill_are_selections_of_units():
    rng = np.random.default_rng(1)
    units, where = rng.integers(0, 5, (4, 6)).astype(np.float32), rng.random((4, 6)) < 0.6
    structure = Block((2, 2))
    np.testing.assert_array_equal(structure.choose(units, 9, where=where), top_mask(units, 9, where))
    filled = np.asarray(structure.refill(units, where, int(where.sum()) + 3))
    np.testing.assert_array_equal(filled, where | top_mask(units, 3, ~where))


def test_under_jit_and_vmap():
    scores = jnp.asarray(np.random.default_rng(2).standard_normal((3, 8, 10)), jnp.float32)
    structure = Block((4, 4), "max")
    masks = jax.jit(jax.vmap(lambda s: structure.mask(s, 0.5)))(scores)
    np.testing.assert_array_equal(masks, [structure.mask(s, 0.5) for s in scores])


def test_blocks_given_as_lists_are_values():
    assert Block([2, 2]) == Block((2, 2))
    assert hash(Block([2, 2])) == hash(Block((2, 2)))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"fc: a block of \(8, 8\) is larger than the last two axes of shape \(4, 16\)",
            lambda: Block((8, 8)).check((4, 16), "fc"),
        ),
        (r"rules=\{'fc': None\}", lambda: Block((8, 8)).check((4, 16), "fc")),
        ("is larger", lambda: Block((1, 2)).check((4,))),
        ("is larger", lambda: Block((8, 8)).mask(jnp.ones((4, 16)), 0.5)),
        ("two positive numbers", lambda: Block((4,))),
        ("two positive numbers", lambda: Block((0, 4))),
        ('"mean", "max" or "l2", got', lambda: Block((4, 4), "median")),
        ("sparsity must be", lambda: Block((4, 4)).mask(jnp.ones((4, 16)), 1.0)),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [4, None, (4.0, 4), ("4", 4), "44"])
def test_a_shape_that_is_no_pair_of_whole_numbers_is_refused(shape):
    with pytest.raises(TypeError, match=rf"Block\(shape={re.escape(repr(shape))}\): give two whole numbers"):
        Block(shape)
    with pytest.raises(TypeError, match=r"Block\(groups=1\.5\): give a whole number"):
        Block((4, 4), groups=1.5)


def test_itertools_of_leading_axes_compete():
    scores = jnp.zeros((2, 2, 2, 2)).at[1, 1].set(1.0)
    mask = np.asarray(Block((2, 2)).mask(scores, 0.75))
    for lead in itertools.product(range(2), range(2)):
        assert mask[lead].all() == (lead == (1, 1))
