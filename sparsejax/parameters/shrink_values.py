"""Which elements inside a pruned model are constant whatever its inputs, and which have a part in its outputs.

Both are followed element by element through the flat list of operations: forward, an element is constant if all it is
computed from is, or if a factor of it is a constant zero; backward, an element is read if it can change an output. All
values are taken to be finite. What is not read, or is a constant, need not be computed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from sparsejax.parameters.shrink_trace import ELEMENTWISE, REDUCTIONS, WINDOWS

_RESHAPES = frozenset(["reshape", "squeeze", "expand_dims"])
_MOVES = frozenset(["concatenate", "pad", "rev", "slice", "split"])


@dataclasses.dataclass(frozen=True)
class Values:
    """What `follow` found out.

    Args:
        values: `{variable: (value, which elements are constant)}`; the value of others is one of many.
        varying: `{(variable, axis)}` to bool, a vector over the axis: an element at this index varies and is read.
        leaving: `{(index of an equation, operand, axis summed over)}` to bool: a constant other than zero at this index
            has a part in the sum, which a cut would take away.
    """

    values: dict
    varying: dict
    leaving: dict


def follow(closed, arguments, parameters: int) -> Values:
    """Follows constants forward and reads backward through a flat jaxpr.

    Args:
        closed: from `flat_jaxpr`.
        arguments: its arguments; the first `parameters` are constants.
        parameters: how many.

    Returns:
        `Values`, numpy arrays.
    """
    jaxpr = closed.jaxpr
    values = _forward_all(closed, arguments, parameters)
    reads = {v: np.ones(v.aval.shape, bool) for v in jaxpr.outvars if not isinstance(v, Literal)}
    leaving = {}
    for index in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[index]
        outs = [reads.get(v, np.zeros(v.aval.shape, bool)) for v in equation.outvars]
        if not any(out.any() for out in outs):
            continue
        operands = [read_value(values, variable) for variable in equation.invars]
        found = _backward(equation, operands, outs)
        for position, (variable, read) in enumerate(zip(equation.invars, found, strict=True)):
            if isinstance(variable, Literal):
                continue
            reads[variable] = reads[variable] | read if variable in reads else np.asarray(read)
            value, constant = operands[position]
            for axis in summed_axes(equation, position):
                leaving[index, position, axis] = _along(read & constant & (value != 0), axis)
    varying = {}
    for variable, read in reads.items():
        varies = read & ~values[variable][1]
        if varies.any():
            varying |= {(variable, axis): _along(varies, axis) for axis in range(varies.ndim)}
    return Values(values, varying, leaving)


def read_value(values, variable) -> tuple[np.ndarray, np.ndarray]:
    """The value of a variable or literal, and which of its elements are constant."""
    if isinstance(variable, Literal):
        return np.asarray(variable.val), np.ones(np.shape(variable.val), bool)
    return values[variable]


def _forward_all(closed, arguments, parameters: int) -> dict:
    jaxpr = closed.jaxpr

    @jax.jit
    def run(constants, arguments):
        inside = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
        for equation in jaxpr.eqns:
            operands = [v.val if isinstance(v, Literal) else inside[v] for v in equation.invars]
            results = equation.primitive.bind(*operands, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
            inside.update(zip(equation.outvars, results, strict=True))
        return [inside[variable] for equation in jaxpr.eqns for variable in equation.outvars]

    results = iter(run(closed.consts, arguments))
    values = {v: (_plain(c), np.ones(np.shape(c), bool)) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}
    for position, (variable, argument) in enumerate(zip(jaxpr.invars, arguments, strict=True)):
        values[variable] = _plain(argument), np.full(np.shape(argument), position < parameters)
    for equation in jaxpr.eqns:
        operands = [read_value(values, variable) for variable in equation.invars]
        constants = _forward(equation, operands)
        for variable, constant in zip(equation.outvars, constants, strict=True):
            values[variable] = _plain(next(results)), np.broadcast_to(constant, variable.aval.shape)
    return values


def _plain(value) -> np.ndarray:
    """The values; zeros for random keys, which numpy does not know and nothing computes with but what draws."""
    is_key = jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key)
    return np.zeros(np.shape(value), bool) if is_key else np.asarray(value)


def summed_axes(equation, operand: int) -> tuple[int, ...]:
    """The axes of an operand over which an operation sums."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return tuple(params["dimension_numbers"][0][operand])
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        return (numbers.lhs_spec[1],) if operand == 0 else (numbers.rhs_spec[1],)
    return tuple(params["axes"]) if name == "reduce_sum" else ()


