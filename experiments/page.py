"""The HTML page of a report: one file, nothing loaded from elsewhere, light or dark as the reader's system is."""

import html
import io
import re
import string
from dataclasses import dataclass
from pathlib import Path

from experiments.results import HIGHER_IS_BETTER, Row, Run
from experiments.tables import notes, quality, table_cells
from sparsejax.analysis.plots import FAINT, INK, PALETTE

TEMPLATE = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
NOT_SETTINGS = {"experiment", "variant", "seed"}


@dataclass(frozen=True)
class Picture:
    """A plot on the page: the name of its file, its title, what it shows, and the plot itself as SVG."""

    name: str
    title: str
    caption: str
    svg: str


def render_page(experiment: str, rows: list[Row], runs: list[Run], pictures: list[Picture]) -> str:
    """Fills the page.

    Args:
        experiment: its name.
        rows: the table's rows.
        runs: all runs, for their configuration and progress.
        pictures: the plots, in order.

    Returns:
        The HTML text.
    """
    seeds = sorted({row.seeds for row in rows})
    facts = [
        f"{len(rows)} {'method' if len(rows) == 1 else 'methods'}",
        f"{' to '.join(map(str, {seeds[0]: 0, seeds[-1]: 0}))} {'seed' if seeds[-1] == 1 else 'seeds'} each",
        f"{max(run.step for run in runs):,} steps",
    ]
    return TEMPLATE.substitute(
        title=html.escape(experiment),
        facts=" · ".join(facts),
        headline=html.escape(headline(rows)),
        banner=_banner(rows, runs),
        table=_table(rows),
        note=html.escape(notes(rows)[0]),
        pictures="".join(map(_picture, pictures)),
        settings=_settings(runs),
    )


def headline(rows: list[Row]) -> str:
    """The result in a sentence."""
    unit = "" if rows[0].metric == "accuracy" else " bits per byte"
    dense = next((row for row in rows if row.execution == "dense" and row.mean is not None), None)
    best = next((row for row in rows if row.execution != "dense" and row.mean is not None), None)
    if best is None:
        return (
            "No sparse method has ended yet." if dense is None else f"The dense network reached {quality(dense)}{unit}."
        )
    text = f"The best sparse method, {best.method}, {_kept(best)}reached {quality(best)}{unit}"
    if dense is None:
        return text + "."
    worse = (dense.mean - best.mean) * (1 if HIGHER_IS_BETTER[best.metric] else -1)
    gap = f"{100 * abs(worse):.1f} points" if best.metric == "accuracy" else f"{abs(worse):.3f}"
    return f"{text}, {gap} {'worse' if worse > 0 else 'better'} than the dense network’s {quality(dense)}."


def _kept(row: Row) -> str:
    if not row.nnz or not row.size:
        return ""
    share = f"{100 * row.nnz / row.size:.3g}\N{NO-BREAK SPACE}%"
    return f"kept {row.nnz:,} of {row.size:,} prunable weights ({share}) and "


def inline_svg(figure, name: str) -> str:
    """Turns a matplotlib figure into SVG that takes its font and colours from the page around it.

    Args:
        figure: the figure.
        name: names the figure's parts apart from those of other figures on the page.

    Returns:
        An `<svg>` element as wide as its container.
    """
    import matplotlib

    text = io.StringIO()
    # Text stays text, so that it can be searched and read aloud; fixed ids and no date make equal data an equal page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg (.*?)width="[^"]*" height="[^"]*"|<svg ', r'<svg role="img" \1', svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font: ([a-z0-9 ]*?)([\d.]+px) [^;\"]+", r"font-size: \2; font-family: inherit", svg)
    for index, colour in enumerate(PALETTE):
        svg = svg.replace(colour, f"var(--c{index})")
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")


def _picture(picture: Picture) -> str:
    return (
        f'<section><h2>{html.escape(picture.title)}</h2><figure id="{picture.name}"><div class="scroll">'
        f"{picture.svg}</div><figcaption>{html.escape(picture.caption)}</figcaption></figure></section>"
    )


def _table(rows: list[Row]) -> str:
    head, cells = table_cells(rows)
    best = next((row.method for row in rows if row.execution != "dense" and row.mean is not None), None)
    lines = []
    for index, (row, texts) in enumerate(zip(rows, cells, strict=True)):
        swatch = f'<span class="swatch" style="background:var(--c{index % len(PALETTE)})"></span>'
        name, *rest = map(html.escape, texts)
        badge = f'<td><span class="badge {row.execution}">{rest[-1]}</span></td>' if row.finished else "<td>-</td>"
        middle = "".join(f"<td>{text}</td>" for text in rest[:-1])
        kind = ' class="best"' if row.method == best else ""
        lines.append(f'<tr{kind}><th scope="row">{swatch}{name}</th>{middle}{badge}</tr>')
    headings = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in head)
    return f"<table><thead><tr>{headings}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _banner(rows: list[Row], runs: list[Run]) -> str:
    """Warnings about what is missing from the table."""
    unfinished = [f"{run.method} seed {run.seed} (step {run.step:,})" for run in runs if run.final is None]
    diverged = [f"{row.method} ({row.diverged} of {row.finished} seeds)" for row in rows if row.diverged]
    warnings = {
        "Not finished": (unfinished, "The table counts finished runs only; curves go as far as the runs did."),
        "Diverged": (diverged, "These seeds ended without a finite result and are left out of the mean."),
    }
    return "".join(
        f'<p class="banner"><strong>{title}:</strong> {html.escape(", ".join(listed))}. {meaning}</p>'
        for title, (listed, meaning) in warnings.items()
        if listed
    )


def _settings(runs: list[Run]) -> str:
    """The configuration: what all runs share, then what tells the methods apart."""
    methods = list(dict.fromkeys(run.method for run in runs))
    fields = [field for field in dict.fromkeys(f for run in runs for f in run.config) if field not in NOT_SETTINGS]
    values = {f: {m: {str(r.config.get(f, "-")) for r in runs if r.method == m} for m in methods} for f in fields}
    shared = {f: v[methods[0]] for f, v in values.items() if all(one == v[methods[0]] for one in v.values())}

    def cell(options):
        return html.escape(next(iter(options)) if len(options) == 1 else "differs by seed")

    common = "".join(f'<tr><th scope="row">{html.escape(f)}</th><td>{cell(v)}</td></tr>' for f, v in shared.items())
    page = f'<div class="scroll"><table class="settings"><tbody>{common}</tbody></table></div>'
    own = [field for field in fields if field not in shared]
    if own:
        head = "".join(f'<th scope="col">{html.escape(field)}</th>' for field in own)
        body = "".join(
            f'<tr><th scope="row">{html.escape(m)}</th>{"".join(f"<td>{cell(values[f][m])}</td>" for f in own)}</tr>'
            for m in methods
        )
        page += (
            '<h3>What tells the methods apart</h3><div class="scroll"><table class="settings"><thead><tr>'
            f'<th scope="col">method</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
    return page
