"""Training loops as people write them: nothing in them changes but the optimizer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.masks.paths import named_leaves
from sparsejax.masks.rules import equinox_rules
from sparsejax.topology.dynamic import rigl
from sparsejax.topology.latent import sr_ste
from sparsejax.topology.magnitude import gradual
from sparsejax.transforms.access import check, finalize, mask_params, masks_of, summary
from sparsejax.transforms.sparsify import sparsify
from tests.problems import (
    NNXMLP,
    PRESETS,
    LinenMLP,
    exact_grads,
    exact_params,
    mlp_apply,
    mlp_params,
    regression_data,
    regression_loss,
)

ALGORITHMS = {
    "rigl": lambda: rigl(0.75, update_every=4, stop=30),
    "gradual": lambda: gradual(0.75, begin=2, end=20, update_every=6),
    "sr_ste": lambda: sr_ste(2, 4),
}
KEPT = {"rigl": 96, "gradual": 96, "sr_ste": 192}


def improved(losses):
    return losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", ["gradual"])
def test_plain_loop(name):
    params, data = mlp_params(), regression_data()
    optimizer = sparsify(optax.adam(2e-2), ALGORITHMS[name]())
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(regression_loss)(params, *data)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(40):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert improved(losses)
    assert check(params, state) == (40, KEPT[name], 0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("rigl", jnp.float32), ("gradual", jnp.bfloat16), ("sr_ste", jnp.float32), ("sr_ste", jnp.bfloat16)],
)
def test_nnx_optimizer(name, dtype):
    model = NNXMLP(nnx.Rngs(0), dtype)
    optimizer = nnx.Optimizer(model, sparsify(optax.adam(2e-2), ALGORITHMS[name]()), wrt=nnx.Param)
    x, y = (array.astype(dtype) for array in regression_data())

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert improved(losses)
    params = nnx.state(model, nnx.Param)
    assert check(params, optimizer) == (40, KEPT[name], 0)
    assert model.hidden.kernel[...].dtype == dtype
    masked = mask_params(params, optimizer)
    chex.assert_trees_all_equal(nnx.to_pure_dict(masked), nnx.to_pure_dict(params))
    assert dict(named_leaves(masks_of(optimizer))).keys() == {"hidden/kernel", "out/kernel"}
    assert "hidden/kernel" in str(summary(params, optimizer))


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        ("rigl", AxisType.Auto),
        pytest.param("sr_ste", AxisType.Auto, marks=pytest.mark.slow),
        ("sr_ste", AxisType.Explicit),
    ],
)
def test_nnx_with_sharded_parameters(name, axis_type):
    """Masks and moments take the sharding that the parameters' metadata names."""
    x, y = regression_data()
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)):
        model = NNXMLP(nnx.Rngs(0), sharding=(None, "model") if axis_type == AxisType.Auto else (None, None))
        optimizer = nnx.Optimizer(model, sparsify(optax.adam(2e-2), ALGORITHMS[name]()), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
            optimizer.update(model, grads)
            return loss

        losses = [float(step(model, optimizer)) for _ in range(12)]
        assert losses[-1] < losses[0]
        assert check(nnx.state(model, nnx.Param), optimizer).leaks == 0
        mask, kernel = masks_of(optimizer)["hidden"]["kernel"], model.hidden.kernel[...]
        mask = getattr(mask, "value", mask)
        assert mask.sharding.is_equivalent_to(kernel.sharding, 2)


@pytest.mark.parametrize("name", ["rigl", "sr_ste"])
def test_linen_train_state(name):
    model, (x, y) = LinenMLP(), regression_data()
    params = model.init(jax.random.key(0), x)["params"]
    tx = sparsify(optax.adam(2e-2), ALGORITHMS[name]())
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn({"params": p}, x) - y) ** 2))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(40):
        state, loss = step(state)
        losses.append(float(loss))
    assert improved(losses)
    assert check(state.params, state.opt_state) == (40, KEPT[name], 0)


