"""Deployment of a finalized model: weights as a safetensors file, a function with its weights as StableHLO."""

import importlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.masks.packing import pack_mask, unpack_mask
from sparsejax.masks.paths import map_with_names, named_leaves

_METADATA = "sparsejax"
_METADATA_CHECKSUM = "sparsejax_crc32"
_VERSION = 2
_MASK_SUFFIX = "/mask_bits"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_SEAL = b"sparsejax-stablehlo-1"


def save_safetensors(path: str | os.PathLike, params, *, masks=None) -> None:
    """Writes a finalized model's parameters into a safetensors file that any reader of the format can open.

    Tensors are named like `blocks/0/kernel` and keep their dtypes, bfloat16 too. The metadata entry `"sparsejax"`
    holds, as JSON, the number of non-zeros of each and a checksum of its name, dtype, shape and bytes; the metadata has
    a checksum of its own. The file appears whole or not at all.

    Args:
        path: where to write; an existing file is replaced.
        params: what `finalize` returned, or any tree of arrays that this process can read whole.
        masks: masks to store beside the weights, a bit for each: bool arrays, `optax.MaskedNode()` where dense.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a pruned weight is not 0; a mask does not fit its leaf; two leaves have the same name.
        TypeError: a leaf has a dtype that the format lacks.

    Example:
        >>> import os, tempfile
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[0.0, 2.0]], jnp.bfloat16)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "model.safetensors")
        ...     save_safetensors(file, params)
        ...     load_safetensors(file, params)
        {'kernel': Array([[0, 2]], dtype=bfloat16)}
    """
    safetensors = _extra("safetensors.numpy", "safetensors", "writing safetensors files")
    tensors = {}
    for name, leaf in named_leaves(params):
        dtype = str(_spec(leaf).dtype)
        if dtype not in _DTYPES.values():
            raise TypeError(
                f"{name} has dtype {dtype}, which safetensors lacks; allowed are {', '.join(_DTYPES.values())}"
            )
        if name in tensors:
            raise ValueError(f"two leaves have the name {name}; rename one, names are the file's keys")
        tensors[name] = np.asarray(leaf, order="C")
    nnz = {name: int(np.count_nonzero(tensor)) for name, tensor in tensors.items()}
    bits = {}
    for name, mask in named_leaves(masks):
        _check_mask(name, mask, tensors)
        bits[name + _MASK_SUFFIX] = np.asarray(pack_mask(mask), order="C")
    tensors |= bits
    described = {
        "version": _VERSION,
        "nnz": nnz,
        "masks": {name: list(mask.shape) for name, mask in named_leaves(masks)},
        "crc32": {name: _checksum(name, tensor) for name, tensor in tensors.items()},
    }
    metadata = {"format": "np", _METADATA: json.dumps(described)}
    metadata[_METADATA_CHECKSUM] = _metadata_checksum(metadata)
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        safetensors.save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_safetensors(path: str | os.PathLike, like):
    """Reads parameters that `save_safetensors` wrote.

    Args:
        path: the file.
        like: a tree of arrays or `jax.ShapeDtypeStruct` that says which leaves, shapes and dtypes to expect. Where its
            leaves have a sharding the arrays are placed so.

    Returns:
        A tree like `like` of JAX arrays, bit for bit what was saved.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is truncated, damaged or not of `save_safetensors`; a leaf is missing, unexpected, or has
            another shape or dtype. The message names the leaf.
    """
    tensors, described = _read(path)
    own = {name: tensor for name, tensor in tensors.items() if not _is_mask_of(name, described)}
    wanted = dict(named_leaves(like))
    missing, unexpected = sorted(set(wanted) - set(own)), sorted(set(own) - set(wanted))
    if missing or unexpected:
        raise ValueError(f"{path}: the file lacks {missing or 'nothing'} and has besides {unexpected or 'nothing'}")

    def place(name, leaf):
        tensor, spec = own[name], _spec(leaf)
        if (tensor.shape, tensor.dtype) != (spec.shape, spec.dtype):
            raise ValueError(
                f"{path}: {name} is {tensor.dtype}{list(tensor.shape)} in the file, but "
                f"{spec.dtype}{list(spec.shape)} is expected"
            )
        return jax.device_put(tensor, getattr(leaf, "sharding", None))

    return map_with_names(place, like)


