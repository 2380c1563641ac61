"""A stored weight inside an NNX module, and models taken apart so that stored weights are whole."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from sparsejax.masks.paths import is_stored, path_name


class Indices(nnx.Variable):
    """Where the parts of a stored weight lie: never trained, moved by `sparsejax.nn.Optimizer`."""


class Probe(nnx.Param):
    """Zeros whose gradient says how large the gradients of absent blocks are; they stay zero."""


_KINDS = {"values": nnx.Param, "probe": Probe}


class SparseKernel(nnx.Module):
    """Holds a `BlockSparse` or an `NMSparse`: its values are an `nnx.Param`, where they lie is `Indices`.

    `nnx.grad` and `nnx.Optimizer` see the values only, so that a fixed pattern trains in any loop. Blocks that move
    need `sparsejax.nn.Optimizer`.

    Args:
        weight: the stored weight.

    Example:
        >>> import jax.numpy as jnp
        >>> from sparsejax.masks.nm import NM
        >>> from sparsejax.parameters import to_sparse
        >>> kernel = SparseKernel(to_sparse({"kernel": jnp.ones((8, 8))}, {"kernel": NM(2, 4).mask(jnp.ones((8, 8)))},
        ...                                 NM(2, 4))["kernel"])
        >>> kernel.weight
        NMSparse(float32[8,8], 2:4)
    """

    def __init__(self, weight):
        leaves, self.layout = jax.tree_util.tree_flatten_with_path(weight)
        self.names = tuple(path_name(path[-1:]) for path, _ in leaves)
        for name, (_, array) in zip(self.names, leaves, strict=True):
            setattr(self, name, _KINDS.get(name, Indices)(array))

    @property
    def weight(self):
        """The stored weight."""
        return self.layout.unflatten([getattr(self, name)[...] for name in self.names])


class Graph(NamedTuple):
    """What `split` keeps of a model beside its arrays; hashable.

    Attributes:
        graphdef: what `nnx.split` gave.
        kernels: path, names and layout of each stored weight.
    """

    graphdef: Any
    kernels: tuple


def find_kernels(model) -> tuple:
    """Path, names of the parts and layout of each `SparseKernel` in a model."""
    return tuple(
        (path, module.names, module.layout)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, SparseKernel)
    )


def split(model: nnx.Module, wrt=nnx.Param) -> tuple[Graph, dict, dict]:
    """Takes a model apart for plain JAX loops, with stored weights whole.

    Args:
        model: an NNX module.
        wrt: which variables are parameters.

    Returns:
        The graph; the parameters, a nested dict of arrays and stored weights, for `sparsejax.value_and_grad` and
        `sparsejax.apply_updates`; and the other variables.

    Example:
        >>> graph, params, rest = split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> sorted(params), type(merge(graph, params, rest)).__name__
        (['bias', 'kernel'], 'Linear')
    """
    graphdef, params, rest = nnx.split(model, wrt, ...)
    kernels = find_kernels(model)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    return Graph(graphdef, kernels), join(kernels, params, rest), _without(kernels, rest)


def merge(graph: Graph, params: dict, rest: dict) -> nnx.Module:
    """Puts together what `split` took apart."""
    return nnx.merge(graph.graphdef, part(graph.kernels, params, rest))


def join(kernels: tuple, params: dict, rest: dict) -> dict:
    """Parameters in which each stored weight is whole; those of which `params` has no part stay away."""
    joined = _copy(params)
    for path, names, layout in kernels:
        own, parent = _at(params, path), _at(joined, path[:-1])
        if own is None:
            continue
        parts = dict(_at(rest, path) or {}) | dict(own)
        weight = layout.unflatten([parts[name] for name in names])
        if not path:
            return weight
        parent[path[-1]] = weight
    return joined


def part(kernels: tuple, params: dict, rest: dict) -> dict:
    """All variables in one dict, each stored weight as its parts: undoes `join`."""
    parted = _merge(_copy(rest), params)
    for path, names, _ in kernels:
        weight = _at(parted, path)
        if is_stored(weight):
            parts = dict(zip(names, jax.tree.leaves(weight), strict=True))
            if not path:
                return parts
            _at(parted, path[:-1])[path[-1]] = parts
    return parted


def _without(kernels: tuple, rest: dict) -> dict:
    rest = _copy(rest)
    for path, _, _ in kernels:
        parent = _at(rest, path[:-1])
        if not path:
            return {}
        if isinstance(parent, dict):
            parent.pop(path[-1], None)
    return _pruned(rest)


def _pruned(tree):
    """Without the dicts that have become empty."""
    if not isinstance(tree, dict):
        return tree
    pruned = {key: _pruned(value) for key, value in tree.items()}
    return {key: value for key, value in pruned.items() if not (isinstance(value, dict) and not value)}


def _copy(tree):
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _merge(tree, other):
    for key, value in other.items():
        tree[key] = _merge(tree.get(key, {}), value) if isinstance(value, Mapping) else value
    return tree


def _at(tree, path):
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree
