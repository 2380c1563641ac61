"""Static figures of the attention kernels, compiled without the hardware, beside JAX's splash kernels on TPU.

    python -m benchmarks.aot_attention [--targets v5e v5p v6e h200] [--shapes NAME ...] [--write benchmarks/results]

Bundles are instruction words of the compiled code: estimates, not measurements.
"""

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

import jax

from benchmarks import splash_programs
from pallas_kernels import aot
from pallas_kernels.block_sparse_attention import programs

PARTS = {"_forward": "forward", "_fwd": "forward", "_dq": "dq", "_dkv": "dkv", "_fused": "dq, dk and dv"}


def kernels_of(target, kernel, shape):
    """Kernels by what they compute."""
    found = {}
    for report in aot.compile_for(target, kernel, shape):
        for compiled in report.kernels:
            for mark, part in PARTS.items():
                if mark in compiled.name:
                    found[part] = compiled
    return found


def row(*cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def tpu_rows(target, shapes):
    """Lines of the TPU table and what they were made from."""
    lines, record = [], {}

    def add(name, part, kernel, *rest):
        memory = f"{kernel.vmem_bytes / 2**20:.1f}", f"{kernel.smem_bytes / 2**10:.1f}"
        lines.append(row(target, name, part, kernel.bodies[0], kernel.step_rest, kernel.spills, *memory, *rest))

    splash = kernels_of(target, "benchmarks.splash_programs", splash_programs.Shape())
    fused = kernels_of(target, "benchmarks.splash_programs", splash_programs.Shape(fused=1))["dkv"]
    record["splash"] = {part: dataclasses.asdict(k) for part, k in splash.items()}
    record["splash, fused backward"] = dataclasses.asdict(fused)
    for name, shape in shapes.items():
        ours = kernels_of(target, "block_sparse_attention", shape)
        record[name] = {part: dataclasses.asdict(k) for part, k in ours.items()}
        for part, kernel in ours.items():
            theirs = fused if part == "dq, dk and dv" else splash[part]
            ratio = f"{kernel.bodies[0] / theirs.bodies[0]:.3f}"
            add(name, part, kernel, *((theirs.bodies[0], ratio) if name.startswith("512 x 512") else ("", "")))
    return lines, record


def gpu_rows(target, shapes):
    """Lines of the GPU table and what they were made from."""
    lines, record = [], {}
    for name, shape in shapes.items():
        if shape.dtype == "float32" or shape.fused:
            continue
        ours = kernels_of(target, "block_sparse_attention", shape)
        record[name] = {part: dataclasses.asdict(k) for part, k in ours.items()}
        for part, k in ours.items():
            lines.append(row(target, name, part, k.registers, k.spill_bytes, k.smem_bytes // 1024, k.tensor_ops))
    return lines, record


TPU_HEADS = (
    "target",
    "shape",
    "kernel",
    "bundles of an active step",
    "other bundles of the grid loop",
    "vector spills",
    "VMEM MiB",
    "SMEM KiB",
    "splash's bundles",
    "ours / splash",
)
GPU_HEADS = ("target", "shape", "kernel", "registers", "spilled bytes", "shared memory KiB", "wgmma")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=list(aot.TARGETS), choices=aot.TARGETS)
    parser.add_argument("--shapes", nargs="*", default=list(programs.SHAPES), choices=programs.SHAPES)
    parser.add_argument("--write", type=Path, help="folder for a dated JSON and markdown file a target")
    options = parser.parse_args()
    shapes = {name: programs.SHAPES[name] for name in options.shapes}
    for target in options.targets:
        lacking = aot.missing(target)
        if lacking:
            print(f"skipped: {lacking}")
            continue
        kind = "tpu" if target in aot.TPU_TOPOLOGIES else "gpu"
        lines, record = (tpu_rows if kind == "tpu" else gpu_rows)(target, shapes)
        heads = TPU_HEADS if kind == "tpu" else GPU_HEADS
        table = "\n".join([row(*heads), row(*["---"] * len(heads)), *lines])
        print(table)
        if options.write:
            today = datetime.date.today().isoformat()
            base = options.write / f"{today}-aot-attention-{target}"
            base.parent.mkdir(parents=True, exist_ok=True)
            note = f"Static estimates of compiled code, not measurements. {today}, JAX {jax.__version__}, no device."
            record = {"note": note, "shapes": {n: dataclasses.asdict(s) for n, s in shapes.items()}, **record}
            base.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            base.with_suffix(".md").write_text(f"{note}\n\n{table}\n")


if __name__ == "__main__":
    main()
