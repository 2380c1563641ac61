"""`shrink` and its groups for Flax NNX models, whose modules hold their sizes as attributes."""

from collections.abc import Callable

from flax import nnx

from sparsejax.parameters.shrink import ShrinkReport, shrink
from sparsejax.parameters.shrink_groups import Groups, tied_axes


def model_groups(model: nnx.Module, *inputs, resize: Callable[[nnx.Module], None] | None = None) -> Groups:
    """`tied_axes` of a Flax NNX model.

    Args:
        model: called as `model(*inputs)`.
        *inputs: arrays or `jax.ShapeDtypeStruct`s; a batch of one is enough.
        resize: as in `shrink_model`.

    Returns:
        The `Groups`; `groups.prune(nnx.state(model, nnx.Param), 0.5)` gives masks for `from_masks`.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> list(model_groups(model, jnp.ones((1, 4))).free)
        ['layers/0/bias axis 0']
    """
    apply, state, _ = _function(model, resize)
    return tied_axes(apply, state, *inputs)


def shrink_model(
    model: nnx.Module, masks, *inputs, resize: Callable[[nnx.Module], None] | None = None
) -> tuple[nnx.Module, ShrinkReport]:
    """`shrink` for Flax NNX models: a smaller model of the same class, with equal outputs.

    The sizes that Flax's modules hold (`in_features`, `num_heads`, ...) are set to those of their new parameters.

    Args:
        model: called as `model(*inputs)`; batch norms must use their running averages in this call.
        masks: masks of its `nnx.Param`s, such as `masks_of(optimizer.opt_state)`; `None` where dense.
        *inputs: arrays or `jax.ShapeDtypeStruct`s; a batch of one is enough.
        resize: for models with modules of their own that hold sizes: called with every module after its parameters
            have been cut, it sets them, `if isinstance(module, Mine): module.width = module.kernel.shape[1]`.

    Returns:
        `(smaller model, ShrinkReport)`; the model given is not changed.

    Raises:
        ValueError: as `shrink`.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> masks = model_groups(model, jnp.ones((1, 4))).prune(nnx.state(model, nnx.Param), 0.75)
        >>> smaller, report = shrink_model(model, masks, jnp.ones((1, 4)))
        >>> smaller.layers[0].out_features, report.parameters
        (2, (58, 16))
    """
    apply, state, rest = _function(model, resize)
    smaller, report = shrink(apply, state, masks, *inputs)
    graph = nnx.graphdef(model)
    result = nnx.merge(graph, smaller, rest, copy=True)
    _set_sizes(result, resize)
    return result, report


def _function(model, resize):
    graph, state, rest = nnx.split(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)

    def apply(state, *inputs):
        smaller = nnx.merge(graph, state, rest, copy=True)
        _set_sizes(smaller, resize)
        return smaller(*inputs)

    return apply, state, rest


def _set_sizes(model, resize) -> None:
    for _, module in nnx.iter_modules(model):
        for kind, sizes in _SIZES:
            if isinstance(module, kind):
                for name, value in sizes(module).items():
                    setattr(module, name, value)
        if resize is not None:
            resize(module)


def _linear(module) -> dict:
    return dict(zip(("in_features", "out_features"), module.kernel.shape, strict=True))


def _linear_general(module) -> dict:
    shape, inputs = module.kernel.shape, len(_tuple(module.in_features))
    batch = len(shape) - inputs - len(_tuple(module.out_features))
    return {
        "in_features": _like(module.in_features, shape[batch : batch + inputs]),
        "out_features": _like(module.out_features, shape[batch + inputs :]),
    }


def _convolution(module) -> dict:
    inputs, outputs = module.kernel.shape[-2:]
    per_group = module.out_features // module.feature_group_count
    groups = outputs // per_group if module.feature_group_count > 1 else 1
    return {
        "kernel_shape": tuple(module.kernel.shape),
        "in_features": inputs * groups,
        "out_features": outputs,
        "feature_group_count": groups,
    }


def _transposed_convolution(module) -> dict:
    inputs, outputs = module.kernel.shape[-2:][:: -1 if module.transpose_kernel else 1]
    return {"kernel_shape": tuple(module.kernel.shape), "in_features": inputs, "out_features": outputs}


def _norm(module) -> dict:
    arrays = (getattr(module, name, None) for name in ("scale", "bias", "mean"))
    sizes = [array.shape[-1] for array in arrays if array is not None and array.shape]
    return {"num_features": sizes[0]} if sizes else {}


def _group_norm(module) -> dict:
    sizes = _norm(module)
    return {"num_groups": sizes["num_features"] // module.group_size} if sizes else {}


def _attention(module) -> dict:
    inputs, heads, width = module.query.kernel.shape
    return {
        "in_features": inputs,
        "in_kv_features": module.key.kernel.shape[0],
        "num_heads": heads,
        "num_kv_heads": module.key.kernel.shape[1],
        "head_dim": width,
        "qkv_features": heads * width,
        "out_features": module.out.kernel.shape[-1],
    }


def _embedding(module) -> dict:
    return dict(zip(("num_embeddings", "features"), module.embedding.shape, strict=True))


def _tuple(value) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _like(value, shape):
    return tuple(shape) if isinstance(value, tuple | list) else shape[0]


_SIZES = (
    (nnx.Linear, _linear),
    (nnx.LinearGeneral, _linear_general),
    (nnx.Conv, _convolution),
    (nnx.ConvTranspose, _transposed_convolution),
    (nnx.Embed, _embedding),
    (nnx.BatchNorm | nnx.LayerNorm | nnx.RMSNorm, _norm),
    (nnx.GroupNorm, _group_norm),
    (nnx.MultiHeadAttention, _attention),
)
