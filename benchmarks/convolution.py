"""Convolutions over active sites on the CPU: every engine against dense ones, torch and spconv, and many sites.

    python benchmarks/convolution.py                        torch and spconv from this interpreter
    python benchmarks/convolution.py --peer PYTHON          torch and spconv from another one
    python benchmarks/convolution.py --peer none            JAX only

Ratios are how many times faster ours is, medians over rounds in which the programs take turns.

`engines` compares the engines forward and with both gradients (`both`), at sites that are scattered (`tile` 1) and at
whole tiles; maps of neighbours are made before, as in a network whose layers share them. `dense` is XLA's convolution,
in three dimensions torch's, since XLA's is far slower there on CPUs. `plan` judges `conv_plan` by these figures, which
it reads from the output if they are not measured in the same run: `/ best` is the time of its choice over that of the
best engine, `/ dense` how many times faster than dense it is.

`spconv` includes the building of maps on both sides, `layer` does not; `torch` is torch's dense convolution.
`sites` has up to a million sites in a grid of 20,000 x 20,000: times, and the most memory that the process held.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import report
from turns import Peer, compiled, ratio, take_turns, with_gradients

from sparsejax.convolution import (
    SiteMask,
    conv_plan,
    from_coords,
    from_mask,
    masked_conv,
    sparse_conv,
    subm_map,
    tile_conv,
    tile_set,
    to_tiles,
)

TILES = {2: 16, 3: 8}
"""Sides of tiles, by the number of dimensions."""


def draw(shape: tuple[int, ...], samples: int, channels: int, density: float, tile: int):
    """A mask of tiles, one entry each, and random features and weights."""
    r = np.random.default_rng(0)
    grid = (samples, *(size // tile for size in shape))
    kept = max(1, round(density * np.prod(grid)))
    mask = np.zeros(grid, bool)
    mask.reshape(-1)[r.choice(mask.size, kept, replace=False)] = True
    dims = len(shape)
    weights = r.standard_normal((*[3] * dims, channels, channels), dtype=np.float32) / (3**dims * channels) ** 0.5
    return jnp.asarray(mask), jnp.asarray(r.standard_normal((samples, *shape, channels), dtype=np.float32)), weights


def programs(mask, x, weights, tile: int, engines: list[str]) -> dict:
    """Every engine forward and with gradients, as functions that return their seconds."""
    found = {}
    full = SiteMask(SiteMask(mask).at(x.shape[1:-1]))
    count = int(full.mask.sum())
    sites = jax.jit(lambda x, mask: from_mask(x, mask, capacity=count))(x, full.mask)
    calls = {
        "dense": (lambda x, w, mask: masked_conv(x, w, None), x, mask),
        "masked": (lambda x, w, mask: masked_conv(x, w, mask), jnp.where(full.mask[..., None], x, 0), full),
        "sites": (lambda x, w, kernel_map: sparse_conv(x, w, kernel_map), sites.feats, subm_map(sites, 3)),
    }
    if "tiles" in engines:
        tiles = tile_set(mask, tile, capacity=int(mask.sum()))
        calls["tiles"] = (lambda x, w, tiles: tile_conv(x, w, tiles), to_tiles(x, tiles), tiles)
    for name in engines:
        call, given, where = calls[name]
        found[name] = compiled(call, given, weights, where)
        found[name + " both"] = compiled(with_gradients(call, given), given, weights, where)
    return found


def against_dense(cases, densities, peer: Peer, rounds: int) -> list[dict]:
    """Every engine, at scattered sites and at tiles."""
    rows = []
    for shape, samples, channels in cases:
        by_torch = len(shape) > 2 and peer.process is not None
        dense = {}
        for density in densities:
            for tile in (1, TILES[len(shape)]):
                mask, x, weights = draw(shape, samples, channels, density, tile)
                engines = ["masked", "sites"] + ["tiles"] * (tile > 1)
                functions = programs(mask, x, weights, tile, engines)
                if not dense and by_torch:
                    peer.load(
                        shape=shape,
                        coords=np.zeros((1, 3), int),
                        feats=np.ones((1, channels), np.float32),
                        weights=weights,
                    )
                    dense = {"dense": lambda: peer.seconds("torch"), "dense both": lambda: peer.seconds("torch both")}
                dense = dense or programs(mask, x, weights, tile, ["dense"])
                timings = take_turns(dense | functions, rounds)
                row = {"shape": "x".join(map(str, shape)), "samples": samples, "channels": channels, "tile": tile}
                row["density"] = float(mask.mean())
                for end in ("", " both"):
                    for name in ("dense", *engines):
                        row[f"{name}{end} ms"] = 1e3 * statistics.median(timings[name + end])
                rows.append(row)
                print(
                    " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True
                )
    return rows


def plans(rows: list[dict]) -> list[dict]:
    """What `conv_plan` chooses in each case of `against_dense`: its time over the best engine's, and dense over it."""
    chosen = []
    for row in rows:
        plan = conv_plan(
            row["density"],
            shape=tuple(map(int, row["shape"].split("x"))),
            kernel=3,
            channels=row["channels"],
            tile=row["tile"] if row["tile"] > 1 else None,
            backend="cpu",
        ).engine
        line = {name: row[name] for name in ("shape", "samples", "channels", "tile", "density")} | {"plan": plan}
        for end in ("", " both"):
            best = min(row[f"{name}{end} ms"] for name in ("masked", "sites", "tiles") if f"{name}{end} ms" in row)
            line[f"/ best{end}"] = row[f"{plan}{end} ms"] / best
            line[f"/ dense{end}"] = row[f"dense{end} ms"] / row[f"{plan}{end} ms"]
        chosen.append(line)
    return chosen


