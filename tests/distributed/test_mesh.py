"""Given the same gradients, masks and weights on a mesh are those of one device, bit for bit."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import sparsejax
from experiments.configs import digits_conv
from experiments.configs.bytes_lm import EXPERIMENT
from experiments.experiment import UsageError
from experiments.sharding import BATCH, Layout, make_mesh, place_devices
from experiments.storage import BlocksOnMesh
from experiments.variant import Variant
from sparsejax.masks.paths import named_leaves

BLOCKS = sparsejax.Block((8, 8), groups=2)
ALGORITHMS = {
    "rigl": lambda: sparsejax.rigl(0.8, update_every=2),
    "blocks": lambda: sparsejax.rigl(0.5, structure=BLOCKS, update_every=2),
    "stored": lambda: sparsejax.rigl(0.5, structure=BLOCKS, distribution=sparsejax.uniform, update_every=2),
    "nm": lambda: sparsejax.sr_ste(2, 4),
}
SHAPES = {"attention": {"query": {"kernel": (32, 4, 16)}}, "up": {"kernel": (32, 64)}, "down": {"kernel": (64, 32)}}


def draw(like, seed: int):
    """Random numbers in the place of floating leaves, zeros in that of integers."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    drawn = [
        jax.random.normal(k, leaf.shape) if f else jnp.zeros_like(leaf)
        for k, f, leaf in zip(keys, floating, leaves, strict=True)
    ]
    return tree.unflatten(drawn)


def updated(name: str, layout: Layout | None):
    """Parameters and state after five updates; masks move in three of them."""
    optimizer = sparsejax.sparsify(optax.adam(1e-2), ALGORITHMS[name]())
    shapes = jax.tree.map(lambda s: jnp.zeros(s), SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    params = draw(shapes, 0)
    if name == "stored":
        state = optimizer.init(params)
        params = sparsejax.to_sparse(sparsejax.mask_params(params, state), sparsejax.masks_of(state), BLOCKS)
    grads = [draw(params, step) for step in range(1, 6)]
    init, update = optimizer.init, optimizer.update
    if layout is None:
        init, update = jax.jit(init), jax.jit(update)
    else:
        placed = layout.of_state(params, params)
        of_state = layout.of_state(jax.eval_shape(init, params), params)
        init, update = jax.jit(init, out_shardings=of_state), jax.jit(update, out_shardings=(placed, of_state))
        params, grads = jax.device_put(params, placed), [jax.device_put(g, placed) for g in grads]
    state = init(params)
    for each in grads:
        updates, state = update(each, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("name", "axis_types"),
    [
        ("rigl", "explicit"),
        ("stored", "explicit"),
        ("nm", "auto"),
        ("nm", "explicit"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("rigl", "auto"), ("stored", "auto"), ("blocks", "auto"), ("blocks", "explicit")]
        ),
    ],
)
def test_masks_are_those_of_one_device_given_the_same_gradients(name, axis_types):
    layout = Layout(make_mesh((2, 2, 2), axis_types))
    params, state = updated(name, None)
    with layout.context():
        params_there, state_there = updated(name, layout)
    for (path, here), (_, there) in zip(
        named_leaves(sparsejax.masks_of(state)), named_leaves(sparsejax.masks_of(state_there)), strict=True
    ):
        np.testing.assert_array_equal(there, here, err_msg=path)
        assert name == "stored" or not there.is_fully_replicated
    for (path, here), (_, there) in zip(named_leaves(params), named_leaves(params_there), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-6, atol=1e-7, err_msg=path)
        assert not (path.endswith(("kernel", "values")) and there.is_fully_replicated), path


@pytest.mark.slow
@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
@pytest.mark.parametrize("name", ["rigl", "stored"])
def test_the_trainer_on_a_mesh_trains_as_on_one_device(name, axis_types):
    ends = []
    for layout in (None, Layout(make_mesh((2, 2, 2), axis_types))):
        variant = tiny.variant(name, layout)
        state, data, losses = variant.first_state(0), iter(variant.task.batches(0)), []
        for _ in range(3):
            state, (loss, _) = variant.run_step(state, variant.place(next(data)), np.uint32(0))
            losses.append(float(loss))
        if layout is not None:
            for (path, leaf), sharding in zip(named_leaves(state), jax.tree.leaves(variant.placed), strict=True):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
        ends.append((losses, variant.evaluate(state), variant.masks(state)))
    (losses, sums, masks), (losses_there, sums_there, masks_there) = ends
    np.testing.assert_allclose(losses_there, losses, rtol=1e-5)
    for name in sums:
        np.testing.assert_allclose(sums_there[name], sums[name], rtol=1e-5)
    for (path, here), (_, there) in zip(named_leaves(masks), named_leaves(masks_there), strict=True):
        assert int(jnp.sum(here)) == int(jnp.sum(there))
        assert np.mean(np.asarray(here) != np.asarray(there)) < 0.01, path


def products(weight, x, dy):
    """y = x W, and the gradients of the sum of y * dy: of x, and of the stored weight."""

    def total(params):
        y = params["weight"].matmul(params["x"])
        return jnp.sum(y * dy), y

    (_, y), grads = sparsejax.value_and_grad(total, has_aux=True)({"weight": weight, "x": x})
    return y, grads["x"], grads["weight"]


