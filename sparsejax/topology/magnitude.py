"""Presets that prune a dense network: once, gradually, in rounds or in cycles."""

import numbers

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks.counts import exact_fraction
from sparsejax.masks.distributions import global_, uniform
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology import scores
from sparsejax.topology.algorithm import Algorithm, UpdateSteps, check_density


def magnitude(
    sparsity, *, step=0, distribution=uniform, structure=Unstructured(), score=scores.magnitude, seed=0
) -> Algorithm:
    """Prunes once, by magnitude, at a step; the weights that stay go on training.

    Pruned weights are zeroed and never return. The scores are taken from the parameters as they enter the step.

    Args:
        sparsity: fraction of zeros, in [0, 1).
        step: the update at which weights are pruned; 0 is the first.
        distribution: the share of each layer; `global_` for one threshold over all layers.
        structure: what is pruned together.
        score: what stays; `scores.random` and `scores.saliency` are other choices.
        seed: seed of random scores.

    Returns:
        The algorithm, for `sparsify`.

    Example:
        >>> magnitude(0.9, step=1000).steps
        UpdateSteps(begin=1000, every=1, end=1000)
    """
    return Algorithm(
        sparsity=sparsity,
        steps=UpdateSteps(step, 1, step),
        distribution=distribution,
        structure=structure,
        drop=score,
        seed=seed,
    )


def global_magnitude(sparsity, *, step=0, structure=Unstructured()) -> Algorithm:
    """Prunes once by magnitude with one threshold over all sparse layers; else as `magnitude`."""
    return magnitude(sparsity, step=step, distribution=global_, structure=structure)


def random(sparsity, *, step=0, distribution=uniform, structure=Unstructured(), seed=0) -> Algorithm:
    """Prunes once at random, the baseline of every score; else as `magnitude`."""
    return magnitude(
        sparsity, step=step, distribution=distribution, structure=structure, score=scores.random, seed=seed
    )


def saliency(sparsity, *, step=0, distribution=uniform, structure=Unstructured()) -> Algorithm:
    """Prunes once by |w dL/dw| on the step's own batch (Molchanov et al. 2016, arXiv:1611.06440); as `magnitude`."""
    return magnitude(sparsity, step=step, distribution=distribution, structure=structure, score=scores.saliency)


def cubic_sparsity(final, *, begin, end, initial=0.0):
    """The sparsity of gradual pruning, s_f + (s_i - s_f)(1 - (t - t_0)/(t_1 - t_0))^3 (arXiv:1710.01878, eq. 1).

    Args:
        final: sparsity from `end` on.
        begin: step up to which it is `initial`.
        end: step at which it reaches `final`.
        initial: sparsity at the start.

    Returns:
        An optax schedule.

    Raises:
        ValueError: a sparsity is outside [0, 1), `initial` is above `final`, or `end` is before `begin`.

    Example:
        >>> schedule = cubic_sparsity(0.9, begin=0, end=100)
        >>> [round(float(schedule(step)), 4) for step in (0, 10, 50, 100)]
        [0.0, 0.2439, 0.7875, 0.9]
    """
    for sparsity in (final, initial):
        if not isinstance(sparsity, jax.Array):  # no schedule either: this is one
            exact_fraction(sparsity)
    if not isinstance(final, jax.Array) and not isinstance(initial, jax.Array) and initial > final:
        raise ValueError(f"initial sparsity {initial} is above the final one, {final}: this schedule only prunes")
    if end < begin:
        raise ValueError(f"masks would never move: end={end} is before begin={begin}")
    if end == begin:
        return lambda step: jnp.where(step >= end, final, initial)
    return optax.polynomial_schedule(initial, final, power=3, transition_steps=end - begin, transition_begin=begin)


