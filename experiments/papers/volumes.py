"""Segmentation of volumes in stages: masked pre-training, many organs, then a target with few labels.

PAPER:    "A Large Convolutional Neural Network for Clinical Target and Multi-organ Segmentation in Gynecologic
          Brachytherapy with Multi-stage Learning" (GynBTNet), 2025, arXiv 2506.01073
COMMAND:  python -m experiments run volumes
CLAIM:    stages of training that need no labels, or labels of something else, help where labels of the target are few
RESULT:   Dice of a target with four labelled volumes, 3 seeds: 14.5 % without other stages, 31.3 % after labels of
          organs, higher with every seed; masked pre-training does not help here: 13.5 %, and 28.5 % before organs
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments.data.volumes import ORGANS, Volumes, make_volumes
from experiments.experiment import Study, UsageError
from experiments.models import MaskedResNet, Segmenter, Spark
from experiments.papers.reporting import keep, show
from experiments.papers.training import adam, fit, forward, pretrain

# Which stages come before the last one.
STARTS = {
    "target only": (),
    "pre-training, target": ("pretrain",),
    "organs, target": ("organs",),
    "pre-training, organs, target": ("pretrain", "organs"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small 3-D U-Net in up to three stages, and compares what the first two are worth."""

    # each way to train is repeated under each seed: of weights, data and masks
    seeds: tuple[int, ...] = (0, 1, 2)
    # voxels along each axis of the volumes
    side: int = 16
    # features of the stages at strides 2 and 4; patches have side 4
    channels: tuple[int, ...] = (16, 32)
    # features of the decoder at the coarsest scale
    decoder_width: int = 32
    # share of patches that is hidden in pre-training
    hidden: float = 0.6
    # volumes without labels
    unlabelled: int = 200
    # volumes with labels of organs
    labelled: int = 16
    # volumes with labels of the target
    target_labelled: int = 4
    # held-out volumes
    heldout: int = 40
    # optimizer steps of each stage: pre-training, organs, target
    steps: tuple[int, int, int] = (100, 60, 40)
    # volumes in a step
    batch_size: int = 8
    # peaks of the learning rates of the stages
    learning_rates: tuple[float, float, float] = (3e-3, 3e-3, 1e-3)
    # folder of results.json; by default runs/volumes
    output: str = ""


def run(config: Config, *, progress: bool = True) -> dict[str, list[dict]]:
    """Trains in all ways, prints the table and keeps it.

    Args:
        config: the configuration.
        progress: show a progress bar.

    Returns:
        The table `dice`.
    """
    patch = 2 ** len(config.channels)
    if config.side % patch or config.side % 4 or not 0 < config.hidden < 1 or min(config.steps) < 1:
        raise UsageError(
            f"side={config.side} must be a multiple of 4 and {patch}, hidden={config.hidden} between 0 and 1, "
            f"steps={config.steps} at least 1 each"
        )
    found = {name: [] for name in STARTS}
    total = config.steps[0] + 2 * config.steps[1] + 4 * config.steps[2]
    with tqdm(total=total * len(config.seeds), desc="training", disable=not progress) as bar:
        for seed in config.seeds:
            unlabelled, labelled, heldout = (
                make_volumes(count, side=config.side, seed=10 * seed + part)
                for part, count in enumerate((config.unlabelled, config.labelled, config.heldout))
            )
            bar.set_postfix_str(f"seed {seed}, pre-training")
            spark, _, _ = build(seed, config)
            sizes = {"hidden": config.hidden, "steps": config.steps[0], "batch_size": config.batch_size}
            pretrain(spark, unlabelled.images, **sizes, learning_rate=config.learning_rates[0], seed=seed, bar=bar)
            for name, before in STARTS.items():
                bar.set_postfix_str(f"seed {seed}, {name}")
                _, model, last = build(seed, config)
                if "pretrain" in before:
                    model.encoder = nnx.clone(spark.encoder)
                if "organs" in before:
                    train(model, labelled.images, labelled.organs, config, 1, seed, bar)
                few = Volumes(*(part[: config.target_labelled] for part in labelled))
                model.decoder.out = last
                train(model, few.images, few.target, config, 2, seed, bar)
                found[name].append(dice(model, heldout.images, heldout.target))
    rows = [
        {"stages": name, "Dice of the target": float(np.mean(values)), "±": float(np.std(values))}
        | {f"seed {seed}": value for seed, value in zip(config.seeds, values, strict=True)}
        for name, values in found.items()
    ]
    show(f"{config.heldout} held-out volumes, {config.target_labelled} with labels of the target", rows)
    tables = {"dice": rows}
    keep("volumes", config, tables)
    return tables


def build(seed: int, config: Config) -> tuple[Spark, Segmenter, nnx.Conv]:
    """A network with its decoder for pre-training, one that segments organs, and the last layer for the target."""
    rngs = nnx.Rngs(seed)
    encoders = [MaskedResNet(1, config.channels, dims=3, rngs=rngs) for _ in range(2)]
    spark = Spark(encoders[0], 1, width=config.decoder_width, rngs=rngs)
    model = Segmenter(encoders[1], 1 + len(ORGANS), width=config.decoder_width, rngs=rngs)
    return spark, model, nnx.Conv(model.decoder.out.in_features, 2, (1, 1, 1), rngs=rngs)


def train(model: Segmenter, images, labels, config: Config, stage: int, seed: int, bar: tqdm) -> list[float]:
    """Trains all of a model on labelled volumes."""
    steps, size = config.steps[stage], min(config.batch_size, len(images))
    rows = np.random.default_rng(seed).integers(0, len(images), (steps, size))
    batches = ((jnp.asarray(images[r]), jnp.asarray(labels[r], jnp.int32)) for r in rows)
    return fit(model, dice_loss, batches, adam(config.learning_rates[stage], steps), bar)


def dice_loss(model: Segmenter, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy and soft Dice of all classes but the background."""
    logits = model(images, train=True)
    entropy = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    there, wanted = nnx.softmax(logits)[..., 1:], nnx.one_hot(labels, logits.shape[-1])[..., 1:]
    axes = tuple(range(there.ndim - 1))
    both, either = jnp.sum(there * wanted, axis=axes), jnp.sum(there + wanted, axis=axes)
    return entropy + 1 - jnp.mean((2 * both + 1) / (either + 1))


def dice(model: Segmenter, images: np.ndarray, target: np.ndarray) -> float:
    """Mean over volumes of 2 |A and B| / (|A| + |B|), where A is what is found and B the target."""
    found = np.argmax(forward(model, images), axis=-1) == 1
    both, either = (np.sum(x, axis=(1, 2, 3)) for x in (found & target, found.astype(int) + target))
    return float(np.mean(2 * both / either))


STUDY = Study(
    name="volumes",
    summary="GynBTNet's stages on synthetic volumes: masked pre-training, organs, a target with few labels",
    config=Config(),
    run=run,
)