def load_safetensors_masks(path: str | os.PathLike, like):
    """Reads the masks that `save_safetensors(..., masks=masks)` stored.

    Args:
        path: the file.
        like: the parameter tree, or one of its structure and shapes.

    Returns:
        A tree like `like` of bool masks, `optax.MaskedNode()` where none is stored.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is truncated, damaged, not of `save_safetensors`, or has no masks; a mask is of no leaf of
            `like`, or has another shape than its leaf. The message names the leaf.
    """
    tensors, described = _read(path)
    shapes = described["masks"]
    if not shapes:
        raise ValueError(f"{path} holds no masks; save them with save_safetensors(path, params, masks=masks)")
    unknown = sorted(set(shapes) - {name for name, _ in named_leaves(like)})
    if unknown:
        raise ValueError(f"{path}: the file has masks for {unknown}, which are not among the leaves expected")

    def unpack(name, leaf):
        if name not in shapes:
            return optax.MaskedNode()
        shape, expected = tuple(shapes[name]), _spec(leaf).shape
        if shape != expected:
            raise ValueError(f"{path}: the mask of {name} has shape {shape} in the file, but the leaf has {expected}")
        return unpack_mask(jnp.asarray(tensors[name + _MASK_SUFFIX]), shape)

    return map_with_names(unpack, like)


def export_stablehlo(apply: Callable, params, example_inputs, *, platforms: tuple[str, ...] | None = None) -> bytes:
    """Compiles a model and its weights into one portable StableHLO artifact.

    Args:
        apply: `apply(params, inputs) -> outputs`, a function that `jax.jit` takes.
        params: what `finalize` returned; the weights become constants of the artifact.
        example_inputs: arrays or `jax.ShapeDtypeStruct`, or a pytree of them, of the shapes and dtypes to be served.
            Sizes made by `jax.export.symbolic_shape` stay open.
        platforms: such as `("cpu", "tpu", "cuda")`; None exports for the default one.

    Returns:
        What `load_stablehlo`, and `jax.export.deserialize`, read.

    Raises:
        ImportError: flatbuffers, which JAX's serialization needs, is not installed.
        ValueError: the model calls a kernel that is compiled for this machine.

    Example:
        >>> import jax.numpy as jnp
        >>> artifact = export_stablehlo(lambda p, x: x @ p["w"], {"w": jnp.array([[2.0], [0.0]])}, jnp.ones((1, 2)))
        >>> load_stablehlo(artifact)(jnp.array([[3.0, 5.0]])).tolist()
        [[6.0]]
    """
    _extra("flatbuffers", "flatbuffers", "serializing StableHLO")
    from jax import export

    specs = jax.tree.map(_spec, example_inputs)
    try:
        exported = export.export(jax.jit(lambda inputs: apply(params, inputs)), platforms=platforms)(specs)
    except ValueError as error:
        if "custom call" not in str(error):
            raise
        raise ValueError(
            "the model calls a kernel that is compiled for this machine, which no artifact can hold: give its layers "
            "and products implementation='xla', or set PALLAS_KERNELS_NATIVE=0 in the environment"
        ) from error
    data = bytes(exported.serialize())
    return data + zlib.crc32(data).to_bytes(4, "little") + _SEAL  # readers of flatbuffers ignore what follows


