"""Sizes of convolutions: one number for each dimension, paddings, shapes of outputs."""

from collections.abc import Sequence

import jax

from sparsejax.convolution.checks import whole_number


def per_dimension(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """`value` for each dimension; one number counts for all.

    Raises:
        ValueError: a number is below 1, or there are not `dims` of them.
    """
    numbers = tuple(value) if hasattr(value, "__len__") else (value,) * dims
    if len(numbers) != dims:
        raise ValueError(f"{name} is {value}; allowed are a number of at least 1, or one for each of {dims} dimensions")
    return tuple(whole_number(name, number) for number in numbers)


def pads(shape, window, stride, dilation, padding) -> tuple[tuple[int, int], ...]:
    """Paddings (low, high) for each dimension.

    Args:
        shape: sizes of space.
        window: sides of the kernel.
        stride: steps.
        dilation: distances of the taps.
        padding: for each dimension a pair or a number for both ends, one number for all, "SAME", "VALID", or None:
            "SAME", but at the end where window equals stride.
    """
    spread = tuple((size - 1) * step + 1 for size, step in zip(window, dilation, strict=True))
    if padding is None:
        same = jax.lax.padtype_to_pads(shape, spread, stride, "SAME")
        return tuple(
            (0, low + high) if size == step else (low, high)
            for (low, high), size, step in zip(same, window, stride, strict=True)
        )
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding is {padding!r}; allowed are 'SAME', 'VALID', a number or (low, high) pairs")
        return tuple((int(low), int(high)) for low, high in jax.lax.padtype_to_pads(shape, spread, stride, padding))
    pairs = tuple(padding) if hasattr(padding, "__len__") else (padding,) * len(shape)
    pairs = tuple(tuple(pair) if hasattr(pair, "__len__") else (pair, pair) for pair in pairs)
    if len(pairs) != len(shape) or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"padding is {padding}; allowed are 'SAME', 'VALID', a number, or {len(shape)} numbers or (low, high) pairs"
        )
    return tuple((whole_number("padding", low, 0), whole_number("padding", high, 0)) for low, high in pairs)


def output_shape(shape, window, stride, dilation, around) -> tuple[int, ...]:
    """Sizes of space of a convolution's output.

    Raises:
        ValueError: the window does not fit into the padded space.
    """
    sizes = tuple(
        (size + low + high - step * (side - 1) - 1) // jump + 1
        for size, side, jump, step, (low, high) in zip(shape, window, stride, dilation, around, strict=True)
    )
    if min(sizes) < 1:
        raise ValueError(
            f"a window of {tuple(window)}, dilation {dilation}, does not fit into {tuple(shape)} with padding {around}"
        )
    return sizes
