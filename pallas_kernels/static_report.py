"""What compilers say about a kernel without running it: static bundles (TPU), registers and spills (GPU), memory.

A TPU core issues one bundle a cycle, so the bundles of a grid step estimate its cycles where it does not wait for
memory. They are estimates of the instruction stream, not measurements.
"""

import dataclasses
import re
from pathlib import Path

_SMALL = 24
"""Regions of fewer bundles count as part of what surrounds them."""


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """Static figures of a compiled TPU kernel.

    Attributes:
        name: the kernel's name in the program.
        bodies: bundles of every predicated region of the grid loop that holds matrix products, in program order: one of
            them runs in an active grid step.
        step_rest: bundles of the grid loop outside those bodies: fetching, and the start and end of an output row.
        matmuls: matrix instructions of every body.
        spills: vector registers stored to and loaded from memory by the register allocator, in the whole kernel.
        vmem_bytes: vector memory, windows included.
        smem_bytes: scalar memory, prefetched lists included.
    """

    name: str
    bodies: tuple[int, ...]
    step_rest: int
    matmuls: tuple[int, ...]
    spills: int
    vmem_bytes: int
    smem_bytes: int


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """Static figures of a compiled GPU kernel.

    Attributes:
        name: the kernel's name.
        registers: per thread, before warps trade them.
        spill_bytes: stores and loads of registers to local memory.
        smem_bytes: shared memory of a block, dynamic part included.
        tensor_ops: warpgroup matrix instructions in the code.
    """

    name: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    tensor_ops: int


def _regions(text: str) -> tuple[list[tuple[int, int]], list[int]]:
    """Regions as (first, past the last) bundle, and the matrix instructions of each bundle."""
    text = text.split("control target key end", 1)[1]
    opened: dict[str, int] = {}
    regions, matmuls = set(), []
    for bundle in re.split(r"\n(?= *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:)", text)[1:]:
        matmuls.append(bundle.count("vmatmul"))
        for event, region in re.findall(r"(Start/End empty|Start|End) region (\d+)", bundle):
            if event == "Start":
                opened[region] = len(matmuls)
            elif event == "End" and region in opened:
                regions.add((opened.pop(region), len(matmuls)))
    return sorted(regions), matmuls


def _within(outer, regions):
    """The largest regions inside another."""
    inside = [r for r in regions if outer[0] <= r[0] and r[1] <= outer[1] and r != outer and r[1] - r[0] >= _SMALL]
    return [r for r in inside if not any(o != r and o[0] <= r[0] and r[1] <= o[1] for o in inside)]


def _grid_loop(text: str) -> tuple[list[tuple[int, int]], int]:
    """Bodies with matrix products in the grid loop as (bundles, matrix instructions), and the loop's other bundles."""
    regions, matmuls = _regions(text)
    loop = max(regions, key=lambda r: r[1] - r[0])
    current = loop
    while True:
        children = _within(current, regions)
        shell = [c for c in children if c[1] - c[0] > 0.9 * (current[1] - current[0])]
        if not shell:
            break
        current = shell[0]
    bodies = [(b - a, sum(matmuls[a:b])) for a, b in sorted(children) if sum(matmuls[a:b])]
    if not bodies:
        bodies = [(current[1] - current[0], sum(matmuls[slice(*current)]))]
    return bodies, loop[1] - loop[0] - sum(size for size, _ in bodies)


def _newest(folder: Path, kernel: str, kind: str) -> Path | None:
    name = re.compile(rf"\d+-{re.escape(kernel)}-\d+-{kind}\.txt")
    return max((p for p in folder.glob(f"*-{kind}.txt") if name.fullmatch(p.name)), default=None)


def read_tpu_dump(folder: str | Path) -> list[TpuKernel]:
    """Kernels of a folder that libtpu wrote with `--xla_jf_dump_to` and `--xla_jf_dump_llo_text`.

    Args:
        folder: the dump. Operations without matrix products in a grid loop (copies, fusions) are left out.

    Returns:
        One entry for each kernel, in order of compilation.
    """
    folder = Path(folder)
    names: dict[str, None] = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
        if match:
            names[match[1]] = None
    kernels = []
    for name in names:
        if name.startswith("<") or "fusion" in name:
            continue
        header = _newest(folder, name, "original")
        bundles = _newest(folder, name, "final_bundles")
        text = bundles.read_text()
        if "vmatmul" not in text or " region " not in text or header is None:
            continue
        bodies, rest = _grid_loop(text)
        memory = {"smem": 0, "vmem": 0}
        with header.open() as lines:
            for line in lines:
                match = re.search(r"#allocation\d+ \[.*space=(smem|vmem), size = 0x([0-9a-f]+)", line)
                if match and "fixed_abs" not in line:
                    memory[match[1]] += int(match[2], 16)
        slots = _newest(folder, name, "final_hlo-static-per-bundle-utilization")
        spills = 0
        if slots is not None:
            table = slots.read_text().splitlines()
            columns = [c.strip() for c in table[1].split(",")]
            moved = [i for i, c in enumerate(columns) if c in ("VLOAD:FILL", "VSTORE:SPILL")]
            rows = (line.split() for line in table[4:])
            spills = sum(int(row[i]) for row in rows if len(row) == len(columns) for i in moved)
        kernels.append(
            TpuKernel(
                name=name,
                bodies=tuple(size for size, _ in bodies),
                step_rest=rest,
                matmuls=tuple(count for _, count in bodies),
                spills=spills,
                vmem_bytes=memory["vmem"],
                smem_bytes=memory["smem"],
            )
        )
    return kernels


def read_gpu_dump(folder: str | Path) -> list[GpuKernel]:
    """Kernels of a folder that Mosaic GPU wrote with `MOSAIC_GPU_DUMP_TO`, `MOSAIC_GPU_DUMP_PTX` and `..._PTXAS`."""
    kernels = []
    # Resources are numbered as kernels were traced, the rest as they were compiled: they meet by name.
    scratch: dict[str, int] = {}
    for path in sorted(Path(folder).glob("*.resources.txt")):
        found = re.search(r"smem_scratch_bytes=(\d+)", path.read_text())
        name = re.sub(r"_\d+\.resources$", "", path.stem)
        scratch[name] = max(scratch.get(name, 0), int(found[1]) if found else 0)
    for path in sorted(Path(folder).glob("*.ptxas")):
        text = path.read_text(errors="replace")
        name = re.sub(r"_\d+$", "", path.stem)
        registers = re.search(r"Used (\d+) registers", text)
        if registers is None:
            continue
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)]
        static = re.search(r"(\d+) bytes smem", text)
        ptx = path.with_suffix(".ptx")
        kernels.append(
            GpuKernel(
                name=name,
                registers=int(registers[1]),
                spill_bytes=sum(spills),
                smem_bytes=(int(static[1]) if static else 0) + scratch.get(name, 0),
                tensor_ops=len(re.findall(r"wgmma\.mma_async", ptx.read_text())) if ptx.exists() else 0,
            )
        )
    return kernels
