"""Masks found before training from a loss and data: SNIP and GraSP. Train them with `from_masks(masks)`."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from sparsejax.masks.budget import count_units
from sparsejax.masks.distributions import global_
from sparsejax.masks.rules import resolve
from sparsejax.masks.unstructured import Unstructured
from sparsejax.topology.engine import choose_units
from sparsejax.topology.leaves import sparse_leaves, spread_masks, unit_views, with_leaves


def snip(
    loss: Callable,
    params,
    batches: Iterable,
    sparsity: float,
    *,
    rules=None,
    structure=Unstructured(),
    distribution: Callable = global_,
):
    r"""Keeps the connections whose removal would change the loss most, judged once before training.

    The connection sensitivity of a weight is the derivative of the loss with respect to its mask at :math:`m = 1`:

    .. math:: s_j = \left| \frac{\partial L(m \odot \theta)}{\partial m_j} \right|
              = \left| \theta_j \frac{\partial L}{\partial \theta_j} \right|

    (the paper divides by the sum of all, which changes no rank). Gradients are summed over the batches before the
    absolute value is taken: batches are pieces of one large batch, and how it is cut changes nothing.

    Args:
        loss: `loss(params, batch) -> scalar`; compiled once per shape of batch.
        params: the parameter tree at initialization.
        batches: an iterable of what `loss` takes; the paper uses about ten samples of each class. It is read once and
            to its end: cut an endless stream with `itertools.islice`.
        sparsity: fraction of zeros in [0, 1), counted exactly as written.
        rules: which leaves are sparse, as in `sparsify`.
        structure: what is kept together; scores are pooled over it.
        distribution: `global_` compares all layers under one threshold, as in the paper.

    Returns:
        A tree like `params` of bool masks, `optax.MaskedNode()` where dense: `from_masks(masks)` trains it.

    Raises:
        ValueError: there is no batch; a score is not finite; every score is 0; rules or structure do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[1.0, -3.0], [0.5, 2.0]])}
        >>> masks = snip(lambda p, x: jnp.sum((x @ p["kernel"]) ** 2), params, [jnp.eye(2)], 0.5)
        >>> masks["kernel"].astype(int).tolist()
        [[0, 1], [0, 1]]

    References:
        Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2019, section 4
        (https://arxiv.org/abs/1810.02340)
    """
    plan = resolve(params, rules, structure)
    total = _sum_over(_gradients(loss, plan), batches, params)
    scores = {path: jnp.abs(weight * total[path]) for path, weight in sparse_leaves(params, plan).items()}
    return _masks("snip", scores, params, plan, sparsity, distribution)


def grasp(
    loss: Callable,
    params,
    batches: Iterable,
    sparsity: float,
    *,
    rules=None,
    structure=Unstructured(),
    distribution: Callable = global_,
):
    r"""Keeps the weights that the flow of gradients needs most, judged once before training.

    Removing a weight changes the squared norm of the gradient by about

    .. math:: S(-\theta_j) = -\theta_j \, (H g)_j, \qquad g = \nabla L(\theta), \quad H = \nabla^2 L(\theta)

    and the weights with the largest :math:`S` are removed, so those with the largest :math:`\theta_j (Hg)_j` are
    kept; the sign matters. :math:`Hg` is exact: a forward derivative of the gradient, with respect to the sparse
    leaves. Gradients, and then products, are summed over the batches, as pieces of one large batch.

    Args:
        loss: as in `snip`. The paper divides the logits by a temperature of 200 here: do so in this loss, it makes
            the scores less dependent on the initial outputs.
        params: the parameter tree at initialization.
        batches: as in `snip`; kept in memory, because it is passed over twice.
        sparsity: fraction of zeros in [0, 1), counted exactly as written.
        rules: which leaves are sparse, as in `sparsify`.
        structure: what is kept together; scores are pooled over it.
        distribution: `global_` compares all layers under one threshold, as in the paper.

    Returns:
        A tree like `params` of bool masks, `optax.MaskedNode()` where dense: `from_masks(masks)` trains it.

    Raises:
        ValueError: as `snip`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[1.0, -3.0], [0.5, 2.0]])}
        >>> curvature = jnp.array([[4.0, 1.0], [1.0, -3.0]])  # Hg = curvature**2 * kernel
        >>> masks = grasp(lambda p, c: 0.5 * jnp.sum(c * p["kernel"] ** 2), params, [curvature], 0.5)
        >>> masks["kernel"].astype(int).tolist()
        [[1, 0], [0, 1]]

    References:
        Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, 2020, algorithm 1
        (https://arxiv.org/abs/2002.07376)
    """
    plan = resolve(params, rules, structure)
    batches = list(batches)
    gradients = _gradients(loss, plan)
    total = _sum_over(gradients, batches, params)

    def hessian_product(params, total, batch):
        weights = sparse_leaves(params, plan)
        tangents = {path: total[path].astype(weight.dtype) for path, weight in weights.items()}

        def gradient(weights):
            return gradients(with_leaves(params, weights), batch)

        return jax.jvp(gradient, (weights,), (tangents,))[1]

    products = _sum_over(hessian_product, batches, params, total)
    scores = {path: weight * products[path] for path, weight in sparse_leaves(params, plan).items()}
    return _masks("grasp", scores, params, plan, sparsity, distribution)


def _gradients(loss, plan):
    def gradients(params, batch):
        return jax.grad(lambda weights: loss(with_leaves(params, weights), batch))(sparse_leaves(params, plan))

    return gradients


def _sum_over(function, batches, *args) -> dict:
    """Sums `function(*args, batch) -> {path: array}` over the batches, in float32 or wider."""

    @jax.jit
    def compiled(*args):
        return {path: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for path, x in function(*args).items()}

    total = None
    for batch in batches:
        value = compiled(*args, batch)
        total = value if total is None else jax.tree.map(jnp.add, total, value)
    if total is None:
        raise ValueError("batches is empty; give at least one batch, such as batches=[batch]")
    return total


def _masks(name, scores: dict, params, plan, sparsity, distribution):
    for path, score in scores.items():
        if not bool(jnp.all(jnp.isfinite(score))):
            raise ValueError(f"{name}: scores of {path} are not finite; check that loss and parameters are")
    if not any(bool(jnp.any(score != 0)) for score in scores.values()):
        raise ValueError(f"{name}: every score is 0; the loss does not depend on the sparse leaves {sorted(scores)}")
    views = unit_views(plan)
    counts = count_units(plan, distribution, sparsity)
    units = {path: view.pool(scores[path]) for path, view in views.items()}
    return spread_masks(params, views, choose_units(views, counts, units, dict.fromkeys(views)))
