"""Walks a traced function and counts the products in it, following every parameter to the products it enters.

Each value has an origin: `CONSTANT`, the index of a parameter leaf, or `DATA` once an input had a part in it. Origins
form a chain, constant < parameter (the larger leaf wins) < data, and what an operation computes has the highest origin
of its operands. Loop carries are iterated until their origins stay the same; the chain is short, so that ends soon.
"""

import math
from collections import Counter

import numpy as np
from jax.extend.core import Literal

CONSTANT, DATA = -1, math.inf


def count_products(traced, names: list[str], while_trips: int | None = None) -> tuple[dict, tuple[str, ...]]:
    """Counts the FLOPs of the matrix products and convolutions in a jaxpr.

    Args:
        traced: what `jax.make_jaxpr` returned; its first `len(names)` arguments are the parameters.
        names: names of the parameter leaves.
        while_trips: assumed iterations of every `while_loop` that contains products.

    Returns:
        `({name, or None for products of activations: FLOPs}, opaque operations in the order met)`.

    Raises:
        ValueError: when a `while_loop` contains products and `while_trips` is None.
    """
    variables = traced.jaxpr.invars
    sizes = [variable.aval.size for variable in variables[: len(names)]]
    # Position in order of size is the leaf's place in the chain; of equal leaves the later one counts as larger.
    order = sorted(range(len(names)), key=sizes.__getitem__)
    place = {leaf: position for position, leaf in enumerate(order)}
    origins = [
        place[i] if i < len(names) else CONSTANT if variable.aval.dtype == bool else DATA
        for i, variable in enumerate(variables)
    ]
    walk = _Walk(while_trips)
    counts, _ = walk.jaxpr(traced, origins)
    by_name = Counter()
    for origin, flops in counts.items():
        by_name[None if origin in (CONSTANT, DATA) else names[order[origin]]] += flops
    return dict(by_name), tuple(dict.fromkeys(walk.opaque))


class _Walk:
    def __init__(self, while_trips):
        self.while_trips = while_trips
        self.opaque = []

    def jaxpr(self, jaxpr, origins) -> tuple[Counter, list]:
        """Returns the FLOPs by origin, and the origins of the results."""
        # Up to JAX 0.10 an inner jaxpr may be closed, later it never is: `.jaxpr` is the plain one in all of them.
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        origin = dict.fromkeys(jaxpr.constvars, CONSTANT) | dict(zip(jaxpr.invars, origins, strict=True))
        total = Counter()
        for equation in jaxpr.eqns:
            operands = [CONSTANT if isinstance(v, Literal) else origin[v] for v in equation.invars]
            counts, results = self.equation(equation, operands)
            total.update(counts)
            origin.update(zip(equation.outvars, results, strict=True))
        return total, [CONSTANT if isinstance(v, Literal) else origin[v] for v in jaxpr.outvars]

    def equation(self, equation, operands) -> tuple[Counter, list]:
        name, params = equation.primitive.name, equation.params
        if name in _PRODUCTS:
            # The parameter is what is not data; a product without one belongs to nobody.
            parameters = [o for o in operands[:2] if o not in (CONSTANT, DATA)]
            return Counter({max(parameters, default=DATA): _PRODUCTS[name](equation)}), [max(operands)]
        highest = [max(operands, default=CONSTANT)] * len(equation.outvars)
        if name == "cond":
            return self.cond(params["branches"], operands[1:], operands[0])
        if name == "while":
            return self.while_loop(params, operands)
        if name == "pallas_call":
            return self.kernel(equation, operands), highest
        inner = _inner_jaxprs(params)
        if name == "scan":
            return self.scan(inner[0], equation, operands)
        if len(inner) == 1 and len(inner[0].invars) == len(operands) and len(inner[0].outvars) == len(highest):
            counts, results = self.jaxpr(inner[0], operands)
            return _times(counts, _devices(params)), results
        if name in _LIBRARY_CALLS or any(self.jaxpr(j, [DATA] * len(j.invars))[0] for j in inner):
            self.opaque.append(name)
        return Counter(), highest

    def cond(self, branches, operands, index) -> tuple[Counter, list]:
        walked = [self.jaxpr(branch, operands) for branch in branches]
        results = [max(column) for column in zip(*(origins for _, origins in walked), strict=True)]
        # Which branch runs may depend on the input, and then so do the results.
        results = [max(origin, index) for origin in results]
        return max((counts for counts, _ in walked), key=lambda counts: sum(counts.values())), results

    def scan(self, body, equation, operands) -> tuple[Counter, list]:
        # Constants and carries have the same shape inside and outside; what is scanned over, or stacked, has not.
        same = [o.aval.shape == b.aval.shape for o, b in zip(equation.outvars, body.outvars, strict=True)]
        carries = same.count(True)
        same = [o.aval.shape == b.aval.shape for o, b in zip(equation.invars, body.invars, strict=True)]
        counts, results = self.loop(body, operands, same.count(True) - carries, carries)
        return _times(counts, equation.params["length"]), results

    def while_loop(self, params, operands) -> tuple[Counter, list]:
        test, body = params["cond_nconsts"], params["body_nconsts"]
        counts, results = self.loop(params["body_jaxpr"], operands[test:], body, len(operands) - test - body)
        tests, _ = self.jaxpr(params["cond_jaxpr"], operands[:test] + results)
        if counts + tests and self.while_trips is None:
            raise ValueError(
                "a while_loop multiplies, and how often it runs is not known before it does: pass while_trips="
            )
        trips = self.while_trips or 0
        return _times(counts, trips) + _times(tests, trips + 1), results

    def loop(self, body, operands, constants, carries) -> tuple[Counter, list]:
        operands = list(operands)
        slots = slice(constants, constants + carries)
        while True:
            counts, results = self.jaxpr(body, operands)
            carried = [max(pair) for pair in zip(operands[slots], results[:carries], strict=True)]
            if carried == operands[slots]:
                return counts, carried + results[carries:]
            operands[slots] = carried

    def kernel(self, equation, operands) -> Counter:
        estimate = equation.params.get("cost_estimate")
        if estimate is None:
            self.opaque.append(str(equation.params.get("name") or "pallas_call"))
            return Counter()
        parameters = [o for o in operands if o not in (CONSTANT, DATA)]
        return Counter({max(parameters, default=DATA): estimate.flops})


