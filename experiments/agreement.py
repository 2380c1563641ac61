"""Whether all devices and hosts hold the same network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from experiments.processes import DisagreementError, who_holds
from sparsejax.checksums import bits_checksum
from sparsejax.masks.paths import named_leaves


def check_copies(state, mesh: Mesh) -> None:
    """Compares, bit for bit, all copies of every part of a state over the devices of a mesh.

    Each device works out a checksum of its part of every leaf, see `sparsejax.checksums`; only these travel. A leaf of
    which every device holds another part has no copies and nothing to compare.

    Args:
        state: any tree of arrays on the mesh.
        mesh: the mesh.

    Raises:
        DisagreementError: copies differ; names the leaf, and the processes and hosts with their checksums.
    """
    leaves = {name: leaf for name, leaf in named_leaves(state) if leaf.size}
    specs = tuple(leaf.sharding.spec for leaf in leaves.values())
    with jax.set_mesh(mesh):
        sums = np.asarray(_device_sums(mesh, specs)(tuple(leaves.values())))
    processes = np.array([device.process_index for device in mesh.devices.flat])
    for column, (name, spec) in enumerate(zip(leaves, specs, strict=True)):
        used = {axis for axes in spec if axes for axis in (axes if isinstance(axes, tuple) else (axes,))}
        copies = tuple(i for i, axis in enumerate(mesh.axis_names) if axis not in used)
        found = sums[:, column].reshape(mesh.devices.shape)
        differs = (found != found.min(axis=copies, keepdims=True)) if copies else np.zeros_like(found, bool)
        if differs.any():
            place = np.argwhere(differs)[0]
            part = tuple(slice(None) if i in copies else place[i] for i in range(found.ndim))
            held = found[part].ravel(), processes.reshape(found.shape)[part].ravel()
            raise DisagreementError(_message(name, *held))


def _message(name: str, sums: np.ndarray, processes: np.ndarray) -> str:
    by_process: dict[int, list[int]] = {}
    for value, process in zip(sums.tolist(), processes.tolist(), strict=True):
        by_process.setdefault(process, []).append(value)
    values = [by_process.get(process, []) for process in range(max(by_process) + 1)]
    shown = who_holds(["/".join(map(str, sorted(set(each)))) for each in values])
    return (
        f"{name}: its copies are no longer the same; checksum {shown}. Processes were started with different seeds, "
        "data or code, or a device is faulty: restart all from the newest checkpoint, with --resume"
    )


@functools.lru_cache(maxsize=8)
def _device_sums(mesh: Mesh, specs: tuple[PartitionSpec, ...]):
    def sums(leaves):
        row = jnp.stack([bits_checksum(leaf) for leaf in leaves])
        return jax.lax.all_gather(row, mesh.axis_names)  # devices in the order of the mesh

    # Each device reads its own copy here: outside of shard_map copies count as one array, and differences go unseen.
    return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False))
