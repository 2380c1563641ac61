"""A submanifold network over lists of points, for scenes far too large to be held as images."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.convolution import Sites, sites_global_pool, subm_map
from sparsejax.nn import SiteBatchNorm, StridedSparseConv, SubmanifoldConv

INIT = nnx.initializers.he_normal()


class SiteNet(nnx.Module):
    """Residual submanifold blocks, made coarser by strided convolutions between; a latent of the scene; a head.

    Args:
        channels_in: features of a point.
        channels: features of each resolution, the finest first.
        stride: between two resolutions.
        latent: features of the scene.
        classes: outputs.
        rngs: random streams.

    Example:
        >>> from sparsejax.convolution import from_coords
        >>> points = jnp.array([[5, 7], [5, 8], [4000, 90]])
        >>> sites = from_coords(jnp.array([0, 0, 1]), points, jnp.ones((3, 1)), shape=(4096, 4096), batch_size=2,
        ...     capacity=4)
        >>> def run(sites):
        ...     return SiteNet(1, (8, 16), latent=8, classes=3, rngs=nnx.Rngs(0))(sites)
        >>> [each.shape for each in jax.eval_shape(run, sites)]
        [(2, 3), (2, 8)]
    """

    def __init__(
        self, channels_in: int, channels: Sequence[int], *, stride: int = 2, latent: int, classes: int, rngs: nnx.Rngs
    ):
        options = {"use_bias": False, "kernel_init": INIT, "rngs": rngs}
        self.stem = SubmanifoldConv(channels_in, channels[0], (3, 3), **options)
        self.stem_norm = SiteBatchNorm(channels[0], momentum=0.9, rngs=rngs)
        self.blocks = nnx.List([_Block(width, options) for width in channels])
        self.downs = nnx.List(
            [StridedSparseConv(a, b, (stride, stride), stride, **options) for a, b in itertools.pairwise(channels)]
        )
        self.norms = nnx.List([SiteBatchNorm(width, momentum=0.9, rngs=rngs) for width in channels[1:]])
        self.to_latent = nnx.Linear(2 * channels[-1], latent, rngs=rngs)
        self.head = nnx.Linear(latent, classes, rngs=rngs)

    def __call__(self, sites: Sites, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps sites to logits (samples, classes) and latents (samples, latent)."""
        average = not train
        neighbours = subm_map(sites, 3)
        x = _relu(self.stem_norm(self.stem(sites, neighbours), average))
        x = self.blocks[0](x, neighbours, average)
        for down, norm, block in zip(self.downs, self.norms, self.blocks[1:], strict=True):
            x = _relu(norm(down(x), average))
            x = block(x, subm_map(x, 3), average)
        pooled = jnp.concatenate([sites_global_pool(x, "mean"), sites_global_pool(x, "max")], axis=-1)
        latent = self.to_latent(pooled)
        return self.head(nnx.relu(latent)), latent


class _Block(nnx.Module):
    def __init__(self, width: int, options: dict):
        self.conv1 = SubmanifoldConv(width, width, (3, 3), **options)
        self.norm1 = SiteBatchNorm(width, momentum=0.9, rngs=options["rngs"])
        self.conv2 = SubmanifoldConv(width, width, (3, 3), **options)
        self.norm2 = SiteBatchNorm(width, momentum=0.9, rngs=options["rngs"])

    def __call__(self, x: Sites, neighbours, average: bool) -> Sites:
        y = _relu(self.norm1(self.conv1(x, neighbours), average))
        y = self.norm2(self.conv2(y, neighbours), average)
        return x.with_feats(nnx.relu(x.feats + y.feats))


def _relu(sites: Sites) -> Sites:
    return sites.with_feats(nnx.relu(sites.feats))
