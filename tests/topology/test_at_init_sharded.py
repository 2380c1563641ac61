"""On a mesh of eight devices with explicit or automatic axes, masks and steps are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.masks.block import Block
from sparsejax.masks.channel import Channel
from sparsejax.masks.distributions import uniform
from sparsejax.masks.from_params import masks_from_params
from sparsejax.masks.nm import NM
from sparsejax.topology.at_init import grasp, snip
from sparsejax.topology.controls import collapsed_layers, effective_masks, shuffle_masks
from sparsejax.topology.synflow import synflow
from sparsejax.topology.tickets import lottery_ticket, rewind
from sparsejax.transforms.penalties import sr_ste_decay
from sparsejax.transforms.proximal import group_lasso, proximal_l1

SPECS = {"a": P("data", "model"), "b": P("model", None)}
INPUTS = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)


def weights():
    return {
        "a": jax.random.normal(jax.random.key(0), (16, 8)),
        "b": jax.random.normal(jax.random.key(1), (8, 4)),
    }


def plain_apply(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def explicit_apply(params, x):
    hidden = jax.nn.relu(jnp.einsum("bi,ij->bj", x, params["a"], out_sharding=P(None, "model")))
    return jnp.einsum("bi,ij->bj", hidden, params["b"], out_sharding=P(None, None))


def results(params, masks, apply):
    x = jnp.asarray(INPUTS)

    def loss(params, x):
        return jnp.mean(apply(params, x) ** 2)

    def stepped(element):
        updates, _ = jax.jit(element.update)(params, element.init(params), params, masks=masks)
        return updates

    def last_ticket(**options):
        return list(lottery_ticket(lambda params, masks, round: params, params, rounds=2, **options))[-1].masks

    return {
        "snip": snip(loss, params, [x], 0.5),
        "snip block": snip(loss, params, [x], 0.5, structure=Block((2, 2))),
        "snip nm": snip(loss, params, [x], 0.5, structure=NM(2, 4)),
        "grasp": grasp(loss, params, [x], 0.5),
        "synflow": synflow(apply, params, x, 0.5, rounds=2),
        "synflow channel": synflow(apply, params, x, 0.5, rounds=2, structure=Channel()),
        "ticket": last_ticket(),
        "block ticket": last_ticket(structure=Block((2, 2)), distribution=uniform),
        "shuffle": shuffle_masks(masks, 0),
        "effective": effective_masks(apply, params, x, masks),
        "rewind": rewind(params, masks),
        "from params": masks_from_params(params),
        "decay": stepped(sr_ste_decay(0.1)),
        "l1": stepped(proximal_l1(0.3, 1.0)),
        "group": stepped(group_lasso(0.3, 1.0)),
    }


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)])
def test_results_do_not_depend_on_the_mesh(axis_type):
    params = weights()
    masks = {"a": params["a"] > 0, "b": params["b"] > -0.5}
    expected = jax.tree.map(np.asarray, results(params, masks, plain_apply))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type, axis_type))

    def spread(tree):
        return {name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name])) for name, leaf in tree.items()}

    with jax.set_mesh(mesh):
        params, masks = spread(params), spread(masks)
        got = results(params, masks, explicit_apply if axis_type == AxisType.Explicit else plain_apply)
        assert collapsed_layers(masks) == []
    for case, tree in got.items():
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(params[name].sharding, 2), (case, name)
            np.testing.assert_allclose(leaf, expected[case][name], rtol=0, atol=1e-6, err_msg=case)
