"""A small vision transformer on handwritten digits.

COMMAND:  python -m experiments run digits_vit
RESULT:   dense 97.2 %, gradual 97.3, RigL 96.6, static 96.0 accuracy at 90 % zeros (one seed)
RUNTIME:  1.5 minutes of one core
"""

import dataclasses

import optax

from experiments import algorithms as names
from experiments.data import evaluation_batches, load_digits, training_batches
from experiments.experiment import Experiment, Task
from experiments.models import ViT


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small vision transformer on 8x8 digits under several algorithms."""

    # what is trained, one after the other; `dense` is the network without sparsity
    algorithms: tuple[names.Name, ...] = ("dense", "static", "rigl", "gradual")
    # each algorithm is trained under each seed: of weights, order of the data and masks
    seeds: tuple[int, ...] = (0,)
    # fraction of zeros in the sparse layers together
    sparsity: float = 0.9
    # how the sparsity is shared out over layers
    distribution: names.Distribution = "erdos_renyi_kernel"
    # what is kept together
    structure: names.Structure = "unstructured"
    # rows and columns of a block, for --structure block
    block: tuple[int, int] = (4, 4)
    # groups of columns of blocks that keep equally many; a multiple of the mesh's tensor x fsdp splits them along both
    block_groups: int = 1
    # masks over dense weights, or only the blocks that are kept: then time and memory follow the density
    storage: names.Storage = "masks"
    # n and m for nm, sr_ste, mdgf and sdgf: n of m consecutive inputs are kept
    n_of_m: tuple[int, int] = (2, 4)
    # layers left dense, as globs over names such as blocks/0/up/kernel
    dense_layers: tuple[str, ...] = ()
    # steps between two moves of the masks
    update_every: int = 25
    # share of the kept weights that is swapped at a move, decayed by a cosine
    drop_fraction: float = 0.3
    # fraction of training after which masks stay as they are
    masks_until: float = 0.75
    # side of a patch; must divide 8
    patch: int = 2
    # features of the transformer
    width: int = 64
    # blocks of the transformer
    depth: int = 2
    # attention heads; must divide the width
    heads: int = 4
    # optimizer steps
    steps: int = 600
    # images in a step
    batch_size: int = 64
    # peak of the learning rate, reached after the warm-up, then decayed to 0 by a cosine
    learning_rate: float = 2e-3
    # steps of the warm-up
    warmup: int = 50
    # decay of kept weights, decoupled from their gradient
    weight_decay: float = 0.05
    # steps between two records of loss and masks
    log_every: int = 25
    # steps between two evaluations on the held-out images
    eval_every: int = 50
    # steps between two checkpoints
    save_every: int = 150
    # how many of the newest checkpoints of a run stay on disk
    keep_checkpoints: int = 2
    # folder of the results; by default runs/digits_vit, or the next free number of it
    output: str = ""
    # continue what was interrupted; finished runs stay as they are
    resume: bool = False


def task(config: Config) -> Task:
    digits = load_digits()
    return Task(
        metric="accuracy",
        batches=lambda seed: training_batches(digits.train, batch_size=config.batch_size, seed=seed),
        heldout=list(evaluation_batches(digits.heldout, batch_size=len(digits.heldout))),
    )


def model(config: Config, rngs) -> ViT:
    return ViT(
        image=(8, 8, 1),
        patch=config.patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        classes=10,
        rngs=rngs,
    )


def optimizer(config: Config) -> optax.GradientTransformation:
    warmup = min(config.warmup, config.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    return optax.adamw(schedule, weight_decay=config.weight_decay)


EXPERIMENT = Experiment(
    name="digits_vit",
    summary="a small vision transformer on handwritten digits",
    config=Config(),
    task=task,
    model=model,
    optimizer=optimizer,
)
