"""Presets that keep dense weights under the mask: straight-through, N:M training, soft masks, Top-KAST."""

import dataclasses

import jax.numpy as jnp
import optax

from sparsejax.masks.counts import exact_fraction
from sparsejax.masks.distributions import uniform
from sparsejax.masks.nm import NM
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology import scores
from sparsejax.topology.algorithm import Algorithm, UpdateSteps
from sparsejax.topology.magnitude import magnitude
from sparsejax.transforms.penalties import sr_ste_decay
from sparsejax.transforms.tree import map_sparse


def nm(n, m, *, step=0, share=1, score=scores.magnitude) -> Algorithm:
    """Prunes once to N:M by magnitude: the n largest of every m consecutive inputs stay (ASP, arXiv:2104.08378).

    Args:
        n: kept in each group.
        m: size of a group along the inputs.
        step: the update at which weights are pruned.
        share: number of consecutive outputs that have one pattern in common.
        score: what stays.

    Returns:
        The algorithm, for `sparsify`.
    """
    return magnitude(1 - n / m, step=step, structure=NM(n, m, share=share), score=score)


def straight_through(
    sparsity,
    *,
    structure=Unstructured(),
    distribution=uniform,
    update_every=1,
    gradient=None,
    score=scores.magnitude,
    seed=0,
) -> Algorithm:
    """Straight-through magnitude masks: dense weights learn from the gradient of the masked network.

    The forward pass sees w * m with m the largest magnitudes of the dense weights w, which the optimizer's state holds;
    the gradient with respect to w * m updates all of w, as if the mask were not there. Masks are chosen anew after
    every `update_every`-th step, among all weights; moments are never reset.

    Args:
        sparsity: fraction of zeros, or a schedule.
        structure: what is kept together.
        distribution: the share of each layer.
        update_every: steps between two choices.
        gradient: an optax element that changes the gradient first, such as `sr_ste_decay`.
        score: what is kept.
        seed: seed of random scores.

    Returns:
        The algorithm, for `sparsify`.
    """
    return Algorithm(
        sparsity=sparsity,
        steps=UpdateSteps(update_every, update_every, None),
        structure=structure,
        distribution=distribution,
        drop=score,
        reselect=True,
        latent=True,
        gradient=optax.identity() if gradient is None else gradient,
        seed=seed,
    )


def sr_ste(n, m, *, decay=2e-4, share=1, update_every=1) -> Algorithm:
    """SR-STE: straight-through N:M with a decay on pruned weights (Zhou et al. 2021, arXiv:2102.04010, eq. 9).

    The dense weights get the gradient g + decay * (1 - m) * w, before momentum.

    Args:
        n: kept in each group.
        m: size of a group along the inputs.
        decay: strength of the decay; 0 is the plain straight-through estimator.
        share: number of consecutive outputs that have one pattern in common.
        update_every: steps between two choices of masks.

    Returns:
        The algorithm, for `sparsify`.
    """
    return straight_through(
        1 - n / m, structure=NM(n, m, share=share), update_every=update_every, gradient=sr_ste_decay(decay)
    )


def fade(*, begin, rate, exponential=False, end=None):
    """The factor with which pruned weights still show: 1 until `begin`, then falling to 0.

    Args:
        begin: step at which the decay starts.
        rate: linear, max(0, 1 - rate * t), or exponential, exp(-rate * t), in t steps since `begin`.
        exponential: which of the two.
        end: step from which the factor is exactly 0; the linear form gets there by itself.

    Returns:
        A function of the step.

    Example:
        >>> [round(float(fade(begin=0, rate=2e-4)(step)), 2) for step in (0, 1000, 2500, 5000)]
        [1.0, 0.8, 0.5, 0.0]
    """
    if not rate > 0:
        raise ValueError(f"rate is {rate}; pruned weights fade at a rate above 0")
    if exponential and end is None:
        raise ValueError("an exponential decay never reaches 0; give the step from which masks are exact, end=...")

    def factor(step):
        elapsed = jnp.maximum(step - begin, 0).astype(jnp.float32)
        value = jnp.exp(-rate * elapsed) if exponential else jnp.maximum(1 - rate * elapsed, 0)
        return value if end is None else jnp.where(step >= end, 0.0, value)

    return factor


def mdgf(
    n, m, *, begin=0, rate=2e-4, exponential=False, end=None, straight_through_gradient=False, share=1
) -> Algorithm:
    """MDGF: N:M masks whose pruned weights fade out instead of being cut (Bambhaniya et al. 2024, arXiv:2402.04744).

    The network sees w * (m + (1 - m) D) with D from `fade`; the masks are the N:M largest magnitudes after every step.
    Gradients are those of that product; the authors' code passes them on unscaled, `straight_through_gradient=True`.
    Once D is 0 the parameters are exactly N:M.

    Args:
        n: kept in each group.
        m: size of a group along the inputs.
        begin: step at which the fading starts; dense until then.
        rate: speed of the fading, see `fade`.
        exponential: exponential instead of linear fading.
        end: step from which D is exactly 0; needed for exponential fading.
        straight_through_gradient: pass gradients to pruned weights unscaled.
        share: number of consecutive outputs that have one pattern in common.

    Returns:
        The algorithm, for `sparsify`.
    """
    gradient = None if straight_through_gradient else _fading_gradient()
    built = straight_through(1 - n / m, structure=NM(n, m, share=share), gradient=gradient)
    return dataclasses.replace(built, softness=fade(begin=begin, rate=rate, exponential=exponential, end=end))


