"""Curves over training steps: a measure of quality, the churn of masks.

Matplotlib is imported when a plot is drawn. Every function returns a `matplotlib.figure.Figure` of its own: nothing is
shown, no window and no global state is involved; `figure.savefig(path)` writes it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from sparsejax.analysis.table import shorten

INK, FAINT = "#1f2328", "#8c959f"
# Okabe and Ito's colours, distinct under every kind of colour blindness; yellow is left out, too faint on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6e5494", "#4d4d4d")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))
SETTLED, LABELS = 0.2, 1.06
Curves = Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]]


def plot_metric(curves: Curves, *, ylabel: str, title: str = "", percent: bool = False):
    """Draws a measure over training steps: for each method the mean over seeds, with a band from lowest to highest.

    The vertical axis spans what comes after the first fifth of training, so that the methods can be told apart at its
    end; the first steps may come in from outside.

    Args:
        curves: `{method: [(steps, values) of each seed]}`; seeds may have recorded different steps, and values that
            are not finite are left out. A method without values is not drawn, but keeps its colour.
        ylabel: what is measured, with its unit.
        title: the title, none by default.
        percent: values are fractions and are shown as percentages.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: when no method has a value.

    Example:
        >>> figure = plot_metric({"rigl": [([0, 100], [0.1, 0.9]), ([0, 100], [0.1, 0.8])]}, ylabel="accuracy")
        >>> figure.axes[0].get_ylabel()
        'accuracy'
    """
    figure, axes = new_axes(7.2, 4.2, title)
    ends, shown = {}, []
    for index, (method, seeds) in enumerate(curves.items()):
        steps, low, mean, high = _over_seeds(seeds)
        if not len(steps):
            continue
        colour, dashes = style(index)
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, mean, color=colour, linestyle=dashes, linewidth=1.8, marker=marker, label=method)
        if len(seeds) > 1:
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        # Lines that end together are ordered by the way they came.
        ends[method] = (mean[-1], mean.mean(), colour)
        late = steps >= steps[0] + SETTLED * (steps[-1] - steps[0])
        shown += [low[late].min(), high[late].max()]
    if not ends:
        raise ValueError(f"there is nothing to plot: none of {list(curves)} has a value")
    margin = 0.06 * (max(shown) - min(shown)) or 0.05 * abs(max(shown)) or 0.05
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    _finish_curves(axes, ends, ylabel, percent)
    return figure


def plot_churn(curves: Curves, *, title: str = ""):
    """Draws mask churn over steps: the share of kept weights that were replaced or pruned since the record before.

    Args:
        curves: `{method: [(steps, fractions) of each seed]}`, `MaskChange.churn` for each record.
        title: the title, none by default.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: when no method has a value.

    Example:
        >>> figure = plot_churn({"set": [([100, 200], [0.3, 0.2])]})
        >>> figure.axes[0].get_xlabel()
        'training step'
    """
    figure = plot_metric(curves, ylabel="kept weights dropped since the last record (%)", title=title, percent=True)
    [axes] = figure.axes
    highest = max(max(fractions, default=0) for seeds in curves.values() for _, fractions in seeds)
    axes.set_ylim(0, 1.06 * highest or 0.01)
    _place_labels(axes)
    return figure


def style(index: int) -> tuple:
    """Colour and dashes of the index-th method: colours first, then the same colours dashed."""
    return PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]


def new_figure(width: float, height: float, title: str):
    """An empty figure of so many inches that is drawn without pyplot, hence without windows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def new_axes(width: float, height: float, title: str):
    """A figure with one plain pair of axes."""
    figure = new_figure(width, height, title)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, color=FAINT)
    axes.set_axisbelow(True)
    return figure, axes


def _over_seeds(seeds):
    """Steps in order with the lowest, mean and highest finite value of the seeds that recorded each."""
    values = defaultdict(list)
    for steps, measured in seeds:
        for step, value in zip(steps, measured, strict=True):
            if np.isfinite(value):
                values[int(step)].append(float(value))
    steps = sorted(values)
    columns = [[reduce(values[step]) for step in steps] for reduce in (min, np.mean, max)]
    return np.array(steps), *map(np.array, columns)


def _finish_curves(axes, ends, ylabel: str, percent: bool):
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.6)
    axes.set_xlabel("training step", color=INK, fontsize=10)
    axes.set_ylabel(ylabel, color=INK, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if axes.get_xlim()[1] >= 1e5:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.margins(x=0.01)
    for method, (value, way, colour) in ends.items():
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        label = axes.annotate(
            shorten(method, 24),
            (1, value),
            xytext=(LABELS, value),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.transAxes,
            color=colour,
            fontsize=9.5,
            va="center",
            annotation_clip=False,
            arrowprops=line,
        )
        label.rank = (value, way)
    _place_labels(axes)


def _place_labels(axes):
    """Puts the methods' names beside the ends of their lines, apart from each other."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    labels = sorted(axes.texts, key=lambda label: label.rank)
    gap = min(0.062, 1 / max(len(labels) - 1, 1))
    wanted = [(label.rank[0] - low) / (high - low) - i * gap for i, label in enumerate(labels)]
    for i, (label, place) in enumerate(zip(labels, _nondecreasing(wanted), strict=True)):
        label.set_position((LABELS, min(max(place, 0), 1 - (len(labels) - 1) * gap) + i * gap))


def _nondecreasing(values: list[float]) -> list[float]:
    """The nearest nondecreasing sequence in least squares: neighbours in the wrong order share their mean."""
    runs = []
    for value in values:
        runs.append([value, 1])
        while len(runs) > 1 and runs[-2][0] > runs[-1][0]:
            (a, n), (b, m) = runs[-2:]
            runs[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return [mean for mean, count in runs for _ in range(count)]
