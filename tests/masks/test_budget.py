import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax
from sparsejax.masks.budget import count_units
from sparsejax.masks.roles import Roles
from sparsejax.masks.rules import resolve


def plan_of(shapes, structure=None, rules=None):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return resolve(params, rules, structure or sparsejax.Unstructured())


LENET = plan_of({"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)})


def hamilton(sizes, kept):
    """Largest remainders by fractions: what exact integer totals mean."""
    exact = [Fraction(size) * kept for size in sizes]
    counts = [math.floor(value) for value in exact]
    missing = round(sum(exact)) - sum(counts)
    for index in sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))[:missing]:
        counts[index] += 1
    return [max(1, count) for count in counts]


def test_erdos_renyi_kernel_counts_of_lenet_as_worked_out_by_hand():
    counts = count_units(LENET, sparsejax.erdos_renyi_kernel, 0.9)
    assert counts.layers == {"fc1": 18714, "fc2": 6906, "fc3": 1000}


def test_a_float_counts_as_written():
    plan = plan_of({"w": (30_000_001, 1)})
    assert count_units(plan, sparsejax.uniform, 0.9).layers == {"w": 3_000_000}


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(50, 60_000), min_size=1, max_size=5),
    ppm=st.integers(0, 979_000),
)
def test_a_moving_sparsity_counts_as_a_fixed_one(sizes, ppm):
    plan = plan_of({f"w{i}": (size, 3) for i, size in enumerate(sizes)})
    moving = count_units(plan, sparsejax.uniform, jnp.float32(ppm / 1e6)).layers
    expected = hamilton([3 * size for size in sizes], Fraction(10**6 - ppm, 10**6))
    assert [int(count) for count in moving.values()] == expected
    fixed = count_units(plan, sparsejax.uniform, Fraction(ppm, 10**6)).layers
    assert list(fixed.values()) == expected


@pytest.mark.parametrize("sparsity", [0.9, 0.98, 0.5, 0.001, 0.999])
def test_a_scheduled_distribution_hits_its_exact_counts_at_thousandths(sparsity):
    fixed = count_units(LENET, sparsejax.erdos_renyi_kernel, sparsity).layers
    moving = jax.jit(lambda s: count_units(LENET, sparsejax.erdos_renyi_kernel, s).layers)(jnp.float32(sparsity))
    assert {name: int(count) for name, count in moving.items()} == fixed


def test_between_thousandths_counts_fall_with_sparsity_and_stay_near_the_exact_ones():
    count = jax.jit(lambda s: count_units(LENET, sparsejax.erdos_renyi_kernel, s).layers)
    before = None
    for sparsity in np.linspace(0.9, 0.91, 23):
        got = {name: int(value) for name, value in count(jnp.float32(sparsity)).items()}
        exact = count_units(LENET, sparsejax.erdos_renyi_kernel, float(sparsity)).layers
        assert all(abs(got[name] - exact[name]) <= 2 for name in got)
        assert before is None or all(got[name] <= before[name] for name in got)
        before = got


def test_the_pool_shares_one_exact_count():
    counts = count_units(LENET, sparsejax.global_, 0.9)
    assert counts.layers == {}
    assert counts.pooled == 26_620
    assert set(counts.pool) == {"fc1", "fc2", "fc3"}
    assert int(count_units(LENET, sparsejax.global_, jnp.float32(0.9)).pooled) == 26_620


def test_stacked_layers_are_counted_one_by_one():
    roles = Roles(in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    plan = plan_of({"stack": (3, 10, 10), "w": (10, 10)}, rules={"stack": roles})
    layers = count_units(plan, sparsejax.uniform, 0.5).layers
    np.testing.assert_array_equal(layers["stack"], [50, 50, 50])
    moving = count_units(plan, sparsejax.uniform, jnp.float32(0.5)).layers
    np.testing.assert_array_equal(moving["stack"], [50, 50, 50])


def test_blocks_are_counted_in_blocks():
    plan = plan_of({"w": (64, 32)}, sparsejax.Block((8, 8)))
    assert count_units(plan, sparsejax.uniform, 0.75).layers == {"w": 8}


@pytest.mark.parametrize(
    ("n", "m", "sparsity", "quota"),
    [(2, 4, 0.5, 2), (2, 4, 0.3, 3), (2, 4, 0.0, 4), (2, 3, 1 / 3, 2), (1, 16, 15 / 16, 1)],
)
def test_groups_are_filled_up_to_a_whole_quota(n, m, sparsity, quota):
    plan = plan_of({"w": (48, 5)}, sparsejax.NM(n, m))
    groups = 48 * 5 // m
    assert count_units(plan, sparsejax.uniform, sparsity).layers == {"w": groups * n}  # a number is no schedule
    assert int(count_units(plan, sparsejax.uniform, jnp.float32(sparsity)).layers["w"]) == groups * quota


def test_a_layer_keeps_at_least_one():
    plan = plan_of({"big": (100, 100), "small": (2, 3)})
    assert count_units(plan, sparsejax.uniform, 0.98).layers["small"] == 1
    assert int(count_units(plan, sparsejax.uniform, jnp.float32(0.98)).layers["small"]) == 1


def test_a_rule_that_contradicts_its_structure_is_an_error():
    rules = {"w": sparsejax.Rule(dense=False, structure=sparsejax.NM(2, 4), sparsity=0.9)}
    with pytest.raises(ValueError, match=r"w: a rule asks for sparsity 0\.9"):
        count_units(plan_of({"w": (8, 8)}, rules=rules), sparsejax.uniform, 0.9)


def test_a_pool_too_large_for_32_bits_is_an_error():
    plan = plan_of({"a": (2**16, 2**14), "b": (2**16, 2**14)})
    with pytest.raises(ValueError, match="overflows 32-bit counts"):
        count_units(plan, sparsejax.global_, 0.9)


def test_a_distribution_must_cover_its_layers():
    with pytest.raises(ValueError, match="gave shares for"):
        count_units(LENET, lambda shapes, sparsity: {"fc1": sparsity}, 0.9)
