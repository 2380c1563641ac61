"""Random attention problems: masks, shapes, groups, ragged ends, empty rows, lists per batch and head, all options."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pallas_kernels.block_sparse_attention import block_sparse_attention, from_tiles, with_bits


def segments_rule(q_pos, kv_pos, payload):
    """Causal within segments, from a first key that depends on the head, over a window that depends on the batch."""
    same = payload["q_segment"] == payload["kv_segment"]
    window = (kv_pos <= q_pos) & (q_pos - kv_pos <= payload["batch_window"])
    return same & window & (kv_pos >= payload["head_first"])


def window_rule(q_pos, kv_pos, payload):
    """Distance at most a scalar."""
    return abs(q_pos - kv_pos) <= payload["scalar_reach"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, drawn from `seed`."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    v_dim: int
    bq: int
    bk: int
    batch_lists: int
    head_lists: int
    rule: str  # "none", "window", "segments", "bits", "rule and bits"
    options: frozenset[str]
    seed: int

    def lists(self):
        """The lists; a third of the tiles of each class and some empty rows."""
        r = np.random.default_rng(self.seed)
        nq, nk = -(-self.q_len // self.bq), -(-self.kv_len // self.bk)
        tiles = r.integers(0, 3, (self.batch_lists, self.head_lists, nq, nk))
        tiles[r.random(tiles.shape[:-1]) < 0.15] = 0
        payload: dict[str, Any] = {}
        elem = None
        if self.rule in ("segments", "rule and bits"):
            elem = segments_rule
            payload |= {
                "q_segment": r.integers(0, 2, (self.batch, self.q_len)),
                "kv_segment": r.integers(0, 2, (1, self.kv_len)),
                "q_pos": (np.arange(self.q_len) + self.kv_len - self.q_len)[None],
                "head_first": r.integers(0, 6, self.heads),
                "batch_window": r.integers(self.bk, 3 * self.bk, self.batch),
            }
        if self.rule == "window":
            elem = window_rule
            payload |= {"scalar_reach": np.int32(self.bk), "kv_pos": r.permutation(self.kv_len)[None]}
        lists = from_tiles(
            tiles, bq=self.bq, bk=self.bk, q_len=self.q_len, kv_len=self.kv_len, elem=elem, payload=payload
        )
        if self.rule == "bits":
            bits = r.integers(0, 256, (*lists.idx.shape[:3], lists.part_width, self.bq, -(-self.bk // 8)))
            lists = dataclasses.replace(lists, payload={"bits": bits.astype(np.uint8)})
        if self.rule == "rule and bits":
            lists = with_bits(lists, self.batch, self.heads)
        return lists

    def arrays(self, dtype):
        """q, k, v, differentiable options, other options, cotangents of o and lse."""
        r = np.random.default_rng(self.seed + 1)
        lists = self.lists()

        def normal(*shape):
            return jnp.asarray(r.normal(size=shape), dtype)

        q = normal(self.batch, self.q_len, self.heads, self.dim)
        k = normal(self.batch, self.kv_len, self.kv_heads, self.dim)
        v = normal(self.batch, self.kv_len, self.kv_heads, self.v_dim)
        trained, fixed = {}, {}
        if "alibi" in self.options:
            trained["alibi"] = jnp.asarray(0.1 * r.random(self.heads), dtype)
        if "block_bias" in self.options:
            trained["block_bias"] = normal(*lists.idx.shape)
        if "sinks" in self.options:
            trained["sinks"] = normal(self.heads)
        if "bias" in self.options:
            shape = [(1, self.heads, self.q_len, self.kv_len), (self.batch, 1, 1, self.kv_len), (1, 1, self.q_len, 1)]
            trained["bias"] = normal(*shape[self.seed % 3])
        if "soft_cap" in self.options:
            fixed["soft_cap"] = 2.0
        if "dropout" in self.options:
            fixed["dropout"] = (0.3, jax.random.key(self.seed))
        if "kv_lengths" in self.options:
            fixed["kv_lengths"] = jnp.asarray(r.integers(0, self.kv_len + 1, self.batch), jnp.int32)
        if "scale" in self.options:
            fixed["scale"] = 0.7
        do = normal(self.batch, self.q_len, self.heads, self.v_dim)
        dlse = normal(self.batch, self.heads, self.q_len)
        return lists, (q, k, v), trained, fixed, (do, dlse)

    def run(self, implementation, dtype, lists=None, compute=None):
        """((o, lse), gradients of q, k, v and trained options); `compute` casts the inputs first."""
        made, qkv, trained, fixed, (do, dlse) = self.arrays(dtype)
        lists = made if lists is None else lists
        if compute is not None:
            qkv, trained, do = jax.tree.map(lambda x: x.astype(compute), (qkv, trained, do))

        def loss(qkv, trained, lists):
            o, aux = block_sparse_attention(
                *qkv, lists, **trained, **fixed, return_lse=True, implementation=implementation
            )
            weighted = (o.astype(aux.lse.dtype) * do.astype(aux.lse.dtype)).sum()
            return weighted + jnp.where(aux.lse > -jnp.inf, aux.lse * dlse.astype(aux.lse.dtype), 0).sum(), (o, aux.lse)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(qkv, trained, lists)
        return out, grads


OPTIONS = ("alibi", "block_bias", "sinks", "bias", "soft_cap", "dropout", "kv_lengths", "scale")


@st.composite
def cases(draw, options=OPTIONS, blocks=(4, 8, 12, 16)):
    """Any case."""
    kv_heads = draw(st.sampled_from((1, 2)))
    heads = kv_heads * draw(st.sampled_from((1, 2, 3)))
    batch = draw(st.sampled_from((1, 2)))
    return Case(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=draw(st.integers(1, 40)),
        kv_len=draw(st.integers(1, 40)),
        dim=draw(st.sampled_from((4, 7, 16, 24))),
        v_dim=draw(st.sampled_from((4, 5, 16, 40))),
        bq=draw(st.sampled_from(blocks)),
        bk=draw(st.sampled_from(blocks)),
        batch_lists=draw(st.sampled_from((1, batch))),
        head_lists=draw(st.sampled_from((1, kv_heads, heads))),
        rule=draw(st.sampled_from(("none", "window", "segments", "bits", "rule and bits"))),
        options=frozenset(draw(st.sets(st.sampled_from(options), max_size=4))),
        seed=draw(st.integers(0, 10**6)),
    )


def assert_trees_close(got, want, rtol, atol):
    """Leaf by leaf, naming the leaf; infinities must agree."""
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(b, np.float64),
            rtol=rtol,
            atol=atol,
            err_msg=jax.tree_util.keystr(path),
        ),
        got,
        want,
    )


def assert_as_exact_as_plain(case, implementation, dtype):
    """The error of values and gradients is at most twice that of the dense computation in the same precision.

    Or one rounding of the result to `dtype`, since the plain one may be exact by luck, and a few of float32, in which
    both compute. Gradients of options are sums over everything, a few numbers each, which cancel: they may be off by
    more roundings of float32.
    """
    exact = case.run("reference", dtype, compute=jnp.float64)
    rounding = float(jnp.finfo(dtype).eps)

    def check(path, a, b, c):
        a, b, c = (np.nan_to_num(np.asarray(x, np.float64), neginf=-1e30) for x in (a, b, c))
        ours, plain = np.abs(a - c).max(initial=0), np.abs(b - c).max(initial=0)
        scale = np.where(np.abs(c) < 1e20, np.abs(c), 0).max(initial=0)
        sums = 2e-4 if any(isinstance(key, jax.tree_util.DictKey) for key in path) else 5e-6
        allowed = max(2 * plain, rounding * scale + sums * max(scale, 1))
        assert ours <= allowed, (jax.tree_util.keystr(path), ours, plain, scale)

    jax.tree.map_with_path(check, case.run(implementation, dtype), case.run("reference", dtype), exact)
