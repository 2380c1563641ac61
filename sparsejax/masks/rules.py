"""Which leaves become sparse, in which structure and how much: ordered globs, resolved into a plan that can be read."""

import collections
import dataclasses
import fnmatch
import math
import numbers
from collections.abc import Mapping

import jax.numpy as jnp

from sparsejax.masks.counts import exact_fraction
from sparsejax.masks.paths import is_stored, named_leaves
from sparsejax.masks.roles import LINEAR, LINEAR_OUT_IN, Roles, convolution_roles, convolution_roles_out_in
from sparsejax.masks.unstructured import Unstructured


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the leaves that a glob matches; a field left at None is decided by an earlier rule.

    Args:
        dense: True leaves the leaf dense, False makes it sparse.
        structure: the structure of the mask, instead of the algorithm's.
        sparsity: the fraction of zeros, instead of the distribution's share.
        roles: the roles of the axes, or a function from the number of axes to roles.
        ndim: the rule only concerns leaves of this many axes.
        named: the rule is the user's, so that it must match some leaf.
    """

    dense: bool | None = None
    structure: object = None
    sparsity: float | None = None
    roles: object = None
    ndim: int | None = None
    named: bool = False

    def matches(self, glob: str, path: str, ndim: int) -> bool:
        """Whether the rule concerns a leaf: users' globs are held against the whole name, defaults against its end."""
        if self.ndim not in (None, ndim):
            return False
        if self.named:
            return fnmatch.fnmatchcase(path, glob)
        globs, parts = glob.split("/"), path.split("/")
        tail = parts[len(parts) - len(globs) :] if len(parts) >= len(globs) else None
        return tail is not None and all(map(fnmatch.fnmatchcase, tail, globs))


@dataclasses.dataclass(frozen=True)
class Rules:
    """Ordered rules: a later one overrides what earlier ones said of the same leaf.

    Args:
        entries: `(glob, Rule)` pairs; `*` also matches slashes.

    Example:
        >>> flax_rules.extend({"head/*": None}).entries[-1][0]
        'head/*'
    """

    entries: tuple[tuple[str, Rule], ...]

    def extend(self, rules) -> "Rules":
        """Returns these rules with the user's behind them.

        Args:
            rules: a mapping (or a sequence of pairs) from globs to `None` (leave dense), a sparsity, a structure,
                `Roles` (or a function from the number of axes to roles, such as `convolution_roles`) or a `Rule`.

        Raises:
            TypeError: a glob is no text, or a class is given where one made of it is meant.
            ValueError: a value is none of these.
        """
        pairs = rules.items() if isinstance(rules, Mapping) else rules
        return Rules(self.entries + tuple((glob, _as_rule(glob, value)) for glob, value in pairs))


def _as_rule(glob: str, value) -> Rule:
    if not isinstance(glob, str):
        raise TypeError(f"rules has the key {glob!r}, expected a glob over names of leaves, such as 'head/*'")
    if isinstance(value, type):
        raise TypeError(f"rules[{glob!r}] is the class {value.__name__}, expected one made of it, such as NM(2, 4)")
    if value is None:
        return Rule(dense=True, named=True)
    if isinstance(value, Rule):
        return dataclasses.replace(value, named=True)
    if isinstance(value, Roles):
        return Rule(roles=value, named=True)
    if isinstance(value, numbers.Real):
        try:
            exact_fraction(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"rules[{glob!r}]: {error}") from None
        return Rule(dense=False, sparsity=value, named=True)
    if callable(value):
        return Rule(roles=value, named=True)
    if hasattr(value, "fixed_density"):
        return Rule(dense=False, structure=value, named=True)
    raise ValueError(
        f"rules[{glob!r}] is {value!r}; allowed are None (leave dense), a sparsity in [0, 1), a structure such as "
        "sparsejax.NM(2, 4), sparsejax.Roles(...) or sparsejax.Rule(...)"
    )


_ATTENTION_IN = Roles(in_axes=(-3,), out_axes=(-2, -1))
_ATTENTION_OUT = Roles(in_axes=(-3, -2), out_axes=(-1,))


def _stacked(roles: Roles) -> Roles:
    return dataclasses.replace(roles, batch_axes=(0,))


def _names(*globs: str, **fields) -> tuple[tuple[str, Rule], ...]:
    return tuple((glob, Rule(**fields)) for glob in globs)


