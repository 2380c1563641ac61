"""Which axes of a model's parameters can only be cut together, found by tracing the model."""

import collections
import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from sparsejax.masks.counts import keep_count
from sparsejax.masks.paths import named_leaves
from sparsejax.masks.rules import resolve
from sparsejax.masks.unstructured import Unstructured
from sparsejax.parameters.shrink_dims import Dim, Pin, kept_indices, pin, units_of_indices
from sparsejax.parameters.shrink_trace import Axes, flat_jaxpr


@dataclasses.dataclass(frozen=True)
class TiedAxis:
    """An axis of a parameter that belongs to a group.

    Args:
        path: the parameter's name.
        axis: the axis.
        units: int vector: the unit of the group that each index of the axis belongs to, -1 for none.
    """

    path: str
    axis: int
    units: np.ndarray

    def __str__(self) -> str:
        indices = f", {np.sum(self.units >= 0)} indices" if len(self.units) != self.units.max() + 1 else ""
        return f"{self.path} axis {self.axis}{indices}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes that can only be cut together, unit by unit: a channel, a head, a hidden feature.

    Args:
        name: the parameter and axis that come first, which name the group.
        size: units.
        axes: where the units are.
        pins: why the group keeps its size; empty if it can be cut.
    """

    name: str
    size: int
    axes: tuple[TiedAxis, ...]
    pins: tuple[Pin, ...]

    def __str__(self) -> str:
        if self.pins:
            others = f" (with {len(self.axes) - 1} axes tied to it)" if len(self.axes) > 1 else ""
            return f"{self.name}{others}: {self.pins[0].reason}"
        return f"{self.name}: {self.size} units" + "".join(f"\n    {axis}" for axis in self.axes)


@dataclasses.dataclass(frozen=True)
class Groups:
    """All groups of a model; printed, it lists them.

    Args:
        groups: `{name: Group}`, in the order of the parameters.
    """

    groups: Mapping[str, Group]

    @property
    def free(self) -> dict[str, Group]:
        """The groups that can be cut."""
        return {name: group for name, group in self.groups.items() if not group.pins}

    def __getitem__(self, name: str) -> Group:
        if name not in self.groups:
            raise KeyError(f"no group is named {name!r}; the groups are: {', '.join(self.groups)}")
        return self.groups[name]

    def __str__(self) -> str:
        stays = [group for group in self.groups.values() if group.pins]
        lines = [f"{len(self.free)} groups can be cut:", *map(str, self.free.values())]
        return "\n".join([*lines, f"{len(stays)} groups stay as they are:", *map(str, stays)])

    def scores(self, tree) -> dict[str, np.ndarray]:
        """Scores of the units: of every tied axis the mean over a unit's elements, summed over the axes.

        Each parameter's scores are first divided by their mean, so that large and small layers count alike.

        Args:
            tree: real arrays like the parameters, such as their squares; leaves may be missing (`None`).

        Returns:
            `{name: float32 (size,)}` for the groups that can be cut.
        """
        leaves = dict(named_leaves(tree))
        result = {}
        for name, group in self.free.items():
            total = np.zeros(group.size, np.float32)
            for tied in group.axes:
                if tied.path not in leaves or jnp.ndim(leaves[tied.path]) < 2:
                    continue
                values = np.asarray(leaves[tied.path], np.float32)
                along = values.mean(axis=tuple(a for a in range(values.ndim) if a != tied.axis))
                inside = tied.units >= 0
                sums = np.bincount(tied.units[inside], along[inside], minlength=group.size)
                counts = np.bincount(tied.units[inside], minlength=group.size)
                total += sums / counts / max(values.mean(), np.finfo(np.float32).tiny)
            result[name] = total
        return result

    def masks(self, params, units: Mapping[str, np.ndarray], *, rules=None):
        """Masks of the parameters from masks of units: what belongs to a pruned unit is pruned in all its layers.

        Args:
            params: the parameter tree.
            units: `{name of a group: bool (size,)}`, True = kept.
            rules: as in `sparsify`; leaves that are dense by them (biases, norms, embeddings) get no mask.

        Returns:
            A tree like `params` of bool masks, `None` where dense: for `from_masks` and `shrink`.

        Raises:
            KeyError: there is no such group.
            ValueError: the group cannot be cut, or a mask has another shape.

        Example:
            >>> groups = tied_axes(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], {"a": jnp.ones((2, 3)),
            ...     "b": jnp.ones((3, 1))}, jnp.ones((1, 2)))
            >>> groups.masks({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}, {"a axis 1": [True, False, True]})["b"]
            Array([[ True],
                   [False],
                   [ True]], dtype=bool)
        """
        sparse = {leaf.path for leaf in resolve(params, rules, Unstructured()) if leaf.structure is not None}
        shapes = {path: jnp.shape(leaf) for path, leaf in named_leaves(params)}
        masks = {path: np.ones(shapes[path], bool) for path in sparse}
        for name, kept in units.items():
            group, kept = self[name], np.asarray(kept)
            if group.pins:
                raise ValueError(f"group {name!r} cannot be cut: {group.pins[0].reason}; leave it out")
            if kept.shape != (group.size,) or kept.dtype != bool:
                raise ValueError(
                    f"units[{name!r}] is {kept.dtype} of shape {kept.shape}, needed is bool of shape ({group.size},)"
                )
            for tied in group.axes:
                if tied.path in masks:
                    along = np.where(tied.units >= 0, kept[tied.units], True)
                    shape = [-1 if axis == tied.axis else 1 for axis in range(len(shapes[tied.path]))]
                    masks[tied.path] &= along.reshape(shape)
        structure = jax.tree.structure(params)
        return structure.unflatten([jnp.asarray(masks[path]) if path in masks else None for path in shapes])

    def prune(self, params, sparsity: float | Mapping[str, float], *, scores=None, rules=None):
        """Masks that prune whole units of the groups that can be cut, those of lowest score, in all layers alike.

        Args:
            params: the parameter tree.
            sparsity: fraction of units pruned in each group, or `{name: fraction}` for some groups. At least one unit
                stays.
            scores: tree of real arrays like `params`; by default the squares of the parameters.
            rules: as in `masks`.

        Returns:
            Masks as `masks` returns them.

        Example:
            >>> params = {"a": jnp.array([[1.0, 3.0, 2.0]]), "b": jnp.ones((3, 1))}
            >>> groups = tied_axes(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 1)))
            >>> groups.prune(params, 0.5)["a"].tolist()
            [[False, True, True]]

        References:
            Fang et al., DepGraph: Towards Any Structural Pruning, 2023, arXiv:2301.12900, section 3.4.
        """
        scores = self.scores(
            jax.tree.map(lambda leaf: np.square(np.asarray(leaf)), params) if scores is None else scores
        )
        wanted = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(self.free, sparsity)
        units = {}
        for name, fraction in wanted.items():
            size = self[name].size
            count = max(1, keep_count(size, fraction))
            order = np.argsort(-scores.get(name, np.zeros(size)), kind="stable")
            units[name] = np.isin(np.arange(size), order[:count])
        return self.masks(params, units, rules=rules)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced model: its operations, the dimensions of all arrays, and the groups.

    Args:
        axes: dimensions of every array.
        names: names of the parameter leaves.
        groups: the groups.
        dims: `{name of a group: its dimension}`.
    """

    axes: Axes
    names: tuple[str, ...]
    groups: Groups
    dims: Mapping[str, Dim]

    def parameter_dims(self) -> list[list[Dim]]:
        """The dimensions of each parameter leaf."""
        variables = self.axes.closed.jaxpr.invars[: len(self.names)]
        return [self.axes.of(variable) for variable in variables]


