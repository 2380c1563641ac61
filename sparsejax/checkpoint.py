"""Checkpoints of sparse training that are verified when they are read: Orbax behind one file.

Orbax writes atomically and in the background. What it lacks is here: it loads flipped bits and other dtypes without a
word, so every leaf's dtype, shape and integer checksum, and the nnz of every mask, are saved beside the values and
compared on `restore`.
"""

import contextlib
import functools
import gc
import math
import numbers
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from sparsejax.joint_save import JointSave, SaveError
from sparsejax.manifest import (
    CheckpointError,
    DamagedCheckpointError,
    LeafRecord,
    as_saved,
    check_layout,
    data_checksums,
    describe,
    difference,
    leaves_by_name,
)
from sparsejax.quiet import read_files, silence

__all__ = ["CheckpointError", "Checkpointer", "DamagedCheckpointError"]

_FORMAT = 1
_TEMPORARY = "orbax-checkpoint-tmp"  # in the names of what Orbax has not finished


class Checkpointer:
    """Saves and restores training states in a folder, one sub-folder per step.

    A save is atomic (a step is there wholly or not at all, whenever the process is killed) and runs in the background
    once the values have been copied; `wait`, `close` and leaving the `with` block wait for it.

    The state is any pytree of arrays and Python numbers: parameters, optimizer states with their masks, random keys,
    counters. Leaves are stored under their names (`params/blocks/0/kernel`), so Orbax alone can read the files too.

    Args:
        directory: the folder, local or a URL that Orbax can write to; made if absent. What interrupted saves left in
            it is removed, so one process (or one job of many hosts) at a time may use it.
        keep: how many of the newest steps are kept; None keeps all.

    Raises:
        ValueError: `keep` is less than 1.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> state = {"params": {"kernel": jnp.ones((2, 2))}, "step": jnp.int32(7)}
        >>> with Checkpointer(tempfile.mkdtemp()) as checkpoints:
        ...     checkpoints.save(7, state)
        ...     restored = checkpoints.restore(jax.eval_shape(lambda: state))
        >>> int(restored["step"])
        7
    """

    def __init__(self, directory, *, keep: int | None = 2):
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 step is kept, or None for all")
        # Orbax's own sequence of checkpoints reads the metadata of all steps at once, so that one damaged step hides
        # the others; hence single checkpoints here.
        path_class = ocp.options.FileOptions().path_class
        self.directory = path_class(directory if "://" in str(directory) else Path(directory).absolute())
        self._keep = keep
        self._pending = None
        self.directory.mkdir(parents=True, exist_ok=True)
        if ocp.multihost.is_primary_host(0):
            for path in self.directory.iterdir():
                if _TEMPORARY in path.name:
                    with contextlib.suppress(OSError):  # a save given up by this job may still write; the next removes
                        path.rmtree()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Waits for a save that is under way."""
        self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
            CheckpointError: it could not be written, for example because the disk is full; steps saved before are as
                they were. Of several processes all raise it when one could not write, and the message names that one.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, save = pending
        try:
            save.wait()
        except SaveError as error:
            kept = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(
                f"{self._name(step)} could not be saved ({error}); steps saved before are as they were: {kept}. Make "
                "room, or save elsewhere, and restore the newest"
            ) from error.__cause__
        self._remove_old_steps()

    def _remove_old_steps(self) -> None:
        if self._keep is None or not ocp.multihost.is_primary_host(0):
            return
        for step in self.steps[: -self._keep]:  # renamed first, so that a step is never half there
            (self.directory / str(step)).rename(self.directory / f"{step}.{_TEMPORARY}").rmtree()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are saved, ascending. Waits for a save that is under way."""
        self.wait()
        return tuple(sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit()))

    @property
    def latest_step(self) -> int | None:
        """The newest step that is saved, None where there is none."""
        return max(self.steps, default=None)

    def save(self, step: int, state, data=None, *, overwrite: bool = False) -> None:
        """Saves a state in the background. The caller may donate it as soon as this returns.

        Args:
            step: the number to save it under, a whole number from 0 on.
            state: pytree of arrays and Python numbers.
            data: an iterator whose position is saved too, such as one of grain's: has `get_state` and `set_state`.
            overwrite: replace the step if it exists already.

        Raises:
            CheckpointError: the step exists.
            TypeError: the step is no integer.
            ValueError: the step is negative; a leaf cannot be saved, or two leaves have the same name; names the leaf.
        """
        if isinstance(step, bool) or not isinstance(step, numbers.Integral):
            raise TypeError(f"step is {step!r}; give an integer, such as int(state.step)")
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        if step in self.steps and not overwrite:
            raise CheckpointError(f"{self.directory} has step {step} already; save another or pass overwrite=True")
        leaves, records = leaves_by_name(state), describe(state)
        manifest = {"format": _FORMAT, "leaves": {name: record.to_json() for name, record in records.items()}}
        checkpointables = {"state": _nest(_stored({name: _as_array(leaf) for name, leaf in leaves.items()}))}
        if data is not None:
            manifest["data"] = data_checksums(data)
            checkpointables["data"] = data
        start = functools.partial(
            ocp.save_checkpointables_async,
            self.directory / str(step),
            checkpointables,
            overwrite=overwrite,
            custom_metadata={"sparsejax": manifest},
        )
        self._pending = step, JointSave(start)

    def restore(self, abstract_state, data=None, *, step: int | None = None, partial: bool = False):
        """Reads a state back and verifies every leaf of it.

        Args:
            abstract_state: the tree to restore: arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and
                shardings wanted, for example `jax.eval_shape(make_state)`. Leaves without a sharding go to the first
                local device. Numpy arrays and Python numbers come back as such, also an int or float that
                `jax.eval_shape` has made a 32-bit scalar.
            data: the iterator to set to the saved position; it is left as it was if restoring fails.
            step: the step to read; None reads the newest.
            partial: read only the leaves that `abstract_state` has, though more are saved.

        Returns:
            A tree of the structure of `abstract_state`.

        Raises:
            CheckpointError: there is no such step, or it holds other leaves, shapes or dtypes than those asked for.
            DamagedCheckpointError: the step cannot be read or does not verify. The message names the leaf and the
                newest other step that does verify, which are also its attributes `leaf` and `good_step`.
        """
        steps = self.steps
        if not steps:
            raise CheckpointError(f"{self.directory} has no checkpoint; start training without restoring")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"{self.directory} has no step {step}; it has {', '.join(map(str, steps))}")
        with silence():
            try:
                return self._restore(abstract_state, data, step, partial)
            except CheckpointError as error:
                problem = error.with_traceback(None)
            good = self._newest_good_step(abstract_state, data, step, partial)
            gc.collect()
        if good is None and not isinstance(problem, DamagedCheckpointError):
            raise problem  # what was asked for was never saved
        remedy = "no other step verifies" if good is None else f"restore step={good}, the newest one that verifies"
        message = f"{self._name(step)} is damaged: {problem}; {remedy}"
        raise DamagedCheckpointError(message, problem.leaf, good) from problem.__cause__

    def _name(self, step: int) -> str:
        return str(self.directory / str(step))

    def _newest_good_step(self, abstract_state, data, damaged: int, partial: bool) -> int | None:
        for step in sorted(set(self.steps) - {damaged}, reverse=True):
            position = None if data is None else data.get_state()
            with contextlib.suppress(CheckpointError):
                self._restore(abstract_state, data, step, partial)
                if data is not None:
                    data.set_state(position)
                return step
        return None

    def _restore(self, abstract_state, data, step: int, partial: bool):
        saved, position = self._manifest(step)
        wanted = {name: as_saved(leaf, saved.get(name)) for name, leaf in leaves_by_name(abstract_state).items()}
        check_layout(self._name(step), saved, wanted, partial)
        if data is not None and position is None:
            raise CheckpointError(f"{self._name(step)} was saved without data=, so it cannot set the iterator")
        restored = self._load(step, saved, {name: _request(leaf) for name, leaf in wanted.items()})
        for name, record in describe(_nest(restored)).items():
            if problem := difference(name, saved[name], record):
                raise DamagedCheckpointError(problem, name)
        if data is not None:
            self._load_data(step, data, position)
        leaves = [_like(restored[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def _manifest(self, step: int) -> tuple[dict[str, LeafRecord], list[int] | None]:
        """The records of the leaves and the checksums of the iterator's position."""
        metadata, problem = read_files(lambda: ocp.metadata(self.directory / str(step)).custom_metadata)
        if problem:
            raise DamagedCheckpointError("its metadata, with the checksums, cannot be read") from problem
        if "sparsejax" not in (metadata or {}):
            raise DamagedCheckpointError(
                "it has no checksums (its metadata is lost, or it was not saved by sparsejax.checkpoint: then read its "
                "params with Orbax and get masks from the zeros in them, sparsejax.masks_from_params(params))"
            )
        manifest = metadata["sparsejax"]
        try:
            version = manifest["format"]
            records = {name: LeafRecord.from_json(fields) for name, fields in manifest["leaves"].items()}
        except KeyError as error:
            raise DamagedCheckpointError(f"its checksums lack {error}") from None
        if version != _FORMAT:
            raise CheckpointError(f"{self._name(step)} has format {version}; this version reads {_FORMAT}")
        return records, manifest.get("data")

    def _load(self, step: int, saved: dict, requests: dict) -> dict:
        path = self.directory / str(step)
        unread = {name: ocp.PLACEHOLDER for name, record in saved.items() if math.prod(record.shape)}
        loaded, problem = read_files(lambda: ocp.load(path, _nest(unread | _stored(requests))))
        if _on_any_process(problem is not None):  # reading is a joint effort: all go on, or all give up
            each = {
                name: read_files(lambda request=request: ocp.load(path, _nest(unread | request)))[1]
                for name, request in ((name, {name: leaf}) for name, leaf in _stored(requests).items())
            }
            leaf = next((name for name, trouble in each.items() if trouble), None)
            where = "" if problem else " by another process"
            raise DamagedCheckpointError(
                f"{leaf or 'its state'} cannot be read{where}, its files are cut short or not what was written", leaf
            ) from problem
        loaded = leaves_by_name(jax.tree.map(lambda leaf: None if leaf is ocp.PLACEHOLDER else leaf, loaded))
        return {name: loaded[name] if name in loaded else _empty(request) for name, request in requests.items()}

    def _load_data(self, step: int, data, expected: list[int]) -> None:
        position = data.get_state()
        _, problem = read_files(lambda: ocp.load_checkpointables(self.directory / str(step), {"data": data}))
        if problem or (found := data_checksums(data)) != expected:
            data.set_state(position)
            wrong = "cannot be read" if problem else f"has checksum {found}, expected {expected}"
            raise DamagedCheckpointError(f"the position of the data iterator {wrong}", "data") from problem


def _on_any_process(here: bool) -> bool:
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.bool_(here))))


def _stored(leaves: dict) -> dict:
    """Leaves that have elements: Orbax cannot store the others, and they have no bits to lose."""
    return {name: leaf for name, leaf in leaves.items() if math.prod(np.shape(leaf))}


def _nest(leaves: dict) -> dict:
    tree = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _as_array(leaf):
    return np.asarray(leaf) if isinstance(leaf, bool | int | float | np.generic) else leaf


def _like(restored, leaf):
    """A restored number as the Python or numpy number that it was."""
    return type(leaf)(restored) if isinstance(leaf, bool | int | float | np.generic) else restored


def _request(leaf):
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return _as_array(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _empty(request):
    if isinstance(request, jax.ShapeDtypeStruct):
        return jax.device_put(jnp.zeros(request.shape, request.dtype), request.sharding)
    return np.zeros(request.shape, request.dtype)
