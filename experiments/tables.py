"""The table of an experiment in words and figures, one text for the terminal and for the page."""

from experiments.results import HIGHER_IS_BETTER, Row
from sparsejax.analysis.table import percent, text_table

HEADINGS = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}


def format_table(rows: list[Row]) -> str:
    """Lays the rows out for a terminal of 120 columns.

    Args:
        rows: from `results.aggregate`.

    Returns:
        The table, and below it what its figures mean and which seeds have not ended.
    """
    head, cells = table_cells(rows)
    return "\n".join([text_table(head, cells, [True, *[False] * (len(head) - 2), True]), *notes(rows)])


def table_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings, and the cells of each row."""
    head = ["method", HEADINGS[rows[0].metric], "sparsity", "nnz", "training FLOPs", "inference FLOPs", "explored"]
    cells = [
        [
            row.method,
            quality(row),
            "-" if row.sparsity is None else percent(row.sparsity, row.nnz),
            "-" if row.nnz is None else f"{row.nnz:,}",
            _share(row.training_flops),
            _share(row.inference_flops),
            _share(row.explored),
            row.execution,
        ]
        for row in rows
    ]
    return [*head, "execution"], cells


def quality(row: Row) -> str:
    """The method's result: `96.1 ± 0.5 %` or `2.413 ± 0.004`, with spaces that no line is broken at."""
    if row.mean is None:
        return "-"
    scale, digits, unit = (100, 1, " %") if row.metric == "accuracy" else (1, 3, "")
    spread = "" if row.std is None else f" ± {scale * row.std:.{digits}f}"
    return f"{scale * row.mean:.{digits}f}{spread}{unit}".replace(" ", "\N{NO-BREAK SPACE}")


def notes(rows: list[Row]) -> list[str]:
    """What the figures of the table mean, and which of them are not final."""
    direction = "higher" if HIGHER_IS_BETTER[rows[0].metric] else "lower"
    found = {row.execution for row in rows}
    lines = [
        f"{HEADINGS[rows[0].metric]}: mean ± standard deviation over seeds after training, {direction} is better",
        "FLOPs: relative to the dense network, with products of zeros not counted",
        "explored: share of the weights that were kept at some time (in-time over-parameterisation rate)",
    ]
    if "simulated" in found:
        lines.append("simulated: dense compute on zeros; time and memory are those of the dense network")
    if "accelerated" in found:
        lines.append("accelerated: kernels skip the zeros; time and memory follow the density")
    for row in rows:
        if row.diverged:
            lines.append(f"DIVERGED: {row.method}, {row.diverged} of {row.finished} seeds, left out of the mean")
        if row.finished < row.seeds:
            lines.append(f"NOT FINISHED: {row.method}, {row.finished} of {row.seeds} seeds have ended")
    return lines


def _share(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"
