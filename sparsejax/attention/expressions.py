"""Integer expressions over named arrays, of which the rules of masks are made, and the bounds of their values.

A plain int is an expression, too. The arrays behind the names are given when an expression is evaluated:
as arrays, or as pairs of the least and the greatest value.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
Bounds = Mapping[str, tuple[Array, Array]]


def namespace(*values):
    """`jax.numpy` if one of the values is a JAX array, else `numpy`: host compilation must not touch a device."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


@dataclasses.dataclass(frozen=True)
class Vector:
    """The values of the array called `name`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Plus:
    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Minus:
    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class FloorDivide:
    a: Any
    divisor: int


@dataclasses.dataclass(frozen=True)
class Remainder:
    a: Any
    divisor: int


QUERY = Vector("q_pos")
KEY = Vector("kv_pos")


def value(expression, values: Mapping[str, Array]):
    """Value of an integer expression, given the arrays behind its names."""
    match expression:
        case Vector(name):
            return values[name]
        case Plus(a, b):
            return value(a, values) + value(b, values)
        case Minus(a, b):
            return value(a, values) - value(b, values)
        case FloorDivide(a, divisor):
            return value(a, values) // divisor
        case Remainder(a, divisor):
            return value(a, values) % divisor
    return expression


def bounds_of(expression, bounds: Bounds) -> tuple[Array, Array]:
    """Least and greatest value of an integer expression, by interval arithmetic."""
    match expression:
        case Vector(name):
            return bounds[name]
        case Plus(a, b):
            (a_low, a_high), (b_low, b_high) = bounds_of(a, bounds), bounds_of(b, bounds)
            return a_low + b_low, a_high + b_high
        case Minus(a, b):
            (a_low, a_high), (b_low, b_high) = bounds_of(a, bounds), bounds_of(b, bounds)
            return a_low - b_high, a_high - b_low
        case FloorDivide(a, divisor):
            low, high = bounds_of(a, bounds)
            return low // divisor, high // divisor
        case Remainder(a, divisor):
            low, high = bounds_of(a, bounds)
            whole = low // divisor == high // divisor
            xp = namespace(low, high)
            return xp.where(whole, low % divisor, 0), xp.where(whole, high % divisor, divisor - 1)
    return expression, expression
