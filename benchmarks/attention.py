"""Block-sparse attention on the CPU against torch (dense and FlexAttention), and against itself at density 1.

    python benchmarks/attention.py                       torch from this interpreter
    python benchmarks/attention.py --peer PYTHON         torch from another one
    python benchmarks/attention.py --peer none           JAX only

Ratios are how many times faster ours is, medians over rounds in which the programs take turns. `x density` multiplies
by the
density: 1 is time exactly in proportion to the tiles. `goal` columns are what the ratio is meant to reach.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import report

from pallas_kernels.block_sparse_attention import block_sparse_attention, explain, from_tiles

DIM = 64


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


class Peer:
    """The torch process; without one it knows no functions."""

    def __init__(self, python: str, tokens: int, block: int, heads: int, tiles: np.ndarray, folder: str):
        self.names: list[str] = []
        self.process = None
        if python == "none":
            return
        np.save(Path(folder) / "tiles.npy", tiles)
        options = {"tokens": tokens, "block": block, "heads": heads, "dim": DIM, "threads": os.cpu_count()}
        command = [
            python,
            str(Path(__file__).with_name("attention_peer.py")),
            "--tiles",
            str(Path(folder) / "tiles.npy"),
        ]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.names = self.read("ready").split()

    def read(self, word: str) -> str:
        """The rest of the next line that begins with `word`."""
        while line := self.process.stdout.readline():
            if line.startswith(word + " "):
                return line[len(word) + 1 :]
        raise SystemExit("the torch process ended; is torch installed there? Name another interpreter with --peer")

    def seconds(self, name: str) -> float:
        """Times one function."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self.read("seconds"))

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def seconds(function) -> float:
    """Median seconds of a function of no arguments, after one untimed call."""
    jax.block_until_ready(function())
    timings = []
    begin = time.perf_counter()
    while len(timings) < 3 or time.perf_counter() - begin < 0.1:
        start = time.perf_counter()
        jax.block_until_ready(function())
        timings.append(time.perf_counter() - start)
    return statistics.median(timings)


def take_turns(ours: dict, peer: Peer, rounds: int) -> dict[str, list[float]]:
    """Seconds of every function, ours and the peer's, round by round."""
    timings: dict[str, list[float]] = {name: [] for name in [*peer.names, *ours]}
    for _ in range(rounds):
        for name in peer.names:
            timings[name].append(peer.seconds(name))
        for name, function in ours.items():
            timings[name].append(seconds(function))
    return timings


