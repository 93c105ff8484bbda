"""One report in three forms. Markdown and HTML are read back by other people's parsers."""

import dataclasses
import html.parser
import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from rich.console import Console

from qpert.runtime.errors import InputError
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.report import charts
from qpert.runtime.report.files import keep_reports, write_copy
from qpert.runtime.report.html import to_html
from qpert.runtime.report.markdown import to_markdown
from qpert.runtime.report.model import (
    Badge,
    Bar,
    Bold,
    Bullets,
    Card,
    Code,
    Grid,
    Heat,
    HeatMap,
    Paragraph,
    Picture,
    Report,
    Section,
    Table,
    pairs,
)
from qpert.runtime.report.terminal import print_report

HOSTILE = "<script>alert('1')</script> & [a](b) *c* _d_ `e` | f ~~g~~ <b> [bold red]"
GATES = Table(
    ("gate", "value", "of the limit", ""),
    (("itm", "0.5", Bar(0.25), Badge("pass", "good")), ("itc", "2", Bar(1.0, "bad"), Badge("FAIL", "bad"))),
)


def report(*blocks, heading="Heading"):
    return Report("Title", heading, blocks)


def printed(one):
    console = Console(width=200, highlight=False, record=True, file=io.StringIO())
    print_report(one, console)
    return console.export_text()


