"""SparK: masked pre-training of convnets that see visible patches as the only sites that there are.

PAPER:    Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023,
          arXiv 2301.03580
COMMAND:  python -m experiments run spark_digits
CLAIM:    from hidden patches alone a ResNet and a ConvNeXt learn features that a linear probe can use; masked
          convolutions keep the mask through all layers, ordinary ones lose it in the first
RESULT:   linear probe over 3 seeds 81.7 to 85.7 % (ResNet), 87.7 to 89.6 % (ConvNeXt); visible patches reach 37.5 % of
          sites after every masked block, 97 % after the first ordinary one. At this size ordinary convolutions on zeros
          pre-train as well (86.1 and 90.6 %), and fine-tuning on 100 labels gains less than seeds differ
RUNTIME:  7 minutes of one core
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments.data import load_digits
from experiments.experiment import Study, UsageError
from experiments.models import Classifier, MaskedConvNeXt, MaskedResNet, Spark
from experiments.models.spark import kept_patches, reached, reconstruct
from experiments.papers.reporting import keep, show
from experiments.papers.training import adam, fit, forward, pretrain, settle_norms
from sparsejax.convolution import SiteMask, masked_global_pool, random_patch_mask

NETWORKS = {"ResNet": MaskedResNet, "ConvNeXt": MaskedConvNeXt}
STARTS = ("random", "unmasked", "SparK")


@dataclasses.dataclass(frozen=True)
class Config:
    """Pre-trains small convnets on digits whose patches are hidden, then probes and fine-tunes them without masks."""

    # each network is trained under each seed: of weights, data, masks and labels
    seeds: tuple[int, ...] = (0, 1, 2)
    # sides of the images, which are enlarged digits
    size: int = 16
    # features of the stages at strides 2 and 4; patches have the side of the last stride
    channels: tuple[int, ...] = (24, 48)
    # blocks in each stage
    depth: int = 2
    # share of patches that is hidden
    hidden: float = 0.6
    # features of the decoder at the coarsest scale
    decoder_width: int = 24
    # optimizer steps of pre-training
    steps: int = 200
    # images in a step
    batch_size: int = 32
    # peak of the learning rate of pre-training
    learning_rate: float = 3e-3
    # labelled images for fine-tuning
    labels: int = 100
    # optimizer steps of fine-tuning
    tune_steps: int = 100
    # peak of the learning rate of fine-tuning
    tune_learning_rate: float = 1e-3
    # folder of results.json and reconstruction.png; by default runs/spark_digits
    output: str = ""


def run(config: Config, *, progress: bool = True) -> dict[str, list[dict]]:
    """Pre-trains, probes, fine-tunes, prints the tables and keeps them with a picture.

    Args:
        config: the configuration.
        progress: show a progress bar.

    Returns:
        The tables `accuracy` and `erosion`.
    """
    patch = 2 ** len(config.channels)
    if config.size % patch or not 0 < config.hidden < 1 or config.labels > 1200 or min(config.steps, config.labels) < 1:
        raise UsageError(
            f"size={config.size} must be a multiple of {patch}, hidden={config.hidden} between 0 and 1, "
            f"labels={config.labels} 1 to 1200, steps={config.steps} at least 1"
        )
    train, heldout = digits(config.size)
    accuracies = {(network, start): [] for network in NETWORKS for start in STARTS}
    shown = {}
    one = config.tune_steps * len(STARTS) + config.steps * (len(STARTS) - 1)
    with tqdm(total=one * len(NETWORKS) * len(config.seeds), desc="training", disable=not progress) as bar:
        for seed in config.seeds:
            for network in NETWORKS:
                for start in STARTS:
                    bar.set_postfix_str(f"{network}, seed {seed}, {start}")
                    model = build(seed, network, config, start == "SparK")
                    if start != "random":
                        sizes = {"hidden": config.hidden, "steps": config.steps, "batch_size": config.batch_size}
                        pretrain(model, train[0], **sizes, learning_rate=config.learning_rate, seed=seed, bar=bar)
                        shown.setdefault((network, start), model)
                    probed = probe(nnx.clone(model.encoder), train, heldout)
                    tuned = fine_tune(nnx.clone(model.encoder), train, heldout, config, seed, bar)
                    accuracies[network, start].append((probed, tuned))
    tables = {
        "accuracy": [_row(*key, values) for key, values in accuracies.items()],
        "erosion": erosion(shown, heldout[0], config),
    }
    show(
        f"accuracy on {len(heldout[0])} held-out digits, %, mean and deviation over {len(config.seeds)} seeds",
        tables["accuracy"],
    )
    show("share of sites that depend on visible patches", tables["erosion"])
    path = keep("spark_digits", config, tables)
    picture(shown, heldout[0], tables["erosion"], config, path.with_name("reconstruction.png"))
    return tables


def digits(size: int):
    """Digits enlarged to size x size, `((images, labels), (images, labels))` to train on and held out."""
    return tuple(
        (np.asarray(jax.image.resize(part.images, (len(part), size, size, 1), "cubic")), part.labels)
        for part in load_digits()
    )


def build(seed: int, network: str, config: Config, masked: bool) -> Spark:
    """A new network with its decoder."""
    rngs = nnx.Rngs(seed)
    encoder = NETWORKS[network](1, config.channels, depth=config.depth, rngs=rngs)
    return Spark(encoder, 1, width=config.decoder_width, masked=masked, rngs=rngs)


def probe(encoder: nnx.Module, train, heldout) -> float:
    """Accuracy of a linear classifier of the mean features of the coarsest map, the encoder left as it is."""
    from sklearn.linear_model import RidgeClassifier  # takes a second to import
    from sklearn.preprocessing import StandardScaler

    settle_norms(encoder, jnp.asarray(train[0]))
    known, new = (
        np.asarray(masked_global_pool(forward(encoder, images)[-1], None), np.float64)
        for images in (train[0], heldout[0])
    )
    scale = StandardScaler().fit(known)
    return RidgeClassifier(1.0).fit(scale.transform(known), train[1]).score(scale.transform(new), heldout[1])


def fine_tune(encoder: nnx.Module, train, heldout, config: Config, seed: int, bar: tqdm) -> float:
    """Accuracy after training all of the network on a few labelled images, without masks."""
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(train[1]))[: config.labels]
    settle_norms(encoder, jnp.asarray(train[0]))
    model = Classifier(encoder, 10, rngs=nnx.Rngs(seed))
    rows = random.choice(chosen, (config.tune_steps, min(config.batch_size, config.labels)))
    batches = ((train[0][r], train[1][r]) for r in rows)
    fit(model, label_loss, batches, adam(config.tune_learning_rate, config.tune_steps), bar)
    return float(np.mean(np.argmax(forward(model, heldout[0]), axis=-1) == heldout[1]))


def label_loss(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(images, train=True), labels))


def erosion(models: dict, images: np.ndarray, config: Config) -> list[dict]:
    """How far visible patches reach, block by block, in networks that know the mask and in those that do not."""
    images = jnp.asarray(images[:64])
    mask = a_mask(images, config)
    how_far = nnx.jit(reached, static_argnames="masked")
    rows = []
    for (network, _), model in models.items():
        shares = np.asarray(how_far(model.encoder, images, mask, masked=model.masked)).tolist()
        name = f"{network}, {'masked' if model.masked else 'ordinary'} convolutions"
        rows.append(
            {"network": name, "input": float(jnp.mean(mask.mask))}
            | {f"block {number}": share for number, share in enumerate(shares, 1)}
        )
    return rows


def a_mask(images: jax.Array, config: Config) -> SiteMask:
    """A mask as in pre-training."""
    return random_patch_mask(
        jax.random.key(0), len(images), *kept_patches(images, 2 ** len(config.channels), config.hidden)
    )


def picture(models: dict, images: np.ndarray, rows: list[dict], config: Config, path: Path) -> None:
    """Draws images, what is visible of them, what is made of it; and the erosion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    images = jnp.asarray(images[:8])
    mask = a_mask(images, config)
    hidden = jnp.where(mask.at(images.shape[1:-1])[..., None], images, jnp.nan)
    lines = {"image": images, "visible": hidden}
    for (network, start), model in models.items():
        if start == "SparK":
            lines[f"SparK, {network}"] = nnx.jit(reconstruct)(model, images, mask)
    figure = plt.figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    left.suptitle("hidden patches as predicted, with mean and deviation of the true ones", fontsize=9)
    axes = left.subplots(len(lines), len(images))
    for line, (name, drawn) in zip(axes, lines.items(), strict=True):
        for ax, each in zip(line, np.asarray(drawn), strict=True):
            ax.imshow(each[..., 0], cmap="gray", vmin=-0.3, vmax=0.7)
            ax.set(xticks=[], yticks=[], facecolor="tab:blue")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    ax = right.subplots()
    for row in rows:
        shares = list(row.values())[1:]
        ax.plot(range(len(shares)), shares, "o--" if "ordinary" in row["network"] else "s-", label=row["network"])
    ax.set(xlabel="blocks", ylabel="share of sites that depend on visible patches", ylim=(0, 1.05))
    ax.set_xticks(range(len(shares)))
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")


def _row(network: str, start: str, values: list[tuple[float, float]]) -> dict:
    name = {
        "random": "random weights",
        "unmasked": "pre-trained, ordinary convolutions on zeros",
        "SparK": "pre-trained, masked convolutions (SparK)",
    }[start]
    probed, tuned = 100 * np.array(values).T
    return {
        "start": f"{network}, {name}",
        "linear probe": float(probed.mean()),
        "± probe": float(probed.std()),
        "fine-tuned": float(tuned.mean()),
        "± fine-tuned": float(tuned.std()),
        "worst probe": float(probed.min()),
    }


STUDY = Study(
    name="spark_digits",
    summary="SparK on handwritten digits: masked pre-training of a ResNet and a ConvNeXt, then without masks",
    config=Config(),
    run=run,
)
