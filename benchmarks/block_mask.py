"""Time and memory of building a BlockMask, transpose included.

python benchmarks/block_mask.py [--output benchmarks/results/block_mask.json]

The goal is `Causal() & Local(4096) | Sink(4)` at 2**20 tokens in blocks of 128: under a second and under 100 MB. Peak
memory is what Python and NumPy allocate while building, counted by tracemalloc in a run of its own, since it slows.
"""

import argparse
import resource
import time
import tracemalloc
from pathlib import Path

import numpy as np
from measure import report

from sparsejax.attention import Causal, Chunk, Documents, Local, Mask, Sink, Strided, compile_mask

GOAL = Causal() & Local(4096) | Sink(4)
MILLION = 2**20
BLOCK = 128


def measure(mask: Mask, tokens: int, rounds: int) -> dict:
    """Builds the mask several times; seconds are those of the median."""
    sides = {"q_len": tokens, "kv_len": tokens, "bq": BLOCK, "bk": BLOCK}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        compiled = compile_mask(mask, **sides)
        seconds.append(time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    del compiled
    tracemalloc.start()
    compiled = compile_mask(mask, **sides)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    lists = compiled.lists
    leaves = (lists.idx, lists.n_part, lists.n_tot, lists.t_idx, lists.t_slot, lists.t_ptr, lists.t_part, lists.t_tot)
    return {
        "mask": str(mask) if len(str(mask)) < 48 else "Causal() & Documents(...)",
        "tokens": tokens,
        "tiles": int(np.sum(lists.n_tot)),
        "seconds": float(np.median(seconds)),
        "slowest": max(seconds),
        "peak MB": peak / 1e6,
        "process grew by MB": grown / 1e3,
        "kept MB": sum(leaf.nbytes for leaf in leaves) / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each mask is built")
    parser.add_argument("--output", type=Path, help="keep the figures in this JSON file")
    arguments = parser.parse_args()
    lengths = np.random.default_rng(0).integers(100, 4000, 600)
    cases = [
        (GOAL, MILLION),
        (Causal() & (Local(4096) | Sink(4)), MILLION),
        (Causal() & Chunk(8192), MILLION),
        (Causal() & Documents(lengths), int(lengths.sum())),
        (Causal(), MILLION // 8),
        (Strided(1024) & Local(2**14), MILLION // 8),
    ]
    compile_mask(GOAL, 1024, 1024)  # what is imported and set up once
    rows = [measure(mask, tokens, arguments.rounds) for mask, tokens in cases]
    report("block_mask", rows, arguments.output)
    goal = rows[0]
    print(
        f"goal: {goal['seconds']:.3f} s, to be under 1 s; {goal['peak MB']:.0f} MB allocated and the process "
        f"{goal['process grew by MB']:.0f} MB larger, to be under 100 MB"
    )


if __name__ == "__main__":
    main()
