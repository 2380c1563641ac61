"""Presets that train sparse from the start: fixed masks, and masks that drop and grow."""

import difflib
import inspect

import jax.numpy as jnp
import optax

from sparsejax.masks.distributions import erdos_renyi_kernel, global_
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology import scores
from sparsejax.topology.algorithm import Algorithm, UpdateSteps, check_density, check_drop_fraction, check_sparsity
from sparsejax.topology.magnitude import cubic_sparsity


def static(
    sparsity,
    *,
    distribution=erdos_renyi_kernel,
    structure=Unstructured(),
    score=scores.random,
    seed=0,
    masks=None,
) -> Algorithm:
    """Chooses masks once, before training, and never moves them: the baseline of every dynamic method.

    Args:
        sparsity: fraction of zeros, in [0, 1).
        distribution: the share of each layer.
        structure: what is kept together.
        score: what is kept; random by default (Liu et al. 2022, arXiv:2202.02643), `scores.magnitude` for the largest
            initial weights.
        seed: seed of random scores.
        masks: these masks instead.

    Returns:
        The algorithm, for `sparsify`.
    """
    return Algorithm(
        sparsity=sparsity, distribution=distribution, structure=structure, start=score, seed=seed, masks=masks
    )


def from_masks(masks) -> Algorithm:
    """Trains under given masks that never move, such as those of `snip` or of another run.

    Args:
        masks: tree like the parameters: bool where sparse; `None` or `optax.MaskedNode()` where dense.

    Returns:
        The algorithm, for `sparsify`.
    """
    return Algorithm(sparsity=0.0, masks=masks)


def dynamic(
    sparsity,
    *,
    drop=scores.magnitude,
    grow=scores.gradient,
    distribution=erdos_renyi_kernel,
    structure=Unstructured(),
    update_every=100,
    begin=None,
    stop=None,
    drop_fraction=0.3,
    start=scores.random,
    replaces_step=False,
    memory=None,
    seed=0,
    masks=None,
) -> Algorithm:
    """Builds a dynamic sparse training method from a score that drops and a score that grows.

    Masks move at steps `begin`, `begin + update_every`, ... before `stop`. Each time, in every layer, the
    `floor(drop_fraction * nnz)` active weights of lowest `drop` score are dropped and as many are grown by the highest
    `grow` score among all weights that were not kept. A weight dropped just now may be grown again at once; it then
    keeps its value and its moments. Any other grown weight starts at 0 with zero moments. The number of active weights
    of a layer never changes.

    Args:
        sparsity: fraction of zeros, in [0, 1), or a schedule of it.
        drop: score of what stays.
        grow: score of what comes back.
        distribution: the share of each layer.
        structure: what is kept together.
        update_every: steps between two moves.
        begin: first step that moves masks; `update_every` by default.
        stop: step from which masks stay; None moves them for ever.
        drop_fraction: share of the active weights that is swapped. A number is decayed to 0 at `stop` by half a cosine
            (arXiv:1911.11134, eq. 1), and stays constant without a `stop`; a schedule is taken as it is.
        start: score that chooses the first masks.
        replaces_step: the swap takes the place of the optimizer's step.
        memory: a tree kept beside, for scores that need one.
        seed: seed of the first masks and of random scores.
        masks: starting masks instead; their count in every layer is kept.

    Returns:
        The algorithm, for `sparsify`.

    Raises:
        ValueError: masks would never move because `stop` is not after `begin`, or `begin` is below 1.

    Example:
        >>> algorithm = dynamic(0.9, update_every=100, stop=1000)
        >>> [round(float(algorithm.drop_fraction(step)), 3) for step in (0, 500, 1000)]
        [0.3, 0.15, 0.0]
    """
    check_drop_fraction(drop_fraction)
    if begin is not None and begin < 1:
        raise ValueError(f"begin is {begin}; masks that start sparse move for the first time at step 1 or later")
    begin = update_every if begin is None else begin
    end = None
    if stop is not None:
        stop = int(stop)  # three quarters of the training may come as a float
        if stop <= begin:
            raise ValueError(
                f"masks would never move: they first move at step {begin} and stop at {stop}; "
                "choose a smaller update_every or a later stop"
            )
        end = begin + (stop - 1 - begin) // update_every * update_every
        if not callable(drop_fraction):
            drop_fraction = optax.cosine_decay_schedule(drop_fraction, stop)
    return Algorithm(
        sparsity=sparsity,
        steps=UpdateSteps(begin, update_every, end),
        distribution=distribution,
        structure=structure,
        start=start,
        drop=drop,
        grow=grow,
        drop_fraction=drop_fraction,
        replaces_step=replaces_step,
        memory=memory,
        seed=seed,
        masks=masks,
    )


def _check_options(preset: str, options) -> None:
    """Raises a `TypeError` in the name of a preset for keywords that `dynamic` does not take."""
    known = list(inspect.signature(dynamic).parameters)[1:]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{preset}() does not take {name}=; {hint}")


def set_(sparsity, **options) -> Algorithm:
    """Sparse evolutionary training: drop by magnitude, grow at random (Mocanu et al. 2018, arXiv:1707.04780).

    The optimizer's step is taken on update steps too. Smallest magnitudes are dropped without regard to sign.

    Args:
        sparsity: fraction of zeros, in [0, 1).
        **options: as in `dynamic`: `distribution`, `structure`, `update_every`, `begin`, `stop`, `drop_fraction`,
            `seed`, `masks`.

    Returns:
        The algorithm, for `sparsify`.
    """
    _check_options("set_", options)
    return dynamic(sparsity, **{"grow": scores.random, **options})


