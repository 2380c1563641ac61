"""What each axis of a weight is for: layers stacked in it, window positions, inputs, outputs."""

import dataclasses
import math

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Roles:
    """The role of every axis of a weight.

    Structures (N:M groups, blocks, channels) and layer-wise distributions need to know which axes are summed over
    (`in_axes`, with the window positions of a convolution in `spatial_axes`), which are produced (`out_axes`), and
    which merely stack independent layers (`batch_axes`). Each axis appears exactly once; negative axes count from
    the end.

    Args:
        in_axes: axes that the layer reduces over, major first.
        out_axes: axes of the layer's output, major first.
        batch_axes: axes that stack layers, as `nnx.scan` and `nnx.vmap` make them.
        spatial_axes: window positions of a convolution kernel.

    Example:
        >>> attention_out = Roles(in_axes=(0, 1), out_axes=(2,))
        >>> attention_out.matrix_shape((4, 16, 64))
        (64, 64)
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()
    spatial_axes: tuple[int, ...] = ()

    def order(self, ndim: int) -> tuple[int, ...]:
        """The axes as batch, spatial, in, out, each counted from the front."""
        axes = self.batch_axes + self.spatial_axes + self.in_axes + self.out_axes
        return tuple(axis % ndim for axis in axes)

    def shifted(self, ndim: int, by: int, batch_axes: tuple[int, ...] = ()) -> "Roles":
        """The roles where `by` axes were put before, or taken from before, the `ndim` that there were."""
        move = lambda axes: tuple(axis % ndim + by for axis in axes)  # noqa: E731
        return Roles(move(self.in_axes), move(self.out_axes), batch_axes, move(self.spatial_axes))

    def check(self, shape: tuple[int, ...], path: str) -> None:
        """Raises `ValueError` when the roles do not name each axis of `shape` once."""
        axes = self.batch_axes + self.spatial_axes + self.in_axes + self.out_axes
        inside = all(-len(shape) <= axis < len(shape) for axis in axes)
        if not inside or sorted(self.order(len(shape))) != list(range(len(shape))):
            raise ValueError(
                f"{path}: {self} does not name each of the {len(shape)} axes of shape {shape} exactly once; "
                f"give this leaf its own roles, rules={{{path!r}: sparsejax.Roles(in_axes=..., out_axes=...)}}"
            )
        if not self.out_axes or not self.in_axes:
            raise ValueError(f"{path}: {self} needs at least one in axis and one out axis")

    def batch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the axes that stack layers."""
        return tuple(shape[axis] for axis in self.batch_axes)

    def kernel_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one layer as `(*spatial, inputs, outputs)`: what the Erdős–Rényi formulas read."""
        spatial = tuple(shape[axis] for axis in self.spatial_axes)
        return (*spatial, math.prod(shape[a] for a in self.in_axes), math.prod(shape[a] for a in self.out_axes))

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stack of matrices `(*batch, rows, columns)`; rows are the reduction, columns the outputs."""
        *window, columns = self.kernel_shape(shape)
        return (*self.batch_shape(shape), math.prod(window), columns)

    def to_matrix(self, array):
        """Lays an array out as `(*batch, rows, columns)`; an array that already is one is returned as it is."""
        order = self.order(array.ndim)
        if order != tuple(range(array.ndim)):
            array = jnp.transpose(array, order)
        matrix = (*array.shape[: len(self.batch_axes)], *self._rows_columns(array.shape))
        return array if matrix == array.shape else array.reshape(matrix)

    def from_matrix(self, matrix, shape: tuple[int, ...]):
        """The inverse of `to_matrix` for a leaf of `shape`."""
        order = self.order(len(shape))
        laid_out = tuple(shape[axis] for axis in order)
        if laid_out != matrix.shape:
            matrix = matrix.reshape(laid_out)
        if order != tuple(range(len(shape))):
            back = sorted(range(len(shape)), key=order.__getitem__)
            matrix = jnp.transpose(matrix, back)
        return matrix

    def _rows_columns(self, laid_out: tuple[int, ...]) -> tuple[int, int]:
        first_out = len(laid_out) - len(self.out_axes)
        return math.prod(laid_out[len(self.batch_axes) : first_out]), math.prod(laid_out[first_out:])


LINEAR = Roles(in_axes=(-2,), out_axes=(-1,))
LINEAR_OUT_IN = Roles(in_axes=(-1,), out_axes=(-2,))


def convolution_roles(ndim: int) -> Roles:
    """Roles of a channels-last convolution kernel `(*window, in, out)` with `ndim` axes, as Flax lays it out.

    Example:
        >>> convolution_roles(4)
        Roles(in_axes=(2,), out_axes=(3,), batch_axes=(), spatial_axes=(0, 1))
    """
    return Roles(in_axes=(ndim - 2,), out_axes=(ndim - 1,), spatial_axes=tuple(range(ndim - 2)))


def convolution_roles_out_in(ndim: int) -> Roles:
    """Roles of a kernel `(out, in, *window)` with `ndim` axes, as Equinox and PyTorch lay it out."""
    return Roles(in_axes=(1,), out_axes=(0,), spatial_axes=tuple(range(2, ndim)))