@pytest.mark.parametrize(
    ("mesh", "groups"),
    [((2, 2, 2), 4), *(pytest.param(*c, marks=pytest.mark.slow) for c in [((1, 1, 8), 8), ((2, 1, 4), 2)])],
)
def test_products_of_stored_blocks_on_a_mesh_are_those_of_one_device(mesh, groups):
    """`tensor` splits output columns group by group; where it does not divide the groups, all of them stay whole."""
    structure, layout = sparsejax.Block((8, 8), groups=groups), Layout(make_mesh(mesh))
    x, dy, dense = (draw(jnp.zeros(shape), seed) for seed, shape in enumerate([(8, 5, 32), (8, 5, 64), (32, 64)]))
    mask = structure.mask(jnp.abs(dense), 0.5)
    weight = sparsejax.to_sparse({"kernel": dense}, {"kernel": mask}, structure)["kernel"]
    weight = dataclasses.replace(weight, probe_when=jnp.int32(1))
    y, dx, dweight = jax.jit(products)(weight, x, dy)
    spread = BlocksOnMesh(**vars(weight))
    with layout.context():
        there = jax.jit(products)(spread, jax.device_put(x, layout.sharding(BATCH)), dy)
    split = groups % mesh[2] == 0
    assert there[0].sharding.is_equivalent_to(layout.sharding(BATCH, None, "tensor" if split else None), 3)
    np.testing.assert_array_equal(there[0], y)  # each output is summed on one device
    np.testing.assert_allclose(there[1], dx, rtol=1e-5, atol=1e-5)
    for leaf in ("values", "probe"):
        np.testing.assert_allclose(getattr(there[2], leaf), getattr(dweight, leaf), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_batch_statistics_beside_stored_blocks_are_those_of_the_whole_batch():
    config = dataclasses.replace(
        digits_conv.Config(),
        storage="block",
        block_groups=2,
        dense_layers=("stem_conv/kernel", "head/kernel"),
        channels=(8, 16),
        batch_size=16,
        sparsity=0.5,
        learning_rate=1e-3,
    )
    task, ends = digits_conv.EXPERIMENT.task(config), []
    task = dataclasses.replace(task, heldout=[jax.tree.map(lambda rows: rows[:16], batch) for batch in task.heldout])
    for layout in (None, Layout(make_mesh((2, 2, 2)))):
        variant = Variant(digits_conv.EXPERIMENT, config, "rigl", task, layout)
        state = variant.first_state(0)
        state, (loss, _) = variant.run_step(state, variant.place(next(iter(task.batches(0)))), np.uint32(0))
        ends.append((loss, state.rest, variant.evaluate(state)))
    assert jax.tree.leaves(ends[0][1])
    for one, eight in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is made from of a TPU v5p that is not here."""

    id: int
    coords: tuple[int, int, int]
    process_index: int
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def pod(x: int, y: int, z: int, slices: int = 1) -> list[Chip]:
    """The chips of slices of one shape; a host has 2 x 2 x 1 of them."""
    hosts = x * y * z // 4
    return [
        Chip(i, (a, b, c), s * hosts + (c * y // 2 + b // 2) * x // 2 + a // 2, s)
        for i, (s, c, b, a) in enumerate(itertools.product(range(slices), range(z), range(y), range(x)))
    ]


@pytest.mark.parametrize("shape", [(-1, 16, 1), (-1, 8, 1), (-1, 8, 2)])
def test_mesh_axes_may_split_an_axis_of_the_slice(shape):
    there = pod(4, 4, 8)
    mesh = make_mesh(shape, devices=there)
    assert mesh.devices.shape == (128 // (shape[1] * shape[2]), *shape[1:])
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(128))


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 4, 2), (64, 1, 1), (1, 16, 4)])
def test_devices_along_tensor_are_of_one_process(shape):
    """`Layout.place_batch` puts as many rows on the devices of every process."""
    placed = make_mesh(shape, devices=pod(4, 4, 4)).devices
    assert placed.shape == shape
    for along in placed.reshape(-1, shape[2]):
        assert len({chip.process_index for chip in along}) == 1


@pytest.mark.parametrize("shape", [(8, 1, 8), (-1, 2, 16), (1, 1, -1)])
def test_tensor_over_several_processes_is_refused(shape):
    with pytest.raises(UsageError, match="make tensor a divisor of 4, the devices of a process"):
        make_mesh(shape, devices=pod(4, 4, 4))


def test_several_slices_split_data():
    placed = place_devices((4, 8, 1), pod(2, 2, 4, slices=2))
    assert {chip.slice_index for chip in placed[:2].flat} == {0}
    assert {chip.slice_index for chip in placed[2:].flat} == {1}
    with pytest.raises(UsageError, match=r"mesh is \(1, 32, 1\): data = 1 is split over 2 slices"):
        place_devices((1, 32, 1), pod(2, 2, 4, slices=2))


def test_a_batch_must_divide_over_the_mesh():
    config = tiny.config(batch_size=6)
    with pytest.raises(UsageError, match="batch_size is 6; the mesh's data x fsdp, 4, must divide it"):
        Variant(EXPERIMENT, config, "rigl", EXPERIMENT.task(config), Layout(make_mesh((2, 2, 2))))
