"""What blocks cost in accuracy: RigL over stored blocks against RigL over single weights, and against dense networks.

usage: python -m experiments.block_accuracy [--output FOLDER] [--keep FILE] [--seeds 0 ...]

Trains a small byte-level transformer under each method at 80, 90 and 95 % sparsity, and dense ones: of the same size,
and of as many parameters as each sparse network keeps. What is finished in the folder is not trained again, and what
was interrupted goes on. Prints a table of held-out bits per byte, and keeps it as JSON with --keep.
"""

import argparse
import dataclasses
import functools
import json
import statistics
from pathlib import Path

import jax
from flax import nnx

from experiments.configs.bytes_lm import EXPERIMENT
from experiments.metrics import read_records
from experiments.train import train
from experiments.variant import Variant

SPARSITIES = (0.8, 0.9, 0.95)
BASE = dataclasses.replace(
    EXPERIMENT.config,
    width=128,
    depth=2,
    length=64,
    batch_size=16,
    steps=1200,
    update_every=50,
    max_bytes=2_000_000,
    heldout_windows=128,
    warmup=100,
    log_every=200,
    eval_every=1200,
    save_every=400,
)


def runs() -> dict[str, tuple[str, object]]:
    """The runs by name: which algorithm, and the configuration."""
    found = {"dense": ("dense", BASE)}
    for sparsity in SPARSITIES:
        percent = f"{100 * sparsity:.0f} %"
        single = dataclasses.replace(BASE, sparsity=sparsity)
        found[f"unstructured RigL, {percent}"] = ("rigl", single)
        found[f"block RigL, {percent}"] = ("rigl", dataclasses.replace(single, storage="block"))
        found[f"dense of equal size, {percent}"] = ("dense", dataclasses.replace(BASE, width=equal_width(sparsity)))
    return found


def sizes(config) -> tuple[int, int]:
    """Parameters of the model in all, and in the layers that are made sparse."""
    state = nnx.state(nnx.eval_shape(lambda: EXPERIMENT.model(config, nnx.Rngs(0))), nnx.Param)
    leaves = nnx.to_pure_dict(state)
    total = sum(leaf.size for leaf in jax.tree.leaves(leaves))
    return total, sum(leaf.size for leaf in jax.tree.leaves(leaves["blocks"]) if leaf.ndim > 1)


@functools.cache
def equal_width(sparsity: float) -> int:
    """Width of the dense network that has about as many parameters as the sparse one keeps."""
    total, sparse = sizes(BASE)
    kept = total - sparsity * sparse
    widths = range(BASE.heads, BASE.width, BASE.heads)
    return min(widths, key=lambda width: abs(sizes(dataclasses.replace(BASE, width=width))[0] - kept))


def final(folder: Path, algorithm: str, config, seed: int) -> dict:
    """The closing record of a run, which is trained if it has not been."""
    log = folder / "metrics.jsonl"
    done = [record for record in read_records(log) if record["kind"] == "final"] if log.exists() else []
    if done:
        return done[0]
    folder.mkdir(parents=True, exist_ok=True)
    return train(Variant(EXPERIMENT, config, algorithm, _task()), folder, seed, resume=True, progress=False)


@functools.cache
def _task():
    return EXPERIMENT.task(BASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/block_accuracy"), help="folder of the runs")
    parser.add_argument("--keep", type=Path, help="keep the table in this JSON file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each run is trained under each seed")
    arguments = parser.parse_args()
    rows = []
    print(f"{'network':28} {'bits per byte':>14} {'parameters kept':>16}", flush=True)
    for name, (algorithm, config) in runs().items():
        folder = arguments.output / name.replace(" ", "-").replace(",", "").replace("%", "percent")
        records = [final(folder / f"seed{seed}", algorithm, config, seed) for seed in arguments.seeds]
        total, sparse = sizes(config)
        kept = total - sparse + records[0]["nnz"]
        bits = [record["bits_per_byte"] for record in records]
        row = {"network": name, "bits per byte": statistics.mean(bits), "parameters kept": kept, "seeds": len(bits)}
        rows.append(row)
        print(f"{name:28} {row['bits per byte']:14.3f} {kept:16,}", flush=True)
    if arguments.keep:
        arguments.keep.write_text(
            json.dumps({"configuration": dataclasses.asdict(BASE), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
