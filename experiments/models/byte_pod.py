"""A byte transformer for pods as pure functions: stacked layers, block-sparse MLPs, sparse attention, bfloat16.

Its kernels cannot be split by the compiler's partitioner. So the whole network runs under `jax.shard_map` with the
batch split over the mesh; a layer's weights are gathered over `fsdp` when the layer is computed, in bfloat16, and their
gradients are summed and split again by the transpose of that. `tensor` must be 1.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

import sparsejax
from experiments.experiment import UsageError
from experiments.sharding import BATCH, Layout
from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from sparsejax.attention import Causal, Local, Sink, sparse_attention
from sparsejax.masks.counts import keep_count
from sparsejax.masks.paths import is_stored, map_with_names
from sparsejax.masks.rules import Rule, resolve
from sparsejax.parameters.gradients import apply_updates, value_and_grad
from sparsejax.parameters.slots import store_blocks

BYTES = 256
_MLP = ("up", "down")


@dataclasses.dataclass(frozen=True)
class Config:
    """A causal byte transformer whose MLPs are stored in blocks and move by SET; attention sees a window and a sink."""

    # features
    width: int = 2048
    # layers
    depth: int = 26
    # attention heads; must divide the width
    heads: int = 16
    # features inside the MLP
    hidden: int = 8192
    # bytes of a window of the data
    length: int = 4096
    # bytes before each that attention sees
    local: int = 1023
    # first bytes that attention always sees
    sink: int = 128
    # queries, and keys, of an attention tile
    tile: int = 512
    # share of the blocks of the MLPs that is stored; 1 stores all
    density: float = 0.1
    # rows, and columns, of a block
    block: int = 256
    # windows of a step for each device
    rows_per_device: int = 1
    # steps between two moves of the blocks
    update_every: int = 100
    # share of the blocks that is swapped at a move
    drop_fraction: float = 0.3
    # of AdamW
    learning_rate: float = 3e-4


def init(config: Config, key, groups: int = 1):
    """The parameters: float32, layers stacked along the first axis, MLPs as `BlockSparse`.

    Args:
        config: the sizes.
        key: random key.
        groups: groups of columns of blocks, a multiple of the mesh's `fsdp`.

    Raises:
        UsageError: sizes do not divide.
    """
    width, depth, heads, hidden = config.width, config.depth, config.heads, config.hidden
    if width % heads:
        raise UsageError(f"heads is {heads}; it must divide the width, {width}")
    if width % config.block or hidden % config.block or (width // config.block) % groups:
        raise UsageError(
            f"block is {config.block} and fsdp of the mesh {groups}; blocks must divide width {width} and hidden "
            f"{hidden}, and fsdp the {width // config.block} columns of blocks"
        )
    shapes = {
        "token_embedding": (BYTES, width),
        "position_embedding": (config.length, width),
        "query": (depth, width, heads, width // heads),
        "key": (depth, width, heads, width // heads),
        "value": (depth, width, heads, width // heads),
        "out": (depth, heads, width // heads, width),
        "up": (depth, width, hidden),
        "down": (depth, hidden, width),
        "head": (width, BYTES),
    }
    fan_in = {"out": width, "down": hidden}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    params = {}
    for name, shape in shapes.items():
        scale = 0.02 if "embedding" in name else fan_in.get(name, width) ** -0.5
        params[name] = scale * jax.random.normal(keys[name], shape)
    params |= {name: jnp.ones((depth, width)) for name in ("attention_norm", "mlp_norm")}
    structure = sparsejax.Block((config.block, config.block), groups=groups)
    roles = sparsejax.Roles(batch_axes=(0,), in_axes=(1,), out_axes=(2,))
    mlp = {name: params[name] for name in _MLP}
    plan = {leaf.path: leaf for leaf in resolve(mlp, dict.fromkeys(_MLP, roles), structure)}
    for name in _MLP:
        grid = structure.grid(shapes[name][1:])
        count = keep_count(math.prod(grid), 1 - config.density)
        scores = jax.random.uniform(jax.random.fold_in(keys[name], 1), (depth, *grid))
        chosen = jax.vmap(lambda s, count=count: structure.choose(s, count))(scores)
        params[name] = store_blocks(params[name], chosen, plan[name], slots=-(-count // groups))
    return params


AXES = {
    "*embedding": (None, None),
    "query": ("width", None, None),
    "key": ("width", None, None),
    "value": ("width", None, None),
    "out": (None, None, "width"),
    "*/values": ("group", None, None, None),
}
SPLIT = {"width": ("fsdp",), "group": ("fsdp",)}


def layout_on(mesh, present: bool = True) -> Layout:
    """Where the parameters lie on a mesh."""
    if mesh.shape["tensor"] != 1:
        raise UsageError(f"tensor of the mesh is {mesh.shape['tensor']}; byte_pod splits data and fsdp only, so give 1")
    return Layout(mesh, AXES, SPLIT, present)


def optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW under SET, which grows blocks at random: the same blocks on every mesh."""
    rules = [("*", None), *((f"{name}*", Rule(dense=False)) for name in _MLP)]
    algorithm = sparsejax.set_(
        1 - config.density,
        distribution=sparsejax.uniform,
        update_every=config.update_every,
        drop_fraction=config.drop_fraction,
    )
    return sparsejax.sparsify(optax.adamw(config.learning_rate), algorithm, rules=rules)


