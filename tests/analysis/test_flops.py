"""FLOPs of layers against counts by hand, and against what XLA says of the compiled, unrolled model."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from sparsejax.analysis.flops import ForwardFlops, layer_flops, rigl_training_flops, sparse_flops, training_flops


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled_flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"] + params["bias"]


MLP = {"a": array(64, 300), "b": array(300, 10), "bias": array(10)}


def test_mlp_by_hand():
    flops = layer_flops(mlp, MLP, array(32, 64))
    assert flops.layers == {"a": 2 * 32 * 64 * 300, "b": 2 * 32 * 300 * 10}
    assert (flops.other, flops.uncounted) == (0, ())
    assert flops.total == sum(flops.layers.values())


@pytest.mark.parametrize(
    ("options", "outputs", "taps"),
    [
        ({}, 16 * 16, 9),
        ({"window_strides": (2, 2)}, 8 * 8, 9),
        ({"rhs_dilation": (2, 2)}, 16 * 16, 9),
        ({"feature_group_count": 4}, 16 * 16, 9),
        ({"padding": "VALID"}, 14 * 14, 9),
    ],
)
def test_convolution_by_hand(options, outputs, taps):
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
    features = 8 // options.get("feature_group_count", 1)
    flops = layer_flops(
        lambda p, x: lax.conv_general_dilated(x, p, **options), array(3, 3, features, 12), array(2, 16, 16, 8)
    )
    assert flops.layers == {"": 2 * 2 * outputs * 12 * taps * features}


@pytest.mark.parametrize("strides", [(2, 2), (3, 2), (4, 5)])
def test_transposed_convolution_by_hand(strides):
    """Every input meets every tap once, whatever the stride."""

    def transposed(kernel, x):
        return lax.conv_transpose(x, kernel, strides, "VALID")

    assert layer_flops(transposed, array(3, 3, 4, 5), array(2, 8, 8, 4)).total == 2 * 2 * 8 * 8 * 9 * 4 * 5


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=32, qkv_features=32, decode=False, rngs=rngs, use_bias=False
        )

    def __call__(self, x):
        return self.attention(x)


def test_nnx_attention_keeps_scores_apart():
    graph, params, rest = nnx.split(Attention(nnx.Rngs(0)), nnx.Param, ...)
    flops = layer_flops(lambda p, x: nnx.merge(graph, p, rest)(x), params, array(2, 10, 32))
    projection = 2 * 2 * 10 * 32 * 32
    assert flops.layers == {f"attention/{name}/kernel": projection for name in ("key", "out", "query", "value")}
    assert flops.other == 2 * (2 * 2 * 10 * 10 * 32)


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8 * 36, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x), use_running_average=True))
        return self.head(x.reshape(len(x), -1))


def test_nnx_conv_net_and_xla_agree():
    graph, params, rest = nnx.split(ConvNet(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, x):
        return nnx.merge(graph, params, rest)(x)

    flops = layer_flops(apply, params, array(4, 8, 8, 3))
    assert flops.layers == {"conv/kernel": 2 * 4 * 36 * 8 * 27, "head/kernel": 2 * 4 * 288 * 10}
    # XLA adds the element-wise operations, about a dozen for each activation.
    extra = compiled_flops(apply, params, array(4, 8, 8, 3)) - flops.total
    assert 0 <= extra <= 15 * 4 * 288


def transformer_block(p, x):
    query, key, value = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", query, key))
    x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", scores, value), p["o"])
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


BLOCK = {name: array(32, 4, 8) for name in "qkv"} | {"o": array(4, 8, 32), "up": array(32, 128), "down": array(128, 32)}


def test_scanned_stack_costs_its_unrolled_layers():
    stacked = jax.tree.map(lambda a: array(3, *a.shape), BLOCK)
    x = array(2, 16, 32)
    one = layer_flops(transformer_block, BLOCK, x)
    all_three = layer_flops(lambda p, x: lax.scan(lambda h, w: (transformer_block(w, h), None), x, p)[0], stacked, x)
    assert all_three.layers == {name: 3 * flops for name, flops in one.layers.items()}
    assert all_three.other == 3 * one.other

    def unrolled(p, x):
        for i in range(3):
            x = transformer_block({name: weights[i] for name, weights in p.items()}, x)
        return x

    assert layer_flops(unrolled, stacked, x) == all_three
    exact = compiled_flops(unrolled, stacked, x)
    assert all_three.total <= exact <= 1.1 * all_three.total


def test_scan_by_index_and_a_carried_weight_stay_attributed():
    def forward(p, x):
        def body(carry, i):
            h, shared = carry
            return (h @ lax.dynamic_index_in_dim(p["stack"], i, keepdims=False) @ shared, shared), h

        return lax.scan(body, (x, p["shared"]), jnp.arange(5))[0][0]

    flops = layer_flops(forward, {"stack": array(5, 8, 8), "shared": array(8, 8)}, array(3, 8))
    assert flops.layers == {"stack": 5 * 2 * 3 * 8 * 8, "shared": 5 * 2 * 3 * 8 * 8}


def test_a_carry_that_starts_constant_becomes_data():
    """A recurrent network's state starts at zero: the product of two states is not a parameter's."""

    def forward(p, xs):
        def body(state, x):
            return jnp.tanh(state @ p["h"] + x @ p["x"]), state @ state.T

        return lax.scan(body, jnp.zeros((2, 6)), xs)

    flops = layer_flops(forward, {"h": array(6, 6), "x": array(4, 6)}, array(7, 2, 4))
    assert flops.layers == {"h": 7 * 2 * 2 * 36, "x": 7 * 2 * 2 * 24}
    assert flops.other == 7 * 2 * 2 * 2 * 6


@jax.custom_vjp
def custom_matmul(x, w):
    return x @ w


custom_matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def custom_jvp_matmul(x, w):
    return x @ w


custom_jvp_matmul.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))

ROUTES = {
    "jit": lambda w, x: jax.jit(lambda a, b: a @ b)(x, w),
    "checkpoint": lambda w, x: jax.checkpoint(lambda a, b: jnp.tanh(a @ b))(x, w),
    "custom_vjp": lambda w, x: custom_matmul(x, w),
    "custom_jvp": lambda w, x: custom_jvp_matmul(x, w),
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "map": lambda w, x: lax.map(lambda row: row @ w, x),
    "transpose": lambda w, x: lax.dot_general(x, w.T, (((1,), (1,)), ((), ()))),
    "reshape": lambda w, x: jnp.einsum("bi,ihk->bhk", x, w.reshape(6, 2, 2)),
    "cast": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "where": lambda w, x: x @ jnp.where(jnp.arange(24).reshape(6, 4) % 2 == 0, w, 0),
    "mask product": lambda w, x: x @ (w * (jnp.arange(24).reshape(6, 4) % 2 == 0)),
    "standardised": lambda w, x: x @ ((w - w.mean(0)) / jnp.sqrt(w.var(0) + 1e-5)),
    "weight first": lambda w, x: (w.T @ x.T).T,
    "broadcast": lambda w, x: jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(w, (3, 6, 4))),
    "halves": lambda w, x: jnp.concatenate([x @ w[:, :2], x @ w[:, 2:]], 1),
    "stop_gradient": lambda w, x: x @ lax.stop_gradient(w),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_to_the_product_is_followed(route):
    assert layer_flops(ROUTES[route], array(6, 4), array(3, 6)).layers == {"": 2 * 3 * 6 * 4}


def test_masks_passed_as_inputs_do_not_hide_the_weights():
    def forward(p, x, *, mask):
        return x @ jnp.where(mask, p, 0)

    assert layer_flops(forward, array(6, 4), array(3, 6), mask=array(6, 4, dtype=bool)).layers == {"": 144}


def test_cond_costs_its_costlier_branch():
    def forward(p, x):
        return lax.cond(x.sum() > 0, lambda: x @ p["wide"] @ p["back"], lambda: x @ p["narrow"])

    params = {"wide": array(4, 16), "back": array(16, 4), "narrow": array(4, 4)}
    assert layer_flops(forward, params, array(3, 4)).layers == {"wide": 2 * 3 * 64, "back": 2 * 3 * 64}


def test_while_needs_a_trip_count_and_fori_with_known_bounds_does_not():
    def halving(p, x):
        return lax.while_loop(lambda h: jnp.sum(h) > 1, lambda h: h @ p, x)

    with pytest.raises(ValueError, match="pass while_trips="):
        layer_flops(halving, array(4, 4), array(3, 4))
    assert layer_flops(halving, array(4, 4), array(3, 4), while_trips=5).layers == {"": 5 * 2 * 3 * 16}
    fori = layer_flops(lambda p, x: lax.fori_loop(0, 5, lambda i, h: h @ p, x), array(4, 4), array(3, 4))
    assert fori.layers == {"": 5 * 2 * 3 * 16}


def test_a_tied_embedding_is_charged_for_the_head_only():
    def forward(p, tokens):
        return p["embedding"][tokens] @ p["embedding"].T

    flops = layer_flops(forward, {"embedding": array(50, 8)}, array(2, 7, dtype=jnp.int32))
    assert flops.layers == {"embedding": 2 * 2 * 7 * 8 * 50}


def test_a_low_rank_update_is_charged_to_the_weight_that_it_updates():
    def forward(p, x):
        return x @ (p["w"] + p["a"] @ p["b"])

    flops = layer_flops(forward, {"a": array(16, 2), "b": array(2, 12), "w": array(16, 12)}, array(3, 16))
    assert flops.layers["w"] == 2 * 3 * 16 * 12
    assert flops.total - flops.layers["w"] == 2 * 16 * 2 * 12


def test_experts_by_ragged_dot():
    def forward(p, x, sizes):
        return lax.ragged_dot(x, p, sizes)

    assert layer_flops(forward, array(4, 8, 6), array(20, 8), array(4, dtype=jnp.int32)).layers == {"": 2 * 20 * 8 * 6}


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def forward(p, x):
        return jax.shard_map(
            lambda x, w: x @ w, mesh=mesh, in_specs=(PartitionSpec("x"), PartitionSpec()), out_specs=PartitionSpec("x")
        )(x, p)

    assert layer_flops(forward, array(4, 4), array(16, 4)).layers == {"": 2 * 16 * 16}


def test_what_cannot_be_seen_into_is_named():
    def forward(p, x):
        return jax.pure_callback(lambda x: x, x, x) @ p

    flops = layer_flops(forward, array(4, 4), array(2, 4))
    assert (flops.total, flops.uncounted) == (64, ("pure_callback",))


def test_a_gradient_step_costs_three_forward_passes():
    """The first layer needs no gradient of its input, hence 3 f - f_first: the formula's oracle is the trace itself."""
    params, x = {"a": array(64, 32), "b": array(32, 32)}, array(16, 64)

    def loss(p, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]))

    forward = layer_flops(loss, params, x)
    whole = layer_flops(jax.grad(loss), params, x)
    assert whole.total == training_flops(forward.total) - forward.layers["a"]


