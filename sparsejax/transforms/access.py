"""Reading an optimizer state: masks, masked copies, the finished network, a table, a health check."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.analysis.summary import Summary, summarize
from sparsejax.masks.paths import is_stored, map_with_names, named_leaves
from sparsejax.transforms.sparsify import SparsifyState
from sparsejax.transforms.tree import is_masked_node, kept_elements


def sparsify_states(opt_state) -> list[SparsifyState]:
    """Finds the states of `sparsify` inside an optimizer state, whatever wraps them.

    Args:
        opt_state: an optax state, or an `nnx.Optimizer` (or its `opt_state`).

    Returns:
        The states, one for each `sparsify` in the optimizer.

    Raises:
        ValueError: there is none.
    """
    opt_state = nnx.as_pure(getattr(opt_state, "opt_state", opt_state))
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda value: isinstance(value, SparsifyState))
    states = [leaf for leaf in leaves if isinstance(leaf, SparsifyState)]
    if not states:
        raise ValueError(
            "this optimizer state has no sparsify in it: make the optimizer with "
            "sparsejax.sparsify(optimizer, algorithm) and pass the state that it returned"
        )
    return states


def _require_one_seed(states: list[SparsifyState]) -> None:
    for state in states:
        if jnp.ndim(state.mask_step):
            raise ValueError(
                f"this optimizer state holds {jnp.size(state.mask_step)} runs side by side, as jax.vmap makes them; "
                "index one seed first: params, opt_state = jax.tree.map(lambda x: x[0], (params, opt_state))"
            )


def masks_of(opt_state):
    """The masks in an optimizer state.

    Args:
        opt_state: an optax state that holds one or more `sparsify` states (several under `optax.partition`), or an
            `nnx.Optimizer`.

    Returns:
        A tree like the parameters: bool arrays where sparse, `optax.MaskedNode()` where dense.

    Raises:
        ValueError: there is no `sparsify` in it.

    Example:
        >>> import jax.numpy as jnp, optax, sparsejax
        >>> optimizer = sparsejax.sparsify(optax.sgd(0.1), sparsejax.static(0.5))
        >>> state = optimizer.init({"kernel": jnp.ones((4, 4))})
        >>> int(masks_of(state)["kernel"].sum())
        8
    """
    return functools.reduce(_merge, [state.masks for state in sparsify_states(opt_state)])


def _merge(first, second):
    """Puts the second tree of masks where the first has none; a whole subtree may be one `optax.MaskedNode()`."""
    if is_masked_node(first):
        return second
    children, structure = jax.tree.flatten(first, is_leaf=lambda node: node is not first)
    if is_masked_node(second) or jax.tree_util.treedef_is_leaf(structure):
        return first
    return structure.unflatten(map(_merge, children, structure.flatten_up_to(second)))


def mask_params(params, opt_state):
    """The parameters with exact zeros off the mask: to start sparse, and for averaged or evaluation copies.

    Stored weights stay as they are: they hold nothing off their masks.

    Args:
        params: parameters, or any tree with the same leaf names, such as an exponential moving average.
        opt_state: as in `masks_of`.

    Returns:
        A tree like `params`.

    Example:
        >>> import jax.numpy as jnp, optax, sparsejax
        >>> params = {"kernel": jnp.ones((4, 4))}
        >>> state = sparsejax.sparsify(optax.sgd(0.1), sparsejax.static(0.5)).init(params)
        >>> int(jnp.count_nonzero(mask_params(params, state)["kernel"]))
        8
    """
    masks = dict(named_leaves(masks_of(opt_state)))
    _require_masked(dict(named_leaves(params, is_stored)), masks_of(opt_state))

    def masked(path, p):
        return jnp.where(masks[path], p, jnp.zeros_like(p)) if path in masks and not is_stored(p) else p

    return map_with_names(masked, params, is_leaf=is_stored)


def _require_masked(leaves: dict, masks) -> None:
    lost = [path for path, _ in named_leaves(masks) if path not in leaves]
    if lost:
        raise ValueError(f"the parameters lack the masked leaves {lost[:5]}; they have {sorted(leaves)[:5]}")


def finalize(params, opt_state):
    """Plain sparse parameters for deployment: exact zeros off the mask, nothing of the training stack left.

    Args:
        params: trained parameters.
        opt_state: as in `masks_of`.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: the parameters leak, see `check`; or pruned weights have not finished fading out (`mdgf`).
    """
    check(params, opt_state)
    for state in sparsify_states(opt_state):
        softness = float(state.data.get("softness", 0.0))
        if softness > 0:
            raise ValueError(
                f"pruned weights still show with a factor of {softness:.3g}; train until the fading has reached 0"
            )
    return mask_params(params, opt_state)


class Health(NamedTuple):
    """What `check` measured.

    Attributes:
        steps: updates so far, the largest over all `sparsify` states.
        nnz: kept elements.
        leaks: leaks counted whenever masks moved.
    """

    steps: int
    nnz: int
    leaks: int


def check(params, opt_state) -> Health:
    """Verifies parameters against their masks, outside of jit; for tests, and before saving.

    Args:
        params: the parameters after an update.
        opt_state: the state after the same update, as in `masks_of`.

    Returns:
        The `Health`.

    Raises:
        ValueError: naming the leaf, where a weight off the mask is not exactly zero, where a parameter is not finite,
            or where a mask no longer has the count that it was given; where leaks were counted during training; and
            where the state holds several seeds under `jax.vmap`.
    """
    leaves = dict(named_leaves(nnx.as_pure(params), is_stored))
    states = sparsify_states(opt_state)
    _require_one_seed(states)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(leaves)):
        raise ValueError("check looks at values; call it outside of jit")
    for path, p in leaves.items():
        values = p.values if is_stored(p) else p
        off = int(jnp.sum(~jnp.isfinite(values))) if jnp.issubdtype(jnp.result_type(values), jnp.inexact) else 0
        if off:
            raise ValueError(
                f"{path}: {off} values are not finite; masks cannot mend them. Wrap the optimizer, "
                "optax.apply_if_finite(sparsify(...), n), or restore an earlier checkpoint"
            )
    _require_masked(leaves, masks_of(opt_state))
    nnz = 0
    for state in states:
        started = int(state.mask_step) > 0
        soft = float(state.data.get("softness", 0.0)) > 0
        for (path, mask), target in zip(named_leaves(state.masks), state.targets.tolist(), strict=True):
            p = leaves[path]
            kept = int(kept_elements(mask, p))
            nnz += kept
            if is_stored(p):
                _check_stored(path, p, mask)
            off = 0 if is_stored(p) else int(jnp.sum((p != 0) & ~mask))
            if off and started and not soft:
                raise ValueError(
                    f"{path}: {off} of {mask.size - kept} pruned weights are not zero; something changes updates "
                    "after sparsify, or parameters between updates. Put it inside: "
                    "sparsify(optax.chain(...), algorithm)"
                )
            if kept != target:
                raise ValueError(
                    f"{path}: the mask keeps {kept} elements, but was given {target}: the state is damaged"
                )
        for path, dense in named_leaves(state.latent):
            if not bool(jnp.all(jnp.isfinite(dense))):
                raise ValueError(
                    f"{path}: {int(jnp.sum(~jnp.isfinite(dense)))} of the dense weights under the mask are not finite; "
                    "wrap the optimizer, optax.apply_if_finite(sparsify(...), n), or restore an earlier checkpoint"
                )
        if int(state.leaks):
            raise ValueError(
                f"{int(state.leaks)} non-zero pruned weights were seen when masks moved; something changes updates "
                "after sparsify. Put it inside: sparsify(optax.chain(...), algorithm)"
            )
    return Health(max(int(s.mask_step) for s in states), nnz, sum(int(s.leaks) for s in states))


def _check_stored(path: str, leaf, mask) -> None:
    """Raises `ValueError` where a stored weight holds other blocks than its mask, or values outside of its blocks."""
    if not bool(jnp.all(leaf.mask() == mask)):
        raise ValueError(
            f"{path}: stores other blocks than the masks keep: apply the updates of every step to the indices too, "
            "with sparsejax.apply_updates, optax.apply_updates or sparsejax.nn.Optimizer"
        )
    off = int(jnp.sum((leaf.values != 0) & ~leaf.live(leaf.active)))
    if off:
        raise ValueError(
            f"{path}: {off} values in empty slots or past the edge are not zero; something changes updates after "
            "sparsify, or parameters between updates. Put it inside: sparsify(optax.chain(...), algorithm)"
        )


def summary(params, opt_state, *, flops=None) -> Summary:
    """A table of every leaf: target and actual sparsity, non-zeros, FLOPs, simulated or accelerated.

    The target is what the masks were given; the actual figures count what the masks keep and whatever else is not zero,
    so that a leak, or parameters that have not been masked yet, show.

    Args:
        params: the parameters.
        opt_state: as in `masks_of`.
        flops: what `analysis.layer_flops` returned for the model; without it the FLOPs column is left out.

    Returns:
        A `Summary`; print it.

    Raises:
        ValueError: there is no `sparsify` in the state, or it holds several seeds under `jax.vmap`.
    """
    _require_one_seed(sparsify_states(opt_state))
    masks = masks_of(opt_state)
    targets = {}
    for state in sparsify_states(opt_state):
        targets |= dict(zip([path for path, _ in named_leaves(state.masks)], state.targets.tolist(), strict=True))
    params = nnx.as_pure(params)
    leaves = dict(named_leaves(params, is_stored))
    _require_masked(leaves, masks)

    def actual(path, mask):
        return mask if is_stored(leaves[path]) else mask | (leaves[path] != 0)

    return summarize(params, map_with_names(actual, masks), targets=targets, flops=flops)
