"""What the functions of this package demand of arguments: arrays of a kind and shape, whole numbers."""

import operator
from typing import Any

import jax.numpy as jnp

_KINDS = {jnp.floating: "floating", jnp.integer: "integer", jnp.bool_: "bool"}


def check_array(name: str, array: Any, kind: Any = jnp.floating, shape: tuple[int, ...] | None = None) -> None:
    """Raises a ValueError if `array` is none, or not of this kind (floating, integer, bool_) and shape (None: any)."""
    if not hasattr(array, "dtype"):
        raise ValueError(f"{name} is a {type(array).__name__}; it must be an array")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} is {array.dtype}; it must be {_KINDS[kind]}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")


def check_features(channels: int, **vectors: Any) -> None:
    """Raises a ValueError if one of the named vectors, unless it is None, has not one number for each channel."""
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} has shape {vector.shape}; {channels} channels need ({channels},)")


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int; a ValueError if it is none, or below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return number
