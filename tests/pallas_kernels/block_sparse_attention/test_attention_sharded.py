"""Attention on explicitly sharded arrays: output, lse and all gradients are those of one device."""

import dataclasses
import shutil

import attention_zoo as zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.block_sparse_attention import block_sparse_attention, causal, from_tiles
from pallas_kernels.compat import abstract_device

P = PartitionSpec
COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
BOTH = P("data", None, "tensor")
BASE = zoo.Case(4, 8, 4, 24, 40, 16, 24, 8, 8, batch_lists=1, head_lists=1, rule="window", options=frozenset(), seed=0)


def mesh_of():
    return jax.make_mesh((2, 4), ("data", "tensor"))


@dataclasses.dataclass(frozen=True)
class Sharded(zoo.Case):
    """The arrays of a case on a mesh of 2 x 4 devices: q, k and v by `specs`, the rest by `others`."""

    specs: tuple = (BOTH, BOTH, BOTH)
    others: str = "whole"

    def arrays(self, dtype):
        lists, qkv, trained, fixed, cotangents = super().arrays(dtype)
        mesh = jax.sharding.get_mesh()

        def put(x, spec):
            return jax.device_put(x, NamedSharding(mesh, spec))

        def elsewhere(x):  # split where it can be, along whatever axis that is
            x = jnp.asarray(x)
            if self.others == "whole" or not jnp.issubdtype(x.dtype, jnp.number):
                return put(x, P())
            axis = next((i for i, size in enumerate(x.shape) if size % 4 == 0), None)
            return put(x, P() if axis is None else P(*(None,) * axis, "tensor"))

        qkv = tuple(put(x, spec) for x, spec in zip(qkv, self.specs, strict=True))
        fixed = {k: elsewhere(x) if k == "kv_lengths" else x for k, x in fixed.items()}
        return jax.tree.map(elsewhere, lists), qkv, jax.tree.map(elsewhere, trained), fixed, cotangents


def explicitly(case: zoo.Case, implementation: str, specs: tuple, others: str):
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(zoo.Case)}
    with jax.set_mesh(mesh_of()):
        return Sharded(**fields, specs=specs, others=others).run(implementation, jnp.float32)


