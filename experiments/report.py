"""Makes the report of an experiment from its run folders: a table, plots, one self-contained HTML page."""

import dataclasses
import json
import math
from pathlib import Path

from experiments.page import Picture, inline_svg, render_page
from experiments.results import HIGHER_IS_BETTER, Row, Run, aggregate, churn, layer_density, load_runs, metric_of
from experiments.tables import format_table
from sparsejax.analysis.mask_plots import plot_density
from sparsejax.analysis.plots import plot_churn, plot_metric

QUALITY = {"accuracy": "test accuracy (%)", "bits_per_byte": "bits per byte"}
_LINES = (
    "Line: mean over seeds; band: from the lowest to the highest seed. The steep first steps may lie outside the axis."
)
CAPTIONS = {
    "accuracy": f"{_LINES} Higher is better.",
    "bits_per_byte": f"{_LINES} Lower is better.",
    "mask_churn": (
        "Share of the kept weights that were dropped between one record of the masks and the next. A static mask stays "
        "at zero, a dynamic one explores and then settles, a gradual one drops what its schedule asks for."
    ),
    "density": "Share of each layer's weights that is kept at the end, the mean over seeds.",
}


def build_report(folder: str | Path) -> Path:
    """Writes `report.html`, `results.json` and the plots as PNG at the top of an experiment's folder.

    Only `config.json` and `metrics.jsonl` of the runs are read, so a report can be made at any time: of unfinished runs
    the curves are shown as far as they go, and the page says so.

    Args:
        folder: `runs/<experiment>`, which holds `<method>/seed<k>/`.

    Returns:
        The path of `report.html`.

    Raises:
        ReportError: when the folder holds no runs or a file in it can't be read.
    """
    folder = Path(folder)
    runs = load_runs(folder)
    rows = aggregate(runs)
    pictures = _draw(folder, runs, rows)
    results = {
        "experiment": _experiment(folder, runs),
        "metric": metric_of(runs),
        "higher_is_better": HIGHER_IS_BETTER[metric_of(runs)],
        "methods": [dataclasses.asdict(row) for row in rows],
        "runs": [{"method": r.method, "seed": r.seed, "step": r.step, "final": r.final} for r in runs],
    }
    (folder / "results.json").write_text(json.dumps(_strict(results), indent=2) + "\n")
    page = folder / "report.html"
    page.write_text(render_page(_experiment(folder, runs), rows, runs, pictures), encoding="utf-8")
    return page


def table_rows(folder: str | Path) -> list[Row]:
    """The rows of an experiment's table, one for each method; see `load_runs` for the folder and its errors."""
    return aggregate(load_runs(folder))


def print_table(folder: str | Path) -> None:
    """Prints the table of an experiment; see `load_runs` for the folder and its errors."""
    print(format_table(table_rows(folder)))


def _draw(folder: Path, runs: list[Run], rows: list[Row]) -> list[Picture]:
    """Saves each plot as PNG and returns it for the page; what there is no data for is left out."""
    metric = metric_of(runs)
    # All plots list all methods in the order of the table, so that a method has one colour throughout.
    groups = {row.method: [run for run in runs if run.method == row.method] for row in rows}
    density = {m: layer_density(g) for m, g in groups.items()}
    # A method that kept everything, the dense one, has no masks worth drawing; empty it still takes its colour.
    density = {m: shares if any(share < 1 for share in shares.values()) else {} for m, shares in density.items()}
    quality = {m: [run.curve("eval", lambda record: record.get(metric)) for run in g] for m, g in groups.items()}
    churned = {m: [run.curve("masks", churn) for run in g if density[m]] for m, g in groups.items()}
    plots = [
        (_has_points(quality), metric, QUALITY[metric].split(" (")[0].capitalize() + " over steps", CAPTIONS[metric],
         lambda title: plot_metric(quality, ylabel=QUALITY[metric], title=title, percent=metric == "accuracy")),
        (_has_points(churned), "mask_churn", "Mask churn", CAPTIONS["mask_churn"],
         lambda title: plot_churn(churned, title=title)),
        (any(density.values()), "density", "Density by layer", CAPTIONS["density"],
         lambda title: plot_density(density, title=title)),
    ]  # fmt: skip
    pictures = []
    for possible, name, title, caption, plot in plots:
        if possible:
            plot(title).savefig(folder / f"{name}.png")
            pictures.append(Picture(name, title, caption, inline_svg(plot(""), name)))
    return pictures


def _has_points(curves) -> bool:
    return any(math.isfinite(value) for seeds in curves.values() for _, values in seeds for value in values)


def _experiment(folder: Path, runs: list[Run]) -> str:
    return str(runs[0].config.get("experiment") or folder.resolve().name)


def _strict(value):
    """The value with None for what JSON has no number for: a diverged run's infinity or NaN."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
