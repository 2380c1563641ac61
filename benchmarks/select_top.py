"""`select_top` against a mask made by argsort and against numpy's partition, side by side in one process.

python benchmarks/select_top.py [--million 1 4 32] [--output benchmarks/results/select_top.json]

`argsort` is what the mask costs with a sort: argsort in JAX, then a scatter. `partition` is numpy's alone: it finds the
threshold but makes no mask and settles no ties. Figures are medians of alternating runs.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import alternate, median, ratio, report

import sparsejax

WIDTH = 1024
SCORES = {
    "float32": lambda scores: scores,
    "bfloat16": lambda scores: scores.astype(jnp.bfloat16),
    "float32, ties": lambda scores: jnp.round(scores * 8) / 8,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=int, nargs="+", default=[1, 4, 32], help="elements, in units of 2**20")
    parser.add_argument("--density", type=float, default=0.1, help="fraction of elements that is kept")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each variant")
    parser.add_argument("--output", type=Path, help="keep the figures in this JSON file")
    arguments = parser.parse_args()

    rows = []
    for million in arguments.million:
        normal = jnp.abs(jax.random.normal(jax.random.key(0), (million * 2**20 // WIDTH, WIDTH)))
        for kind, convert in SCORES.items():
            rows.append(compare(convert(normal), arguments.density, arguments.rounds) | {"scores": kind})
    report("select_top", rows, arguments.output)


def compare(scores: jax.Array, density: float, rounds: int) -> dict:
    """Times the three on one array."""
    size = scores.size
    count = round(size * density)
    flat = np.asarray(scores.astype(jnp.float32)).reshape(-1)
    if not bool((argsort_mask(scores, count) == sparsejax.select_top(scores, count)).all()):
        raise AssertionError("select_top and argsort disagree")
    timings = alternate(
        {
            "select_top": lambda: sparsejax.select_top(scores, count),
            "argsort": lambda: argsort_mask(scores, count),
            "partition": lambda: np.partition(flat, size - count),
        },
        rounds=rounds,
    )
    return (
        {"elements": size}
        | {f"{name} ms": 1e3 * median(timings, name) for name in timings}
        | {
            "argsort / select_top": ratio(timings, "argsort", "select_top"),
            "select_top / partition": ratio(timings, "select_top", "partition"),
        }
    )


@jax.jit
def argsort_mask(scores: jax.Array, count: int) -> jax.Array:
    """The mask by a stable sort: what is plain to write in JAX."""
    order = jnp.argsort(-scores.reshape(-1), stable=True)
    return jnp.zeros(scores.size, bool).at[order].set(jnp.arange(scores.size) < count).reshape(scores.shape)


if __name__ == "__main__":
    main()
