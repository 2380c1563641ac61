"""A small configuration of the demo, for tests of the training loop."""

import dataclasses

from experiments.configs.digits_dst import EXPERIMENT
from experiments.variant import Variant

CONFIG = dataclasses.replace(
    EXPERIMENT.config,
    algorithms=("rigl",),
    seeds=(0,),
    sparsity=0.9,
    hidden=(24,),
    steps=70,  # a multiple of none of what follows
    batch_size=32,
    update_every=10,
    log_every=15,
    eval_every=20,
    save_every=20,
)


def variant(name: str, **changes) -> Variant:
    """The small configuration under an algorithm."""
    config = dataclasses.replace(CONFIG, algorithms=(name,), **changes)
    return Variant(EXPERIMENT, config, name, EXPERIMENT.task(config))


def without_seconds(records: list[dict]) -> list[dict]:
    """What two runs of the same thing have in common."""
    records = [record for record in records if record["kind"] != "speed"]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]