def test_inputs_must_be_passed():
    with pytest.raises(ValueError, match="needs the model's inputs as arguments"):
        layer_flops(lambda p: jnp.ones((2, 4)) @ p, array(4, 4))


def test_sparse_flops_scale_masked_layers_exactly():
    forward = layer_flops(mlp, MLP, array(1, 64))
    masks = {"a": jnp.arange(19200).reshape(64, 300) < 384, "b": optax.MaskedNode(), "bias": optax.MaskedNode()}
    assert sparse_flops(forward, masks).layers == {"a": 768, "b": 6000}
    assert sparse_flops(forward, {"a": 0.02}).layers == {"a": 768, "b": 6000}
    none = {"a": optax.MaskedNode(), "b": optax.MaskedNode(), "bias": optax.MaskedNode()}
    assert sparse_flops(forward, none) == forward


def test_other_flops_stay_dense():
    forward = ForwardFlops({"a": 100}, other=7, uncounted=("kernel",))
    assert sparse_flops(forward, {"a": jnp.arange(10) < 1}) == ForwardFlops({"a": 10}, other=7, uncounted=("kernel",))


def test_rigl_accounting_lies_between_sparse_and_dense_gradients():
    assert training_flops(10) == 30
    assert training_flops(10, weight_gradient=100) == 120
    assert rigl_training_flops(10, 100, 100) == (3 * 10 * 100 + 2 * 10 + 100) / 101
    assert rigl_training_flops(10, 10, 100) == training_flops(10)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        rigl_training_flops(10, 100, 0)
