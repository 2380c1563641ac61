"""The cost of `sparsify(adamw, rigl)` over plain `adamw`: the optimizer alone, its memory, and its mask updates.

python benchmarks/optimizer.py [--million 16] [--output benchmarks/results/optimizer.json]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from measure import alternate, median, ratio, report

import sparsejax


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=int, default=16, help="parameters, in millions")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each variant")
    parser.add_argument("--output", type=Path, help="keep the figures in this JSON file")
    arguments = parser.parse_args()

    width = 1024
    layers = max(1, round(arguments.million * 1e6 / width**2))
    key = jax.random.key(0)
    params = {
        f"layer{i}": {"kernel": jax.random.normal(jax.random.fold_in(key, i), (width, width))} for i in range(layers)
    }
    grads = jax.tree.map(lambda p: p * 0.01, params)
    variants = {
        "adamw": optax.adamw(1e-3),
        "sparsify, between updates": sparsejax.sparsify(optax.adamw(1e-3), sparsejax.rigl(0.9, update_every=2**30)),
        "sparsify, mask update": sparsejax.sparsify(optax.adamw(1e-3), sparsejax.rigl(0.9, update_every=1)),
    }
    steps, memory = {}, {}
    for name, optimizer in variants.items():
        steps[name], memory[name] = _stepper(optimizer, params, grads)
    timings = alternate(steps, rounds=arguments.rounds, seconds=0.5)
    rows = [
        {
            "optimizer": name,
            "milliseconds": 1e3 * median(timings, name),
            "time / adamw": ratio(timings, name, "adamw"),
            "temporary MiB": memory[name] / 2**20,
            "parameters": layers * width**2,
        }
        for name in variants
    ]
    report("optimizer alone", rows, arguments.output)


def _stepper(optimizer, params, grads):
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carried = [jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carried, grads).compile()

    def call():
        carried[:] = compiled(*carried, grads)
        return carried[0]

    return call, compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
