"""Products with block-sparse and N:M matrices on the CPU, against dense ones and the sparse formats of others.

    python benchmarks/block_sparse.py                       torch and scipy from this interpreter
    python benchmarks/block_sparse.py --peer PYTHON         torch and scipy from another one
    python benchmarks/block_sparse.py --peer none           JAX only

Ratios are how many times faster ours is, medians over rounds in which the programs take turns. `x density` multiplies
by the density: 1 is time exactly in proportion to the stored blocks. `goal` columns are what that is meant to reach.
`floor ms` is the time that memory alone would need: each operand read once by each product that needs it, each result
written once, at the speed of a copy.

Ours `both` is forward, dx and the gradient of the stored blocks, dW. No peer has the last one: its `y, dx` is held
against the same two of ours, and in the rows `y, dx; ours dW too` against all three. Where a peer's forward pass alone
takes longer than all of ours, that stands for its `y, dx`, as a lower bound.
"""

import argparse
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from measure import report
from turns import Peer, compiled, ratio, seconds, take_turns, with_gradients

from pallas_kernels.block_sparse_matmul import block_lists, block_sparse_matmul, to_dense
from pallas_kernels.nm_matmul import nm_matmul


def copy_speed() -> float:
    """Bytes a second of reading one large array and writing another."""
    x = jnp.zeros(2**25, jnp.float32)
    program = jax.jit(lambda x: x + 1).lower(x).compile()
    return 2 * x.nbytes / min(seconds(lambda: program(x)) for _ in range(3))


