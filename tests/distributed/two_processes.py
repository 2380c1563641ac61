"""What each of two processes does in `test_processes.py`: `two_processes.py PORT INDEX FOLDER NAMES`."""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from experiments import processes
from experiments.agreement import check_copies
from experiments.machines import Machines
from experiments.train import train
from experiments.variant import Variant
from sparsejax.checkpoint import Checkpointer, CheckpointError, DamagedCheckpointError
from sparsejax.masks.paths import map_with_names


def message(error: type[Exception], function, *arguments) -> str | None:
    """What a function raises, or None."""
    try:
        function(*arguments)
    except error as raised:
        return str(raised)
    return None


def differing_copies(mesh) -> str | None:
    """One host holds another bit of one leaf."""
    value = np.zeros((4, 4), np.float32)
    value[2, 1] = 1e-30 * jax.process_index()
    whole = NamedSharding(mesh, PartitionSpec())
    same = [jax.device_put(np.ones(8, bool), device) for device in jax.local_devices()]
    different = [jax.device_put(value, device) for device in jax.local_devices()]
    state = {
        "mask": jax.make_array_from_single_device_arrays((8,), whole, same),
        "layer": {"kernel": jax.make_array_from_single_device_arrays((4, 4), whole, different)},
    }
    assert message(processes.DisagreementError, check_copies, {"mask": state["mask"]}, mesh) is None
    return message(processes.DisagreementError, check_copies, state, mesh)


def late() -> str | None:
    """The second process comes to a barrier after the first has lost patience."""
    if jax.process_index() == 1:
        time.sleep(2)
        return None
    return message(processes.LateError, processes.barrier, "a test", 0.5)


def watched(answers: bool) -> str | None:
    """The second process reads data for long, or no longer answers, while the first one waits for it in a step."""
    said, first = [], jax.process_index() == 0
    watch = processes.Watch(2.0 if answers else 8.0, interval=0.2, end=said.append)
    with watch if first or answers else contextlib.nullcontext():
        watch.doing(processes.STEPPING if first else processes.READING, 7)
        time.sleep(4)
    return said[0] if said else None


MASK = "opt_state/masks/blocks/0/up/kernel"


def with_mask(state, change):
    """A state of which one mask is another one."""
    return map_with_names(lambda name, leaf: change(leaf) if name == MASK else leaf, state)


def damaged(variant: Variant, run: Path, folder: Path) -> dict[str, str | None]:
    """What a joint restore says of a step that was damaged, the one before it being whole."""
    like = variant.abstract_state()
    with Checkpointer(run / "checkpoints") as checkpoints:
        state = checkpoints.restore({"train": like, "training_flops": 0})["train"]
    with variant.layout.context():
        flipped = with_mask(state, jax.jit(lambda mask: mask.at[0, 0].set(~mask[0, 0])))
        widened = with_mask(state, jax.jit(lambda mask: mask.astype(jnp.int8)))
    without = state._replace(opt_state=state.opt_state._replace(masks=None))
    found = {}
    for kind, second in {"truncated": state, "bit": flipped, "dtype": widened, "no masks": without}.items():
        with Checkpointer(folder / kind) as checkpoints:
            checkpoints.save(4, state)
            checkpoints.save(8, second)
        if jax.process_index() == 0 and kind == "truncated":
            for path in (folder / kind / "8").rglob("d/*"):
                path.write_bytes(path.read_bytes()[:-100])
        if jax.process_index() == 0 and kind == "bit":  # under the checksums of the masks before
            metadata = [folder / kind / step / "_CHECKPOINT_METADATA" for step in ("4", "8")]
            old, new = (json.loads(path.read_text()) for path in metadata)
            new["custom_metadata"]["sparsejax"] = old["custom_metadata"]["sparsejax"]
            metadata[1].write_text(json.dumps(new))
        processes.barrier("a test", 60)
        with Checkpointer(folder / kind) as checkpoints:
            found[kind] = message(DamagedCheckpointError, checkpoints.restore, like)
    return found


def full_disk(variant: Variant, folder: Path, full: int) -> str | None:
    """The disk of one process is full when the second of two steps is saved."""
    folder, state = folder / f"full{full}", variant.first_state(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        if jax.process_index() == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        said = message(CheckpointError, lambda: (checkpoints.save(2, variant.first_state(1)), checkpoints.wait()))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Checkpointer(folder) as checkpoints:
        assert checkpoints.latest_step == 1
        restored = checkpoints.restore(variant.abstract_state())
    same = jax.tree.map(lambda a, b: bool(jax.jit(lambda a, b: (a == b).all())(a, b)), restored, state)
    assert all(jax.tree.leaves(same)), same
    return said


def main(port: str, index: str, folder: str, names: str) -> None:
    machines = Machines((2, 2, 2), coordinator=f"127.0.0.1:{port}", processes=2, process=int(index), patience=120)
    machines.start()
    layout = machines.layout()
    found, folder = {"seconds": {}}, Path(folder)
    for name in names.split(","):
        began = time.time()
        variant = tiny.variant(name, layout)
        train(variant, folder / name, 0, resume=False, progress=False, machines=machines)
        found["seconds"][name] = time.time() - began
    facts = {"seed": 3, "rate": 0.1 if index == "0" else 0.2}
    found["facts"] = message(processes.DisagreementError, processes.agree, facts, 20.0)
    found["copies"] = differing_copies(layout.mesh)
    found["slow"], found["silent"] = watched(True), watched(False)
    began = time.time()
    found["damaged"] = damaged(variant, folder / name, folder)
    found["seconds"]["damaged"] = time.time() - began
    began = time.time()
    found["full disk"] = [full_disk(variant, folder, full) for full in (1, 0)]
    found["seconds"]["full disk"] = time.time() - began
    found["late"] = late()
    (folder / f"found{index}.json").write_text(json.dumps(found))
    processes.leave_together()
    os._exit(0)  # a save that another process gave up still waits for it in the background


if __name__ == "__main__":
    main(*sys.argv[1:])