def gradual(
    sparsity,
    *,
    begin,
    end,
    update_every=100,
    initial=0.0,
    distribution=uniform,
    structure=Unstructured(),
    score=scores.magnitude,
    seed=0,
) -> Algorithm:
    """Gradual magnitude pruning on the cubic schedule (Zhu & Gupta 2017, arXiv:1710.01878).

    Masks move at `begin`, every `update_every` steps after it, and at `end`, where the target is reached, counted in
    parts per million. Masks are nested: a pruned weight is zero, its moments are zeroed, and it never returns. Weights
    that are stored in blocks begin with room for `initial`; memory follows the density where `sparsejax.repack` is
    called now and then.

    Args:
        sparsity: the final fraction of zeros, in [0, 1).
        begin: first step that prunes.
        end: last step that prunes.
        update_every: steps between two prunings.
        initial: sparsity at `begin`.
        distribution: the share of each layer; `global_` for one threshold over all layers.
        structure: what is pruned together.
        score: what stays.
        seed: seed of random scores.

    Returns:
        The algorithm, for `sparsify`.

    Example:
        >>> algorithm = gradual(0.9, begin=0, end=100, update_every=30)
        >>> [step for step in range(120) if algorithm.steps.due(step)]
        [0, 30, 60, 90, 100]
    """
    check_density(sparsity, structure)
    return Algorithm(
        sparsity=cubic_sparsity(sparsity, begin=begin, end=end, initial=initial),
        steps=UpdateSteps(begin, update_every, end),
        distribution=distribution,
        structure=structure,
        drop=score,
        seed=seed,
    )


def iterative(
    *, rate=0.2, rounds, every, begin=0, distribution=global_, structure=Unstructured(), score=scores.magnitude
) -> Algorithm:
    """Prunes a share of what remains, again and again: density (1 - rate)^r after round r (as arXiv:1803.03635).

    The weights keep training between rounds. For lottery tickets, which rewind the weights, see `lottery_ticket`.

    Args:
        rate: share of the remaining weights that a round prunes.
        rounds: number of rounds.
        every: steps between two rounds.
        begin: step of the first round.
        distribution: the share of each layer.
        structure: what is pruned together.
        score: what stays.

    Returns:
        The algorithm, for `sparsify`.

    Example:
        >>> algorithm = iterative(rate=0.2, rounds=3, every=100)
        >>> [round(float(algorithm.sparsity(step)), 4) for step in (0, 100, 200, 900)]
        [0.2, 0.36, 0.488, 0.488]
    """
    if not isinstance(rounds, numbers.Integral):
        raise TypeError(f"rounds is {rounds!r}; give a whole number")
    if not 0 < rate < 1 or rounds < 1:
        raise ValueError(f"rate is {rate} and rounds {rounds}; a round prunes a share in (0, 1), one or more times")

    def sparsity(step):
        done = jnp.clip((step - begin) // every + 1, 0, rounds)
        return 1.0 - (1.0 - rate) ** done

    return Algorithm(
        sparsity=sparsity,
        steps=UpdateSteps(begin, every, begin + (rounds - 1) * every),
        distribution=distribution,
        structure=structure,
        drop=score,
    )


def cyclic(
    sparsity, *, period, cycles, begin=0, update_every=100, distribution=uniform, structure=Unstructured()
) -> Algorithm:
    """Gradual pruning in cycles, so that wrongly pruned weights recover (Srinivas et al. 2022, arXiv:2202.01290).

    A cycle starts dense: all weights return as zeros with zero moments; it then prunes by magnitude on the cubic
    schedule and reaches `sparsity` half-way through; the rest of the cycle trains at that sparsity, and so does
    everything after the last.

    Args:
        sparsity: fraction of zeros at the end of each cycle.
        period: steps of one cycle.
        cycles: number of cycles.
        begin: step at which the first starts.
        update_every: steps between two prunings; must divide half a period.
        distribution: the share of each layer.
        structure: what is pruned together.

    Returns:
        The algorithm, for `sparsify`.
    """
    half = period // 2
    if cycles < 1 or update_every < 1 or period < 2:
        raise ValueError(f"cycles is {cycles}, period {period} and update_every {update_every}; none can be so few")
    if period % 2 or half % update_every:
        raise ValueError(f"update_every={update_every} does not divide half a period of {period} steps")
    check_density(sparsity, structure)
    climb = cubic_sparsity(sparsity, begin=0, end=half)

    def at(step):
        elapsed = jnp.maximum(step - begin, 0)
        return jnp.where(elapsed >= period * cycles, sparsity, climb(elapsed % period))

    return Algorithm(
        sparsity=at,
        steps=UpdateSteps(begin, update_every, begin + period * (cycles - 1) + half),
        distribution=distribution,
        structure=structure,
        grow=scores.gradient,
    )
