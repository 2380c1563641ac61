"""Small problems and every preset, shared by the tests.

`PRESETS[name].make(params)` is an algorithm whose whole schedule fits into `STEPS` updates of `mlp_params()`, and
`PRESETS[name].counts(t)` says in plain Python what its masks keep after update `t`, the first being 0.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.masks.block import Block
from sparsejax.masks.channel import Channel
from sparsejax.masks.nm import NM
from sparsejax.masks.paths import named_leaves
from sparsejax.topology.algorithm import Algorithm
from sparsejax.topology.dynamic import ac_dc, from_masks, granet, rigl, set_, static
from sparsejax.topology.latent import mdgf, nm, sdgf, sr_ste, straight_through, top_kast
from sparsejax.topology.magnitude import cyclic, global_magnitude, gradual, iterative, magnitude, random, saliency
from sparsejax.topology.movement import movement

STEPS = 12
INPUTS, HIDDEN, OUTPUTS = 16, 16, 8
SIZES = {"hidden/kernel": INPUTS * HIDDEN, "out/kernel": HIDDEN * OUTPUTS}


def mlp_params(dtype=jnp.float32, seed=0):
    """A plain tree of two layers, 16 x 16 and 16 x 8, with biases."""
    keys = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {
            "kernel": (jax.random.normal(keys[0], (INPUTS, HIDDEN)) / 4).astype(dtype),
            "bias": jnp.zeros(HIDDEN, dtype),
        },
        "out": {
            "kernel": (jax.random.normal(keys[1], (HIDDEN, OUTPUTS)) / 4).astype(dtype),
            "bias": jnp.zeros(OUTPUTS, dtype),
        },
    }


def mlp_apply(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def regression_data(seed=1, samples=64):
    """Inputs and targets; the targets depend on three inputs, so that a sparse network can fit them."""
    x = jax.random.normal(jax.random.key(seed), (samples, INPUTS))
    angles = jnp.stack([x[:, 0] + x[:, 1] * (k % 3 - 1) + x[:, 2] * (k % 2) for k in range(OUTPUTS)], axis=1)
    return x, jnp.sin(angles)


def regression_loss(params, x, y):
    return jnp.mean((mlp_apply(params, x) - y) ** 2)


# Tiny programs, many of them: what the compiler saves in time is more than they take.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def small_params(dtype=jnp.float32):
    kernel = jax.random.normal(jax.random.key(0), (8, 8)) / 3
    return {"kernel": kernel.astype(dtype), "bias": jnp.ones(8, dtype)}


def off_mask(params, masks):
    """Bits of everything off the masks: 0 only for +0.0."""
    found = 0
    for path, mask in named_leaves(masks):
        off = np.asarray(dict(named_leaves(params))[path])[~np.asarray(mask)]
        found += int(np.count_nonzero(off.view(np.uint8)))
    return found


def nnz(masks):
    return {path: int(np.sum(mask)) for path, mask in named_leaves(masks)}


def typed(leaf):
    return leaf.shape, leaf.dtype, leaf.weak_type


def exact_params():
    """Like `mlp_params`, in eighths with many ties: sums and products of few are exact, in whatever order."""
    return jax.tree.map(lambda p: jnp.round(p * 16) / 8, mlp_params())


def exact_grads(steps=STEPS):
    """A stack of gradients for `exact_params`, in quarters with many ties; the leading axis is the step."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda p: jnp.asarray(rng.integers(-6, 7, (steps, *p.shape)) / 4, p.dtype), mlp_params())


def mixed_params(dtype=jnp.float32):
    """A convolution, attention kernels in their own layout, a stack of layers, an embedding and a norm."""
    shapes = {
        "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
        "attention": {
            "query": {"kernel": (8, 2, 4), "bias": (2, 4)},
            "out": {"kernel": (2, 4, 8), "bias": (8,)},
        },
        "blocks": {"query": {"kernel": (3, 8, 2, 4)}, "out": {"kernel": (3, 2, 4, 8)}},
        "token_embedding": (10, 8),
        "norm": {"scale": (8,)},
        "head": {"kernel": (8, 8)},
    }
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


