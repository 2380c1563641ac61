"""How much two sets of masks have in common, and how much of a network has been tried so far."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks.paths import named_leaves


@dataclass(frozen=True)
class MaskChange:
    """Counts that compare an older and a newer mask of one leaf, or of all leaves together.

    Attributes:
        size: number of weights.
        old_nnz: weights kept by the older mask.
        nnz: weights kept by the newer mask.
        added: weights kept by the newer mask only.
        dropped: weights kept by the older mask only.
    """

    size: int
    old_nnz: int
    nnz: int
    added: int
    dropped: int

    @property
    def kept(self) -> int:
        """Weights kept by both masks."""
        return self.nnz - self.added

    @property
    def hamming(self) -> int:
        """Positions at which the masks differ: `added + dropped`."""
        return self.added + self.dropped

    @property
    def jaccard(self) -> float:
        """Kept by both over kept by either: 1.0 for equal masks (two empty ones too), 0.0 for disjoint ones."""
        either = self.nnz + self.dropped
        return self.kept / either if either else 1.0

    @property
    def churn(self) -> float:
        """Fraction of the older mask's weights that the newer one dropped; 0.0 when it had none."""
        return self.dropped / self.old_nnz if self.old_nnz else 0.0


@dataclass(frozen=True)
class Overlap:
    """The comparison of two mask trees: a `MaskChange` for each masked leaf, and their sum.

    Attributes:
        layers: `{path: MaskChange}` in the order of the tree.
        total: all leaves together.
    """

    layers: dict[str, MaskChange]
    total: MaskChange


def mask_overlap(old, new) -> Overlap:
    """Compares two mask trees leaf by leaf: Hamming distance, Jaccard index, weights added and dropped.

    The counting runs on the masks' devices and keeps their shardings; only the counts come to the host.

    Args:
        old: the older masks, a tree of bool arrays with `optax.MaskedNode()` at dense leaves.
        new: the newer masks, same structure and shapes.

    Returns:
        An `Overlap` of Python integers.

    Raises:
        ValueError: when the trees name different leaves or shapes, or a mask is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> before = {"kernel": jnp.array([True, True, False, False])}
        >>> after = {"kernel": jnp.array([True, False, True, False])}
        >>> change = mask_overlap(before, after).total
        >>> change.added, change.dropped, change.hamming, round(change.jaccard, 3), change.churn
        (1, 1, 2, 0.333, 0.5)
    """
    old_leaves, new_leaves = check_masks(old, "old"), check_masks(new, "new")
    if old_leaves.keys() != new_leaves.keys():
        different = sorted(old_leaves.keys() ^ new_leaves.keys())
        raise ValueError(f"the two mask trees must mask the same leaves, but {different} are masked in one only")
    for path, mask in old_leaves.items():
        if mask.shape != new_leaves[path].shape:
            raise ValueError(f"{path}: the masks have shapes {mask.shape} and {new_leaves[path].shape}, not one shape")
    counts = jax.device_get(_count_changes(list(old_leaves.values()), list(new_leaves.values())))
    layers = {
        path: MaskChange(int(mask.size), *(int(count) for count in row))
        for (path, mask), row in zip(old_leaves.items(), counts, strict=True)
    }
    fields = [(c.size, c.old_nnz, c.nnz, c.added, c.dropped) for c in layers.values()]
    return Overlap(layers, MaskChange(*(sum(column) for column in zip(*fields, strict=True))) if fields else _NOTHING)


class Exploration(NamedTuple):
    """Which weights have been active at least once; the accumulator of the in-time over-parameterisation rate.

    Attributes:
        seen: the union of the masks so far, shaped like the masks tree.
    """

    seen: object


def exploration_init(masks) -> Exploration:
    """Starts the in-time over-parameterisation rate (ITOP): how much of the network has been trained at some time.

    The rate is |union over time of the masks| / N over the masked leaves. A dynamic method at fixed sparsity raises
    it at every mask update; a static mask stays at its density. `exploration_update` is pure and works under `jit`
    and `scan`; keep the accumulator beside the optimizer state.

    Args:
        masks: a tree of bool arrays with `optax.MaskedNode()` at dense leaves.

    Returns:
        An `Exploration` holding fresh arrays, so that the masks may be donated.

    Example:
        >>> import jax.numpy as jnp
        >>> state = exploration_init({"kernel": jnp.array([True, False, False, False])})
        >>> state = exploration_update(state, {"kernel": jnp.array([False, True, False, False])})
        >>> exploration_rate(state), exploration_rates(state)
        (0.5, {'kernel': 0.5})

    References:
        Liu et al., Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training,
        ICML 2021 (R_s).
    """
    check_masks(masks, "masks")
    return Exploration(jax.tree.map(jnp.copy, masks))


def exploration_update(state: Exploration, masks) -> Exploration:
    """Adds the present masks to the union; see `exploration_init`."""
    return Exploration(jax.tree.map(jnp.logical_or, state.seen, masks))


def exploration_rate(state: Exploration) -> float:
    """The in-time over-parameterisation rate over all masked leaves, in [0, 1]; 0.0 when nothing is masked."""
    total = mask_overlap(state.seen, state.seen).total
    return total.nnz / total.size if total.size else 0.0


def exploration_rates(state: Exploration) -> dict[str, float]:
    """The in-time over-parameterisation rate of each masked leaf, as `{path: rate}`."""
    return {path: c.nnz / c.size if c.size else 0.0 for path, c in mask_overlap(state.seen, state.seen).layers.items()}


def check_masks(masks, name: str) -> dict:
    """Lists the masks by path after checking that each is boolean.

    Args:
        masks: a tree of bool arrays with `optax.MaskedNode()` at dense leaves.
        name: how the caller's argument is called, for the error.

    Returns:
        `{path: mask}` in the order of the tree; dense leaves do not appear.

    Raises:
        ValueError: when a leaf is not a boolean array.
    """
    leaves = dict(named_leaves(masks))
    for path, mask in leaves.items():
        found = getattr(mask, "dtype", type(mask).__name__)
        if found != np.bool_:
            raise ValueError(f"{name}: the mask of {path or 'the only leaf'} must be a bool array, not {found}")
    return leaves


_NOTHING = MaskChange(size=0, old_nnz=0, nnz=0, added=0, dropped=0)


@jax.jit
def _count_changes(old: list, new: list) -> list:
    pairs = zip(old, new, strict=True)
    return [[jnp.sum(m, dtype=jnp.int32) for m in (a, b, b & ~a, a & ~b)] for a, b in pairs]
