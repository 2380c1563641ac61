"""What matters: pure functions `score(params, grads, masks, key, data) -> tree` of the same structure as `params`.

A score may look at the whole tree. Only the leaves that are sparse are read; the higher score is kept or grown first.
`params` are the weights (those under the mask where a method keeps them), `grads` the gradients with respect to the
masked weights, which reach pruned positions too; `masks` has `optax.MaskedNode` at dense leaves; `key` differs from
update to update; `data` is what the algorithm's memory holds. Before training, `grads` is None.
"""

import zlib

import jax
import jax.numpy as jnp

from sparsejax.masks.paths import map_with_names


def magnitude(params, grads, masks, key, data):
    """|w|, the score of magnitude pruning (Zhu & Gupta 2017, arXiv:1710.01878).

    Example:
        >>> import jax.numpy as jnp
        >>> magnitude({"w": jnp.array([-2.0, 1.0])}, None, None, None, None)["w"].tolist()
        [2.0, 1.0]
    """
    return jax.tree.map(jnp.abs, params)


def gradient(params, grads, masks, key, data):
    """|dL/dw|, what RigL grows by (Evci et al. 2020, arXiv:1911.11134, eq. 1)."""
    _require_gradients("gradient", grads)
    return jax.tree.map(jnp.abs, grads)


def saliency(params, grads, masks, key, data):
    """|w dL/dw|, the first-order change of the loss when w is removed (Lee et al. 2019, arXiv:1810.02340)."""
    _require_gradients("saliency", grads)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads)


def random(params, grads, masks, key, data):
    """Uniform in [0, 1): a random choice. Each leaf draws from its own key, made of `key` and the leaf's name."""

    def draw(path, w):
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        # The sum takes the sharding of w; the numbers do not depend on it.
        return jax.random.uniform(leaf_key, jnp.shape(w), jnp.float32) + jnp.zeros_like(w, dtype=jnp.float32)

    return map_with_names(draw, params)


def memory(params, grads, masks, key, data):
    """The tree that the algorithm's memory keeps, such as movement pruning's learned scores."""
    return data


def _require_gradients(name: str, grads) -> None:
    if grads is None:
        raise ValueError(
            f"the score {name} needs gradients, and there are no gradients before training; start with scores.random "
            "or scores.magnitude, or choose masks first: from_masks(sparsejax.snip(...))"
        )
