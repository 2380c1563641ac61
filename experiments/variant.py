"""One variant of an experiment, a model under an algorithm, as compiled functions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.algorithms import BEFORE_TRAINING, find_masks, make_algorithm, rules_of
from experiments.experiment import Experiment, Task, UsageError, inputs_and_targets, mean_loss, measure
from experiments.sharding import BATCH, Layout
from experiments.storage import store, stored_graph, stores_blocks
from sparsejax import Algorithm, Unstructured, mask_params, masks_of, sparsify
from sparsejax.analysis import exploration_init, exploration_update, layer_flops
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.masks.rules import resolve
from sparsejax.nn import Indices, merge
from sparsejax.parameters import value_and_grad
from sparsejax.transforms.tree import has_stored


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
        layout: the mesh and the rules by which arrays lie on it; None runs on one device.

    Attributes:
        sizes: `{path: weights}` of the layers that are sparse, or that would be if the variant were not dense.
        forward: dense forward FLOPs of one example, by layer.

    Raises:
        ValueError: the configuration does not fit the model: a rule or a structure, a sparsity out of range; or the
            mesh.
    """

    def __init__(self, experiment: Experiment, config, name: str, task: Task, layout: Layout | None = None):
        self.config, self.name, self.task, self.layout = config, name, task, layout
        self.sparse = name != "dense"
        self._inner = experiment.optimizer(config)
        make_model = functools.partial(experiment.model, config)
        self._graphdef = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))[0]
        self.stored = stores_blocks(config, name)
        self._stored_graph = stored_graph(make_model, config, on_mesh=layout is not None) if self.stored else None

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
        masks = jax.eval_shape(self._full_masks, params) if name in BEFORE_TRAINING else None
        self._abstract = jax.eval_shape(self._state, params, rest, jnp.uint32(0), masks)
        if layout is None:
            self.run_step = jax.jit(self.step, donate_argnums=0)
            self._evaluation = jax.jit(self._sums)
            self._make_state = self._state
        else:
            self._place(params, rest)

    def _place(self, params, rest) -> None:
        """Compiles for the mesh."""
        layout = self.layout
        if self.config.batch_size % layout.batch_shards:
            raise UsageError(
                f"batch_size is {self.config.batch_size}; the mesh's data x fsdp, {layout.batch_shards}, must divide it"
            )
        if self.name in BEFORE_TRAINING and layout.explicit:
            raise UsageError(f"{self.name} finds masks under automatic sharding only: pass --axis-types auto")
        whole = layout.sharding()
        self._rest_placed = jax.tree.map(lambda _: whole, rest)
        self.placed = layout.of_state(self._abstract, self._abstract.params)
        placed = (layout.of_params(params), self._rest_placed)
        make = layout.automatically(self._make_variables, out=placed)
        self._make_variables = self._in_context(jax.jit(make, out_shardings=placed))
        make = layout.automatically(self._state, out=self.placed) if self.stored else self._state
        self._make_state = self._in_context(jax.jit(make, out_shardings=self.placed))
        results = (self.placed, (whole, whole))
        self._step = jax.jit(self.step, donate_argnums=0, out_shardings=results)
        self.run_step = self._in_context(self._step)
        self._evaluation = self._in_context(jax.jit(self._sums, out_shardings=whole))

    def _in_context(self, function):
        def call(*arguments):
            with self.layout.context():
                return function(*arguments)

        return call

    def place(self, batch):
        """A batch as `run_step` takes it, from the rows that this process has read."""
        return batch if self.layout is None else self.layout.place_batch(batch)

    def apply(self, params, rest, inputs) -> jax.Array:
        """Logits, as at evaluation."""
        return self._merge(params, rest)(inputs)

    def _merge(self, params, rest):
        if has_stored(params):
            return merge(self._stored_graph, params, rest)
        return nnx.merge(self._graphdef, params, rest)

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
        return self._full_masks(state.params)

    def _full_masks(self, params):
        return map_with_names(
            lambda path, p: jnp.ones_like(p, dtype=bool) if path in self.sizes else optax.MaskedNode(), params
        )

    def kept(self, state: TrainState) -> jax.Array:
        """Weights kept in each layer of `sizes`, int32."""
        return state.opt_state.targets if self.sparse else jnp.array(list(self.sizes.values()), jnp.int32)

    def trainable(self, state: TrainState) -> list[int] | None:
        """Weights with a gradient in each layer, for algorithms that train a larger set than they use; else None."""
        if not self.sparse or "trainable" not in state.opt_state.data:
            return None
        return [int(jnp.sum(mask)) for _, mask in named_leaves(state.opt_state.data["trainable"])]

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and, on a mesh, shardings of the state: what a checkpoint is restored to."""
        if self.layout is None:
            return self._abstract
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._abstract,
            self.placed,
        )

    def first_state(self, seed: int) -> TrainState:
        """The state before the first step."""
        params, rest = self._make_variables(np.uint32(seed))
        masks = None
        if self.name in BEFORE_TRAINING:
            data = iter(self.task.batches(seed))
            batches = [inputs_and_targets(self.place(next(data))) for _ in range(4)]
            find = find_masks if self.layout is None else self._in_context(find_masks)
            masks = find(self.name, self.config, params, lambda p, inputs: self.apply(p, rest, inputs), batches)
        return self._make_state(params, rest, np.uint32(seed), masks)

    def _state(self, params, rest, seed, masks) -> TrainState:
        opt_state = self.optimizer(seed, masks).init(params)
        params = mask_params(params, opt_state) if self.sparse else params
        if self.stored:
            params = store(params, masks_of(opt_state), self.algorithm(seed), self.config)
            opt_state = self.optimizer(seed).init(params)
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

        def loss_and_rest(params, rest, batch):
            inputs, targets = inputs_and_targets(batch)
            model = self._merge(params, rest)
            loss = mean_loss(model(inputs, train=True), targets)
            return loss, nnx.as_pure(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, Indices))))

        gradient = value_and_grad(loss_and_rest, has_aux=True)
        if self.layout is not None:
            out = ((self.layout.sharding(), self._rest_placed), self.placed.params)
            gradient = self.layout.automatically(gradient, out=out)
        (loss, rest), grads = gradient(state.params, state.rest, batch)
        masks = masks_of(state.opt_state) if self.name in BEFORE_TRAINING else None
        updates, opt_state = self.optimizer(seed, masks).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        after = TrainState(state.step + 1, params, rest, opt_state, state.explored)
        after = after._replace(explored=exploration_update(state.explored, self.masks(after)))
        return after, (loss, self.kept(state))

    def evaluate(self, state: TrainState) -> dict[str, jax.Array]:
        """The sums of `measure` over the held-out batches."""
        return self._evaluation(state.params, state.rest, self._heldout_placed)

    @functools.cached_property
    def _heldout_placed(self):
        return self._heldout if self.layout is None else self.layout.place_batch(self._heldout, stacked=True)

    def trace_step(self):
        """The step traced for a mesh, whose devices need not be there: `.lower().compile()` goes on from it."""
        size, layout = self.config.batch_size, self.layout
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *x.shape[2:]), x.dtype, sharding=layout.sharding(BATCH)),
            {name: x for name, x in self._heldout.items() if name != "weight"},
        )
        seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=layout.sharding())
        with layout.context():
            return self._step.trace(self.abstract_state(), rows, seed)

    def _sums(self, params, rest, heldout) -> dict[str, jax.Array]:
        def total(params, rest, heldout):
            def sums(batch):
                inputs, targets = inputs_and_targets(batch)
                return measure(self.apply(params, rest, inputs), targets, batch["weight"])

            return jax.tree.map(jnp.sum, jax.lax.map(sums, heldout))

        if self.layout is not None:
            total = self.layout.automatically(total, out=self.layout.sharding())
        return total(params, rest, heldout)
