"""A function as one flat list of operations, and the rules by which each operation ties the axes of its operands."""

import functools

import jax
import numpy as np
from jax.extend.core import Literal

from sparsejax.parameters.shrink_dims import Dim, Pin, concatenation, find, pin, product, split, tie

ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
        "conj",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "imag",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "population_count",
        "pow",
        "real",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)
REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"])
WINDOWS = frozenset(["reduce_window_max", "reduce_window_min", "reduce_window_sum"])


def flat_jaxpr(function, *arguments):
    """Traces a function; calls inside it (jit, custom derivatives, remat) are written out.

    Args:
        function: takes and returns pytrees of arrays.
        *arguments: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        A closed jaxpr over the leaves of the arguments.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    return jax.make_jaxpr(functools.partial(_write_out, closed.jaxpr, closed.consts))(*closed.in_avals)


def _write_out(jaxpr, constants, *arguments):
    values = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        inner = _called(equation)
        if inner is None:
            results = equation.primitive.bind(*operands, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        else:
            results = _write_out(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), *operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _called(equation):
    if equation.primitive.name in ("scan", "while", "cond", "pallas_call", "shard_map"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        plain = getattr(inner, "jaxpr", inner)
        if hasattr(plain, "eqns") and len(plain.invars) == len(equation.invars):
            return inner
    return None


class Axes:
    """The dimensions of every array in a flat jaxpr, tied as its operations tie them.

    Args:
        closed: from `flat_jaxpr`.
        parameters: how many of the first arguments are parameters; axes of the others, and of the results, are pinned.
    """

    def __init__(self, closed, parameters: int):
        self.closed, jaxpr = closed, closed.jaxpr
        self._dims: dict = {}
        for variable in jaxpr.invars[parameters:]:
            self._pin_all([variable], Pin("it is an axis of an input"))
        for variable in jaxpr.constvars:
            self._pin_all([variable], Pin("a constant array of the function has this axis"))
        for equation in jaxpr.eqns:
            _rule(equation)(self, equation)
        self._pin_all(jaxpr.outvars, Pin("it is an axis of an output"))

    def of(self, variable) -> list[Dim]:
        """The dimensions of an array, one for each axis."""
        if isinstance(variable, Literal):
            return [Dim(size) for size in variable.aval.shape]
        if variable not in self._dims:
            self._dims[variable] = [Dim(size) for size in variable.aval.shape]
        return self._dims[variable]

    def set(self, variable, dims) -> None:
        """Ties the axes of an array to these dimensions."""
        for own, dim in zip(self.of(variable), dims, strict=True):
            tie(own, dim)

    def _pin_all(self, variables, reason: Pin) -> None:
        for variable in variables:
            for dim in self.of(variable):
                pin(dim, reason)


def _untraced(axes: Axes, equation) -> None:
    name = equation.primitive.name
    axes._pin_all([*equation.invars, *equation.outvars], Pin(f"the operation {name!r} is not traced", name))


def _elementwise(axes: Axes, equation) -> None:
    [result] = equation.outvars
    for operand in equation.invars:
        if operand.aval.ndim == 0:
            continue
        for dim, out in zip(axes.of(operand), axes.of(result), strict=True):
            if find(dim).size == find(out).size:
                tie(dim, out)


def _reduction(axes: Axes, equation) -> None:
    name, [operand], [result] = equation.primitive.name, equation.invars, equation.outvars
    reduced = equation.params["axes"]
    dims = axes.of(operand)
    axes.set(result, [dim for axis, dim in enumerate(dims) if axis not in reduced])
    if name != "reduce_sum":
        for axis in reduced:
            pin(dims[axis], Pin(f"{name!r} runs over it", name))


def _argument_of_extreme(axes: Axes, equation) -> None:
    dims, reduced = axes.of(equation.invars[0]), equation.params["axes"]
    axes.set(equation.outvars[0], [dim for axis, dim in enumerate(dims) if axis not in reduced])
    for axis in reduced:
        pin(dims[axis], Pin(f"{equation.primitive.name!r} numbers it"))


def _along_axis(axes: Axes, equation) -> None:
    name, [operand], [result] = equation.primitive.name, equation.invars, equation.outvars
    axes.set(result, axes.of(operand))
    pin(axes.of(operand)[equation.params["axis"]], Pin(f"{name!r} runs along it", name))


def _transpose(axes: Axes, equation) -> None:
    dims = axes.of(equation.invars[0])
    axes.set(equation.outvars[0], [dims[axis] for axis in equation.params["permutation"]])


def _broadcast(axes: Axes, equation) -> None:
    dims, out = axes.of(equation.invars[0]), axes.of(equation.outvars[0])
    for dim, axis in zip(dims, equation.params["broadcast_dimensions"], strict=True):
        if find(dim).size == find(out[axis]).size:
            tie(dim, out[axis])


def _reshape(axes: Axes, equation) -> None:
    if equation.params.get("dimensions") is not None:
        return _untraced(axes, equation)
    left = [dim for dim in axes.of(equation.invars[0]) if find(dim).size != 1]
    right = [dim for dim in axes.of(equation.outvars[0]) if find(dim).size != 1]
    while left and right:
        group_in, group_out = [left.pop(0)], [right.pop(0)]
        while _size(group_in) != _size(group_out):
            shorter, source = (group_in, left) if _size(group_in) < _size(group_out) else (group_out, right)
            shorter.append(source.pop(0))
        tie(product(group_out), product(group_in))
    return None


def _size(dims) -> int:
    return int(np.prod([find(dim).size for dim in dims]))


def _squeeze(axes: Axes, equation) -> None:
    dims = axes.of(equation.invars[0])
    gone = {axis % len(dims) for axis in equation.params["dimensions"]}
    axes.set(equation.outvars[0], [dim for axis, dim in enumerate(dims) if axis not in gone])


def _expand(axes: Axes, equation) -> None:
    out = axes.of(equation.outvars[0])
    new = {axis % len(out) for axis in equation.params["dimensions"]}
    for dim, own in zip(axes.of(equation.invars[0]), (d for a, d in enumerate(out) if a not in new), strict=True):
        tie(dim, own)


def _concatenate(axes: Axes, equation) -> None:
    along = equation.params["dimension"]
    for operand in equation.invars:
        for axis, (dim, out) in enumerate(zip(axes.of(operand), axes.of(equation.outvars[0]), strict=True)):
            if axis != along:
                tie(dim, out)
    joined = concatenation([axes.of(operand)[along] for operand in equation.invars])
    tie(axes.of(equation.outvars[0])[along], joined)


def _split(axes: Axes, equation) -> None:
    along, dims = equation.params["axis"], axes.of(equation.invars[0])
    parts = split(dims[along], equation.params["sizes"])
    for result, part in zip(equation.outvars, parts, strict=True):
        axes.set(result, [part if axis == along else dim for axis, dim in enumerate(dims)])


def _slice(axes: Axes, equation) -> None:
    params = equation.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    ends = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for dim, out, (start, stop, stride) in zip(
        axes.of(equation.invars[0]), axes.of(equation.outvars[0]), ends, strict=True
    ):
        size = find(dim).size
        if stride != 1:
            pin(dim, Pin("it is sliced with a stride", "slice"))
        elif stop - start == size:
            tie(dim, out)
        else:
            sizes = [start, stop - start, size - stop]
            parts = split(dim, [part for part in sizes if part])
            tie(parts[1 if start else 0], out)


def _pad(axes: Axes, equation) -> None:
    config = equation.params["padding_config"]
    dims, results = axes.of(equation.invars[0]), axes.of(equation.outvars[0])
    for dim, out, (low, high, interior) in zip(dims, results, config, strict=True):
        if interior or low < 0 or high < 0:
            pin(dim, Pin("it is padded inside, or cropped", "pad"))
            pin(out, Pin("it is padded inside, or cropped", "pad"))
            continue
        padding = [Dim(low), Dim(high)]
        tie(out, concatenation([padding[0], dim, padding[1]]))
        for part in padding:
            pin(part, Pin("it is padding"))


def _iota(axes: Axes, equation) -> None:
    pin(axes.of(equation.outvars[0])[equation.params["dimension"]], Pin("'iota' numbers it"))


def _flip(axes: Axes, equation) -> None:
    axes.set(equation.outvars[0], axes.of(equation.invars[0]))
    for axis in equation.params["dimensions"]:
        pin(axes.of(equation.invars[0])[axis], Pin("'rev' reverses it", "rev"))


def _dot(axes: Axes, equation) -> None:
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (axes.of(operand) for operand in equation.invars)
    for a, b in zip((*left_batch, *left_sum), (*right_batch, *right_sum), strict=True):
        tie(left[a], right[b])
    free = [dim for axis, dim in enumerate(left) if axis not in (*left_batch, *left_sum)]
    free += [dim for axis, dim in enumerate(right) if axis not in (*right_batch, *right_sum)]
    axes.set(equation.outvars[0], [left[axis] for axis in left_batch] + free)


def _convolution(axes: Axes, equation) -> None:
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    if equation.params["batch_group_count"] != 1:
        return _untraced(axes, equation)
    left, kernel = (axes.of(operand) for operand in equation.invars)
    out = axes.of(equation.outvars[0])
    tie(left[numbers.lhs_spec[0]], out[numbers.out_spec[0]])
    group = Dim(groups)
    features = kernel[numbers.rhs_spec[0]]
    tie(left[numbers.lhs_spec[1]], product([group, kernel[numbers.rhs_spec[1]]]))
    tie(features, product([group, Dim(find(features).size // groups)]))
    tie(features, out[numbers.out_spec[1]])
    for array, spec in ((left, numbers.lhs_spec), (kernel, numbers.rhs_spec), (out, numbers.out_spec)):
        for axis in spec[2:]:
            pin(array[axis], Pin("it is an axis of positions of a convolution"))
    return None


def _gather(axes: Axes, equation) -> None:
    params = equation.params
    numbers = params["dimension_numbers"]
    operand, out = axes.of(equation.invars[0]), axes.of(equation.outvars[0])
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    offsets = [axis for axis in range(len(operand)) if axis not in dropped]
    for axis, target in zip(offsets, numbers.offset_dims, strict=True):
        if params["slice_sizes"][axis] == find(operand[axis]).size and axis not in numbers.start_index_map:
            tie(operand[axis], out[target])
        else:
            pin(operand[axis], Pin("it is looked up by index"))
            pin(out[target], Pin("it is looked up by index"))
    for axis in dropped:
        pin(operand[axis], Pin("it is looked up by index"))
    for axis, dim in enumerate(out):
        if axis not in numbers.offset_dims:
            pin(dim, Pin("it is an axis of indices"))
    axes._pin_all(equation.invars[1:], Pin("it is an axis of indices"))


def _window(axes: Axes, equation) -> None:
    window = equation.params["window_dimensions"]
    for dim, out, size in zip(axes.of(equation.invars[0]), axes.of(equation.outvars[0]), window, strict=True):
        if size == 1 and find(dim).size == find(out).size:
            tie(dim, out)
        else:
            pin(dim, Pin("a window slides over it", equation.primitive.name))
            pin(out, Pin("a window slides over it", equation.primitive.name))


_RULES = {
    "argmax": _argument_of_extreme,
    "argmin": _argument_of_extreme,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "cumlogsumexp": _along_axis,
    "cummax": _along_axis,
    "cummin": _along_axis,
    "cumprod": _along_axis,
    "cumsum": _along_axis,
    "dot_general": _dot,
    "expand_dims": _expand,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _flip,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}


def _rule(equation):
    name = equation.primitive.name
    if name in ELEMENTWISE:
        return _elementwise
    if name in REDUCTIONS:
        return _reduction
    return _window if name in WINDOWS else _RULES.get(name, _untraced)
