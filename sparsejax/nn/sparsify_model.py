"""An existing NNX model with sparse layers in the place of dense ones."""

import numpy as np
from flax import nnx
from jax import lax

from sparsejax.masks.paths import is_stored, named_leaves
from sparsejax.nn.sparse_conv import SparseConv
from sparsejax.nn.sparse_kernel import split
from sparsejax.nn.sparse_linear import SparseLinear
from sparsejax.parameters.convert import to_sparse


def sparsify_model(
    model: nnx.Module,
    structure_or_rules,
    masks=None,
    *,
    capacity: float | None = None,
    implementation: str | None = None,
) -> nnx.Module:
    """Turns layers of an NNX model into `SparseLinear` and `SparseConv`.

    The outputs are those of the model whose weights are zero off the masks. Layers are `nnx.Linear`,
    `nnx.LinearGeneral` over trailing axes, such as those of `nnx.MultiHeadAttention`, and `nnx.Conv`.

    Args:
        model: the model; it stays as it is.
        structure_or_rules: which layers become sparse, and how: as in `to_sparse`.
        masks: as `masks_of` gives them; None keeps the blocks that are not all zero.
        capacity: as in `to_sparse`.
        implementation: of the products, see `pallas_kernels.block_sparse_matmul`.

    Returns:
        A new model of the same class. Variables of layers that stay are copies.

    Raises:
        ValueError: as `to_sparse`; and where the weight does not belong to one of those layers, or the layer has
            options that a sparse one lacks.

    Example:
        >>> import jax.numpy as jnp
        >>> from sparsejax.masks.block import Block
        >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.relu)
        >>> model.layers[0].kernel[...] *= Block((4, 4)).mask(model.layers[0].kernel[...] ** 2, 0.5)
        >>> sparse = sparsify_model(model, Block((4, 4)))
        >>> sparse.layers[0].kernel.weight
        BlockSparse(float32[8,8], 2 of 4 blocks of 4x4, mean)
    """
    model = nnx.clone(model)
    _, params, _ = split(model)
    stored = to_sparse(params, masks, structure_or_rules, capacity=capacity)
    chosen = {path for path, leaf in named_leaves(stored, is_stored) if is_stored(leaf)}
    chosen -= {path for path, leaf in named_leaves(params, is_stored) if is_stored(leaf)}
    weights = dict(named_leaves(stored, is_stored))
    modules = {"/".join(map(str, path)): (path, module) for path, module in nnx.iter_modules(model)}
    for path in sorted(chosen):
        owner = path.rpartition("/")[0]
        where, layer = modules.get(owner, ((), None))
        if layer is None or path != f"{owner}/kernel".removeprefix("/"):
            raise ValueError(f"{path}: is no kernel of a layer; leave it dense with rules={{{path!r}: None}}")
        new = _sparse_layer(path, layer, weights[path], implementation)
        if not where:
            return new
        parent = model
        for key in where[:-1]:
            parent = parent[key] if isinstance(key, int) else getattr(parent, key)
        if isinstance(where[-1], int):
            parent[where[-1]] = new
        else:
            setattr(parent, where[-1], new)
    return model


def _sparse_layer(path: str, layer, weight, implementation):
    options = {"dtype": layer.dtype, "implementation": implementation, "weight": weight, "use_bias": False}
    if isinstance(layer, nnx.Conv):
        _refuse(
            path,
            __call__=type(layer).__call__ is not nnx.Conv.__call__,
            feature_group_count=layer.feature_group_count != 1,
            input_dilation=bool(np.any(np.asarray(layer.input_dilation or 1) != 1)),
            mask=layer.mask is not None,
            conv_general_dilated=layer.conv_general_dilated is not lax.conv_general_dilated,
        )
        *window, inputs, outputs = weight.shape
        strides, dilation = layer.strides or 1, layer.kernel_dilation or 1
        new = SparseConv(inputs, outputs, window, strides, padding=layer.padding, kernel_dilation=dilation, **options)
    elif isinstance(layer, nnx.LinearGeneral):
        trailing = tuple(range(-len(layer.axis), 0))
        _refuse(
            path,
            batch_axis=bool(layer.batch_axis),
            axis=tuple(layer.axis) != trailing,
            dot_general=layer.dot_general is not None or layer.dot_general_cls is not None,
        )
        new = SparseLinear(layer.in_features, layer.out_features, **options)
    elif isinstance(layer, nnx.Linear):
        _refuse(path, dot_general=layer.dot_general is not lax.dot_general)
        new = SparseLinear(layer.in_features, layer.out_features, **options)
    else:
        raise ValueError(
            f"{path}: belongs to a {type(layer).__name__}; only Linear, LinearGeneral and Conv have sparse "
            f"counterparts. Leave it dense with rules={{{path!r}: None}}"
        )
    new.bias = layer.bias
    return new


def _refuse(path: str, **unusual) -> None:
    for name, is_unusual in unusual.items():
        if is_unusual:
            raise ValueError(
                f"{path}: its layer has an unusual {name}, which sparse layers lack; leave it dense with "
                f"rules={{{path!r}: None}}"
            )
