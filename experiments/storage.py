"""Weights stored in blocks instead of masked: `--storage block`."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from experiments.algorithms import BEFORE_TRAINING, rules_of, structure_of
from experiments.experiment import UsageError
from experiments.sharding import BATCH
from sparsejax import Algorithm, Roles
from sparsejax.masks.budget import count_units
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.masks.rules import resolve
from sparsejax.nn import SparseKernel, sparsify_model, split
from sparsejax.parameters import BlockSparse
from sparsejax.parameters.slots import store_blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlocksOnMesh(BlockSparse):
    """Stored blocks inside a program that the compiler splits over a mesh, which it cannot do with their kernels.

    So their products run under `jax.shard_map`: `data` and `fsdp` split the rows of the inputs, and `tensor` the output
    columns, group by group; every column is kept whole where `tensor` does not divide the groups.
    """

    def matmul(self, x: jax.Array, *, implementation: str | None = None) -> jax.Array:
        """`x @ W`, as `BlockSparse.matmul`, in the context of a mesh; its `data` x `fsdp` must divide `x.shape[0]`."""
        self.require_one_layer()
        (inputs, outputs), structure = self.matrix_shape, self.structure
        columns, parts = "tensor", jax.sharding.get_abstract_mesh().shape["tensor"]
        if outputs % structure.shape[1] or structure.groups % parts:
            columns, parts = None, 1
        rows, groups = PartitionSpec(BATCH), PartitionSpec(columns)
        own = (
            dataclasses.replace(structure, groups=structure.groups // parts),
            (inputs, outputs // parts),
            Roles((0,), (1,)),
        )

        def of_part(x, *arrays):
            return BlockSparse(*arrays, *own).matmul(x, implementation=implementation)

        return jax.shard_map(
            of_part,
            in_specs=(rows, groups, groups, PartitionSpec(None, columns), PartitionSpec()),
            out_specs=PartitionSpec(BATCH, *(None,) * (x.ndim - 2), columns),
        )(x, self.values, self.lists, self.probe, self.probe_when)


def stores_blocks(config, name: str) -> bool:
    """Whether a variant stores blocks.

    Raises:
        UsageError: the configuration asks for what cannot be stored.
    """
    if config.storage == "masks" or name == "dense":
        return False
    if name in BEFORE_TRAINING:
        raise UsageError(f"{name} finds masks on dense weights; take --storage masks, or leave {name} out")
    if config.structure not in ("block", "unstructured"):
        raise UsageError(f"--storage block stores blocks; it cannot go with --structure {config.structure}")
    return True


def stored_graph(make_model, config, *, on_mesh: bool):
    """The graph of the model with sparse layers in the place of those that the rules make sparse.

    Args:
        make_model: `make_model(rngs)`, the dense model.
        config: a configuration.
        on_mesh: whether it runs on a mesh.

    Returns:
        What `sparsejax.nn.merge` takes.
    """
    rules = stored_rules(config)

    def make():
        model = make_model(nnx.Rngs(0))
        _, params, _ = split(model)
        sparse = {leaf.path for leaf in resolve(params, rules, structure_of(config)) if leaf.structure is not None}
        everything = map_with_names(lambda path, p: jnp.ones_like(p, bool) if path in sparse else None, params)
        model = sparsify_model(model, rules, everything, capacity=1.0)
        for _, module in nnx.iter_modules(model):
            if on_mesh and isinstance(module, SparseKernel):
                module.layout = jax.tree.structure(BlocksOnMesh(**vars(module.weight)))
        return model

    return split(nnx.eval_shape(make))[0]


def stored_rules(config) -> list:
    """Rules by which all sparse leaves have the configuration's blocks."""
    return [("*", structure_of(config)), *rules_of(config).items()]


def store(params, masks, algorithm: Algorithm, config):
    """Stores the blocks of the starting masks; works traced, since counts alone decide how many slots there are.

    Args:
        params: the dense parameters.
        masks: the starting masks.
        algorithm: says how many blocks each layer keeps at first.
        config: a configuration.

    Returns:
        The parameters, stored where there are masks.
    """
    plan = {leaf.path: leaf for leaf in resolve(params, stored_rules(config), structure_of(config))}
    masks = dict(named_leaves(masks))
    slots = _slots(tuple(plan[path] for path in masks), algorithm)

    def stored(path, p):
        if path not in masks:
            return p
        leaf = plan[path]
        grid = leaf.structure.pool(leaf.roles.to_matrix(masks[path]).astype(jnp.float32)) > 0
        return store_blocks(p, grid, leaf, slots=slots[path])

    return map_with_names(stored, params)


def _slots(plan, algorithm: Algorithm) -> dict[str, int]:
    """Slots of a group."""
    grids = {leaf.path: leaf.structure.grid(leaf.roles.matrix_shape(leaf.shape)) for leaf in plan}
    groups = {leaf.path: leaf.structure.groups for leaf in plan}
    full = {path: grid[-2] * grid[-1] // groups[path] for path, grid in grids.items()}
    if algorithm.start is None:  # starts with everything
        return full
    with jax.ensure_compile_time_eval():
        distribution = algorithm.start_distribution or algorithm.distribution
        counts = count_units(plan, distribution, algorithm.sparsity_at(0), algorithm.final_sparsity)
        if counts.pool:
            return full
        return {path: -(-int(jnp.max(jnp.asarray(count))) // groups[path]) for path, count in counts.layers.items()}
