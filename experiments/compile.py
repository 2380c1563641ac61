"""Compiles a whole training step for a pod that need not be there, and prints what it would take.

    python -m experiments compile NAME --target v5p:8x8x8 --mesh 64 8 1 [--json FILE] [--field value ...]

NAME is an experiment, whose first algorithm is compiled, or byte_pod, a byte transformer with stored blocks and sparse
attention (`experiments/models/byte_pod.py`). Targets are slices of TPUs, such as v5e:16x16, which need libtpu: pip
install 'sparsejax[aot-tpu]'; and numbers of GPUs, h200:8, which need JAX's CUDA wheels: 'sparsejax[aot-gpu]'.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from experiments.chips import CHIPS, Chip
from experiments.experiment import UsageError
from experiments.sharding import fill_mesh, make_mesh
from pallas_kernels import aot

BYTE_POD = "byte_pod"
GPUS = 8  # of one machine
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # slices of TPUs whose network has two axes


class CompileError(RuntimeError):
    """The compiler refuses a program; the message has its reason."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where to compile for; figures on FLOPs and bytes are for one step."""

    # kind and shape of the slice, such as v5e:16x16, v5p:8x8x8 or v6e:4x4; or GPUs, h200:8
    target: str
    # devices along data, fsdp and tensor; one of them may be -1 for all that are left
    mesh: tuple[int, int, int] = (-1, 1, 1)
    # file for the figures, as JSON
    json: str = ""


def parse_target(target: str) -> tuple[Chip, int]:
    """The chip, and how many there are.

    Raises:
        UsageError: no such chip, or no shape.

    Example:
        >>> chip, count = parse_target("v5p:8x8x8")
        >>> chip.name, count
        ('v5p', 512)
    """
    name, _, shape = target.partition(":")
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    if chip is None:
        known = ", ".join(chip.name for chip in CHIPS)
        raise UsageError(
            f"target is {target!r}; give a kind ({known}) and a shape, such as v5e:16x16, v5p:8x8x8 or h200:8"
        )
    sides = [int(side) if side.isdigit() else 0 for side in shape.split("x")]
    count = math.prod(sides)
    match chip.name:
        case "v5e" | "v6e":
            fitting, allowed = shape in FLAT, f"slices of {name} are {', '.join(FLAT)}"
        case "v4" | "v5p":
            fitting = len(sides) == 3 and all(side in (1, 2) or side % 4 == 0 for side in sides) and count
            allowed = f"slices of {name} have three sides, each 1, 2 or a multiple of 4, such as {name}:4x4x8"
        case _:
            fitting = len(sides) == 1 and count and (count < GPUS or count % GPUS == 0)
            allowed = f"give a number of GPUs, up to {GPUS} or a multiple of that, such as {name}:8"
    if not fitting:
        raise UsageError(f"target is {target!r}; {allowed}")
    return chip, count


def target_devices(target: str):
    """The devices of a target, as the compiler describes them."""
    from jax.experimental import topologies

    chip, count = parse_target(target)
    if chip.platform == "tpu":
        # The two cores of a v4 are one device to JAX on a slice, and two to the compiler unless it is told.
        cores = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=target, **cores).devices
    shape = f"1x{-(-count // GPUS)}x{min(count, GPUS)}"
    return topologies.get_topology_desc("", platform="cuda", target_config=aot.H200, topology=shape).devices


