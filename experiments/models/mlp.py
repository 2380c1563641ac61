"""A multilayer perceptron."""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """Linear layers with ReLU between them; what comes in is flattened to vectors.

    Args:
        sizes: features of the input, of each hidden layer and of the output.
        rngs: random streams; weights are He-initialized.

    Example:
        >>> import jax.numpy as jnp
        >>> MLP((64, 300, 100, 10), rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8, 1))).shape
        (2, 10)
    """

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
        if min(sizes) < 1:
            raise ValueError(f"layers of {tuple(sizes)} features; each needs 1 or more")
        init = nnx.initializers.he_normal()
        self.layers = nnx.List(
            [nnx.Linear(fan_in, fan_out, kernel_init=init, rngs=rngs) for fan_in, fan_out in itertools.pairwise(sizes)]
        )

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps (batch, ...) to logits (batch, sizes[-1]); `train` makes no difference."""
        *hidden, last = self.layers
        x = x.reshape(len(x), -1)
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)