def ratio(timings: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is, the median over rounds."""
    return statistics.median(a / b for a, b in zip(timings[slow], timings[fast], strict=True))


def compiled(implementation: str, tiles: np.ndarray, tokens: int, block: int, gradients: bool):
    """A function of no arguments that runs attention; lists are arguments of the compiled program."""
    heads = tiles.shape[0]
    r = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(r.standard_normal((1, tokens, heads, DIM), dtype=np.float32)) for _ in range(4))
    lists = jax.tree.map(jnp.asarray, from_tiles(tiles, bq=block, bk=block, q_len=tokens, kv_len=tokens))
    choice = explain(q, k, v, lists, implementation=implementation)
    if choice.name is None:
        raise SystemExit(str(choice))

    def run(q, k, v, lists):
        return block_sparse_attention(q, k, v, lists, implementation=implementation)

    if gradients:
        step = jax.jit(jax.value_and_grad(lambda q, k, v, lists: (run(q, k, v, lists) * g).sum(), argnums=(0, 1, 2)))
    else:
        step = jax.jit(run)
    return lambda: step(q, k, v, lists)


def against_torch(
    sizes: list[tuple[int, int]], densities: list[float], heads: int, peer: str, rounds: int
) -> list[dict]:
    """The native path against torch, one row for each size, block and density."""
    rows = []
    for tokens, block in sizes:
        for density in densities:
            tiles = random_tiles(heads, tokens // block, density)
            real = float(tiles.mean())
            with tempfile.TemporaryDirectory() as folder:
                torch = Peer(peer, tokens, block, heads, tiles, folder)
                ours = {
                    "native": compiled("native", tiles, tokens, block, False),
                    "native both": compiled("native", tiles, tokens, block, True),
                }
                timings = take_turns(ours, torch, rounds)
                torch.close()
            row = {
                "tokens": tokens,
                "block": block,
                "density": real,
                "native ms": statistics.median(timings["native"]) * 1e3,
            }
            if "forward" in timings:
                far = tokens >= 4096
                row["forward / torch dense"] = ratio(timings, "forward", "native")
                row["x density"] = row["forward / torch dense"] * real
                row["goal"] = 1.3 if far else 1.0 if real < 0.1 else 0.0
                row["with gradients"] = ratio(timings, "both", "native both")
                row["x density "] = row["with gradients"] * real
                row["goal "] = 1.1 if far else 0.0
            if "flex" in timings:
                row["forward / flex"] = ratio(timings, "flex", "native")
                row["goal  "] = 1.5 if far else 1.3 if real < 0.1 else 0.0
            rows.append(row)
            print(" ".join(f"{k.strip()}={v:.3g}" for k, v in row.items()), flush=True)
    return rows


def xla_alone(sizes: list[tuple[int, int]], densities: list[float], heads: int, rounds: int) -> list[dict]:
    """The XLA path against itself at density 1 and against jax's dense attention."""
    rows = []
    nobody = Peer("none", 0, 0, 0, np.zeros(0), "")
    for tokens, block in sizes:
        blocks = tokens // block
        kinds = {f"equal {density}": random_tiles(heads, blocks, density) for density in densities}
        kinds |= {kind: skewed_tiles(kind, heads, blocks) for kind in ("causal", "window+global", "zipf")}
        q = jnp.asarray(np.random.default_rng(0).standard_normal((1, tokens, heads, DIM), dtype=np.float32))
        dense = jax.jit(lambda q: jax.nn.dot_product_attention(q, q, q, implementation="xla"))
        for kind, tiles in kinds.items():
            ours = {
                "sparse": compiled("xla", tiles, tokens, block, False),
                "full": compiled("xla", np.ones_like(tiles), tokens, block, False),
                "dense": lambda q=q, dense=dense: dense(q),
            }
            timings = take_turns(ours, nobody, rounds)
            real = float(tiles.mean())
            full = ratio(timings, "full", "sparse")
            goal = 0.75 if kind.startswith("equal") else 0.5 if kind != "zipf" else 0.0
            rows.append(
                {"tokens": tokens, "block": block, "rows": kind, "density": real, "sparse / full": full}
                | {"x density": full * real, "goal": goal, "sparse / jax dense": ratio(timings, "dense", "sparse")}
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
    counts = [2**n for n in range(4, pages.bit_length())]
    for count in counts:
        tiles = np.zeros((kv_heads, 1, pages), bool)
        for h in range(kv_heads):
            tiles[h, 0, r.choice(pages, count, replace=False)] = True
        lists = jax.tree.map(jnp.asarray, from_tiles(tiles, bq=1, bk=page, q_len=1, kv_len=pages * page))
        ours[str(count)] = lambda lists=lists: step(q, k, v, table, lists)
    timings = take_turns(ours, Peer("none", 0, 0, 0, np.zeros(0), ""), rounds)
    return [
        {"pages": count, "of": pages, "microseconds": statistics.median(timings[str(count)]) * 1e6}
        | {"faster than all pages": ratio(timings, str(counts[-1]), str(count)), "fewer pages": counts[-1] / count}
        for count in counts
    ]


def main() -> None:
    """Runs the measurements and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="python that has torch, or 'none'")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["torch", "xla", "decode"], choices=["torch", "xla", "decode"])
    parser.add_argument("--output", type=Path, help="folder for the tables as JSON")
    options = parser.parse_args()
    sizes = [(tokens, block) for tokens in options.tokens for block in options.blocks]

    def show(name: str, rows: list[dict]) -> None:
        report(name, rows, options.output and options.output / f"{name.replace(' ', '_')}.json")

    if "torch" in options.parts:
        show(
            "attention against torch",
            against_torch(sizes, options.densities, options.heads, options.peer, options.rounds),
        )
    if "xla" in options.parts:
        show("attention by XLA alone", xla_alone(sizes, options.densities, options.heads, options.rounds))
    if "decode" in options.parts:
        show("attention decode", decode(2048, 16, 8, 2, options.rounds))


if __name__ == "__main__":
    main()
