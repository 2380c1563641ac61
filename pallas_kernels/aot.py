"""Compiles a kernel for a TPU or GPU that need not be there, and prints what it will take.

    python -m pallas_kernels.aot --target v5e --kernel block_sparse_attention --shape heads=16 q_len=8192 width=4

Targets v5e, v5p and v6e need libtpu (`pip install 'sparsejax[aot-tpu]'`); h200 needs JAX's CUDA wheels
(`pip install 'sparsejax[aot-gpu]'`). Compilation runs in a process of its own, since dump flags are read when the
compiler is loaded. Printed figures are static estimates.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pallas_kernels import static_report

TPU_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TARGETS = (*TPU_TOPOLOGIES, "h200")
KERNELS = {
    "block_sparse_attention": "pallas_kernels.block_sparse_attention.programs",
    "block_sparse_matmul": "pallas_kernels.block_sparse_matmul.programs",
    "nm_matmul": "pallas_kernels.nm_matmul.programs",
    "sparse_conv": "pallas_kernels.sparse_conv.programs",
    "tile_conv": "pallas_kernels.tile_conv.programs",
}
"""Modules with a dataclass `Shape` and `programs(shape, implementation, array) -> {name: (function, arguments)}`."""

H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 143771000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""
"""One H200 in XLA's target format."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What one program compiled to.

    Attributes:
        target: the device.
        program: name of the program, such as "forward".
        memory: bytes of arguments, outputs and temporaries in device memory.
        kernels: static figures of each kernel.
    """

    target: str
    program: str
    memory: dict[str, int]
    kernels: list[Any]


def missing(target: str) -> str | None:
    """None, or what has to be installed to compile for `target`.

    Raises:
        ValueError: if the target is not one of `TARGETS`.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r}; allowed: {', '.join(TARGETS)}")
    if target in TPU_TOPOLOGIES:
        if importlib.util.find_spec("libtpu") is None:
            return f"compiling for {target} needs libtpu: pip install 'sparsejax[aot-tpu]'"
        return None
    if _cuda_root() is None or not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (13, 12)):
        return f"compiling for {target} needs JAX's CUDA plugin and ptxas: pip install 'sparsejax[aot-gpu]'"
    return None


def _cuda_root() -> Path | None:
    """Folder of the CUDA wheels that holds bin/ptxas."""
    spec = importlib.util.find_spec("nvidia")
    for base in [] if spec is None else spec.submodule_search_locations or []:
        for name in ("cu13", "cuda_nvcc"):
            if (Path(base) / name / "bin" / "ptxas").exists():
                return Path(base) / name
    return None


def _module(kernel: str) -> Any:
    if kernel not in KERNELS and "." not in kernel:
        raise ValueError(f"kernel {kernel!r}; allowed: {', '.join(KERNELS)}, or the dotted name of a module")
    return importlib.import_module(KERNELS.get(kernel, kernel))


def parse_shape(kernel: str, pairs: list[str]) -> Any:
    """A kernel's `Shape` from `key=value` words.

    Raises:
        ValueError: naming the word, and the keys that are allowed.

    Example:
        >>> parse_shape("block_sparse_attention", ["heads=4", "q_len=1024"]).heads
        4
    """
    shape = _module(kernel).Shape
    fields = {f.name: f for f in dataclasses.fields(shape)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in fields:
            allowed = ", ".join(f"{f.name}={f.default}" for f in fields.values())
            raise ValueError(f"--shape {pair!r}; allowed, with defaults: {allowed}")
        try:
            values[key] = value if isinstance(fields[key].default, str) else int(value)
        except ValueError:
            raise ValueError(f"--shape {pair!r}: {key} is a whole number") from None
    return shape(**values)


def compile_for(target: str, kernel: str, shape: Any, *, timeout: float = 900) -> list[Report]:
    """Compiles every program of a kernel for a device that need not be present.

    Args:
        target: one of `TARGETS`.
        kernel: one of `KERNELS`, or the dotted name of a module with `Shape` and `programs`.
        shape: the kernel's `Shape`.
        timeout: seconds.

    Returns:
        One report a program.

    Raises:
        RuntimeError: if something is not installed, or the compiler refuses; its message is passed on.
    """
    lacking = missing(target)
    if lacking:
        raise RuntimeError(lacking)
    reports = []
    with tempfile.TemporaryDirectory(prefix="aot-") as folder:
        job = {"target": target, "kernel": kernel, "shape": dataclasses.asdict(shape), "folder": folder}
        done = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.aot", "--worker", json.dumps(job)],
            env=os.environ | environment(target) | _dumps(target, folder),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(f"{kernel} does not compile for {target}:\n{done.stderr[-4000:]}")
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                dump = Path(folder) / found["program"]
                read = static_report.read_tpu_dump if target in TPU_TOPOLOGIES else static_report.read_gpu_dump
                reports.append(Report(target, found["program"], found["memory"], read(dump)))
    return reports


def environment(target: str) -> dict[str, str]:
    """Variables of a process that compiles for a chip that need not be there; JAX reads them as it starts.

    Args:
        target: "h200" for GPUs; anything else is a TPU.
    """
    common = {"JAX_PLATFORMS": "cpu"}
    if target != "h200":
        return common | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    cuda = _cuda_root()
    return common | {
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={cuda}",
        "PATH": f"{cuda}/bin:{os.environ.get('PATH', '')}",
    }


def _dumps(target: str, folder: str) -> dict[str, str]:
    if target in TPU_TOPOLOGIES:
        return {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder}/all --xla_jf_dump_llo_text=true"}
    return {"MOSAIC_GPU_DUMP_TO": f"{folder}/all", "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}


def _work(job: dict[str, Any]) -> None:
    """The process that compiles: one line of JSON a program, dumps in a folder of the program's name."""
    import jax

    from pallas_kernels import compat

    target, folder = job["target"], Path(job["folder"])
    module = _module(job["kernel"])
    topology = TPU_TOPOLOGIES.get(target)
    array, context = compat.tpu_target(topology) if topology else compat.gpu_target(H200)
    programs = module.programs(module.Shape(**job["shape"]), "tpu" if topology else "gpu", array)
    for name, (function, arguments) in programs.items():
        (folder / "all").mkdir()
        with context():
            compiled = jax.jit(function).lower(*arguments).compile()
        (folder / "all").rename(folder / name)
        stats = compiled.memory_analysis()
        memory = {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
        }
        print(json.dumps({"program": name, "memory": memory}), flush=True)


def render(reports: list[Report]) -> str:
    """The reports as text."""
    lines = []
    for report in reports:
        held = ", ".join(f"{n / 2**20:.1f} MiB {name}" for name, n in report.memory.items())
        lines.append(f"{report.program} on {report.target}: {held} in device memory")
        for kernel in report.kernels:
            lines.append(f"  {kernel.name}")
            for field in dataclasses.fields(kernel)[1:]:
                lines.append(f"    {field.name.replace('_', ' '):12} {getattr(kernel, field.name)}")
    lines.append("static estimates of the compiled code, not measurements")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--kernel", required=True, help=f"{', '.join(KERNELS)}, or a module")
    parser.add_argument("--shape", nargs="*", default=[], metavar="KEY=VALUE", help="sizes; a wrong key lists them all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        reports = compile_for(options.target, options.kernel, parse_shape(options.kernel, options.shape))
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps([dataclasses.asdict(r) for r in reports], indent=1) if options.json else render(reports))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
