"""What each of two processes does in `test_processes.py`: `two_processes.py PORT INDEX FOLDER ALGORITHM`."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from experiments import processes
from experiments.agreement import check_copies
from experiments.configs.bytes_lm import EXPERIMENT
from experiments.machines import Machines
from experiments.train import train
from experiments.variant import Variant


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


def watched() -> str | None:
    """The second process reads data for long, while the first one waits for it in a step."""
    said = []
    with processes.Watch(1.0, interval=0.1, end=said.append) as watch:
        first = jax.process_index() == 0
        watch.doing(processes.STEPPING if first else processes.READING, 7)
        time.sleep(2.5)
    return said[0] if said else None


def main(port: str, index: str, folder: str, name: str) -> None:
    machines = Machines((2, 2, 2), coordinator=f"127.0.0.1:{port}", processes=2, process=int(index), patience=120)
    machines.start()
    layout = machines.layout()
    config = tiny.config()
    variant = Variant(EXPERIMENT, config, name, EXPERIMENT.task(config), layout)
    began = time.time()
    train(variant, Path(folder), 0, resume=False, progress=False, machines=machines)
    found = {"seconds": time.time() - began}
    facts = {"seed": 3, "rate": 0.1 if index == "0" else 0.2}
    found["facts"] = message(processes.DisagreementError, processes.agree, facts, 20.0)
    found["copies"] = differing_copies(layout.mesh)
    found["watched"] = watched()
    found["late"] = late()
    (Path(folder) / f"found{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