class NNXMLP(nnx.Module):
    """The same network as `mlp_params` in Flax NNX; `sharding` is that of the kernels, as metadata."""

    def __init__(self, rngs, dtype=jnp.float32, sharding=None):
        init = nnx.initializers.lecun_normal()
        if sharding is not None:
            init = nnx.with_partitioning(init, sharding)
        make = lambda inputs, outputs: nnx.Linear(  # noqa: E731
            inputs, outputs, rngs=rngs, param_dtype=dtype, dtype=dtype, kernel_init=init
        )
        self.hidden = make(INPUTS, HIDDEN)
        self.out = make(HIDDEN, OUTPUTS)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


class LinenMLP(flax.linen.Module):
    """The same network in Flax linen."""

    @flax.linen.compact
    def __call__(self, x):
        hidden = jnp.tanh(flax.linen.Dense(HIDDEN, name="hidden")(x))
        return flax.linen.Dense(OUTPUTS, name="out")(hidden)


def cubic(final, begin, end, initial=0.0):
    """Gradual pruning's sparsity (Zhu & Gupta 2017, eq. 1) in Python floats."""

    def at(step):
        done = min(max((step - begin) / (end - begin), 0), 1)
        return final + (initial - final) * (1 - done) ** 3

    return at


def last_due(begin, every, end):
    """`t -> the last step up to t at which masks moved`, or None before the first."""

    def at(t):
        regular = list(range(begin, min(t, end) + 1, every))
        return max(regular + ([end] if t >= end else []), default=None)

    return at


