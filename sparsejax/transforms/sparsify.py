"""`sparsify`: any optax optimizer trains a sparse network, by one wrapper around it."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks.block import Block
from sparsejax.masks.budget import count_units
from sparsejax.masks.layout import match_sharding
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.masks.sequence import after, run_if
from sparsejax.topology.algorithm import NEVER, Algorithm
from sparsejax.topology.engine import move_masks, plan_leaves, start_masks
from sparsejax.topology.stored import arrange, check_stored, needs_probe, probe_signal, stored_leaves, stored_updates
from sparsejax.transforms.latent import init_latent, update_latent
from sparsejax.transforms.tree import (
    check_trees,
    count_leaks,
    count_nnz,
    has_stored,
    keep_moments,
    map_sparse,
    values_of,
)


class SparsifyState(NamedTuple):
    """The state of `sparsify`. Read it with `masks_of`, `summary` and `check`.

    Attributes:
        mask_step: number of updates so far, int32.
        masks: tree like the parameters: bool where sparse, `optax.MaskedNode()` where dense.
        inner_state: the state of the wrapped optimizer.
        latent: the dense weights under the mask of latent algorithms, else None.
        data: the algorithm's memory, backward masks and softness, where it has them.
        leaks: number of non-zero or non-finite weights found off the mask, counted whenever masks move, int32.
        targets: kept elements of each sparse leaf since masks last moved, int32, in the order of the tree.
    """

    mask_step: jax.Array
    masks: Any
    inner_state: Any
    latent: Any
    data: dict
    leaks: jax.Array
    targets: jax.Array


def sparsify(
    inner: optax.GradientTransformation, algorithm: Algorithm, *, rules=None
) -> optax.GradientTransformationExtraArgs:
    r"""Makes an optimizer train a sparse network; nothing else in the training loop changes.

    The wrapper sees raw gradients, moves the masks when the algorithm says so, hands the gradients that the algorithm
    lets through to `inner`, and returns updates for which :math:`p + u` is exactly masked:

    .. math:: u_i = \begin{cases} u^{inner}_i & m_i = 1 \\ -p_i & m_i = 0 \end{cases}

    so that a pruned weight ends as exactly 0, whatever the optimizer, its weight decay or its momentum, and an update
    never has a dtype narrower than its parameter. Nothing that changes values may stand outside of `sparsify`: put
    clipping, weight decay and scaling inside, `sparsify(optax.chain(clip, adamw), algorithm)`. Wrappers that gate whole
    steps may stand outside: `optax.MultiSteps`, `apply_if_finite`, `partition`, `inject_hyperparams`.

    Elements of `inner` get the masks as `masks=` among the extra arguments. Moments of pruned weights are 0, so that a
    weight that grows starts from 0 with zero moments. Masks move before the step that they move at: a weight grown at a
    step already takes that step (a block takes its first one at the next), unless the algorithm replaces the step; then
    `inner` gets zero gradients, so that its counters and schedules keep in step with the loop, and no weight moves. For
    algorithms that start sparse, the parameters are dense until the first update has been applied; call `mask_params`
    before training to start exactly sparse.

    Parameters may be stored (`BlockSparse`, see `to_sparse`): then `inner` sees the blocks that are kept, masks are
    those of the grid of blocks, what is stored is what training starts with, and updates move indices too. Take
    gradients with `sparsejax.value_and_grad`.

    Args:
        inner: the optimizer.
        algorithm: what `rigl(...)`, `gradual(...)`, `static(...)` and the like return.
        rules: which leaves, in which structure, how much: a mapping from globs over names such as `blocks/0/kernel` to
            `None` (dense), a sparsity, a structure, `Roles` or a `Rule`; later ones win. None takes the defaults for
            Flax names; use `equinox_rules` for weights laid out out x in.

    Returns:
        An optax transformation. Its `update` needs `params`.

    Raises:
        ValueError: at `init` or `update`, naming the leaf, where rules, structures or trees do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, optax, sparsejax
        >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jnp.zeros(8)}}
        >>> optimizer = sparsejax.sparsify(optax.adam(1e-2), sparsejax.magnitude(0.75))
        >>> state = optimizer.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = optimizer.update(grads, state, params)
        >>> int(jnp.count_nonzero(optax.apply_updates(params, updates)["dense"]["kernel"]))
        16
    """
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"sparsify needs an algorithm such as sparsejax.rigl(0.9), not {algorithm!r}")
    if not isinstance(inner, optax.GradientTransformation):
        wrapped = ": call its gradient_transformation()" if hasattr(inner, "gradient_transformation") else ""
        raise TypeError(f"sparsify wraps an optax optimizer such as optax.adam(1e-3), not {inner!r}{wrapped}")
    inner = _with_extra_args(inner)
    if algorithm.gradient is not None:
        inner = optax.chain(algorithm.gradient, inner)
    moves = algorithm.steps != NEVER

    def init(params):
        plan = plan_leaves(params, algorithm, rules)
        if moves:  # what does not fit is known now, not only when masks first move
            jax.eval_shape(lambda: count_units(plan, algorithm.distribution, algorithm.sparsity_at(0)).layers)
        check_stored(algorithm, plan, params)
        if algorithm.latent:
            masks, latent, data = init_latent(algorithm, rules, plan, params)
        else:
            data = {} if algorithm.memory is None else {"memory": algorithm.memory.init(params)}
            masks, latent = start_masks(algorithm, plan, params, data.get("memory")), None
        inner_state = inner.init(values_of(params))
        if moves and not algorithm.latent and not _abstract(params):
            stored = stored_leaves(params, plan)
            inner_state = keep_moments(inner, inner_state, _live(masks, stored, arrange(stored, masks, False)))
        return SparsifyState(
            mask_step=jnp.zeros([], jnp.int32),
            masks=masks,
            inner_state=inner_state,
            latent=latent,
            data=data,
            leaks=jnp.zeros([], jnp.int32),
            targets=count_nnz(masks, params),
        )

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("sparsify needs the current parameters: call update(updates, state, params)")
        check_trees(updates, state.masks, params)
        plan = plan_leaves(params, algorithm, rules)
        if algorithm.latent:
            updates, masks, inner_state, latent, data, leaks = update_latent(
                algorithm, rules, plan, inner, updates, state, params, extra
            )
            targets = count_nnz(masks, params)
        else:
            latent, data = None, dict(state.data)
            if algorithm.memory is not None:
                data["memory"] = algorithm.memory.update(data["memory"], params, updates, state.masks, state.mask_step)
            masks, leaks, targets, due, grew = state.masks, jnp.zeros([], jnp.int32), state.targets, False, None
            if moves:
                due = algorithm.steps.due(state.mask_step)
                masks, leaks, targets, grew = _move(algorithm, plan, params, updates, state, data.get("memory"), due)
            stored = stored_leaves(params, plan)
            moved = arrange(stored, masks, due)
            leaks = leaks + sum(move.lost for move in moved.values())
            seen = _live(masks, stored, moved)
            waiting = _wait(algorithm, plan, seen, state.masks, moved) if moves else seen
            grads, values = values_of(updates), values_of(params)
            updates, inner_state = _step(
                algorithm, inner, grads, state.inner_state, values, seen, waiting, due, grew, extra
            )
            if has_stored(params):
                updates = stored_updates(params, updates, moved, probe_signal(algorithm, state.mask_step + 1))
        return updates, SparsifyState(
            mask_step=optax.safe_increment(state.mask_step),
            masks=masks,
            inner_state=inner_state,
            latent=latent,
            data=data,
            leaks=state.leaks + leaks,
            targets=targets,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _with_extra_args(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.with_extra_args_support` that also keeps arguments from those who say they take any and do not.

    Line searches pass on what they do not know to the user's loss; inside a chain nothing but the attempt tells.
    """
    inner = optax.with_extra_args_support(inner)
    parameters = inspect.signature(inner.update).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def update(updates, state, params=None, **extra):
        if not takes_any:
            extra = {name: extra[name] for name in extra if name in parameters}
        try:
            return inner.update(updates, state, params, **extra)
        except TypeError as error:
            if "masks" not in extra or "'masks'" not in str(error):
                raise
            own = {name: extra[name] for name in extra if name not in ("masks", "trainable", "softness")}
            return inner.update(updates, state, params, **own)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _abstract(params) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def _move(algorithm, plan, params, grads, state, memory, due):
    """Moves masks where it is time. Only masks go through the condition, so that no weight is copied on other steps."""

    def move():
        leaks = jnp.where(state.mask_step > 0, count_leaks(params, state.masks), 0)
        if needs_probe(algorithm):  # without the signal absent blocks would seem to have no gradient
            stored = stored_leaves(params, plan).values()
            leaks = leaks + sum(jnp.sum(leaf.probe_when == 0, dtype=jnp.int32) for leaf in stored)
        old = jax.tree.map(lambda mask: after(leaks, mask), state.masks)
        masks = move_masks(algorithm, plan, params, grads, old, memory, state.mask_step)
        grew = jnp.zeros([], bool)
        if algorithm.reset_all:
            grown = jax.tree.map(lambda old, new: jnp.any(new & ~old), state.masks, masks)
            grew = functools.reduce(jnp.logical_or, jax.tree.leaves(grown), grew)
        # Nothing reads the old masks any more once the new ones are made, so that these can take their place in memory.
        masks = jax.tree.map(lambda mask: mask & (leaks >= 0), masks)
        return masks, leaks, count_nnz(masks, params), grew

    def stay():
        return state.masks, jnp.zeros([], jnp.int32), state.targets, jnp.zeros([], bool)

    return run_if(due, move, stay)


