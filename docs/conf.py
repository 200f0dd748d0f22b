"""Sphinx settings of the manual: `make docs` builds it, and a warning is an error."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import settings_pages

import layerif

project = "layerif"
author = "The layerif maintainers"
copyright = "The layerif maintainers, Apache-2.0"
version = release = layerif.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "example_package"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_title = f"layerif {release}"
highlight_language = "none"

# Single backticks in docstrings are code, as in Markdown.
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def settings(app, docname, source):
    """Puts every key in place of a page's marker, and leads links to the experiments' pages."""
    source[0] = source[0].replace("<!-- every key -->", settings_pages.every_key())
    source[0] = re.sub(r"\]\(\.\./((?:\.\./)*experiments/[^)]*\.md(?:#[^)]*)?\))", r"](\1", source[0])


def generated(app):
    """Writes a page for every room of the package, and for every README of the experiments."""
    for folder, pages in (("reference/api", settings_pages.rooms()), ("experiments", settings_pages.experiments())):
        root = Path(app.srcdir) / folder
        for page in set(root.rglob("*.md")) - {root / name for name in pages}:
            page.unlink()
        for name, text in pages.items():
            page = root / name
            page.parent.mkdir(parents=True, exist_ok=True)
            if not page.exists() or page.read_text() != text:
                page.write_text(text)


def as_restructured_text(app, what, name, obj, options, lines):
    """Makes docstrings, which use Markdown's backticks and plain `|` and `*`, safe for reStructuredText."""
    lines[:] = settings_pages.escaped(lines)


def setup(app):
    app.connect("builder-inited", generated)
    app.connect("source-read", settings)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)  # before napoleon
