"""Plots carry the data they were given, with units, apart labels and no window."""

import itertools
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from sparsejax.analysis.mask_plots import ADDED, DROPPED, KEPT, PRUNED, plot_density, plot_masks
from sparsejax.analysis.plots import plot_churn, plot_metric

STEPS = list(range(0, 1001, 100))


def seeds(final, count=3):
    return [(STEPS, [final * (1 - np.exp(-s / 100)) + 0.01 * seed for s in STEPS]) for seed in range(count)]


def lines_by_label(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def assert_drawn_without_overlaps(figure):
    """Draws the figure; all its texts must lie inside, and the methods' names apart from each other."""
    figure.canvas.draw()
    [axes] = figure.axes
    # The extent of the text alone: an annotation's own takes the line that leads to it in.
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    width, height = figure.canvas.get_width_height()
    every = [*boxes, axes.xaxis.label.get_window_extent(), axes.yaxis.label.get_window_extent()]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for b in every)


def test_lines_are_means_and_bands_span_the_seeds():
    figure = plot_metric({"rigl": seeds(0.9), "one": seeds(0.5, count=1)}, ylabel="accuracy (%)", percent=True)
    assert isinstance(figure, Figure)
    [axes] = figure.axes
    lines = lines_by_label(axes)
    np.testing.assert_allclose(lines["rigl"].get_ydata(), np.mean([v for _, v in seeds(0.9)], axis=0))
    [band] = axes.collections
    vertices = band.get_paths()[0].vertices
    np.testing.assert_allclose(vertices[:, 1].max(), 0.9 * (1 - np.exp(-10)) + 0.02)
    assert axes.get_ylabel() == "accuracy (%)"
    assert axes.get_xlabel() == "training step"
    figure.canvas.draw()
    assert axes.get_yticklabels()[1].get_text() in {"45", "50", "60"}


def test_seeds_that_recorded_different_steps_are_joined():
    axes = plot_metric({"m": [([0, 10], [1.0, 2.0]), ([10, 20], [4.0, 5.0])]}, ylabel="loss").axes[0]
    assert lines_by_label(axes)["m"].get_xydata().tolist() == [[0, 1], [10, 3], [20, 5]]


def test_values_that_are_not_finite_leave_a_gap():
    axes = plot_metric({"m": [([0, 10, 20], [1.0, np.nan, np.inf])]}, ylabel="loss").axes[0]
    assert lines_by_label(axes)["m"].get_xydata().tolist() == [[0, 1]]


def test_methods_that_end_together_get_labels_apart():
    together = {f"method-{i}": seeds(0.9 + 0.001 * i) for i in range(12)}
    assert_drawn_without_overlaps(plot_metric(together, ylabel="accuracy (%)", title="All", percent=True))


def test_the_axis_spans_what_follows_the_first_fifth():
    low, high = plot_metric({"m": seeds(0.9)}, ylabel="accuracy").axes[0].get_ylim()
    assert low > 0.7
    assert high > 0.92


def test_colours_stay_with_the_place_of_a_method():
    both = plot_metric({"dense": seeds(0.9), "rigl": seeds(0.8)}, ylabel="accuracy").axes[0]
    alone = plot_churn({"dense": [], "rigl": [(STEPS, [0.1] * len(STEPS))]}).axes[0]
    assert lines_by_label(alone)["rigl"].get_color() == lines_by_label(both)["rigl"].get_color()
    assert "dense" not in lines_by_label(alone)


def test_churn_starts_at_zero_and_may_be_zero_throughout():
    figure = plot_churn({"static": [(STEPS, [0.0] * len(STEPS))]}, title="Churn")
    assert figure.axes[0].get_ylim() == (0, 0.01)
    assert_drawn_without_overlaps(figure)


@pytest.mark.parametrize("plot", [plot_churn, plot_density])
def test_nothing_to_plot_is_an_error(plot):
    with pytest.raises(ValueError, match="nothing to plot"):
        plot({"rigl": {} if plot is plot_density else [([], [])]})


def test_few_layers_are_bars_with_their_shares():
    figure = plot_density({"dense": {}, "set": {"a": 0.02, "b": 0.2}, "rigl": {"a": 0.03}})
    [axes] = figure.axes
    assert [bar.get_width() for bar in axes.containers[0]] == [0.02, 0.2]
    assert {text.get_text() for text in axes.texts} == {"2 %", "20 %", "3 %", ""}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["set", "rigl"]
    figure.canvas.draw()


def test_many_layers_are_a_heat_map():
    shares = {f"encoder/blocks/{i}/attention/query/kernel": 0.1 * (i + 1) for i in range(9)} | {"empty": 0.0}
    figure = plot_density({"set": shares, "rigl": dict.fromkeys(list(shares)[:3], 1.0)}, title="Density")
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(shares)
    assert len(axes.texts) == 10 + 3
    assert bar.get_ylabel() == "weights kept (%)"
    figure.canvas.draw()


def test_masks_are_coloured_by_what_became_of_them():
    from matplotlib.colors import to_rgb

    before, after = np.array([[True, True], [False, False]]), jnp.array([[True, False], [True, False]])
    figure = plot_masks(after, before=before)
    [image] = figure.axes[0].images
    expected = [[to_rgb(KEPT), to_rgb(DROPPED)], [to_rgb(ADDED), to_rgb(PRUNED)]]
    np.testing.assert_allclose(image.get_array(), expected)
    assert figure.axes[0].get_title() == "50 % kept"
    figure.canvas.draw()


def test_masks_of_any_rank_side_by_side():
    figure = plot_masks({"vector": np.ones(5, bool), "conv": np.ones((3, 3, 4, 6), bool), "c": np.eye(3, dtype=bool)})
    assert [axes.images[0].get_array().shape[:2] for axes in figure.axes] == [(1, 5), (36, 6), (3, 3)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kept", "pruned"]
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("masks", "before", "message"),
    [
        ({}, None, "masks are named"),
        ({"a": np.eye(2, dtype=bool)}, {"b": np.eye(2, dtype=bool)}, "not the same"),
        ({"a": np.eye(2, dtype=bool)}, {"a": np.eye(3, dtype=bool)}, r"a: the mask has shape \(2, 2\), before it had"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, before, message):
    with pytest.raises(ValueError, match=message):
        plot_masks(masks, before=before)


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never():
    code = (
        "import sys, sparsejax.analysis.plots as p, sparsejax.analysis.mask_plots as m; "
        "assert 'matplotlib' not in sys.modules; "
        "p.plot_metric({'m': [([0, 1], [1, 2])]}, ylabel='y').canvas.draw(); m.plot_masks([[True]]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
