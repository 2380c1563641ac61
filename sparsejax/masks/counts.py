"""How many entries a sparsity keeps, in exact arithmetic: fractions on the host, 32-bit integers when traced."""

import math
import numbers
from collections.abc import Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

_MILLION = 1_000_000


def as_written(x: float, name: str = "x") -> Fraction | None:
    """The exact value of the shortest decimal that reads as `x`; None for NaN and infinities.

    Args:
        x: a Python or NumPy number: float, int, `Fraction`, `Decimal`.
        name: what the error message calls it.

    Returns:
        The value as a fraction.

    Raises:
        TypeError: `x` is no such number.

    Example:
        >>> as_written(0.1), as_written(float("nan"))
        (Fraction(1, 10), None)
    """
    if isinstance(x, (bool, np.bool_)) or not (isinstance(x, numbers.Real) or hasattr(x, "as_integer_ratio")):
        raise TypeError(f"{name} must be a number, got {x!r} of type {type(x).__name__}")
    if isinstance(x, Fraction):
        return x
    return Fraction(str(x)) if math.isfinite(x) else None


def exact_fraction(sparsity: float) -> Fraction:
    """The sparsity as the number that was written: 0.9 is nine tenths, not the binary number next to it.

    Args:
        sparsity: a Python or NumPy number (float, int, `Fraction`, `Decimal`) of at least 0 and below 1.

    Returns:
        The exact value.

    Raises:
        TypeError: `sparsity` is no number.
        ValueError: `sparsity` is NaN or outside [0, 1).

    Example:
        >>> exact_fraction(0.9)
        Fraction(9, 10)
    """
    value = as_written(sparsity, "sparsity")
    if value is None or not 0 <= value < 1:
        raise ValueError(
            f"sparsity must be at least 0 and below 1 (it is the fraction of zeros), got {sparsity!r}; "
            "percentages are written as fractions, 90 % as 0.9"
        )
    return value


def keep_count(size: int, sparsity: float) -> int:
    """How many of `size` entries are kept at a sparsity: (1 - sparsity) * size, halves rounded to even.

    Args:
        size: number of entries.
        sparsity: fraction of zeros, counted exactly as written; see `exact_fraction`.

    Returns:
        The count, between 0 and `size`.

    Example:
        >>> keep_count(30_000_001, 0.9)
        3000000
    """
    return round((1 - exact_fraction(sparsity)) * size)


def to_ppm(x: float | jax.Array) -> jax.Array | np.int32:
    """Parts per million of a fraction that may be traced: rounded, clipped to [0, 1_000_000], NaN to 0.

    Args:
        x: a Python number or a scalar array.

    Returns:
        int32 scalar: of NumPy for a Python number, else a JAX array.

    Example:
        >>> int(to_ppm(jnp.float32(0.9))), int(to_ppm(0.9))
        (900000, 900000)
    """
    if isinstance(x, jax.Array):
        x = x if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4 else x.astype(jnp.float32)
        x = jnp.clip(jnp.where(jnp.isnan(x), 0, x), 0, 1)
        return jnp.round(x * _MILLION).astype(jnp.int32)
    if isinstance(x, numbers.Real) and math.isinf(x):
        return np.int32(_MILLION if x > 0 else 0)
    value = as_written(x, "x")
    return np.int32(0 if value is None else round(min(max(value, 0), 1) * _MILLION))


def share(size: int | jax.Array, ppm: int | jax.Array) -> int | jax.Array:
    """`size * ppm / 1_000_000` in 32-bit integers, exactly, halves rounded to even.

    Args:
        size: a number of entries below 2**31.
        ppm: parts per million, from 0 to 1_000_000.

    Returns:
        An int if both arguments are, else int32.

    Example:
        >>> share(30_000_001, 100_000), share(5, 500_000), share(7, 500_000)
        (3000000, 2, 4)
    """
    whole, rest = _divide(size, ppm)
    # `rest` is compared with half a million; the last bit of `whole` decides when they are equal.
    return whole + (2 * rest + whole % 2 > _MILLION)


