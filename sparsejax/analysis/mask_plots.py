"""Pictures of masks: what each layer keeps, and the masks themselves as images. See `plots` for what a figure is."""

from collections.abc import Mapping

import numpy as np

from sparsejax.analysis.plots import FAINT, INK, new_axes, new_figure, style
from sparsejax.analysis.table import shorten

KEPT, PRUNED, ADDED, DROPPED = "#0072b2", "#eef0f2", "#009e73", "#d55e00"


def plot_density(densities: Mapping[str, Mapping[str, float]], *, title: str = ""):
    """Draws what each layer keeps: bars side by side for up to eight layers, a heat map for more.

    Args:
        densities: `{method: {path: kept fraction}}`; a layer that a method lacks is left empty. A method without layers
            is not drawn, but keeps its colour, so that plots of the same methods agree.
        title: the title, none by default.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: when there is no layer.

    Example:
        >>> figure = plot_density({"rigl": {"0/kernel": 0.01, "1/kernel": 0.2}})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['0/kernel', '1/kernel']
    """
    layers = list(dict.fromkeys(path for method in densities.values() for path in method))
    if not layers:
        raise ValueError(f"there is nothing to plot: none of {list(densities)} has a layer")
    colours = {method: style(index)[0] for index, method in enumerate(densities) if densities[method]}
    table = np.array([[densities[method].get(path, np.nan) for method in colours] for path in layers])
    draw = _density_bars if len(layers) <= 8 else _density_map
    return draw(table, [shorten(path, 44) for path in layers], colours, title)


def plot_masks(masks, *, before=None, title: str = ""):
    """Draws masks as images, a pixel for each weight; with masks from before, what was added and dropped in colour.

    Args:
        masks: a bool array, or `{name: bool array}` for several side by side. Arrays of more than two axes are drawn
            with all but the last axis as rows.
        before: older masks of the same form and shapes, none by default.
        title: the title, none by default.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: when there is no mask, or the older masks have other names or shapes.

    Example:
        >>> import numpy as np
        >>> figure = plot_masks({"kernel": np.eye(4, dtype=bool)}, before={"kernel": np.ones((4, 4), bool)})
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['kept', 'added', 'dropped', 'pruned']
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    masks = masks if isinstance(masks, Mapping) else {"": masks}
    before = before if before is None or isinstance(before, Mapping) else {"": before}
    if not masks or (before is not None and before.keys() != masks.keys()):
        raise ValueError(f"masks are named {list(masks)} and those before {before and list(before)}: not the same")
    columns = min(len(masks), 4)
    rows = -(-len(masks) // columns)
    figure = new_figure(max(2.6 * columns, 4.2), 2.9 * rows + 0.4, title)
    for index, (name, mask) in enumerate(masks.items()):
        now = _as_image(mask)
        then = now if before is None else _as_image(before[name])
        if now.shape != then.shape:
            raise ValueError(f"{name}: the mask has shape {np.shape(mask)}, before it had {np.shape(before[name])}")
        image = np.empty((*now.shape, 3))
        for kept_now, kept_then, colour in ((1, 1, KEPT), (1, 0, ADDED), (0, 1, DROPPED), (0, 0, PRUNED)):
            image[(now == kept_now) & (then == kept_then)] = to_rgb(colour)
        axes = figure.add_subplot(rows, columns, index + 1)
        wide = max(now.shape) > 6 * min(now.shape)
        axes.imshow(image, interpolation="antialiased", aspect="auto" if wide else "equal")
        axes.set_title(f"{shorten(name, 24)}\n{_short_percent(now.mean())} kept".strip(), fontsize=9, color=INK)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(FAINT)
    shown = {"kept": KEPT, "added": ADDED, "dropped": DROPPED, "pruned": PRUNED}
    if before is None:
        del shown["added"], shown["dropped"]
    patches = [Patch(facecolor=colour, edgecolor=FAINT, linewidth=0.5, label=label) for label, colour in shown.items()]
    spacing = {"handlelength": 1.2, "columnspacing": 1.4, "frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles=patches, loc="outside lower center", ncols=4, **spacing)
    return figure


def _as_image(mask) -> np.ndarray:
    mask = np.asarray(mask, bool)
    return mask.reshape(-1, mask.shape[-1]) if mask.ndim else mask.reshape(1, 1)


def _density_bars(table, layers, colours, title):
    thickness = 0.8 / len(colours)
    figure, axes = new_axes(7.2, max(2.4, 0.9 + 0.2 * len(layers) * (len(colours) + 1)), title)
    for index, (method, colour) in enumerate(colours.items()):
        places = np.arange(len(layers)) + (index - (len(colours) - 1) / 2) * thickness
        bars = axes.barh(places, table[:, index], thickness * 0.9, color=colour, label=method)
        axes.bar_label(bars, [_short_percent(value) for value in table[:, index]], padding=3, fontsize=8, color=INK)
    axes.set_yticks(np.arange(len(layers)), layers)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * np.nanmax(table))
    axes.set_xlabel("weights kept (%)", color=INK, fontsize=10)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=min(len(colours), 5), frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _density_map(table, layers, colours, title):
    from matplotlib.colors import LogNorm

    figure, axes = new_axes(max(6.4, 4.4 + 0.8 * len(colours)), 1.3 + 0.22 * len(layers), title)
    axes.spines[:].set_visible(False)
    lowest = np.nanmin(np.where(table > 0, table, np.nan), initial=1)
    image = axes.imshow(table, aspect="auto", cmap="Blues", norm=LogNorm(min(lowest, 0.5), 1))
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            dark = value > 0 and image.norm(value) > 0.55
            place = {"ha": "center", "va": "center", "fontsize": 7.5}
            axes.text(column, row, _short_percent(value), color="white" if dark else "black", **place)
    axes.set_xticks(np.arange(len(colours)), [shorten(method, 16) for method in colours], rotation=30, ha="right")
    axes.set_yticks(np.arange(len(layers)), layers)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, format=lambda value, _: f"{100 * value:g}")
    bar.set_label("weights kept (%)", color=INK, fontsize=10)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    return figure


def _short_percent(value: float) -> str:
    return f"{100 * value:.3g} %" if np.isfinite(value) else ""
