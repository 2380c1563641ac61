"""Checkpoints: everything comes back bit for bit, and whatever does not is an error that names the leaf."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from sparsejax.checkpoint import Checkpointer, CheckpointError, DamagedCheckpointError
from sparsejax.checksums import checksums
from sparsejax.manifest import describe


class MaskState(NamedTuple):
    mask_step: Any
    masks: Any
    inner_state: Any


class Counter:
    """A data iterator with a position, as grain's are to a checkpoint."""

    def __init__(self):
        self.index = 0

    def __next__(self):
        self.index += 1
        return self.index

    def get_state(self):
        return {"next_index": self.index}

    def set_state(self, state):
        self.index = state["next_index"]

    async def save(self, directory):
        text = str(self.index)

        async def write():
            (await directory.await_creation() / "position").write_text(text)

        return write()

    async def load(self, directory):
        async def read():
            self.index = int((directory / "position").read_text())

        return read()


def training_state(seed: int = 0, mask_step: int = 5):
    key = jax.random.key(seed)
    params = {
        "layers": [{"kernel": jax.random.normal(key, (64, 48)), "bias": jnp.zeros(48, jnp.bfloat16)}],
        "none": None,
    }
    masks = {"layers": [{"kernel": jax.random.uniform(key, (64, 48)) < 0.1, "bias": optax.MaskedNode()}], "none": None}
    return {
        "params": params,
        "opt_state": MaskState(jnp.int32(mask_step), masks, optax.adam(1e-3).init(params)),
        "key": key,
        "keys": jax.random.split(key, 3),
        "empty": jnp.zeros((0, 4)),
        "host": np.arange(3, dtype=np.float64),
        "flops": 12345678901234,
        "rate": 0.1,
        "done": True,
    }


def assert_bit_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert describe(got) == describe(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(directory, *steps, state=None, **options):
    with Checkpointer(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, training_state(step) if state is None else state)


def data_file(directory: Path, step: int, least: int = 4096) -> Path:
    """A file of the step that holds array values."""
    files = [path for path in (directory / str(step)).rglob("d/*") if path.stat().st_size > least]
    return max(files, key=lambda path: path.stat().st_size)


# Checksums


@pytest.mark.parametrize(
    "dtype",
    [bool, "int8", "uint16", "int32", "float16", "float32", "complex64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn],
)
def test_checksums_of_host_and_device_agree(dtype):
    host = (np.random.default_rng(0).normal(size=(5, 7, 3)) * 3).astype(dtype)
    for array in (host, host[0, 0, 0]):
        assert checksums({"a": np.asarray(array)}) == checksums({"a": jnp.asarray(array)})


@pytest.mark.parametrize("dtype", ["int64", "float64", "complex128"])
def test_checksums_of_wide_numbers_agree(dtype):
    with jax.enable_x64(True):
        host = (np.random.default_rng(0).normal(size=(5, 7)) * 3).astype(dtype)
        assert checksums({"a": host}) == checksums({"a": jnp.asarray(host)})


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "y"), P("x", "y"), P(("x", "y"))])
@pytest.mark.parametrize("axis_type", list(jax.sharding.AxisType)[:2])
def test_checksums_do_not_depend_on_sharding(spec, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    array = jax.random.normal(jax.random.key(0), (16, 8))
    tree = {"value": array, "mask": array > 0, "alone": jnp.arange(3)}
    placed = tree | jax.device_put({name: tree[name] for name in ("value", "mask")}, NamedSharding(mesh, spec))
    assert describe(placed) == describe(tree)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from(["uint8", "uint16", "uint32", "float64"]))
