"""What a training step of byte_pod takes on TPU pods, by the compiler: over pods, densities and numbers of chips.

    python benchmarks/pods.py [--only pods densities chips] [--targets v5p:8x8x8 ...] [--output benchmarks/results/...]

Every row is one call of `python -m experiments compile byte_pod`, in a process of its own, half a minute each; rows
that a results file has already are kept. Needs libtpu: pip install 'sparsejax[aot-tpu]'. No TPU is used: all figures
are the compiler's, none is measured.
"""

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

import matplotlib

from experiments.compile import Target, compile_for, fits, parse_target
from experiments.models.byte_pod import Config

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BASE = Config()  # 1.3 billion weights, if all blocks were stored
STRONG = 256  # windows of a step when the number of chips alone changes
CASES = {
    "pods": [
        (BASE, Target("v5e:16x16", (-1, 8, 1))),
        (BASE, Target("v5p:8x8x8", (-1, 8, 1))),
        (BASE, Target("v5p:16x16x16", (-1, 8, 1))),
    ],
    "densities": [
        (dataclasses.replace(BASE, density=density), Target("v5e:16x16", (-1, 8, 1))) for density in (1.0, 0.5, 0.1)
    ],
    "chips": [
        (dataclasses.replace(BASE, rows_per_device=rows), Target(target, (-1, 8, 1)))
        for target, chips in (("v5e:4x4", 16), ("v5e:8x8", 64), ("v5e:16x16", 256))
        for rows in dict.fromkeys((1, STRONG // chips))
    ],
}


def row(config: Config, target: Target) -> dict:
    """The figures of one case, for one chip."""
    found = compile_for("byte_pod", config, target)
    known = found["collectives"]
    exchanged = None if known is None else round(sum(size for _, size in known.values()) / 2**20, 1)
    gib = 2**30
    return {
        "target": found["target"],
        "chips": found["chips"],
        "mesh": "x".join(map(str, found["mesh"])),
        "density": config.density,
        "windows": config.rows_per_device * found["chips"],
        "weights": found["parameters"],
        "state_gib": round(found["state_bytes"] / gib, 2),
        "temporary_gib": round(found["temporary_bytes"] / gib, 2),
        "chip_gib": round(found["chip_bytes"] / gib, 1),
        "fits": fits(found),
        "tflops": round(found["flops"] / found["chips"] / 1e12, 2),
        "collective_mib": exchanged,
        "scalar_kib": round(found["kernel_scalar_bytes"] / 2**10, 1),
        "compile_seconds": found["compile_seconds"],
    }


def plot(rows: list[dict], path: Path) -> None:
    """What a chip computes, holds and exchanges, over densities and over numbers of chips."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    over_density = [r for r in rows if r["target"] == "v5e:16x16" and r["windows"] == 256]
    over_density.sort(key=lambda r: r["density"])
    shown = {"tflops": "FLOPs", "collective_mib": "bytes exchanged", "state_gib": "bytes of state"}
    for name, label in shown.items():
        full = over_density[-1][name]
        axes[0].plot([r["density"] for r in over_density], [r[name] / full for r in over_density], "o-", label=label)
    axes[0].set(xlabel="density of the MLPs (256 chips)", ylabel="of density 1", xlim=(0, 1.05), ylim=(0, 1.05))
    scaled = [r for r in rows if r["density"] == BASE.density and r["target"].startswith("v5e")]
    weak = sorted((r for r in scaled if r["windows"] == r["chips"]), key=lambda r: r["chips"])
    strong = sorted((r for r in scaled if r["windows"] == STRONG), key=lambda r: r["chips"])
    chips = [r["chips"] for r in weak]
    shown = {
        "tflops": "TFLOP a step",
        "temporary_gib": "temporary memory, GiB",
        "collective_mib": "MiB exchanged a step",
    }
    for axis, (name, label) in zip(axes[1:], shown.items(), strict=True):
        axis.plot(chips, [r[name] for r in weak], "o-", label="weak: a window a chip")
        axis.plot([r["chips"] for r in strong], [r[name] for r in strong], "s--", label=f"strong: {STRONG} windows")
        axis.set(xlabel="chips (v5e)", ylabel=f"{label}, a chip", xscale="log")
        axis.set_ylim(bottom=0)
        axis.set_xticks(chips, map(str, chips))
        axis.minorticks_off()
    for axis in axes[:2]:
        axis.legend()
    figure.suptitle(f"byte_pod, density {BASE.density} where not said otherwise; from the compiler, not measured")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / f"{datetime.date.today().isoformat()}-pods.json"
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--targets", nargs="+", help="of these, only cases for some targets")
    options = parser.parse_args()
    rows = _kept(options.output)
    for config, target in (case for group in options.only for case in CASES[group]):
        if options.targets and target.target not in options.targets:
            continue
        windows = config.rows_per_device * parse_target(target.target)[1]
        if (target.target, config.density, windows) in {(r["target"], r["density"], r["windows"]) for r in rows}:
            continue
        found = row(config, target)
        rows = [*_kept(options.output), found]  # another process may have written in the meantime
        print(found, flush=True)
        options.output.write_text(json.dumps({"name": "pods", "rows": rows}, indent=1) + "\n")
    if set(CASES) == set(options.only) and not options.targets:
        plot(rows, options.output.with_suffix(".png"))


def _kept(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


if __name__ == "__main__":
    main()
