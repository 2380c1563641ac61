"""A convolution whose weight is stored sparse."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.masks.block import Block
from sparsejax.masks.nm import NM
from sparsejax.masks.roles import convolution_roles
from sparsejax.nn.sparse_kernel import SparseKernel
from sparsejax.nn.sparse_linear import LECUN_NORMAL, apply_weight, random_weight


class SparseConv(nnx.Module):
    """A convolution with a `BlockSparse` or `NMSparse` kernel, channels last, in the place of `nnx.Conv`.

    The kernel is seen as a matrix from all inputs of a window, positions major, to the outputs. A window of one
    position is a product with the pixels as they are; a larger one gathers the windows first.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: the window.
        strides: steps of the window.
        padding: "SAME", "VALID", a number for all sides, or a pair for each axis.
        kernel_dilation: distance between the window's positions.
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
        >>> layer = SparseConv(16, 32, (3, 3), structure=Block((16, 16)), sparsity=0.5, rngs=nnx.Rngs(0))
        >>> layer.kernel.weight
        BlockSparse(float32[3,3,16,32], 9 of 18 blocks of 16x16, mean)
        >>> layer(jnp.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 32)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding="SAME",
        kernel_dilation: int | Sequence[int] = 1,
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
        self.window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.strides, self.dilation = (_each(value, len(self.window)) for value in (strides, kernel_dilation))
        self.padding = _padding(padding, len(self.window))
        self.dtype, self.implementation = dtype, implementation
        shape = (*self.window, in_features, out_features)
        if weight is None:
            array = kernel_init(rngs.params(), shape, param_dtype)
            weight = random_weight(rngs.params(), array, convolution_roles(len(shape)), structure, sparsity)
        if weight.shape != shape:
            raise ValueError(f"the weight has shape {weight.shape}; window and features need {shape}")
        self.kernel = SparseKernel(weight)
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else nnx.data(None)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps [..., *spatial, in features] to [..., *spatial, out features]."""
        lead = inputs.shape[: inputs.ndim - len(self.window) - 1]
        x = windows(
            inputs.reshape(-1, *inputs.shape[len(lead) :]), self.window, self.strides, self.padding, self.dilation
        )
        bias = None if self.bias is None else self.bias[...]
        y = apply_weight(self.kernel.weight, x, bias, self.dtype, self.implementation)
        return y.reshape(*lead, *y.shape[1:])


def windows(x: jax.Array, window, strides, padding, dilation) -> jax.Array:
    """All that each window sees, positions major.

    Args:
        x: [batch, *spatial, channels].
        window: positions along each axis.
        strides: steps of the window.
        padding: "SAME", "VALID" or pairs.
        dilation: distance between positions.

    Returns:
        [batch, *spatial, positions * channels].

    Example:
        >>> windows(jnp.arange(4.0).reshape(1, 4, 1), (2,), (1,), "VALID", (1,))[0].tolist()
        [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    """
    spatial = x.shape[1:-1]
    reach = tuple((size - 1) * step + 1 for size, step in zip(window, dilation, strict=True))
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(spatial, reach, strides, padding)
    if any(map(any, padding)):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    out = [(size - seen) // step + 1 for size, seen, step in zip(x.shape[1:-1], reach, strides, strict=True)]

    def seen(offset):
        start = [0, *(at * step for at, step in zip(offset, dilation, strict=True)), 0]
        stop = [s + (n - 1) * step + 1 for s, n, step in zip(start[1:-1], out, strides, strict=True)]
        return jax.lax.slice(x, start, (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))

    parts = [seen(offset) for offset in itertools.product(*map(range, window))]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _each(value, axes: int) -> tuple[int, ...]:
    return (value,) * axes if value is None or isinstance(value, int) else tuple(value)


def _padding(padding, axes: int):
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f'padding is {padding!r}; allowed are "SAME", "VALID", a number, or a pair for each axis')
        return padding
    pads = (padding,) * axes if isinstance(padding, int) else tuple(padding)
    return tuple((pad, pad) if isinstance(pad, int) else tuple(pad) for pad in pads)
