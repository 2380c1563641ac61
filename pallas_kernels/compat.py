"""Differences between JAX versions (0.10.2 and 0.12), in one place.

Device-less compilation needs an abstract mesh in context in both, since lowering rules ask it for the kind of device.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def abstract_device(kind: str, cores: int | None, platform: str) -> Any:
    """A description of a device; JAX 0.10 keeps the class where it was first written."""
    try:
        from jax.sharding import AbstractDevice
    except ImportError:
        from jax._src.mesh import AbstractDevice
    return AbstractDevice(kind, cores, platform)


def target_context(kind: str, cores: int | None, platform: str) -> contextlib.AbstractContextManager[Any]:
    """Lowering inside this context is for one such device: enough for `jax.export`, without any plugin installed.

    Args:
        kind: such as "TPU v5 lite", "TPU v5", "TPU v6 lite" or "NVIDIA H200".
        cores: cores of the device.
        platform: "tpu" or "gpu".
    """
    mesh = jax.sharding.AbstractMesh(
        (1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=abstract_device(kind, cores, platform)
    )
    return jax.sharding.use_abstract_mesh(mesh)


def tpu_target(topology: str) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """What compiling for one TPU of a topology such as "v5e:2x2" needs: libtpu, no TPU.

    Returns:
        A function `(shape, dtype) -> ShapeDtypeStruct` placed on that device, and a function that gives the context in
        which to lower.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("d",))
    return _placed(mesh), lambda: jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def gpu_target(description: str) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """The same for a GPU that a text in XLA's target format describes: needs the CUDA plugin, no GPU."""
    target = topologies.get_topology_desc("", platform="cuda", target_config=description, topology="1x1x1")
    mesh = Mesh(np.array(target.devices), ("d",))
    return _placed(mesh), lambda: target_context("NVIDIA H200", 132, "gpu")


def _placed(mesh: Mesh) -> Callable[..., Any]:
    sharding = NamedSharding(mesh, PartitionSpec())
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def coordination_client() -> Any:
    """The client of the service by which the processes of one job find each other; None where there is one process.

    JAX has no public way to wait with a limit or to ask who is there.
    """
    from jax._src import distributed

    return distributed.global_state.client


def gpu_load(ref: Any, layout: Any) -> Any:
    """Loads a reference into registers in a layout, inside a Mosaic GPU kernel; JAX 0.10 wants an index besides."""
    from jax.experimental.pallas import mosaic_gpu

    index = ((),) if "idx" in inspect.signature(mosaic_gpu.load).parameters else ()
    return mosaic_gpu.load(ref, *index, layout=layout, optimized=False)


def tpu_races_found() -> bool:
    """Whether the last run under `pltpu.InterpretParams(detect_races=True)` had a race; JAX 0.12 raises by itself."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = getattr(interpret_pallas_call, "races", None)
    return races is not None and races.races_found


def gpu_interpreter() -> Any:
    """Parameters that run Mosaic GPU kernels on any machine and report races; None where JAX cannot."""
    from jax.experimental.pallas import mosaic_gpu

    # JAX 0.10 has one in private, which lacks rules that accumulators in registers need.
    parameters = getattr(mosaic_gpu, "InterpretGPUParams", None)
    return None if parameters is None else parameters(detect_races=True)


def vary_alike(tree: Any) -> Any:
    """Inside `jax.shard_map`, marks all arrays as different on every axis on which one of them is.

    Functions with their own gradient need it: the sum over devices that an array equal on all of them owes its gradient
    is then added by JAX. Elsewhere the arrays are returned as they are.
    """
    leaves = jax.tree.leaves(tree)
    axes = set().union(*(varying(x) for x in leaves))

    def mark(x):
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree) if axes else tree


def like_varying(shape: tuple[int, ...], dtype: Any, *arrays: Any) -> jax.ShapeDtypeStruct:
    """The type of a result that differs between devices wherever one of `arrays` does: for calls into native code."""
    axes = frozenset().union(*(varying(x) for x in arrays))
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    seen = jax.typeof(arrays[0])
    return jax.ShapeDtypeStruct(
        shape,
        dtype,
        sharding=NamedSharding(seen.sharding.mesh, PartitionSpec()),
        manual_axis_type=type(seen.manual_axis_type)(varying=axes),
    )


def varying(x: Any) -> frozenset[str]:
    """The mesh axes of `jax.shard_map` on which an array differs between devices."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)
