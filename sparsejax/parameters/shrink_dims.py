"""Sizes of axes as things that can be tied: whole, a product of factors (a reshape), a sum of parts (a concatenation).

An axis of 64 features that a model reshapes to 4 heads of 16 is the product of two dimensions, and pruning a head
removes 16 of its indices. Dimensions that a computation lines up are tied: cutting one cuts all.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pin:
    """Why a dimension keeps its size.

    Args:
        reason: in words.
        primitive: the operation that could not be traced; "" where the reason is another one.
    """

    reason: str
    primitive: str = ""


class Dim:
    """A dimension: `children` and `joint` say what it consists of, `pins` why it must stay.

    Args:
        size: its size.
        joint: "" for a whole one, "product" or "sum" of `children`.
        children: dimensions.
    """

    def __init__(self, size: int, joint: str = "", children: tuple["Dim", ...] = ()):
        self.size, self.joint, self.children = size, joint, children
        self.pins: list[Pin] = []
        self.tied_to: Dim | None = None


def find(dim: Dim) -> Dim:
    """The dimension that stands for all that are tied to this one."""
    while dim.tied_to is not None:
        dim = dim.tied_to
    return dim


def product(dims) -> Dim:
    """One axis of several, the first one major."""
    factors = [factor for dim in dims for factor in _flat(dim, "product") if factor.size != 1]
    if len(factors) < 2:
        return factors[0] if factors else Dim(1)
    return Dim(math.prod(factor.size for factor in factors), "product", tuple(factors))


def concatenation(dims) -> Dim:
    """One axis of several, one after the other."""
    parts = [part for dim in dims for part in _flat(dim, "sum") if part.size]
    if len(parts) < 2:
        return parts[0] if parts else Dim(0)
    return Dim(sum(part.size for part in parts), "sum", tuple(parts))


def wholes(dim: Dim) -> list[Dim]:
    """The whole dimensions of which one consists."""
    dim = find(dim)
    return [whole for child in dim.children for whole in wholes(child)] if dim.joint else [dim]


def pin(dim: Dim, reason: Pin) -> None:
    """Lets a dimension, and all that it consists of, keep its size."""
    for whole in wholes(dim):
        if reason not in whole.pins:
            whole.pins.append(reason)


def tie(a: Dim, b: Dim) -> None:
    """Ties two dimensions of one size; where their parts do not line up, both are pinned."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise AssertionError(f"cannot tie {a.size} and {b.size}")
    if a.joint and not b.joint:
        a, b = b, a
    if not a.joint:
        if any(find(whole) is a for whole in wholes(b)):
            return
        a.tied_to = b
        for reason in a.pins:
            pin(b, reason)
    elif a.joint != b.joint or not _line_up(a, b):
        crossed = Pin("parts of it are grouped in two ways that do not line up", "reshape")
        pin(a, crossed)
        pin(b, crossed)


def split(dim: Dim, sizes) -> list[Dim]:
    """The consecutive parts of a dimension with these sizes, tied to it."""
    parts = [Dim(size) for size in sizes]
    tie(dim, concatenation(parts))
    return parts


def kept_indices(dim: Dim, kept: dict[Dim, np.ndarray]) -> np.ndarray:
    """Which indices of an axis stay: bool, from what stays of the whole dimensions; all where `kept` is silent."""
    dim = find(dim)
    if dim.joint == "sum":
        return np.concatenate([kept_indices(child, kept) for child in dim.children])
    if dim.joint == "product":
        result = np.ones(1, bool)
        for child in dim.children:
            result = np.outer(result, kept_indices(child, kept)).reshape(-1)
        return result
    return kept.get(dim, np.ones(dim.size, bool))


def units_of_indices(dim: Dim) -> list[tuple[Dim, np.ndarray]]:
    """For each whole dimension in an axis, which of its units each index of the axis belongs to; -1 for none."""
    dim = find(dim)
    if not dim.joint:
        return [(dim, np.arange(dim.size))]
    found, before, size = [], 1, 0
    for child in dim.children:
        child = find(child)
        after = dim.size // (before * child.size) if dim.joint == "product" else 0
        for whole, units in units_of_indices(child):
            if dim.joint == "product":
                spread = np.tile(np.repeat(units, after), before)
            else:
                spread = np.full(dim.size, -1)
                spread[size : size + child.size] = units
            found.append((whole, spread))
        before, size = before * child.size, size + child.size
    return found


def _flat(dim: Dim, joint: str) -> list[Dim]:
    dim = find(dim)
    return [part for child in dim.children for part in _flat(child, joint)] if dim.joint == joint else [dim]


def _line_up(a: Dim, b: Dim) -> bool:
    joint = a.joint
    left, right = _flat(a, joint), _flat(b, joint)
    while left and right:
        first, second = find(left[0]), find(right[0])
        if first.joint == joint or second.joint == joint:  # tied meanwhile to something that has parts
            left[:1], right[:1] = _flat(first, joint), _flat(second, joint)
        elif first.size == second.size:
            tie(first, second)
            del left[0], right[0]
        elif not _divide(*sorted((first, second), key=lambda dim: dim.size, reverse=True), joint):
            return False
    return True


def _divide(large: Dim, small: Dim, joint: str) -> bool:
    """Divides `large` so that its first part has the size of `small`."""
    if large.joint or (joint == "product" and large.size % small.size):
        return False
    rest = large.size // small.size if joint == "product" else large.size - small.size
    large.joint, large.children = joint, (Dim(small.size), Dim(rest))
    for child in large.children:
        child.pins = list(large.pins)
    large.pins = []
    return True
