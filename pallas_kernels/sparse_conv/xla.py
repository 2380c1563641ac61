"""Convolution over rows in plain JAX: work follows the pairs that there are, forward and backward.

For every tap a loop of dynamic length runs over pieces of its list: gather rows, multiply, add to the rows of the
result. A row is met at most once in a tap, so every step adds to distinct rows and sums have one order: results are the
same bits in every run. The derivative by the weights only gathers. To gather all rows for every tap, and add nothing to
single rows, takes longer on CPUs, except where most neighbours are there.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_conv.lists import KernelMap, PairLists, pair_lists
from pallas_kernels.sparse_conv.reference import accumulator, rows_of, times

# Pairs of one step: enough for a matrix product to be worth its gather, few enough to waste little at a tap's end.
_STEP_PAIRS = 512


def supports(x: jax.Array, weights: jax.Array, kernel_map: KernelMap, groups: int) -> str | None:
    """None: it runs everywhere."""
    del x, weights, kernel_map, groups


def forward(x: jax.Array, weights: jax.Array, kernel_map: KernelMap, groups: int) -> jax.Array:
    """Adds up every tap's pairs, in the accumulation type."""
    lists, rows = pair_lists(kernel_map), kernel_map.capacity_out
    step = _step(lists)

    def tap(out, inputs):
        sources, targets, count, kernel = inputs

        def piece(number, out):
            source, target = _piece(sources, number, step), _piece(targets, number, step)
            product = times(rows_of(x, source), kernel, groups)
            # What is behind the list goes to rows that do not exist, each to another one.
            target = jnp.where(target < rows, target, rows + jnp.arange(step))
            return out.at[target].add(product, mode="drop", unique_indices=True, indices_are_sorted=True)

        return jax.lax.fori_loop(0, _pieces(count, step), piece, out), None

    return jax.lax.scan(tap, jnp.zeros((rows, weights.shape[-1]), accumulator(x)), (*lists, weights))[0]


def weight_gradient(
    x: jax.Array, gradient: jax.Array, kernel_map: KernelMap, shape: tuple[int, int, int], groups: int
) -> jax.Array:
    """For every tap the sum over its pairs of rows of x times rows of the gradient, in the accumulation type."""
    lists, kind, (_, inputs, outputs) = pair_lists(kernel_map), accumulator(x), shape
    step = _step(lists)

    def tap(_, lists):
        sources, targets, count = lists

        def piece(number, total):
            left = rows_of(x, _piece(sources, number, step)).reshape(step, groups, inputs)
            right = rows_of(gradient, _piece(targets, number, step)).reshape(step, groups, outputs // groups)
            if groups == 1:
                product = jnp.dot(left[:, 0].T, right[:, 0], preferred_element_type=kind)
            else:
                product = jnp.einsum("ngi,ngo->igo", left, right, preferred_element_type=kind)
            return total + product.reshape(inputs, outputs)

        return None, jax.lax.fori_loop(0, _pieces(count, step), piece, jnp.zeros((inputs, outputs), kind))

    return jax.lax.scan(tap, None, lists)[1]


def _step(lists: PairLists) -> int:
    return max(1, min(_STEP_PAIRS, lists.sources.shape[1]))


def _pieces(count, step: int):
    return (count + step - 1) // step


def _piece(rows, number, step: int):
    """The piece of a list; where the list is no multiple of the step, the last one reads beyond its end."""
    at = number * step + jnp.arange(step)
    return rows_of(rows, at, np.iinfo(np.int32).max)
