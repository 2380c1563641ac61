"""A small vision transformer."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.blocks import Block


class ViT(nnx.Module):
    """Square patches, learned positions, pre-norm blocks, mean over the patches, a linear head.

    Args:
        image: height, width and channels of the images.
        patch: side of a patch; must divide height and width.
        width: features.
        depth: blocks.
        heads: attention heads; must divide `width`.
        classes: outputs.
        rngs: random streams.

    Raises:
        ValueError: `patch` does not divide the image.

    Example:
        >>> import jax.numpy as jnp
        >>> model = ViT(image=(8, 8, 1), patch=2, width=32, depth=2, heads=4, classes=10, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((3, 8, 8, 1))).shape
        (3, 10)
    """

    def __init__(
        self,
        *,
        image: tuple[int, int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        rngs: nnx.Rngs,
    ):
        rows, columns, channels = image
        if rows % patch or columns % patch:
            raise ValueError(f"patch is {patch}, which does not divide images of {rows} x {columns}")
        self.patch = patch
        self.patch_projection = nnx.Linear(patch * patch * channels, width, rngs=rngs)
        self.position_embedding = nnx.Embed(
            (rows // patch) * (columns // patch), width, embedding_init=nnx.initializers.normal(0.2), rngs=rngs
        )
        self.blocks = nnx.List([Block(width, heads, 4 * width, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps (batch, height, width, channels) to logits (batch, classes); `train` makes no difference."""
        n, rows, columns, channels = images.shape
        p = self.patch
        x = images.reshape(n, rows // p, p, columns // p, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, p * p * channels)
        x = self.patch_projection(x) + self.position_embedding(jnp.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))