@dataclasses.dataclass(frozen=True)
class Preset:
    """An algorithm and what its masks must keep.

    Args:
        make: `make(params) -> Algorithm`.
        sparsity: `sparsity(t)`, of the masks after update `t`.
        share: "uniform", "erk", "global", the size of a group of an N:M pattern, or counts.
    """

    make: Callable[..., Algorithm]
    sparsity: Callable[[int], float]
    share: object = "uniform"

    def counts(self, t: int) -> dict[str, int] | int:
        """Kept elements of each leaf after update `t`; of all leaves together for a global threshold."""
        density = 1 - Fraction(str(round(self.sparsity(t), 6)))
        if isinstance(self.share, dict):
            return self.share
        if self.share == "global":
            return round(density * sum(SIZES.values()))
        if self.share == "erk":
            return _erk_counts(density)
        if isinstance(self.share, int):
            return {path: size // self.share * math.ceil(density * self.share) for path, size in SIZES.items()}
        return {path: round(density * size) for path, size in SIZES.items()}


def _erk_counts(density):
    """Densities as (inputs + outputs) / (inputs * outputs), so counts as inputs + outputs, none above all."""
    edges = {"hidden/kernel": INPUTS + HIDDEN, "out/kernel": HIDDEN + OUTPUTS}
    total = density * sum(SIZES.values())
    counts = {path: total * edge / sum(edges.values()) for path, edge in edges.items()}
    if counts["out/kernel"] > SIZES["out/kernel"]:
        counts = {"out/kernel": SIZES["out/kernel"], "hidden/kernel": total - SIZES["out/kernel"]}
    rounded = {path: round(count) for path, count in counts.items()}
    assert sum(rounded.values()) == round(total), "choose a sparsity at which rounding each layer keeps the total"
    return rounded


def _constant(sparsity):
    return lambda t: sparsity


def _once(sparsity, step):
    return lambda t: sparsity if t >= step else 0.0


def _held(schedule, begin, every, end):
    due = last_due(begin, every, end)
    return lambda t: 0.0 if due(t) is None else schedule(due(t))


def _given_masks(params):
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(rng.permutation(p.size) < p.size // 4).reshape(p.shape)  # noqa: E731
    return jax.tree.map(lambda p: draw(p) if p.ndim == 2 else None, params)


def _ac_dc_sparsity(t):
    return 0.75 if t >= 8 or (t >= 2 and (t - 2) // 2 % 2 == 0) else 0.0


def _cyclic_sparsity(t):
    return 0.75 if t >= 8 else cubic(0.75, 0, 2)(t // 2 * 2 % 4)


def _iterative_sparsity(t):
    return 1 - 0.75 ** min(max((t - 1) // 3 + 1, 0), 3)


def _stepwise_sparsity(t):  # the mask after update t is the one of step t + 1
    return 0.0 if t + 1 < 1 else 1 - (7, 4, 2, 1)[min((t + 1 - 1) // 2, 3)] / 8


_GRADUAL = cubic(0.875, 1, 8)
_GRANET = cubic(0.75, 0, 6)
_GRANET_SPARSE = cubic(0.75, 0, 6, initial=0.5)
_MOVEMENT = cubic(0.75, 2, 8)

PRESETS = {
    "static": Preset(lambda params: static(0.75), _constant(0.75), "erk"),
    "from_masks": Preset(lambda params: from_masks(_given_masks(params)), _constant(0.75)),
    "magnitude": Preset(lambda params: magnitude(0.75, step=2), _once(0.75, 2)),
    "global_magnitude": Preset(lambda params: global_magnitude(0.75, step=2), _once(0.75, 2), "global"),
    "random": Preset(lambda params: random(0.75, step=2), _once(0.75, 2)),
    "saliency": Preset(lambda params: saliency(0.75, step=2), _once(0.75, 2)),
    "gradual": Preset(lambda params: gradual(0.875, begin=1, end=8, update_every=3), _held(_GRADUAL, 1, 3, 8)),
    "iterative": Preset(lambda params: iterative(rate=0.25, rounds=3, every=3, begin=1), _iterative_sparsity, "global"),
    "cyclic": Preset(lambda params: cyclic(0.75, period=4, cycles=2, update_every=2), _cyclic_sparsity),
    "set_": Preset(lambda params: set_(0.75, update_every=3, stop=10), _constant(0.75), "erk"),
    "rigl": Preset(lambda params: rigl(0.75, update_every=3, stop=10), _constant(0.75), "erk"),
    "granet": Preset(lambda params: granet(0.75, end=6, stop=8, update_every=2), _held(_GRANET, 0, 2, 8), "global"),
    "granet_sparse": Preset(
        lambda params: granet(0.75, end=6, stop=8, update_every=2, initial=0.5),
        _held(_GRANET_SPARSE, 0, 2, 8),
        "global",
    ),
    "ac_dc": Preset(lambda params: ac_dc(0.75, begin=2, phase=2, end=8), _ac_dc_sparsity, "global"),
    "nm": Preset(lambda params: nm(2, 4, step=2), _once(0.5, 2), 4),
    "straight_through": Preset(lambda params: straight_through(0.75), _constant(0.75)),
    "sr_ste": Preset(lambda params: sr_ste(2, 4, decay=2**-6), _constant(0.5), 4),
    "mdgf_linear": Preset(lambda params: mdgf(2, 4, begin=1, rate=0.25), _constant(0.5), 4),
    "mdgf_exponential": Preset(
        lambda params: mdgf(2, 4, begin=1, rate=0.5, exponential=True, end=7), _constant(0.5), 4
    ),
    "mdgf_unscaled": Preset(
        lambda params: mdgf(2, 4, begin=1, rate=0.25, straight_through_gradient=True), _constant(0.5), 4
    ),
    "sdgf_stepwise": Preset(lambda params: sdgf(1, 8, begin=1, every=2), _stepwise_sparsity, 8),
    "sdgf_geometric": Preset(lambda params: sdgf(1, 2, begin=0, every=2, geometric=True), _constant(0.5), 2),
    "top_kast": Preset(lambda params: top_kast(0.75, backward_sparsity=0.5, regularization=2**-6), _constant(0.75)),
    "movement": Preset(lambda params: movement(0.75, begin=2, end=8, learning_rate=0.125), lambda t: _MOVEMENT(t + 1)),
    "rigl_nm": Preset(lambda params: rigl(0.5, structure=NM(2, 4), update_every=3, stop=10), _constant(0.5), 4),
    "rigl_block": Preset(
        lambda params: rigl(0.75, structure=Block((4, 4)), update_every=3, stop=10, seed=1),
        _constant(0.75),
        {"hidden/kernel": 3 * 16, "out/kernel": 3 * 16},  # of 16 and 8 blocks
    ),
    "rigl_channel": Preset(
        lambda params: rigl(0.5, structure=Channel(), update_every=3, stop=10),
        _constant(0.5),
        {"hidden/kernel": 7 * 16, "out/kernel": 5 * 16},  # of 16 and 8 channels
    ),
}
LATENT = tuple(name for name in PRESETS if PRESETS[name].make(mlp_params()).latent)
