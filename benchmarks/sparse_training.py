"""A training step of the byte-level transformer whose linear layers are stored in blocks, against the dense one.

Every linear layer but embedding and head keeps the same share of its blocks; RigL moves them. Dense and sparse steps
run in turn in one process. Memory is that of parameters, gradients and moments, and what a compiled step needs beside.

    python benchmarks/sparse_training.py [--width 1024] [--output benchmarks/results/sparse-training.json]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from measure import alternate, median, ratio, report

import sparsejax
from experiments.models.transformer import ByteTransformer
from sparsejax.nn import merge, sparsify_model, split
from sparsejax.parameters import value_and_grad

DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.02)
RULES = {"head/kernel": None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="features of the transformer")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the transformer")
    parser.add_argument("--block", type=int, default=64, help="rows and columns of a block")
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 128), help="sequences in a batch, and their length")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES, help="shares of blocks that are kept")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each variant")
    parser.add_argument("--output", type=Path, help="keep the figures in this JSON file, and a plot beside it")
    arguments = parser.parse_args()

    sequences, length = arguments.tokens
    rngs = nnx.Rngs(0)
    dense = ByteTransformer(length=length, width=arguments.width, depth=arguments.depth, heads=8, rngs=rngs)
    tokens = jax.random.randint(jax.random.key(1), (sequences, length + 1), 0, 256)
    variants = {"dense": Step(dense, optax.adamw(1e-3), tokens)}
    for density in arguments.densities:
        variants[f"{density:g}"] = sparse_step(dense, density, arguments.block, tokens, update_every=2**30)
        variants[f"{density:g} moving"] = sparse_step(dense, density, arguments.block, tokens, update_every=1)
    timings = alternate({name: step.run for name, step in variants.items()}, rounds=arguments.rounds, seconds=0.5)

    whole = variants["dense"]
    rows = []
    for name, step in variants.items():
        rows.append(
            {
                "density": name,
                "milliseconds": 1e3 * median(timings, name),
                "times faster": ratio(timings, "dense", name),
                "parameters, gradients, moments / dense": step.bytes / whole.bytes,
                "MiB": step.bytes / 2**20,
                "temporary MiB": step.temporary / 2**20,
            }
        )
    title = f"byte transformer of width {arguments.width}, {whole.size / 1e6:.1f} million parameters"
    report(title, rows, arguments.output)
    tenth = next((d for d in arguments.densities if d == 0.1), None)
    if tenth:
        moving = ratio(timings, "0.1 moving", "0.1") - 1
        print(
            f"at density 0.1 a step that moves blocks takes {1 + moving:.2f} times an ordinary one: with a move every"
        )
        print(f"100 steps, {moving / (100 + moving):.2%} of training")
    print(f"kernel: {variants[f'{arguments.densities[0]:g}'].kernel}")
    if arguments.output:
        plot(rows, title, arguments.output.with_suffix(".png"))


class Step:
    """A compiled training step and what it holds.

    Args:
        model: what is trained.
        optimizer: by what.
        tokens: a batch.
    """

    def __init__(self, model, optimizer, tokens):
        graph, params, rest = split(model)
        state = jax.jit(optimizer.init)(params)

        def loss(params):
            logits = merge(graph, params, rest)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        def step(params, state):
            _, grads = value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return sparsejax.parameters.apply_updates(params, updates), state

        grads = jax.eval_shape(lambda p: value_and_grad(loss)(p)[1], params)
        self.bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, grads, state)))
        self.size = sum(leaf.size for leaf in jax.tree.leaves(params))
        stored = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_stored) if _is_stored(leaf)]
        self.kernel = stored[0].kernel if stored else "dense"
        self._compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
        self.temporary = self._compiled.memory_analysis().temp_size_in_bytes
        self._carried = jax.tree.map(jnp.copy, (params, state))

    def run(self):
        """Takes one step; returns something to wait for."""
        self._carried = self._compiled(*self._carried)
        return jax.tree.leaves(self._carried[0])


def _is_stored(leaf) -> bool:
    return isinstance(leaf, sparsejax.parameters.BlockSparse)


def sparse_step(dense, density: float, block: int, tokens, *, update_every: int) -> Step:
    """The step of the model with a share of its blocks, under RigL."""
    structure = sparsejax.Block((block, block))
    uniform = sparsejax.uniform
    algorithm = sparsejax.rigl(1 - density, structure=structure, distribution=uniform, update_every=update_every)
    optimizer = sparsejax.sparsify(optax.adamw(1e-3), algorithm, rules=RULES)
    masks = sparsejax.masks_of(sparsejax.sparsify(optax.identity(), algorithm, rules=RULES).init(split(dense)[1]))
    return Step(sparsify_model(dense, structure, masks), optimizer, tokens)


def plot(rows, title: str, path: Path) -> None:
    """Time and memory over density, both relative to the dense step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense = rows[0]["milliseconds"]
    still = [row for row in rows[1:] if "moving" not in row["density"]]
    densities = [float(row["density"]) for row in still]
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(densities, [row["milliseconds"] / dense for row in still], "o-", label="time of a step")
    memory = [row["parameters, gradients, moments / dense"] for row in still]
    axis.plot(densities, memory, "s-", label="parameters, gradients and moments")
    axis.plot([min(densities), 1], [min(densities), 1], ":", color="gray", label="in proportion to density")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="density", ylabel="relative to the dense step", title=title)
    axis.set_xticks(densities, [f"{density:g}" for density in densities])
    axis.legend()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
