"""What one can do with a compiled mask."""

import jax
import numpy as np
import pytest

from sparsejax.attention import BlockDense, Causal, Documents, Local, Segment, Sink, compile_mask

SIZES = {"bq": 4, "bk": 3, "q_len": 14, "kv_len": 14}
MASK = Causal() & (Local(4) | Sink(2)) & Segment(np.repeat([0, 1], [9, 5]))


def test_transpose_has_queries_and_keys_exchanged():
    mask = compile_mask(MASK, **SIZES)
    np.testing.assert_array_equal(mask.transpose().to_dense()[0, 0], np.asarray(mask.to_dense())[0, 0].T)
    assert (mask.transpose().lists.bq, mask.transpose().lists.bk) == (3, 4)


def test_rows_can_be_cut_out():
    mask = compile_mask(MASK, **SIZES)
    np.testing.assert_array_equal(mask.slice_rows(2, 2).to_dense()[0, 0], mask.to_dense()[0, 0, 8:])
    with pytest.raises(ValueError, match="4 blocks of queries"):
        mask.slice_rows(3, 2)


def test_positions_can_be_exchanged():
    mask = compile_mask(Causal(), 4, 4, bq=4, bk=4)
    moved = mask.with_positions(q_positions=np.arange(4) + 2)
    np.testing.assert_array_equal(moved.to_dense()[0, 0], np.tri(4, 4, 2, dtype=bool))
    with pytest.raises(ValueError, match="q_pos has shape"):
        mask.with_positions(q_positions=np.arange(3))


def test_tiles_of_both():
    a, b = compile_mask(MASK, **SIZES), compile_mask(Local(3, 3) & Documents([5, 9]), **SIZES)
    np.testing.assert_array_equal((a & b).to_dense(), a.to_dense() & b.to_dense())
    blocks = compile_mask(BlockDense(np.eye(4, 5, dtype=bool), 4, 3), **SIZES)
    np.testing.assert_array_equal((a & blocks).to_dense(), a.to_dense() & blocks.to_dense())
    with pytest.raises(ValueError, match="differ in"):
        a & compile_mask(MASK, 14, 14, bq=2, bk=3)


def test_counts():
    mask = compile_mask(Causal(), 16, 16, bq=4, bk=4)
    assert float(mask.density()) == 10 / 16
    assert float(mask.flops(2, 3, 8)) == 2 * 3 * 10 * 2 * 4 * 4 * 16
    assert float(mask.flops(2, 3, 8, backward=True)) == 2 * 3 * 10 * 2 * 4 * 4 * 40


def test_is_a_pytree():
    mask = compile_mask(MASK, **SIZES)
    leaves, structure = jax.tree.flatten(mask)
    again = jax.tree.unflatten(structure, leaves)
    assert again.lists.elem == mask.lists.elem
    assert jax.tree.structure(again) == structure
    other = compile_mask(Causal() & (Local(4) | Sink(2)) & Segment(np.repeat([0, 1], [9, 5])), **SIZES)
    assert jax.tree.structure(other) == structure


def test_drawings():
    mask = compile_mask(Causal() & Local(5), 20, 20, bq=4, bk=4)
    assert mask.show().splitlines()[1:] == ["▒····", "▒▒···", "▒▒▒··", "·▒▒▒·", "··▒▒▒"]
    assert mask.show(size=3).splitlines() == [
        "Causal() & Local(5): density 0.48, 2 x 2 tiles a sign",
        "▓··",
        "▓▓·",
        "·██",
    ]
    figure = mask.picture()
    assert figure.axes[0].get_title() == "Causal() & Local(5): density 0.48"
    with pytest.raises(ValueError, match="batch=2; this mask has 2"):
        compile_mask(Segment(np.zeros((2, 4), int)), 4, 4).show(batch=2)
    for arguments, message in (({"head": -1}, "head=-1; this mask has 1"), ({"size": 0}, "size=0; a drawing needs 1")):
        with pytest.raises(ValueError, match=message):
            mask.show(**arguments)
    with pytest.raises(ValueError, match="is traced: only lists that are known can be drawn"):
        jax.eval_shape(lambda ids: compile_mask(Segment(ids), 4, 4).show(), np.zeros(4, int))