class Reader(html.parser.HTMLParser):
    """The text of a page, and its elements."""

    def __init__(self, page):
        super().__init__()
        self.text, self.open, self.tags = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def rendered(markdown):
    return Reader(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


# Text is plain


@pytest.mark.parametrize(
    "block",
    [
        Paragraph(HOSTILE),
        Bullets((HOSTILE,)),
        Table((HOSTILE, "n"), (("a", "1"),)),
        Table(("a", "n"), ((HOSTILE, "1"),), legend=("l",)),
        Table(("a", "n"), (("a", "1"),), legend=(HOSTILE,)),
        Section(HOSTILE, (Paragraph("x"),)),
        Paragraph(("a ", Bold(HOSTILE))),
        Paragraph(Badge(HOSTILE, "bad")),
        pairs({"key": HOSTILE}),
    ],
)
def test_text_is_shown_as_it_is_in_every_form(block):
    page = Reader(to_html(report(block)))
    assert HOSTILE in page.text
    assert not {"script", "em", "code", "a"} & {tag for tag, _ in page.tags}
    read = rendered(to_markdown(report(block)))
    assert HOSTILE in read.text
    assert not {"script", "em", "code", "a", "s"} & {tag for tag, _ in read.tags}
    assert HOSTILE in printed(report(block))


@given(st.text(alphabet="ab_*`<>[]|~&\\#+-.1) \t", min_size=1, max_size=24))
def test_any_line_comes_back_from_a_markdown_parser(text):
    line = " ".join(text.split())
    read = rendered(to_markdown(report(Paragraph(line))))
    assert read.text.replace("Heading\n", "", 1).strip() == line
    assert {tag for tag, _ in read.tags} <= {"h2", "p"}


@given(st.text(alphabet="ab`\n ", max_size=20))
def test_code_comes_back_whatever_backticks_it_holds(text):
    read = rendered(to_markdown(report(Code(f"x{text}x"))))
    assert read.text == f"Heading\nx{text}x\n\n"


# What only a page can draw


VISUAL = (
    charts.error_plot([charts.Row("a case", (1e-5,), 1e-4)], "errors"),
    HeatMap("τ 0.9", "α", ("2", "4"), (("S", (Heat("70.00", 1.0, "best"), Heat("60.00", -0.5, "worse"))),)),
    Card((Paragraph("in a card"),)),
)


def test_charts_maps_and_cards_are_on_the_page_only_and_leave_no_empty_section():
    one = report(Paragraph("before"), Section("Drawn", (Grid(VISUAL, 20),)))
    page = to_html(one)
    assert all(text in page for text in ("Drawn", "<svg", "a case", "70.00", "in a card"))
    for text in (to_markdown(one), printed(one)):
        assert "before" in text
        assert not any(word in text for word in ("Drawn", "<svg", "a case", "70.00", "in a card"))


def test_a_column_of_bars_is_on_the_page_only():
    assert 'style="width: 25.00%"' in to_html(report(GATES))
    lines = to_markdown(report(GATES)).splitlines()
    assert lines[2:] == [
        "| gate | value |  |",
        "| --- | ---: | ---: |",
        "| itm | 0.5 | pass |",
        "| itc | 2 | **FAIL** |",
    ]
    assert "of the limit" not in printed(report(GATES))


def test_details_are_on_the_page_folded_in_markdown_and_not_on_the_terminal():
    one = report(Section("Run", (Code("qpert verify"), pairs({"python": "3.12"})), details=True))
    assert "qpert verify" in to_html(one)
    assert "<details><summary>Run</summary>\n\n```\nqpert verify\n```" in to_markdown(one)
    assert "3.12" not in printed(one)


def test_a_terminal_shows_heading_titles_tables_and_legends():
    table = dataclasses.replace(GATES, legend=("a legend",))
    one = report(Section("Gates", (table,)), heading=("Parity: ", Badge("PASS", "good")))
    lines = [line.split() for line in printed(one).splitlines() if line.strip()]
    assert lines[0] == ["Parity:", "PASS"]
    assert lines[1] == ["Gates"]
    assert ["itc", "2", "FAIL"] in lines
    assert lines[-1] == ["a", "legend"]


# Pictures


def test_a_picture_is_embedded_with_its_boxes_in_its_own_pixels(tmp_path):
    Image.new("RGB", (800, 400), "red").save(tmp_path / "a.png")
    boxes = Boxes(np.array([[10.0, 20, 110, 70]]), (800, 400), labels=("<cup>",))
    page = to_html(report(Picture(tmp_path / "a.png", boxes)))
    tags = dict(Reader(page).tags)
    assert tags["img"]["src"].startswith("data:image/jpeg;base64,")
    assert tags["svg"]["viewbox"] == "0 0 800 400"
    assert [tags["rect"][name] for name in ("x", "y", "width", "height")] == ["10", "20", "100", "50"]
    assert "&lt;cup&gt;" in page


def test_a_picture_that_is_gone_or_broken_is_reported_in_its_place(tmp_path):
    (tmp_path / "b.png").write_text("no picture")
    page = to_html(report(Picture(tmp_path / "a.png"), Picture(tmp_path / "b.png")))
    assert f"no longer at {tmp_path / 'a.png'}" in page
    assert page.count('class="gone"') == 2
    assert page.count("no longer") == 1


def test_a_page_needs_no_other_file_and_no_script():
    page = to_html(report(*VISUAL, GATES, Paragraph("x", "bad")))
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page
    assert 'name="viewport"' in page


# Charts


def test_bars_are_as_tall_as_their_values_and_what_is_undefined_has_none():
    groups = [("0–10 %", "3 images", (50.0, None)), ("10–20 %", "4 images", (100.0, 0.0))]
    svg = charts.bar_chart(groups, [("t2i", "first"), ("i2t", "second")], "R@1").svg
    heights = re.findall(r'<rect class="(\w+)" [^>]* height="([\d.]+)" rx="3"><title>', svg)
    assert heights == [("first", "75.0"), ("first", "150.0"), ("second", "0.0")]  # 150 pixels are 100 %


def test_a_point_beyond_its_limit_is_marked_and_nan_is_beyond_every_limit():
    svg = charts.error_plot([charts.Row("a", (1e-5, 1e-3, float("nan")), 1e-4)], "errors").svg
    assert svg.count('class="point"') == 1
    assert svg.count('class="point over"') == 2


def test_no_pair_at_all_is_an_empty_chart():
    nothing = np.zeros(0, np.float32)
    assert "<circle" not in charts.scatter(nothing, nothing, 0.1).svg


# Files


def test_a_copy_is_written_where_it_is_asked_for_and_through_a_link(tmp_path):
    write_copy("--html", None, "x")
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    write_copy("--html", tmp_path / "link.html", "new")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_text() == "new"


def test_a_copy_that_cannot_be_written_names_its_option(tmp_path):
    with pytest.raises(InputError) as caught:
        write_copy("--markdown", tmp_path / "no" / "folder.md", "x")
    assert caught.value.code == "report-copy"
    assert "--markdown" in str(caught.value)


def test_a_bundle_that_cannot_be_written_keeps_no_report_and_that_is_said():
    class Full:
        folder = "bundle"

        def add_reports(self, reports, *, verification=None):
            raise OSError(30, "Read-only file system")

    said = []
    keep_reports(Full(), {"x": "y"}, type("Heard", (), {"say": staticmethod(said.append)})())
    assert said == ["the report was not saved: bundle cannot be written ([Errno 30] Read-only file system)"]
