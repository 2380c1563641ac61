"""Proximal steps as chain elements: L1 and group lasso make weights exactly zero, and keep them there."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.masks.channel import Channel
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.masks.rules import resolve
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology.leaves import unit_views
from sparsejax.transforms.penalties import check_params, check_strength


class ProximalState(NamedTuple):
    """The state of proximal elements: the number of updates so far, int32, that a learning rate schedule is read at."""

    proximal_step: jax.Array


def proximal_l1(
    strength: float, learning_rate: optax.ScalarOrSchedule, *, rules=None
) -> optax.GradientTransformationExtraArgs:
    r"""Soft thresholding after the optimizer's step: the proximal map of :math:`\lambda \|w\|_1`.

    With :math:`u` the update that reaches it and :math:`t = \eta \lambda`,

    .. math:: w \leftarrow \mathrm{sign}(w + u) \, \max(|w + u| - t, 0)

    emitted as the update :math:`u' = \mathrm{prox}(w + u) - w`, which is exactly :math:`-w` where the result is 0.
    Zeros are exact, and stay while the optimizer moves them by no more than :math:`t`. It must be the last element
    that changes values, with the learning rate that the optimizer before it has:
    `optax.chain(optax.adam(1e-3), proximal_l1(1e-2, 1e-3))`. Behind Adam the threshold is the plain
    :math:`\eta \lambda`, decoupled from the gradients' scale as weight decay is in AdamW.

    The mask is implied: `masks_from_params` reads it off. Inside `sparsify` it shrinks the weights under the mask.

    Args:
        strength: lambda.
        learning_rate: eta, a number or an optax schedule of the number of updates.
        rules: which leaves are thresholded, as in `sparsify`. Where the extra argument `masks=` is given, as inside
            `sparsify`, these are the leaves that have a mask.

    Returns:
        An optax transformation. Updates have the wider of the dtypes of update and parameter. Its `update` needs
        `params`.

    Raises:
        ValueError: `strength` or a constant `learning_rate` is negative or not finite; at `update`, `params` is
            missing or the rules do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> element = proximal_l1(strength=10.0, learning_rate=0.1)
        >>> params = {"kernel": jnp.array([[3.0, 4.0], [-0.5, -2.0]])}
        >>> updates, _ = element.update({"kernel": jnp.zeros((2, 2))}, element.init(params), params)
        >>> (params["kernel"] + updates["kernel"]).tolist()
        [[2.0, 3.0], [0.0, -1.0]]

    References:
        Parikh & Boyd, Proximal Algorithms, 2014, section 6.5
    """

    def shrink(params, masks):
        if masks is None:
            plan = resolve(params, rules, Unstructured())
            paths = {leaf.path for leaf in plan if leaf.structure is not None}
        else:
            paths = {path for path, _ in named_leaves(masks)}
        return dict.fromkeys(paths, _soft_threshold)

    return _proximal("proximal_l1", strength, learning_rate, shrink)


def group_lasso(
    strength: float,
    learning_rate: optax.ScalarOrSchedule,
    *,
    structure=Channel(),
    weighted: bool = True,
    rules=None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks whole groups after the step: the proximal map of :math:`\lambda \sum_G \sqrt{|G|} \|w_G\|_2`.

    With :math:`v = w + u` and :math:`\eta` the learning rate,

    .. math:: w_G \leftarrow v_G \, \max\!\left(0, 1 - \frac{\eta \lambda \sqrt{|G|}}{\|v_G\|_2}\right)

    emitted as :math:`u' = \mathrm{prox}(w + u) - w`, exactly :math:`-w` where a group vanishes. Groups are the units of
    a structure: output channels, blocks, or single elements, for which it equals `proximal_l1`. Like that it must be
    the last element that changes values, and its mask is implied.

    Args:
        strength: lambda.
        learning_rate: eta, a number or an optax schedule of the number of updates.
        structure: the groups: `Channel(axis)` or `Block(shape)`.
        weighted: scale the threshold of a group by the root of its size, so that groups of all sizes are treated
            alike; False leaves out the root.
        rules: which leaves are shrunk, and structures for some of them, as in `sparsify`. Where the extra argument
            `masks=` is given, as inside `sparsify`, only leaves that have a mask are shrunk.

    Returns:
        An optax transformation. Updates have the wider of the dtypes of update and parameter. Its `update` needs
        `params`.

    Raises:
        ValueError: as `proximal_l1`; also for an N:M structure, whose groups are never empty.

    Example:
        >>> import jax.numpy as jnp
        >>> element = group_lasso(strength=50.0, learning_rate=0.1, weighted=False)
        >>> params = {"kernel": jnp.array([[6.0, 1.0], [8.0, -3.0]])}
        >>> updates, _ = element.update({"kernel": jnp.zeros((2, 2))}, element.init(params), params)
        >>> (params["kernel"] + updates["kernel"]).tolist()
        [[3.0, 0.0], [4.0, 0.0]]

    References:
        Yuan & Lin, Model selection and estimation in regression with grouped variables, 2006
    """

    def shrink(params, masks):
        views = unit_views(resolve(params, rules, structure))
        if masks is not None:
            masked = {path for path, _ in named_leaves(masks)}
            views = {path: view for path, view in views.items() if path in masked}
        return {path: _group_shrinkage(path, view, weighted) for path, view in views.items()}

    return _proximal("group_lasso", strength, learning_rate, shrink)


