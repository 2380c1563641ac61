import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax
from experiments.models import ByteTransformer, ResNet, ViT
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.parameters.shrink_model import model_groups, shrink_model


def scatter(model):
    """Biases and statistics as training leaves them: not at their initial values."""
    random = np.random.default_rng(1)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param | nnx.BatchStat) and variable[...].ndim == 1:
            variable[...] = jnp.asarray(random.uniform(0.5, 1.5, variable[...].shape), jnp.float32)
    return model


MODELS = {
    "resnet": (
        lambda: ResNet(image=(6, 6, 1), channels=(6, 8), depth=1, classes=3, rngs=nnx.Rngs(0)),
        jax.random.normal(jax.random.key(0), (2, 6, 6, 1)),
    ),
    "vit": (
        lambda: ViT(image=(4, 4, 1), patch=2, width=16, depth=1, heads=4, classes=3, rngs=nnx.Rngs(0)),
        jax.random.normal(jax.random.key(0), (2, 4, 4, 1)),
    ),
    "bytes_lm": (
        lambda: ByteTransformer(length=6, width=16, depth=1, heads=4, rngs=nnx.Rngs(0)),
        jax.random.randint(jax.random.key(0), (2, 6), 0, 256),
    ),
}


def masked_outputs(model, masks, inputs):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    named = dict(named_leaves(masks))
    params = map_with_names(lambda name, leaf: leaf * named[name] if name in named else leaf, params)
    return outputs(nnx.merge(graph, params, rest), inputs)


def outputs(model, inputs):
    graph, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graph, state)(inputs))(state)


@pytest.mark.parametrize("name", ["resnet", "vit", pytest.param("bytes_lm", marks=pytest.mark.slow)])
def test_models_shrink_with_equal_outputs(name):
    make, inputs = MODELS[name]
    model = scatter(make())
    groups = model_groups(model, inputs[:1])
    params = nnx.state(model, nnx.Param)
    masks = groups.prune(params, 0.5)
    smaller, report = shrink_model(model, masks, inputs[:1])
    np.testing.assert_allclose(outputs(smaller, inputs), masked_outputs(model, masks, inputs), rtol=1e-5, atol=1e-5)
    assert not report.stays
    assert report.sizes == {name: (group.size, group.size // 2) for name, group in groups.free.items()}
    assert report.parameters[1] < (0.45 if name == "resnet" else 0.9) * report.parameters[0]
    if name == "resnet":
        assert smaller.stem_conv.out_features == 3
        assert smaller.stem_norm.num_features == 3
    else:
        assert smaller.blocks[0].attention.num_heads == 2
        assert smaller.blocks[0].up.out_features == 32


def test_groups_of_a_layer_are_what_training_prunes():
    make, inputs = MODELS["resnet"]
    model = make()
    params = nnx.state(model, nnx.Param)
    masks = model_groups(model, inputs[:1]).prune(params, 0.5)
    transform = sparsejax.sparsify(optax.sgd(0.1), sparsejax.from_masks(masks))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    grads = nnx.jit(nnx.grad(lambda model: jnp.sum(model(inputs) ** 2)))(model)
    nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))(optimizer, model, grads)
    kept = sparsejax.masks_of(optimizer.opt_state)
    smaller, report = shrink_model(model, kept, inputs[:1])
    np.testing.assert_allclose(outputs(smaller, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-5)
    assert report.parameters[1] < 0.45 * report.parameters[0]


class Small(nnx.Module):
    def __init__(self, rngs):
        self.point = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=4, rngs=rngs)
        self.head = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.depthwise(self.point(x)))), (2, 2), (2, 2))
        return self.head(x.reshape(len(x), -1))


def test_depthwise_group_norm_pooling_and_flattening():
    model = scatter(Small(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    groups = model_groups(model, x[:1])
    [(_, group)] = groups.free.items()
    assert group.size == 4  # whole groups of the norm
    head = np.repeat(np.array([True, False, True, True]), 2)
    masks = {"head": {"kernel": jnp.asarray(np.tile(head, 4)[:, None] & np.ones((32, 2), bool))}}
    smaller, _ = shrink_model(model, masks, x[:1])
    np.testing.assert_allclose(outputs(smaller, x), masked_outputs(model, masks, x), rtol=1e-5, atol=1e-5)
    assert smaller.norm.num_groups == 3
    assert smaller.depthwise.feature_group_count == 6
    assert smaller.head.in_features == 24


class Own(nnx.Module):
    def __init__(self, rngs):
        self.width = 6
        self.up, self.down = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)).reshape(len(x), self.width))


def test_a_module_that_holds_a_size_of_its_own():
    model, x = Own(nnx.Rngs(0)), jnp.ones((2, 3))
    assert not model_groups(model, x).free

    def resize(module):
        if isinstance(module, Own):
            module.width = module.up.kernel.shape[1]

    masks = {"down": {"kernel": jnp.ones((6, 2), bool).at[2].set(False)}}
    smaller, _ = shrink_model(model, masks, x, resize=resize)
    assert smaller.width == 5
    np.testing.assert_allclose(outputs(smaller, x), masked_outputs(model, masks, x), rtol=1e-5)


class UNet(nnx.Module):
    """A skip connection by concatenation around a strided and a transposed convolution, and squeeze-and-excitation."""

    def __init__(self, rngs):
        self.conv_down = nnx.Conv(2, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.conv_low = nnx.Conv(8, 12, (3, 3), strides=2, rngs=rngs)
        self.squeeze, self.excite = nnx.Linear(12, 4, rngs=rngs), nnx.Linear(4, 12, rngs=rngs)
        self.conv_up = nnx.ConvTranspose(12, 6, (2, 2), strides=(2, 2), rngs=rngs)
        self.conv_out = nnx.Conv(14, 2, (3, 3), rngs=rngs)

    def __call__(self, x):
        high = nnx.relu(self.norm(self.conv_down(x)))
        low = nnx.silu(self.conv_low(high))
        low = low * jax.nn.sigmoid(self.excite(nnx.relu(self.squeeze(low.mean((1, 2))))))[:, None, None]
        return self.conv_out(jnp.concatenate([nnx.silu(self.conv_up(low)), high], axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_unet_shrinks_whatever_is_pruned(tied):
    model, x = scatter(UNet(nnx.Rngs(0))), jax.random.normal(jax.random.key(1), (2, 8, 8, 2))
    params = nnx.state(model, nnx.Param)
    groups = model_groups(model, x[:1])
    assert sorted(group.size for group in groups.free.values()) == [4, 6, 8, 12]
    masks = groups.prune(params, 0.5)
    if not tied:  # outputs of each kernel by itself, as training by channels does it
        random = np.random.default_rng(0)
        outputs_of = lambda leaf: random.random(leaf.shape[-1]) < 0.6  # noqa: E731
        masks = map_with_names(lambda _, p: jnp.broadcast_to(outputs_of(p), p.shape) if p.ndim > 1 else None, params)
    smaller, report = shrink_model(model, masks, x[:1])
    np.testing.assert_allclose(outputs(smaller, x), masked_outputs(model, masks, x), rtol=1e-4, atol=1e-5)
    assert report.parameters[1] < (0.35 if tied else 1.0) * report.parameters[0]
    if tied:
        assert (smaller.conv_up.in_features, smaller.conv_up.out_features) == (6, 3)
