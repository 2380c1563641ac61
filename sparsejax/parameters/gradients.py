"""Gradients and updates of trees in which some leaves are bookkeeping: indices are neither trained nor in the way."""

import functools

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks.paths import is_stored, named_leaves


def value_and_grad(function, argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False):
    """`jax.value_and_grad` for parameters that hold stored weights.

    Args:
        function: returns a real scalar, or with `has_aux` a pair of it and anything else.
        argnums: which arguments are differentiated.
        has_aux: as in `jax.value_and_grad`.

    Returns:
        A function like `function` that returns its value and the gradients: trees like the arguments, with zeros for
        the integers in them. The gradient of a `BlockSparse` has its values alone; see `to_dense`.

    Raises:
        ValueError: the indices of a stored weight are damaged, as weight decay of an optimizer without `sparsify`
            leaves them; see `apply_updates`. Under jit, where they cannot be looked at, the value is NaN.

    Example:
        >>> params = {"weight": jnp.array([1.0, 2.0]), "index": jnp.array([1, 0])}
        >>> value, grads = value_and_grad(lambda p: jnp.sum(p["weight"][p["index"]] ** 2))(params)
        >>> float(value), grads["weight"].tolist(), grads["index"].tolist()
        (5.0, [2.0, 4.0], [0, 0])
    """
    differentiate = jax.value_and_grad(function, argnums, has_aux=has_aux, allow_int=True)

    @functools.wraps(function)
    def value_and_gradients(*args, **kwargs):
        value, grads = differentiate(*args, **kwargs)
        like = args[argnums] if isinstance(argnums, int) else tuple(args[index] for index in argnums)
        value = (_checked(value[0], like), value[1]) if has_aux else _checked(value, like)
        return value, jax.tree.map(_zero_for_integers, grads, like)

    return value_and_gradients


def _checked(value, tree):
    """The value; NaN, or an error where they can be looked at, if indices of stored weights in the tree are damaged."""
    weights = {path: leaf for path, leaf in named_leaves(tree, is_stored) if is_stored(leaf)}
    if not weights:
        return value
    intact = jnp.stack([weight.intact for weight in weights.values()])
    if isinstance(intact, jax.core.Tracer):
        return jnp.where(jnp.all(intact), value, jnp.nan)
    for (path, weight), whole in zip(weights.items(), jax.device_get(intact), strict=True):
        if not whole:
            raise ValueError(
                f"{path}: {weight} has damaged indices: an optimizer took them for weights. Wrap it in "
                "sparsejax.sparsify, with from_masks(masks) where blocks stay, or use sparsejax.apply_updates"
            )
    return value


def _zero_for_integers(gradient, leaf):
    return jnp.zeros_like(leaf) if gradient.dtype == jax.dtypes.float0 else gradient


def apply_updates(params, updates):
    """Adds updates to parameters; those of stored weights also move their blocks.

    What `sparsify` says of indices are whole differences, so that after it `optax.apply_updates`, which other loops
    call, does the same. An optimizer without `sparsify` takes indices for weights, and its weight decay would shrink
    them: this function lets no such update through, `optax.apply_updates` does. So wrap the optimizer also where blocks
    stay where they are, `sparsify(optax.adamw(1e-3), from_masks(masks))`, or call this function.

    Args:
        params: the parameters.
        updates: what `update` of the optimizer returned.

    Returns:
        The new parameters.

    Example:
        >>> apply_updates({"weight": jnp.array([1.0])}, {"weight": jnp.array([0.5])})["weight"].tolist()
        [1.5]
    """
    return optax.apply_updates(params, jax.tree.map(_whole, updates, params))


def _whole(update, leaf):
    whole, index = (jnp.issubdtype(jnp.result_type(value), jnp.integer) for value in (update, leaf))
    return jnp.zeros_like(leaf) if index and not whole else update
