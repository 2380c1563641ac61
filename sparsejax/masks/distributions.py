"""How an overall sparsity is shared out over layers.

A distribution is a function `({path: shape}, sparsity) -> {path: sparsity}` over the layers that are to be sparse; None
in place of a sparsity leaves that layer to a threshold common to all such layers. Arithmetic is exact (rational), so
that the shares do not depend on the order of the layers and add up to the sparsity that was asked for.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from sparsejax.masks.counts import as_written, exact_fraction

Shapes = Mapping[str, tuple[int, ...]]
Distribution = Callable[[Shapes, float], dict[str, float | None]]


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Every layer has the overall sparsity.

    Args:
        shapes: the shape of each layer.
        sparsity: fraction of zeros, in [0, 1).

    Returns:
        The sparsity of each layer.

    Example:
        >>> uniform({"a": (4, 4), "b": (4, 2)}, 0.75)
        {'a': 0.75, 'b': 0.75}
    """
    return dict.fromkeys(shapes, float(exact_fraction(sparsity)))


def erdos_renyi(shapes: Shapes, sparsity: float, *, power: float = 1) -> dict[str, float]:
    """Density proportional to (inputs + outputs) / (inputs * outputs), over the last two axes.

    Layers whose density would exceed 1 are made dense and the rest share what is left, again and again.

    Args:
        shapes: the shape of each layer, inputs and outputs last.
        sparsity: overall fraction of zeros, in [0, 1).
        power: exponent of the ratio; 0 is `uniform`.

    Returns:
        The sparsity of each layer.

    Raises:
        ValueError: a layer has fewer than two axes or no entries.

    Example:
        >>> shares = erdos_renyi({"a": (784, 300), "b": (300, 100), "c": (100, 10)}, 0.9)
        >>> [round(1 - s, 6) for s in shares.values()]
        [0.079568, 0.230189, 1.0]

    References:
        Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
        network science, 2018, equation 1.
    """
    return _proportional(shapes, sparsity, power, lambda shape: shape[-2:])


def erdos_renyi_kernel(shapes: Shapes, sparsity: float, *, power: float = 1) -> dict[str, float]:
    """Density proportional to the sum of all axes over their product, which counts a kernel's taps too.

    Layers whose density would exceed 1 are made dense and the rest share what is left, again and again. The order of
    the axes does not matter.

    Args:
        shapes: the shape of each layer.
        sparsity: overall fraction of zeros, in [0, 1).
        power: exponent of the ratio; 0 is `uniform`.

    Returns:
        The sparsity of each layer.

    Raises:
        ValueError: a layer has fewer than two axes or no entries.

    Example:
        >>> shares = erdos_renyi_kernel({"conv": (3, 3, 16, 32), "head": (64, 10)}, 0.5)
        >>> [round(1 - s, 4) for s in shares.values()]
        [0.4306, 1.0]

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, 2020, section 3 (ERK).
    """
    return _proportional(shapes, sparsity, power, lambda shape: shape)


def global_(shapes: Shapes, sparsity: float) -> dict[str, None]:
    """No layer has a share of its own: one threshold over all of them keeps the best wherever they are.

    A layer whose scores are all small may be emptied, and the network then be cut in two; `sparsejax.collapsed_layers`
    finds such layers.

    Args:
        shapes: the shape of each layer.
        sparsity: overall fraction of zeros, in [0, 1); checked here, used by the common threshold.

    Returns:
        None for each layer.

    Example:
        >>> global_({"a": (4, 4), "b": (4, 2)}, 0.75)
        {'a': None, 'b': None}
    """
    exact_fraction(sparsity)
    return dict.fromkeys(shapes)


def uniform_plus(
    shapes: Shapes, sparsity: float, *, first: str, last: str, last_density: float = 0.2
) -> dict[str, float]:
    """The first layer is dense, the last is no sparser than `1 - last_density`; the rest share what is left evenly.

    Args:
        shapes: the shape of each layer.
        sparsity: overall fraction of zeros, in [0, 1).
        first: path of the first layer.
        last: path of the last layer.
        last_density: least density of the last layer.

    Returns:
        The sparsity of each layer.

    Raises:
        ValueError: `first` or `last` is no layer, or they alone hold more than the overall density allows.

    Example:
        >>> shapes = {"a": (3, 3, 3, 16), "b": (3, 3, 16, 32), "c": (3, 3, 32, 64), "head": (64, 10)}
        >>> round(1 - uniform_plus(shapes, 0.9, first="a", last="head")["b"], 4)
        0.0803

    References:
        Gale, Elsen and Hooker, The State of Sparsity in Deep Neural Networks, 2019; Liu et al., The Unreasonable
        Effectiveness of Random Pruning, 2022, section 3.
    """
    _require_layers(shapes, first, last)
    fixed = {first: Fraction(1)}
    if 1 - exact_fraction(sparsity) < as_written(last_density, "last_density"):
        fixed[last] = as_written(last_density, "last_density")
    return _around(fixed, uniform, shapes, sparsity)


