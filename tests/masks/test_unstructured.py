import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.counts import keep_count
from sparsejax.masks.unstructured import Unstructured
from tests.masks.oracles import top_mask


@hypothesis.given(
    scores=hnp.arrays(np.float32, (4, 5), elements=st.integers(-3, 3).map(float)), percent=st.integers(0, 99)
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_keeps_the_exact_count_of_the_largest(scores, percent):
    mask = Unstructured().mask(scores, percent / 100)
    assert int(mask.sum()) == keep_count(20, percent / 100)
    np.testing.assert_array_equal(mask, top_mask(scores, keep_count(20, percent / 100)))


def test_elements_are_the_units():
    structure, scores = Unstructured(), jnp.arange(6.0).reshape(2, 3)
    assert structure.fixed_density is None
    assert structure.grid((2, 3)) == (2, 3)
    assert structure.check((2, 3), "fc") is None
    assert structure.pool(scores) is scores
    assert structure.spread(scores > 2, (2, 3)).tolist() == (scores > 2).tolist()
    assert structure.choose(scores, 2, where=scores < 5).tolist() == [[0, 0, 0], [1, 1, 0]]
    assert structure.refill(scores, scores == 0, 3).tolist() == [[1, 0, 0], [0, 1, 1]]
    assert structure.refill(scores, scores == 0, 3, where=scores < 5).tolist() == [[1, 0, 0], [1, 1, 0]]
    assert structure == Unstructured()


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_errors(sparsity):
    with pytest.raises(ValueError, match="sparsity must be"):
        Unstructured().mask(jnp.ones(4), sparsity)