def rigl(
    sparsity,
    *,
    distribution=erdos_renyi_kernel,
    structure=Unstructured(),
    update_every=100,
    stop=None,
    drop_fraction=0.3,
    seed=0,
    masks=None,
    **options,
) -> Algorithm:
    """RigL: drop by magnitude, grow where the gradient is largest (Evci et al. 2020, arXiv:1911.11134, algorithm 1).

    On an update step the swap replaces the optimizer's step: no weight is trained. The optimizer is given zero
    gradients, so that learning-rate schedules keep in step with the loop; moments of grown weights are 0 afterwards.
    The paper stops at three quarters of training.

    Args:
        sparsity: fraction of zeros, in [0, 1).
        distribution: the share of each layer.
        structure: what is kept together.
        update_every: steps between two moves.
        stop: step from which masks stay; None moves them for ever.
        drop_fraction: share of the active weights that is swapped, decayed to 0 at `stop` by half a cosine.
        seed: seed of the first masks.
        masks: starting masks instead.
        **options: as in `dynamic`.

    Returns:
        The algorithm, for `sparsify`.

    Example:
        >>> rigl(0.9, stop=75_000).steps
        UpdateSteps(begin=100, every=100, end=74900)
    """
    _check_options("rigl", options)
    return dynamic(
        sparsity,
        distribution=distribution,
        structure=structure,
        update_every=update_every,
        stop=stop,
        drop_fraction=drop_fraction,
        seed=seed,
        masks=masks,
        **{"replaces_step": True, **options},
    )


def granet(
    sparsity,
    *,
    end,
    stop=None,
    begin=0,
    initial=0.0,
    update_every=100,
    drop_fraction=0.5,
    distribution=global_,
    structure=Unstructured(),
    seed=0,
) -> Algorithm:
    """GraNet: gradual global pruning, each pruning followed by a RigL swap (Liu et al. 2021, arXiv:2106.10404).

    Pruning follows the cubic schedule from `initial` at `begin` to `sparsity` at `end`, or at the first update after
    it; swaps go on until `stop`, itself an update. The optimizer's step is taken on update steps too. `initial=0`
    starts dense (dense-to-sparse); a larger one starts from random Erdős–Rényi-kernel masks (sparse-to-sparse; the
    paper takes 0.5), which move for the first time at step `update_every` if `begin` is 0.

    Args:
        sparsity: the final fraction of zeros.
        end: step at which pruning reaches it.
        stop: last step that swaps, usually the end of training; `end` by default.
        begin: first step that prunes.
        initial: sparsity at the start.
        update_every: steps between two updates.
        drop_fraction: share swapped after each pruning, decayed by a cosine to a hundredth of it at `stop`.
        distribution: the share of each layer when pruning.
        structure: what is kept together.
        seed: seed of the first masks.

    Returns:
        The algorithm, for `sparsify`.
    """
    check_drop_fraction(drop_fraction)
    check_density(sparsity, structure)
    stop = end if stop is None else stop
    if stop < end:
        raise ValueError(f"stop={stop} is before end={end}, where pruning reaches the target")
    return Algorithm(
        sparsity=cubic_sparsity(sparsity, begin=begin, end=end, initial=initial),
        steps=UpdateSteps(min(update_every, stop) if initial and not begin else begin, update_every, stop),
        distribution=distribution,
        structure=structure,
        start=scores.random if initial else None,
        start_distribution=erdos_renyi_kernel,
        grow=scores.gradient,
        drop_fraction=optax.cosine_decay_schedule(drop_fraction, stop, alpha=0.01),
        seed=seed,
    )


def ac_dc(
    sparsity, *, begin, phase, end, distribution=global_, structure=Unstructured(), score=scores.magnitude
) -> Algorithm:
    """AC/DC: alternating compressed and decompressed phases (Peste et al. 2021, arXiv:2106.12379).

    Dense until `begin`; then masks are chosen by magnitude and kept for `phase` steps, then all weights return as
    zeros, with all moments of the optimizer reset, for `phase` steps, and so on; compressed for good from `end` on.

    Args:
        sparsity: fraction of zeros in compressed phases, counted in parts per million.
        begin: step of the first compression.
        phase: steps of a phase.
        end: step of the last compression.
        distribution: the share of each layer.
        structure: what is kept together.
        score: what stays.

    Returns:
        The algorithm, for `sparsify`.

    Example:
        >>> algorithm = ac_dc(0.9, begin=10, phase=10, end=45)
        >>> [round(float(algorithm.sparsity(step)), 1) for step in (0, 10, 20, 30, 40, 45)]
        [0.0, 0.9, 0.0, 0.9, 0.0, 0.9]
    """

    check_sparsity(sparsity)
    check_density(sparsity, structure)
    if phase < 1:
        raise ValueError(f"phase is {phase}; a phase takes 1 or more steps")

    def at(step):
        compressed = (step >= end) | ((step >= begin) & ((step - begin) // phase % 2 == 0))
        return jnp.where(compressed, sparsity, 0.0)

    return Algorithm(
        sparsity=at,
        steps=UpdateSteps(begin, phase, end),
        distribution=distribution,
        structure=structure,
        drop=score,
        grow=scores.gradient,
        reset_all=True,
    )
