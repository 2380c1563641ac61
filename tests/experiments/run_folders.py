"""Writes run folders as the experiments do, with made-up figures."""

import json
import math
from pathlib import Path

LAYERS = {"layers/0/kernel": 19200, "layers/1/kernel": 30000, "layers/2/kernel": 1000}
DENSITIES = {"layers/0/kernel": 0.02, "layers/1/kernel": 0.014, "layers/2/kernel": 0.2}
# method: final accuracy, churn per record at the start, execution
METHODS = {
    "dense": (0.981, 0.0, "dense"),
    "static": (0.861, 0.0, "simulated"),
    "set": (0.941, 0.3, "simulated"),
    "rigl": (0.961, 0.2, "simulated"),
    "gradual": (0.967, 0.05, "simulated"),
}


def write_runs(folder, methods=METHODS, *, seeds=3, steps=1200, metric="accuracy", unfinished=(), layers=LAYERS):
    """Writes `<method>/seed<k>/` folders; runs named in `unfinished` as (method, seed) stop half-way."""
    for index, (method, (quality, churn, execution)) in enumerate(methods.items()):
        for seed in range(seeds):
            run = Path(folder) / method / f"seed{seed}"
            run.mkdir(parents=True)
            config = {"experiment": "digits_dst", "variant": method, "seed": seed, "learning_rate": 0.1, "steps": steps}
            config |= {"sparsity": 0.0 if execution == "dense" else 0.98, "widths": [300, 100], "algorithm": method}
            (run / "config.json").write_text(json.dumps(config))
            records = list(_records(quality, churn, execution, 10 * index + seed, steps, metric, layers))
            if (method, seed) in unfinished:
                records = [r for r in records if r["step"] <= steps // 2 and r["kind"] != "final"]
            (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Path(folder)


def _records(quality, churn, execution, salt, steps, metric, layers):
    wobble = 0.006 * math.sin(2.7 * salt)
    start = 0.1 if metric == "accuracy" else 8.0
    reached = start
    for step in range(0, steps + 1, 100):
        yield {"kind": "train", "step": step, "loss": 2.3 * math.exp(-step / 300), "seconds": step / 100}
        reached = quality + wobble + (start - quality) * math.exp(-step / 150) + 0.003 * math.sin(step + salt)
        yield {"kind": "eval", "step": step, "loss": 1 - reached, metric: reached}
        yield _masks(step, steps, churn, execution, layers)
    masks = _masks(steps, steps, churn, execution, layers)
    nnz, size = masks["nnz"], masks["size"]
    dense_training, dense_inference = 3 * 2 * size * steps, 2 * size
    yield {"kind": "final", "step": steps, metric: reached, "nnz": nnz, "size": size, "sparsity": 1 - nnz / size,
           "training_flops": dense_training * (0.025 if nnz < size else 1), "dense_training_flops": dense_training,
           "inference_flops": 2 * nnz, "dense_inference_flops": dense_inference, "execution": execution,
           "seconds": 12.5}  # fmt: skip


def _masks(step, steps, churn, execution, layers):
    rows = {}
    for path, size in layers.items():
        nnz = size if execution == "dense" else round(DENSITIES.get(path, 0.02 + 0.001 * len(rows)) * size)
        moved = round(nnz * churn * (1 + math.cos(math.pi * step / steps)) / 2) if step else 0
        rows[path] = {"nnz": nnz, "size": size, "added": moved, "dropped": moved}
    nnz, size = (sum(row[key] for row in rows.values()) for key in ("nnz", "size"))
    return {"kind": "masks", "step": step, "nnz": nnz, "size": size, "layers": rows,
            "exploration": min(1, nnz / size * (1 + 4 * churn * step / steps))}  # fmt: skip
