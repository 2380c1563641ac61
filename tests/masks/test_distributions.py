import functools
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest

from sparsejax.masks.counts import layer_counts
from sparsejax.masks.distributions import (
    erdos_renyi,
    erdos_renyi_kernel,
    erk_plus,
    global_,
    layerwise,
    uniform,
    uniform_plus,
)

LENET = {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)}
CONV = {"c1": (3, 3, 3, 16), "c2": (3, 3, 16, 32), "c3": (3, 3, 32, 64), "fc": (64, 10)}
DIGITS = {"fc1": (64, 256), "fc2": (256, 256), "fc3": (256, 10)}


def _densities(shares):
    return [pytest.approx(1 - value, abs=6e-7) for value in shares.values()]


def _counts(shapes, shares):
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    return list(layer_counts(sizes, {path: 1 - Fraction(value) for path, value in shares.items()}).values())


@pytest.mark.parametrize(
    ("shapes", "distribution", "sparsity", "densities", "counts"),
    [
        (LENET, erdos_renyi_kernel, 0.9, [0.079568, 0.230189, 1], [18714, 6906, 1000]),
        (LENET, erdos_renyi_kernel, 0.95, [0.038484, 0.111334, 0.918507], [9051, 3340, 919]),
        (LENET, erdos_renyi_kernel, 0.8, [0.162241, 0.469362, 1], None),
        (LENET, erdos_renyi, 0.9, [0.079568, 0.230189, 1], [18714, 6906, 1000]),
        (DIGITS, erdos_renyi_kernel, 0.9, [0.150273, 0.060109, 0.799454], [2462, 3939, 2047]),
        (DIGITS, erdos_renyi_kernel, 0.95, None, [1231, 1970, 1023]),
        (CONV, erdos_renyi_kernel, 0.9, [0.566298, 0.114675, 0.054152, 1], [245, 528, 998, 640]),
        (CONV, erdos_renyi_kernel, 0.5, [1, 0.82512, 0.38964, 1], None),
        (CONV, erdos_renyi, 0.9, [0.61936, 0.14669, 0.073345, 0.180918], None),
    ],
)
def test_hand_checked_numbers(shapes, distribution, sparsity, densities, counts):
    shares = distribution(shapes, sparsity)
    if densities is not None:
        assert _densities(shares) == [pytest.approx(d, abs=6e-6) for d in densities]
    if counts is not None:
        assert _counts(shapes, shares) == counts


def test_the_scale_of_lenet_is_the_published_one():
    # epsilon of the papers: what the ratio (inputs + outputs) / (inputs * outputs) is multiplied with
    shares = erdos_renyi(LENET, 0.9)
    assert (1 - shares["fc1"]) * 784 * 300 / (784 + 300) == pytest.approx(17.2642, abs=5e-5)


shapes_of_layers = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 300), st.integers(1, 300)),
        st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3]), st.integers(1, 64), st.integers(1, 64)),
    ),
    min_size=1,
    max_size=7,
).map(lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)})
written = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)


@hypothesis.given(
    shapes=shapes_of_layers, sparsity=written, distribution=st.sampled_from([erdos_renyi, erdos_renyi_kernel])
)
@hypothesis.settings(deadline=None, max_examples=100)
def test_shares_add_up_and_do_not_depend_on_order_or_layout(shapes, sparsity, distribution):
    shares = distribution(shapes, sparsity)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    assert all(0 <= value < 1 for value in shares.values())
    kept = sum((1 - shares[path]) * size for path, size in sizes.items())
    assert kept == pytest.approx((1 - sparsity) * sum(sizes.values()), rel=1e-9)
    assert sum(_counts(shapes, shares)) == max(round((1 - Fraction(str(sparsity))) * sum(sizes.values())), len(shapes))
    backwards = dict(reversed(shapes.items()))
    assert distribution(backwards, sparsity) == shares
    assert list(shares) == list(shapes)
    if distribution is erdos_renyi_kernel:  # HWIO and OIHW
        assert (
            distribution({path: (*shape[2:], *shape[:2])[::-1] for path, shape in shapes.items()}, sparsity) == shares
        )
    assert distribution(shapes, sparsity, power=0) == pytest.approx(uniform(shapes, sparsity))
    assert set(distribution(shapes, 0.0).values()) == {0.0}


def test_a_fractional_power_lies_between_uniform_and_erk():
    half = erdos_renyi_kernel(CONV, 0.95, power=0.5)
    whole = erdos_renyi_kernel(CONV, 0.95)
    assert whole["c1"] < half["c1"] < 0.95
    assert whole["c3"] > half["c3"] > 0.95


