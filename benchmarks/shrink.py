"""The experiments' models before and after half of their channels, heads and hidden features are cut out.

For each model: whether the smaller one gives the outputs of the masked one, its parameters, and the time of a compiled
forward pass and of a gradient step of both, in turn.

    python benchmarks/shrink.py [--sparsity 0.5] [--output benchmarks/results/shrink.json]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measure import alternate, median, ratio, report

from experiments.configs import bytes_lm, digits_conv, digits_vit
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.parameters.shrink_model import model_groups, shrink_model

BATCH = 16


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of the units of each group that is cut")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each variant")
    parser.add_argument("--output", type=Path, help="keep the figures in this JSON file")
    arguments = parser.parse_args()

    rows = []
    for name, (model, inputs) in _models().items():
        groups = model_groups(model, inputs[:1])
        masks = groups.prune(nnx.state(model, nnx.Param), arguments.sparsity)
        smaller, result = shrink_model(model, masks, inputs[:1])
        masked = _masked(model, masks)
        error = np.max(np.abs(np.asarray(_forward(smaller)(inputs)) - np.asarray(_forward(masked)(inputs))))
        calls = {
            "forward, masked": (_forward(masked), inputs),
            "forward, smaller": (_forward(smaller), inputs),
            "gradient, masked": (_gradient(masked), inputs),
            "gradient, smaller": (_gradient(smaller), inputs),
        }
        timings = alternate(
            {key: (lambda call=call, x=x: call(x)) for key, (call, x) in calls.items()},
            rounds=arguments.rounds,
            seconds=0.1,
        )
        before, after = result.parameters
        rows.append(
            {
                "model": name,
                "groups cut": len(result.sizes),
                "largest difference of outputs": float(error),
                "parameters before": before,
                "after": after,
                "forward before, ms": 1e3 * median(timings, "forward, masked"),
                "forward after, ms": 1e3 * median(timings, "forward, smaller"),
                "forward, times faster": ratio(timings, "forward, masked", "forward, smaller"),
                "gradient before, ms": 1e3 * median(timings, "gradient, masked"),
                "gradient after, ms": 1e3 * median(timings, "gradient, smaller"),
                "gradient, times faster": ratio(timings, "gradient, masked", "gradient, smaller"),
            }
        )
    report(f"shrink at {arguments.sparsity:.0%}, batches of {BATCH}", rows, arguments.output)


def _models():
    images = jax.random.normal(jax.random.key(0), (BATCH, 8, 8, 1))
    config = bytes_lm.Config()
    tokens = jax.random.randint(jax.random.key(0), (BATCH, config.length), 0, 256)
    return {
        "ResNet": (_used(digits_conv.model(digits_conv.Config(), nnx.Rngs(0))), images),
        "ViT": (_used(digits_vit.model(digits_vit.Config(), nnx.Rngs(0))), images),
        "bytes_lm": (_used(bytes_lm.model(config, nnx.Rngs(0))), tokens),
    }


def _used(model):
    """Biases and running statistics other than at the start, where they are zeros and ones."""
    random = np.random.default_rng(0)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param | nnx.BatchStat) and variable[...].ndim == 1:
            variable[...] = jnp.asarray(random.uniform(0.5, 1.5, variable[...].shape), jnp.float32)
    return model


def _masked(model, masks):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    named = dict(named_leaves(masks))
    params = map_with_names(lambda name, leaf: leaf * named[name] if name in named else leaf, params)
    return nnx.merge(graph, params, rest)


def _forward(model):
    graph, state = nnx.split(model)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda x: call(state, x)


def _gradient(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    call = jax.jit(jax.grad(lambda params, x: jnp.mean(nnx.merge(graph, params, rest)(x) ** 2)))
    return lambda x: call(params, x)


if __name__ == "__main__":
    main()
