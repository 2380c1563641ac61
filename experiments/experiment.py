"""What an experiment consists of: a configuration, data, a model and an optimizer, as plain functions."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

Metric = Literal["accuracy", "bits_per_byte"]


class UsageError(ValueError):
    """What the user asked for cannot be run; the message says what can."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The data of an experiment and how success on it is measured.

    Args:
        metric: `accuracy` (a fraction) or `bits_per_byte`.
        batches: `batches(seed)` are endless training batches, `{name: array}`: `image` and `label`, or `tokens`.
        heldout: held-out batches of one shape, each with a `weight` of 1 for rows that count and 0 for padding.
        digest: identifies data that differ between machines; None where they do not.
    """

    metric: Metric
    batches: Callable[[int], grain.IterDataset]
    heldout: Iterable[dict[str, np.ndarray]]
    digest: str | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One entry of `python -m experiments list`.

    Args:
        name: its name.
        summary: one line about it.
        config: the default configuration, a frozen dataclass; see `experiments/configs`.
        task: `task(config) -> Task`.
        model: `model(config, rngs) -> nnx.Module`, called as `model(inputs, train=...)`; it returns logits.
        optimizer: `optimizer(config)`, the optax transformation that `sparsify` wraps.
    """

    name: str
    summary: str
    config: object
    task: Callable[[object], Task]
    model: Callable[[object, nnx.Rngs], nnx.Module]
    optimizer: Callable[[object], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Study:
    """An entry of `python -m experiments list` that is more than training under algorithms, such as a paper's method.

    Args:
        name: its name.
        summary: one line about it.
        config: the default configuration, a frozen dataclass.
        run: `run(config)`: does everything, prints tables and keeps them in `output` of the configuration.
    """

    name: str
    summary: str
    config: object
    run: Callable[[object], object]


def inputs_and_targets(batch) -> tuple[jax.Array, jax.Array]:
    """What the model sees of a batch and what it must predict: the label, or at each place the next token."""
    if "image" in batch:
        return batch["image"], batch["label"]
    return batch["tokens"][:, :-1], batch["tokens"][:, 1:]


def mean_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats, float32."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.mean(losses)


def measure(logits: jax.Array, targets: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """Sums over the rows that count: cross-entropy in nats, right answers, and predictions made.

    Args:
        logits: (rows, ..., classes).
        targets: int (rows, ...).
        weight: (rows,), 1 for rows that count.

    Returns:
        `{"loss", "right", "count"}`, float32 scalars.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    right = jnp.argmax(logits, axis=-1) == targets
    weight = jnp.broadcast_to(weight.reshape(-1, *[1] * (targets.ndim - 1)), targets.shape)
    return {"loss": jnp.sum(weight * losses), "right": jnp.sum(weight * right), "count": jnp.sum(weight)}


def score(metric: Metric, sums: dict[str, float]) -> dict[str, float]:
    """Turns the sums of `measure` into the mean loss and the task's metric.

    Example:
        >>> score("accuracy", {"loss": 20.0, "right": 90.0, "count": 100.0})
        {'loss': 0.2, 'accuracy': 0.9}
    """
    loss = float(sums["loss"]) / float(sums["count"])
    if metric == "accuracy":
        return {"loss": loss, "accuracy": float(sums["right"]) / float(sums["count"])}
    return {"loss": loss, "bits_per_byte": loss / float(np.log(2))}
