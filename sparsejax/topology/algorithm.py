"""What an algorithm is: the pieces that say how masks start, when and how they move, and what pruned weights feel."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.masks.counts import exact_fraction
from sparsejax.masks.distributions import uniform
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology import scores


@dataclasses.dataclass(frozen=True)
class UpdateSteps:
    """The steps at which masks may move: begin, begin + every, ..., and end itself.

    A step is one call of the optimizer's update, the first being step 0. Under `optax.MultiSteps` a step is one
    real update, not a micro-batch.

    Args:
        begin: first step.
        every: distance between steps.
        end: last step, always one of them; None goes on for ever.

    Example:
        >>> steps = UpdateSteps(begin=10, every=20, end=45)
        >>> [step for step in range(60) if steps.due(step)]
        [10, 30, 45]
    """

    begin: int
    every: int
    end: int | None

    def __post_init__(self):
        for name in ("begin", "every", "end"):
            step = getattr(self, name)
            if isinstance(step, float):
                if not step.is_integer():
                    raise ValueError(f"{name} is {step}; steps are whole numbers, write int(...)")
                object.__setattr__(self, name, int(step))
        if self.every < 1:
            raise ValueError(f"update_every is {self.every}; masks move every 1 or more steps")
        if self.begin < 0:
            raise ValueError(f"begin is {self.begin}; steps count from 0")
        if self.end is not None and self.end < self.begin:
            raise ValueError(f"masks would never move: the last step {self.end} is before the first, {self.begin}")

    def due(self, step):
        """Whether masks move at `step`: a bool for an int, a traced bool for a traced step."""
        regular = (step >= self.begin) & ((step - self.begin) % self.every == 0)
        return regular if self.end is None else (regular & (step < self.end)) | (step == self.end)


def check_sparsity(sparsity) -> None:
    """Raises for a number outside [0, 1) or no number at all; schedules and arrays are clipped when they are read."""
    if not callable(sparsity) and not isinstance(sparsity, jax.Array):
        exact_fraction(sparsity)


def check_drop_fraction(share) -> None:
    """Raises `ValueError` for a number outside [0, 1]; schedules and arrays are clipped when they are read."""
    if isinstance(share, numbers.Real) and not 0 <= share <= 1:
        raise ValueError(f"drop_fraction is {share}; it is a share in [0, 1] of the active weights")


def check_density(sparsity, structure) -> None:
    """Raises `ValueError` for a number that contradicts a structure which fixes the sparsity."""
    own = structure.fixed_density
    if own is None or callable(sparsity) or isinstance(sparsity, jax.Array):
        return
    if abs(1 - exact_fraction(sparsity) - own) > 1e-6:
        raise ValueError(
            f"sparsity {sparsity} contradicts {structure}, whose sparsity is {float(1 - own):.6g}; give that one"
        )


NEVER = UpdateSteps(begin=2**31 - 1, every=1, end=2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Memory:
    """A tree that an algorithm keeps beside masks and weights, such as learned scores or averaged gradients.

    Args:
        init: `init(params) -> tree`.
        update: `update(tree, params, grads, masks, step) -> tree`, called at every step; `params` are the weights
            before the step, `grads` the gradients with respect to the masked weights.
    """

    init: Callable
    update: Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The pieces of a sparse training method. Presets such as `rigl` fill it in; `dataclasses.replace` changes a piece.

    At an update step masks move in two stages. First every layer is pruned to its count at that step: the units with
    the highest `drop` score among the active ones stay (among all units if `reselect`). Then, if there is a `grow`
    score, the lowest `drop_fraction` of what is active is dropped and as many units are grown by the highest `grow`
    score among all that are not kept, so that a unit just dropped may return at once and then keeps its weight and
    moments. Where the count rises, the missing units are grown too. An algorithm that grows at a constant sparsity
    keeps the count that each layer started with.

    Args:
        sparsity: fraction of zeros: a number in [0, 1), counted exactly as written, or a function of the step (an
            optax schedule) whose values are rounded to parts per million.
        steps: when masks move.
        structure: what is kept together.
        distribution: how the sparsity is shared out over layers.
        start_distribution: how that of the first masks is; None takes `distribution`.
        start: the score that chooses the first masks at `sparsity` (of step 0); None starts dense.
        drop: the score of what stays.
        grow: the score of what comes back; None only prunes.
        drop_fraction: a number or a schedule: the share of active units swapped at an update.
        reselect: choose among all units, not only among active ones.
        replaces_step: at update steps the swap takes the place of the optimizer's step, as in RigL.
        reset_all: zero all moments of all leaves whenever weights grow, not only theirs.
        gradient: an optax transformation in front of the inner optimizer that says what pruned weights feel; it gets
            `masks=` (and `trainable=` where there are backward masks). None passes kept weights' gradients only.
        latent: keep dense weights under the mask; the user's parameters are then the view of them.
        backward_sparsity: Top-KAST's larger trainable set, only with `latent`; None trains as `gradient` says.
        softness: schedule of the factor by which pruned weights still show in the view (1 dense, 0 masked), only with
            `latent`.
        stages: `((step, structure), ...)`: structures that replace `structure` from a step on, only with `latent`.
        memory: a tree kept beside; scores get it as `data`.
        seed: seed of all random scores; an int or a traced integer.
        masks: starting masks instead of `start`.
    """

    sparsity: Any
    steps: UpdateSteps = NEVER
    structure: Any = Unstructured()
    distribution: Callable = uniform
    start_distribution: Callable | None = None
    start: Callable | None = None
    drop: Callable = scores.magnitude
    grow: Callable | None = None
    drop_fraction: Any = 0.0
    reselect: bool = False
    replaces_step: bool = False
    reset_all: bool = False
    gradient: optax.GradientTransformation | None = None
    latent: bool = False
    backward_sparsity: float | None = None
    softness: Callable | None = None
    stages: tuple = ()
    memory: Memory | None = None
    seed: Any = 0
    masks: Any = None

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_drop_fraction(self.drop_fraction)
        if not callable(self.distribution):
            raise TypeError(f"distribution is {self.distribution!r}; give a function such as sparsejax.uniform")
        if not hasattr(self.structure, "fixed_density"):
            raise TypeError(f"structure is {self.structure!r}; give one such as sparsejax.Unstructured() or NM(2, 4)")
        if not isinstance(self.seed, (numbers.Integral, jax.Array)):
            raise TypeError(f"seed is {self.seed!r}; it is a whole number")
        if self.backward_sparsity is not None:
            check_sparsity(self.backward_sparsity)
        for name in ("backward_sparsity", "softness", "stages"):
            if getattr(self, name) not in (None, ()) and not self.latent:
                raise ValueError(f"{name} needs dense weights under the mask: latent=True")

    @property
    def moving(self) -> bool:
        """Whether the sparsity may differ from step to step (a schedule, or a value injected as an array)."""
        return callable(self.sparsity) or isinstance(self.sparsity, jax.Array)

    def sparsity_at(self, step):
        """The sparsity at a step; a Python number stays one."""
        return jnp.asarray(self.sparsity(step)) if callable(self.sparsity) else self.sparsity

    @property
    def final_sparsity(self):
        """The sparsity from the last update on; that of a schedule without an end is read far out."""
        return self.sparsity_at(np.int32(2**30 if self.steps.end is None else self.steps.end))

    def drop_fraction_at(self, step):
        """The share of active units that is swapped at a step."""
        return self.drop_fraction(step) if callable(self.drop_fraction) else self.drop_fraction
