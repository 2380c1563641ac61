"""A weight of which n of every m inputs are stored, as one parameter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.nm_matmul import explain, nm_matmul
from sparsejax.masks.nm import NM
from sparsejax.masks.roles import Roles
from sparsejax.masks.rules import LeafPlan
from sparsejax.parameters.stored_weight import StoredWeight, layer_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NMSparse(StoredWeight):
    """A weight that keeps n of every m consecutive inputs, and stores these only.

    It looks like an array of `shape`, and `x @ weight` works. With a pattern of its own for every output column
    (`share=1`) this saves memory, not time: products are those of the dense matrix. Where 32 or more columns share a
    pattern, inputs are gathered for each group of columns. On the CPU that is measured faster than dense by the native
    kernel (`benchmarks/block_sparse.py --parts nm`; for 2:4 nearly twice, with gradients 1.5 times), by XLA alone from
    64 columns on, a little. On a TPU it is not faster: the gathering costs what the smaller product saves, by static
    estimates of compiled code; on a GPU it has not been measured. The pattern is fixed: `sparsify` trains the values
    and never moves them.

    Args:
        values: floating [..., inputs // m * n, outputs].
        positions: uint8 [..., inputs // m * n, outputs // share], place within the group of m, ascending.
        structure: the `NM` that it has.
        layer_shape: the shape of one layer.
        layer_roles: the roles of its axes.

    Example:
        >>> from sparsejax.parameters import to_sparse
        >>> kernel = {"kernel": jnp.array([[1.0], [0.0], [0.0], [2.0]])}
        >>> weight = to_sparse(kernel, None, NM(2, 4))["kernel"]
        >>> weight, weight.positions.ravel().tolist()
        (NMSparse(float32[4,1], 2:4), [0, 3])
    """

    trailing = 2
    moves = False

    values: Any
    positions: Any
    structure: NM = dataclasses.field(metadata={"static": True})
    layer_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layer_roles: Roles = dataclasses.field(metadata={"static": True})

    @property
    def execution(self) -> str:
        """Whether products are measured to be faster than dense ones: by the native kernel where columns share."""
        return "accelerated" if self.structure.share >= 32 and self.kernel == "cpu: native" else "stored"

    @property
    def nnz(self) -> int:
        """Number of stored elements, over all layers."""
        return self.values.size

    @property
    def kernel(self) -> str:
        """What multiplies this weight here, as `platform: implementation`."""
        x, layer = self.one_layer()
        n, m, share = self.structure.n, self.structure.m, self.structure.share
        choice = explain(x, layer.values, layer.positions, n=n, m=m, share=share)
        return f"{choice.platform}: {choice.name}"

    @property
    def intact(self) -> jax.Array:
        """Whether places within each group ascend; not after they were taken for weights. Bool scalar."""
        n, m = self.structure.n, self.structure.m
        groups = self.positions.reshape(*self.positions.shape[:-2], -1, n, self.positions.shape[-1])
        return jnp.all(groups < m) & jnp.all(groups[..., 1:, :] > groups[..., :-1, :])

    def matmul(self, x: jax.Array, *, implementation: str | None = None) -> jax.Array:
        """`x @ W` with W laid out as a matrix, rows inputs and columns outputs.

        Args:
            x: [..., rows].
            implementation: see `pallas_kernels.nm_matmul`.

        Returns:
            [..., columns].
        """
        self.require_one_layer()
        n, m, share = self.structure.n, self.structure.m, self.structure.share
        return nm_matmul(x, self.values, self.positions, n=n, m=m, share=share, implementation=implementation)

    def astype(self, dtype) -> "NMSparse":
        """The weight with values of another dtype, which must be floating."""
        self.require_floating(dtype)
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def to_dense(self) -> jax.Array:
        """The array of `shape`, zero where nothing is stored."""
        return self.over_layers(self._layer_to_dense)(self.values, self.positions)

    def _layer_to_dense(self, values, positions):
        rows, columns = self.matrix_shape
        groups = rows // self.structure.m
        values = values.reshape(groups, self.structure.n, columns)
        at = jnp.repeat(positions, self.structure.share, axis=1).reshape(values.shape).astype(jnp.int32)
        place = jnp.arange(groups)[:, None, None], at, jnp.arange(columns)
        matrix = jnp.zeros((groups, self.structure.m, columns), self.dtype).at[place].set(values)
        return self.layer_roles.from_matrix(matrix.reshape(rows, columns), self.layer_shape)

    def __repr__(self):
        try:
            name = self.array_name
        except (AttributeError, TypeError):  # flattened with something else in the place of arrays
            return f"NMSparse({self.values!r}, {self.structure})"
        share = f", a pattern for {self.structure.share} columns" if self.structure.share > 1 else ""
        return f"NMSparse({name}, {self.structure.n}:{self.structure.m}{share})"


def store_nm(array: jax.Array, mask: jax.Array, leaf: LeafPlan) -> NMSparse:
    """Stores what an N:M mask keeps.

    Args:
        array: the weight.
        mask: bool, of its shape; no group keeps more than n.
        leaf: its roles and its structure, an `NM`.

    Returns:
        The stored weight. Where a group keeps fewer than n, zeros fill it up.

    Raises:
        ValueError: groups do not run along the inputs, layers are not stacked along the leading axes, a group keeps
            more than n, or columns that share a pattern have different ones.
    """
    structure, roles = leaf.structure, leaf.roles
    layer_shape, layer_roles = layer_of(array, leaf)
    if structure.m > 256:
        raise ValueError(f"{leaf.path}: {structure} has groups of {structure.m}; at most 256 can be stored")
    if structure.axis != -2:
        raise ValueError(f"{leaf.path}: {structure} groups outputs; only groups of inputs, axis=-2, can be stored")
    n, m, share = structure.n, structure.m, structure.share
    kept = roles.to_matrix(mask)
    rows, columns = kept.shape[-2:]
    kept = kept.reshape(*kept.shape[:-2], rows // m, m, columns // share, share)
    union = jnp.any(kept, axis=-1)
    most = int(jnp.max(jnp.sum(union, axis=-2)))
    if most > n:
        shared = f" in the {share} columns that share a pattern" if share > 1 else ""
        raise ValueError(
            f"{leaf.path}: the mask keeps {most} of {m} inputs{shared}, but {structure} stores {n}; make masks "
            "with that structure"
        )
    # Kept places first, each kind in order; then the n chosen ones in ascending order.
    order = jnp.argsort(~union, axis=-2, stable=True)[..., :n, :]
    positions = jnp.sort(order, axis=-2).astype(jnp.uint8)
    matrix = roles.to_matrix(jnp.where(mask, array, jnp.zeros_like(array)))
    grouped = matrix.reshape(*matrix.shape[:-2], rows // m, m, columns)
    at = jnp.repeat(positions, share, axis=-1).astype(jnp.int32)
    values = jnp.take_along_axis(grouped, at, axis=-2)
    flat = lambda a: a.reshape(*a.shape[:-3], rows // m * n, a.shape[-1])  # noqa: E731
    return NMSparse(
        values=flat(values),
        positions=flat(positions),
        structure=structure,
        layer_shape=layer_shape,
        layer_roles=layer_roles,
    )
