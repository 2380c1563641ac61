"""Wafer maps at full resolution: known patterns of defects are told apart, unknown ones are noticed.

PAPER:    Frittoli et al., "Deep Open-Set Recognition for Silicon Wafer Production Monitoring", 2022, arXiv 2208.14071
COMMAND:  python -m experiments run wafers
CLAIM:    a submanifold network reads defects where they are, at a cost that does not depend on the resolution, and a
          Gaussian mixture over its latents notices classes that it has never seen, where its confidence does not
RESULT:   accuracy 99.8 %, against 99.3 and 97.9 % of convnets on 64 x 64 and 32 x 32 bins; AUROC of unknown patterns by
          mixture 84.6, by max-softmax 42.3 and by energy 44.3 % (3 seeds). The mixture on the convnets' latents gives
          83.2 and 76.5; the coarser one's max-softmax, 86.2, is the best of all. The data are synthetic
RUNTIME:  5 minutes of one core
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments.data.wafers import PATTERNS, bin_wafers, make_wafers, stack_wafers
from experiments.experiment import Study, UsageError
from experiments.models import MaskedResNet, SiteNet
from experiments.papers.reporting import keep, milliseconds, show
from experiments.papers.training import adam, fit, forward
from sparsejax.convolution import Sites, from_coords, masked_global_pool


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a submanifold network on lists of defects and a convnet on binned maps; some patterns are held out."""

    # both networks are trained under each seed: of weights and wafers
    seeds: tuple[int, ...] = (0, 1, 2)
    # positions along each side of a wafer
    size: int = 4096
    # fewest and most defects of a wafer
    points: tuple[int, int] = (150, 450)
    # share of defects that lie anywhere
    noise: float = 0.15
    # patterns that are not trained on, of ring, edge, cluster, random, scratch, grid
    unknown: tuple[str, ...] = ("ring", "scratch")
    # features of each resolution of the submanifold network
    channels: tuple[int, ...] = (16, 16, 32, 32, 64)
    # by how much each resolution is coarser than the one before
    stride: int = 4
    # features of a wafer, on which the mixture is fitted
    latent: int = 16
    # squares along each side of the binned maps, one convnet for each
    bins: tuple[int, ...] = (32, 64)
    # features of the convnet's stages
    binned_channels: tuple[int, ...] = (16, 32, 64)
    # optimizer steps
    steps: int = 150
    # wafers in a step
    batch_size: int = 32
    # peak of the learning rate
    learning_rate: float = 3e-3
    # wafers on which the mixture is fitted, and as many on which all is measured
    wafers: int = 480
    # sizes at which a forward pass is timed; the wafers have the same number of defects
    timed_sizes: tuple[int, ...] = (4096, 16384, 32768)
    # folder of results.json; by default runs/wafers
    output: str = ""

    @property
    def known(self) -> list[int]:
        """Numbers of the patterns that are trained on."""
        return [number for number, name in enumerate(PATTERNS) if name not in self.unknown]


