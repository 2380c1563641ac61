"""Physically smaller dense layers with equal outputs, after whole channels, heads or features have been pruned."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.parameters.shrink_dims import Dim, kept_indices, units_of_indices
from sparsejax.parameters.shrink_fold import Fold, fold
from sparsejax.parameters.shrink_groups import Group, Traced, difference, trace
from sparsejax.parameters.shrink_values import follow


@dataclasses.dataclass(frozen=True)
class ShrinkReport:
    """What `shrink` did; printed, it says so in words.

    Args:
        sizes: `{group: (units before, units after)}` of the groups that were cut.
        parameters: elements of all parameters, before and after.
        folded: names of parameters to which constants were added that pruned units left.
        stays: `{group: why pruned units of it stay}`.
        indices: `{path: for each axis the indices kept}`.
    """

    sizes: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    folded: tuple[str, ...]
    stays: Mapping[str, str]
    indices: Mapping[str, tuple[np.ndarray, ...]]

    def cut(self, tree):
        """Cuts another tree like the old parameters the same way: masks, moments, averages.

        Args:
            tree: arrays of the shapes of the parameters, by the same names; `None` where there are none.

        Returns:
            The tree with smaller arrays.
        """
        return map_with_names(lambda name, leaf: _take(leaf, self.indices[name]), tree)

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"{before} parameters -> {after} ({after / before:.1%})"]
        lines += [f"{name}: {old} units -> {new}" for name, (old, new) in self.sizes.items()]
        lines += [f"{name}: constants of pruned units folded in" for name in self.folded]
        lines += [f"{name}: {reason}" for name, reason in self.stays.items()]
        return "\n".join(lines)


def shrink(apply: Callable, params, masks, *inputs):
    """Cuts what is pruned out of a model's parameters, so that the same function of them gives the same outputs.

    A unit (channel, head, feature) is cut if under the masks none of its values both varies and has a part in the
    outputs. It need not be pruned in all layers: a feature whose inputs are pruned and whose bias is not leaves a
    constant, which is folded into the bias, or the batch norm's mean, of the next layer. At least one unit of each
    group stays. What cannot be cut stays, with equal outputs, and the report says why.

    Args:
        apply: `apply(params, *inputs)`; it must take sizes from the parameters' shapes.
        params: tree of arrays: all that has the sizes, running statistics included.
        masks: tree of bool masks by the names of `params`, `None` or missing where dense.
        *inputs: arrays or `jax.ShapeDtypeStruct`s, a batch of one is enough; their values do not matter.

    Returns:
        `(smaller params, ShrinkReport)`; masks are applied to the parameters.

    Raises:
        ValueError: a mask fits no parameter; or it prunes units that pass through an operation that is not traced.

    Example:
        >>> params = {"up": jnp.ones((4, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 2)), "shift": jnp.zeros(2)}
        >>> masks = {"up": jnp.ones((4, 8), bool).at[:, 3:].set(False)}
        >>> apply = lambda p, x: jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"] + p["shift"]
        >>> small, report = shrink(apply, params, masks, jnp.ones((1, 4)))
        >>> print(report)
        58 parameters -> 23 (39.7%)
        bias axis 0: 8 units -> 3
        shift: constants of pruned units folded in
        >>> x = jnp.array([[0.1, -0.2, 0.3, 0.0]])
        >>> dense = apply(params | {"up": params["up"] * masks["up"]}, x)
        >>> bool(jnp.allclose(apply(small, x), dense, atol=1e-6))
        True

    References:
        Fang et al., DepGraph: Towards Any Structural Pruning, 2023, arXiv:2301.12900; for the constants, Ye et al.,
        Rethinking the Smaller-Norm-Less-Informative Assumption, 2018, arXiv:1802.00124, section 4.
    """
    traced = trace(apply, params, *inputs)
    masks = _by_name(params, masks)
    wanted = {name: _pruned_units(group, masks) for name, group in traced.groups.groups.items()}
    _refuse(traced, wanted)

    def under_mask(name, leaf):
        return np.where(masks[name], np.asarray(leaf), np.zeros((), leaf.dtype)) if name in masks else leaf

    masked = map_with_names(under_mask, params)
    arguments = jax.tree.map(_array, jax.tree.leaves((masked, *inputs)))
    values = follow(traced.axes.closed, arguments, len(traced.names))
    for least in (1, 2):  # axes of size 1 are broadcast, and functions may then do other operations
        kept, folds, refused = _choose(traced, values, least)
        found = difference(traced, apply, params, inputs, kept)
        if not found:
            break
    else:
        raise ValueError(f"the smaller model would not give the same outputs: {found}; leave that axis unpruned")

    indices = {
        name: tuple(np.flatnonzero(kept_indices(dim, kept)) for dim in dims)
        for name, dims in zip(traced.names, traced.parameter_dims(), strict=True)
    }
    added = collections.defaultdict(float)
    for each in folds:
        added[traced.names[each.parameter]] += each.change

    def cut(name, leaf):
        whole = np.asarray(leaf) + added[name].astype(leaf.dtype) if name in added else leaf
        return _take(whole, indices[name])

    smaller = map_with_names(cut, masked)
    sizes = {
        name: (dim.size, int(kept[dim].sum()))
        for name, dim in traced.dims.items()
        if dim in kept and not kept[dim].all()
    }
    stays = {}
    for name, group in traced.groups.groups.items():
        staying = wanted[name] & kept.get(traced.dims[name], np.ones(group.size, bool))
        if staying.any():
            reason = refused.get(traced.dims[name]) or _why(group, staying, masks)
            stays[name] = f"{staying.sum()} pruned units stay: {reason}"
    report = ShrinkReport(sizes, (_count(params), _count(smaller)), tuple(added), stays, indices)
    return smaller, report


def _choose(traced: Traced, values, least: int) -> tuple[dict[Dim, np.ndarray], list[Fold], dict[Dim, str]]:
    """Which units of each free group stay, what is folded, and why constants could not be."""
    closed = traced.axes.closed
    kept = {traced.dims[name]: np.zeros(group.size, bool) for name, group in traced.groups.free.items()}

    def keep(dim, along) -> list[Dim]:
        changed = []
        for whole, units in units_of_indices(dim):
            chosen = np.unique(units[along & (units >= 0)])
            if whole in kept and not kept[whole][chosen].all():
                kept[whole][chosen] = True
                changed.append(whole)
        return changed

    for (variable, axis), along in values.varying.items():
        keep(traced.axes.of(variable)[axis], along)
    refused = {}
    while True:
        for dim, units in kept.items():
            missing = min(least, dim.size) - int(units.sum())
            if missing > 0:
                units[np.flatnonzero(~units)[:missing]] = True
                refused[dim] = f"at least {least} of each group is kept"
        open_sums = collections.defaultdict(list)
        for (index, operand, axis), along in values.leaving.items():
            dim = traced.axes.of(closed.jaxpr.eqns[index].invars[operand])[axis]
            if np.any(along & ~kept_indices(dim, kept)):
                open_sums[index].append((operand, axis, along & ~kept_indices(dim, kept)))
        folds, reasons = fold(traced, values.values, kept, open_sums)
        if not reasons:
            return kept, folds, refused
        for index, reason in reasons.items():
            for operand, axis, along in open_sums[index]:
                dim = traced.axes.of(closed.jaxpr.eqns[index].invars[operand])[axis]
                refused.update(dict.fromkeys(keep(dim, along), reason))


def _pruned_units(group: Group, masks) -> np.ndarray:
    """The units of which some matrix is pruned altogether."""
    pruned = np.zeros(group.size, bool)
    for tied in group.axes:
        mask = masks.get(tied.path)
        if mask is not None and mask.ndim > 1:
            pruned |= _unit_is_empty(tied, mask, group.size)
    return pruned


def _unit_is_empty(tied, mask, size) -> np.ndarray:
    along = mask.any(axis=tuple(axis for axis in range(mask.ndim) if axis != tied.axis))
    inside = tied.units >= 0
    return np.bincount(tied.units[inside], weights=along[inside], minlength=size) == 0


def _refuse(traced: Traced, wanted) -> None:
    for name, group in traced.groups.groups.items():
        reasons = [reason for reason in group.pins if reason.primitive]
        if reasons and wanted[name].any():
            raise ValueError(
                f"{group.axes[0].path}: {wanted[name].sum()} of {group.size} units along axis {group.axes[0].axis} are "
                f"pruned, but this axis cannot be cut: {reasons[0].reason} (primitive {reasons[0].primitive!r}). Leave "
                "these units unpruned, or write the operation with ones that are traced: products, convolutions, sums, "
                "elementwise functions, reshape, transpose, concatenate, split, slice, pad, pooling, look-ups"
            )


def _why(group: Group, staying, masks) -> str:
    if group.pins:
        return group.pins[0].reason
    others = [
        f"{tied.path} axis {tied.axis}"
        for tied in group.axes
        if tied.path not in masks or (~_unit_is_empty(tied, masks[tied.path], group.size) & staying).any()
    ]
    return "they are still in use, unpruned in " + ", ".join(others)


def _by_name(params, masks) -> dict[str, np.ndarray]:
    leaves, found = dict(named_leaves(params)), {}
    for name, mask in named_leaves(masks):
        if isinstance(mask, optax.MaskedNode):
            continue
        if name not in leaves or jnp.shape(mask) != jnp.shape(leaves[name]):
            shape = f"of shape {jnp.shape(leaves[name])}" if name in leaves else "not a parameter"
            raise ValueError(f"masks[{name!r}] has shape {jnp.shape(mask)}, but {name!r} is {shape}")
        found[name] = np.asarray(mask, bool)
    return found


def _take(leaf, indices):
    """Part of an array, cut on the host: JAX would compile a gather for every shape."""
    return jnp.asarray(np.asarray(leaf)[np.ix_(*indices)])


def _array(leaf):
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)


def _count(params) -> int:
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))
