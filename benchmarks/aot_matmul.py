"""Static figures of the block-sparse and N:M matmul kernels, compiled without the hardware.

    python -m benchmarks.aot_matmul [--targets v5e v5p v6e h200] [--write benchmarks/results]

Bundles are instruction words of the compiled code: estimates, not measurements. Targets whose compiler is not installed
are skipped; what is written joins what other environments wrote on the same day.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import math
import re
from pathlib import Path

import jax

from pallas_kernels import aot
from pallas_kernels.block_sparse_matmul import tpu
from pallas_kernels.block_sparse_matmul.shapes import Sizes

KERNELS = ("block_sparse_matmul", "nm_matmul")
FEED = 4
"""Cycles that the four 128 x 128 matrix units of v5e and of a core of v5p take for one matrix instruction each has
a share in: it multiplies 16 rows on one of them."""
PRODUCTS = {"v5e": 16 * 128 * 128, "v5p": 16 * 128 * 128, "v6e": 16 * 256 * 128}
"""Multiplications of one matrix instruction where the result is 128 wide."""
NOTE = (
    "Static estimates of compiled code, not measurements: no TPU or GPU was present. A TPU core issues one bundle a "
    "cycle where it does not wait for memory. 'MXU use' is the cycles that the matrix units need for the matrix "
    "instructions, over the larger of those cycles and the bundles: of the loop's body alone, and with all other "
    "bundles of the grid step charged to the mean number of blocks that the shape has there."
)


def use(matmuls, body, rest=0.0):
    """Share of the cycles in which the matrix units are fed."""
    fed = FEED * matmuls
    return fed / (max(fed, body) + rest)


def shapes_of(kernel):
    return importlib.import_module(aot.KERNELS[kernel]).SHAPES


def loop_of(target, kernel, shape):
    """Bundles and matrix instructions of the loop's body, and the blocks that it multiplies."""
    bodies, matmuls = kernel["bodies"], kernel["matmuls"]
    if "nm_matmul" in kernel["name"]:
        return bodies[0], matmuls[0], 1
    if "dvalues" in kernel["name"]:
        bn, passes = shape.bn or shape.bk, 6 if shape.dtype == "float32" else 1
        sizes = Sizes(shape.inputs, shape.outputs, shape.bk, bn, shape.groups, shape.capacity)
        rows = tpu._gradient_plan(shape.rows, sizes, 4 if shape.dtype == "float32" else 2).rows
        # What the compiler reports as one body may hold the loop over pairs of blocks and the one for what is left.
        return bodies[0], matmuls[0], round(matmuls[0] / (rows * shape.bk * bn * passes / PRODUCTS[target]))
    # The product of a column's first block stands before the loops, and the loop for what is left over behind.
    at = min(1, len(bodies) - 1)
    return bodies[at], matmuls[at], round(matmuls[at] / min(matmuls))


def whole_use(kernel, shape, loop):
    """MXU use with all other bundles of the grid step, and what that was taken for."""
    body, matmuls, blocks = loop
    if "nm_matmul" in kernel["name"]:
        return use(matmuls, body, kernel["step_rest"]), "a grid step"
    slots = shape.groups * shape.capacity
    if "dvalues" in kernel["name"]:
        # Clearing and writing out happen once for a block, the rest once for a panel.
        panels = math.ceil(shape.rows / 1024)
        rest = kernel["step_rest"] * (1 / slots + 1 / panels)
        return use(matmuls / blocks, body / blocks, rest), f"{slots} blocks"
    width, size = (shape.inputs, shape.bk) if "_dx" in kernel["name"] else (shape.outputs, shape.bn or shape.bk)
    mean = max(1.0, slots / math.ceil(width / size))
    first = max(kernel["bodies"][0], FEED * kernel["matmuls"][0])
    more = (mean - 1) * max(body, FEED * matmuls) / blocks
    return mean * FEED * matmuls / blocks / (first + more + kernel["step_rest"]), f"{mean:.1f} blocks"


def figures_of(target, kernel, name, shape):
    """{part: figures} of a shape, or why it is refused."""
    try:
        reports = aot.compile_for(target, kernel, shape)
    except RuntimeError as error:
        if "refused:" not in str(error):
            raise
        reason = next(line for line in str(error).splitlines() if "refused:" in line)
        return {"refused": reason.split("refused:", 1)[1].strip()}
    # The compiler adds where a kernel was called from to its name.
    compiled = [k for report in reports for k in report.kernels]
    parts = [(re.search(rf"{kernel}_(forward|dx|dvalues|dweights)", k.name), k) for k in compiled]
    found = {part[1]: dataclasses.asdict(k) for part, k in parts if part}
    print(target, kernel, name, *found, flush=True)
    return found