def draw(inputs: int, outputs: int, block: int, density: float):
    """Blocks in random places of the whole grid: lists, values, and the same as a dense matrix."""
    r = np.random.default_rng(0)
    kb, nb = inputs // block, outputs // block
    places = r.choice(kb * nb, max(1, round(density * kb * nb)), replace=False)
    lists = jax.tree.map(jnp.asarray, block_lists(places[None] // nb, places[None] % nb, grid=(kb, nb)))
    values = jnp.asarray(r.standard_normal((1, places.size, block, block), dtype=np.float32))
    return lists, values, np.asarray(to_dense(values, lists, (inputs, outputs)))


def of_jax(w: np.ndarray, xt, dyt) -> dict:
    """JAX's own sparse formats, stored transposed as scipy's and torch's."""
    found = {}
    for name, kind in (("BCOO", sparse.BCOO), ("BCSR", sparse.BCSR)):
        forward, back = (kind.fromdense(jnp.asarray(np.ascontiguousarray(a))) for a in (w.T, w))
        found[name] = compiled(lambda a, x: a @ x, forward, xt)
        found[name + " both"] = compiled(lambda a, b, x, dy: (a @ x, b @ dy), forward, back, xt, dyt)
    return found


def goal(block: int, density: float, gradients: bool) -> float:
    """What `x density` is meant to reach."""
    if density > 0.3:
        return 0.75 if block == 64 and not gradients else 0.0
    if density < 0.09:
        return 0.0
    return (0.65 if gradients else 0.75) if block >= 64 else (0.55 if gradients else 0.6)


def add(rows: list[dict], row: dict) -> None:
    """Keeps a row and shows it, so that a long measurement is seen to go on."""
    rows.append(row)
    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def against_all(shape, blocks, densities, peer: Peer, rounds: int) -> tuple[list[dict], list[dict]]:
    """The native path for each block size and density: against dense products, and against every sparse format."""
    rows, versus, (m, inputs, outputs), speed = [], [], shape, copy_speed()
    r = np.random.default_rng(1)
    x, dy = (jnp.asarray(r.standard_normal((m, n), dtype=np.float32)) for n in (inputs, outputs))
    for block in blocks:
        for density in densities:
            lists, values, w = draw(inputs, outputs, block, density)
            real, dense = values.size / w.size, jnp.asarray(w)

            def ours(x, values, lists):
                return block_sparse_matmul(x, values, lists, shape=shape[1:], implementation="native")

            def y_and_dx(*arguments, ours=ours):
                return with_gradients(ours, dy)(*arguments)[:2]

            functions = {
                "dense": compiled(jnp.matmul, x, dense),
                "dense both": compiled(with_gradients(jnp.matmul, dy), x, dense),
                "ours": compiled(ours, x, values, lists),
                "ours y, dx": compiled(y_and_dx, x, values, lists),
                "ours both": compiled(with_gradients(ours, dy), x, values, lists),
            }
            others = of_jax(w, x.T, dy.T)
            others |= {name: lambda name=name: peer.seconds(name) for name in peer.load(w=w, block=block, rows=m)}
            functions |= {name: timed for name, timed in others.items() if not name.endswith("both")}
            first = {name: timed() for name, timed in functions.items()}
            for name, timed in others.items():
                if name.endswith("both") and first[name.removesuffix(" both")] < first["ours both"]:
                    functions[name] = timed
            timings = take_turns(functions, rounds, first)
            read = 4 * (x.size + values.size + dy.size)
            row = {
                "block": block,
                "density": real,
                "ours ms": statistics.median(timings["ours"]) * 1e3,
                "floor ms": read / speed * 1e3,
                "/ dense": ratio(timings, "dense", "ours"),
                "x density": ratio(timings, "dense", "ours") * real,
                "goal": goal(block, real, False),
                "both ms": statistics.median(timings["ours both"]) * 1e3,
                "both floor ms": 3 * read / speed * 1e3,
                "both / dense": ratio(timings, "dense both", "ours both"),
                "both x density": ratio(timings, "dense both", "ours both") * real,
                "both goal": goal(block, real, True),
            }
            add(rows, row)
            names = [name for name in others if not name.endswith("both")]
            longer = {name: f"{name} both" if f"{name} both" in timings else name for name in names}
            for work, own, theirs in (
                ("y", "ours", {name: name for name in names}),
                ("y, dx", "ours y, dx", longer),
                ("y, dx; ours dW too", "ours both", longer),
            ):
                times = {name: ratio(timings, theirs[name], own) for name in names}
                add(versus, {"block": block, "density": real, "work": work} | times)
    return rows, versus


def few_rows(counts, blocks, density: float, size: int, rounds: int) -> list[dict]:
    """One to some rows of x, where reading the stored blocks is what takes time."""
    rows, speed = [], copy_speed()
    for m in counts:
        x = jnp.asarray(np.random.default_rng(1).standard_normal((m, size), dtype=np.float32))
        for block in blocks:
            lists, values, w = draw(size, size, block, density)

            def ours(x, values, lists):
                return block_sparse_matmul(x, values, lists, shape=(size, size), implementation="native")

            functions = {
                "dense": compiled(jnp.matmul, x, jnp.asarray(w)),
                "ours": compiled(ours, x, values, lists),
            }
            timings = take_turns(functions, rounds)
            real = values.size / w.size
            add(
                rows,
                {"rows": m, "block": block, "density": real, "ours ms": statistics.median(timings["ours"]) * 1e3}
                | {"floor ms": 4 * (2 * x.size + values.size) / speed * 1e3, "/ dense": ratio(timings, "dense", "ours")}
                | {"x density": ratio(timings, "dense", "ours") * real},
            )
    return rows


def xla_alone(shape, blocks, densities, rounds: int) -> list[dict]:
    """The XLA path against dense products."""
    rows, (m, inputs, outputs) = [], shape
    r = np.random.default_rng(1)
    x, dy = (jnp.asarray(r.standard_normal((m, n), dtype=np.float32)) for n in (inputs, outputs))
    for block in blocks:
        for density in densities:
            lists, values, w = draw(inputs, outputs, block, density)

            def ours(x, values, lists):
                return block_sparse_matmul(x, values, lists, shape=shape[1:], implementation="xla")

            timings = take_turns(
                {
                    "dense": compiled(jnp.matmul, x, jnp.asarray(w)),
                    "dense both": compiled(with_gradients(jnp.matmul, dy), x, jnp.asarray(w)),
                    "ours": compiled(ours, x, values, lists),
                    "ours both": compiled(with_gradients(ours, dy), x, values, lists),
                },
                rounds,
            )
            add(
                rows,
                {"block": block, "density": values.size / w.size, "/ dense": ratio(timings, "dense", "ours")}
                | {"both / dense": ratio(timings, "dense both", "ours both")},
            )
    return rows


def n_of_m(shape, patterns, shares, rounds: int) -> list[dict]:
    """N:M products against dense ones, by the number of columns that share a pattern."""
    rows, (m, inputs, outputs) = [], shape
    r = np.random.default_rng(1)
    x, dy = (jnp.asarray(r.standard_normal((m, n), dtype=np.float32)) for n in (inputs, outputs))
    dense = jnp.asarray(r.standard_normal((inputs, outputs), dtype=np.float32))
    for kept, group in patterns:
        for share in shares:
            order = np.argsort(r.random((inputs // group, group, outputs // share)), axis=1)
            positions = np.sort(order[:, :kept], axis=1).reshape(-1, outputs // share).astype(np.uint8)
            values = jnp.asarray(r.standard_normal((inputs // group * kept, outputs), dtype=np.float32))
            functions = {
                "dense": compiled(jnp.matmul, x, dense),
                "dense both": compiled(with_gradients(jnp.matmul, dy), x, dense),
            }
            names = ["xla", "native"] if share >= 32 else ["xla"]
            for name in names:

                def ours(x, values, positions, name=name, kept=kept, group=group, share=share):
                    return nm_matmul(x, values, positions, n=kept, m=group, share=share, implementation=name)

                functions[name] = compiled(ours, x, values, positions)
                functions[name + " both"] = compiled(with_gradients(ours, dy), x, values, positions)
            timings = take_turns(functions, rounds)
            row = {"pattern": f"{kept}:{group}", "share": share, "density": kept / group}
            row["bytes / dense"] = (values.nbytes + positions.nbytes) / dense.nbytes
            for name in names:
                row[f"{name} / dense"] = ratio(timings, "dense", name)
                row[f"{name} both / dense"] = ratio(timings, "dense both", f"{name} both")
            add(rows, row)
    return rows


def main() -> None:
    """Runs the measurements and prints their tables."""
    parts = ["all", "rows", "xla", "nm"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="python that has torch and scipy, or 'none'")
    parser.add_argument("--shape", type=int, nargs=3, default=[1024, 2048, 2048], help="rows of x, inputs, outputs")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05, 0.02])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--output", type=Path, help="path of the tables as JSON; the name of the part is added")
    options = parser.parse_args()

    def show(part: str, title: str, rows: list[dict]) -> None:
        path = options.output and options.output.with_name(f"{options.output.stem}-{part}.json")
        report(title, rows, path)

    shape, rounds = tuple(options.shape), options.rounds
    if "all" in options.parts:
        peer = Peer(options.peer, "block_sparse_peer.py")
        rows, versus = against_all(shape, options.blocks, options.densities, peer, rounds)
        peer.close()
        show("all", "block-sparse products against dense ones", rows)
        show("peers", "block-sparse products against sparse formats: how many times faster ours are", versus)
    if "rows" in options.parts:
        show("rows", "few rows", few_rows([1, 4, 16, 64], [32, 128], 0.1, 8192, rounds))
    if "xla" in options.parts:
        show("xla", "block-sparse products by XLA alone", xla_alone(shape, options.blocks, options.densities, rounds))
    if "nm" in options.parts:
        show("nm", "N:M products", n_of_m(shape, [(2, 4), (1, 4)], [1, 32, 64, 128], rounds))


if __name__ == "__main__":
    main()