def load_stablehlo(data: bytes) -> Callable:
    """Makes a function of what `export_stablehlo` wrote.

    Args:
        data: the artifact's bytes; of a file, what `Path(file).read_bytes()` gives.

    Returns:
        `function(inputs) -> outputs`; it can be called under `jax.jit`, on the platforms it was exported for.

    Raises:
        ImportError: flatbuffers is not installed.
        TypeError: `data` is no bytes, such as the name of a file.
        ValueError: the data is truncated, damaged, or not of `export_stablehlo`.
    """
    _extra("flatbuffers", "flatbuffers", "reading StableHLO")
    from jax import export

    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(
            f"load_stablehlo takes the bytes that export_stablehlo returned, got {type(data).__name__} {data!r:.80}; "
            "of a file, give Path(file).read_bytes()"
        )
    data = bytes(data)
    body, checksum = data[: -len(_SEAL) - 4], data[-len(_SEAL) - 4 : -len(_SEAL)]
    if not data.endswith(_SEAL):
        raise ValueError(f"these {len(data)} bytes are truncated or were not written by export_stablehlo")
    if zlib.crc32(body) != int.from_bytes(checksum, "little"):
        raise ValueError("the artifact is damaged: its checksum does not match; export the model again")
    return export.deserialize(bytearray(body)).call


def _extra(module: str, package: str, purpose: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}: pip install 'sparsejax[export]'") from error


def _spec(leaf) -> jax.ShapeDtypeStruct:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _check_mask(name: str, mask, tensors: dict) -> None:
    if name not in tensors or tensors[name].shape != mask.shape:
        has = f"shape {tensors[name].shape}" if name in tensors else "no such leaf"
        raise ValueError(f"{name}: there is a mask of shape {mask.shape}, but params has {has}")
    if name + _MASK_SUFFIX in tensors:
        raise ValueError(f"the leaf {name + _MASK_SUFFIX} has the name that the mask of {name} would have; rename it")
    leaks = int(np.count_nonzero(tensors[name][~np.asarray(mask, bool)]))
    if leaks:
        raise ValueError(
            f"{name}: {leaks} pruned weights are not 0, so the mask leaks; save what "
            "finalize(params, opt_state) returns"
        )


def _read(path):
    safetensors = _extra("safetensors", "safetensors", "reading safetensors files")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        stored = safetensors.deserialize(Path(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if _METADATA not in metadata:
        raise ValueError(f"{path} was not written by save_safetensors: its metadata has no entry {_METADATA!r}")
    seal = metadata.pop(_METADATA_CHECKSUM, None)
    if seal != _metadata_checksum(metadata):
        raise ValueError(f"{path}: the metadata is damaged, its checksum does not match; take another copy of the file")
    described = json.loads(metadata[_METADATA])
    if described["version"] != _VERSION:
        raise ValueError(f"{path} has version {described['version']} of the format, this sparsejax reads {_VERSION}")
    tensors = {name: _tensor(path, name, value, described["crc32"].get(name)) for name, value in stored}
    lost = sorted(described["crc32"].keys() - tensors)
    if lost:
        raise ValueError(f"{path} is damaged: the metadata lists {lost}, which the file lacks; take another copy of it")
    return tensors, described


def _tensor(path, name: str, value: dict, checksum: int | None) -> np.ndarray:
    if value["dtype"] in _DTYPES:
        tensor = np.frombuffer(value["data"], jnp.dtype(_DTYPES[value["dtype"]])).reshape(value["shape"])
        if _checksum(name, tensor) == checksum:
            return tensor
    raise ValueError(f"{path}: {name} is damaged, its checksum does not match; take another copy of the file")


def _is_mask_of(name: str, described: dict) -> bool:
    return name.endswith(_MASK_SUFFIX) and name.removesuffix(_MASK_SUFFIX) in described["masks"]


def _checksum(name: str, tensor: np.ndarray) -> int:
    kind = f"{name} {tensor.dtype} {list(tensor.shape)}"
    return zlib.crc32(tensor.reshape(-1).view(np.uint8), zlib.crc32(kind.encode()))


def _metadata_checksum(metadata: dict[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(metadata, sort_keys=True).encode()):08x}"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
