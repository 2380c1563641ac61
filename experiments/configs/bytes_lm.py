"""A byte-level causal transformer on the source code of Python's standard library.

COMMAND:  python -m experiments run bytes_lm [--algorithms dense rigl]
RESULT:   dense 2.34, RigL 2.77 bits per byte on held-out files at 80 % zeros (one seed)
RUNTIME:  9 minutes of one core
"""

import dataclasses
import itertools

import optax

from experiments import algorithms as names
from experiments.data import ByteWindows, evaluation_batches, load_byte_corpus, training_batches
from experiments.experiment import Experiment, Task
from experiments.models import ByteTransformer


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a causal transformer to predict the next byte of Python source; measured in bits per byte."""

    # what is trained, one after the other; `dense` is the network without sparsity
    algorithms: tuple[names.Name, ...] = ("dense", "rigl")
    # each algorithm is trained under each seed: of weights, order of the data and masks
    seeds: tuple[int, ...] = (0,)
    # fraction of zeros in the sparse layers together
    sparsity: float = 0.8
    # how the sparsity is shared out over layers
    distribution: names.Distribution = "erdos_renyi_kernel"
    # what is kept together
    structure: names.Structure = "unstructured"
    # rows and columns of a block, for --structure block
    block: tuple[int, int] = (16, 16)
    # groups of columns of blocks that keep equally many; a multiple of the mesh's tensor x fsdp splits them along both
    block_groups: int = 1
    # masks over dense weights, or only the blocks that are kept: then time and memory follow the density
    storage: names.Storage = "masks"
    # n and m for nm, sr_ste, mdgf and sdgf: n of m consecutive inputs are kept
    n_of_m: tuple[int, int] = (2, 4)
    # layers left dense, as globs over names such as blocks/0/up/kernel
    dense_layers: tuple[str, ...] = ("head/kernel",)
    # steps between two moves of the masks
    update_every: int = 50
    # share of the kept weights that is swapped at a move, decayed by a cosine
    drop_fraction: float = 0.3
    # fraction of training after which masks stay as they are
    masks_until: float = 0.75
    # features of the transformer
    width: int = 128
    # blocks of the transformer
    depth: int = 4
    # attention heads; must divide the width
    heads: int = 4
    # bytes that a prediction can look back on
    length: int = 128
    # optimizer steps
    steps: int = 1000
    # windows in a step
    batch_size: int = 16
    # peak of the learning rate, reached after the warm-up, then decayed to a tenth by a cosine
    learning_rate: float = 2e-3
    # steps of the warm-up
    warmup: int = 100
    # decay of kept weights, decoupled from their gradient
    weight_decay: float = 0.1
    # largest norm of the gradient of kept weights; larger ones are scaled down
    clip: float = 1.0
    # bytes of source to read at most; 0 reads all, about 12 million
    max_bytes: int = 0
    # held-out windows that are evaluated; 0 takes all
    heldout_windows: int = 512
    # steps between two records of loss and masks
    log_every: int = 50
    # steps between two evaluations on the held-out windows
    eval_every: int = 250
    # steps between two checkpoints
    save_every: int = 250
    # how many of the newest checkpoints of a run stay on disk
    keep_checkpoints: int = 2
    # folder of the results; by default runs/bytes_lm, or the next free number of it
    output: str = ""
    # continue what was interrupted; finished runs stay as they are
    resume: bool = False


def task(config: Config) -> Task:
    corpus = load_byte_corpus(max_bytes=config.max_bytes or None)
    train = ByteWindows(corpus.train, config.length)
    heldout = ByteWindows(corpus.heldout, config.length, stride=config.length)
    batches = evaluation_batches(heldout, batch_size=config.batch_size)
    wanted = -(-(config.heldout_windows or len(heldout)) // config.batch_size)
    return Task(
        metric="bits_per_byte",
        batches=lambda seed: training_batches(train, batch_size=config.batch_size, seed=seed, replacement=True),
        heldout=list(itertools.islice(batches, wanted)),
        digest=corpus.digest,
    )


def model(config: Config, rngs) -> ByteTransformer:
    return ByteTransformer(length=config.length, width=config.width, depth=config.depth, heads=config.heads, rngs=rngs)


def optimizer(config: Config) -> optax.GradientTransformation:
    warmup = min(config.warmup, config.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, config.steps, end_value=config.learning_rate / 10
    )
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


EXPERIMENT = Experiment(
    name="bytes_lm",
    summary="a byte-level transformer on Python's standard library, in bits per byte",
    config=Config(),
    task=task,
    model=model,
    optimizer=optimizer,
)