def test_layers_of_one_ratio_become_dense_together():
    shapes = {"a": (4, 4), "b": (4, 4), "c": (100, 100)}
    shares = erdos_renyi_kernel(shapes, 0.5)
    assert shares["a"] == shares["b"] == 0
    assert 1 - shares["c"] == pytest.approx((0.5 * 10_032 - 32) / 10_000)


def test_uniform_and_global():
    assert uniform(LENET, 0.9) == {"fc1": 0.9, "fc2": 0.9, "fc3": 0.9}
    assert global_(LENET, 0.9) == {"fc1": None, "fc2": None, "fc3": None}
    assert uniform({}, 0.9) == erdos_renyi_kernel({}, 0.9) == {}


def test_uniform_plus_keeps_the_total():
    shares = uniform_plus(CONV, 0.9, first="c1", last="fc")
    assert _densities(shares) == [
        1,
        pytest.approx(0.0803, abs=5e-5),
        pytest.approx(0.0803, abs=5e-5),
        pytest.approx(0.2),
    ]
    assert sum(_counts(CONV, shares)) == round(0.1 * 24_112)
    assert uniform_plus(CONV, 0.5, first="c1", last="fc")["fc"] == uniform_plus(CONV, 0.5, first="c1", last="fc")["c2"]


def test_erk_plus_is_erk_on_the_rest():
    shares = erk_plus(CONV, 0.9, last="fc", last_density=0.5)
    rest = {path: CONV[path] for path in ("c1", "c2", "c3")}
    assert shares["fc"] == 0.5
    left = (0.1 * 24_112 - 320) / (24_112 - 640)
    assert {path: shares[path] for path in rest} == pytest.approx(erdos_renyi_kernel(rest, 1 - left))


def test_layerwise():
    names = {"a/0": 0.5, "*/1": 0.25, "a/1": 0.75}
    assert layerwise(names)({"a/0": (4, 4), "a/1": (4, 4), "b/1": (2, 2)}, 0.9) == {
        "a/0": 0.5,
        "a/1": 0.75,
        "b/1": 0.25,
    }
    shares = layerwise({"fc3": 0.0}, default=erdos_renyi_kernel)(LENET, 0.9)
    assert shares == erdos_renyi_kernel({"fc1": (784, 300), "fc2": (300, 100)}, 0.9) | {"fc3": 0.0}
    assert layerwise({"fc3": 0.0}, default=global_)(LENET, 0.9) == {"fc1": None, "fc2": None, "fc3": 0.0}
    assert list(layerwise({"fc1": 0.0}, default=uniform)(LENET, 0.9)) == list(LENET)


def test_layerwise_within_the_overall_budget():
    shares = layerwise({"fc3": 0.0}, default=uniform, count_custom=True)(LENET, 0.9)
    assert sum(_counts(LENET, shares)) == 26_620
    assert shares["fc1"] == shares["fc2"] == pytest.approx(1 - 25_620 / 265_200)


def test_layerwise_distributions_are_values():
    make = functools.partial(layerwise, {"fc*": 0.5}, default=uniform)
    assert make() == make()
    assert hash(make()) == hash(make())


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("sparsity must be at least 0", lambda: uniform(LENET, 1.0)),
        ("sparsity must be at least 0", lambda: global_(LENET, -0.5)),
        ("sparsity must be at least 0", lambda: erdos_renyi_kernel(LENET, math.nan)),
        (r"b: shape \(5,\) has no inputs and outputs", lambda: erdos_renyi({"b": (5,)}, 0.5)),
        (r"b: shape \(0, 5\) has no inputs and outputs", lambda: erdos_renyi_kernel({"b": (0, 5)}, 0.5)),
        ("'c9' is none of the layers", lambda: uniform_plus(CONV, 0.9, first="c9", last="fc")),
        ("leave -.* entries to the others", lambda: uniform_plus(CONV, 0.99, first="c3", last="fc")),
        ("whose densities are fixed", lambda: erk_plus(CONV, 0.99, last="fc")),
        (r"layerwise\['fc1'\]: sparsity must be", lambda: layerwise({"fc1": 1.5})),
        ("match no layer", lambda: layerwise({"nothing": 0.5}, default=uniform)(LENET, 0.9)),
        (r"no glob matches \['fc2', 'fc3'\]", lambda: layerwise({"fc1": 0.5})(LENET, 0.9)),
        ("needs a default", lambda: layerwise({"fc1": 0.5}, count_custom=True)),
        ("choose another sparsity", lambda: layerwise({"fc1": 0.0}, uniform, count_custom=True)(LENET, 0.9)),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()