def compile_for(name: str, config, target: Target, *, timeout: float = 1800) -> dict:
    """Compiles in a process of its own, since the compiler for TPU is configured before JAX starts.

    Args:
        name: an experiment, or `byte_pod`.
        config: its configuration.
        target: where to compile for.
        timeout: seconds.

    Returns:
        The figures, as `render` prints them.

    Raises:
        UsageError: no such target, its compiler is not installed, or the mesh or the configuration does not fit it.
        CompileError: the compiler refuses.
    """
    chip, count = parse_target(target.target)
    fill_mesh(target.mesh, count)
    lacking = aot.missing("h200") if chip.platform == "gpu" else None
    if chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        lacking = "compiling for TPU needs libtpu: pip install 'sparsejax[aot-tpu]'"
    if lacking:
        raise UsageError(lacking)
    job = {"name": name, "config": dataclasses.asdict(config), "target": dataclasses.asdict(target)}
    command = [sys.executable, "-m", "experiments.compile", json.dumps(job)]
    done = subprocess.run(
        command, env=os.environ | aot.environment(chip.name), capture_output=True, text=True, timeout=timeout
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        reason = _reason(done.stderr)
        if "RESOURCE_EXHAUSTED" in reason:
            raise CompileError(
                f"{name} does not fit {target.target} with mesh {' '.join(map(str, target.mesh))}: take more chips, or "
                f"more of them along fsdp, or a smaller batch\n{reason}"
            )
        raise CompileError(f"{name} does not compile for {target.target}: {reason}")
    found = json.loads(lines[-1])
    if "refused" in found:
        raise UsageError(found["refused"])
    return found


def _reason(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    start = next(
        (i for i, line in enumerate(lines) if "RESOURCE_EXHAUSTED" in line or "Error:" in line), len(lines) - 12
    )
    return "\n".join(line[:300] for line in lines[max(start, 0) :][:14])


def _work(job: dict) -> None:
    """The process that compiles: prints one line of JSON."""
    from sparsejax.analysis.trace_products import count_products

    target = Target(**{**job["target"], "mesh": tuple(job["target"]["mesh"])})
    chip, _ = parse_target(target.target)
    devices = target_devices(target.target)
    mesh = make_mesh(target.mesh, devices=devices)
    began = time.perf_counter()
    make = _byte_pod if job["name"] == BYTE_POD else _experiment
    traced, context, facts = make(job, mesh)
    with context:
        lowered = traced.lower()
        compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    try:
        counts, uncounted = count_products(traced.jaxpr, [])
    except ValueError:  # loops of kernels without blocks large enough for the chip
        counts, uncounted = None, ("loops whose trips depend on where blocks lie",)
    found = _traffic(compiled)
    raw = compiled.cost_analysis() or {}
    print(
        json.dumps(
            {
                "name": job["name"],
                "target": target.target,
                "chips": len(devices),
                "mesh": list(mesh.devices.shape),
                **facts,
                "state_bytes": held,
                "temporary_bytes": memory.temp_size_in_bytes,
                "chip_bytes": chip.memory,
                "flops": None if counts is None else sum(counts.values()),
                "uncounted": list(uncounted),
                "compiler_flops_per_chip": raw.get("flops"),
                "collectives": found and {kind: [n, found.bytes[kind]] for kind, n in found.calls.items()},
                "open_collectives": found and {k: [n, found.open_bytes[k]] for k, n in found.open_calls.items()},
                "kernel_scalar_bytes": _scalar_bytes(traced.jaxpr),
                "compile_seconds": round(seconds, 1),
            }
        )
    )


def _traffic(compiled):
    """None where the compiler's program cannot be read back, as libtpu's for v5p with some asynchronous operations."""
    from experiments.hlo import traffic

    try:
        return traffic(compiled.as_text())
    except Exception as error:  # of the runtime, which has no narrower type
        print(f"warning: collectives are not known: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return None


def _byte_pod(job: dict, mesh):
    import jax
    import jax.numpy as jnp

    from experiments.models import byte_pod
    from sparsejax.masks.paths import named_leaves

    config = byte_pod.Config(**job["config"])
    chip, _ = parse_target(job["target"]["target"])
    layout = byte_pod.layout_on(mesh, present=False)
    rows = config.rows_per_device * mesh.size
    params = jax.eval_shape(lambda: byte_pod.init(config, jax.random.key(0), mesh.shape["fsdp"]))
    opt_state = jax.eval_shape(byte_pod.optimizer(config).init, params)
    placed = [layout.of_state(tree, params) for tree in (params, opt_state)]

    def put(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    tokens = jax.ShapeDtypeStruct((rows, config.length + 1), jnp.int32, sharding=layout.sharding(byte_pod.BATCH))
    step = jax.jit(
        byte_pod.make_step(config, layout, chip.platform),
        donate_argnums=(0, 1),
        out_shardings=(*placed, layout.sharding()),
    )
    with layout.context():
        traced = step.trace(put(params, placed[0]), put(opt_state, placed[1]), tokens)
    stored = sum(x.size for _, x in named_leaves(params) if jnp.issubdtype(x.dtype, jnp.floating))
    attention = 4 * config.depth * config.width**2
    dense = attention + config.depth * 2 * config.width * config.hidden
    facts = {
        "parameters": stored,
        "dense_parameters": dense + config.width * (2 * config.depth + 512 + config.length),
        "density": config.density,
        "tokens": rows * config.length,
        "algorithm": "set",
    }
    return traced, layout.context(), facts


def _experiment(job: dict, mesh):
    from experiments.configs import EXPERIMENTS
    from experiments.runs import check_config
    from experiments.sharding import Layout
    from experiments.variant import Variant

    experiment = EXPERIMENTS[job["name"]]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in job["config"].items()}
    config = dataclasses.replace(experiment.config, **fields)
    check_config(config)
    layout = Layout(mesh, present=False)
    try:
        variant = Variant(experiment, config, config.algorithms[0], experiment.task(config), layout)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    density = 1 - config.sparsity if variant.sparse else 1.0
    facts = {"density": density, "examples": config.batch_size, "algorithm": variant.name}
    return variant.trace_step(), layout.context(), facts


def _scalar_bytes(jaxpr) -> int:
    """The most that one kernel of a program prefetches into scalar memory."""
    jaxpr, most = getattr(jaxpr, "jaxpr", jaxpr), 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            prefetched = equation.params["grid_mapping"].num_index_operands
            sizes = (v.aval.size * v.aval.dtype.itemsize for v in equation.invars[:prefetched])
            most = max(most, sum(sizes))
        values = [
            v for value in equation.params.values() for v in (value if isinstance(value, tuple | list) else (value,))
        ]
        inner = [getattr(value, "jaxpr", value) for value in values]
        most = max([most, *(_scalar_bytes(each) for each in inner if hasattr(each, "eqns"))])
    return most


def fits(figures: dict) -> bool:
    """Whether the state and the temporaries fit into the memory of a chip."""
    return figures["state_bytes"] + figures["temporary_bytes"] <= figures["chip_bytes"]


def render(figures: dict) -> str:
    """The figures in words."""
    used = figures["state_bytes"] + figures["temporary_bytes"]
    data, fsdp, tensor = figures["mesh"]
    lines = [
        f"{figures['name']} ({figures['algorithm']}, density {figures['density']:g}) on {figures['target']}: "
        f"{figures['chips']} chips, data {data} x fsdp {fsdp} x tensor {tensor}, compiled in "
        f"{figures['compile_seconds']} s",
        f"  memory of a chip   {in_bytes(figures['state_bytes'])} state + {in_bytes(figures['temporary_bytes'])} "
        f"temporary = {in_bytes(used)} of {in_bytes(figures['chip_bytes'])}: "
        f"{'fits' if fits(figures) else 'does not fit'}",
    ]
    flops = figures["flops"]
    lines.append(
        "  FLOPs of a step    not known"
        if flops is None
        else f"  FLOPs of a step    {flops:.4g} in all, {flops / figures['chips']:.4g} on a chip (matrix products of "
        "the traced program, loops times their trips)"
    )
    if figures["uncounted"]:
        lines.append(f"    not counted      {', '.join(figures['uncounted'])}")
    raw = figures["compiler_flops_per_chip"]
    if raw is not None:
        lines.append(f"    compiler's raw   {raw:.4g} on a chip (counts the body of a loop once)")
    known = figures["collectives"] is not None
    of = "in one step (both branches of conditions count)" if known else "not known: the program cannot be read back"
    lines.append(f"  collectives on a chip, {of}")
    for kind, (calls, size) in sorted((figures["collectives"] or {}).items()):
        lines.append(f"    {kind:18} {calls:6} times, {in_bytes(size)}")
    for kind, (calls, size) in sorted((figures["open_collectives"] or {}).items()):
        lines.append(f"    {kind:18} {calls:6} times in each pass of a search, {in_bytes(size)}")
    if parse_target(figures["target"])[0].platform == "tpu":
        scalars = in_bytes(figures["kernel_scalar_bytes"])
        lines.append(f"  scalar memory      {scalars} in the kernel that takes most")
    lines.append("from the compiler, not measured")
    return "\n".join(lines)


def in_bytes(size: int) -> str:
    """A number of bytes in a fitting unit.

    Example:
        >>> in_bytes(40), in_bytes(3 * 2**18), in_bytes(3 * 2**29)
        ('40 bytes', '0.75 MiB', '1.50 GiB')
    """
    for unit, bytes_of_unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_of_unit / 4:
            return f"{size / bytes_of_unit:.2f} {unit}"
    return f"{size} bytes"


def run(name: str, config, target: Target) -> int:
    """The command; returns its exit status, 1 where the step does not fit."""
    figures = compile_for(name, config, target)
    print(render(figures))
    if target.json:
        Path(target.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if fits(figures) else 1


if __name__ == "__main__":
    try:
        _work(json.loads(sys.argv[1]))
    except UsageError as refused:
        print(json.dumps({"refused": str(refused)}))
