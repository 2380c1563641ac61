"""Aligned tables: as text for terminals and logs, as HTML for notebooks."""

import html
from collections.abc import Sequence

GAP = "  "


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], to_left: Sequence[bool], *, width: int = 120) -> str:
    """Aligns cells in columns between a line of headings and a rule.

    Args:
        head: the headings.
        rows: the cells, one sequence for each row.
        to_left: for each column, whether it is set to the left (names) or to the right (numbers).
        width: most columns of text; the first column is shortened in the middle to fit.

    Returns:
        The lines: headings, rule, rows, rule.

    Example:
        >>> print(text_table(["name", "size"], [["kernel", "1,024"]], [True, False]))
        name     size
        ─────────────
        kernel  1,024
        ─────────────
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    room = width - sum(widths[1:]) - len(GAP) * (len(widths) - 1)
    widths[0] = min(widths[0], max(room, len(head[0])))
    rule = "─" * (sum(widths) + len(GAP) * (len(widths) - 1))

    def line(cells):
        aligned = (c.ljust(w) if left else c.rjust(w) for c, w, left in zip(cells, widths, to_left, strict=True))
        return GAP.join(aligned).rstrip()

    body = (line([shorten(cells[0], widths[0]), *cells[1:]]) for cells in rows)
    return "\n".join([line(head), rule, *body, rule])


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], to_left: Sequence[bool]) -> str:
    """The same table as an HTML `<table>` that takes its colours from the page around it.

    Example:
        >>> html_table(["a"], [["<"]], [True]).count("&lt;")
        1
    """

    def line(tag, cells):
        styles = (f"text-align:{'left' if left else 'right'};white-space:nowrap" for left in to_left)
        cells = (f'<{tag} style="{s}">{html.escape(c)}</{tag}>' for s, c in zip(styles, cells, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", cells) for cells in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"


def percent(fraction: float, rest: int = 1) -> str:
    """Prints a fraction as a percentage; never `100.00 %` while a rest remains.

    Example:
        >>> percent(0.98), percent(0.999999, rest=3), percent(1.0, rest=0)
        ('98.00 %', '>99.99 %', '100.00 %')
    """
    text = f"{100 * fraction:.2f} %"
    return ">99.99 %" if rest and text == "100.00 %" else text


def shorten(text: str, width: int) -> str:
    """Cuts text to a width by leaving out its middle: names of leaves tell most at their ends.

    Example:
        >>> shorten("encoder/blocks/11/attention/query/kernel", 24)
        'encoder/bl…/query/kernel'
    """
    if len(text) <= width:
        return text
    tail = width // 2 + 1
    return text[: width - tail - 1] + "…" + text[len(text) - tail :]
