import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.masks.block import Block
from sparsejax.masks.channel import Channel
from sparsejax.masks.nm import NM
from sparsejax.masks.packing import pack_mask, unpack_mask
from sparsejax.masks.select import select_top, select_top_global
from sparsejax.masks.unstructured import Unstructured

SPECS = (P("data", "model"), P(None, "data"), P(("data", "model"), None), P(None, None))
STRUCTURES = (
    (Unstructured(), 0.7),
    (NM(2, 4), None),
    (NM(1, 8), None),
    (NM(2, 4, axis=-1), None),
    (NM(2, 4, share=4), None),
    (Block((4, 4)), 0.5),
    (Block((8, 16), "l2"), 0.5),
    (Block((5, 7), "max"), 0.6),
    (Channel(), 0.5),
    (Channel(axis=0), 0.5),
)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(request.param,) * 2)


def _scores(dtype=np.float32):
    return np.random.default_rng(0).integers(0, 50, (16, 32)).astype(dtype)


def _is_placed_like(mask, scores):
    return mask.sharding.is_equivalent_to(scores.sharding, scores.ndim)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_masks_and_shardings_are_those_of_one_device(mesh, spec):
    scores, where = _scores(), np.random.default_rng(1).random((16, 32)) < 0.5
    placed, allowed = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (scores, where))
    for count in (0, 51, 512):
        with jax.set_mesh(mesh):
            mask = jax.jit(select_top)(placed, count, where=allowed)
        np.testing.assert_array_equal(mask, select_top(scores, count, where=where))
        assert _is_placed_like(mask, placed)
        mask = select_top(placed, count)  # no mesh but the scores' own
        np.testing.assert_array_equal(mask, select_top(scores, count))
        assert _is_placed_like(mask, placed)


def test_global_selection_over_leaves_with_their_own_shardings(mesh):
    arrays = [_scores(), _scores() + 3, _scores()[0]]
    specs = [P("data", "model"), P(None, "data"), P("model")]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
        masks = jax.jit(select_top_global)(placed, 300)
    for mask, other, expected in zip(masks, placed, select_top_global(arrays, 300), strict=True):
        np.testing.assert_array_equal(mask, expected)
        assert _is_placed_like(mask, other)


def test_devices_exchange_a_few_whole_numbers_only(mesh):
    with jax.set_mesh(mesh):
        placed = jax.device_put(_scores(), NamedSharding(mesh, P("data", "model")))
        text = jax.jit(select_top).lower(placed, 51).compile().as_text()
    exchanged = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-\w+|collective-\w+|reduce-scatter)\(", text)
    assert exchanged
    for dtype, shape in exchanged:
        assert dtype == "s32"
        assert math.prod(int(size) for size in shape.split(",") if size) <= 8


@pytest.mark.parametrize(("structure", "sparsity"), STRUCTURES, ids=str)
def test_structures_under_explicit_sharding(structure, sparsity):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    scores = _scores()
    with jax.set_mesh(mesh):
        placed = jax.device_put(scores, NamedSharding(mesh, P("data", "model")))
        mask = jax.jit(lambda s: structure.mask(s, sparsity))(placed)
    np.testing.assert_array_equal(mask, jax.jit(lambda s: structure.mask(s, sparsity))(scores))
    assert _is_placed_like(mask, placed)


@pytest.mark.parametrize("structure", [NM(1, 8), Block((5, 7))], ids=str)
def test_structures_outside_jit(mesh, structure):
    scores = _scores()
    sparsity = None if isinstance(structure, NM) else 0.5
    with jax.set_mesh(mesh):
        placed = jax.device_put(scores, NamedSharding(mesh, P("data", "model")))
        mask = structure.mask(placed, sparsity)
    np.testing.assert_array_equal(mask, structure.mask(scores, sparsity))
    assert _is_placed_like(mask, placed)


@pytest.mark.parametrize(
    ("spec", "columns"), [(P("data", "model"), 32), (P("data", "model"), 40), (P("data"), 6)], ids=str
)
def test_packing_keeps_the_sharding_of_leading_axes(mesh, spec, columns):
    mask = np.random.default_rng(2).random((8, columns)) < 0.5
    with jax.set_mesh(mesh):
        placed = jax.device_put(mask, NamedSharding(mesh, spec))
        packed = jax.jit(pack_mask)(placed)
        np.testing.assert_array_equal(packed, np.packbits(mask, axis=-1))
        np.testing.assert_array_equal(jax.jit(unpack_mask, static_argnums=1)(packed, mask.shape), mask)
        if mesh.axis_types[0] == AxisType.Explicit:
            assert jax.typeof(packed).sharding.spec[0] == spec[0]


def test_vmap_over_a_sharded_stack(mesh):
    stack = np.stack([_scores(), _scores().T.reshape(16, 32)] * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(stack, NamedSharding(mesh, P(None, "data", "model")))
        masks = jax.jit(jax.vmap(lambda s: select_top(s, 100)))(placed)
    np.testing.assert_array_equal(masks, jnp.stack([select_top(s, 100) for s in stack]))
