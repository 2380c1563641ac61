import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import sparsejax
from sparsejax.masks.paths import map_with_names, named_leaves
from sparsejax.masks.roles import Roles
from sparsejax.masks.rules import Rule, equinox_rules, resolve

DENSE = sparsejax.Unstructured()


def tree():
    return {
        "blocks": [
            {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)},
            {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)},
        ],
        "head": {"kernel": jnp.ones((8, 4))},
    }


def sparse(params, rules=None, structure=DENSE):
    return {leaf.path: leaf for leaf in resolve(params, rules, structure) if leaf.structure is not None}


def test_names_are_the_same_for_nnx_states_and_plain_trees():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(2, 3, rngs=rngs)])

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    plain = {"blocks": [{"kernel": 0, "bias": 0}]}
    assert {path for path, _ in named_leaves(state)} == {path for path, _ in named_leaves(plain)}
    assert {path for path, _ in named_leaves(nnx.as_pure(state))} == {"blocks/0/kernel", "blocks/0/bias"}


def test_names_reach_the_function_and_keep_the_structure():
    named = map_with_names(lambda path, leaf, other: (path, leaf + other), {"a": [1, 2]}, {"a": [10, 20]})
    assert named == {"a": [("a/0", 11), ("a/1", 22)]}


def test_kernels_are_sparse_and_biases_dense_by_default():
    assert set(sparse(tree())) == {"blocks/0/kernel", "blocks/1/kernel", "head/kernel"}


def test_the_last_rule_that_matches_wins():
    rules = {
        "*": None,
        "blocks/*": 0.5,
        "blocks/1/kernel": sparsejax.NM(2, 4),
        "head/*": Rule(dense=False, sparsity=0.25),
    }
    found = sparse(tree(), rules)
    assert {path: leaf.sparsity for path, leaf in found.items()} == {
        "blocks/0/kernel": 0.5,
        "blocks/1/kernel": None,  # fixed by its structure
        "head/kernel": 0.25,
    }
    assert found["blocks/1/kernel"].structure == sparsejax.NM(2, 4)
    assert "head/kernel" not in sparse(tree(), {"head/kernel": 0.25, "head/*": None})


def test_rules_may_be_pairs_in_order():
    assert set(sparse(tree(), [("*", None), ("head/*", 0.5)])) == {"head/kernel"}


def test_a_wildcard_never_makes_a_protected_leaf_sparse():
    params = {
        "embed": {"embedding": jnp.ones((16, 8))},
        "norm": {"scale": jnp.ones((4, 4))},
        "out": {"kernel": jnp.ones((8, 8))},
    }
    assert set(sparse(params, {"*": 0.5})) == {"out/kernel"}
    assert set(sparse(params, {"embed/embedding": 0.5})) == {"embed/embedding", "out/kernel"}


def test_a_bias_of_two_axes_stays_dense():
    attention = nnx.MultiHeadAttention(2, 16, rngs=nnx.Rngs(0), decode=False)
    found = sparse(nnx.state(attention, nnx.Param))
    assert set(found) == {"query/kernel", "key/kernel", "value/kernel", "out/kernel"}
    assert found["query/kernel"].roles.matrix_shape((16, 2, 8)) == (16, 16)
    assert found["out/kernel"].roles.matrix_shape((2, 8, 16)) == (16, 16)


def test_scanned_attention_is_a_stack_of_layers():
    params = {"layers": {"query": {"kernel": jnp.ones((3, 16, 2, 8))}}}
    leaf = sparse(params)["layers/query/kernel"]
    assert leaf.layer_shapes == {f"layers/query/kernel[{i}]": (16, 16) for i in range(3)}


def test_a_leaf_of_three_axes_without_roles_is_an_error_that_names_the_remedy():
    params = {"experts": {"kernel": jnp.ones((3, 8, 8))}}
    with pytest.raises(ValueError, match=r"experts/kernel: a leaf of 3 axes.*sparsejax\.Roles"):
        resolve(params, None, DENSE)
    roles = Roles(in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    assert sparse(params, {"experts/kernel": roles})["experts/kernel"].roles == roles
    with pytest.raises(ValueError, match="no leaf is sparse"):
        resolve(params, {"experts/kernel": None}, DENSE)


def test_an_unmatched_rule_is_an_error():
    with pytest.raises(ValueError, match=r"rules\['blocks/7/\*'\] matches no leaf"):
        resolve(tree(), {"blocks/7/*": None}, DENSE)


@pytest.mark.parametrize("value", ["dense", object(), [0.5], 1.5, float("nan"), -0.1])
def test_a_rule_that_means_nothing_is_an_error(value):
    with pytest.raises((ValueError, TypeError)):
        resolve(tree(), {"head/kernel": value}, DENSE)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"head/kernel": sparsejax.NM}, r"rules\['head/kernel'\] is the class NM, .* such as NM\(2, 4\)"),
        ({"head/kernel": Roles}, r"rules\['head/kernel'\] is the class Roles"),
        ({3: None}, "rules has the key 3, expected a glob"),
    ],
)
def test_classes_and_keys_that_are_no_globs_are_refused(rules, message):
    with pytest.raises(TypeError, match=message):
        resolve(tree(), rules, DENSE)


def test_leaves_that_cannot_be_sparse_are_left_alone():
    params = {
        "count": jnp.ones((3, 3), int),
        "empty": jnp.ones((0, 3)),
        "wave": jnp.ones((3, 3), complex),
        "w": jnp.ones((4, 4)),
    }
    reasons = {leaf.path: leaf.reason for leaf in resolve(params, None, DENSE)}
    assert reasons == {
        "count": "dense: dtype int32",
        "empty": "dense: no elements",
        "wave": "dense: dtype complex64",
        "w": "sparse",
    }


def test_equinox_layout_prunes_along_its_inputs():
    params = {"layers": [{"weight": jnp.ones((4, 8)), "bias": jnp.ones(4)}], "conv": {"weight": jnp.ones((5, 6, 3, 3))}}
    found = sparse(params, equinox_rules)
    assert found["layers/0/weight"].layer_shapes == {"layers/0/weight": (8, 4)}
    assert found["conv/weight"].layer_shapes == {"conv/weight": (3, 3, 6, 5)}


def test_only_shapes_are_read():
    abstract = jax.eval_shape(tree)
    assert resolve(abstract, None, DENSE) == resolve(tree(), None, DENSE)


def test_a_structure_that_does_not_fit_names_its_leaf():
    with pytest.raises(ValueError, match="head/kernel"):
        resolve({"head": {"kernel": jnp.ones((6, 4))}}, None, sparsejax.NM(2, 4))