def losses(config: Config, params, tokens, layout: Layout | None, implementation: str | None):
    """Mean cross-entropy of each window in nats: float32 (rows,).

    Args:
        config: the sizes.
        params: as `init` makes them.
        tokens: int (rows, length + 1).
        layout: None runs on one device.
        implementation: of the kernels; None takes the fastest of the platform.
    """
    local = functools.partial(_losses, config, implementation)
    if layout is None:
        return local(lambda name, leaf: leaf, params, tokens)
    specs = map_with_names(lambda name, leaf: layout.spec(name, leaf.shape), params)
    run = functools.partial(local, functools.partial(_gathered, layout.mesh.shape["fsdp"]))
    rows = PartitionSpec(BATCH)
    return jax.shard_map(run, mesh=layout.mesh, in_specs=(specs, rows), out_specs=rows, check_vma=False)(params, tokens)


def _gathered(parts: int, name: str, leaf):
    """A layer's whole weight, of which each device holds a part."""
    if parts == 1:
        return leaf
    gather = functools.partial(jax.lax.all_gather, axis_name="fsdp", tiled=True)
    if is_stored(leaf):
        return dataclasses.replace(leaf, values=gather(leaf.values, axis=0))
    axis = {"query": 0, "key": 0, "value": 0, "out": 2}.get(name)
    return leaf if axis is None else gather(leaf, axis=axis)


def _losses(config: Config, implementation, whole, params, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = Causal() & (Local(config.local) | Sink(config.sink))
    stacked = {name: leaf for name, leaf in params.items() if "embedding" not in name and name != "head"}

    def layer(x, weights):
        w = {name: whole(name, leaf.astype(x.dtype)) for name, leaf in weights.items()}
        h = _norm(x, w["attention_norm"])
        q, k, v = (jnp.einsum("ble,ehd->blhd", h, w[name]) for name in ("query", "key", "value"))
        seen = sparse_attention(q, k, v, mask, bq=config.tile, bk=config.tile, implementation=implementation)
        x = x + jnp.einsum("blhd,hde->ble", seen, w["out"])
        h = jax.nn.gelu(_product(_norm(x, w["mlp_norm"]), w["up"], implementation))
        return x + _product(h, w["down"], implementation), None

    x = params["token_embedding"][inputs] + params["position_embedding"][: inputs.shape[1]]
    x, _ = jax.lax.scan(jax.checkpoint(layer), x.astype(jnp.bfloat16), stacked)
    logits = (x @ params["head"].astype(x.dtype)).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets), axis=-1)


def _product(x, weight, implementation):
    """`weight.matmul(x)` without the gradients of absent blocks, which SET never asks for."""
    return block_sparse_matmul(x, weight.values, weight.lists, shape=weight.matrix_shape, implementation=implementation)


def _norm(x, scale):
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype) * scale


def make_step(config: Config, layout: Layout | None, implementation: str | None = None):
    """The training step: `step(params, opt_state, tokens) -> (params, opt_state, loss)`."""

    def step(params, opt_state, tokens):
        def loss(params):
            return jnp.mean(losses(config, params, tokens, layout, implementation))

        value, grads = value_and_grad(loss)(params)
        updates, opt_state = optimizer(config).update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state, value

    return step
