"""The table that says what is sparse in a model, how sparse, and whether that saves anything."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass

from sparsejax.analysis.flops import ForwardFlops, sparse_flops
from sparsejax.analysis.overlap import mask_overlap
from sparsejax.analysis.table import html_table, percent, shorten, text_table
from sparsejax.masks.paths import is_stored, named_leaves

HEADINGS = ("path", "shape", "structure", "target", "sparsity", "nnz", "size", "FLOPs", "execution")
OPTIONAL = {HEADINGS.index(heading) for heading in ("structure", "target", "FLOPs")}
LEFT = (True, True, True, False, False, False, False, False, True)


@dataclass(frozen=True)
class Row:
    """One parameter leaf.

    Attributes:
        path: its name.
        shape: its shape.
        structure: what is kept together, `-` where that is not known or the leaf is dense.
        target: the sparsity asked for, None where none was.
        sparsity: the fraction of zeros in its mask, 0.0 for a dense leaf.
        nnz: weights kept.
        size: weights in all.
        flops: its share of the model's forward FLOPs, in [0, 1], zeros not counted; None without FLOPs.
        execution: `simulated` (dense compute on zeros), `accelerated` (cost follows the density), `stored` (memory
            alone does) or `dense`.
    """

    path: str
    shape: tuple[int, ...]
    structure: str
    target: float | None
    sparsity: float
    nnz: int
    size: int
    flops: float | None
    execution: str


@dataclass(frozen=True)
class Summary:
    """The rows of a model's leaves with their totals; prints as a table, and as HTML in a notebook.

    Attributes:
        rows: a `Row` for each leaf, in the order of the tree.
        forward: dense forward FLOPs, None when not given.
        sparse_forward: forward FLOPs that are not spent on zeros, None when not given.
        kernels: what multiplies stored weights here.
    """

    rows: tuple[Row, ...]
    forward: int | None = None
    sparse_forward: int | None = None
    kernels: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(row.size for row in self.rows)

    @property
    def nnz(self) -> int:
        """Number of parameters kept, those of dense leaves included."""
        return sum(row.nnz for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Fraction of all parameters that is pruned."""
        return 1 - self.nnz / self.size if self.size else 0.0

    @property
    def sparse_size(self) -> int:
        """Number of parameters in leaves with a mask."""
        return sum(row.size for row in self.rows if row.execution != "dense")

    @property
    def sparse_nnz(self) -> int:
        """Number of parameters kept in leaves with a mask."""
        return sum(row.nnz for row in self.rows if row.execution != "dense")

    @property
    def sparse_sparsity(self) -> float:
        """Fraction pruned of the leaves with a mask: the figure that sparsity targets speak of."""
        return 1 - self.sparse_nnz / self.sparse_size if self.sparse_size else 0.0

    @property
    def flops_ratio(self) -> float | None:
        """Forward FLOPs that are not spent on zeros over dense ones; None when FLOPs were not given."""
        return self.sparse_forward / self.forward if self.forward else None

    def __str__(self) -> str:
        return "\n".join([text_table(*self._table()), *self._totals()])

    def _repr_html_(self) -> str:
        totals = "".join(f"<div>{html.escape(text)}</div>" for text in self._totals())
        return (
            f'<div style="overflow-x:auto;font-variant-numeric:tabular-nums">{html_table(*self._table())}{totals}</div>'
        )

    def _table(self) -> tuple[list, list, list]:
        """Headings, cells and which columns are set to the left; columns that say nothing are left out."""
        body = [_cells(row) for row in self.rows]
        shown = [i for i in range(len(HEADINGS)) if i not in OPTIONAL or any(cells[i] != "-" for cells in body)]
        return [HEADINGS[i] for i in shown], [[cells[i] for i in shown] for cells in body], [LEFT[i] for i in shown]

    def _totals(self) -> list[str]:
        masked = [row for row in self.rows if row.execution != "dense"]
        totals = [
            f"sparse leaves: {len(masked)} of {len(self.rows)}, {self.sparse_nnz:,} of {self.sparse_size:,} weights "
            f"kept ({percent(self.sparse_sparsity, self.sparse_nnz)} sparse)",
            f"all parameters: {self.nnz:,} of {self.size:,} kept ({percent(self.sparsity, self.nnz)} sparse)",
        ]
        if self.forward:
            share = f"{100 * self.flops_ratio:.2f} % of dense"
            totals.append(f"forward FLOPs: {self.sparse_forward:,} of {self.forward:,} not spent on zeros ({share})")
        if any(row.execution == "simulated" for row in masked):
            totals.append("simulated: dense compute on zeros; time and memory are those of the dense layer")
        if any(row.execution == "accelerated" for row in masked):
            totals.append("accelerated: a kernel skips the zeros; time and memory follow the density")
            totals += [f"  on {kernel}" for kernel in self.kernels]
        if any(row.execution == "stored" for row in self.rows):
            totals.append("stored: memory follows the density, time is that of the dense layer")
        return totals


