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
from pallas_kernels import aot

BYTE_POD = "byte_pod"
GPUS = 8  # of one machine


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
    sides = shape.split("x")
    if chip is not None and all(side.isdigit() and int(side) for side in sides):
        count = math.prod(map(int, sides))
        if chip.platform == "tpu" or (len(sides) == 1 and (count < GPUS or count % GPUS == 0)):
            return chip, count
    known = ", ".join(chip.name for chip in CHIPS)
    raise UsageError(
        f"target is {target!r}; give a kind ({known}) and a shape, such as v5e:16x16 or v5p:8x8x8; of GPUs a number, "
        f"up to {GPUS} or a multiple of that, such as h200:8"
    )


def _devices(target: str):
    """The devices of a target, as the compiler describes them."""
    from jax.experimental import topologies

    chip, count = parse_target(target)
    if chip.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
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
        UsageError: the compiler is not installed, or refuses; with its reason.
    """
    chip, _ = parse_target(target.target)
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
        raise UsageError(f"{name} does not compile for {target.target}: {_reason(done.stderr)}")
    return json.loads(lines[-1])


def _reason(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    start = next(
        (i for i, line in enumerate(lines) if "RESOURCE_EXHAUSTED" in line or "Error:" in line), len(lines) - 12
    )
    return "\n".join(line[:300] for line in lines[max(start, 0) :][:14])


def _work(job: dict) -> None:
    """The process that compiles: prints one line of JSON."""
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from experiments.sharding import MESH_AXES, fill_mesh
    from sparsejax.analysis.trace_products import count_products

    target = Target(**{**job["target"], "mesh": tuple(job["target"]["mesh"])})
    chip, _ = parse_target(target.target)
    devices = _devices(target.target)
    shape = fill_mesh(target.mesh, len(devices))
    mesh = Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    began = time.perf_counter()
    make = _byte_pod if job["name"] == BYTE_POD else _experiment
    traced, context, facts = make(job, mesh)
    with context:
        lowered = traced.lower()
        compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    counts, uncounted = count_products(traced.jaxpr, [])
    found = _traffic(compiled)
    raw = compiled.cost_analysis() or {}
    print(
        json.dumps(
            {
                "name": job["name"],
                "target": target.target,
                "chips": len(devices),
                "mesh": list(shape),
                **facts,
                "state_bytes": held,
                "temporary_bytes": memory.temp_size_in_bytes,
                "chip_bytes": chip.memory,
                "flops": sum(counts.values()),
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
    from experiments.sharding import Layout
    from experiments.variant import Variant

    experiment = EXPERIMENTS[job["name"]]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in job["config"].items()}
    config = dataclasses.replace(experiment.config, **fields)
    layout = Layout(mesh, present=False)
    variant = Variant(experiment, config, config.algorithms[0], experiment.task(config), layout)
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
    gib = 2**30
    used = figures["state_bytes"] + figures["temporary_bytes"]
    data, fsdp, tensor = figures["mesh"]
    lines = [
        f"{figures['name']} ({figures['algorithm']}, density {figures['density']:g}) on {figures['target']}: "
        f"{figures['chips']} chips, data {data} x fsdp {fsdp} x tensor {tensor}, compiled in "
        f"{figures['compile_seconds']} s",
        f"  memory of a chip   {figures['state_bytes'] / gib:.2f} GiB state + "
        f"{figures['temporary_bytes'] / gib:.2f} GiB temporary = {used / gib:.2f} of "
        f"{figures['chip_bytes'] / gib:.0f} GiB: {'fits' if fits(figures) else 'does not fit'}",
        f"  FLOPs of a step    {figures['flops']:.4g} in all, {figures['flops'] / figures['chips']:.4g} on a chip "
        "(matrix products of the traced program, loops times their trips)",
    ]
    if figures["uncounted"]:
        lines.append(f"    not counted      {', '.join(figures['uncounted'])}")
    raw = figures["compiler_flops_per_chip"]
    if raw is not None:
        lines.append(f"    compiler's raw   {raw:.4g} on a chip (counts the body of a loop once)")
    known = figures["collectives"] is not None
    of = "in one step (both branches of conditions count)" if known else "not known: the program cannot be read back"
    lines.append(f"  collectives on a chip, {of}")
    for kind, (calls, size) in sorted((figures["collectives"] or {}).items()):
        lines.append(f"    {kind:18} {calls:6} times, {size / 2**20:.3f} MiB")
    for kind, (calls, size) in sorted((figures["open_collectives"] or {}).items()):
        lines.append(f"    {kind:18} {calls:6} times in each pass of a search, {size} bytes")
    if parse_target(figures["target"])[0].platform == "tpu":
        scalars = figures["kernel_scalar_bytes"] / 2**10
        lines.append(f"  scalar memory      {scalars:.0f} KiB in the kernel that takes most")
    lines.append("from the compiler, not measured")
    return "\n".join(lines)


def run(name: str, config, target: Target) -> int:
    """The command; returns its exit status, 1 where the step does not fit."""
    figures = compile_for(name, config, target)
    print(render(figures))
    if target.json:
        Path(target.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if fits(figures) else 1


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
