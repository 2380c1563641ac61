"""Block-sparse attention on the CPU against torch (dense and FlexAttention), and against itself at density 1.

    python benchmarks/attention.py --peer PYTHON                              everything; PYTHON has torch
    python benchmarks/attention.py --parts torch --tokens 4096 --blocks 64    a piece of it
    python benchmarks/attention.py --output benchmarks/results/NAME.json      keeps what was measured, piece by piece

Ratios are how many times faster ours is, medians over rounds in which the programs take turns. `x density` multiplies
by the density: 1 is time exactly in proportion to the tiles. `goal` columns are what is meant to be reached. All
processes but those whose memory is measured tell glibc to keep freed memory: otherwise a call takes no page fault or
thousands of them, by the luck of addresses.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import machine, report
from turns import Peer, ratio, seconds, take_turns

from pallas_kernels.block_sparse_attention import block_sparse_attention, explain, from_tiles

DIM = 64
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
TABLES = {
    "torch": "attention in C++ against torch",
    "xla": "attention by XLA alone",
    "memory": "memory of attention with gradients",
    "decode": "attention of one query to selected pages",
}


def random_tiles(heads: int, blocks: int, density: float) -> np.ndarray:
    """Equal rows: bool [heads, blocks, blocks] with round(density * blocks) tiles in each row."""
    r = np.random.default_rng(0)
    rank = r.random((heads, blocks, blocks)).argsort(-1).argsort(-1)
    return rank < max(1, round(density * blocks))


def skewed_tiles(kind: str, heads: int, blocks: int) -> np.ndarray:
    """Rows of unequal length: "causal", "window+global" or "zipf"."""
    i, j = np.indices((blocks, blocks))
    if kind == "causal":
        tiles = j <= i
    elif kind == "window+global":
        middle = blocks // 2
        tiles = (abs(i - j) <= 2) | (i == 0) | (j == 0) | (i == middle) | (j == middle)
    else:
        rank = np.random.default_rng(0).random((blocks, blocks)).argsort(-1).argsort(-1)
        tiles = rank < np.maximum(1, blocks // (1 + i))
    return np.broadcast_to(tiles, (heads, blocks, blocks))


def attention(implementation: str, tiles: np.ndarray, tokens: int, block: int, gradients: bool):
    """A jitted function that runs attention, and its arguments, lists among them."""
    heads = tiles.shape[0]
    r = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(r.standard_normal((1, tokens, heads, DIM), dtype=np.float32)) for _ in range(4))
    lists = jax.tree.map(jnp.asarray, from_tiles(tiles, bq=block, bk=block, q_len=tokens, kv_len=tokens))
    choice = explain(q, k, v, lists, implementation=implementation)
    if choice.name is None:
        raise SystemExit(str(choice))

    def run(q, k, v, lists):
        return block_sparse_attention(q, k, v, lists, implementation=implementation)

    def loss(q, k, v, lists, g):
        return (run(q, k, v, lists) * g).sum()

    if gradients:
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))), (q, k, v, lists, g)
    return jax.jit(run), (q, k, v, lists)


def timed(programs: dict) -> dict:
    """Functions that return the seconds of jitted functions with their arguments, compiled by now."""
    jax.block_until_ready([step(*arguments) for step, arguments in programs.values()])
    return {name: lambda x=x: seconds(lambda: x[0](*x[1])) for name, x in programs.items()}


def against_torch(tokens: int, block: int, densities: list[float], heads: int, peer: str, rounds: int) -> list[dict]:
    """The native path against torch, one row for each density."""
    masks = {str(density): random_tiles(heads, tokens // block, density) for density in densities}
    ours = {}
    for name, tiles in masks.items():
        ours[f"native {name}"] = attention("native", tiles, tokens, block, False)
        ours[f"native both {name}"] = attention("native", tiles, tokens, block, True)
    torch = Peer(peer, "attention_peer.py")
    names = torch.load(block=block, dim=DIM, **masks)
    functions = {name: lambda name=name: torch.seconds(name) for name in names}
    timings = take_turns(functions | timed(ours), rounds)
    torch.close()
    rows = []
    for name, tiles in masks.items():
        real, far = float(tiles.mean()), tokens >= 4096
        row = {"tokens": tokens, "block": block, "density": real}
        row["native ms"] = statistics.median(timings[f"native {name}"]) * 1e3
        row["with gradients ms"] = statistics.median(timings[f"native both {name}"]) * 1e3
        if "forward" in timings:
            row["torch ms"] = statistics.median(timings["forward"]) * 1e3
            row["torch with gradients ms"] = statistics.median(timings["both"]) * 1e3
            row["torch / native x density"] = ratio(timings, "forward", f"native {name}") * real
            row["goal"] = 1.3 if far else 1.0 if real < 0.1 else None
            row["with gradients: x density"] = ratio(timings, "both", f"native both {name}") * real
            row["goal "] = 1.1 if far else None
        if f"flex {name}" in timings:
            row["flex / native"] = ratio(timings, f"flex {name}", f"native {name}")
            row["goal  "] = 1.5 if far else 1.3 if real < 0.1 else None
        rows.append(row)
    return rows


def xla_alone(tokens: int, block: int, densities: list[float], heads: int, rounds: int) -> list[dict]:
    """The XLA path against itself at density 1 and against jax's dense attention."""
    blocks = tokens // block
    kinds = {f"equal {density}": random_tiles(heads, blocks, density) for density in densities}
    kinds |= {kind: skewed_tiles(kind, heads, blocks) for kind in ("causal", "window+global", "zipf")}
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, tokens, heads, DIM))
    dense = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="xla"))
    ours = {
        "full": attention("xla", np.ones((heads, blocks, blocks), bool), tokens, block, False),
        "dense": (dense, (q, k, v)),
    }
    ours |= {kind: attention("xla", tiles, tokens, block, False) for kind, tiles in kinds.items()}
    timings = take_turns(timed(ours), rounds)
    rows = []
    for kind, tiles in kinds.items():
        real, full = float(tiles.mean()), ratio(timings, "full", kind)
        goal = 0.75 if kind.startswith("equal") else 0.5 if kind != "zipf" else None
        rows.append(
            {
                "tokens": tokens,
                "block": block,
                "rows": kind,
                "density": real,
                "ms": statistics.median(timings[kind]) * 1e3,
            }
            | {"full / sparse": full, "x density": full * real, "goal": goal}
            | {"jax dense / sparse": ratio(timings, "dense", kind), "goal ": 1.0 if real <= 0.5 else None}
        )
    return rows


