"""What travels between devices, and what is counted of a program that is only compiled."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax
from experiments.compile import CompileError, Target, compile_for, parse_target, run
from experiments.experiment import UsageError
from experiments.hlo import traffic
from experiments.models import byte_pod
from experiments.sharding import Layout, fill_mesh, make_mesh
from pallas_kernels import aot
from sparsejax.analysis.trace_products import count_products
from sparsejax.parameters import to_sparse


def mask_update_traffic(layers: int, width: int, stored: sparsejax.Block | None = None):
    """Traffic of one call of `update`, in which masks may move, under an optimizer that needs none itself.

    With `stored`, half of the blocks of weights are stored.
    """
    layout = Layout(make_mesh((2, 2, 2)))
    given = {} if stored is None else {"structure": stored}
    algorithm = sparsejax.rigl(0.8, distribution=sparsejax.uniform, update_every=2, **given)
    optimizer = sparsejax.sparsify(optax.sgd(0.1), algorithm)
    shapes = {f"layer{i}": {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32)} for i in range(layers)}
    params = shapes if stored is None else jax.eval_shape(lambda p: to_sparse(p, None, stored, capacity=0.5), shapes)
    state = jax.eval_shape(optimizer.init, params)

    def put(tree):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout.of_state(tree, params)
        )

    with layout.context():
        update = jax.jit(optimizer.update, out_shardings=(layout.of_params(params), layout.of_state(state, params)))
        return traffic(update.lower(put(params), put(state), put(params)).compile().as_text())


def test_mask_updates_exchange_a_few_numbers_a_layer():
    one, wide, three = mask_update_traffic(1, 32), mask_update_traffic(1, 256), mask_update_traffic(3, 32)
    assert one == wide, "the traffic depends on the size of layers"
    assert 2 * one.total < three.total <= 3 * one.total + 32
    assert one.total < 500  # bytes, while the layer itself has 4096 and 262144


@pytest.mark.slow
def test_updates_of_stored_blocks_exchange_a_few_numbers_a_slot():
    """Half of 16 x 16 blocks have slots, half of as many larger ones, and half of 32 x 32."""
    few, larger, many = (
        mask_update_traffic(1, width, sparsejax.Block((block, block), groups=4))
        for width, block in ((64, 4), (256, 16), (128, 4))
    )
    assert few == larger, "the traffic depends on the size of blocks"
    assert many.total - few.total <= 20 * (512 - 128)  # where four orders put a slot; and for a block, a byte


def test_loops_count_as_often_as_they_run():
    mesh = make_mesh((8, 1, 1))
    rows = PartitionSpec("data")

    def body(x):
        def trip(carry, _):
            return carry + jax.lax.psum(carry, "data"), None

        return jax.lax.scan(trip, x, None, length=5)[0]

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    found = traffic(run.lower(jnp.ones((8, 16), jnp.float32)).compile().as_text())
    assert (found.calls["all-reduce"], found.bytes["all-reduce"]) == (5, 5 * 16 * 4)


def test_an_operation_spread_over_fusions_counts_once():
    """As libtpu writes one that runs beside others: in the fusion that starts it, and in the one that ends it."""
    gather = "all-gather(%p), channel_id=1, dimensions={0}"
    chained = f'{gather}, frontend_attributes={{chain_id="7"}}'
    text = f"""
