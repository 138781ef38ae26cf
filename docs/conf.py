"""The site of these pages: `make docs`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

_PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

project = _PROJECT["name"]
version = release = _PROJECT["version"]
html_title = f"{project} {version}"
html_theme = "furo"
html_copy_source = False
extensions = ["myst_parser"]
#: As a code host has them: every heading can be linked to by its words.
myst_heading_anchors = 3
#: A shown line that is cut is no JSON any more.
suppress_warnings = ["misc.highlighting_failure"]
#: A link to a Markdown file beside these pages, which the site has as a file to download.
_OUTSIDE = re.compile(r"\]\(((?:\.\./){2}[\w./-]+\.md)(?:#[\w-]*)?\)")
#: A section of the first page, and a page in its list.
_SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n)*)", re.MULTILINE)
_LISTED = re.compile(r"^- \[.+?\]\((.+?)\.md\)", re.MULTILINE)


def _link_outside(_app: Sphinx, _page: str, source: list[str]) -> None:
    source[0] = _OUTSIDE.sub(r"](path:\1)", source[0])


def _add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """The lists of the first page become the site's navigation."""
    if page == app.config.root_doc:
        for title, body in _SECTION.findall(source[0]):
            pages = "\n".join(_LISTED.findall(body))
            source[0] += f"\n```{{toctree}}\n:caption: {title}\n:hidden:\n\n{pages}\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", _link_outside)
    app.connect("source-read", _add_navigation)
