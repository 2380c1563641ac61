"""What every stored weight has in common: it looks like the array that it stands for."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sparsejax.masks.roles import Roles
from sparsejax.masks.rules import LeafPlan


class StoredWeight:
    """The array that a stored weight stands for: shape, dtype, sharding, roles and products.

    Attributes:
        values: what is trained; its leading axes, beyond the `trailing` that one layer has, stack layers.
        layer_shape: the shape of one layer.
        layer_roles: the roles of its axes.
    """

    stored = True
    trailing: ClassVar[int]
    __array_ufunc__ = None  # numpy leaves `x @ weight` to __rmatmul__

    values: Any
    layer_shape: tuple[int, ...]
    layer_roles: Roles

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the leading axes that stack layers."""
        return tuple(self.values.shape[: -self.trailing])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        return self.batch + self.layer_shape

    @property
    def ndim(self) -> int:
        """Number of axes of `shape`."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of `shape`, absent ones included."""
        return math.prod(self.shape)

    @property
    def dtype(self):
        """The dtype of the values."""
        return self.values.dtype

    @property
    def sharding(self):
        """The sharding of the values."""
        return self.values.sharding

    @property
    def roles(self) -> Roles:
        """The roles of the axes of `shape`."""
        stacked = len(self.batch)
        own = self.layer_roles
        return own.shifted(len(self.layer_shape), stacked, batch_axes=tuple(range(stacked)))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows (inputs) and columns (outputs) of one layer."""
        return self.layer_roles.matrix_shape(self.layer_shape)[-2:]

    @property
    def array_name(self) -> str:
        """The dtype and shape, as `float32[8,8]`."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    def one_layer(self):
        """One layer as shapes and dtypes, and rows to multiply it by: what `explain` of a product reads."""
        layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[len(self.batch) :], leaf.dtype), self)
        return jax.ShapeDtypeStruct((1, self.matrix_shape[0]), self.dtype), layer

    def over_layers(self, function):
        """Maps a function of one layer over the stacked ones."""
        for _ in self.batch:
            function = jax.vmap(function)
        return function

    def require_one_layer(self) -> None:
        """Raises `ValueError` where layers are stacked."""
        if self.batch:
            raise ValueError(f"{self} stacks layers; take one, as jax.lax.scan and jax.vmap do")

    def __rmatmul__(self, x):
        if len(self.layer_shape) != 2:
            raise ValueError(f"x @ weight needs a matrix, not shape {self.shape}; use weight.matmul(x)")
        return self.matmul(jnp.asarray(x))

    def __matmul__(self, x):
        raise TypeError(f"{self} @ x is not there: write x @ weight, with inputs as rows; or to_dense(weight) @ x")

    def __array__(self, *args, **kwargs):
        raise TypeError(f"{self} is no array: sparsejax.parameters.to_dense(weight) makes one")

    def require_floating(self, dtype) -> None:
        """Raises `ValueError` where a dtype is none that values can have."""
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{self}: values must be floating, not {jnp.dtype(dtype)}")


def layer_of(array: jax.Array, leaf: LeafPlan) -> tuple[tuple[int, ...], Roles]:
    """Shape and roles of one layer of an array that may stack several.

    Raises:
        ValueError: layers are not stacked along the leading axes.
    """
    roles, stacked = leaf.roles, len(leaf.roles.batch_axes)
    if tuple(axis % array.ndim for axis in roles.batch_axes) != tuple(range(stacked)):
        raise ValueError(f"{leaf.path}: layers are stacked along axes {roles.batch_axes}; move these axes to the front")
    return tuple(array.shape[stacked:]), roles.shifted(array.ndim, -stacked)