CASES = {
    "a list for all": (BASE, (BOTH,) * 3, "whole"),
    "lists per key head and batch, GQA, options": (
        dataclasses.replace(
            BASE, batch_lists=4, head_lists=4, rule="segments",
            options=frozenset({"alibi", "block_bias", "sinks", "kv_lengths", "soft_cap"}),
        ),
        (BOTH,) * 3, "split",
    ),
    "lists per query head, bits": (
        dataclasses.replace(BASE, head_lists=8, rule="rule and bits", options=frozenset({"block_bias"})),
        (BOTH,) * 3, "split",
    ),
    "batch only, keys whole": (
        dataclasses.replace(BASE, batch_lists=4, options=frozenset({"alibi", "sinks", "block_bias"})),
        (P("data"), P(), P()), "whole",
    ),
    "heads only, as the values say": (
        dataclasses.replace(BASE, head_lists=4), (P(), P(), P(None, None, "tensor")), "whole",
    ),
    "batch over both axes": (
        dataclasses.replace(BASE, batch=8, heads=3, kv_heads=1, options=frozenset({"dropout", "kv_lengths"})),
        (P(("data", "tensor")), P("data"), P()), "whole",
    ),
    "dropout over heads": (
        dataclasses.replace(BASE, batch=2, options=frozenset({"dropout", "block_bias"})), (BOTH,) * 3, "whole",
    ),
    "one query": (dataclasses.replace(BASE, q_len=1, options=frozenset({"kv_lengths"})), (BOTH,) * 3, "whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["xla", "native"])
def test_values_and_gradients_are_those_of_one_device(name, implementation):
    if implementation == "native" and not COMPILER:
        pytest.skip("no C++ compiler; its refusal is tested")
    case, specs, others = CASES[name]
    want = case.run(implementation, jnp.float32)
    got = explicitly(case, implementation, specs, others)
    assert any(got[0][0].sharding.spec), "the output is whole"
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("seed", range(3))
def test_a_bias_of_elements_is_split_along(seed):
    """Its three shapes: a bias for each head, for each sequence, and for each query of all."""
    case = dataclasses.replace(BASE, options=frozenset({"bias"}), seed=seed)
    want, got = case.run("xla", jnp.float32), explicitly(case, "xla", (BOTH,) * 3, "whole")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_all_that_a_call_can_return_is_split_alike():
    lists, qkv, *_ = dataclasses.replace(BASE, head_lists=8).arrays(jnp.float32)
    options = {"return_lse": True, "return_max_logit": True, "block_stats": "mean"}
    want = block_sparse_attention(*qkv, lists, **options)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        o, aux = got = block_sparse_attention(*jax.device_put(qkv, NamedSharding(mesh, BOTH)), lists, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    for x, spec in ((o, BOTH), *((x, P("data", "tensor")) for x in aux)):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def test_pages_stay_with_the_sequences_that_read_them():
    r = np.random.default_rng(0)
    lists, (q, k, v), *_ = dataclasses.replace(BASE, q_len=1, batch_lists=4).arrays(jnp.float32)
    order = r.permutation(4 * 5)
    table = jnp.asarray(np.argsort(order).reshape(4, 5), jnp.int32)
    pools = [x.reshape(20, 8, *x.shape[2:])[order] for x in (k, v)]
    want = block_sparse_attention(q, k, v, lists)
    mesh = mesh_of()
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    pools = [put(x, None, None, "tensor") for x in pools]
    with jax.set_mesh(mesh):
        got = jax.jit(block_sparse_attention)(put(q, "data", None, "tensor"), *pools, lists, page_table=table)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"k .* is split along axis 0, its pages, over mesh axis 'data'"):
            block_sparse_attention(q, put(pools[0], "data"), pools[1], lists, page_table=table)


@pytest.mark.parametrize(
    ("specs", "changes", "message"),
    [
        (
            {"q": P(None, "data", "tensor")},
            {},
            r"q \(4, 24, 8, 16\) is split along axis 1, its length, over mesh axis 'data'; .* "
            r"jax.reshard\(q, P\(None, None, 'tensor', None\)\)",
        ),
        (
            {"v": P("data", None, None, "tensor")},
            {},
            r"v .* is split along axis 3, its features, over mesh axis 'tensor'; .* "
            r"jax.reshard\(v, P\('data', None, None, None\)\)",
        ),
        (
            {"q": P(None, None, ("data", "tensor"))},
            {},
            r"the heads of q \(4, 24, 8, 16\) are split over mesh axes 'data', 'tensor' into 8 parts, which do not "
            r"divide the 4 heads of k and v: repeat those, jnp.repeat\(k, 2, axis=2\), and v alike",
        ),
        (
            {"q": BOTH},
            {"dropout": (0.5, jax.random.key(0))},
            "dropout with the heads of q .* split over mesh axis 'tensor': a device can then take one sequence only",
        ),
    ],
    ids=["length", "features", "heads", "dropout"],
)
def test_what_cannot_be_split_is_named_with_a_remedy(specs, changes, message):
    lists, qkv, *_ = BASE.arrays(jnp.float32)
    mesh = mesh_of()
    placed = [jax.device_put(x, NamedSharding(mesh, specs.get(name, P()))) for name, x in zip("qkv", qkv, strict=True)]
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        block_sparse_attention(*placed, lists, **changes)


@pytest.mark.parametrize("implementation", ["xla", "native", "reference"])
def test_in_a_shard_map_of_the_caller_gradients_of_what_is_whole_are_summed(implementation):
    if implementation == "native" and not COMPILER:
        pytest.skip("no C++ compiler; its refusal is tested")
    case = dataclasses.replace(BASE, options=frozenset({"alibi", "block_bias"}))
    lists, qkv, trained, _, (do, _) = case.arrays(jnp.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def attend(qkv, trained):
        return block_sparse_attention(*qkv, lists, **trained, implementation=implementation)

    split = jax.shard_map(attend, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    grads = [
        jax.jit(jax.grad(lambda qkv, trained, f=f: (f(qkv, trained) * do).sum(), argnums=(0, 1)))(qkv, trained)
        for f in (split, attend)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *grads)


@pytest.mark.parametrize("own", [False, True], ids=["explicit", "in a shard_map"])
@pytest.mark.parametrize(
    ("implementation", "device"), [("tpu", ("TPU v5", 1, "tpu")), ("gpu", ("NVIDIA H200", 132, "cuda"))]
)
def test_kernels_of_accelerators_are_lowered_for_a_mesh(implementation, device, own):
    """Forward and backward, for four devices that are not here."""
    kind = jax.sharding.AxisType.Auto if own else jax.sharding.AxisType.Explicit
    mesh = jax.sharding.AbstractMesh(
        (2, 2), ("data", "tensor"), axis_types=(kind,) * 2, abstract_device=abstract_device(*device)
    )
    tiles = np.array([[1, 0], [2, 1]])
    lists = from_tiles(tiles, bq=128, bk=128, q_len=256, kv_len=256, elem=causal)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, lists, implementation=implementation)

    split = jax.shard_map(attend, mesh=mesh, in_specs=(BOTH,) * 3, out_specs=BOTH) if own else attend
    qkv = [
        jax.ShapeDtypeStruct((2, 256, heads, 128), jnp.bfloat16, sharding=NamedSharding(mesh, BOTH))
        for heads in (4, 2, 2)
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        grads = jax.jit(jax.grad(lambda *qkv: split(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
        text = grads.trace(*qkv).lower(lowering_platforms=device[2:]).as_text()
    assert "tensor<1x256x2x128xbf16>" in text, "no device has half of the batch and of the heads"
