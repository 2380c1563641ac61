"""What is written is read back bit for bit, in files that others can read; damage and leaks are refused."""

import itertools
import json
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.export import (
    export_stablehlo,
    load_safetensors,
    load_safetensors_masks,
    load_stablehlo,
    save_safetensors,
)
from sparsejax.masks.block import Block
from sparsejax.masks.from_params import masks_from_params
from sparsejax.masks.paths import named_leaves
from sparsejax.parameters import to_sparse
from tests.nets import linen_net, nnx_net, plain_net

NETS = pytest.mark.parametrize("make_net", [nnx_net, linen_net, plain_net])


def sparse(params):
    return jax.tree.map(lambda p: jnp.where(p > 0, p, 0) if p.ndim == 2 else p, params)


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (name, a), (_, b) in zip(named_leaves(one), named_leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


@NETS
def test_weights_and_masks_are_read_back_equal(make_net, tmp_path):
    apply, params = make_net()
    params = sparse(params)
    masks = masks_from_params(params)
    file = tmp_path / "model.safetensors"
    save_safetensors(file, params, masks=masks)
    loaded = load_safetensors(file, jax.eval_shape(lambda: params))
    assert_same_bits(loaded, params)
    assert_same_bits(load_safetensors_masks(file, params), masks)
    x = jnp.ones((2, 6))
    assert_same_bits(apply(loaded, x), apply(params, x))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int32", "uint8", "int8", "bool"]
)
def test_dtypes_and_odd_shapes(dtype, tmp_path):
    values = jnp.arange(30).reshape(5, 6).astype(dtype)
    params = {"matrix": values, "scalar": values[1, 2], "empty": values[:0], "layers": [values.T, None]}
    save_safetensors(tmp_path / "x", params)
    assert_same_bits(load_safetensors(tmp_path / "x", params), params)


def test_special_values_keep_their_bits(tmp_path):
    params = {"w": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40])}
    save_safetensors(tmp_path / "x", params)
    assert_same_bits(load_safetensors(tmp_path / "x", params), params)


def test_other_readers_see_plain_tensors_and_counts(tmp_path):
    from safetensors import safe_open

    params = sparse(plain_net()[1])
    file = tmp_path / "model.safetensors"
    save_safetensors(file, params)
    with safe_open(file, framework="numpy") as reader:
        assert set(reader.keys()) == {"hidden/kernel", "hidden/bias", "out/kernel", "out/bias"}
        np.testing.assert_array_equal(reader.get_tensor("out/kernel"), params["out"]["kernel"])
        described = json.loads(reader.metadata()["sparsejax"])
    assert described["nnz"]["out/kernel"] == int(jnp.count_nonzero(params["out"]["kernel"]))


def test_arrays_go_where_the_likeness_lies(tmp_path):
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    params = {"w": jax.device_put(jnp.arange(8.0).reshape(4, 2), sharding)}
    save_safetensors(tmp_path / "x", params)
    loaded = load_safetensors(tmp_path / "x", params)
    assert loaded["w"].sharding == sharding
    assert_same_bits(loaded, params)