def _proximal(name: str, strength, learning_rate, shrink) -> optax.GradientTransformationExtraArgs:
    """Builds the element; `shrink(params, masks) -> {path: function(value, threshold)}` says what is shrunk and how."""
    check_strength(name, "strength", strength)
    check_strength(name, "learning_rate", learning_rate)

    def init(params):
        return ProximalState(proximal_step=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, masks=None, **extra_args):
        check_params(name, params)
        rate = learning_rate(state.proximal_step) if callable(learning_rate) else learning_rate
        shrinkages = shrink(params, masks)

        def emit(path, u, w):
            if path not in shrinkages:
                return u
            moved = w + u
            shrunk = shrinkages[path](moved.astype(jnp.promote_types(moved.dtype, jnp.float32)), rate * strength)
            # The dtype of w + u is never narrower than that of w, so that w - w comes out as exactly 0.
            return jnp.where(shrunk == 0, -w.astype(moved.dtype), shrunk.astype(moved.dtype) - w)

        return map_with_names(emit, updates, params), ProximalState(optax.safe_increment(state.proximal_step))

    return optax.GradientTransformationExtraArgs(init, update)


def _soft_threshold(value, threshold):
    return jnp.sign(value) * jnp.maximum(jnp.abs(value) - threshold, 0)


def _group_shrinkage(path: str, view, weighted: bool):
    structure = view.structure
    if structure.fixed_density is not None:
        raise ValueError(
            f"{path}: group_lasso empties whole groups, which {structure} does not allow; use Channel or Block"
        )
    if hasattr(structure, "pooling"):
        structure = dataclasses.replace(structure, pooling="mean")
    layer_shape = view.roles.matrix_shape(view.shape)[-2:]
    sizes = _group_sizes(structure, layer_shape).astype(np.float32)

    def shrink_layer(value, threshold):
        norm = jnp.sqrt(structure.pool(jnp.square(value)) * sizes)
        limit = threshold * np.sqrt(sizes) if weighted else threshold
        stays = norm > limit
        factor = jnp.where(stays, 1 - limit / jnp.where(stays, norm, 1), 0)
        return value * structure.spread(factor, layer_shape)

    def shrink(value, threshold):
        matrices = view.over_layers(lambda layer: shrink_layer(layer, threshold))(view.roles.to_matrix(value))
        return view.roles.from_matrix(matrices, view.shape)

    return shrink


def _group_sizes(structure, shape: tuple[int, ...]) -> np.ndarray:
    """Number of elements in every unit of a matrix; blocks at the edge may be smaller."""
    sizes = np.ones((), np.int64)
    for axis, (length, units) in enumerate(zip(shape, structure.grid(shape), strict=True)):
        extent = length if units == 1 else 1 if units == length else structure.shape[axis]
        sizes = np.multiply.outer(sizes, np.minimum(extent, length - extent * np.arange(units)))
    return sizes
