"""Convolution over rows in plain JAX: work follows the pairs that there are, forward and backward.

For every tap a loop of dynamic length runs over pieces of its list: gather rows, multiply, add to the rows of the
result. A row is met at most once in a tap, so every step adds to distinct rows and sums have one order: results are the
same bits in every run. The derivative by the input is the same operator with lists swapped and weights transposed, the
one by the weights only gathers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_conv.lists import PairLists
from pallas_kernels.sparse_conv.reference import accumulator, times

# Pairs of one step: enough for a matrix product to be worth its gather, few enough to waste little at a tap's end.
_STEP_PAIRS = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def convolve(x: jax.Array, weights: jax.Array, lists: PairLists, groups: int) -> jax.Array:
    """Adds up every tap's pairs, in the accumulation type."""
    step = _step(lists)

    def tap(out, inputs):
        sources, targets, count, kernel = inputs

        def piece(number, out):
            source, target = _piece(sources, number, step), _piece(targets, number, step)
            product = times(_rows(x, source), kernel, groups)
            # What is behind the list goes to rows that do not exist, each to another one.
            target = jnp.where(target < lists.capacity_out, target, lists.capacity_out + jnp.arange(step))
            return out.at[target].add(product, mode="drop", unique_indices=True, indices_are_sorted=True)

        return jax.lax.fori_loop(0, _pieces(count, step), piece, out), None

    out = jnp.zeros((lists.capacity_out, weights.shape[-1]), accumulator(x))
    out, _ = jax.lax.scan(tap, out, (lists.sources, lists.targets, lists.counts, weights))
    return out


def _forward(x, weights, lists, groups):
    return convolve(x, weights, lists, groups), (x, weights, lists)


def _backward(groups, saved, gradient):
    x, weights, lists = saved
    dx = convolve(gradient.astype(x.dtype), _transposed(weights, groups), lists.T, groups).astype(x.dtype)
    dw = _weight_gradient(x, gradient.astype(x.dtype), lists, weights.shape, groups).astype(weights.dtype)
    return dx, dw, jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), lists)


convolve.defvjp(_forward, _backward)


def _weight_gradient(x, gradient, lists, shape, groups):
    step = _step(lists)
    kind = accumulator(x)
    _, inputs, outputs = shape

    def tap(_, lists):
        sources, targets, count = lists

        def piece(number, total):
            left = _rows(x, _piece(sources, number, step)).reshape(step, groups, inputs)
            right = _rows(gradient, _piece(targets, number, step)).reshape(step, groups, outputs // groups)
            if groups == 1:
                product = jnp.dot(left[:, 0].T, right[:, 0], preferred_element_type=kind)
            else:
                product = jnp.einsum("ngi,ngo->igo", left, right, preferred_element_type=kind)
            return total + product.reshape(inputs, outputs)

        return None, jax.lax.fori_loop(0, _pieces(count, step), piece, jnp.zeros((inputs, outputs), kind))

    return jax.lax.scan(tap, None, (lists.sources, lists.targets, lists.counts))[1]


def _transposed(weights, groups):
    taps, inputs, outputs = weights.shape
    split = weights.reshape(taps, inputs, groups, outputs // groups)
    return split.transpose(0, 3, 2, 1).reshape(taps, outputs // groups, groups * inputs)


def _step(lists: PairLists) -> int:
    return max(1, min(_STEP_PAIRS, lists.sources.shape[1]))


def _pieces(count, step: int):
    return (count + step - 1) // step


def _piece(rows, number, step: int):
    """The piece of a list; where the list is no multiple of the step, the last one reads beyond its end."""
    at = number * step + jnp.arange(step)
    return jnp.take(rows, at, mode="fill", fill_value=np.iinfo(np.int32).max)


def _rows(x, rows):
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)
