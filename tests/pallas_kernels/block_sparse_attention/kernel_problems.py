"""Random attention calls for the Pallas kernels, whose blocks are multiples of 128, and what they should give."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention import causal, from_tiles, reference
from pallas_kernels.block_sparse_attention.options import Extras, Settings


def segments(q_pos, kv_pos, payload):
    """A rule that reads every kind of payload."""
    near = jnp.abs(q_pos - kv_pos) <= payload["scalar_reach"] + payload["batch_reach"]
    return near & (payload["q_segment"] == payload["kv_segment"]) & (kv_pos >= payload["head_first"])


@dataclasses.dataclass(frozen=True)
class Problem:
    """A random call; the defaults are the smallest useful ones."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 256
    kv_len: int = 256
    dim: int = 64
    v_dim: int = 64
    bq: int = 128
    bk: int = 128
    batch_lists: int = 1
    head_lists: int = 1
    rule: str = "causal"
    soft_cap: float | None = None
    dropout: float = 0.0
    extras: tuple[str, ...] = ()
    dtype: str = "float32"
    spoiled: str = ""
    """Which of "q" and "k" has a NaN."""

    def draw(self):
        """(q, k, v, lists, extras, settings, do, dlse)."""
        r = np.random.default_rng(0)
        nq, nk = math.ceil(self.q_len / self.bq), math.ceil(self.kv_len / self.bk)
        tiles = r.integers(0, 3, (self.batch_lists, self.head_lists, nq, nk))
        tiles[:, :, 0, 0] = 1
        if nq > 1:
            tiles[:, :, 1] = 0
        payload, elem = {}, None
        if self.rule == "causal":
            elem = causal
            first_query = self.bq * np.arange(nq)[:, None]
            last_key = np.minimum(self.bk * np.arange(1, nk + 1), self.kv_len) - 1
            tiles = np.where((tiles == 2) & (last_key > first_query), 1, tiles)
        elif self.rule == "segments":
            elem = segments
            payload = {
                "q_segment": r.integers(0, 2, (self.batch, self.q_len)),
                "kv_segment": r.integers(0, 2, (1, self.kv_len)),
                "kv_pos": (np.arange(self.kv_len) + 7)[None],
                "head_first": r.integers(0, 40, self.heads),
                "batch_reach": r.integers(0, 40, self.batch),
                "scalar_reach": np.array(100),
            }
        lists = from_tiles(
            tiles,
            bq=self.bq,
            bk=self.bk,
            q_len=self.q_len,
            kv_len=self.kv_len,
            elem=elem,
            payload={n: jnp.asarray(a, jnp.int32) for n, a in payload.items()},
        )
        shapes = [
            (self.batch, self.q_len, self.heads, self.dim),
            (self.batch, self.kv_len, self.kv_heads, self.dim),
            (self.batch, self.kv_len, self.kv_heads, self.v_dim),
            (self.batch, self.q_len, self.heads, self.v_dim),
        ]
        q, k, v, do = (jnp.asarray(r.standard_normal(s), self.dtype) for s in shapes)
        if self.spoiled == "q":
            q = q.at[:, 3, 0, 1].set(jnp.nan)
        if self.spoiled == "k":
            k = k.at[:, 5, -1, 1].set(jnp.nan)
        dlse = jnp.asarray(r.standard_normal((self.batch, self.heads, self.q_len)), jnp.float32)
        extras = {
            "alibi": jnp.asarray(r.random(self.heads) / 16, jnp.float32),
            "block_bias": jnp.asarray(r.standard_normal(lists.idx.shape), jnp.float32),
            "kv_lengths": jnp.asarray(r.integers(self.kv_len // 3, self.kv_len, self.batch), jnp.int32),
            "seed": jnp.asarray(r.integers(0, 2**32, 2, dtype=np.uint32)),
        }
        extras = {n: a for n, a in extras.items() if n in self.extras or (n == "seed" and self.dropout)}
        settings = Settings(scale=self.dim**-0.5, soft_cap=self.soft_cap, dropout=self.dropout)
        return q, k, v, lists, Extras(**extras), settings, do, dlse


def expected(problem):
    """Reference output, lse and gradients, in float32."""
    q, k, v, lists, extras, settings, do, dlse = problem.draw()
    q, k, v, do = (x.astype(jnp.float32) for x in (q, k, v, do))
    biased = extras.block_bias is not None

    @jax.jit
    def run(q, k, v, bias, lists, extras):
        def forward(q, k, v, bias):
            found = extras._replace(block_bias=bias) if biased else extras
            return reference.forward(q, k, v, lists, found, settings)

        (o, lse), back = jax.vjp(forward, q, k, v, bias)
        return o, lse, back((do, jnp.where(lse > -jnp.inf, dlse, 0)))

    o, lse, grads = run(q, k, v, extras.block_bias if biased else jnp.zeros(()), lists, extras)
    return o, lse, grads[: 3 + biased]


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        finite = ~np.isneginf(b)
        scale = max(1.0, np.abs(b[finite]).max(initial=0))
        np.testing.assert_allclose(a[finite], b[finite], atol=tolerance * scale, rtol=0)


def assert_shows_nan(got, want):
    """Of (o, lse, gradients): o and lse are NaN where the reference is, and so is the gradient of those queries."""
    seen = np.isnan(np.asarray(want[1]))
    assert seen.any()
    np.testing.assert_array_equal(np.isnan(np.asarray(got[1])), seen)
    rows = np.broadcast_to(seen.swapaxes(1, 2)[..., None], got[0].shape)
    np.testing.assert_array_equal(np.isnan(np.asarray(got[0], np.float32)), rows)
    assert np.isnan(np.asarray(got[2][0], np.float32)[rows]).all()
    empty = np.isneginf(np.asarray(want[1])).swapaxes(1, 2)
    assert not np.asarray(got[2][0])[empty].any()
