"""Sphinx's configuration. `make docs` builds the site strictly into build/docs; it opens without server or network."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(HERE.parent / "src"))

project = "qpert"
author = "the qpert authors"
copyright = "the qpert authors, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "generated_pages",
    "repository_links",
]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "html_image"]
myst_heading_anchors = 4
exclude_patterns = ["_ext", "README.md"]

html_theme = "furo"
html_title = "qpert"
html_static_path = ["_static"]
html_css_files = ["qpert.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
default_role = "code"  # single backticks in docstrings mean code
suppress_warnings = ["ref.python"]  # names of NumPy's and our own private types in signatures have no page