def peak_of_one(implementation: str, tokens: int, block: int, heads: int, each: int) -> None:
    """Prints by how many bytes one call with gradients raises the memory of this process at its peak."""
    tiles = random_tiles(heads, tokens // block, each * block / tokens)
    program, arguments = attention(implementation, tiles, tokens, block, True)
    step = program.lower(*arguments).compile()

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    jax.block_until_ready(step(*arguments))
    print("peak", status("VmHWM") - before)


def memory(sizes: list[int], block: int, heads: int, each: int = 8) -> list[dict]:
    """Peak memory of a call with gradients at a fixed number of blocks a row, each in a process of its own (Linux)."""
    rows = []
    for implementation in ("native", "xla"):
        for tokens in sizes:
            arguments = [implementation, *map(str, (tokens, block, heads, each))]
            done = subprocess.run(
                [sys.executable, __file__, "--one-peak", *arguments],
                env={name: value for name, value in os.environ.items() if name not in KEEP_MEMORY},
                capture_output=True,
                text=True,
                check=True,
            )
            peak = int(next(line for line in done.stdout.splitlines() if line.startswith("peak ")).split()[1])
            arrays = 8 * tokens * heads * DIM * 4
            rows.append(
                {
                    "path": implementation,
                    "tokens": tokens,
                    "block": block,
                    "blocks a row": each,
                    "peak MiB": peak / 2**20,
                }
                | {"bytes a token": peak / tokens, "in sizes of q, k, v, o and gradients": peak / arrays}
            )
    return rows


def decode(pages: int, page: int, heads: int, kv_heads: int, rounds: int) -> list[dict]:
    """One query against a paged cache: time by the number of selected pages."""
    r = np.random.default_rng(0)
    k, v = (jnp.asarray(r.standard_normal((pages, page, kv_heads, DIM), dtype=np.float32)) for _ in range(2))
    q = jnp.asarray(r.standard_normal((1, 1, heads, DIM), dtype=np.float32))
    table = jnp.asarray(r.permutation(pages)[None], jnp.int32)

    @jax.jit
    def step(q, k, v, table, lists):
        return block_sparse_attention(q, k, v, lists, page_table=table)

    ours = {}
    counts = [2**n for n in range(6, pages.bit_length())]
    for count in counts:
        tiles = np.zeros((kv_heads, 1, pages), bool)
        for h in range(kv_heads):
            tiles[h, 0, r.choice(pages, count, replace=False)] = True
        lists = jax.tree.map(jnp.asarray, from_tiles(tiles, bq=1, bk=page, q_len=1, kv_len=pages * page))
        ours[str(count)] = step, (q, k, v, table, lists)
    timings = take_turns(timed(ours), rounds)
    return [
        {"pages": count, "of": pages, "page": page, "microseconds": statistics.median(timings[str(count)]) * 1e6}
        | {"faster than all pages": ratio(timings, str(counts[-1]), str(count)), "fewer pages": counts[-1] / count}
        for count in counts
    ]


def keep(path: Path, part: str, rows: list[dict], keys: tuple[str, ...]) -> None:
    """Puts rows into the file, in the place of older ones of the same `keys`, and all tables beside it as text."""
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine()}
    old = found.setdefault(part, [])
    new = {tuple(row.get(key) for key in keys) for row in rows}
    rows = [row for row in old if tuple(row.get(key) for key in keys) not in new] + rows
    found[part] = sorted(rows, key=lambda row: [row.get(key) or 0 for key in ("tokens", "block")])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    lines = ["# Block-sparse attention on the CPU", "", __doc__.split("\n\n")[-1].strip(), ""]
    lines += [
        ", ".join(f"{name} {value}" for name, value in found["machine"].items()) + ", heads of 64 in float32.",
        "",
    ]
    for name, title in TABLES.items():
        if name not in found:
            continue
        columns = list(dict.fromkeys(key for row in found[name] for key in row))
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| " + " | ".join(key.strip() for key in columns) + " |", "|" + "---|" * len(columns)]
        for row in found[name]:
            cells = (row.get(key) for key in columns)
            shown = ("" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells)
            lines.append("| " + " | ".join(shown) + " |")
        lines.append("")
    path.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    """Runs the measurements and prints their tables."""
    if sys.argv[1:2] == ["--one-peak"]:
        peak_of_one(sys.argv[2], *map(int, sys.argv[3:]))
        return
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="python that has torch, or 'none'")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--output", type=Path, help="JSON file to add to; the tables go beside it as markdown")
    options = parser.parse_args()

    def show(part: str, rows: list[dict], keys: tuple[str, ...]) -> None:
        report(TABLES[part], [{k: "" if v is None else v for k, v in row.items()} for row in rows], None)
        if options.output:
            keep(options.output, part, rows, keys)

    for tokens in options.tokens:
        for block in options.blocks:
            size = tokens, block, options.densities, options.heads
            if "torch" in options.parts:
                show("torch", against_torch(*size, options.peer, options.rounds), ("tokens", "block", "density"))
            if "xla" in options.parts:
                show("xla", xla_alone(*size, options.rounds), ("tokens", "block", "rows"))
    if "memory" in options.parts:
        sizes = [2048, 4096, 8192, 16384, 32768]
        show("memory", memory(sizes, 64, options.heads), ("path", "tokens", "block"))
    if "decode" in options.parts:
        show("decode", decode(8192, 16, 8, 2, options.rounds), ("pages", "of"))


if __name__ == "__main__":
    main()