def _live(masks, stored, moved):
    """Masks of what the inner optimizer sees: of a stored leaf, of the values that stay where they are."""

    def mask(path, mask):
        return match_sharding(stored[path].live(moved[path].stays), stored[path].values) if path in moved else mask

    return map_with_names(mask, masks) if stored else masks


def _wait(algorithm, plan, masks, old, moved):
    """Masks without the blocks that have just grown: they take their first step at the next update.

    A stored block has no gradient yet in the step that it grows at; one that is masked waits too, so that both train
    alike. Where the swap replaces the step, nothing is trained anyway.
    """
    if algorithm.grow is None or algorithm.replaces_step:
        return masks
    waits = {leaf.path for leaf in plan if isinstance(leaf.structure, Block)} - moved.keys()
    if not waits:
        return masks
    before = dict(named_leaves(old))
    return map_with_names(lambda path, mask: mask & before[path] if path in waits else mask, masks)


def _step(algorithm, inner, grads, inner_state, params, masks, waiting, due, grew, extra):
    """The inner optimizer's step under the new masks; `waiting` lacks what is not trained in this step.

    Off the mask moments are zero, because no gradient reaches them and they are zeroed once a weight is dropped; so a
    weight that grows finds zero moments. Where a swap replaces the step, `inner` gets zero gradients and its update is
    not used: to leave its state out of the step altogether would cost a copy of it at every step.
    """
    kept = masks
    if algorithm.reset_all:
        everything = map_sparse(lambda m, p: m, masks, params, dense=lambda p: jnp.ones_like(p, dtype=bool))
        kept = jax.tree.map(lambda keep: keep & ~grew, everything)
    inner_state = _keep_when(due, inner, inner_state, kept)
    if algorithm.gradient is None:
        grads = map_sparse(lambda m, g: jnp.where(m, g, jnp.zeros_like(g)), waiting, grads)
    if algorithm.replaces_step:
        grads = jax.tree.map(lambda g: jnp.where(due, jnp.zeros_like(g), g), grads)
    # A weight pruned just now is not zero yet: seen as it is, it would decay into the moments that were zeroed.
    seen = map_sparse(lambda m, p: jnp.where(m, p, jnp.zeros_like(p)), masks, params)
    updates, inner_state = inner.update(grads, inner_state, seen, **{**extra, "masks": masks})
    if algorithm.replaces_step:
        updates = jax.tree.map(lambda u: jnp.where(due, jnp.zeros_like(u), u), updates)
    # -p is not cast: in the wider of the two dtypes p + (-p) is exactly 0.
    return map_sparse(lambda m, u, p: jnp.where(m, u, -p), waiting, updates, params), inner_state


def _keep_when(due, inner, inner_state, keep):
    """Zeroes the moments off `keep`, in place, only at update steps.

    A loop of one trip or none: a condition would copy the moments at every step, and a `where` at every step makes the
    compiler keep a second copy of them.
    """

    def zero(carry):
        return False, keep_moments(inner, carry[1], keep)

    if not isinstance(due, jax.core.Tracer):
        return zero((due, inner_state))[1] if due else inner_state
    return jax.lax.while_loop(lambda carry: carry[0], zero, (due, inner_state))[1]