# Rows of a matrix that are looked up or learned as they are, by the names that vision and language models give them.
_TABLES = ("*embedding*", "*pos_embed*", "pos", "pos_*", "position*", "cls", "cls_*", "*_token", "*_tokens")


flax_rules = Rules(
    (
        ("*", Rule(roles=LINEAR, ndim=2)),
        # A kernel of five axes may be a convolution in three dimensions or a stack of two-dimensional ones: no default.
        *(entry for n in (3, 4) for entry in _names("*[cC]onv*/kernel", roles=convolution_roles, ndim=n)),
        *_names("query/kernel", "key/kernel", "value/kernel", roles=_ATTENTION_IN, ndim=3),
        *_names("query/kernel", "key/kernel", "value/kernel", roles=_stacked(_ATTENTION_IN), ndim=4),
        *_names("out/kernel", roles=_ATTENTION_OUT, ndim=3),
        *_names("out/kernel", roles=_stacked(_ATTENTION_OUT), ndim=4),
        *_names("bias", "*_bias", "scale", *_TABLES, dense=True),
    )
)
"""Defaults for Flax (NNX and linen) and for plain trees laid out in x out."""

equinox_rules = Rules(
    (
        ("*", Rule(roles=LINEAR_OUT_IN, ndim=2)),
        *(entry for n in (3, 4, 5) for entry in _names("weight", roles=convolution_roles_out_in, ndim=n)),
        *_names("bias", "*norm*/weight", "*embed*/weight", *_TABLES, dense=True),
    )
)
"""Defaults for Equinox and other trees laid out out x in."""


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What is planned for one leaf: `structure` is None for a dense leaf, `reason` says why.

    Args:
        path: the leaf's name.
        shape: its shape.
        roles: the roles of its axes; None for a dense leaf.
        structure: the structure of its mask; None for a dense leaf.
        sparsity: a sparsity that a rule fixed; None where the distribution decides.
        reason: why the leaf is as it is.
        stored: the leaf is stored in blocks, and its mask is that of the grid of blocks.
    """

    path: str
    shape: tuple[int, ...]
    roles: Roles | None
    structure: object
    sparsity: float | None
    reason: str
    stored: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and `(*spatial, in, out)` shapes of the layers in this leaf: one, or one for each stacked layer."""
        kernel = self.roles.kernel_shape(self.shape)
        stacked = math.prod(self.roles.batch_shape(self.shape))
        if not self.roles.batch_axes:
            return {self.path: kernel}
        return {f"{self.path}[{index}]": kernel for index in range(stacked)}


def resolve(params, rules=None, structure=None) -> tuple[LeafPlan, ...]:
    """Decides for every leaf of a parameter tree whether and how it is sparse.

    Args:
        params: the parameter tree; only shapes and dtypes are read.
        rules: None for `flax_rules`, a `Rules`, or a mapping that extends `flax_rules`; see `Rules.extend`. A glob
            that ends in a wildcard never makes a leaf sparse that is dense by default (biases, norms' scales,
            embeddings): name such a leaf.
        structure: the structure of leaves to which no rule gives one.

    Returns:
        One `LeafPlan` for each leaf, in the order of the tree.

    Raises:
        ValueError: two leaves have one name; a rule matches no leaf; a leaf of three or more axes has no roles; a
            structure does not fit its leaf; no leaf is sparse.

    Example:
        >>> import jax.numpy as jnp
        >>> from sparsejax.masks.unstructured import Unstructured
        >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
        >>> [(leaf.path, leaf.reason) for leaf in resolve(params, structure=Unstructured())]
        [('dense/bias', 'dense: by default (bias)'), ('dense/kernel', 'sparse')]
    """
    if rules is None:
        rules = flax_rules
    elif not isinstance(rules, Rules):
        rules = flax_rules.extend(rules)
    leaves = named_leaves(params, is_stored)
    used = set()
    twice = [path for path, count in collections.Counter(path for path, _ in leaves).items() if count > 1]
    if twice:
        raise ValueError(
            f"two leaves are named {twice[0]!r}: masks are kept by name; rename one, or take '/' out of its key"
        )
    plan = tuple(_resolve_leaf(path, leaf, rules, structure, used) for path, leaf in leaves)
    if not leaves:  # optax maps over states with a placeholder that has no leaves
        return plan
    for index, (glob, rule) in enumerate(rules.entries):
        if rule.named and index not in used:
            known = ", ".join(path for path, _ in leaves[:8]) + (", ..." if len(leaves) > 8 else "")
            raise ValueError(f"rules[{glob!r}] matches no leaf; mend the glob or remove it. The leaves are: {known}")
    if all(leaf.structure is None for leaf in plan):
        reasons = "; ".join(f"{leaf.path} is {leaf.reason}" for leaf in plan[:8])
        fixed = (
            "; patterns that stay are trained with from_masks(masks)" if any(is_stored(p) for _, p in leaves) else ""
        )
        raise ValueError(f"no leaf is sparse under these rules, so there is nothing to do: {reasons}{fixed}")
    return plan