def erk_plus(shapes: Shapes, sparsity: float, *, last: str, last_density: float = 1.0) -> dict[str, float]:
    """`erdos_renyi_kernel` with the density of the last layer given.

    Args:
        shapes: the shape of each layer.
        sparsity: overall fraction of zeros, in [0, 1).
        last: path of the last layer.
        last_density: its density.

    Returns:
        The sparsity of each layer.

    Raises:
        ValueError: `last` is no layer, or holds more than the overall density allows.

    Example:
        >>> erk_plus({"a": (64, 64), "head": (64, 10)}, 0.75, last="head")["head"]
        0.0

    References:
        Liu et al., The Unreasonable Effectiveness of Random Pruning, 2022, section 3 (ERK+).
    """
    _require_layers(shapes, last)
    return _around({last: as_written(last_density, "last_density")}, erdos_renyi_kernel, shapes, sparsity)


def layerwise(
    sparsities: Mapping[str, float], default: Distribution | None = None, *, count_custom: bool = False
) -> Distribution:
    """A distribution with the sparsity of some or all layers given by name.

    Args:
        sparsities: globs of paths and the sparsity of the layers they match; the last match wins.
        default: the distribution of the layers that no glob matches; None when there must be none.
        count_custom: False: the overall sparsity concerns only the layers of `default`. True: it concerns all layers,
            and those of `default` make up for the named ones.

    Returns:
        A distribution. Without `default` the overall sparsity that it is called with has no effect.

    Raises:
        ValueError: a sparsity is outside [0, 1); when the distribution is called, also: a glob matches no layer, a
            layer is matched by no glob and there is no default, or `count_custom` leaves an impossible rest.

    Example:
        >>> distribution = layerwise({"head/*": 0.5}, default=uniform)
        >>> distribution({"body/kernel": (8, 8), "head/kernel": (8, 2)}, 0.9)
        {'body/kernel': 0.9, 'head/kernel': 0.5}
    """
    for glob, value in sparsities.items():
        try:
            exact_fraction(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layerwise[{glob!r}]: {error}") from None
    if default is None and count_custom:
        raise ValueError("count_custom=True needs a default distribution whose layers make up for the named ones")
    return _Layerwise(tuple(sparsities.items()), default, count_custom)


@dataclasses.dataclass(frozen=True)
class _Layerwise:
    entries: tuple[tuple[str, float], ...]
    default: Distribution | None
    count_custom: bool

    def __call__(self, shapes: Shapes, sparsity: float) -> dict[str, float | None]:
        exact_fraction(sparsity)
        named, unused = {}, {glob for glob, _ in self.entries}
        for glob, value in self.entries:
            for path in fnmatch.filter(shapes, glob):
                named[path] = value
                unused.discard(glob)
        if unused:
            raise ValueError(f"layerwise: {sorted(unused)} match no layer; mend or remove them. Layers: {list(shapes)}")
        rest = {path: shape for path, shape in shapes.items() if path not in named}
        if rest and self.default is None:
            raise ValueError(f"layerwise: no glob matches {list(rest)}; add one, or give default=sparsejax.uniform")
        if self.count_custom:
            return _around({path: 1 - exact_fraction(s) for path, s in named.items()}, self.default, shapes, sparsity)
        shares = named | (self.default(rest, sparsity) if rest else {})
        return {path: shares[path] for path in shapes}


def _proportional(
    shapes: Shapes, sparsity: float, power: float, axes: Callable[[tuple[int, ...]], tuple[int, ...]]
) -> dict[str, float]:
    density = 1 - exact_fraction(sparsity)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    weights = {}
    for path, shape in shapes.items():
        if len(shape) < 2 or not sizes[path]:
            raise ValueError(f"{path}: shape {tuple(shape)} has no inputs and outputs to share over; leave it dense")
        ratio = Fraction(sum(axes(shape)), math.prod(axes(shape)))
        weights[path] = ratio**power if isinstance(power, int) else Fraction(float(ratio) ** power)
    scale, dense = Fraction(0), set()
    while rest := [path for path in shapes if path not in dense]:
        budget = density * sum(sizes.values()) - sum(sizes[path] for path in dense)
        scale = budget / sum(weights[path] * sizes[path] for path in rest)
        largest = max(weights[path] for path in rest)
        if scale * largest <= 1:
            break
        dense |= {path for path in rest if weights[path] == largest}
    return {path: 0.0 if path in dense else float(1 - scale * weights[path]) for path in shapes}


def _around(
    fixed: Mapping[str, Fraction], distribution: Distribution, shapes: Shapes, sparsity: float
) -> dict[str, float | None]:
    """The distribution over the layers whose density is not fixed, at the density that the fixed ones leave them."""
    density = 1 - exact_fraction(sparsity)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    rest = {path: shape for path, shape in shapes.items() if path not in fixed}
    left = density * sum(sizes.values()) - sum(value * sizes[path] for path, value in fixed.items())
    room = sum(sizes[path] for path in rest)
    if not (0 < left <= room or left == room):
        raise ValueError(
            f"at sparsity {sparsity} the layers {list(fixed)}, whose densities are fixed, leave {float(left):g} of "
            f"{room} entries to the others; choose another sparsity or other densities"
        )
    shares = {path: float(1 - value) for path, value in fixed.items()}
    shares |= distribution(rest, 1 - left / room) if rest else {}
    return {path: shares[path] for path in shapes}


def _require_layers(shapes: Shapes, *paths: str) -> None:
    for path in paths:
        if path not in shapes:
            raise ValueError(f"{path!r} is none of the layers {list(shapes)}")
