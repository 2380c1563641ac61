"""The summary's figures, its table's width and alignment, and its HTML."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from sparsejax.analysis.flops import layer_flops
from sparsejax.analysis.summary import summarize

PARAMS = {
    "hidden": {"bias": jnp.zeros(300), "kernel": jnp.zeros((64, 300))},
    "out": {"bias": jnp.zeros(10), "kernel": jnp.zeros((300, 10))},
}
MASKS = {
    "hidden": {"bias": optax.MaskedNode(), "kernel": jnp.arange(19200).reshape(64, 300) < 384},
    "out": {"bias": optax.MaskedNode(), "kernel": optax.MaskedNode()},
}


def forward(p, x):
    hidden = jax.nn.relu(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    return hidden @ p["out"]["kernel"] + p["out"]["bias"]


@dataclasses.dataclass(frozen=True)
class Groups:
    n: int
    m: int
    axis: int = -2


def test_rows_and_totals():
    flops = layer_flops(forward, PARAMS, jax.ShapeDtypeStruct((1, 64), jnp.float32))
    table = summarize(
        PARAMS, MASKS, targets={"hidden/kernel": 400}, flops=flops, structures={"hidden/kernel": Groups(2, 4)}
    )
    by_path = {row.path: row for row in table.rows}
    assert list(by_path) == ["hidden/bias", "hidden/kernel", "out/bias", "out/kernel"]
    row = by_path["hidden/kernel"]
    assert (row.shape, row.structure, row.nnz, row.size, row.execution) == (
        (64, 300), "Groups(2, 4)", 384, 19200, "simulated"
    )  # fmt: skip
    assert (row.target, row.sparsity) == (1 - 400 / 19200, 0.98)
    assert row.flops == 768 / 6768
    dense = by_path["out/kernel"]
    assert (dense.structure, dense.target, dense.sparsity, dense.nnz, dense.execution) == (
        "-",
        None,
        0.0,
        3000,
        "dense",
    )
    assert dense.flops == 6000 / 6768
    assert (table.size, table.nnz) == (22510, 300 + 384 + 10 + 3000)
    assert (table.sparse_size, table.sparse_nnz, table.sparse_sparsity) == (19200, 384, 0.98)
    assert table.flops_ratio == 6768 / 44400
    assert "15.24 % of dense" in str(table)
    assert "simulated: dense compute on zeros" in str(table)


def test_accelerated_layers_are_named_so():
    table = summarize(PARAMS, MASKS, execution={"hidden/kernel": "accelerated"})
    assert "a kernel skips the zeros" in str(table)
    assert "simulated" not in str(table)


def test_a_dense_model_and_shapes_alone_are_enough():
    table = summarize(jax.eval_shape(lambda: PARAMS), None)
    assert {row.execution for row in table.rows} == {"dense"}
    assert (table.sparsity, table.sparse_sparsity, table.flops_ratio) == (0.0, 0.0, None)
    assert "sparse leaves: 0 of 4" in str(table)


def test_the_table_stays_within_120_columns():
    name = "encoder/" + "/".join(f"blocks_{i}" for i in range(20)) + "/kernel"
    params = {name: jax.ShapeDtypeStruct((3, 3, 16384, 14336), jnp.float32), "b": jnp.zeros((4, 4))}
    masks = {name: optax.MaskedNode(), "b": jnp.eye(4, dtype=bool)}
    text = str(summarize(params, masks, structures={"b": Groups(2, 4)}))
    assert max(map(len, text.splitlines())) <= 120
    assert "encoder/blocks_0" in text
    assert "…" in text
    assert "/kernel" in text
    header, rule, *_ = text.splitlines()
    assert len(header) <= len(rule) <= 120


def test_a_nearly_empty_layer_is_not_rounded_to_all():
    mask = jnp.zeros((400, 400), bool).at[0, 0].set(True)
    assert ">99.99 %" in str(summarize({"w": jnp.zeros((400, 400))}, {"w": mask}))


def test_html_has_every_row_and_escapes_names():
    page = summarize({"a<b": jnp.zeros((2, 2))}, {"a<b": jnp.eye(2, dtype=bool)})._repr_html_()
    assert "a&lt;b" in page
    assert "50.00 %" in page
    assert page.count("<tr>") == 2


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"w": {"kernel": jnp.ones(3, bool)}}, r"w/kernel is no parameter; the parameters are \['w'\]"),
        ({"w": jnp.ones((3, 2), bool)}, r"w: the mask has shape \(3, 2\), the parameter \(2, 3\)"),
    ],
)
def test_masks_of_another_model_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        summarize({"w": jnp.zeros((2, 3))}, masks)