def _forward(equation, operands) -> list:
    """For each result which elements are constant."""
    name, params = equation.primitive.name, equation.params
    constants = [constant for _, constant in operands]
    shape = equation.outvars[0].aval.shape
    if name in ("dot_general", "conv_general_dilated"):
        count, (left, right) = _counts(equation), (_not_zero(operand) for operand in operands)
        varies = np.zeros(shape)
        if not constants[0].all():
            varies = count(~constants[0], right)
        if not constants[1].all():
            varies = varies + count(left, ~constants[1])
        return [varies < 0.5]
    if name in ELEMENTWISE:
        result = np.ones(shape, bool)
        for constant in constants:
            result = result & constant
        if name in ("mul", "div"):
            result = result | ~_not_zero(operands[0])
        if name == "mul":
            result = result | ~_not_zero(operands[1])
        return [result]
    if name in _RESHAPES:
        return [constants[0].reshape(shape)]
    if name == "transpose":
        return [constants[0].transpose(params["permutation"])]
    if name == "broadcast_in_dim":
        return [constants[0].reshape(_before_broadcast(equation))]
    if name in _MOVES:
        flat = np.concatenate([constant.ravel() for constant in constants])
        return [flat[places] for places in _places(equation, operands)]
    if name in REDUCTIONS:
        return [constants[0].all(axis=tuple(int(axis) for axis in params["axes"]))]
    if name in WINDOWS:
        return [np.asarray(_windows(equation, (~constants[0]).astype(np.float32))) < 0.5]
    if name == "gather":
        # Rows that are looked up: whatever the index, a column that is the same constant in all rows stays one.
        value, rows = operands[0][0], tuple(params["dimension_numbers"].collapsed_slice_dims)
        same = constants[0].all(axis=rows, keepdims=True) & (
            value.max(axis=rows, keepdims=True) == value.min(axis=rows, keepdims=True)
        )
        same = constants[0] if constants[1].all() else np.broadcast_to(same, value.shape)
        params = params | {"fill_value": 1.0}
        looked_up = equation.primitive.bind(jnp.asarray(same, jnp.float32), jnp.asarray(operands[1][0]), **params)
        return [np.asarray(looked_up) > 0.5]
    return [np.asarray(all(constant.all() for constant in constants))] * len(equation.outvars)


def _backward(equation, operands, outs) -> list[np.ndarray]:
    """For each operand which elements are read, from the elements of the results that are."""
    name, params, read = equation.primitive.name, equation.params, outs[0]
    shapes = [value.shape for value, _ in operands]
    if name in ("dot_general", "conv_general_dilated"):
        count, (left, right) = _counts(equation), (_not_zero(operand) for operand in operands)
        return [
            _transposed(lambda array: count(array, right), shapes[0], read),
            _transposed(lambda array: count(left, array), shapes[1], read),
        ]
    if name in ELEMENTWISE:
        reads = [read] * len(operands)
        if name == "mul":
            reads = [read & _not_zero(operands[1]), read & _not_zero(operands[0])]
        elif name == "div":
            reads = [read, read & _not_zero(operands[0])]
        return [_sum_to(each, shape) for each, shape in zip(reads, shapes, strict=True)]
    if name in _RESHAPES:
        return [read.reshape(shapes[0])]
    if name == "transpose":
        return [read.transpose(np.argsort(params["permutation"]))]
    if name == "broadcast_in_dim":
        return [_sum_to(read, _before_broadcast(equation)).reshape(shapes[0]), *outs[1:]]
    if name in _MOVES:
        sizes = [int(np.prod(shape)) for shape in shapes]
        flat = np.zeros(sum(sizes), bool)
        for places, out in zip(_places(equation, operands), outs, strict=True):
            flat[places[out]] = True
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    if name in REDUCTIONS:
        axes = tuple(int(axis) for axis in params["axes"])
        return [np.broadcast_to(np.expand_dims(read, axes), shapes[0])]
    if name in WINDOWS:
        return [_transposed(lambda array: _windows(equation, array), shapes[0], read)]
    if name == "gather":
        indices, params = jnp.asarray(operands[1][0]), params | {"fill_value": 0.0}
        seen = _transposed(lambda array: equation.primitive.bind(array, indices, **params), shapes[0], read)
        # Which rows are looked up depends on the inputs: a column that is read in one row is read in all.
        rows = tuple(params["dimension_numbers"].collapsed_slice_dims)
        seen = np.broadcast_to(seen.any(axis=rows, keepdims=True), shapes[0])
        return [seen, np.full(shapes[1], read.any())]
    any_read = any(out.any() for out in outs)
    return [np.full(shape, any_read) for shape in shapes]


def _counts(equation):
    """A product as a count: of 0/1 arrays, in float32."""
    params = dict(equation.params) | {"preferred_element_type": np.dtype("float32"), "precision": None}

    def count(left, right):
        result = equation.primitive.bind(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32), **params)
        return result if isinstance(result, jax.core.Tracer) else np.asarray(result)

    return count


def _transposed(function, shape, read) -> np.ndarray:
    back = jax.linear_transpose(function, jax.ShapeDtypeStruct(shape, jnp.float32))
    return np.asarray(back(jnp.asarray(read, jnp.float32))[0]) > 0.5


def _windows(equation, array):
    keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    size, stride, padding, base, dilation = (tuple(equation.params[key]) for key in keys)
    return jax.lax.reduce_window(array, 0.0, jax.lax.add, size, stride, padding, base, dilation)


def _places(equation, operands) -> list[np.ndarray]:
    """Where in the operands, laid end to end, each element of the results comes from."""
    ends = np.cumsum([0] + [value.size for value, _ in operands])
    numbered = [
        jnp.arange(start, start + value.size, dtype=jnp.int32).reshape(value.shape)
        for start, (value, _) in zip(ends, operands, strict=False)
    ]
    results = equation.primitive.bind(*numbered, **equation.params)
    return [np.asarray(result) for result in (results if equation.primitive.multiple_results else [results])]


def _before_broadcast(equation) -> tuple[int, ...]:
    axes, shape = equation.params["broadcast_dimensions"], [1] * equation.outvars[0].aval.ndim
    for axis, size in zip(axes, equation.invars[0].aval.shape, strict=True):
        shape[axis] = size
    return tuple(shape)


def _not_zero(operand) -> np.ndarray:
    value, constant = operand
    return ~constant | (value != 0)


def _sum_to(read, shape) -> np.ndarray:
    if not shape:
        return read.any()
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and read.shape[axis] != 1)
    return read.any(axis=axes, keepdims=True) if axes else read


def _along(array, axis: int) -> np.ndarray:
    return array.any(axis=tuple(other for other in range(array.ndim) if other != axis))
