"""Constants that pruned units leave in a sum, folded into the parameter that is added to it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from sparsejax.parameters.shrink_dims import kept_indices
from sparsejax.parameters.shrink_values import read_value, summed_axes

_SPREADS = frozenset(("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "expand_dims"))


@dataclasses.dataclass(frozen=True)
class Fold:
    """A change of a parameter.

    Args:
        parameter: its place among the leaves.
        change: what is added to it, of its full shape.
    """

    parameter: int
    change: np.ndarray


def fold(traced, values, kept, open_sums) -> tuple[list[Fold], dict[int, str]]:
    """Folds what cut units leave in sums, where a bias or a batch norm's mean follows.

    Args:
        traced: the model.
        values: `{variable: (value, which elements are constant)}`.
        kept: `{dimension: bool}`, which units stay.
        open_sums: indices of the equations in whose sums something is left.

    Returns:
        The changes, and `{index of an equation: why its constants cannot be folded}`.
    """
    jaxpr = traced.axes.closed.jaxpr
    folds, reasons = [], {}
    for index in open_sums:
        equation = jaxpr.eqns[index]
        if equation.primitive.name == "reduce_sum":
            reasons[index] = "a constant other than zero that they leave is summed by 'reduce_sum'"
            continue
        target = _added_parameter(traced, equation.outvars[0])
        if target is None:
            reasons[index] = "they leave a constant, and the next layer has no bias to fold it into"
            continue
        left, stays = _constant_at(read_value(values, equation.invars[0])), np.ones((), bool)
        for axis in summed_axes(equation, 0):
            shape = [-1 if other == axis else 1 for other in range(left.ndim)]
            stays = stays & kept_indices(traced.axes.of(equation.invars[0])[axis], kept).reshape(shape)
        left = jnp.where(stays, 0, left)
        right = _constant_at(read_value(values, equation.invars[1]))
        change = np.asarray(equation.primitive.bind(left, right, **equation.params), np.float64)
        parameter, places, sign = target
        for axis, dim in enumerate(traced.axes.of(equation.outvars[0])):
            chosen = np.flatnonzero(kept_indices(dim, kept))
            change, places = np.take(change, chosen, axis), np.take(places, chosen, axis)
        spread = _spread_evenly(change, places, jaxpr.invars[parameter].aval.shape)
        if spread is None:
            reasons[index] = "they leave a constant that differs between positions (at the border of a convolution)"
        else:
            folds.append(Fold(parameter, sign * spread))
    return folds, reasons


def _constant_at(operand):
    value, constant = operand
    return jnp.where(constant, value, 0).astype(value.dtype)


def _added_parameter(traced, variable):
    """The parameter added to, or subtracted from, an array: its place, which element goes where, and the sign."""
    jaxpr = traced.axes.closed.jaxpr
    users = [(e, i) for e in jaxpr.eqns for i, v in enumerate(e.invars) if v is variable]
    if len(users) != 1 or variable in [v for v in jaxpr.outvars if not isinstance(v, Literal)]:
        return None
    equation, position = users[0]
    name = equation.primitive.name
    if name not in ("add", "add_any", "sub") or (name == "sub" and position):
        return None
    chain, source = [], equation.invars[1 - position]
    while not isinstance(source, Literal) and source not in jaxpr.invars:
        [maker] = [e for e in jaxpr.eqns if source in e.outvars]
        if maker.primitive.name not in _SPREADS or _uses(jaxpr, source) != 1:
            return None
        chain.append(maker)
        source = maker.invars[0]
    if isinstance(source, Literal) or jaxpr.invars.index(source) >= len(traced.names) or _uses(jaxpr, source) != 1:
        return None
    places = jnp.arange(source.aval.size).reshape(source.aval.shape)
    for maker in reversed(chain):
        if maker.primitive.name != "convert_element_type":
            places = maker.primitive.bind(places, **maker.params)
    places = np.broadcast_to(np.asarray(places), variable.aval.shape)
    return jaxpr.invars.index(source), places, 1 if name != "sub" else -1


def _uses(jaxpr, variable) -> int:
    inside = sum(v is variable for e in jaxpr.eqns for v in e.invars)
    return inside + sum(v is variable for v in jaxpr.outvars)


def _spread_evenly(change, places, shape):
    """The parameter's change if each of its elements gets one and the same everywhere it goes; else None."""
    size = int(np.prod(shape))
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, places.ravel(), change.ravel())
    np.maximum.at(high, places.ravel(), change.ravel())
    met = np.isfinite(low)
    scale = 1e-6 * max(1.0, np.abs(change).max(initial=0.0))
    if np.any(high[met] - low[met] > scale):
        return None
    result = np.zeros(size)
    result[met] = (high[met] + low[met]) / 2
    return result.reshape(shape)
