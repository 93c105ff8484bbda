"""Links from a page to a file of the repository that is not a page: shown as the file's path, without a link.

On GitHub such a link opens the file. A built site has no repository beside it, and a copy of the file would be
downloaded without its surroundings, so the reader gets the path to look for. A path that does not exist is a warning,
and `make docs` fails on warnings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
log = logging.getLogger(__name__)


class RepositoryLinks(SphinxTransform):
    """Runs before Sphinx collects downloads."""

    default_priority = 10

    def apply(self, **_: Any) -> None:
        for kind in (addnodes.download_reference, addnodes.pending_xref):
            for node in list(self.document.findall(kind)):
                self.replace(node)

    def replace(self, node: nodes.Element) -> None:
        target = node.get("reftarget", "").partition("#")[0]
        if not target or "://" in target or "download" in node.get("classes", ()) or node.get("reftype") == "download":
            return  # an address, or a file that a page offers with the role `download`
        page = Path(self.env.doc2path(self.env.docname))
        path = (page.parent / target).resolve()
        if not path.exists() and path.with_name(path.name + ".md").exists():  # MyST has cut the suffix of a page's link
            path = path.with_name(path.name + ".md")
        if path.is_relative_to(DOCS) or not path.is_relative_to(ROOT):
            return  # a page or a picture of the site: Sphinx checks it
        if not path.exists():
            log.warning("%s does not exist in the repository", target, location=node, type="repository_links")
            return
        shown = nodes.inline("", "", *[child.deepcopy() for child in node.children])
        shown += nodes.Text(" (")
        shown += nodes.literal("", path.relative_to(ROOT).as_posix())
        shown += nodes.Text(")")
        node.replace_self(shown)


def setup(app: Any) -> dict[str, Any]:
    app.add_transform(RepositoryLinks)
    return {"version": "1", "parallel_read_safe": True}
