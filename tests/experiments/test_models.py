"""The models: shapes, what is sparse in them, and what each must not look at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import MLP, ByteTransformer, ResNet, ViT
from sparsejax import Unstructured
from sparsejax.masks.paths import named_leaves
from sparsejax.masks.rules import resolve

ATTENTION = [f"attention/{name}/kernel" for name in ("key", "out", "query", "value")]
MODELS = {
    "mlp": (
        lambda rngs: MLP((64, 30, 10, 10), rngs=rngs),
        jnp.ones((3, 8, 8, 1)),
        (3, 10),
        [f"layers/{index}/kernel" for index in range(3)],
    ),
    "transformer": (
        lambda rngs: ByteTransformer(length=12, width=16, depth=1, heads=2, rngs=rngs),
        jnp.ones((3, 12), jnp.int32),
        (3, 12, 256),
        [f"blocks/0/{name}" for name in (*ATTENTION, "down/kernel", "up/kernel")] + ["head/kernel"],
    ),
    "vit": (
        lambda rngs: ViT(image=(8, 8, 1), patch=2, width=16, depth=1, heads=2, classes=10, rngs=rngs),
        jnp.ones((3, 8, 8, 1)),
        (3, 10),
        [f"blocks/0/{name}" for name in (*ATTENTION, "down/kernel", "up/kernel")]
        + ["head/kernel", "patch_projection/kernel"],
    ),
    "resnet": (
        lambda rngs: ResNet(image=(8, 8, 1), channels=(4, 8), depth=1, classes=10, rngs=rngs),
        jnp.ones((3, 8, 8, 1)),
        (3, 10),
        ["blocks/0/conv1/kernel", "blocks/0/conv2/kernel"]
        + [f"blocks/1/{name}/kernel" for name in ("conv1", "conv2", "shortcut_conv")]
        + ["head/kernel", "stem_conv/kernel"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_sparse_leaves(name):
    make, inputs, shape, sparse = MODELS[name]

    def logits(seed, inputs):
        model = make(nnx.Rngs(jax.random.key(seed)))
        return model(inputs), nnx.as_pure(nnx.state(model, nnx.Param))

    out, params = jax.eval_shape(logits, 0, inputs)
    assert (out.shape, out.dtype) == (shape, jnp.float32)
    plan = resolve(params, None, Unstructured())
    assert [leaf.path for leaf in plan if leaf.structure is not None] == sparse


def test_the_transformer_sees_no_later_byte():
    model = ByteTransformer(length=12, width=16, depth=2, heads=2, rngs=nnx.Rngs(0))
    apply = nnx.jit(lambda model, tokens: model(tokens))
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    before = apply(model, tokens)
    after = apply(model, tokens.at[:, 7].set((tokens[:, 7] + 1) % 256))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.array_equal(before[:, 7], after[:, 7])
    assert not np.array_equal(before[:, 11], after[:, 11])


def test_patches_are_squares_of_the_image():
    model = ViT(image=(4, 4, 1), patch=2, width=8, depth=1, heads=2, classes=3, rngs=nnx.Rngs(0))
    seen = []
    model.patch_projection = lambda x: seen.append(x) or jnp.zeros((*x.shape[:2], 8))
    model(jnp.arange(16.0).reshape(1, 4, 4, 1))
    assert seen[0][0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patch is 3, which does not divide images of 8 x 8"):
        ViT(image=(8, 8, 1), patch=3, width=8, depth=1, heads=2, classes=3, rngs=nnx.Rngs(0))


def test_batch_statistics_change_in_training_only():
    model = ResNet(image=(8, 8, 1), channels=(4,), depth=1, classes=10, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    apply = nnx.jit(lambda model, images, train: model(images, train=train), static_argnums=2)

    def statistics():
        return {name: np.asarray(leaf) for name, leaf in named_leaves(nnx.as_pure(nnx.state(model, nnx.BatchStat)))}

    before = statistics()
    single = apply(model, images[:1], False)
    np.testing.assert_allclose(apply(model, images, False)[:1], single, atol=1e-5)
    assert all(np.array_equal(before[name], value) for name, value in statistics().items())
    apply(model, images, True)
    assert not any(np.array_equal(before[name], value) for name, value in statistics().items())
