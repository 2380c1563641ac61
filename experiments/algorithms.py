"""The edge between the command line and the library: names of algorithms become algorithms."""

from typing import Literal

import jax

import sparsejax
from experiments.experiment import UsageError, mean_loss

Name = Literal[
    "dense",
    "static",
    "set",
    "rigl",
    "gradual",
    "granet",
    "magnitude",
    "global_magnitude",
    "random",
    "saliency",
    "iterative",
    "cyclic",
    "ac_dc",
    "top_kast",
    "movement",
    "straight_through",
    "nm",
    "sr_ste",
    "mdgf",
    "sdgf",
    "snip",
    "grasp",
    "synflow",
]
Distribution = Literal["erdos_renyi_kernel", "erdos_renyi", "uniform", "global"]
Structure = Literal["unstructured", "block", "channel"]
Storage = Literal["masks", "block"]

BEFORE_TRAINING = ("snip", "grasp", "synflow")  # these find masks once and need loss and data to do so

_DISTRIBUTIONS = {
    "erdos_renyi_kernel": sparsejax.erdos_renyi_kernel,
    "erdos_renyi": sparsejax.erdos_renyi,
    "uniform": sparsejax.uniform,
    "global": sparsejax.global_,
}


def rules_of(config) -> dict[str, None]:
    """The layers that a configuration leaves dense, as rules for `sparsify`."""
    return dict.fromkeys(config.dense_layers)


def structure_of(config):
    """The structure that a configuration names; what is stored in blocks is sparse in blocks."""
    match "block" if config.storage == "block" else config.structure:
        case "unstructured":
            return sparsejax.Unstructured()
        case "block":
            return sparsejax.Block(tuple(config.block), groups=config.block_groups)
        case "channel":
            return sparsejax.Channel()
    raise UsageError(f"structure is {config.structure!r}; known are unstructured, block, channel")


DRY_RUN = 2
"""Steps of a run that only tries everything out."""