def test_checksums_see_every_single_bit_flip_and_every_swap(seed, size, dtype):
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 256, size=size * np.dtype(dtype).itemsize, dtype=np.uint8)
    view = lambda raw: checksums({"a": raw.view(dtype)})["a"][0]  # noqa: E731
    before = view(array)
    for _ in range(8):
        flipped = array.copy()
        flipped[rng.integers(array.size)] ^= np.uint8(1 << rng.integers(8))
        assert view(flipped) != before
    words = array.view(dtype)
    i, j = rng.integers(size, size=2)
    swapped = words.copy()
    swapped[[i, j]] = swapped[[j, i]]
    assert (view(swapped.view(np.uint8)) == before) == (swapped.tobytes() == words.tobytes())


# Round trips


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = training_state()
    saved(tmp_path, 3, state=state)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 3
        assert_bit_equal(checkpoints.restore(state), state)


def test_restores_from_abstract_arrays(tmp_path):
    state = {name: leaf for name, leaf in training_state().items() if name in ("params", "opt_state", "key", "empty")}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        assert_bit_equal(checkpoints.restore(jax.eval_shape(lambda: state)), state)


def test_python_numbers_come_back_whole_where_eval_shape_narrows_them(tmp_path):
    state = {"flops": 2**31 - 1, "temperature": 0.1, "count": jnp.int32(3), "seen": 5}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
        assert restored == state
        assert [type(restored[name]) for name in ("flops", "temperature", "seen")] == [int, float, int]
        for other, message in [(jnp.float32, "int64.*float32"), (jnp.int8, "int64.*int8")]:
            with pytest.raises(CheckpointError, match=message):
                checkpoints.restore(jax.eval_shape(lambda: state) | {"seen": jax.ShapeDtypeStruct((), other)})


@pytest.mark.parametrize("pure", [True, False])
def test_flax_states_come_back(tmp_path, pure):
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    state = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    state = nnx.as_pure(state) if pure else state
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(state)
    assert_bit_equal(restored, state)
    nnx.update(model, restored["model"])


def test_restores_onto_another_mesh_and_into_part_of_a_tree(tmp_path):
    meshes = [jax.make_mesh((8,), ("d",)), jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])]
    values = jax.random.normal(jax.random.key(0), (16, 8))
    state = {"w": jax.device_put(values, NamedSharding(meshes[0], P("d"))), "other": jnp.ones(3)}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        sharding = NamedSharding(meshes[1], P("b", "a"))
        abstract = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)}
        restored = checkpoints.restore(abstract, partial=True)
        assert restored["w"].sharding == sharding
        np.testing.assert_array_equal(restored["w"], values)
        with pytest.raises(CheckpointError, match=r"also has other.*partial=True"):
            checkpoints.restore(abstract)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = {f"w{i}": jnp.zeros((512, 512)) for i in range(4)}
    with Checkpointer(tmp_path, keep=None) as checkpoints:
        for index in range(4):
            checkpoints.save(index, state)
            for _ in range(3):
                state = step(state)
        for index in range(4):
            restored = checkpoints.restore(state, step=index)
            assert all(bool((leaf == 3 * index).all()) for leaf in jax.tree.leaves(restored))


def test_keeps_the_newest_steps(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path / "none", keep=0)
    saved(tmp_path, 1, 2, 3, 10, keep=2)
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == (3, 10)
        with pytest.raises(CheckpointError, match="has no step 1; it has 3, 10"):
            checkpoints.restore(training_state(), step=1)
        with pytest.raises(CheckpointError, match="step 10 already"):
            checkpoints.save(10, training_state())
        checkpoints.save(10, training_state(99), overwrite=True)
        assert_bit_equal(checkpoints.restore(training_state()), training_state(99))


def test_the_data_iterator_continues_where_it_was(tmp_path):
    data = Counter()
    for _ in range(7):
        next(data)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(7, {"step": 7}, data)
        next(data)
        other = Counter()
        assert checkpoints.restore({"step": 0}, other) == {"step": 7}
        assert next(other) == 8
        checkpoints.save(8, {"step": 8})
        with pytest.raises(CheckpointError, match="without data="):
            checkpoints.restore({"step": 0}, other)


