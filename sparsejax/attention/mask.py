"""The lazy mask: a rule with the arrays that it reads, combined by `&`, `|`, `~`, per head, and by permutation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention.rules import Both, ByHead, Either, Opposite, rename


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which query sees which key, as an expression that is never written out as a matrix.

    Made by the leaves (`Causal()`, `Local(4096)`, `Segment(ids)`, ...), combined by `&`, `|` and `~`. A mask is a
    pytree: its rule is static, its arrays (segment ids, traced prefix lengths, ...) are leaves, so it goes through
    `jit`, and new values in the arrays never compile anything anew.

    Attributes:
        rule: the element rule; hashable, without arrays (see `sparsejax.attention.rules`).
        arrays: the arrays that the rule reads, by name.
        text: the expression as written.

    Example:
        >>> from sparsejax.attention import Causal, Local, Sink
        >>> mask = Causal() & Local(1) | Sink(1)
        >>> mask
        Causal() & Local(1) | Sink(1)
        >>> mask.to_dense(4, 4)[0, 0].astype(int)
        Array([[1, 0, 0, 0],
               [1, 1, 0, 0],
               [1, 1, 1, 0],
               [1, 0, 1, 1]], dtype=int32)
    """

    rule: Any = dataclasses.field(metadata={"static": True})
    arrays: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    text: str = dataclasses.field(default="Mask", metadata={"static": True})

    def __repr__(self) -> str:
        return self.text

    def __bool__(self):
        raise TypeError("a Mask has no truth value: combine masks by `&`, `|` and `~`, not by `and`, `or` and `not`")

    def __and__(self, other: "Mask") -> "Mask":
        return _combine(Both, "&", self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return _combine(Either, "|", self, other)

    def __invert__(self) -> "Mask":
        return Mask(Opposite(self.rule), self.arrays, f"~{_bracket(self.text)}")

    def permute(self, q_order, kv_order=None) -> "Mask":
        """The mask of permuted tokens: row i and column j of the result are row `q_order[i]` and column `kv_order[j]`.

        Attention over `x[order]` under `mask.permute(order)` equals attention over `x` under `mask`, permuted.
        Positions inside the mask are those of the sequence before the permutation, counted from 0.

        Args:
            q_order: int array [Sq], a permutation of the queries (or any choice of them).
            kv_order: the same for keys [Sk]; None takes `q_order`.

        Returns:
            The permuted mask, for sequences as long as the orders.

        Example:
            >>> from sparsejax.attention import Chunk
            >>> Chunk(2).permute(np.array([0, 2, 1, 3])).to_dense(4, 4)[0, 0].astype(int)
            Array([[1, 0, 1, 0],
                   [0, 1, 0, 1],
                   [1, 0, 1, 0],
                   [0, 1, 0, 1]], dtype=int32)
        """
        orders = {"q": jnp_or_np(q_order), "kv": jnp_or_np(q_order if kv_order is None else kv_order)}
        for side, order in orders.items():
            if order.ndim != 1 or not np.issubdtype(order.dtype, np.integer):
                raise ValueError(f"{side}_order must be a vector of ints, not {order.dtype}{list(order.shape)}")
        arrays = {}
        for name, array in self.arrays.items():
            order = orders.get(name.split("_")[0])
            arrays[name] = array if order is None else array[..., order]
        names = {"q_pos": _free("q", arrays), "kv_pos": _free("kv", arrays)}
        arrays |= {names["q_pos"]: orders["q"], names["kv_pos"]: orders["kv"]}
        return Mask(rename(self.rule, names), arrays, f"{_bracket(self.text)}.permute(...)")

    def values(self, q_len: int, kv_len: int, q_positions=None, kv_positions=None) -> dict[str, jax.Array]:
        """All arrays that the rule reads, positions included, in full shape.

        Args:
            q_len: number of queries.
            kv_len: number of keys.
            q_positions: int [Sq] or [B, Sq]; None counts from 0.
            kv_positions: int [Sk] or [B, Sk]; None counts from 0.

        Returns:
            `q_*` [1 or B, Sq], `kv_*` [1 or B, Sk], `head_*` [H], `batch_*` [B], `scalar_*` [],
            `table_*` [1 or B, 1 or H, ., .].

        Raises:
            ValueError: an array does not have the length of the sequence, or positions are not integers.
        """
        q_positions = np.arange(q_len, dtype=np.int32) if q_positions is None else jnp_or_np(q_positions)
        kv_positions = np.arange(kv_len, dtype=np.int32) if kv_positions is None else jnp_or_np(kv_positions)
        lengths = {"q": q_len, "kv": kv_len}
        result = {}
        for name, array in {"q_pos": q_positions, "kv_pos": kv_positions, **self.arrays}.items():
            side = name.split("_")[0]
            if side in lengths:
                if not np.issubdtype(array.dtype, np.integer):
                    raise ValueError(f"{name} has dtype {array.dtype}; positions must be integers")
                array = array[None] if array.ndim == 1 else array
                if array.ndim != 2 or array.shape[1] != lengths[side]:
                    raise ValueError(
                        f"{name} of {self.text} has shape {tuple(array.shape)}, and the sequence has {lengths[side]} "
                        f"{'queries' if side == 'q' else 'keys'}: give [{lengths[side]}] or [batch, {lengths[side]}]"
                    )
            result[name] = array
        batches = {a.shape[0] for n, a in result.items() if n.startswith(("q_", "kv_", "batch_", "table_"))} - {1}
        heads = {a.shape[0] for n, a in result.items() if n.startswith("head_")}
        heads |= {a.shape[1] for n, a in result.items() if n.startswith("table_")}
        for what, found in (("batch sizes", batches), ("numbers of heads", heads - {1})):
            if len(found) > 1:
                raise ValueError(f"the arrays of {self.text} have different {what}: {sorted(found)}")
        return result

    def to_dense(self, q_len: int, kv_len: int, *, q_positions=None, kv_positions=None) -> jax.Array:
        """The mask as a matrix: for looking at small ones, and for tests.

        Args:
            q_len: number of queries.
            kv_len: number of keys.
            q_positions: as in `values`.
            kv_positions: as in `values`.

        Returns:
            bool [B or 1, H or 1, Sq, Sk].
        """
        values = spread_values(self.values(q_len, kv_len, q_positions, kv_positions))
        dense = self.rule(values["q_pos"], values["kv_pos"], values)
        shape = np.broadcast_shapes(np.shape(dense), (1, 1, q_len, kv_len))
        return jnp.broadcast_to(jnp.asarray(dense), shape)


def per_head(masks: Sequence[Mask]) -> Mask:
    """One mask for each head.

    Args:
        masks: as many masks as there are heads (query heads, or key heads for a pattern that each group shares).

    Returns:
        The mask that follows `masks[h]` in head h. Equal masks without arrays are kept once.

    Example:
        >>> from sparsejax.attention import Causal, Empty, Local
        >>> per_head([Causal(), Empty()]).to_dense(2, 2).astype(int)
        Array([[[[1, 0],
                 [1, 1]],
        <BLANKLINE>
                [[0, 0],
                 [0, 0]]]], dtype=int32)
    """
    if not masks:
        raise ValueError("per_head needs one mask for each head, and the list is empty")
    distinct: list[Mask] = []
    which = []
    for mask in masks:
        same = [i for i, other in enumerate(distinct) if other is mask or (other.rule == mask.rule and not mask.arrays)]
        if not same:
            same = [len(distinct)]
            distinct.append(mask)
        which.append(same[0])
    arrays: dict[str, Any] = {"head_0": np.asarray(which, np.int32)}
    rules = []
    for mask in distinct:
        if any(name.startswith("head_") for name in mask.arrays):
            raise ValueError(f"a mask inside per_head must not itself differ by head: {mask}")
        names = _adopt(mask.arrays, arrays)
        rules.append(rename(mask.rule, names))
    return Mask(ByHead("head_0", tuple(rules)), arrays, f"per_head([{', '.join(m.text for m in masks)}])")


def spread_values(values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays of `Mask.values` with the axes [batch, head, query, key], so that rules broadcast over all of them."""
    axes = {"q": (slice(None), None, slice(None), None), "kv": (slice(None), None, None, slice(None))}
    axes |= {"head": (slice(None), None, None), "batch": (slice(None), None, None, None)}
    return {name: array[axes.get(name.split("_")[0], ...)] for name, array in values.items()}


def is_traced(tree) -> bool:
    """Whether a leaf of the pytree has no value yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def jnp_or_np(array):
    """JAX arrays as they are, everything else as a NumPy array; ints as int32."""
    if isinstance(array, jax.Array):
        return array.astype(jnp.int32) if array.dtype != jnp.int32 and array.dtype != bool else array
    array = np.asarray(array)
    return array.astype(np.int32, copy=False) if np.issubdtype(array.dtype, np.integer) else array


def _combine(operator, sign: str, a: Mask, b: Mask) -> Mask:
    if not isinstance(b, Mask):
        raise TypeError(f"a Mask combines with a Mask, not with {type(b).__name__}: use Bits for a bool matrix")
    arrays = dict(a.arrays)
    names = _adopt(b.arrays, arrays)
    # Python's own precedence: `&` binds tighter than `|`.
    left, right = (_bracket(t) if sign == "&" and "|" in _outside(t) else t for t in (a.text, b.text))
    return Mask(operator(a.rule, rename(b.rule, names)), arrays, f"{left} {sign} {right}")


def _adopt(new: Mapping[str, Any], arrays: dict[str, Any]) -> dict[str, str]:
    """Adds `new` to `arrays` under free names; an array that is there already is not added twice."""
    names = {}
    for name, array in new.items():
        kind = name.split("_")[0]
        same = [other for other, there in arrays.items() if there is array and other.split("_")[0] == kind]
        names[name] = same[0] if same else _free(kind, arrays)
        arrays[names[name]] = array
    return names


def _free(kind: str, arrays: Mapping[str, Any]) -> str:
    return f"{kind}_{sum(name.startswith(kind + '_') for name in arrays)}"


def _outside(text: str) -> str:
    """The text outside of its brackets."""
    depth, kept = 0, []
    for sign in text:
        depth -= sign in ")]"
        if depth == 0:
            kept.append(sign)
        depth += sign in "(["
    return "".join(kept)


def _bracket(text: str) -> str:
    return f"({text})" if any(sign in _outside(text) for sign in "&|~ ") else text
