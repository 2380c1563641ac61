"""A byte model so small that two processes on one core train it in seconds."""

import dataclasses

from experiments.configs.bytes_lm import EXPERIMENT
from experiments.sharding import Layout
from experiments.variant import Variant

FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Flags for XLA: half a minute of compilation becomes seconds, and it does not matter how fast the code is."""

STORED = {"storage": "block", "block": (4, 4), "block_groups": 2}
"""Changes of the configuration that store blocks, which the second axis of a mesh of 2 x 2 x 2 splits."""


def config(**changes):
    """The configuration: masks move at steps 2, 4 and 6."""
    fields = {
        "algorithms": ("rigl", "sr_ste"),
        "width": 16,
        "depth": 1,
        "heads": 2,
        "length": 16,
        "max_bytes": 200_000,
        "heldout_windows": 16,
        "batch_size": 8,
        "steps": 8,
        "update_every": 2,
        "warmup": 2,
        "log_every": 4,
        "eval_every": 8,
        "save_every": 4,
        "masks_until": 1.0,
    }
    return dataclasses.replace(EXPERIMENT.config, **(fields | changes))


def variant(name: str, layout: Layout | None = None) -> Variant:
    """An algorithm's variant; `stored` is RigL with stored blocks."""
    found = config(**STORED) if name == "stored" else config()
    return Variant(EXPERIMENT, found, "rigl" if name == "stored" else name, EXPERIMENT.task(found), layout)


def flags(**changes) -> list[str]:
    """The configuration as words of the command line."""
    found = config(**changes)
    words = []
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if value is True:
            words.append(f"--{field.name.replace('_', '-')}")
        elif value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return words
