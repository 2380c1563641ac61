"""What studies of convolution share: a training loop, masked pre-training, batch norms that fit the data.

Functions and optimizers are made once, so that models of one kind, trained under many seeds, are compiled once.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments.models.spark import Spark, kept_patches, patch_loss
from sparsejax.convolution import SiteMask, random_patch_mask


@functools.cache
def adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with decoupled decay, clipped gradients, a tenth of warm-up and a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(schedule, b2=0.95, weight_decay=0.04))


def fit(
    model: nnx.Module, loss: Callable, batches: Iterable, optimizer: optax.GradientTransformation, bar: tqdm
) -> list[float]:
    """Trains a model in place.

    Args:
        model: the model.
        loss: `loss(model, *batch)`, the same object whenever it means the same.
        batches: tuples of arrays.
        optimizer: likewise the same object.
        bar: progress bar, moved by one at each step.

    Returns:
        The loss of each step.
    """
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    losses = []
    for batch in batches:
        losses.append(_step(model, optimizer, batch, loss=loss))
        bar.update()
    return np.asarray(losses).tolist()


@functools.partial(nnx.jit, static_argnames="loss")
def _step(model, optimizer, batch, *, loss):
    value, grads = nnx.value_and_grad(loss)(model, *batch)
    optimizer.update(model, grads)
    return value


@functools.partial(nnx.jit, static_argnames="train")
def forward(model: nnx.Module, inputs, *, train: bool = False):
    """`model(inputs, train=train)`, compiled."""
    return model(inputs, train=train)


def pretrain(
    model: Spark,
    images: np.ndarray,
    *,
    hidden: float,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    bar: tqdm,
) -> list[float]:
    """Trains encoder and decoder to predict hidden patches, hidden anew at every step.

    Args:
        model: changed in place.
        images: float (images, *shape, channels).
        hidden: share of patches that is hidden.
        steps: optimizer steps.
        batch_size: images in a step.
        learning_rate: its peak.
        seed: of data and masks.
        bar: progress bar, moved by one at each step.

    Returns:
        The loss of each step.
    """
    grid, kept = kept_patches(images, model.patch, hidden)
    random = np.random.default_rng(seed)

    def batches():
        for key in jax.random.split(jax.random.key(seed), steps):
            rows = random.integers(0, len(images), batch_size)
            yield jnp.asarray(images[rows]), _random_mask(key, batch_size, grid, kept)

    return fit(model, spark_loss, batches(), adam(learning_rate, steps), bar)


_random_mask = jax.jit(random_patch_mask, static_argnums=(1, 2, 3))


def spark_loss(model: Spark, images: jax.Array, mask: SiteMask) -> jax.Array:
    """The loss of pre-training."""
    return patch_loss(model(images, mask, train=True), images, mask, model.patch)


def settle_norms(encoder: nnx.Module, images: jax.Array) -> None:
    """Gives batch norms the statistics of these images, as they are without masks: one fair start for all encoders."""
    norms = [module for _, module in nnx.iter_modules(encoder) if isinstance(module, nnx.BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    if norms:
        forward(encoder, images, train=True)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
