"""Where the arrays of a training run lie: a mesh of devices and rules that give every axis of every array its place.

A mesh has three axes: `data` (copies of the network, each with its part of the batch), `fsdp` (the batch again, and the
network itself, whose parts are gathered when they are used) and `tensor` (heads and hidden features). Rules name the
axes of a parameter, and say along which mesh axis a name is split. Masks, moments, gradients and what has been explored
lie as their parameters do. An axis that its mesh axis does not divide is kept whole.
"""

import contextlib
import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.experiment import UsageError
from sparsejax.masks.paths import map_with_names, named_leaves

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

PARAMETER_AXES = {
    "*kernel": ("embed", "hidden"),
    "*down/kernel": ("hidden", "embed"),
    "*attention/*/kernel": ("embed", "heads", None),
    "*attention/out/kernel": ("heads", None, "embed"),
    "head/kernel": ("embed", "vocabulary"),
    "*kernel/values": ("groups", None, None, None),
}
"""Globs over names of parameters, and names of their last axes; of those that fit, the last one counts."""

SPLIT = {
    "embed": ("fsdp",),
    "groups": ("tensor", "fsdp"),
    "hidden": ("tensor",),
    "heads": ("tensor",),
    "vocabulary": ("tensor",),
}
"""The mesh axes along which a named axis is split; where all together do not divide it, the last ones that do."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which arrays lie on it.

    Args:
        mesh: a mesh with the axes `MESH_AXES`; see `make_mesh`.
        parameter_axes: names of parameters' axes, as `PARAMETER_AXES`.
        split: mesh axes of names, as `SPLIT`.
        present: False for a mesh of devices that are not there, for which programs are only compiled.

    Example:
        >>> layout = Layout(make_mesh((1, 1, 1)))
        >>> tuple(layout.spec("blocks/0/up/kernel", (64, 256)))
        ('fsdp', 'tensor')
    """

    mesh: Mesh
    parameter_axes: Mapping[str, tuple] = dataclasses.field(default_factory=lambda: PARAMETER_AXES)
    split: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: SPLIT)
    present: bool = True

    @property
    def explicit(self) -> bool:
        """Whether shardings are part of the types of arrays."""
        return AxisType.Explicit in self.mesh.axis_types

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH)

    def spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The mesh axis, or None, of each axis of a parameter."""
        fitting = [axes for glob, axes in self.parameter_axes.items() if fnmatch.fnmatchcase(name, glob)]
        if not fitting or len(shape) < len(fitting[-1]):
            return PartitionSpec()
        names = (None,) * (len(shape) - len(fitting[-1])) + fitting[-1]
        return PartitionSpec(*(self._place(axis, size) for axis, size in zip(names, shape, strict=True)))

    def _place(self, axis: str | None, size: int) -> str | tuple[str, ...] | None:
        wanted = self.split.get(axis, ())
        tails = (wanted[start:] for start in range(len(wanted)))
        places = next((tail for tail in tails if size % math.prod(self.mesh.shape[name] for name in tail) == 0), ())
        return places[0] if len(places) == 1 else places or None

    def sharding(self, *spec) -> NamedSharding:
        """The sharding of an array with these mesh axes; without any the array is whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def of_params(self, params):
        """A tree like `params` of shardings."""
        return map_with_names(lambda name, p: NamedSharding(self.mesh, self.spec(name, p.shape)), params)

    def of_state(self, state, params):
        """A tree like `state` of shardings; what is named and shaped like a parameter lies like it.

        Args:
            state: any tree of arrays or `jax.ShapeDtypeStruct` that has copies of the tree of parameters in it, such as
                moments and masks.
            params: the parameters, arrays or `jax.ShapeDtypeStruct`.
        """
        named = {name: (name, leaf.shape) for name, leaf in named_leaves(params)}
        # Moments of a stored weight are those of its values, and have its name.
        named |= {name.removesuffix("/values"): found for name, found in named.items() if name.endswith("/values")}

        def place(name, leaf):
            parts = name.split("/")
            tails = ("/".join(parts[start:]) for start in range(len(parts)))
            found = next((named[tail] for tail in tails if named.get(tail, ("", None))[1] == leaf.shape), None)
            return self.sharding() if found is None else NamedSharding(self.mesh, self.spec(*found))

        return map_with_names(place, state)

    def place_batch(self, batch, *, stacked: bool = False):
        """Makes global arrays of the rows that this process has read.

        Args:
            batch: `{name: array (rows of this process, ...)}`.
            stacked: arrays have an axis of batches before that of rows.
        """
        spec = (None, BATCH) if stacked else (BATCH,)
        axis = int(stacked)

        def place(rows):
            shape = list(rows.shape)
            shape[axis] *= jax.process_count()
            return jax.make_array_from_process_local_data(self.sharding(*spec), np.asarray(rows), tuple(shape))

        return jax.tree.map(place, batch)

    def context(self) -> contextlib.AbstractContextManager:
        """The context in which functions on these arrays are called."""
        return jax.set_mesh(self.mesh) if self.present else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def automatically(self, function, *, out):
        """Runs a function under automatic partitioning on an explicit mesh too, where it would need annotations.

        Args:
            function: any function of arrays.
            out: tree of shardings of its results.
        """
        if not self.explicit:
            return function
        return jax.sharding.auto_axes(function, axes=MESH_AXES, out_sharding=out)


