"""`nnx.Optimizer` for models whose stored weights move."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax.nn.sparse_kernel import Indices, find_kernels, join, part
from sparsejax.parameters.repack import repack


class Optimizer(nnx.Optimizer):
    """Takes the place of `nnx.Optimizer` where blocks of stored weights move; else it is the same.

    It gives the optimizer every stored weight as one parameter, writes new indices back into the model, and asks for
    the gradients of absent blocks one step before they are needed. `sparsejax.check`, `summary` and `finalize` take the
    parameters that `sparsejax.nn.split(model)` returns.

    Args:
        model: an NNX module.
        tx: an optax transformation, such as `sparsejax.sparsify(optax.adamw(1e-3), sparsejax.rigl(0.9))`.
        wrt: which variables are trained, as in `nnx.Optimizer`.

    Example:
        >>> import sparsejax
        >>> from sparsejax.masks.block import Block
        >>> from sparsejax.nn.sparse_linear import SparseLinear
        >>> model = SparseLinear(32, 32, structure=Block((8, 8)), sparsity=0.75, rngs=nnx.Rngs(0))
        >>> optimizer = Optimizer(model, sparsejax.sparsify(optax.adam(1e-3), sparsejax.rigl(0.75)), wrt=nnx.Param)
        >>> grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((4, 32))) ** 2))(model)
        >>> _ = optimizer.update(model, grads)
        >>> sparsejax.masks_of(optimizer)["kernel"].shape, model.kernel.weight
        ((4, 4), BlockSparse(float32[32,32], 4 of 16 blocks of 8x8, mean))
    """

    def __init__(self, model, tx: optax.GradientTransformation, *, wrt):
        whole = functools.partial(_whole, wrt=wrt)
        super().__init__(model, _starting_from(tx, whole(model)), wrt=wrt)
        self.tx = tx

    def update(self, model, grads, /, **kwargs):
        """Updates the model, its indices and the optimizer's state.

        Args:
            model: the module.
            grads: what `nnx.grad` returned.
            **kwargs: further arguments of the transformation's `update`.

        Returns:
            The updates, a nested dict with stored weights whole.
        """
        kernels = find_kernels(model)
        params = _whole(model, self.wrt)
        still = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(nnx.state(model, Indices)))
        gradients = join(kernels, nnx.to_pure_dict(nnx.state(grads, self.wrt)), still)
        state = nnx.as_pure(self.opt_state)
        updates, state = self.tx.update(gradients, state, params, **nnx.as_pure(kwargs))
        nnx.update(model, part(kernels, optax.apply_updates(params, updates), {}))
        nnx.update(self.opt_state, nnx.state(state))
        self.step[...] += 1
        return updates

    def repack(self, model, *, capacity=None):
        """Gives stored weights the room that their blocks need now, and the state with them: `sparsejax.repack`.

        Call it outside of jit, between steps.

        Args:
            model: the module.
            capacity: as in `sparsejax.repack`.
        """
        params, state = repack(_whole(model, self.wrt), nnx.as_pure(self.opt_state), capacity=capacity)
        nnx.update(model, part(find_kernels(model), params, {}))
        nnx.update(self.opt_state, nnx.state(state))


def _whole(model, wrt) -> dict:
    """The parameters with stored weights whole."""
    rest = nnx.to_pure_dict(nnx.state(model, Indices))
    return join(find_kernels(model), nnx.to_pure_dict(nnx.state(model, wrt)), rest)


def _starting_from(tx, params):
    """The transformation with a start that takes these parameters instead of the model's variables."""
    return optax.GradientTransformationExtraArgs(lambda _: tx.init(params), tx.update)
