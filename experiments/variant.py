"""One variant of an experiment, a model under an algorithm, as compiled functions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.algorithms import BEFORE_TRAINING, find_masks, make_algorithm, rules_of
from experiments.experiment import Experiment, Task, inputs_and_targets, mean_loss, measure
from sparsejax import Algorithm, Unstructured, mask_params, masks_of, sparsify
from sparsejax.analysis import exploration_init, exploration_update, layer_flops
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.masks.rules import resolve


class TrainState(NamedTuple):
    """All that training changes on the device.

    Attributes:
        step: steps done, int32.
        params: the model's parameters.
        rest: its other variables, such as batch statistics.
        opt_state: the optimizer's state, masks included.
        explored: which weights have been kept at some time.
    """

    step: jax.Array
    params: Any
    rest: Any
    opt_state: Any
    explored: Any


class Variant:
    """A model, its optimizer and its data under one algorithm; the whole schedule and all seeds share one compilation.

    Args:
        experiment: the experiment.
        config: its configuration.
        name: name of the algorithm, or `dense`.
        task: the data.

    Attributes:
        sizes: `{path: weights}` of the layers that are sparse, or that would be if the variant were not dense.
        forward: dense forward FLOPs of one example, by layer.

    Raises:
        ValueError: the configuration does not fit the model: a rule or a structure, a sparsity out of range.
    """

    def __init__(self, experiment: Experiment, config, name: str, task: Task):
        self.config, self.name, self.task = config, name, task
        self.sparse = name != "dense"
        self._inner = experiment.optimizer(config)
        make_model = functools.partial(experiment.model, config)
        self._graphdef = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))[0]

        def make_variables(seed):
            _, params, rest = nnx.split(make_model(nnx.Rngs(jax.random.key(seed))), nnx.Param, ...)
            return nnx.as_pure(params), nnx.as_pure(rest)

        self._make_variables = make_variables  # not compiled as a whole: variants share the pieces' compilations
        params, rest = jax.eval_shape(make_variables, 0)
        plan = resolve(params, rules_of(config), Unstructured())
        self.sizes = {leaf.path: leaf.size for leaf in plan if leaf.structure is not None}
        if self.sparse and name not in BEFORE_TRAINING:
            jax.eval_shape(self.optimizer(0).init, params)  # raises what does not fit before anything runs

        self._heldout = jax.tree.map(lambda *rows: jnp.stack(rows), *task.heldout)
        inputs, _ = inputs_and_targets(jax.tree.map(lambda rows: rows[0, :1], self._heldout))
        self.forward = layer_flops(lambda p, r, x: self.apply(p, r, x), params, rest, inputs)
        self.run_step = jax.jit(self.step, donate_argnums=0)
        self.evaluate = jax.jit(self._evaluate)

    def apply(self, params, rest, inputs) -> jax.Array:
        """Logits, as at evaluation."""
        return nnx.merge(self._graphdef, params, rest)(inputs)

    def algorithm(self, seed=0, masks=None) -> Algorithm | None:
        """The algorithm under a seed; None for the dense variant."""
        return make_algorithm(self.name, self.config, seed=seed, masks=masks) if self.sparse else None

    def optimizer(self, seed=0, masks=None) -> optax.GradientTransformation:
        """The optimizer under a seed; `sparsify` is the one line that makes training sparse."""
        algorithm = self.algorithm(seed, masks)
        return sparsify(self._inner, algorithm, rules=rules_of(self.config)) if self.sparse else self._inner

    def masks(self, state: TrainState):
        """The masks; of a dense network, masks that keep all that could be sparse."""
        if self.sparse:
            return masks_of(state.opt_state)
        return map_with_names(
            lambda path, p: jnp.ones_like(p, dtype=bool) if path in self.sizes else optax.MaskedNode(), state.params
        )

    def kept(self, state: TrainState) -> jax.Array:
        """Weights kept in each layer of `sizes`, int32."""
        return state.opt_state.targets if self.sparse else jnp.array(list(self.sizes.values()), jnp.int32)

    def trainable(self, state: TrainState) -> list[int] | None:
        """Weights with a gradient in each layer, for algorithms that train a larger set than they use; else None."""
        if not self.sparse or "trainable" not in state.opt_state.data:
            return None
        return [int(jnp.sum(mask)) for _, mask in named_leaves(state.opt_state.data["trainable"])]

    def first_state(self, seed: int) -> TrainState:
        """The state before the first step."""
        params, rest = self._make_variables(jnp.uint32(seed))
        masks = None
        if self.name in BEFORE_TRAINING:
            data = iter(self.task.batches(seed))
            masks = find_masks(
                self.name,
                self.config,
                params,
                lambda p, inputs: self.apply(p, rest, inputs),
                [inputs_and_targets(next(data)) for _ in range(4)],
            )
        opt_state = self.optimizer(jnp.uint32(seed), masks).init(params)
        params = mask_params(params, opt_state) if self.sparse else params
        state = TrainState(jnp.int32(0), params, rest, opt_state, None)
        return state._replace(explored=exploration_init(self.masks(state)))

    def step(self, state: TrainState, batch, seed) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        """Takes one training step; `run_step` is this, compiled, and takes over the state's buffers.

        There is no loop over steps inside: on CPU, XLA runs a convolution in a loop twenty times slower than outside.

        Args:
            state: the state before.
            batch: `{name: array (rows, ...)}`.
            seed: uint32 scalar.

        Returns:
            The state after; the loss; and the weights that the forward pass kept in each layer, int32 (layers,).
        """
        inputs, targets = inputs_and_targets(batch)

        def loss_and_rest(params):
            model = nnx.merge(self._graphdef, params, state.rest)
            loss = mean_loss(model(inputs, train=True), targets)
            return loss, nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

        (loss, rest), grads = jax.value_and_grad(loss_and_rest, has_aux=True)(state.params)
        masks = masks_of(state.opt_state) if self.name in BEFORE_TRAINING else None
        updates, opt_state = self.optimizer(seed, masks).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        after = TrainState(state.step + 1, params, rest, opt_state, state.explored)
        after = after._replace(explored=exploration_update(state.explored, self.masks(after)))
        return after, (loss, self.kept(state))

    def _evaluate(self, state: TrainState) -> dict[str, jax.Array]:
        """The sums of `measure` over the held-out batches."""

        def sums(batch):
            inputs, targets = inputs_and_targets(batch)
            return measure(self.apply(state.params, state.rest, inputs), targets, batch["weight"])

        return jax.tree.map(jnp.sum, jax.lax.map(sums, self._heldout))