# What must not pass silently


def test_says_when_there_is_nothing(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(CheckpointError, match="no checkpoint"):
            checkpoints.restore({"step": 0})


@pytest.mark.parametrize(
    ("change", "leaf", "message"),
    [
        (lambda s: s["params"]["layers"][0].update(bias=jnp.zeros(48)), "params/layers/0/bias", "bfloat16.*float32"),
        (lambda s: s["params"]["layers"][0].update(kernel=jnp.zeros((64, 47))), "params/layers/0/kernel", "48.*47"),
        (lambda s: s.update(extra=jnp.zeros(3)), "extra", "lacks extra; it has"),
        (lambda s: s.update(flops=1.0), "flops", "int64.*float64"),
        (lambda s: s.pop("host"), "host", "also has host"),
        (
            lambda s: s["opt_state"].masks["layers"][0].update(kernel=jnp.ones((64, 48), jnp.int8)),
            "opt_state/masks/layers/0/kernel",
            "bool.*int8",
        ),
    ],
)
def test_another_tree_than_saved_is_an_error_that_names_the_leaf(tmp_path, change, leaf, message):
    saved(tmp_path, 1)
    wanted = training_state()
    change(wanted)
    with (
        Checkpointer(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=f"(?s){leaf}.*|{message}") as error,
    ):
        checkpoints.restore(wanted)
    assert error.value.leaf == leaf
    assert not isinstance(error.value, DamagedCheckpointError)


def test_a_checkpoint_without_masks_names_the_remedy(tmp_path):
    state = training_state()
    saved(tmp_path, 1, state=state | {"opt_state": state["opt_state"].inner_state})
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"opt_state/masks/layers/0/kernel.*masks_from_params") as error:
            checkpoints.restore(state | {"opt_state": MaskState(None, state["opt_state"].masks, None)})
        assert error.value.leaf == "opt_state/masks/layers/0/kernel"
        params = checkpoints.restore({"params": state["params"]}, partial=True)["params"]
    assert_bit_equal(params, state["params"])