def share_floor(size: int | jax.Array, ppm: int | jax.Array) -> int | jax.Array:
    """As `share`, rounded down.

    Args:
        size: a number of entries below 2**31.
        ppm: parts per million, from 0 to 1_000_000.

    Returns:
        An int if both arguments are, else int32.

    Example:
        >>> share_floor(7, 500_000)
        3
    """
    return _divide(size, ppm)[0]


def layer_counts(
    sizes: Mapping[str, int], densities: Mapping[str, float | Fraction], total: int | None = None
) -> dict[str, int]:
    """Turns the densities of layers into whole counts with an exact sum, by largest remainder.

    Each layer first gets density * size, rounded, at least 1 and at most all. Layers that rounding treated worst are
    then corrected until the counts sum to `total`; among equals, earlier layers keep more.

    Args:
        sizes: the number of entries of each layer, above 0.
        densities: the fraction each layer keeps, from 0 to 1; floats count exactly as written.
        total: what the counts sum to; by default the sum of density * size, halves rounded to even (or the number of
            layers, where that is more).

    Returns:
        The count of each layer, in the order of `sizes`.

    Raises:
        ValueError: the keys differ, a size or a density is not allowed, or `total` cannot be reached with at least 1
            and at most all of every layer.

    Example:
        >>> layer_counts({"a": 10, "b": 10, "c": 10}, {"a": 0.15, "b": 0.15, "c": 0.2})
        {'a': 2, 'b': 1, 'c': 2}
    """
    targets = _targets(sizes, densities)
    counts = {path: min(max(round(target), 1), sizes[path]) for path, target in targets.items()}
    if total is None:
        # Densities that went through floats miss a half by some 1e-16 of it: to a millionth, it is a half again.
        total = round(round(sum(targets.values()), 6))
        total = min(max(total, len(sizes)), sum(sizes.values()))
    if not len(sizes) <= total <= sum(sizes.values()):
        raise ValueError(
            f"total {total} is not reachable: {len(sizes)} layers keep at least 1 entry each and "
            f"{sum(sizes.values())} together; choose a sparsity in between"
        )
    while missing := total - sum(counts.values()):
        step = 1 if missing > 0 else -1
        order = list(counts) if step > 0 else list(reversed(counts))  # so that among equals the earlier keep more
        movable = [path for path in order if 1 <= counts[path] + step <= sizes[path]]
        movable.sort(key=lambda path: step * (counts[path] - targets[path]))
        each = max(abs(missing) // len(movable), 1)
        for path in movable[: abs(missing)]:
            counts[path] = min(max(counts[path] + step * each, 1), sizes[path])
    return counts


def _divide(size: int | jax.Array, ppm: int | jax.Array) -> tuple:
    """Quotient and remainder of size * ppm by a million, with every intermediate value below 2**31."""
    millions, units = size // _MILLION, size % _MILLION
    thousands, ones = units // 1000, units % 1000
    high = thousands * ppm
    low = (high % 1000) * 1000 + ones * ppm
    return millions * ppm + high // 1000 + low // _MILLION, low % _MILLION


def _targets(sizes: Mapping[str, int], densities: Mapping[str, float | Fraction]) -> dict[str, Fraction]:
    if set(sizes) != set(densities):
        raise ValueError(f"sizes name {sorted(sizes)}, but densities name {sorted(densities)}; they must agree")
    targets = {}
    for path, size in sizes.items():
        density = as_written(densities[path], f"density of {path}")
        if density is None or not 0 <= density <= 1:
            raise ValueError(f"{path}: a density must be from 0 to 1, got {densities[path]!r}")
        if size < 1:
            raise ValueError(f"{path}: a layer of {size} entries cannot keep one; leave it dense")
        targets[path] = density * size
    return targets