def summarize(
    params,
    masks,
    *,
    targets: Mapping[str, int] | None = None,
    flops: ForwardFlops | None = None,
    structures: Mapping[str, object] | None = None,
    execution: Mapping[str, str] | None = None,
) -> Summary:
    """Lists every parameter leaf with its sparsity, and says which layers are simulated and which accelerated.

    Args:
        params: the parameters, any pytree of arrays or `jax.ShapeDtypeStruct`; only shapes are read.
        masks: bool masks of the same structure with `optax.MaskedNode()` at dense leaves; None for a dense model.
        targets: `{path: count to keep}`; leaves without one show no target.
        flops: dense forward FLOPs from `layer_flops`; adds the FLOPs column and total.
        structures: `{path: structure}` (or its name); printed shortly, `NM(2, 4)`.
        execution: `{path: "simulated" | "accelerated" | "dense"}` where it is not the default, which is `simulated`
            for leaves with a mask and `dense` for the others; of stored weights it is what they say of themselves.

    Returns:
        A `Summary`; `print` it.

    Raises:
        ValueError: when a mask names no parameter or has another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> params = {"out": {"bias": jnp.zeros(10), "kernel": jnp.zeros((64, 10))}}
        >>> masks = {"out": {"bias": optax.MaskedNode(), "kernel": jnp.arange(640).reshape(64, 10) < 64}}
        >>> print(summarize(params, masks, targets={"out/kernel": 64}))
        path        shape   target  sparsity  nnz  size  execution
        ──────────────────────────────────────────────────────────
        out/bias    10           -         -   10    10  dense
        out/kernel  64×10  90.00 %   90.00 %   64   640  simulated
        ──────────────────────────────────────────────────────────
        sparse leaves: 1 of 2, 64 of 640 weights kept (90.00 % sparse)
        all parameters: 74 of 650 kept (88.62 % sparse)
        simulated: dense compute on zeros; time and memory are those of the dense layer
    """
    targets, structures, execution = targets or {}, structures or {}, execution or {}
    leaves = dict(named_leaves(params, is_stored))
    stored = {path: leaf for path, leaf in leaves.items() if is_stored(leaf)}
    structures = {path: leaf.structure for path, leaf in stored.items()} | structures
    execution = {path: leaf.execution for path, leaf in stored.items()} | execution
    for path, mask in named_leaves(masks):
        if path not in leaves:
            raise ValueError(f"masks: {path} is no parameter; the parameters are {list(leaves)}")
        if path not in stored and mask.shape != leaves[path].shape:
            raise ValueError(f"{path}: the mask has shape {mask.shape}, the parameter {leaves[path].shape}")
    counts = {path: change.nnz for path, change in mask_overlap(masks, masks).layers.items()}
    counts |= {path: leaf.nnz for path, leaf in stored.items()}
    left = sparse_flops(flops, masks) if flops else None

    def row(path, leaf):
        size = math.prod(leaf.shape)
        nnz = counts.get(path, size)
        return Row(
            path=path,
            shape=tuple(leaf.shape),
            structure=_name(structures[path]) if path in counts and path in structures else "-",
            target=1 - int(targets[path]) / size if size and path in counts and path in targets else None,
            sparsity=1 - nnz / size if size else 0.0,
            nnz=nnz,
            size=size,
            flops=left.layers.get(path, 0) / left.total if left and left.total else None,
            execution=execution.get(path, "simulated" if path in counts else "dense"),
        )

    rows = tuple(row(path, leaf) for path, leaf in leaves.items())
    kernels = tuple(dict.fromkeys(leaf.kernel for leaf in stored.values()))
    return Summary(rows, flops.total if flops else None, left.total if left else None, kernels)


def _cells(row: Row) -> tuple[str, ...]:
    masked = row.execution != "dense"
    return (
        row.path,
        "×".join(map(str, row.shape)) or "scalar",
        shorten(row.structure, 24),
        "-" if row.target is None else percent(row.target),
        percent(row.sparsity, row.nnz) if masked else "-",
        f"{row.nnz:,}",
        f"{row.size:,}",
        "-" if row.flops is None else f"{100 * row.flops:.1f} %",
        row.execution,
    )


def _name(structure) -> str:
    """`NM(2, 4)` for `NM(n=2, m=4, axis=-2, share=1)`: the table has no room for names and defaults."""
    if not is_dataclass(structure):
        return str(structure)
    values = [repr(getattr(structure, f.name)) for f in fields(structure) if getattr(structure, f.name) != f.default]
    return type(structure).__name__ + (f"({', '.join(values)})" if values else "")
