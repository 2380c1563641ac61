"""The byte transformer for pods: on eight devices, under shard_map, it is the network of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import byte_pod
from experiments.sharding import make_mesh
from sparsejax import masks_of
from sparsejax.masks.paths import named_leaves

CONFIG = byte_pod.Config(
    width=32, depth=2, heads=2, hidden=64, length=32, local=7, sink=4, tile=8, density=0.5, block=8, update_every=2
)


def trained(layout, tokens, steps: int):
    """Parameters and masks after some steps, blocks moving at the third, and the losses."""
    params = byte_pod.init(CONFIG, jax.random.key(0), groups=2)
    opt_state = byte_pod.optimizer(CONFIG).init(params)
    step = byte_pod.make_step(CONFIG, layout, "xla")
    if layout is not None:
        params, opt_state = (jax.device_put(t, layout.of_state(t, params)) for t in (params, opt_state))
        tokens = jax.device_put(tokens, layout.sharding(byte_pod.BATCH))
    step, seen = jax.jit(step), []
    for _ in range(steps):
        if layout is None:
            params, opt_state, loss = step(params, opt_state, tokens)
        else:
            with layout.context():
                params, opt_state, loss = step(params, opt_state, tokens)
        seen.append(float(loss))
    return params, masks_of(opt_state), seen


@pytest.mark.slow
def test_eight_devices_train_the_network_of_one():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, CONFIG.length + 1)), jnp.int32)
    one, masks, losses = trained(None, tokens, 4)
    layout = byte_pod.layout_on(make_mesh((4, 2, 1)))
    eight, masks_of_eight, losses_of_eight = trained(layout, tokens, 4)
    np.testing.assert_allclose(losses_of_eight, losses, rtol=2e-3)
    assert losses[-1] < losses[0]
    start = byte_pod.init(CONFIG, jax.random.key(0), groups=2)
    for name in ("up", "down"):
        np.testing.assert_array_equal(masks_of_eight[name], masks[name])
        assert not np.array_equal(masks[name], start[name].mask())
        assert int(jnp.sum(masks[name])) == CONFIG.depth * 16
    for (path, a), (_, b) in zip(named_leaves(eight), named_leaves(one), strict=True):
        if not jnp.issubdtype(a.dtype, jnp.integer):  # Adam's steps have the size of the learning rate
            np.testing.assert_allclose(a, b, atol=6 * CONFIG.learning_rate, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "message"), [({"heads": 3}, "heads is 3; it must divide"), ({"block": 12}, "block is 12 and fsdp")]
)
def test_sizes_that_do_not_divide_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        byte_pod.init(byte_pod.Config(**{"width": 32, "hidden": 64, "block": 8, **changes}), jax.random.key(0))
