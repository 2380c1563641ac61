"""Floating-point operations of a model's products, each attributed to the parameter that is multiplied."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import jax

from sparsejax.analysis.overlap import mask_overlap
from sparsejax.analysis.trace_products import count_products
from sparsejax.masks.paths import named_leaves


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass; a multiplication with its addition counts as 2.

    Attributes:
        layers: `{path: FLOPs}` for every parameter that is a factor of a product, sparse or dense.
        other: FLOPs of products without a parameter: of activations with each other, such as attention scores, or with
            constants.
        uncounted: operations whose insides can't be seen (kernels without a cost estimate, library calls), in the
            order met; their FLOPs are in neither figure.
    """

    layers: dict[str, int]
    other: int = 0
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All counted FLOPs."""
        return sum(self.layers.values()) + self.other


def layer_flops(fn, params, *inputs, while_trips: int | None = None, **kwargs) -> ForwardFlops:
    """Counts the FLOPs of `fn(params, *inputs)` by layer; the function is traced, nothing is computed.

    Counted are matrix products and convolutions, inside `jit`, `checkpoint`, custom derivatives, `scan` (times its
    length), `cond` (the costlier branch), `vmap` and `shard_map` (all devices together). Padding of a convolution
    counts as work, as is customary; the zeros that a transposed convolution puts between and around its inputs do not.
    Element-wise operations, reductions and look-ups count nothing.

    A product belongs to the parameter that one of its factors is computed from by any route that does not involve the
    inputs: reshaping, casting, masking, scaling, the slice of a stack that a scan takes. Boolean inputs are taken for
    masks and do not hide a parameter. Where a factor is made of several parameters (`w + a @ b`), or both factors are
    parameters, the largest parameter gets the product.

    Args:
        fn: the forward function.
        params: its parameters, any pytree of arrays or `jax.ShapeDtypeStruct`.
        *inputs: all that varies from call to call; arrays or `jax.ShapeDtypeStruct`. A batch of one example gives the
            inference FLOPs of an example.
        while_trips: how often a `while_loop` with products inside runs; its length is not in the trace.
        **kwargs: more inputs, passed by name.

    Returns:
        A `ForwardFlops`.

    Raises:
        ValueError: without inputs, or when a `while_loop` multiplies and `while_trips` is not given.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"hidden": jnp.zeros((64, 300)), "out": jnp.zeros((300, 10)), "bias": jnp.zeros(10)}
        >>> def forward(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["out"] + params["bias"]
        >>> layer_flops(forward, params, jax.ShapeDtypeStruct((1, 64), jnp.float32))
        ForwardFlops(layers={'hidden': 38400, 'out': 6000}, other=0, uncounted=())
    """
    if not jax.tree.leaves((inputs, kwargs)):
        raise ValueError(
            "layer_flops needs the model's inputs as arguments (arrays or jax.ShapeDtypeStruct): what is not passed "
            "can't be told from a parameter"
        )
    named = named_leaves(params)
    traced = jax.make_jaxpr(lambda params, inputs, kwargs: fn(params, *inputs, **kwargs))(params, inputs, kwargs)
    counts, uncounted = count_products(traced, [name for name, _ in named], while_trips)
    layers = {name: counts[name] for name, _ in named if name in counts}
    return ForwardFlops(layers, counts.get(None, 0), uncounted)


def sparse_flops(forward: ForwardFlops, masks) -> ForwardFlops:
    """The FLOPs that are left when each masked layer costs in proportion to its density.

    This is the accounting of the literature, reached only by hardware or kernels that skip zeros; dense compute on
    masked weights costs `forward`.

    Args:
        forward: dense counts, from `layer_flops`.
        masks: bool masks with `optax.MaskedNode()` at dense leaves, or `{path: kept fraction}` for a layout that is
            only planned.

    Returns:
        A `ForwardFlops` with each masked layer at `round(FLOPs * nnz / size)`.

    Raises:
        ValueError: when masks are not boolean arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> sparse_flops(ForwardFlops({"a": 100, "b": 60}), {"a": jnp.arange(10) < 1}).layers
        {'a': 10, 'b': 60}
    """
    if isinstance(masks, Mapping) and masks and all(isinstance(d, int | float | Fraction) for d in masks.values()):
        densities = {path: Fraction(density) for path, density in masks.items()}
    else:
        layers = mask_overlap(masks, masks).layers
        densities = {path: Fraction(c.nnz, c.size) for path, c in layers.items() if c.size}
    layers = {path: round(flops * densities.get(path, 1)) for path, flops in forward.layers.items()}
    return ForwardFlops(layers, forward.other, forward.uncounted)


def training_flops(forward: float, *, weight_gradient: float | None = None) -> float:
    """FLOPs of one training step: forward, gradient of the activations, gradient of the weights.

    The first two cost one forward pass each. The third costs one too when only active weights get a gradient (3 f_S,
    every step of a static mask, SET, magnitude pruning), and a dense forward pass f_D when the gradient of pruned
    weights is needed: RigL at its mask updates, straight-through methods at every step (2 f_S + f_D).

    Args:
        forward: FLOPs of the (sparse) forward pass, f_S, for the batch.
        weight_gradient: FLOPs of the weight gradients; `forward` when not given.

    Returns:
        `2 * forward + weight_gradient`.

    Example:
        >>> training_flops(10), training_flops(10, weight_gradient=100)
        (30, 120)

    References:
        Evci et al., Rigging the Lottery, ICML 2020, appendix H.
    """
    return 2 * forward + (forward if weight_gradient is None else weight_gradient)


def rigl_training_flops(sparse: float, dense: float, update_every: int) -> float:
    """Mean FLOPs of a RigL step: (3 f_S dT + 2 f_S + f_D) / (dT + 1).

    Args:
        sparse: forward FLOPs at the method's sparsity, f_S.
        dense: dense forward FLOPs, f_D.
        update_every: steps between mask updates, dT >= 1.

    Returns:
        The mean over a cycle of dT weight updates and one mask update, as a float.

    Raises:
        ValueError: when `update_every` is less than 1.

    Example:
        >>> rigl_training_flops(10, 100, update_every=100)
        30.89108910891089

    References:
        Evci et al., Rigging the Lottery, ICML 2020, appendix H.
    """
    if update_every < 1:
        raise ValueError(f"update_every must be at least 1, not {update_every}")
    cycle = update_every * training_flops(sparse) + training_flops(sparse, weight_gradient=dense)
    return cycle / (update_every + 1)