%start (p: f32[4]) -> f32[8] {{
  ROOT %a = f32[8]{{0}} {chained}
}}
%end (p: f32[4]) -> f32[8] {{
  ROOT %a = f32[8]{{0}} {chained}
}}
ENTRY %main (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0)
  %b = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%start
  %c = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%end
  ROOT %d = f32[8]{{0}} {gather}
}}"""
    assert dict(traffic(text).bytes) == {"all-gather": 2 * 32}


def test_flops_of_the_trace_are_those_of_an_unrolled_program():
    """A scan over six layers and its gradient: the compiler counts the unrolled loop alike."""

    def loss(weights, x, unroll):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, unroll=unroll)[0])

    weights, x = jnp.zeros((6, 128, 128)), jnp.zeros((64, 128))
    step = jax.jit(jax.grad(loss), static_argnums=2)
    counted = sum(count_products(step.trace(weights, x, 1).jaxpr, [])[0].values())
    assert counted == 3 * 6 * 2 * 64 * 128 * 128
    # The unrolled program leaves out the gradient of the first layer's input, and counts element-wise work.
    unrolled = step.lower(weights, x, True).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(unrolled, rel=0.1)
    assert step.lower(weights, x, 1).compile().cost_analysis()["flops"] < counted / 2


def test_targets_and_meshes_that_do_not_exist_are_refused():
    assert parse_target("v5e:16x16")[1] == 256
    assert parse_target("h200:16")[1] == 16
    for target, message in {
        "v5": "give a kind .* such as v5e:16x16",
        "v5p": "slices of v5p have three sides, each 1, 2 or a multiple of 4, such as v5p:4x4x8",
        "v5p:8by8": "slices of v5p have three sides",
        "v4:4x0x4": "slices of v4 have three sides",
        "v5e:3x7": "slices of v5e are 1x1, .*, 16x16",
        "h200:4x2": "give a number of GPUs, up to 8 or a multiple of that, such as h200:8",
        "h200:12": "give a number of GPUs",
    }.items():
        with pytest.raises(UsageError, match=f"target is '{target}'; {message}"):
            parse_target(target)
    with pytest.raises(UsageError, match=r"mesh is \(3, 1, 1\), .* 256 devices: the product must be 256"):
        compile_for("byte_pod", None, Target("v5e:16x16", (3, 1, 1)))  # before anything is compiled
    with pytest.raises(UsageError, match=r"mesh is \(3, -1, 1\), which does not fit 8 devices"):
        fill_mesh((3, -1, 1), 8)
    with pytest.raises(UsageError, match=r"one of them may be -1"):
        fill_mesh((-1, -1, 1), 8)
    with pytest.raises(UsageError, match=r"the product must be 8"):
        make_mesh((4, 4, 1))


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v4:2x2x1", "v5p:2x2x4", "v5e:2x4"])
def test_the_compiler_has_a_device_for_each_chip_of_a_target(target):
    if lacking := aot.missing("v5e"):
        pytest.skip(lacking)
    code = f"from experiments.compile import target_devices; print(len(target_devices({target!r})))"
    environment = os.environ | aot.environment(target.partition(":")[0])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(parse_target(target)[1])], done.stderr


@pytest.mark.aot
def test_a_step_is_compiled_for_chips_that_are_not_here_and_refused_where_they_are_too_few(tmp_path, capsys):
    if lacking := aot.missing("v5e"):
        pytest.skip(lacking)
    config = byte_pod.Config(width=256, depth=2, heads=2, hidden=512, length=512, tile=128, block=128, density=0.5)
    file = tmp_path / "figures.json"
    assert run("byte_pod", config, Target("v5e:2x2", (-1, 2, 1), str(file))) == 0
    assert "GiB: fits\n" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert (found["chips"], found["mesh"]) == (4, [2, 2, 1])
    assert found["collectives"]["all-gather"][0] > 0
    # Four windows: projections and half of two MLP matrices of each layer, and the head; backward costs twice as much.
    # Beside these there are the products of attention, and layers that are computed again.
    products = 3 * 2 * 4 * 512 * 256 * (2 * (4 * 256 + 512) + 256)
    assert products < found["flops"] < 3 * products
    with pytest.raises(CompileError, match=r"byte_pod does not fit v5e:2x2 with mesh 2 2 1: take more chips"):
        compile_for("byte_pod", dataclasses.replace(config, rows_per_device=65536), Target("v5e:2x2", (2, 2, 1)))


def test_axes_that_do_not_divide_stay_whole():
    layout = Layout(make_mesh((1, 2, 4)))
    assert layout.spec("blocks/0/up/kernel", (6, 8)) == PartitionSpec("fsdp", "tensor")
    assert layout.spec("blocks/0/up/kernel", (7, 6)) == PartitionSpec(None, None)
    assert layout.spec("blocks/0/attention/out/kernel", (4, 8, 6)) == PartitionSpec("tensor", None, "fsdp")
    assert layout.spec("norm/scale", (6,)) == PartitionSpec()
    params = {"up": {"kernel": np.zeros((6, 8))}}
    state = {"mu": params, "count": np.zeros(())}
    placed = layout.of_state(state, params)
    assert placed["mu"]["up"]["kernel"] == NamedSharding(layout.mesh, PartitionSpec("fsdp", "tensor"))
    assert placed["count"].is_fully_replicated
