"""How many blocks a row may choose by its scores, and which ones it gets in any case.

A budget is asked for `width(blocks)`, a static bound on the number of chosen blocks, and for `count(scores)`, how
many each row wants; `from_scores` then takes the best of each row. Numbers that may be traced are pytree leaves:
changing them compiles nothing anew.
"""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

_STATIC = {"static": True}


def _available(scores):
    return jnp.sum(scores > -jnp.inf, axis=-1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """The `k` best blocks of each row.

    Attributes:
        k: int, or a traced integer scalar if `max_blocks` is given.
        max_blocks: static bound on `k`; None takes `k` itself, which then stays known under `jit`.
    """

    k: int | jax.Array
    max_blocks: int | None = dataclasses.field(default=None, metadata=_STATIC)

    def __post_init__(self):
        _whole(k=self.k, max_blocks=self.max_blocks)
        if self.max_blocks is None and isinstance(self.k, int):
            object.__setattr__(self, "max_blocks", self.k)

    def width(self, blocks: int) -> int:
        """Bound on the number of chosen blocks."""
        if self.max_blocks is None:
            raise ValueError("TopK with a traced k needs max_blocks, the static width of the lists")
        return _width(self.max_blocks, blocks)

    def count(self, scores: jax.Array) -> jax.Array:
        """How many of `scores` [..., blocks] each row wants; -inf marks what cannot be chosen."""
        return jnp.minimum(_available(scores), self.k)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP:
    """The fewest blocks that hold the share `p` of the softmax over a row's scores.

    Attributes:
        p: share, 0 < p <= 1; may be traced.
        max_blocks: static bound; None: no bound.
    """

    p: float | jax.Array
    max_blocks: int | None = dataclasses.field(default=None, metadata=_STATIC)

    def __post_init__(self):
        _share(p=self.p)
        _whole(max_blocks=self.max_blocks)

    def width(self, blocks: int) -> int:
        """Bound on the number of chosen blocks."""
        return _width(self.max_blocks, blocks)

    def count(self, scores: jax.Array) -> jax.Array:
        """As `TopK.count`."""
        best = jnp.max(scores, -1, keepdims=True)
        weight = jnp.where(scores > -jnp.inf, jnp.exp(scores - jnp.where(best > -jnp.inf, best, 0)), 0)
        return _fewest(weight, self.p, _available(scores))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coverage:
    """The fewest blocks that hold the share `alpha` of the sum of a row's scores, which are masses, not logits.

    Attributes:
        alpha: share, 0 < alpha <= 1; may be traced.
        min_blocks: no row wants less (FlexPrefill's minimal budget, arXiv 2502.20766); may be traced.
        max_blocks: static bound; None: no bound.
    """

    alpha: float | jax.Array
    min_blocks: int | jax.Array = 1
    max_blocks: int | None = dataclasses.field(default=None, metadata=_STATIC)

    def __post_init__(self):
        _share(alpha=self.alpha)
        _whole(min_blocks=self.min_blocks, max_blocks=self.max_blocks)

    def width(self, blocks: int) -> int:
        """Bound on the number of chosen blocks."""
        return _width(self.max_blocks, blocks)

    def count(self, scores: jax.Array) -> jax.Array:
        """As `TopK.count`."""
        available = _available(scores)
        fewest = _fewest(jnp.maximum(scores, 0), self.alpha, available)
        return jnp.minimum(jnp.maximum(fewest, self.min_blocks), available)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every block whose score is above `threshold`.

    Attributes:
        threshold: in the unit of the scores; may be traced.
        max_blocks: static bound; None: no bound.
    """

    threshold: float | jax.Array
    max_blocks: int | None = dataclasses.field(default=None, metadata=_STATIC)

    def __post_init__(self):
        _whole(max_blocks=self.max_blocks)

    def width(self, blocks: int) -> int:
        """Bound on the number of chosen blocks."""
        return _width(self.max_blocks, blocks)

    def count(self, scores: jax.Array) -> jax.Array:
        """As `TopK.count`."""
        return jnp.sum((scores > self.threshold) & (scores > -jnp.inf), axis=-1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratio:
    """The share `ratio` of the blocks that a row may choose from, rounded up: causal rows get more the later they are.

    Attributes:
        ratio: 0 < ratio <= 1; counts exactly as written, so 0.1 of 30 blocks are 3.
    """

    ratio: float = dataclasses.field(metadata=_STATIC)

    def __post_init__(self):
        _share(ratio=self.ratio)

    def width(self, blocks: int) -> int:
        """Bound on the number of chosen blocks."""
        return math.ceil(Fraction(repr(float(self.ratio))) * blocks)

    def count(self, scores: jax.Array) -> jax.Array:
        """As `TopK.count`."""
        counts = np.array([self.width(n) for n in range(scores.shape[-1] + 1)], np.int32)
        return jnp.asarray(counts)[_available(scores)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Random:
    """A random share of the blocks that a row may choose from; the scores only say which those are.

    Attributes:
        ratio: as in `Ratio`.
        key: PRNG key. The same key draws the same blocks.
        same_rows: all rows draw the same keys' blocks, as if the source had been subsampled (SSA, arXiv 2306.01705).
    """

    ratio: float = dataclasses.field(metadata=_STATIC)
    key: jax.Array
    same_rows: bool = dataclasses.field(default=False, metadata=_STATIC)

    def __post_init__(self):
        _share(ratio=self.ratio)

    def width(self, blocks: int) -> int:
        """Bound on the number of chosen blocks."""
        return Ratio(self.ratio).width(blocks)

    def count(self, scores: jax.Array) -> jax.Array:
        """As `TopK.count`."""
        return Ratio(self.ratio).count(scores)

    def rank(self, scores: jax.Array) -> jax.Array:
        """Random numbers in place of the scores."""
        shape = (*scores.shape[:-2], 1, scores.shape[-1]) if self.same_rows else scores.shape
        return jnp.where(scores > -jnp.inf, jax.random.uniform(self.key, shape), -jnp.inf)


Budget = TopK | TopP | Coverage | Threshold | Ratio | Random


@dataclasses.dataclass(frozen=True)
class Forced:
    """Blocks that a row gets besides those that its budget chooses, whatever their scores, if the base mask has them.

    Attributes:
        sinks: so many first blocks of keys.
        diagonal: blocks of keys that share a position with the block of queries.
        local: so many blocks before the diagonal (and after it, where the base mask sees them); implies `diagonal`.
        last_rows: so many last blocks of queries see everything that the base mask sees. The lists of all rows are then
            as wide as the longest of these.
    """

    sinks: int = 0
    diagonal: bool = False
    local: int = 0
    last_rows: int = 0

    def __post_init__(self):
        _whole(sinks=self.sinks, local=self.local, last_rows=self.last_rows)

    def grid(self, q_bounds, kv_bounds, nq: int, nk: int, bk: int):
        """The forced tiles, bool [1 or B, 1, nq, nk], from the (least, greatest) position of each block."""
        kept = (np.arange(nk) < self.sinks) | (np.arange(nq)[:, None] >= nq - self.last_rows)
        kept = kept[None, None]
        if self.diagonal or self.local:
            (q_low, q_high), (k_low, k_high) = q_bounds, kv_bounds
            reach = self.local * bk
            kept = kept | ((k_high >= q_low - reach) & (k_low <= q_high + reach))
        return kept

    def width(self, nk: int, bq: int, bk: int) -> int:
        """Bound on the forced tiles in a row, for positions in order that are known only at run time."""
        if self.last_rows:
            return nk
        near = 2 + 2 * self.local + math.ceil(bq / bk) if self.diagonal or self.local else 0
        return min(nk, self.sinks + near)


def _share(**shares) -> None:
    """Refuses numbers that are no shares; what is traced cannot be looked at."""
    for name, share in shares.items():
        if isinstance(share, (int, float, np.number)) and not 0 < share <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {share}")


def _whole(**numbers) -> None:
    """Refuses numbers that count nothing; what is traced cannot be looked at."""
    for name, number in numbers.items():
        if isinstance(number, (float, np.floating)) or (isinstance(number, (int, np.integer)) and number < 0):
            raise ValueError(f"{name} must be an int of at least 0, not {number}")


def _width(max_blocks: int | None, blocks: int) -> int:
    return blocks if max_blocks is None else min(max_blocks, blocks)


def _fewest(weight, share, available):
    """Smallest n such that the n greatest weights reach the share of their sum; for a share of 1, all there are."""
    ranked = -jnp.sort(-weight, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    needed = jnp.sum(before < share * jnp.sum(weight, axis=-1, keepdims=True), axis=-1, dtype=jnp.int32)
    return jnp.where(jnp.asarray(share) >= 1, available, jnp.minimum(needed, available))
