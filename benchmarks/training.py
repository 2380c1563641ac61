"""What sparsify(adamw, rigl) adds to a whole training step of the `bytes_lm` experiment's transformer.

Three compiled steps run in turn: plain adamw, RigL between mask updates, and RigL with a mask update in every step. The
last two give the cost of mask updates every 100 steps, as a share of training time.

    python benchmarks/training.py [--output benchmarks/results/training.json]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from measure import alternate, median, ratio, report

import sparsejax
from experiments.configs.bytes_lm import Config, model

EVERY = 100


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timings of each variant")
    parser.add_argument("--output", type=Path, help="keep the figures in this JSON file")
    arguments = parser.parse_args()

    config = Config()
    variants = {
        "adamw": optax.adamw(1e-3),
        "between mask updates": sparsejax.sparsify(optax.adamw(1e-3), sparsejax.rigl(0.8, update_every=2**30)),
        "mask update every step": sparsejax.sparsify(optax.adamw(1e-3), sparsejax.rigl(0.8, update_every=1)),
    }
    timings = alternate({name: _step(config, tx) for name, tx in variants.items()}, rounds=arguments.rounds, seconds=1)
    rows = [
        {
            "training step": name,
            "milliseconds": 1e3 * median(timings, name),
            "time / adamw": ratio(timings, name, "adamw"),
        }
        for name in variants
    ]
    update = ratio(timings, "mask update every step", "between mask updates") - 1
    report(f"bytes_lm, {_size(config) / 1e6:.2f} million parameters", rows, arguments.output)
    print(f"mask updates every {EVERY} steps take {update / (EVERY + update):.2%} of training time")


def _size(config) -> int:
    state = nnx.state(nnx.eval_shape(lambda: model(config, nnx.Rngs(0))), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def _step(config, optimizer):
    graph, params = nnx.split(model(config, nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(1), (config.batch_size, config.length + 1), 0, 256)

    def loss(params):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()

    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    carried = [params, jax.jit(optimizer.init)(params)]

    def call():
        carried[:] = compiled(*carried)
        return jax.tree.leaves(carried[0])[0]

    return call


if __name__ == "__main__":
    main()
