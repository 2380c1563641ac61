"""A causal transformer over bytes."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.blocks import Block

BYTES = 256


class ByteTransformer(nnx.Module):
    """Predicts each next byte from those before it; learned positions, pre-norm blocks.

    Args:
        length: the longest sequence.
        width: features.
        depth: blocks.
        heads: attention heads; must divide `width`.
        rngs: random streams.

    Raises:
        ValueError: `heads` does not divide `width`.

    Example:
        >>> import jax.numpy as jnp
        >>> model = ByteTransformer(length=16, width=32, depth=2, heads=4, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 16), jnp.int32)).shape
        (2, 16, 256)
    """

    def __init__(self, *, length: int, width: int, depth: int, heads: int, rngs: nnx.Rngs):
        embed = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Embed(BYTES, width, embedding_init=embed, rngs=rngs)
        self.position_embedding = nnx.Embed(length, width, embedding_init=embed, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, 4 * width, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps int (batch, length) to logits (batch, length, 256); `train` makes no difference."""
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens, dtype=bool)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))