def make_algorithm(name: Name, config, *, seed=0, masks=None) -> sparsejax.Algorithm:
    """Builds the algorithm that a name stands for, with a configuration's figures.

    Masks move until `config.masks_until` of training; what prunes gradually reaches its target then. What prunes once
    does so half-way through. A run of two steps is a dry run, whose masks move at step 1.

    Args:
        name: any of `Name` but `dense`.
        config: a configuration of `experiments/configs`.
        seed: an int or a traced int32, so that all seeds share one compilation.
        masks: for those of `BEFORE_TRAINING`, the masks that `find_masks` found.

    Returns:
        The algorithm, for `sparsejax.sparsify`.

    Raises:
        ValueError: a figure is out of range.
    """
    if name in BEFORE_TRAINING:
        return sparsejax.from_masks(masks)
    if not 0 < config.masks_until <= 1:
        raise UsageError(f"masks_until is {config.masks_until}; it is a fraction of training in (0, 1]")
    sparsity, every = config.sparsity, config.update_every
    end = max(int(config.masks_until * config.steps), 1)
    if config.steps == DRY_RUN:
        every, end = 1, DRY_RUN
    tenth = max(config.steps // 10, 1)
    where = {"structure": structure_of(config), "distribution": _DISTRIBUTIONS[config.distribution]}
    moving = {**where, "update_every": every, "stop": end, "drop_fraction": config.drop_fraction, "seed": seed}
    kept, of = config.n_of_m
    match name:
        case "static":
            return sparsejax.static(sparsity, seed=seed, **where)
        case "set":
            return sparsejax.set_(sparsity, **moving)
        case "rigl":
            return sparsejax.rigl(sparsity, **moving)
        case "gradual":
            return sparsejax.gradual(sparsity, begin=min(every, end - 1), end=end, update_every=every, **where)
        case "granet":
            options = {**moving, "end": end, "stop": config.steps - 1}
            return sparsejax.granet(sparsity, **options)
        case "magnitude":
            return sparsejax.magnitude(sparsity, step=config.steps // 2, **where)
        case "global_magnitude":
            return sparsejax.global_magnitude(sparsity, step=config.steps // 2, structure=where["structure"])
        case "random":
            return sparsejax.random(sparsity, step=config.steps // 2, seed=seed, **where)
        case "saliency":
            return sparsejax.saliency(sparsity, step=config.steps // 2, **where)
        case "iterative":
            rounds = 10
            if end < rounds:
                raise UsageError(
                    f"iterative prunes in {rounds} rounds, which do not fit into {end} of {config.steps} steps"
                )
            rate = 1 - (1 - sparsity) ** (1 / rounds)
            return sparsejax.iterative(rate=rate, rounds=rounds, every=max(end // rounds, 1), **where)
        case "cyclic":
            cycles = 3
            least = (2 * cycles - 1) * every  # the last cycle ends pruned
            if end < least:
                raise UsageError(
                    f"cyclic takes {cycles} cycles and at least {least} steps at update_every={every}, which do not "
                    f"fit into {end} of {config.steps} steps; choose a smaller update_every"
                )
            period = 2 * every * max(end // (2 * every * cycles), 1)
            return sparsejax.cyclic(sparsity, period=period, cycles=cycles, update_every=every, **where)
        case "ac_dc":
            return sparsejax.ac_dc(sparsity, begin=tenth, phase=tenth, end=end, **where)
        case "top_kast":  # trains 2.5 times as many weights as it uses
            backward = 1 - min(2.5 * (1 - sparsity), 1.0)
            return sparsejax.top_kast(sparsity, backward_sparsity=backward, **where)
        case "movement":
            return sparsejax.movement(sparsity, begin=tenth, end=end, learning_rate=config.learning_rate, **where)
        case "straight_through":
            return sparsejax.straight_through(sparsity, **where)
        case "nm":
            return sparsejax.nm(kept, of, step=config.steps // 2)
        case "sr_ste":
            return sparsejax.sr_ste(kept, of)
        case "mdgf":
            return sparsejax.mdgf(kept, of, begin=tenth, rate=1 / max(end - tenth, 1))
        case "sdgf":
            return sparsejax.sdgf(kept, of, begin=tenth, every=tenth)
    raise UsageError(f"no algorithm is called {name!r}; known are {', '.join(Name.__args__)}")


_FIXED = ("nm", "sr_ste", "mdgf", "sdgf")  # n of m says how much and what is kept together
_OWN_SHARES = (*BEFORE_TRAINING, "global_magnitude")  # one threshold over all layers


def ignored_options(config, default) -> list[str]:
    """What the algorithms of a configuration make nothing of, though it was asked for: a sentence for each.

    Args:
        config: the configuration.
        default: that of the experiment; what equals it was not asked for.

    Returns:
        Sentences to print.
    """
    fields = ("distribution", "sparsity", "structure")
    asked = [field for field in fields if getattr(config, field) != getattr(default, field)]
    kept, of = config.n_of_m
    notes = []
    for name in config.algorithms:
        if name in _FIXED:
            notes += [f"{name} keeps {kept} of {of} weights, by --n-of-m; --{field} is not used" for field in asked]
        elif name in _OWN_SHARES and "distribution" in asked:
            notes.append(f"{name} ranks the weights of all layers together; --distribution is not used")
    return notes


def find_masks(name: Name, config, params, apply, batches):
    """Masks found before training, on a few batches.

    Args:
        name: one of `BEFORE_TRAINING`.
        config: a configuration.
        params: the initial parameters.
        apply: `apply(params, inputs) -> logits`.
        batches: `[(inputs, targets)]`.

    Returns:
        A tree like `params` of bool masks, `optax.MaskedNode()` where dense.
    """
    options = {"rules": rules_of(config), "structure": structure_of(config)}
    if name == "synflow":
        example = jax.tree.map(lambda x: x[:1], batches[0][0])
        return sparsejax.synflow(apply, params, example, config.sparsity, **options)
    # GraSP's authors divide the logits by 200: without it the scores depend on how sure the untrained network is.
    method, temperature = {"snip": (sparsejax.snip, 1), "grasp": (sparsejax.grasp, 200)}[name]

    def loss(params, batch):
        inputs, targets = batch
        return mean_loss(apply(params, inputs) / temperature, targets)

    return method(loss, params, batches, config.sparsity, **options)