class BinnedNet(nnx.Module):
    """A convnet on binned maps with the latent and the head of `SiteNet`."""

    def __init__(self, channels: tuple[int, ...], *, latent: int, classes: int, rngs: nnx.Rngs):
        self.encoder = MaskedResNet(1, channels, rngs=rngs)
        self.to_latent = nnx.Linear(2 * channels[-1], latent, rngs=rngs)
        self.head = nnx.Linear(latent, classes, rngs=rngs)

    def __call__(self, maps: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps (samples, bins, bins, 1) to logits (samples, classes) and latents (samples, latent)."""
        x = self.encoder(maps, train=train)[-1]
        pooled = [masked_global_pool(x, None, how) for how in ("mean", "max")]
        latent = self.to_latent(jnp.concatenate(pooled, axis=-1))
        return self.head(nnx.relu(latent)), latent


def run(config: Config, *, progress: bool = True) -> dict[str, list[dict]]:
    """Trains, measures, prints the tables and keeps them.

    Args:
        config: the configuration.
        progress: show a progress bar.

    Returns:
        The tables `recognition` and `time`.
    """
    strange = [name for name in config.unknown if name not in PATTERNS]
    if strange or len(config.known) < 2 or not config.unknown:
        raise UsageError(
            f"unknown={config.unknown} must be some of {tuple(PATTERNS)}, with two or more left to train on"
        )
    if config.wafers % config.batch_size or config.points[0] < 2:
        raise UsageError(
            f"wafers={config.wafers} must be a multiple of batch_size={config.batch_size}, "
            f"points={config.points} at least 2"
        )
    kinds = {"full resolution": _points} | {
        f"{bins} x {bins} bins": functools.partial(_maps, bins=bins) for bins in config.bins
    }
    found = {name: [] for name in kinds}
    with tqdm(total=len(kinds) * config.steps * len(config.seeds), desc="training", disable=not progress) as bar:
        for seed in config.seeds:
            for name, prepare in kinds.items():
                bar.set_postfix_str(f"seed {seed}, {name}")
                model = build(seed, config, prepare is _points)
                found[name].append(recognise(model, prepare, config, seed, bar))
    tables = {"recognition": [_row(name, values) for name, values in found.items()]}
    names = [", ".join(list(PATTERNS)[number] for number in config.known), ", ".join(config.unknown)]
    title = f"known: {names[0]}; unknown: {names[1]}; %, mean and deviation over {len(config.seeds)} seeds"
    show(title, tables["recognition"])
    if config.timed_sizes:
        tables["time"] = [time_at(size, config) for size in config.timed_sizes]
        show(f"a forward pass of {config.batch_size} wafers by the submanifold network", tables["time"])
    keep("wafers", config, tables)
    return tables


def build(seed: int, config: Config, full: bool) -> nnx.Module:
    """A new network: for sites at full resolution, or for binned maps."""
    sizes = {"latent": config.latent, "classes": len(config.known), "rngs": nnx.Rngs(seed)}
    if full:
        return SiteNet(1, config.channels, stride=config.stride, **sizes)
    return BinnedNet(config.binned_channels, **sizes)


def recognise(model, prepare, config: Config, seed: int, bar: tqdm) -> dict[str, float]:
    """Trains on known patterns; accuracy on them, and AUROC of unknown ones by three scores."""
    from sklearn.metrics import roc_auc_score  # takes a second to import

    random = np.random.default_rng(seed)

    def batches():
        for step in range(config.steps):
            labels = random.integers(0, len(config.known), config.batch_size)
            wafers = _wafers(np.array(config.known)[labels], config, seed=(seed, 0, step))
            yield prepare(wafers, config), labels

    fit(model, label_loss, batches(), adam(config.learning_rate, config.steps), bar)

    def outputs(kinds, part):
        wafers = _wafers(kinds, config, seed=(seed, part))
        starts = range(0, len(wafers), config.batch_size)
        each = [forward(model, prepare(wafers[at : at + config.batch_size], config)) for at in starts]
        return (np.concatenate([np.asarray(x[i], np.float64) for x in each]) for i in range(2))

    labels = np.arange(config.wafers) % len(config.known)
    kinds = np.array(config.known)[labels]
    unknown = np.array([list(PATTERNS).index(name) for name in config.unknown])
    _, fitted = outputs(kinds, 1)
    logits, latents = outputs(kinds, 2)
    new_logits, new_latents = outputs(unknown[np.arange(config.wafers) % len(unknown)], 3)
    surprise = mixture(fitted, labels)
    is_new = np.repeat([0, 1], config.wafers)

    def auroc(score, *pair):
        return float(roc_auc_score(is_new, np.concatenate([score(each) for each in pair])))

    return {
        "accuracy": float(np.mean(np.argmax(logits, axis=-1) == labels)),
        "AUROC mixture": auroc(surprise, latents, new_latents),
        "AUROC softmax": auroc(lambda x: -np.asarray(jnp.max(nnx.softmax(x), axis=-1)), logits, new_logits),
        "AUROC energy": auroc(lambda x: -np.asarray(nnx.logsumexp(x, axis=-1)), logits, new_logits),
    }


def label_loss(model, inputs, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    logits, _ = model(inputs, train=True)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def mixture(latents: np.ndarray, labels: np.ndarray):
    """Fits one Gaussian with full covariance to each class; gives a function from latents to minus log likelihoods."""
    from sklearn.mixture import GaussianMixture

    numbers, counts = np.unique(labels, return_counts=True)
    parts = [GaussianMixture(1, reg_covar=1e-4).fit(latents[labels == number]) for number in numbers]
    shares = np.log(counts / len(labels))

    def surprise(latents):
        terms = [share + part.score_samples(latents) for share, part in zip(shares, parts, strict=True)]
        return -np.logaddexp.reduce(terms, axis=0)

    return surprise


def time_at(size: int, config: Config) -> dict:
    """The time of a forward pass on wafers of this size, and what one layer's features would take as dense arrays."""
    config = dataclasses.replace(config, size=size)
    kinds = np.array(config.known)[np.arange(config.batch_size) % len(config.known)]
    wafers = _wafers(kinds, config, seed=(0,))
    model = build(0, config, True)
    return {
        "positions": f"{size} x {size}",
        "defects": float(sum(map(len, wafers))),
        "ms": milliseconds(forward, model, _points(wafers, config)),
        "GB if dense": config.batch_size * size**2 * config.channels[0] * 4 / 1e9,
    }


def _wafers(kinds, config: Config, *, seed) -> list[np.ndarray]:
    return make_wafers(kinds, size=config.size, points=config.points, seed=seed, noise=config.noise)


def _points(wafers, config: Config) -> Sites:
    batch, coords = stack_wafers(wafers, config.batch_size * config.points[1])
    return _to_sites(batch, coords, size=config.size, wafers=config.batch_size)


@functools.partial(jax.jit, static_argnames=("size", "wafers"))
def _to_sites(batch, coords, *, size: int, wafers: int) -> Sites:
    ones = jnp.ones((len(batch), 1))
    return from_coords(batch, coords, ones, shape=(size, size), batch_size=wafers, capacity=len(batch))


def _maps(wafers, config: Config, *, bins: int) -> np.ndarray:
    return bin_wafers(wafers, config.size, bins)


def _row(name: str, values: list[dict[str, float]]) -> dict:
    row = {"network": name}
    for key in values[0]:
        figures = 100 * np.array([each[key] for each in values])
        row |= {key: float(figures.mean()), f"± {key.removeprefix('AUROC ')}": float(figures.std())}
    return row


STUDY = Study(
    name="wafers",
    summary="defects on wafers at full resolution: known patterns told apart, unknown ones noticed",
    config=Config(),
    run=run,
)