def tied_axes(apply: Callable, params, *inputs) -> Groups:
    """Finds which axes of a model's parameters can only be cut together.

    The function is traced, not run. Axes that it lines up are tied: by sums and products, matrix products and
    convolutions, residual adds, reshapes into heads, transposes, concatenations, norms. A group stays as it is where
    it is an axis of an input or output, where an operation cannot be traced, or where the function computes a number
    from its size (the mean in a layer norm, the scale of attention): that number would change with the cut.

    Args:
        apply: `apply(params, *inputs)`, returns a tree of arrays. It must take sizes from the parameters' shapes.
        params: tree of arrays, or of `jax.ShapeDtypeStruct`.
        *inputs: arrays or `jax.ShapeDtypeStruct`s; a batch of one is enough.

    Returns:
        The `Groups`; print them.

    Example:
        >>> params = {"up": jnp.ones((4, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 2))}
        >>> apply = lambda p, x: jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]
        >>> print(tied_axes(apply, params, jnp.ones((1, 4))))
        1 groups can be cut:
        bias axis 0: 8 units
            bias axis 0
            down axis 0
            up axis 1
        2 groups stay as they are:
        down axis 1: it is an axis of an output
        up axis 0: it is an axis of an input

    References:
        Fang et al., DepGraph: Towards Any Structural Pruning, 2023, arXiv:2301.12900, section 3.
    """
    return trace(apply, params, *inputs).groups


