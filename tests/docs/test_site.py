"""The built site: strict, whole, and nothing in it is fetched from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None, reason="the site needs qpert[docs], which `make` installs"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it: a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "doctrees")]
    built = subprocess.run([*command, "docs", str(out / "html")], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out / "html"


class Fetched(HTMLParser):
    """Addresses that a browser fetches by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "a":
            self.links.append(values.get("href") or "")
            return
        quiet = tag == "link" and values.get("rel") in ("canonical", "author", "index", "search", "next", "prev")
        self.addresses += [values[name] or "" for name in ("src", "srcset", "href", "data", "poster") if name in values]
        if quiet:
            self.addresses.pop()


def pages(site: Path) -> Iterator[tuple[Path, Fetched]]:
    for path in sorted(site.rglob("*.html")):
        parser = Fetched()
        parser.feed(path.read_text(encoding="utf-8"))
        yield path, parser


def test_no_page_fetches_a_script_a_font_or_a_style_from_elsewhere(site: Path) -> None:
    looked_at = 0
    for path, found in pages(site):
        outside = [address for address in found.addresses if re.match(r"(\w+:)?//", address)]
        assert outside == [], path.name
        looked_at += len(found.addresses)
    assert looked_at > 100
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert re.findall(r"url\(\s*['\"]?(?:https?:)?//[^)]*\)|@import\s+[^;]*//[^;]*", text) == [], style.name
    for script in site.rglob("*.js"):
        text = script.read_text(encoding="utf-8")
        assert re.findall(r"(?:fetch|importScripts|import)\(\s*['\"]https?://", text) == [], script.name


def test_every_link_inside_the_site_leads_to_a_page_and_a_place(site: Path) -> None:
    places = {path: set(re.findall(r'\bid="([^"]+)"', path.read_text(encoding="utf-8"))) for path, _ in pages(site)}
    followed = 0
    for path, found in pages(site):
        for link in found.links:
            if re.match(r"\w+:|//", link) or not link:
                continue
            name, _, place = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.is_file(), f"{path.name} links to {link}"
            if place and target in places:
                assert place in places[target], f"{path.name} links to {link}"
            followed += 1
    assert followed > 500


def test_the_search_index_is_a_script_so_that_it_works_without_a_server(site: Path) -> None:
    assert (site / "searchindex.js").read_text(encoding="utf-8").startswith("Search.setIndex(")


def test_every_command_and_every_public_name_is_in_the_reference(site: Path) -> None:
    import click

    import qpert.runtime
    from qpert.runtime.cli import cli

    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for name in cli.list_commands(click.Context(cli)):
        assert f'id="qpert-{name}"' in commands, name
    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in qpert.runtime.__all__:
        assert re.search(rf'id="qpert\.[\w.]*\.{name}"', text), name


def test_no_page_shows_markup_that_was_not_understood(site: Path) -> None:
    for path, _ in pages(site):
        text = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert re.findall(r">\s*\.\. [\w-]+::|```|\{(?:click|eval-rst|include|image|download)\}", text) == [], path.name


def test_the_schemas_can_be_downloaded_from_the_manifest_s_page(site: Path) -> None:
    text = (site / "reference" / "manifest.html").read_text(encoding="utf-8")
    for name in ("manifest.schema.json", "detector.schema.json"):
        (link,) = re.findall(rf'href="([^"]*/{re.escape(name)})"', text)
        own = ROOT / "runtime" / "bundle" / name
        assert ((site / "reference" / link).resolve()).read_bytes() == own.read_bytes()


def test_every_guide_is_in_the_navigation_without_a_list(site: Path) -> None:
    guides = {path.stem for path in (ROOT / "docs" / "guides").glob("*.md")}
    shown = set(re.findall(r'href="([\w-]+)\.html"', (site / "guides" / "index.html").read_text(encoding="utf-8")))
    assert guides - {"index"} <= shown
