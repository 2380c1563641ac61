"""The plan of an algorithm for a model, before any work is done: what is sparse, how, how much and when."""

import dataclasses
import math

import jax
import numpy as np

from sparsejax.analysis.table import percent, text_table
from sparsejax.masks.budget import count_units, unit_grid
from sparsejax.masks.paths import named_leaves
from sparsejax.masks.rules import LeafPlan
from sparsejax.topology.algorithm import NEVER, Algorithm
from sparsejax.topology.engine import plan_leaves
from sparsejax.topology.stored import stored_leaves

_FOR_EVER = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` resolved; print it.

    Attributes:
        leaves: one `LeafPlan` for each leaf.
        nnz: kept elements at the end, for each sparse leaf with a count of its own.
        pooled_nnz: kept units that the other sparse leaves share; None where there are none.
        first: first step that moves masks, None if none does.
        last: last step that does; None if they move until training ends.
        updates: how often masks move; None if until training ends.
    """

    leaves: tuple[LeafPlan, ...]
    nnz: dict[str, int]
    pooled_nnz: int | None
    first: int | None
    last: int | None
    updates: int | None

    def __str__(self) -> str:
        rows = []
        for leaf in self.leaves:
            shape = "×".join(map(str, leaf.shape)) or "scalar"
            if leaf.structure is None:
                rows.append((leaf.path, shape, leaf.reason, "-", "-", "-"))
                continue
            kept = self.nnz.get(leaf.path)
            share = "pooled" if kept is None else percent(1 - kept / leaf.size, rest=kept)
            axes = "-" if leaf.roles is None else _axes(leaf)
            rows.append((leaf.path, shape, str(leaf.structure), axes, share, "pooled" if kept is None else f"{kept:,}"))
        head = ("path", "shape", "structure", "axes", "sparsity", "nnz")
        lines = [text_table(head, rows, (True, True, True, True, False, False))]
        if self.pooled_nnz is not None:
            lines.append(f"pooled leaves share {self.pooled_nnz:,} units under one threshold")
        if self.first is None:
            lines.append("masks are chosen before the first step and never move")
        elif self.updates == 1:
            lines.append(f"masks move once, at step {self.first}")
        elif self.updates is None:
            lines.append(f"masks move first at step {self.first} and until training ends")
        else:
            lines.append(f"masks move {self.updates} times, from step {self.first} to step {self.last}")
        return "\n".join(lines)


def plan(params, algorithm: Algorithm, rules=None, *, steps: int | None = None) -> Plan:
    """Resolves rules, roles, counts and update steps without doing any of it.

    Args:
        params: the parameters, or their shapes (`jax.ShapeDtypeStruct`).
        algorithm: what would be given to `sparsify`.
        rules: what would be given to `sparsify`.
        steps: number of training steps; given, an algorithm that would come too late is an error.

    Returns:
        The `Plan`.

    Raises:
        ValueError: as `sparsify`'s `init`; and where masks would first move after training, or the schedule would end
            after it.

    Example:
        >>> import jax.numpy as jnp, sparsejax
        >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
        >>> print(plan(params, sparsejax.gradual(0.9, begin=0, end=1000)))
        path          shape  structure                 axes    sparsity  nnz
        ────────────────────────────────────────────────────────────────────
        dense/bias    32     dense: by default (bias)  -              -    -
        dense/kernel  64×32  Unstructured()            in out   89.99 %  205
        ────────────────────────────────────────────────────────────────────
        masks move 11 times, from step 0 to step 1000
    """
    leaves = plan_leaves(params, algorithm, rules)
    moves = algorithm.steps != NEVER
    begin, every, end = algorithm.steps.begin, algorithm.steps.every, algorithm.steps.end
    if moves and steps is not None and begin >= steps:
        raise ValueError(
            f"masks would first move at step {begin}, but training ends after {steps} steps; choose an earlier begin "
            "or a smaller update_every"
        )
    if moves and steps is not None and end is not None and end >= steps and algorithm.moving:
        raise ValueError(
            f"the sparsity schedule ends at step {end}, but training ends after {steps} steps, so that the target "
            "would never be reached; choose an earlier end"
        )
    if steps is not None and end is None:
        _require_arrival(algorithm, steps)
    sparse = {leaf.path: leaf for leaf in leaves if leaf.structure is not None}
    if algorithm.masks is not None:
        nnz, pooled = {path: int(np.sum(mask)) for path, mask in named_leaves(algorithm.masks)}, None
    else:
        final = algorithm.sparsity_at(np.int32(_FOR_EVER if end is None else end))
        counts = count_units(leaves, algorithm.distribution, final)
        nnz = {path: _elements(sparse[path], count) for path, count in counts.layers.items()}
        pooled = None if counts.pooled is None else int(counts.pooled)
        if not moves or (algorithm.grow is not None and not algorithm.moving):  # they keep as many as they store
            stored = stored_leaves(params, leaves).items()
            nnz |= {path: leaf.nnz for path, leaf in stored if isinstance(leaf.lists.rows, jax.Array)}
    return Plan(
        leaves=leaves,
        nnz=nnz,
        pooled_nnz=pooled,
        first=begin if moves else None,
        last=end if moves else None,
        updates=None if not moves or end is None else math.ceil((end - begin) / every) + 1,
    )


def _require_arrival(algorithm: Algorithm, steps: int) -> None:
    last = np.int32(steps - 1)
    if algorithm.moving:
        reached, final = (float(algorithm.sparsity_at(step)) for step in (last, np.int32(_FOR_EVER)))
        if abs(reached - final) > 1e-6:
            raise ValueError(
                f"the sparsity schedule has reached {reached:.6g} when training ends after {steps} steps, not its "
                f"final {final:.6g}; let it arrive earlier"
            )
    if algorithm.softness is not None and float(algorithm.softness(last)) > 0:
        raise ValueError(
            f"pruned weights still show with a factor of {float(algorithm.softness(last)):.3g} when training ends "
            f"after {steps} steps; let them fade out earlier"
        )


def _elements(leaf: LeafPlan, count) -> int:
    batch = leaf.roles.batch_shape(leaf.shape)
    counts = np.broadcast_to(np.asarray(jax.device_get(count)), batch)  # a fixed count is one for all stacked layers
    return round(int(np.sum(counts)) * leaf.size / (math.prod(unit_grid(leaf)) * math.prod(batch)))


def _axes(leaf: LeafPlan) -> str:
    names = {}
    for letter, axes in (
        ("stack", leaf.roles.batch_axes),
        ("window", leaf.roles.spatial_axes),
        ("in", leaf.roles.in_axes),
        ("out", leaf.roles.out_axes),
    ):
        names |= {axis % len(leaf.shape): letter for axis in axes}
    return " ".join(names[axis] for axis in range(len(leaf.shape)))
