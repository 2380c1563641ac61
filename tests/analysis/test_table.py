"""Tables: width, alignment and what is never said by rounding."""

import pytest

from sparsejax.analysis.table import html_table, percent, shorten, text_table


def test_columns_are_aligned_to_their_side():
    lines = text_table(["name", "n"], [["a", "1"], ["bcdefg", "1,000"]], [True, False]).splitlines()
    assert lines == ["name        n", "─" * 13, "a           1", "bcdefg  1,000", "─" * 13]


def test_the_first_column_gives_way():
    lines = text_table(["name", "n"], [["a" * 30, "123456"]], [True, False], width=20).splitlines()
    assert lines[2] == "aaaa…aaaaaaa  123456"


def test_html_escapes_and_aligns():
    page = html_table(["<name>", "n"], [["a&b", "1"]], [True, False])
    assert "&lt;name&gt;" in page
    assert "a&amp;b" in page
    assert page.count("text-align:right") == 2


@pytest.mark.parametrize("width", [3, 5, 6, 9])
def test_shorten_keeps_both_ends(width):
    text = shorten("abcdefghij", width)
    assert len(text) == width
    assert text.endswith("j")
    assert shorten("abc", width) == "abc"


def test_percent_says_all_only_of_all():
    assert percent(0.999999) == ">99.99 %"
    assert percent(1.0, rest=0) == "100.00 %"
    assert percent(0.5) == "50.00 %"
