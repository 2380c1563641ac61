"""A linear layer whose weight is stored sparse."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.masks.block import Block
from sparsejax.masks.counts import keep_count
from sparsejax.masks.nm import NM
from sparsejax.masks.roles import Roles
from sparsejax.masks.rules import LeafPlan
from sparsejax.nn.sparse_kernel import SparseKernel
from sparsejax.parameters.nm_sparse import store_nm
from sparsejax.parameters.slots import store_blocks

LECUN_NORMAL = nnx.initializers.lecun_normal()


class SparseLinear(nnx.Module):
    """`y = x W + b` with a `BlockSparse` or `NMSparse` W: time and memory of training follow the density.

    Takes the place of `nnx.Linear`, and of `nnx.LinearGeneral` over trailing axes. The first pattern is random, and the
    values are those that a dense layer would start with.

    Args:
        in_features: features of the input, or the sizes of several trailing axes.
        out_features: features of the output, or the sizes of several axes.
        structure: a `Block` or an `NM`.
        sparsity: fraction of blocks that are absent; an `NM` brings its own.
        use_bias: whether there is a bias.
        dtype: of the computation; that of input and parameters together by default.
        param_dtype: of the parameters.
        kernel_init: makes the dense kernel, of which the kept blocks are stored.
        bias_init: makes the bias.
        implementation: see `pallas_kernels.block_sparse_matmul`.
        weight: a stored weight to take instead of a new one.
        rngs: random streams.

    Example:
        >>> layer = SparseLinear(64, 128, structure=Block((16, 16)), sparsity=0.75, rngs=nnx.Rngs(0))
        >>> layer.kernel.weight
        BlockSparse(float32[64,128], 8 of 32 blocks of 16x16, mean)
        >>> layer(jnp.ones((2, 64))).shape
        (2, 128)
    """

    def __init__(
        self,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        *,
        structure: Block | NM = Block((64, 64)),
        sparsity: float = 0.9,
        use_bias: bool = True,
        dtype=None,
        param_dtype=jnp.float32,
        kernel_init=LECUN_NORMAL,
        bias_init=nnx.initializers.zeros,
        implementation: str | None = None,
        weight=None,
        rngs: nnx.Rngs | None = None,
    ):
        self.in_features, self.out_features = _axes(in_features), _axes(out_features)
        self.dtype, self.implementation = dtype, implementation
        shape = (*self.in_features, *self.out_features)
        inputs = len(self.in_features)
        roles = Roles(tuple(range(inputs)), tuple(range(inputs, len(shape))))
        if weight is None:
            flat = math.prod(self.in_features), math.prod(self.out_features)
            array = kernel_init(rngs.params(), flat, param_dtype).reshape(shape)
            weight = random_weight(rngs.params(), array, roles, structure, sparsity)
        if weight.shape != shape:
            raise ValueError(f"the weight has shape {weight.shape}; in_features and out_features need {shape}")
        self.kernel = SparseKernel(weight)
        bias = bias_init(rngs.params(), (math.prod(self.out_features),), param_dtype) if use_bias else None
        self.bias = nnx.Param(bias.reshape(self.out_features)) if use_bias else nnx.data(None)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Maps [..., in features] to [..., out features]; `out_sharding` as in `nnx.Linear`."""
        bias = None if self.bias is None else self.bias[...]
        y = apply_weight(self.kernel.weight, inputs, bias, self.dtype, self.implementation, len(self.in_features))
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def apply_weight(weight, inputs, bias, dtype, implementation, in_axes: int = 1) -> jax.Array:
    """The product of the trailing axes of the inputs with a stored weight, plus a bias of the output's shape."""
    dtype = jnp.result_type(inputs, weight.dtype) if dtype is None else dtype
    lead = inputs.shape[: inputs.ndim - in_axes]
    x = inputs.astype(dtype).reshape(*lead, weight.matrix_shape[0])
    y = weight.astype(dtype).matmul(x, implementation=implementation)
    roles = weight.layer_roles
    y = y.reshape(*lead, *(weight.layer_shape[axis] for axis in roles.out_axes))
    return y if bias is None else y + bias.astype(dtype)


def random_weight(key: jax.Array, array: jax.Array, roles: Roles, structure: Block | NM, sparsity: float):
    """Stores what a random pattern keeps of an array."""
    leaf = LeafPlan("kernel", array.shape, roles, structure, None, "sparse")
    matrix = roles.matrix_shape(array.shape)
    structure.check(matrix, "kernel")
    if isinstance(structure, NM):
        mask = structure.mask(jax.random.uniform(key, matrix))
        return store_nm(array, roles.from_matrix(mask, array.shape), leaf)
    count = max(1, keep_count(math.prod(structure.grid(matrix)), sparsity))
    return _random_blocks(key, array, leaf, count)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _random_blocks(key, array, leaf: LeafPlan, count: int):
    structure = leaf.structure
    scores = jax.random.uniform(key, structure.grid(leaf.roles.matrix_shape(leaf.shape)))
    slots = -(-count // structure.groups)
    return store_blocks(array, structure.choose(scores, count), leaf, slots=slots)


def _axes(features) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)