def _inner_jaxprs(params) -> list:
    """The functions among an equation's parameters, alone or in tuples."""
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    found = [getattr(value, "jaxpr", value) for value in values]
    return [jaxpr for jaxpr in found if hasattr(jaxpr, "eqns") and hasattr(jaxpr, "invars")]


def _times(counts: Counter, factor: int) -> Counter:
    return Counter({origin: flops * factor for origin, flops in counts.items()})


def _devices(params) -> int:
    """How many devices each run the body: more than one in a `shard_map`, whose body sees one device's part."""
    axes = params.get("newly_manual_axes", ())
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def _dot(equation) -> int:
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * out.size * math.prod(left.shape[axis] for axis in contracted)


def _ragged_dot(equation) -> int:
    left, _, groups = (variable.aval for variable in equation.invars[:3])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    flops = 2 * equation.outvars[0].aval.size * math.prod(left.shape[axis] for axis in contracted)
    # Every row belongs to one group: with the rows summed over, each group's result comes from its own rows alone.
    return flops // groups.size if set(numbers.lhs_ragged_dimensions) & set(contracted) else flops


def _convolution(equation) -> int:
    params = equation.params
    left, kernel, out = *(variable.aval for variable in equation.invars), equation.outvars[0].aval
    numbers = params["dimension_numbers"]
    _, features, *window = numbers.rhs_spec
    pairs = out.shape[numbers.out_spec[0]] * out.shape[numbers.out_spec[1]] * kernel.shape[features]
    for i, axis in enumerate(window):
        outputs, taps = out.shape[numbers.out_spec[2 + i]], kernel.shape[axis]
        stride, dilation, holes = params["window_strides"][i], params["rhs_dilation"][i], params["lhs_dilation"][i]
        if holes == 1:
            pairs *= outputs * taps
            continue
        # Of a transposed convolution only the taps that meet an input count: it puts zeros between and around them.
        last = (left.shape[numbers.lhs_spec[2 + i]] - 1) * holes
        starts = np.arange(outputs) * stride - params["padding"][i][0]
        meets = (starts + tap * dilation for tap in range(taps))
        pairs *= sum(int(np.sum((at % holes == 0) & (at >= 0) & (at <= last))) for at in meets)
    return 2 * pairs


_PRODUCTS = {"dot_general": _dot, "ragged_dot_general": _ragged_dot, "conv_general_dilated": _convolution}
_LIBRARY_CALLS = frozenset({"ffi_call", "custom_call", "pure_callback", "io_callback", "custom_linear_solve"})
