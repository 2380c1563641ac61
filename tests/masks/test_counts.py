import decimal
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.counts import as_written, exact_fraction, keep_count, layer_counts, share, share_floor, to_ppm

MAX = 2**31 - 1
quick = hypothesis.settings(deadline=None, max_examples=100)


@pytest.mark.parametrize(
    "value", [0.9, np.float32(0.9), np.float16(0.9), np.float64(0.9), Fraction(9, 10), decimal.Decimal("0.9")]
)
def test_a_float_counts_as_written(value):
    assert exact_fraction(value) == Fraction(9, 10)


def test_small_and_whole_numbers():
    assert exact_fraction(1e-7) == Fraction(1, 10_000_000)
    assert exact_fraction(0) == exact_fraction(np.int64(0)) == 0
    assert as_written(np.int32(3)) == 3
    assert as_written(math.inf) is None


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 90, math.nan, math.inf, -math.inf, np.float32("nan"), Fraction(3, 2)])
def test_sparsities_outside_the_range(value):
    with pytest.raises(ValueError, match=r"sparsity must be at least 0 and below 1 .*, got"):
        exact_fraction(value)


@pytest.mark.parametrize("value", ["0.9", None, True, np.bool_(False), 0.5j, [0.5]])
def test_sparsities_that_are_no_numbers(value):
    with pytest.raises(TypeError, match="sparsity must be a number, got"):
        exact_fraction(value)


@pytest.mark.parametrize(
    ("size", "sparsity", "count"),
    [
        (30_000_001, 0.9, 3_000_000),  # round(3e7 * (1 - float32(0.9))) would be 3_000_001
        (10**12 + 1, 0.9, 10**11),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (15, 0.9, 2),
        (25, 0.9, 2),
        (100, 0.0, 100),
        (0, 0.5, 0),
    ],
)
def test_keep_count(size, sparsity, count):
    assert keep_count(size, sparsity) == count


@hypothesis.given(size=st.integers(0, MAX), ppm=st.integers(0, 1_000_000))
@hypothesis.example(size=MAX, ppm=1_000_000)
@hypothesis.example(size=MAX, ppm=999_999)
@quick
def test_share_equals_exact_arithmetic(size, ppm):
    exact = Fraction(size * ppm, 1_000_000)
    assert share(size, ppm) == round(exact)
    assert share_floor(size, ppm) == exact.__floor__()
    for s, p in (
        (jnp.int32(size), ppm),
        (size, jnp.int32(ppm)),
        (jnp.int32(size), jnp.int32(ppm)),
        (size, np.int32(ppm)),
    ):
        got = share(s, p)
        assert got.dtype == jnp.int32
        assert int(got) == round(exact)
        assert int(share_floor(s, p)) == exact.__floor__()


def test_share_rounds_halves_to_even():
    assert [share(size, 500_000) for size in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert jax.vmap(lambda s: share(s, 500_000))(jnp.array([1, 3, 5, 7])).tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize(
    ("value", "ppm"),
    [
        (0.9, 900_000),
        (0.0, 0),
        (1.0, 1_000_000),
        (-2.0, 0),
        (7, 1_000_000),
        (math.nan, 0),
        (math.inf, 1_000_000),
        (-math.inf, 0),
        (1e-6, 1),
        (0.1234565, 123_456),
        (2 / 3, 666_667),
    ],
)
def test_to_ppm(value, ppm):
    host, traced = to_ppm(value), jax.jit(to_ppm)(jnp.float32(value))
    assert host.dtype == traced.dtype == jnp.int32
    assert int(host) == ppm
    assert abs(int(traced) - ppm) <= (value == 0.1234565)  # a half that float32 cannot hold


@pytest.mark.parametrize("thousandths", range(0, 1001, 25))
def test_to_ppm_of_written_floats_is_the_same_traced(thousandths):
    assert int(to_ppm(jnp.float32(thousandths / 1000))) == int(to_ppm(thousandths / 1000)) == 1000 * thousandths


def test_to_ppm_of_narrow_floats_and_integers():
    assert int(to_ppm(jnp.bfloat16(0.5))) == 500_000
    assert int(to_ppm(jnp.int32(1))) == 1_000_000


@hypothesis.given(data=st.data(), layers=st.integers(1, 8))
@quick
def test_layer_counts_sum_to_the_total(data, layers):
    sizes = {f"layer{i}": data.draw(st.integers(1, 5000)) for i in range(layers)}
    densities = {path: data.draw(st.integers(0, 1000).map(lambda d: d / 1000)) for path in sizes}
    exact = sum(Fraction(str(densities[path])) * size for path, size in sizes.items())
    counts = layer_counts(sizes, densities)
    assert sum(counts.values()) == max(round(exact), layers)
    assert list(counts) == list(sizes)
    assert all(1 <= counts[path] <= size for path, size in sizes.items())
    total = data.draw(st.integers(layers, sum(sizes.values())))
    counts = layer_counts(sizes, densities, total)
    assert sum(counts.values()) == total
    assert all(1 <= counts[path] <= size for path, size in sizes.items())


@hypothesis.given(sizes=st.lists(st.integers(10, 5000), min_size=1, max_size=8), percent=st.integers(20, 99))
@quick
def test_layer_counts_stay_within_one_of_the_share(sizes, percent):
    sizes = {str(i): size for i, size in enumerate(sizes)}
    counts = layer_counts(sizes, dict.fromkeys(sizes, percent / 100))
    assert all(abs(counts[path] - Fraction(percent * size, 100)) < 1 for path, size in sizes.items())


def test_layer_counts_give_equals_their_remainder_in_order():
    sizes = dict.fromkeys("abcd", 3)
    assert layer_counts(sizes, dict.fromkeys("abcd", 0.5)) == {"a": 2, "b": 2, "c": 1, "d": 1}
    assert layer_counts(sizes, dict.fromkeys("abcd", 0.5), 7) == {"a": 2, "b": 2, "c": 2, "d": 1}
    assert layer_counts(sizes, dict.fromkeys("abcd", 0.4), 5) == {"a": 2, "b": 1, "c": 1, "d": 1}
    assert layer_counts(sizes, dict.fromkeys("abcd", 1.0), 9) == {"a": 3, "b": 2, "c": 2, "d": 2}


def test_layer_counts_of_densities_that_went_through_floats():
    # 0.5 * 26621 is a half, which has to be rounded to even although 1 - (1 - d) is not quite d.
    sizes = {"a": 20_000, "b": 6_621}
    densities = {"a": 1 - (1 - 0.5), "b": float(1 - Fraction(1, 2)) + 1e-16}
    assert sum(layer_counts(sizes, densities).values()) == 13_310


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("total 1 is not reachable: 2 layers", ({"a": 5, "b": 5}, {"a": 0.5, "b": 0.5}, 1)),
        ("total 11 is not reachable", ({"a": 5, "b": 5}, {"a": 0.5, "b": 0.5}, 11)),
        ("they must agree", ({"a": 5}, {"b": 0.5})),
        (r"b: a density must be from 0 to 1, got 1.5", ({"a": 5, "b": 5}, {"a": 0.5, "b": 1.5})),
        ("a: a density must be from 0 to 1, got nan", ({"a": 5}, {"a": math.nan})),
        ("a: a layer of 0 entries cannot keep one", ({"a": 0}, {"a": 0.5})),
    ],
)
def test_layer_counts_errors(message, arguments):
    with pytest.raises(ValueError, match=message):
        layer_counts(*arguments)
