"""What studies of attention share: a byte-level transformer trained here and now, held-out bytes."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments.configs import bytes_lm
from experiments.experiment import UsageError, inputs_and_targets, mean_loss
from experiments.models import ByteTransformer
from sparsejax.attention import Causal
from sparsejax.nn import SparseAttention


@dataclasses.dataclass(frozen=True)
class Training:
    """The dense model that a study starts from."""

    # seed of weights and data
    seed: int = 0
    # features of the transformer
    width: int = 128
    # blocks of the transformer
    depth: int = 2
    # attention heads; must divide the width
    heads: int = 4
    # bytes that a prediction can look back on
    length: int = 512
    # optimizer steps of the dense model
    steps: int = 1500
    # windows in a step
    batch_size: int = 4
    # peak of the learning rate, reached after the warm-up, then decayed to a tenth by a cosine
    learning_rate: float = 2e-3
    # bytes of source to read at most; 0 reads all, about 12 million
    max_bytes: int = 4_000_000
    # held-out windows that are evaluated
    heldout_windows: int = 32
    # folder of results.json; by default runs/ and the name of the study
    output: str = ""


class Trained(NamedTuple):
    """What `train_dense` returns.

    Attributes:
        model: the model.
        heldout: int32 [heldout_windows, length + 1], bytes of files that it has not seen.
        batches: `batches(seed)` are endless training batches `{"tokens": int32 [batch_size, length + 1]}`.
    """

    model: ByteTransformer
    heldout: np.ndarray
    batches: Callable


def train_dense(config: Training, *, progress: bool = True) -> Trained:
    """Trains the byte-level transformer of `bytes_lm`, densely.

    Args:
        config: the configuration.
        progress: show a progress bar.

    Returns:
        The model, held-out windows, and more training batches.
    """
    for name in ("steps", "batch_size", "depth", "heads", "heldout_windows"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} is {getattr(config, name)}; it must be 1 or more")
    if config.width % config.heads:
        raise UsageError(f"heads is {config.heads}, which does not divide the width of {config.width}")
    names = [field.name for field in dataclasses.fields(Training) if field.name not in ("seed", "output")]
    base = dataclasses.replace(bytes_lm.EXPERIMENT.config, **{name: getattr(config, name) for name in names})
    try:
        task = bytes_lm.task(base)
    except ValueError as error:  # too few bytes
        raise UsageError(str(error)) from error
    # Attention without the matrix of all pairs trains several times faster here, and computes the same.
    model = with_attention(bytes_lm.model(base, nnx.Rngs(config.seed)), lambda _: causal_attention(config))
    optimizer = nnx.Optimizer(model, bytes_lm.optimizer(base), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        inputs, targets = inputs_and_targets(batch)
        positions = jnp.arange(inputs.shape[1])
        loss, grads = nnx.value_and_grad(lambda model: mean_loss(logits_at(model, inputs, positions), targets))(model)
        optimizer.update(model, grads)
        return loss

    batches = itertools.islice(task.batches(config.seed), config.steps)
    with tqdm(batches, total=config.steps, desc="training the dense model", disable=not progress) as bar:
        for number, batch in enumerate(bar, 1):
            loss = step(model, optimizer, batch)
            if number % 20 == 0 or number == config.steps:
                bar.set_postfix_str(f"{float(loss) / np.log(2):.3f} bits per byte")
    heldout = np.concatenate([batch["tokens"][batch["weight"] > 0] for batch in task.heldout])
    return Trained(model, heldout[: config.heldout_windows], task.batches)


def with_attention(model: ByteTransformer, make: Callable[[int], nnx.Module]) -> ByteTransformer:
    """A copy of the model whose blocks attend by `make(block)`, modules that take over the weights."""
    model = nnx.clone(model)
    for index, block in enumerate(model.blocks):
        attention = make(index)
        nnx.update(attention, nnx.state(block.attention, nnx.Param))
        block.attention = attention
    return model


def causal_attention(config: Training, **options) -> SparseAttention:
    """Attention for `with_attention`, dense and causal unless options say otherwise."""
    options = {"pattern": Causal(), "decode": False, "bq": 64, "bk": 64} | options
    return SparseAttention(config.heads, config.width, use_bias=False, rngs=nnx.Rngs(0), **options)


def logits_at(model: ByteTransformer, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Logits of int tokens [B, T] at positions [T]; what each sees is left to the attention modules."""
    x = model.token_embedding(tokens) + model.position_embedding(positions)
    for block in model.blocks:
        x = block(x)
    return model.head(model.norm(x))


def quality(logits: jax.Array, targets: jax.Array, dense: jax.Array) -> tuple[float, float]:
    """Bits per byte, and how often the likeliest byte is that of the dense model."""
    agreement = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(dense, -1))
    return float(mean_loss(logits, targets)) / float(np.log(2)), float(agreement)
