"""A small residual network on handwritten digits.

COMMAND:  python -m experiments run digits_conv
RESULT:   dense 99.0 %, gradual 96.6, RigL 96.5, static 94.8 accuracy at 95 % zeros (one seed)
RUNTIME:  1 minute of one core
"""

import dataclasses

import optax

from experiments import algorithms as names
from experiments.data import evaluation_batches, load_digits, random_shift, training_batches
from experiments.experiment import Experiment, Task
from experiments.models import ResNet


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small residual network on 8x8 digits under several algorithms."""

    # what is trained, one after the other; `dense` is the network without sparsity
    algorithms: tuple[names.Name, ...] = ("dense", "static", "rigl", "gradual")
    # each algorithm is trained under each seed: of weights, order of the data and masks
    seeds: tuple[int, ...] = (0,)
    # fraction of zeros in the sparse layers together
    sparsity: float = 0.95
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
    # layers left dense, as globs over names such as blocks/0/conv1/kernel
    dense_layers: tuple[str, ...] = ("stem_conv/kernel",)
    # steps between two moves of the masks
    update_every: int = 25
    # share of the kept weights that is swapped at a move, decayed by a cosine
    drop_fraction: float = 0.3
    # fraction of training after which masks stay as they are
    masks_until: float = 0.75
    # features of each stage; each but the first halves the image
    channels: tuple[int, ...] = (16, 32)
    # residual blocks in each stage
    depth: int = 1
    # optimizer steps
    steps: int = 600
    # images in a step
    batch_size: int = 64
    # peak of the learning rate, which decays to 0 by a cosine
    learning_rate: float = 0.1
    # momentum of SGD
    momentum: float = 0.9
    # decay of kept weights, added to their gradient
    weight_decay: float = 5e-4
    # pixels by which training images are shifted at most
    shift: int = 1
    # steps between two records of loss and masks
    log_every: int = 25
    # steps between two evaluations on the held-out images
    eval_every: int = 50
    # steps between two checkpoints
    save_every: int = 150
    # how many of the newest checkpoints of a run stay on disk
    keep_checkpoints: int = 2
    # folder of the results; by default runs/digits_conv, or the next free number of it
    output: str = ""
    # continue what was interrupted; finished runs stay as they are
    resume: bool = False


def task(config: Config) -> Task:
    digits = load_digits()
    augment = random_shift(config.shift, fill=-0.3) if config.shift else None
    return Task(
        metric="accuracy",
        batches=lambda seed: training_batches(digits.train, batch_size=config.batch_size, seed=seed, augment=augment),
        heldout=list(evaluation_batches(digits.heldout, batch_size=len(digits.heldout))),
    )


def model(config: Config, rngs) -> ResNet:
    return ResNet(image=(8, 8, 1), channels=config.channels, depth=config.depth, classes=10, rngs=rngs)


def optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, momentum=config.momentum, nesterov=True)
    )


EXPERIMENT = Experiment(
    name="digits_conv",
    summary="a small residual network on handwritten digits",
    config=Config(),
    task=task,
    model=model,
    optimizer=optimizer,
)
