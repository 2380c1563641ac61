"""The same small network, 6 inputs, 8 hidden units, 3 outputs, in three frameworks: `apply(params, x)` and params."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(8, name="hidden")(x)))


def nnx_net():
    graph, params = nnx.split(NNXNet(nnx.Rngs(0)), nnx.Param)
    return lambda params, x: nnx.merge(graph, params)(x), params


def linen_net():
    net = LinenNet()
    return lambda params, x: net.apply({"params": params}, x), net.init(jax.random.key(0), jnp.ones((1, 6)))["params"]


def plain_net():
    def apply(params, x):
        hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return hidden @ params["out"]["kernel"] + params["out"]["bias"]

    def layer(key, inputs, outputs):
        return {"kernel": jax.random.normal(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}

    keys = jax.random.split(jax.random.key(0))
    return apply, {"hidden": layer(keys[0], 6, 8), "out": layer(keys[1], 8, 3)}
