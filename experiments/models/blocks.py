"""The pre-norm transformer block that the byte model and the vision transformer share."""

import jax
from flax import nnx


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); no dropout.

    The prunable kernels are `attention/{query,key,value,out}/kernel`, `up/kernel` and `down/kernel`.

    Args:
        width: features.
        heads: attention heads; must divide `width`.
        hidden: features inside the MLP.
        rngs: random streams.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, use_bias=False, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps (batch, length, width) to the same shape; `mask` is True where a query may look."""
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))
