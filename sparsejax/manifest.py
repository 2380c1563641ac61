"""What a saved tree must look like when it is read back: dtype, shape and checksum of every leaf, nnz of every mask."""

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping

import jax
import numpy as np

from sparsejax.checksums import checksums
from sparsejax.masks.paths import named_leaves

_SCALARS = {bool: "bool", int: "int64", float: "float64"}  # Python numbers, as numpy holds them


class CheckpointError(ValueError):
    """A checkpoint is absent, or holds another tree than the one asked for.

    Attributes:
        leaf: name of the leaf at fault, or None.
    """

    def __init__(self, message: str, leaf: str | None = None):
        super().__init__(message)
        self.leaf = leaf


class DamagedCheckpointError(CheckpointError):
    """A checkpoint cannot be read, or what is read is not what was saved.

    Attributes:
        leaf: name of the leaf at fault, or None where no leaf could be read.
        good_step: the newest other step that reads back as saved, or None.
    """

    def __init__(self, message: str, leaf: str | None = None, good_step: int | None = None):
        super().__init__(message, leaf)
        self.good_step = good_step


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """What is known of one saved leaf.

    Args:
        dtype: its dtype's name, `"key<fry>"` and the like for typed random keys.
        shape: its shape.
        checksum: of its bits, an integer below 2**32; see `checksums`.
        nnz: the number of True entries of a bool leaf, else None.
    """

    dtype: str
    shape: tuple[int, ...]
    checksum: int
    nnz: int | None = None

    def to_json(self) -> dict:
        """The record as JSON types; nnz only where there is one."""
        fields = {"dtype": self.dtype, "shape": list(self.shape), "checksum": self.checksum}
        return fields if self.nnz is None else fields | {"nnz": self.nnz}

    @classmethod
    def from_json(cls, fields: Mapping) -> "LeafRecord":
        """The inverse of `to_json`."""
        return cls(fields["dtype"], tuple(fields["shape"]), fields["checksum"], fields.get("nnz"))


def leaves_by_name(tree) -> dict[str, object]:
    """The leaves of a tree under unique names.

    Args:
        tree: any pytree of arrays and Python numbers.

    Returns:
        `{name: leaf}`; a tree that is a single leaf has the name `"leaf"`.

    Raises:
        ValueError: two leaves have one name, or a leaf is neither an array nor a number; names the leaf.

    Example:
        >>> leaves_by_name({"dense": [1.0, None]})
        {'dense/0': 1.0}
    """
    leaves = {}
    for name, leaf in named_leaves(tree):
        name = name or "leaf"
        if name in leaves:
            raise ValueError(f"{name}: two leaves of the tree have this name; rename one of the keys")
        if type(leaf) not in _SCALARS and not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(
                f"{name}: a {type(leaf).__name__} cannot be saved, only arrays and Python numbers; leave it out of "
                "the state, or keep it as static configuration"
            )
        leaves[name] = leaf
    for name in leaves:
        parents = name.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            if (parent := "/".join(parents[:depth])) in leaves:
                raise ValueError(f"{name}: {parent} is a leaf too; rename the key that has a slash in it")
    return leaves


def describe(tree) -> dict[str, LeafRecord]:
    """Records every leaf of a tree.

    Args:
        tree: any pytree of arrays (also sharded over many devices and hosts) and Python numbers.

    Returns:
        `{name: LeafRecord}`, in the order of the tree.

    Example:
        >>> import jax.numpy as jnp
        >>> describe({"mask": jnp.array([True, False])})
        {'mask': LeafRecord(dtype='bool', shape=(2,), checksum=2777529689, nnz=1)}
    """
    leaves = leaves_by_name(tree)
    sums = checksums(leaves)
    return {name: LeafRecord(dtype_name(leaf), tuple(np.shape(leaf)), *sums[name]) for name, leaf in leaves.items()}


def dtype_name(leaf) -> str:
    """Name of the dtype of an array, an abstract array or a Python number."""
    return _SCALARS[type(leaf)] if type(leaf) in _SCALARS else str(leaf.dtype)


def as_saved(leaf, record: LeafRecord | None):
    """A leaf asked for, as it was saved: a Python number where `jax.eval_shape` narrowed one to a 32-bit scalar.

    Args:
        leaf: array, abstract array or Python number.
        record: of the saved leaf, or None.

    Returns:
        0 or 0.0 for an abstract int32 or float32 scalar that was saved with the 64 bits of a Python number, else the
        leaf itself.

    Example:
        >>> as_saved(jax.eval_shape(lambda: 7), describe({"count": 7})["count"])
        0
    """
    if record is None or not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.shape or record.shape:
        return leaf
    narrowed = {("int64", "int32"): 0, ("float64", "float32"): 0.0}
    return narrowed.get((record.dtype, dtype_name(leaf)), leaf)


def data_checksums(data) -> list[int]:
    """Checksum of the position (`get_state()`) of a data iterator, one for every process.

    Example:
        >>> import types
        >>> data_checksums(types.SimpleNamespace(get_state=lambda: {"next_index": 3}))
        [378046539]
    """
    state = data.get_state()
    checksum = zlib.crc32(
        state if isinstance(state, bytes) else json.dumps(state, sort_keys=True, default=str).encode()
    )
    if jax.process_count() == 1:
        return [checksum]
    from jax.experimental import multihost_utils

    return [int(value) for value in multihost_utils.process_allgather(np.uint32(checksum))]


def difference(name: str, saved: LeafRecord, found: LeafRecord) -> str | None:
    """Says in what the bits of a leaf differ from what was saved, or None where they do not."""
    if found == saved:
        return None
    if found.nnz != saved.nnz:
        return f"{name}: the mask keeps {found.nnz} of {math.prod(found.shape)} weights, expected {saved.nnz}"
    return f"{name}: the checksum of the values is {found.checksum}, expected {saved.checksum}"


def check_layout(where: str, saved: Mapping[str, LeafRecord], wanted: Mapping[str, object], partial: bool) -> None:
    """Compares names, shapes and dtypes of saved leaves with those asked for.

    Args:
        where: names the checkpoint in messages.
        saved: the records.
        wanted: `{name: array, abstract array or Python number}`.
        partial: more leaves may be saved than are asked for.

    Raises:
        CheckpointError: they differ; names the leaf, what is saved, what is asked for and the remedy.
    """
    for name, leaf in wanted.items():
        if name not in saved and "masks" in name.split("/"):
            raise CheckpointError(
                f"{where} was saved without masks: it lacks {name}. Restore the params alone, "
                "restore({'params': ...}, partial=True), and get masks from the zeros in them: "
                "sparsejax.masks_from_params(params)",
                name,
            )
        if name not in saved:
            raise CheckpointError(
                f"{where} lacks {name}; it has {_some(saved)}. Build the state as it was when saved", name
            )
        shape, dtype = tuple(np.shape(leaf)), dtype_name(leaf)
        if shape != saved[name].shape:
            raise CheckpointError(
                f"{where}: {name} was saved with shape {saved[name].shape} and is asked for with shape {shape}; build "
                "the state as it was when saved",
                name,
            )
        if dtype != saved[name].dtype:
            raise CheckpointError(
                f"{where}: {name} was saved as {saved[name].dtype} and is asked for as {dtype}; ask for "
                f"{saved[name].dtype} and convert it after restoring",
                name,
            )
    extra = [name for name in saved if name not in wanted]
    if extra and not partial:
        raise CheckpointError(
            f"{where} also has {_some(extra)}, which the abstract state lacks; add them, or pass partial=True to leave "
            "them unread",
            extra[0],
        )


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