def trace(apply: Callable, params, *inputs) -> Traced:
    """Traces a model for `tied_axes` and `shrink`."""
    named = named_leaves(params)
    names = [name for name, _ in named]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two leaves are named {twice[0]!r}; rename one: groups are found by name")
    closed = flat_jaxpr(apply, params, *inputs)
    axes = Axes(closed, len(names))
    traced = _group(axes, names)
    free = {name: traced.dims[name] for name in traced.groups.free}
    # Sizes that the function counts show when it is traced again with other ones: first all at once, then one by one.
    if free and difference(traced, apply, params, inputs, {dim: _one_less(dim) for dim in free.values()}):
        for dim in free.values():
            found = difference(traced, apply, params, inputs, {dim: _one_less(dim)})
            if found:
                pin(dim, Pin(found))
        traced = _group(axes, names)
    return traced


def difference(traced: Traced, apply: Callable, params, inputs, kept: Mapping[Dim, np.ndarray]) -> str:
    """Says how the function traced with cut parameters differs from the one traced before; "" if only sizes do."""
    leaves, structure = jax.tree.flatten(params)
    smaller = [
        jax.ShapeDtypeStruct(tuple(int(kept_indices(dim, kept).sum()) for dim in dims), leaf.dtype)
        for leaf, dims in zip(leaves, traced.parameter_dims(), strict=True)
    ]
    try:
        again = flat_jaxpr(apply, structure.unflatten(smaller), *inputs).jaxpr
    except Exception as error:  # whatever a model raises when sizes are not what its code expects
        line = (str(error).strip().splitlines() or [""])[0]
        return f"the function fails when it is smaller: {type(error).__name__}: {line[:160]}"
    before = traced.axes.closed.jaxpr
    if len(before.eqns) != len(again.eqns):
        return "the function does other operations when it is smaller"
    for old, new in zip(before.eqns, again.eqns, strict=True):
        name = old.primitive.name
        if name != new.primitive.name:
            return f"the function does other operations when it is smaller: {new.primitive.name!r} for {name!r}"
        for a, b in zip([*old.invars, *old.outvars], [*new.invars, *new.outvars], strict=True):
            if isinstance(a, Literal) != isinstance(b, Literal):
                return f"the function does other operations when it is smaller, at {name!r}"
            if isinstance(a, Literal):
                if not np.array_equal(a.val, b.val, equal_nan=np.asarray(a.val).dtype.kind == "f"):
                    return (
                        f"the function counts it: {name!r} takes {_number(a.val)}, and {_number(b.val)} when it is "
                        "smaller (a norm's mean, or the scale of attention)"
                    )
            elif tuple(b.aval.shape) != tuple(kept_indices(dim, kept).sum() for dim in traced.axes.of(a)):
                return f"its size is written into the function, at {name!r}"
    return ""


def _one_less(dim: Dim) -> np.ndarray:
    return np.arange(dim.size) > 0


def _number(value) -> str:
    return f"{np.asarray(value).item():.6g}" if np.ndim(value) == 0 else "an array"


def _group(axes: Axes, names) -> Traced:
    members: dict[Dim, list[TiedAxis]] = {}
    for name, variable in zip(names, axes.closed.jaxpr.invars, strict=False):
        for axis, dim in enumerate(axes.of(variable)):
            for whole, units in units_of_indices(dim):
                if whole.size > 1:
                    members.setdefault(whole, []).append(TiedAxis(name, axis, units))
    groups, dims = {}, {}
    for dim, tied in members.items():
        name = f"{tied[0].path} axis {tied[0].axis}"
        if name in groups:  # several factors of one axis
            name += f" ({sum(other.startswith(name) for other in groups) + 1})"
        groups[name], dims[name] = Group(name, dim.size, tuple(tied), tuple(dim.pins)), dim
    return Traced(axes, tuple(names), Groups(groups), dims)
