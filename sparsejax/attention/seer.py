"""SeerAttention: a small gate learns to predict which blocks attention will look at.

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276. The gate reads queries
and keys before rotary embedding, pooled by blocks. It is trained alone, to match the block-wise maximum of the frozen
model's attention; afterwards its scores choose the blocks.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.attention.block_mask import BlockMask
from sparsejax.attention.budgets import Budget, Forced
from sparsejax.attention.choose import from_scores
from sparsejax.attention.compile import tile_kinds
from sparsejax.attention.mask import Mask
from sparsejax.attention.patterns import Full
from sparsejax.attention.selectors import _NO_CONTEXT, Context, block_mean, stats_grid

_DIAGONAL = Forced(diagonal=True)


class SeerGate(nnx.Module):
    """The gate: `softmax` of its scores along the keys predicts each block's share of attention. Also a selector.

    Queries are pooled by their mean, keys by maximum, minimum and mean together; each head has a matrix of its own;
    rotary embedding is applied after pooling, with the position of the first token of a block.

    Args:
        heads: number of query heads.
        kv_heads: number of key heads.
        head_dim: dimension of a head.
        block: tokens in a block, of queries and keys alike (64 in the paper).
        gate_dim: dimension in which queries and keys meet (128 in the paper); even.
        rope_base: base of the rotary embedding; None: none.
        budget: how many blocks the selector chooses of each row; a `Threshold` is one of the softmax.
        forced: blocks that the selector visits besides; the last rows stay dense in the paper.
        rngs: for the initial weights.

    Example:
        >>> from sparsejax.attention import Causal, Ratio
        >>> gate = SeerGate(4, 2, 8, block=16, gate_dim=8, budget=Ratio(0.5), rngs=nnx.Rngs(0))
        >>> q, k = jnp.ones((1, 64, 4, 8)), jnp.ones((1, 64, 2, 8))
        >>> gate.scores(q, k).shape
        (1, 4, 4, 4)
        >>> mask, _, _ = gate(q, k, base=Causal())
        >>> mask.lists.n_tot[0, 0].tolist()
        [1, 2, 2, 3]
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        block: int = 64,
        gate_dim: int = 128,
        rope_base: float | None = 10000.0,
        budget: Budget,
        forced: Forced = _DIAGONAL,
        rngs: nnx.Rngs,
    ):
        if gate_dim % 2:
            raise ValueError(f"gate_dim must be even for rotary embedding, not {gate_dim}")
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=0)
        self.query = nnx.Param(init(rngs.params(), (heads, head_dim, gate_dim)))
        self.key = nnx.Param(init(rngs.params(), (kv_heads, 3 * head_dim, gate_dim)))
        self.block, self.rope_base, self.forced = block, rope_base, forced
        self.budget = nnx.data(jax.tree.map(jnp.asarray, budget))

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Logits of the blocks [B, H, nq, nk], from q [B, Sq, H, D] and k [B, Sk, Hk, D] before rotary embedding."""
        group = q.shape[2] // k.shape[2]
        pooled_k = jnp.concatenate([*_block_bounds(k, self.block), block_mean(k, self.block)], axis=-1)
        gate_q = jnp.einsum("bnhd,hdg->bnhg", block_mean(q, self.block), self.query[...])
        gate_k = jnp.einsum("bnhd,hdg->bnhg", pooled_k, self.key[...])
        if self.rope_base is not None:
            gate_q, gate_k = (_rotate(x, self.block, self.rope_base) for x in (gate_q, gate_k))
        gate_k = jnp.repeat(gate_k, group, axis=2)
        return jnp.einsum("bihg,bjhg->bhij", gate_q, gate_k) / math.sqrt(gate_q.shape[-1])

    def __call__(self, q, k, *, base: Mask | None = None, state=None, context: Context = _NO_CONTEXT):
        """Chooses blocks by the softmax of the scores over what `base` leaves; `aux` are the logits."""
        logits = jax.lax.stop_gradient(self.scores(q, k))
        sizes = {"q_len": q.shape[1], "kv_len": k.shape[1], "bq": self.block, "bk": self.block}
        positions = {"q_positions": context.q_positions, "kv_positions": context.kv_positions}
        # A row's softmax is over the blocks that the base mask leaves, so the threshold means the same in every row.
        allowed = jnp.asarray(_allowed(base, sizes, positions))
        share = jax.nn.softmax(jnp.where(allowed, logits, -1e30), axis=-1)
        mask = from_scores(share, self.budget, base, **sizes, **positions, forced=self.forced)
        return mask, state, logits


def seer_target(mask: BlockMask, block_max: jax.Array) -> jax.Array:
    """What the gate has to predict: the greatest attention weight in each block, divided by its row's sum.

    Args:
        mask: the mask of the teacher's attention, such as `compile_mask(Causal(), ...)` in the gate's blocks.
        block_max: [B, H, nq, W], from `sparse_attention(..., mask, block_stats="max")`.

    Returns:
        [B, H, nq, nk], rows that sum to 1; 0 where the mask has no tile and in rows without any.
    """
    grid = jax.lax.stop_gradient(stats_grid(mask, block_max))
    total = jnp.sum(grid, axis=-1, keepdims=True)
    return grid / jnp.where(total > 0, total, 1)


def seer_loss(logits: jax.Array, target: jax.Array, mask: BlockMask, *, skip: float = 0.25) -> jax.Array:
    """Kullback-Leibler divergence of the gate from the target, the mean over rows of blocks.

    The released code takes the mean over all entries instead, times 10; that is this loss times 10 / nk.

    Args:
        logits: [B, H, nq, nk], from `SeerGate.scores`.
        target: [B, H, nq, nk], from `seer_target`.
        mask: the mask of the teacher's attention; the gate's softmax is over its tiles.
        skip: share of the first rows that is left out: they have few blocks to choose from.

    Returns:
        float scalar; 0 for a perfect gate. Its gradient reaches the logits only.

    Example:
        >>> from sparsejax.attention import Full, compile_mask
        >>> mask = compile_mask(Full(), 4, 4, bq=2, bk=2)
        >>> target = jnp.array([[[[0.5, 0.5], [0.9, 0.1]]]])
        >>> float(seer_loss(jnp.log(target), target, mask, skip=0.0)) < 1e-6
        True
    """
    if not 0 <= skip < 1:
        raise ValueError(f"skip must be at least 0 and below 1, not {skip}")
    first = int(target.shape[2] * skip)
    kept = jnp.repeat(mask.kinds() > 0, target.shape[1] // mask.lists.idx.shape[1], axis=1)
    logs = jax.nn.log_softmax(jnp.where(kept, logits.astype(jnp.float32), -1e30), axis=-1)
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    positive = target > 0
    terms = jnp.where(positive, target * (jnp.log(jnp.where(positive, target, 1)) - jnp.where(kept, logs, 0)), 0)
    return jnp.mean(jnp.sum(terms[:, :, first:], axis=-1))


def causal_blocks(blocks: int, ratio: float) -> int:
    """Blocks for each row so that of a causal mask the share `ratio` is visited: `blocks (1 - sqrt(1 - ratio))`.

    Args:
        blocks: blocks in a row.
        ratio: share of the causal tiles.

    Returns:
        At least 1; give it to `TopK`.

    Example:
        >>> causal_blocks(64, 0.5)
        18
    """
    return max(1, math.floor(blocks * (1 - math.sqrt(1 - ratio))))


def _block_bounds(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Greatest and least value over blocks of tokens: float32 [B, n, H, D] each."""
    x = x.astype(jnp.float32)
    pads = ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))
    shape = (x.shape[0], -1, block, *x.shape[2:])
    high = jnp.pad(x, pads, constant_values=-jnp.inf).reshape(shape).max(2)
    return high, jnp.pad(x, pads, constant_values=jnp.inf).reshape(shape).min(2)


def _rotate(x: jax.Array, block: int, base: float) -> jax.Array:
    """Rotary embedding (arXiv 2104.09864) at the positions 0, block, 2 block, ..., halves rotated: x [B, n, H, D]."""
    half = x.shape[-1] // 2
    angle = block * jnp.arange(x.shape[1])[:, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _allowed(base: Mask | None, sizes, positions):
    base = Full() if base is None else base
    values = base.values(sizes["q_len"], sizes["kv_len"], **positions)
    return tile_kinds(base.rule, values, **sizes) > 0