def against_spconv(cases, densities, peer: Peer, rounds: int) -> list[dict]:
    """Submanifold convolutions with and without the building of their maps."""
    rows = []
    for shape, _, channels in cases:
        for density in densities:
            mask, x, weights = draw(shape, 1, channels, density, 1)
            count = int(mask.sum())
            sites = from_mask(x, mask, capacity=count)
            kernel_map = subm_map(sites, 3)
            coords = np.argwhere(np.asarray(mask[0]))
            names = peer.load(shape=shape, coords=coords, feats=np.asarray(sites.feats), weights=weights)
            layer = lambda x, w, m: sparse_conv(x, w, m)  # noqa: E731
            functions = {
                "ours": compiled(lambda s, w: sparse_conv(s.feats, w, subm_map(s, 3)), sites, weights),
                "layer": compiled(layer, sites.feats, weights, kernel_map),
                "both": compiled(with_gradients(layer, sites.feats), sites.feats, weights, kernel_map),
            }
            functions |= {
                name: lambda name=name: peer.seconds(name) for name in names if name != "torch both" or len(shape) > 2
            }
            timings = take_turns(functions, rounds)
            row = {"shape": "x".join(map(str, shape)), "channels": channels, "density": float(mask.mean())}
            row |= {f"{name} ms": 1e3 * statistics.median(timings[name]) for name in functions}
            row |= {f"/ {name}": ratio(timings, name, "ours") for name in ("spconv", "torch") if name in functions}
            row |= {
                f"layer / {name}": ratio(timings, name, "layer")
                for name in ("spconv layer", "torch")
                if name in functions
            }
            if "torch both" in functions:
                row["both / torch"] = ratio(timings, "torch both", "both")
            rows.append(row)
            print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    return rows


def many_sites(count: int, channels: int) -> dict:
    """What sites in a grid of 20,000 x 20,000 take in this process: lists, map, and one layer with gradients."""
    side, r = 20_000, np.random.default_rng(0)
    coords = jnp.asarray(r.integers(side, size=(count, 2)), jnp.int32)
    feats = jnp.asarray(r.standard_normal((count, channels), dtype=np.float32))
    weights = jnp.asarray(r.standard_normal((3, 3, channels, channels), dtype=np.float32))
    batch = jnp.zeros(count, jnp.int32)
    build = compiled(
        lambda b, c, f: from_coords(b, c, f, shape=(side, side), batch_size=1, capacity=count), batch, coords, feats
    )
    make = jax.jit(lambda b, c, f: from_coords(b, c, f, shape=(side, side), batch_size=1, capacity=count))
    sites = make(batch, coords, feats)
    find = compiled(lambda s: subm_map(s, 3), sites)
    kernel_map = jax.jit(lambda s: subm_map(s, 3))(sites)
    layer = compiled(with_gradients(sparse_conv, sites.feats), sites.feats, weights, kernel_map)
    row = {
        "sites": int(sites.count),
        "from points ms": 1e3 * build(),
        "map ms": 1e3 * find(),
        "layer both ms": 1e3 * layer(),
    }
    # A child's usage as the system reports it begins with its parent's.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return row | {"peak GiB": int(peak.split()[1]) / 2**20}


def plot(rows: list[dict], path: Path) -> None:
    """Time over sites, with a line in proportion to them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    sites = np.array([row["sites"] for row in rows])
    for name in ("from points ms", "map ms", "layer both ms"):
        times = np.array([row[name] for row in rows])
        line = axes.plot(sites, times, "o", label=name.removesuffix(" ms").replace("both", "with gradients"))[0]
        axes.plot(sites, times[-1] * sites / sites[-1], "-", color=line.get_color(), linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="sites in 20,000 x 20,000", ylabel="ms (lines: in proportion to sites)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs the measurements and prints their tables."""
    parts = ["engines", "plan", "spconv", "sites"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="python that has torch and spconv, or 'none'")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--sites", type=int, help="measure so many sites in this process, and print them as JSON")
    parser.add_argument("--output", type=Path, help="path of the tables as JSON; the name of the part is added")
    options = parser.parse_args()
    if options.sites:
        print(json.dumps(many_sites(options.sites, 32)))
        return

    def path(part: str, suffix: str = ".json") -> Path | None:
        return options.output and options.output.with_name(f"{options.output.stem}-{part}{suffix}")

    flat, solid = [((512, 512), 1, 32), ((64, 64), 16, 64)], [((64, 64, 64), 1, 16), ((64, 64, 64), 1, 32)]
    rows = None
    if "engines" in options.parts:
        peer = Peer(options.peer, "convolution_peer.py")
        rows = against_dense(flat + solid[1:], options.densities, peer, options.rounds)
        peer.close()
        report("engines of sparse convolution", rows, path("engines"))
    if "plan" in options.parts and (rows or options.output):
        report("the planner's choices", plans(rows or json.loads(path("engines").read_text())["rows"]), path("plan"))
    if "spconv" in options.parts and options.peer != "none":
        peer = Peer(options.peer, "convolution_peer.py")
        rows = against_spconv([flat[0], *solid], [0.01, 0.05, 0.1, 0.3], peer, options.rounds)
        peer.close()
        report("sparse convolution and spconv", rows, path("spconv"))
    if "sites" in options.parts:
        rows = []
        for count in (62_500, 125_000, 250_000, 500_000, 1_000_000):
            command = [sys.executable, __file__, "--sites", str(count)]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        report("many sites", rows, path("sites"))
        if options.output:
            plot(rows, path("sites", ".png"))


if __name__ == "__main__":
    main()