@pytest.mark.peers
@pytest.mark.parametrize("name", ALGORITHMS)
def test_equinox(name, peer):
    eqx = peer("equinox")
    keys = jax.random.split(jax.random.key(0))
    model = eqx.nn.MLP(16, 8, 16, depth=1, activation=jnp.tanh, key=keys[0])
    optimizer = sparsify(optax.adam(2e-2), ALGORITHMS[name](), rules=equinox_rules)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    x, y = regression_data()

    @eqx.filter_jit
    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(lambda model: jnp.mean((jax.vmap(model)(x) - y) ** 2))(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(40):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert improved(losses)
    assert check(eqx.filter(model, eqx.is_inexact_array), state) == (40, KEPT[name], 0)
    if name == "sr_ste":  # groups run along the inputs, which equinox has last
        mask = masks_of(state).layers[0].weight
        assert bool((mask.reshape(16, 4, 4).sum(-1) == 2).all())


@pytest.mark.parametrize("look", [summary, check, finalize])
def test_states_of_several_seeds_are_read_one_at_a_time(look):
    optimizer = sparsify(optax.sgd(0.1), rigl(0.5))
    params = {"kernel": jnp.ones((3, 4, 4))}
    states = jax.vmap(optimizer.init)(params)
    with pytest.raises(ValueError, match=r"holds 3 runs side by side.*index one seed first: .*lambda x: x\[0\]"):
        look(params, states)
    look(*jax.tree.map(lambda x: x[0], (params, states)))


def test_starting_sparse_takes_one_optional_line():
    params = mlp_params()
    optimizer = sparsify(optax.adam(2e-2), rigl(0.75))
    state = optimizer.init(params)
    params = mask_params(params, state)
    assert sum(int(jnp.count_nonzero(params[name]["kernel"])) for name in params) == 96
    assert check(params, state) == (0, 96, 0)
    assert bool(jnp.isfinite(mlp_apply(params, regression_data()[0])).all())


SPECS = {
    "hidden": {"kernel": P("data", "model"), "bias": P("model")},
    "out": {"kernel": P("model", None), "bias": P()},
}


# These run the same code as another preset, with other numbers.
ALIKE = (
    "random",
    "saliency",
    "gradual",
    "rigl",
    "granet",
    "cyclic",
    "mdgf_exponential",
    "mdgf_unscaled",
    "sdgf_stepwise",
)


def shard(mesh, tree, stacked=False):
    put = lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, P(None, *spec) if stacked else spec))  # noqa: E731
    return jax.tree.map(put, SPECS, tree, is_leaf=lambda node: isinstance(node, P))


def typed(leaf):
    return leaf.shape, leaf.dtype, jax.typeof(leaf).sharding.spec


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ALIKE])
def test_types_on_an_explicit_mesh_stay_those_of_init(name):
    """Shapes, dtypes and shardings of the state, traced and not; moments and masks are sharded as parameters are."""
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = shard(mesh, mlp_params())
        tx = sparsify(optax.adamw(1e-2), PRESETS[name].make(params))
        state = tx.init(params)
        eager = jax.tree.map(typed, state)

        def step(params, state):
            traced = tx.init(params)
            assert jax.tree.map(typed, traced) == eager
            updates, after = tx.update(params, state, params)
            assert jax.tree.map(typed, after) == eager
            assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
            jax.lax.cond(True, lambda: after, lambda: traced)

        jax.eval_shape(step, params, state)
        for path, mask in named_leaves(state.masks):
            assert jax.typeof(mask).sharding == jax.typeof(dict(named_leaves(params))[path]).sharding


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [("rigl_nm", AxisType.Auto), ("granet", AxisType.Auto)]
    + [(name, AxisType.Explicit) for name in ("set_", "rigl_block", "rigl_channel", "granet", "movement", "sr_ste")],
)
def test_eight_devices_train_what_one_does(name, axis_type):
    """Given equal gradients, bit for bit: masks, weights, and everything in the state."""
    mesh = mesh_of(axis_type)
    tx = sparsify(optax.sgd(0.25, momentum=0.5), PRESETS[name].make(exact_params()))

    def train(params, grads):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    train = jax.jit(train, compiler_options={"xla_backend_optimization_level": 0})
    alone = train(exact_params(), exact_grads())
    with jax.set_mesh(mesh):
        together = train(shard(mesh, exact_params()), shard(mesh, exact_grads(), stacked=True))
    chex.assert_trees_all_equal(jax.device_get(alone), jax.device_get(together))
    if axis_type == AxisType.Explicit:
        for path, mask in named_leaves(together[1].masks):
            assert mask.sharding.is_equivalent_to(dict(named_leaves(together[0]))[path].sharding, 2)
            assert len({shard.device for shard in mask.addressable_shards}) == 8
            assert all(np.asarray(shard.data).size < mask.size for shard in mask.addressable_shards)