def make_mesh(shape: tuple[int, int, int], axis_types: Literal["auto", "explicit"] = "auto", devices=None) -> Mesh:
    """Makes a mesh of devices, in which those along `tensor` are of one process: processes read different rows.

    Where the best places in the network are others, devices lie in the order of their processes.

    Args:
        shape: devices along `data`, `fsdp` and `tensor`; at most one may be -1, which takes all that are left.
        axis_types: whether the compiler finds shardings by itself, or they are part of the types.
        devices: by default all; one process may use the first few of them, several use all.

    Raises:
        UsageError: the shape does not fit the devices, or `tensor` those of a process.

    Example:
        >>> make_mesh((1, 1, 1)).axis_names
        ('data', 'fsdp', 'tensor')
    """
    devices = list(jax.devices() if devices is None else devices)
    processes = len({device.process_index for device in devices})
    try:
        filled = fill_mesh(shape, len(devices), exactly=processes > 1)
    except UsageError as error:
        if devices[0].platform != "cpu" or math.prod(size for size in shape if size > 0) <= len(devices):
            raise
        raise UsageError(f"{error}; XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of a CPU") from error
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[axis_types]
    placed = place_devices(filled, devices[: math.prod(filled)])
    if _shares_rows(placed):
        of_process = sorted(devices, key=lambda device: (device.process_index, device.id))
        placed = np.array(of_process, dtype=object).reshape(filled)
    if _shares_rows(placed):
        raise UsageError(
            f"mesh is {shape}: the {filled[2]} devices along tensor need the same rows of a batch, and would be of "
            "several processes, which read different ones; make tensor a divisor of "
            f"{len(devices) // processes}, the devices of a process"
        )
    return Mesh(placed, MESH_AXES, axis_types=(kind,) * 3)


def place_devices(shape: tuple[int, int, int], devices) -> np.ndarray:
    """Puts devices where neighbours along a mesh axis are near each other in the network.

    `jax.make_mesh` does so too, but on most TPUs for meshes only whose axes are whole axes of the slice, and for one
    slice only; here several slices split `data`.

    Args:
        shape: devices along `data`, `fsdp` and `tensor`.
        devices: as many devices as that, present or of a topology.

    Returns:
        The devices, an object array of this shape.

    Raises:
        UsageError: the slices do not divide `data`.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices < 2:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = shape
    if data % slices:
        raise UsageError(f"mesh is {shape}: data = {data} is split over {slices} slices; make it a multiple of them")
    inside = (data // slices, fsdp, tensor)
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)


def _shares_rows(placed: np.ndarray) -> bool:
    """Whether some devices that need the same rows of a batch are of different processes."""
    return any(len({device.process_index for device in along}) > 1 for along in placed.reshape(-1, placed.shape[-1]))


def fill_mesh(shape: tuple[int, int, int], devices: int, *, exactly: bool = True) -> tuple[int, int, int]:
    """Replaces -1 in the shape of a mesh.

    Args:
        shape: devices along `data`, `fsdp` and `tensor`.
        devices: how many there are.
        exactly: the mesh must take all of them.

    Raises:
        UsageError: it does not fit.

    Example:
        >>> fill_mesh((-1, 4, 2), 64)
        (8, 4, 2)
    """
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UsageError(f"mesh is {shape}; give three numbers of devices, one of them may be -1 for all that are left")
    known = math.prod(size for size in shape if size != -1)
    filled = tuple(devices // known if size == -1 else size for size in shape)
    wanted = math.prod(filled)
    if not 1 <= wanted <= devices or ((exactly or -1 in shape) and wanted != devices):
        raise UsageError(
            f"mesh is {shape}, which does not fit {devices} devices: the product must be {devices}; one may be -1, for "
            "all that are left"
        )
    return filled