def row(*cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(heads, rows):
    return "\n".join([row(*heads), row(*["---"] * len(heads)), *(row(*cells) for cells in rows)])


def gpu_row(where, k):
    return *where, k["registers"], k["spill_bytes"], k["smem_bytes"] // 1024, k["tensor_ops"]


def gpu_table(rows):
    heads = "target", "kernel", "shape", "part", "registers", "spilled bytes", "shared memory KiB", "wgmma"
    note = "Registers are those of the compiler's log: it compiles relocatably, where warpgroups trade none."
    return note + "\n\n" + table(heads, rows)


def report(record, title, script, measures, tpu_row):
    """The record as markdown; `tpu_row(where, figures)` gives the cells of what was compiled for a TPU."""
    tpus, gpus, refused = [], [], []
    for target, kernels in record["targets"].items():
        for kernel, shapes in kernels.items():
            for name, parts in shapes.items():
                if "refused" in parts:
                    refused.append(f"- {target}, {kernel}, {name}: {parts['refused']}")
                    continue
                for part, k in parts.items():
                    where = target, kernel, name, part
                    if target not in aot.TPU_TOPOLOGIES:
                        gpus.append(gpu_row(where, k))
                        continue
                    sizes = f"{k['vmem_bytes'] / 2**20:.1f}", f"{k['smem_bytes'] / 2**10:.1f}"
                    tpus.append((*where, *tpu_row(where, k), k["spills"], *sizes))
    text = [f"# {title} compiled without the hardware, {record['date']}", record["note"]]
    text.append(f"Repeat with `python -m benchmarks.{script}`; shapes are `SHAPES` of each kernel's `programs.py`.")
    if tpus:
        heads = "target", "kernel", "shape", "part", *measures, "spills", "VMEM MiB", "SMEM KiB"
        text.append(table(heads, tpus))
    if gpus:
        text.append(gpu_table(gpus))
    if refused:
        text.append("Refused:\n\n" + "\n".join(refused))
    return "\n\n".join(text) + "\n"


def render(record):
    """The record as markdown."""

    def tpu_row(where, k):
        target, kernel, name, _ = where
        # The matrix units of v6e are of another size, which the instructions do not tell.
        shown = target != "v6e"
        body, matmuls, blocks = loop = loop_of(target, k, shapes_of(kernel)[name])
        whole, per = whole_use(k, shapes_of(kernel)[name], loop)
        uses = (f"{use(matmuls, body):.0%}", f"{whole:.0%} of {per}") if shown else ("", "")
        return f"{body / blocks:.0f}", k["step_rest"], *uses

    measures = "bundles a block", "other bundles", "MXU use, loop", "MXU use, whole"
    return report(record, "Matmul kernels", "aot_matmul", measures, tpu_row)


def merged(found, path, note):
    """What was found joined with what is in the JSON at the path, if there is one, where it is kept at once."""
    record = {"date": datetime.date.today().isoformat(), "note": note, "jax": {}, "targets": {}}
    # Read late, since another environment may have written meanwhile.
    if path and path.exists():
        record |= json.loads(path.read_text()) | {"note": note}
    for target, kernels in found.items():
        record["jax"][target] = jax.__version__
        for kernel, shapes in kernels.items():
            record["targets"].setdefault(target, {}).setdefault(kernel, {}).update(shapes)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def command(description, topic, note, kernels, render):
    """Compiles what the command line names, joins it with what was found before, and prints or writes tables."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--targets", nargs="*", default=list(aot.TARGETS), choices=aot.TARGETS)
    parser.add_argument("--kernels", nargs="*", default=kernels, choices=kernels)
    parser.add_argument("--shapes", nargs="*", default=[], help="names of shapes; default all")
    parser.add_argument("--write", type=Path, help="folder for a dated JSON and markdown file")
    options = parser.parse_args()
    path = options.write and options.write / f"{datetime.date.today().isoformat()}-{topic}.json"
    record = merged({}, path, note)
    for target in options.targets:
        lacking = aot.missing(target)
        if lacking:
            print(f"skipped: {lacking}")
            continue
        for kernel in options.kernels:
            for name in shapes_of(kernel):
                if not options.shapes or name in options.shapes:
                    # Kept one by one, since each takes long.
                    found = figures_of(target, kernel, name, shapes_of(kernel)[name])
                    record = merged({target: {kernel: {name: found}}}, path, note)
    print(render(record))
    if path:
        path.with_suffix(".md").write_text(render(record))


if __name__ == "__main__":
    command(__doc__.splitlines()[0], "aot-matmul", NOTE, KERNELS, render)
