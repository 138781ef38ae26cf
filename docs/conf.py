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


def _link_outside(_app: Sphinx, _page: str, source: list[str]) -> None:
    source[0] = _OUTSIDE.sub(r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _link_outside)