def test_a_checkpoint_of_orbax_alone_names_the_remedy(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as plain:
        plain.save(1, {"w": jnp.ones(3)})
    with (
        Checkpointer(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"no checksums.*masks_from_params"),
    ):
        checkpoints.restore({"w": jnp.ones(3)})


def test_no_bit_flip_passes_silently(tmp_path):
    state = training_state()
    saved(tmp_path / "good", 1, state=state)
    files = [path for path in (tmp_path / "good" / "1").rglob("*") if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    rng = np.random.default_rng(0)
    outcomes = {"named": 0, "harmless": 0, "raised": 0}
    for flip in range(24):
        directory = tmp_path / f"flip{flip}"
        shutil.copytree(tmp_path / "good", directory)
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        path = directory / path.relative_to(tmp_path / "good")
        raw = bytearray(path.read_bytes())
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        path.write_bytes(raw)
        try:
            with Checkpointer(directory) as checkpoints:
                restored = checkpoints.restore(state)
        except CheckpointError as error:
            outcomes["named" if error.leaf else "raised"] += 1
        else:
            assert_bit_equal(restored, state)
            outcomes["harmless"] += 1
    assert outcomes["named"] >= 12, outcomes


def test_a_damaged_mask_names_counts_and_the_newest_good_step(tmp_path):
    saved(tmp_path, 1, 2, 3, keep=None)
    state = training_state()
    name = "opt_state/masks/layers/0/kernel"
    with ocp.training.Checkpointer(tmp_path) as plain:  # a mask with one weight more under the old checksums
        metadata = plain.metadata(3).custom_metadata
        metadata["sparsejax"]["leaves"][name]["nnz"] -= 1
        found = int(training_state(3)["opt_state"].masks["layers"][0]["kernel"].sum())
    path = tmp_path / "3" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace(f'"nnz": {found}', f'"nnz": {found - 1}'))
    with Checkpointer(tmp_path, keep=None) as checkpoints:
        with pytest.raises(
            DamagedCheckpointError, match=rf"{name}.*keeps {found} of 3072.*expected {found - 1}"
        ) as error:
            checkpoints.restore(state)
        assert error.value.leaf == name
        assert error.value.good_step == 2
        assert "restore step=2" in str(error.value)
        assert_bit_equal(checkpoints.restore(state, step=2), training_state(2))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
def test_a_truncated_file_names_a_leaf_and_the_newest_good_step(tmp_path, damage):
    saved(tmp_path, 1, 2)
    path = data_file(tmp_path, 2)
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(DamagedCheckpointError, match=r"is damaged: .*restore step=1") as error:
            checkpoints.restore(training_state())
        leaf = error.value.leaf
        assert leaf in describe(training_state())
        problem = f"{leaf} cannot be read, its files are cut short or not what was written"
        said = f"{tmp_path / '2'} is damaged: {problem}; restore step=1, the newest one that verifies"
        assert str(error.value) == said
        assert isinstance(error.value.__cause__, OSError)  # has what the readers said
        assert error.value.good_step == 1
        assert_bit_equal(checkpoints.restore(training_state(), step=error.value.good_step), training_state(1))


def test_lost_metadata_is_damage(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text("{")
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(DamagedCheckpointError, match="restore step=1"):
        checkpoints.restore(training_state())


def test_a_damaged_position_leaves_the_iterator_as_it_was(tmp_path):
    data = Counter()
    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2):
            next(data)
            checkpoints.save(step, {"step": step}, data)
        checkpoints.wait()
        (tmp_path / "2" / "data" / "position").write_text("6")
        other = Counter()
        with pytest.raises(DamagedCheckpointError, match=r"data iterator.*restore step=1") as error:
            checkpoints.restore({"step": 0}, other)
        assert error.value.leaf == "data"
        assert other.index == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"name": "text"}, "name: a str cannot be saved"),
        ({"a": {"b": 1}, "a/b": 2}, "two leaves"),
        ({"a": 1, "a/b": 2}, "a is a leaf too"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, state, message):
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.save(1, state)
        assert checkpoints.steps == ()


_SAVE_FOREVER = """
import sys, jax.numpy as jnp
from sparsejax.checkpoint import Checkpointer
with Checkpointer(sys.argv[1]) as checkpoints:
    for step in range(checkpoints.latest_step or 0, 10_000):
        checkpoints.save(step + 1, {f"w{i}": jnp.full((256, 256), step + 1.0) for i in range(8)})
"""


def test_a_save_that_is_killed_midway_leaves_only_whole_steps(tmp_path):
    like = {f"w{i}": jnp.zeros((256, 256)) for i in range(8)}
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-P", "-c", _SAVE_FOREVER, str(tmp_path)], stderr=subprocess.DEVNULL
        ) as child:
            deadline = time.monotonic() + 60
            before = {path.name for path in tmp_path.iterdir()}
            while len({path.name for path in tmp_path.iterdir()} - before) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            while not any("orbax-checkpoint-tmp" in path.name for path in tmp_path.iterdir()):
                assert time.monotonic() < deadline
            os.kill(child.pid, signal.SIGKILL)
        with Checkpointer(tmp_path) as checkpoints:
            assert checkpoints.steps
            for step in checkpoints.steps:
                restored = checkpoints.restore(like, step=step)
                assert all(bool((leaf == step).all()) for leaf in restored.values())
        assert not any("tmp" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(("step", "error"), [(100.0, TypeError), ("a", TypeError), (True, TypeError), (-1, ValueError)])
def test_a_step_that_is_no_count_is_refused(tmp_path, step, error):
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(error, match=f"step is {step!r}"):
        checkpoints.save(step, {"kernel": jnp.ones(3)})
    assert not list(tmp_path.iterdir())