def test_leaking_masks_are_refused(tmp_path):
    params = {"layer": {"kernel": jnp.array([[1.0, 2.0], [0.0, jnp.nan]])}}
    masks = {"layer": {"kernel": jnp.array([[True, False], [False, False]])}}
    with pytest.raises(ValueError, match=r"layer/kernel: 2 pruned weights are not 0.*finalize"):
        save_safetensors(tmp_path / "x", params, masks=masks)
    with pytest.raises(ValueError, match=r"other: there is a mask of shape \(2,\), but params has no such leaf"):
        save_safetensors(tmp_path / "x", params, masks={"other": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match="file's keys"):
        save_safetensors(tmp_path / "x", {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"key has dtype key<fry>"):
        save_safetensors(tmp_path / "x", {"key": jax.random.key(0)})
    assert not list(tmp_path.iterdir())


def test_wrong_likeness_is_refused(tmp_path):
    save_safetensors(tmp_path / "x", {"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"w is float32\[2, 3\] in the file, but bfloat16\[2, 3\] is expected"):
        load_safetensors(tmp_path / "x", {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"float32\[3, 2\] is expected"):
        load_safetensors(tmp_path / "x", {"w": jnp.ones((3, 2)), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"lacks \['v'\] and has besides \['w'\]"):
        load_safetensors(tmp_path / "x", {"v": jnp.ones((2, 3)), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="holds no masks"):
        load_safetensors_masks(tmp_path / "x", {"w": jnp.ones((2, 3))})


def test_masks_of_another_shape_are_refused(tmp_path):
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    save_safetensors(tmp_path / "x", params, masks={"layer": {"kernel": jnp.ones((2, 2), bool)}})
    like = {"layer": {"kernel": jax.ShapeDtypeStruct((7, 9), jnp.float32), "bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"x: the mask of layer/kernel has shape \(2, 2\) .* the leaf has \(7, 9\)"):
        load_safetensors_masks(tmp_path / "x", like)


def test_damaged_files_are_refused(tmp_path):
    params = {"w": jnp.arange(64.0)}
    file = tmp_path / "x"
    save_safetensors(file, params)
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            load_safetensors(file, params)
    flipped = bytearray(whole)
    flipped[-10] ^= 4
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match="w is damaged"):
        load_safetensors(file, params)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_safetensors(tmp_path / "absent", params)


def test_every_flipped_bit_is_found(tmp_path):
    params = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]], jnp.bfloat16)}
    file = tmp_path / "x"
    save_safetensors(file, params, masks={"w": params["w"] != 0})
    whole = file.read_bytes()
    with file.open("r+b", buffering=0) as damaged:
        for place, bit in itertools.product(range(len(whole)), range(8)):
            damaged.seek(place)
            damaged.write(bytes([whole[place] ^ 1 << bit]))
            for load in (load_safetensors, load_safetensors_masks):
                with pytest.raises(ValueError, match=str(file)):
                    load(file, params)
            damaged.seek(place)
            damaged.write(whole[place : place + 1])
    assert_same_bits(load_safetensors(file, params), params)


def test_other_versions_and_lost_tensors_are_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "x"
    params = {"w": jnp.ones(3), "v": jnp.ones(2)}
    save_safetensors(file, params)
    with safe_open(file, framework="numpy") as reader:
        metadata = reader.metadata()
    save_file({"v": load_file(file)["v"]}, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"the metadata lists \['w'\], which the file lacks"):
        load_safetensors(file, params)
    metadata["sparsejax"] = metadata["sparsejax"].replace('"version": 2', '"version": 1')
    save_file({"v": np.ones(2)}, file, metadata=metadata)
    with pytest.raises(ValueError, match="the metadata is damaged"):
        load_safetensors(file, params)
    resealed = {name: text for name, text in metadata.items() if name != "sparsejax_crc32"}
    checksum = zlib.crc32(json.dumps(resealed, sort_keys=True).encode())
    save_file({"v": np.ones(2)}, file, metadata=resealed | {"sparsejax_crc32": f"{checksum:08x}"})
    with pytest.raises(ValueError, match="has version 1 of the format, this sparsejax reads 2"):
        load_safetensors(file, params)


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"w": np.ones(3, np.float32)}, tmp_path / "x")
    with pytest.raises(ValueError, match="not written by save_safetensors"):
        load_safetensors(tmp_path / "x", {"w": jnp.ones(3)})


@NETS
def test_stablehlo_gives_the_same_bits(make_net):
    apply, params = make_net()
    params = sparse(params)
    x = jax.random.normal(jax.random.key(1), (4, 6))
    served = load_stablehlo(export_stablehlo(apply, params, x))
    expected = jax.jit(apply)(params, x)
    assert_same_bits(served(x), expected)
    assert_same_bits(jax.jit(served)(x), expected)


def test_stablehlo_takes_trees_in_half_precision_and_open_batch_sizes():
    params = {"w": jnp.array([[1.0, 0.0], [0.5, -2.0]], jnp.bfloat16)}

    def apply(params, inputs):
        return {"y": inputs["x"] @ params["w"] + inputs["offset"]}

    (batch,) = jax.export.symbolic_shape("batch")
    example = {"x": jax.ShapeDtypeStruct((batch, 2), jnp.bfloat16), "offset": jnp.zeros(2, jnp.bfloat16)}
    served = load_stablehlo(export_stablehlo(apply, params, example))
    for size in (1, 3):
        inputs = {"x": jnp.arange(2 * size, dtype=jnp.bfloat16).reshape(size, 2), "offset": jnp.ones(2, jnp.bfloat16)}
        assert_same_bits(served(inputs), jax.jit(apply)(params, inputs))


def test_stablehlo_for_other_platforms_is_readable_by_jax_itself():
    artifact = export_stablehlo(lambda p, x: x @ p, jnp.eye(2), jnp.ones((1, 2)), platforms=("cpu", "tpu", "cuda"))
    exported = jax.export.deserialize(bytearray(artifact))
    assert exported.platforms == ("cpu", "tpu", "cuda")
    assert exported.call(jnp.array([[3.0, 4.0]])).tolist() == [[3, 4]]


def test_damaged_artifacts_are_refused():
    artifact = export_stablehlo(lambda p, x: x @ p, jnp.eye(2), jnp.ones((1, 2)))
    for length in (0, 3, 100, len(artifact) - 1):
        with pytest.raises(ValueError, match="truncated or were not written by export_stablehlo"):
            load_stablehlo(artifact[:length])
    flipped = bytearray(artifact)
    flipped[len(artifact) // 2] ^= 1
    with pytest.raises(ValueError, match="checksum does not match"):
        load_stablehlo(flipped)


@pytest.mark.parametrize("data", ["model.stablehlo", None, 7])
def test_what_is_no_artifact_is_refused(data):
    with pytest.raises(TypeError, match=rf"takes the bytes .* got {type(data).__name__} .*read_bytes\(\)"):
        load_stablehlo(data)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    params = {"w": jnp.ones(2)}
    save_safetensors(tmp_path / "x", params)
    artifact = export_stablehlo(lambda p, x: x * p["w"], params, jnp.ones(2))
    for module in ("safetensors", "safetensors.numpy", "flatbuffers"):
        monkeypatch.setitem(sys.modules, module, None)
    remedy = r"pip install 'sparsejax\[export\]'"
    with pytest.raises(ImportError, match=f"needs safetensors: {remedy}"):
        save_safetensors(tmp_path / "x", params)
    with pytest.raises(ImportError, match=f"needs safetensors: {remedy}"):
        load_safetensors(tmp_path / "x", params)
    with pytest.raises(ImportError, match=f"needs flatbuffers: {remedy}"):
        export_stablehlo(lambda p, x: x * p["w"], params, jnp.ones(2))
    with pytest.raises(ImportError, match=f"needs flatbuffers: {remedy}"):
        load_stablehlo(artifact)


def test_stored_weights_are_exported_without_native_kernels(monkeypatch):
    params = to_sparse({"kernel": jnp.kron(jnp.eye(2), jnp.ones((4, 4)))}, None, Block((4, 4)))
    x = jnp.ones((1, 8))
    apply = lambda params, x: x @ params["kernel"]  # noqa: E731
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="PALLAS_KERNELS_NATIVE=0"):
            export_stablehlo(apply, params, x)
    monkeypatch.setenv("PALLAS_KERNELS_NATIVE", "0")
    np.testing.assert_array_equal(load_stablehlo(export_stablehlo(apply, params, x))(x), 4 * x)