def sdgf(n, m, *, begin=0, every, geometric=False, share=1) -> Algorithm:
    """SDGF: straight-through N:M reached in stages (Bambhaniya et al. 2024, arXiv:2402.04744).

    Stepwise stages keep m - 1, m/2, m/4, ..., n of m; geometric ones keep 8n of 8m, 4n of 4m, 2n of 2m, n of m, so that
    the density is right from the start and the choice narrows. Dense before `begin`.

    Args:
        n: kept in each group in the end.
        m: size of a group along the inputs in the end; for stepwise stages m / n must be a power of two.
        begin: step of the first stage.
        every: steps of a stage.
        geometric: geometric instead of stepwise stages.
        share: number of consecutive outputs that have one pattern in common.

    Returns:
        The algorithm, for `sparsify`.

    Raises:
        ValueError: m / n is not a power of two for stepwise stages.

    Example:
        >>> algorithm = sdgf(1, 16, every=100)
        >>> [round(float(16 * (1 - algorithm.sparsity(step)))) for step in (0, 100, 200, 300, 400)]
        [15, 8, 4, 2, 1]
    """
    if every < 1:
        raise ValueError(f"every is {every}; a stage takes 1 or more steps")
    if geometric:
        widths = (8, 4, 2, 1)
        stages = tuple((begin + index * every, NM(w * n, w * m, share=share)) for index, w in enumerate(widths))
        final = jnp.float32(1 - n / m)
        built = straight_through(lambda step: jnp.where(step < begin, 0.0, final), structure=NM(n, m, share=share))
        return dataclasses.replace(built, stages=stages)
    ratio = m // n
    if ratio * n != m or ratio & (ratio - 1) or ratio < 2:
        raise ValueError(f"{n}:{m} has no stepwise stages: m / n must be a power of two, 2 or more")
    kept = [m - 1] if m - 1 > n else []
    kept += [m >> shift for shift in range(1, ratio.bit_length()) if m >> shift < m - 1 or m == 2]

    def sparsity(step):
        stage = jnp.clip((step - begin) // every, 0, len(kept) - 1)
        return jnp.where(step < begin, 0.0, 1 - jnp.array(kept, jnp.float32)[stage] / m)

    return straight_through(sparsity, structure=NM(n, m, share=share))


def top_kast(
    sparsity,
    *,
    backward_sparsity,
    distribution=uniform,
    structure=Unstructured(),
    update_every=1,
    regularization=1e-4,
) -> Algorithm:
    """Top-KAST: a sparse forward set A inside a larger trained set B (Jayakumar et al. 2021, arXiv:2106.03517).

    A and B are the largest magnitudes of the dense weights. The network sees w on A; weights on B are trained with the
    gradient of the masked network plus the exploration penalty, regularization * (w_A + w_{B without A} / D) with D the
    density of A (section 2.3); outside B weights do not change.

    Args:
        sparsity: fraction of zeros in the forward pass.
        backward_sparsity: fraction of weights that are not trained; at most `sparsity`.
        distribution: the share of each layer.
        structure: what is kept together.
        update_every: steps between two choices of A and B.
        regularization: strength of the penalty.

    Returns:
        The algorithm, for `sparsify`.

    Raises:
        ValueError: fewer weights would be trained than are seen.
    """
    for value in (sparsity, backward_sparsity):
        exact_fraction(value)
    if backward_sparsity > sparsity:
        raise ValueError(
            f"backward_sparsity={backward_sparsity} exceeds sparsity={sparsity}; what is seen must be trained"
        )
    density = 1 - sparsity

    def explore(g, state, params=None, *, masks, trainable, **_):
        def penalised(b, g, w, a):
            return jnp.where(b, g + regularization * jnp.where(a, w, w / density), jnp.zeros_like(g))

        return map_sparse(penalised, trainable, g, params, masks), state

    built = straight_through(
        sparsity,
        structure=structure,
        distribution=distribution,
        update_every=update_every,
        gradient=optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), explore),
    )
    return dataclasses.replace(built, backward_sparsity=backward_sparsity)


def _fading_gradient() -> optax.GradientTransformationExtraArgs:
    def scale(g, state, params=None, *, masks, softness, **_):
        return map_sparse(lambda m, g: jnp.where(m, g, softness.astype(g.dtype) * g), masks, g), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale)
