"""The NNX module and the `attention_fn`, against `nnx.MultiHeadAttention` with the mask written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.attention import (
    Causal,
    Forced,
    Local,
    Quest,
    Ratio,
    ScoreSelector,
    SeerGate,
    Segment,
    Tokens,
    TopK,
    compile_mask,
    pooled_scores,
)
from sparsejax.nn import SparseAttention, attention_fn

OPTIONS = {"num_heads": 4, "in_features": 16, "num_kv_heads": 2, "decode": False}
BLOCKS = {"bq": 8, "bk": 8, "implementation": "xla"}
X = jax.random.normal(jax.random.key(1), (2, 24, 16))


def plain(**options):
    return nnx.MultiHeadAttention(**{**OPTIONS, **options}, rngs=nnx.Rngs(0))


def test_has_the_parameters_of_multi_head_attention():
    ours = SparseAttention(**OPTIONS, normalize_qk=True, pattern=Causal(), rngs=nnx.Rngs(0))
    theirs = plain(normalize_qk=True)
    a, b = nnx.state(ours, nnx.Param), nnx.state(theirs, nnx.Param)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "pattern",
    [
        None,
        Causal() & Local(5),
        Causal() & Segment(np.repeat([0, 1], [10, 14])),
        compile_mask(Causal(), 24, 24, bq=8, bk=8),
    ],
    ids=lambda p: type(p).__name__ if not hasattr(p, "rule") else repr(p),
)
def test_outputs_and_gradients_are_those_of_multi_head_attention(pattern):
    ours, theirs = SparseAttention(**OPTIONS, **BLOCKS, pattern=pattern, rngs=nnx.Rngs(0)), plain()
    written = np.ones((1, 1, 24, 24), bool) if pattern is None else None
    if written is None:
        written = pattern.to_dense(24, 24) if hasattr(pattern, "rule") else pattern.to_dense()

    @nnx.jit
    def run(model, **options):
        return nnx.value_and_grad(lambda model: jnp.sum(jnp.cos(model(X, **options))))(model)

    for a, b in zip(*map(jax.tree.leaves, (run(ours), run(theirs, mask=written))), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5)


def test_attention_fn_serves_multi_head_attention():
    pattern = Causal() & Local(5)
    padding = jnp.arange(24) < jnp.array([20, 24])[:, None, None, None]
    ours, theirs = plain(attention_fn=attention_fn(pattern, **BLOCKS)), plain()
    np.testing.assert_allclose(
        ours(X, mask=padding), theirs(X, mask=padding & pattern.to_dense(24, 24)), atol=3e-5, rtol=3e-5
    )
    everything = plain(attention_fn=attention_fn(**BLOCKS))
    np.testing.assert_allclose(everything(X, is_causal=True), theirs(X, is_causal=True), atol=3e-5, rtol=3e-5)
    with pytest.raises(TypeError, match="must be a Mask, a BlockMask or None, not str"):
        SparseAttention(4, 32, pattern="causal", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot be sown"):
        ours(X, sow_weights=True)
    with pytest.raises(ValueError, match="24 queries and 12 keys"):
        ours(X, X[:, :12])
    with pytest.raises(ValueError, match="only None is supported"):
        plain(attention_fn=attention_fn(pattern, **BLOCKS), precision="highest")(X)


@pytest.mark.parametrize("selector", [None, Quest(Ratio(1.0), page_size=4)], ids=["pattern", "quest"])
def test_decoding_gives_what_the_whole_sequence_gives(selector):
    pattern = None if selector else Local(5)
    ours = SparseAttention(
        **{**OPTIONS, "decode": True}, **BLOCKS, pattern=pattern, selector=selector, rngs=nnx.Rngs(0)
    )
    ours.init_cache((2, 8, 16))

    @nnx.jit
    def step(model, token):
        return model(token)

    cuts = [0, 3, *range(4, 8)]  # three tokens at once, then one by one
    steps = [step(ours, X[:, i:j]) for i, j in itertools.pairwise(cuts)]
    mask = Causal() if selector else Causal() & Local(5)
    whole = plain()(X[:, :7], mask=mask.to_dense(7, 7))
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=3e-5, rtol=3e-5)
    with pytest.raises(ValueError, match="call init_cache first"):
        SparseAttention(**{**OPTIONS, "decode": True}, rngs=nnx.Rngs(0))(X[:, :1])
    with pytest.raises(ValueError, match=r"holds 2 examples of 8 tokens: \(2, 9\) do not fit"):
        ours(X[:, :9])


@pytest.mark.parametrize("heads", [1, 4])
def test_decoding_takes_masks_over_the_cache(heads):
    """Which hide the padding of a batch of prompts, for one."""
    theirs = plain(decode=True)
    ours = SparseAttention(**{**OPTIONS, "decode": True}, **BLOCKS, pattern=Local(5), rngs=nnx.Rngs(0))
    for layer in (theirs, ours):
        layer.init_cache((2, 8, 16))
    seen = jax.random.bernoulli(jax.random.key(1), 0.7, (2, heads, 8, 8)) | jnp.eye(8, dtype=bool)
    window = Local(5).to_dense(8, 8)
    want = [theirs(X[:, i : i + 1], mask=(seen & window)[:, :, i : i + 1]) for i in range(6)]
    got = [ours(X[:, :4], mask=seen[:, :, :4]), ours(X[:, 4:5], mask=seen[:, :, 4:5])]
    got.append(ours(X[:, 5:6], mask=Tokens(kv=seen[:, 0, 5])) if heads == 1 else ours(X[:, 5:6], mask=seen[:, :, 5:6]))
    np.testing.assert_allclose(jnp.concatenate(got, 1), jnp.concatenate(want, 1), atol=3e-5, rtol=3e-5)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 1, 3\); it must be \[2, heads, 1, 8\]"):
        ours(X[:, 6:7], mask=jnp.ones((2, 1, 1, 3), bool))
    with pytest.raises(ValueError, match="positions are given by the cache"):
        ours(X[:, 6:7], q_positions=jnp.arange(1))


def test_a_bool_mask_is_by_index_whatever_positions_are():
    places = jnp.arange(24) * 3
    seen = jax.random.bernoulli(jax.random.key(1), 0.7, (2, 1, 24, 24)) | jnp.eye(24, dtype=bool)
    ours = SparseAttention(**OPTIONS, **BLOCKS, pattern=Local(15), rngs=nnx.Rngs(0))
    near = Local(5).to_dense(24, 24)
    got = ours(X, mask=seen, q_positions=places, kv_positions=places)
    np.testing.assert_allclose(got, plain()(X, mask=seen & near), atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("lead", [(), (1, 2), (2, 1, 1)])
def test_any_leading_axes(lead):
    x = X[0] if lead == () else X.reshape(*lead, *X.shape[1:])
    seen = jax.random.bernoulli(jax.random.key(1), 0.7, (*lead, 4, 24, 24)) | jnp.eye(24, dtype=bool)
    ours = SparseAttention(**OPTIONS, **BLOCKS, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(ours(x, mask=seen), plain()(x, mask=seen), atol=3e-5, rtol=3e-5)
    decoding = SparseAttention(**{**OPTIONS, "decode": True}, rngs=nnx.Rngs(0))
    decoding.init_cache(X.shape[1:])
    with pytest.raises(ValueError, match=r"in decoding, inputs are \[batch, length, features\]"):
        decoding(X[0, :1])


def test_caches_and_parameters_can_be_copied_both_ways():
    theirs = plain(decode=True)
    theirs.init_cache((2, 8, 16))
    for i in range(3):
        theirs(X[:, i : i + 1])
    ours = SparseAttention(**{**OPTIONS, "decode": True}, **BLOCKS, rngs=nnx.Rngs(5))
    ours.init_cache((2, 8, 16))
    nnx.update(ours, nnx.state(theirs, (nnx.Param, nnx.Cache)))
    ours(X[:, 3:4])
    nnx.update(theirs, nnx.state(ours, (nnx.Param, nnx.Cache)))
    np.testing.assert_allclose(ours(X[:, 4:5]), theirs(X[:, 4:5]), atol=3e-5, rtol=3e-5)


def test_a_selector_chooses_blocks():
    select = ScoreSelector(Ratio(1.0), pooled_scores(8, 8), bq=8, bk=8)
    full = SparseAttention(**OPTIONS, **BLOCKS, pattern=Causal(), selector=select, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(full(X), plain()(X, is_causal=True), atol=3e-5, rtol=3e-5)
    select = ScoreSelector(TopK(0), pooled_scores(8, 8), bq=8, bk=8, forced=Forced(diagonal=True))
    own = SparseAttention(**OPTIONS, **BLOCKS, pattern=Causal(), selector=select, rngs=nnx.Rngs(0))
    blocks = np.kron(np.eye(3), np.ones((8, 8))).astype(bool) & np.tri(24, dtype=bool)
    np.testing.assert_allclose(own(X), plain()(X, mask=blocks[None, None]), atol=3e-5, rtol=3e-5)


def test_a_gate_is_a_submodule():
    gate = SeerGate(4, 2, 4, block=8, gate_dim=4, budget=Ratio(0.5), rngs=nnx.Rngs(1))
    layer = SparseAttention(**OPTIONS, **BLOCKS, pattern=Causal(), selector=gate, rngs=nnx.Rngs(0))
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    assert {"selector/query", "selector/key", "query/kernel", "out/bias"} <= names
    assert layer(X).shape == X.shape


def test_dropout():
    layer = SparseAttention(**OPTIONS, **BLOCKS, pattern=Causal(), dropout_rate=0.5, rngs=nnx.Rngs(0))
    still = SparseAttention(**OPTIONS, **BLOCKS, pattern=Causal(), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(X, deterministic=True), still(X))
    assert np.abs(layer(X, deterministic=False) - still(X)).max() > 1e-3
    with pytest.raises(ValueError, match="deterministic=True or False"):
        layer(X)


def test_errors_say_what_is_wrong():
    layer = SparseAttention(**OPTIONS, **BLOCKS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="never formed here"):
        layer(X, sow_weights=True)
    with pytest.raises(ValueError, match=r"inputs_q has shape \(16,\)"):
        layer(X[0, 0])
    with pytest.raises(ValueError, match="give attention_fn to"):
        SparseAttention(**OPTIONS, attention_fn=None, rngs=nnx.Rngs(0))
    compiled = compile_mask(Causal(), 24, 24, bq=8, bk=8)
    with pytest.raises(ValueError, match="give the pattern as an expression"):
        SparseAttention(**OPTIONS, pattern=compiled, selector=Quest(TopK(1)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot be restricted"):
        SparseAttention(**OPTIONS, pattern=compiled, rngs=nnx.Rngs(0))(X, is_causal=True)


@pytest.mark.parametrize("kind", ["module", "attention_fn"])
def test_heads_and_batch_are_split_on_an_explicit_mesh(kind):
    """As where projections are split over heads: values and gradients of parameters are those of one device."""
    pattern, blocks = Causal() & Local(5), {"bq": 8, "bk": 8}
    if kind == "module":
        layer = SparseAttention(**OPTIONS, **blocks, pattern=pattern, rngs=nnx.Rngs(0))
    else:
        layer = plain(attention_fn=attention_fn(pattern, **blocks))
    graph, params = nnx.split(layer, nnx.Param)
    mesh, spec = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4]), jax.P

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        axes = (
            {"bias": (), "kernel": ("tensor",)} if "out" in name else {"bias": ("tensor",), "kernel": (None, "tensor")}
        )
        return jax.device_put(leaf, jax.NamedSharding(mesh, spec(*axes["bias" if "bias" in name else "kernel"])))

    @jax.jit
    def grads(params, x):
        explicit = {} if jax.sharding.get_abstract_mesh().empty else {"out_sharding": spec("data")}

        def loss(params):
            y = nnx.merge(graph, params)(x, **explicit)
            return jnp.sum(y * y), y

        return jax.grad(loss, has_aux=True)(params)

    want = grads(params, X)
    with jax.set_mesh(mesh):
        got = grads(jax.tree.map_with_path(place, params), jax.device_put(X, jax.NamedSharding(mesh, spec("data"))))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))
