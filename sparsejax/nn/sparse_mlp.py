"""A multilayer perceptron of sparse layers."""

import itertools
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from sparsejax.masks.block import Block
from sparsejax.masks.nm import NM
from sparsejax.nn.sparse_linear import SparseLinear


class SparseMLP(nnx.Module):
    """`SparseLinear` layers with an activation between them.

    Args:
        sizes: features of the input, of each hidden layer and of the output.
        structure: a `Block` or an `NM`.
        sparsity: fraction of blocks that are absent, in every layer.
        activation: between layers.
        rngs: random streams.
        **options: further arguments of every `SparseLinear`.

    Example:
        >>> import jax.numpy as jnp
        >>> mlp = SparseMLP((64, 256, 64), structure=Block((16, 16)), sparsity=0.75, rngs=nnx.Rngs(0))
        >>> mlp(jnp.ones((2, 64))).shape
        (2, 64)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        structure: Block | NM = Block((64, 64)),
        sparsity: float = 0.9,
        activation: Callable = nnx.gelu,
        rngs: nnx.Rngs,
        **options,
    ):
        options |= {"structure": structure, "sparsity": sparsity, "rngs": rngs}
        self.layers = nnx.List([SparseLinear(*pair, **options) for pair in itertools.pairwise(sizes)])
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., sizes[0]] to [..., sizes[-1]]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)