def _resolve_leaf(path: str, leaf, rules: Rules, structure, used: set[int]) -> LeafPlan:
    stored = is_stored(leaf)
    shape = leaf.shape if stored else tuple(jnp.shape(leaf))
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    sparsity, roles = None, None
    protected = "fewer than two axes" if len(shape) < 2 else ""  # dense unless a rule names this very leaf
    chosen_dense = ""
    for index, (glob, rule) in enumerate(rules.entries):
        if not rule.matches(glob, path, len(shape)):
            continue
        used.add(index)
        roles = rule.roles or roles
        structure = rule.structure or structure
        if rule.sparsity is not None or getattr(rule.structure, "fixed_density", None) is not None:
            sparsity = rule.sparsity  # a structure that fixes the sparsity overrides what earlier rules said of it
        if rule.dense and rule.named:
            chosen_dense = f"rule {glob!r}"
        elif rule.dense:
            protected = f"by default ({glob})"
        elif rule.dense is False:
            chosen_dense = ""
            protected = protected if glob.split("/")[-1].startswith("*") else ""
    unfit = "no elements" if math.prod(shape) == 0 else f"dtype {dtype}"
    if math.prod(shape) == 0 or not jnp.issubdtype(dtype, jnp.floating):
        chosen_dense = unfit
    if stored and not chosen_dense:
        return resolve_stored(path, leaf, structure, sparsity)
    if chosen_dense or protected:
        return LeafPlan(path, shape, None, None, None, f"dense: {chosen_dense or protected}")
    if len(shape) < 2:
        raise ValueError(
            f"{path}: a leaf of shape {shape} has no input and output axes to prune between; remove its rule"
        )
    if roles is None:
        raise ValueError(
            f"{path}: a leaf of {len(shape)} axes, shape {shape}, whose axes no rule names; say which are inputs and "
            f"outputs, rules={{{path!r}: sparsejax.Roles(in_axes=..., out_axes=...)}} (for a convolution kernel, "
            f"rules={{{path!r}: sparsejax.convolution_roles}}), or leave it dense, rules={{{path!r}: None}}"
        )
    roles = roles if isinstance(roles, Roles) else roles(len(shape))
    roles.check(shape, path)
    if math.prod(shape) >= 2**31:
        raise ValueError(
            f"{path}: {math.prod(shape)} elements, shape {shape}, overflow the 32-bit counts of masks; split the leaf, "
            f"or leave it dense, rules={{{path!r}: None}}"
        )
    # N:M groups run along the inputs of one window position; blocks and channels may take in several.
    window = structure.fixed_density is None
    structure.check(roles.matrix_shape(shape)[-2:] if window else roles.kernel_shape(shape)[-2:], path)
    return LeafPlan(path, shape, roles, structure, sparsity, "sparse")


def resolve_stored(path: str, leaf, structure, sparsity) -> LeafPlan:
    """A stored leaf brings its structure and its roles along; the algorithm or a rule may only say the same."""
    own = leaf.structure
    if not leaf.moves:
        return LeafPlan(path, leaf.shape, None, None, None, f"stored: {own}, fixed")
    if not isinstance(structure, type(own) | Unstructured | None):
        raise ValueError(f"{path}: is stored as {own} and cannot be sparse by {structure}; leave the structure out")
    if isinstance(structure, type(own)) and structure != own:
        raise ValueError(
            f"{path}: is stored as {own}, but the algorithm or a rule asks for {structure}; give the same one to "
            "to_sparse and to the algorithm, or leave it out of the algorithm"
        )
    return LeafPlan(path, leaf.shape, leaf.roles, own, sparsity, "sparse: stored", stored=True)
