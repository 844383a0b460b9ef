"""Sphinx settings of the pages here: `make docs` builds them into docs/_build/html, and every warning is an error."""

import re
from pathlib import Path

project = "brainscale"
author = "the brainscale authors"
html_title = "brainscale"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
nitpicky = True
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = html_show_sourcelink = html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}


def readme_inside(app, name: str, text: list[str]) -> None:
    """Make the README a page among the others: links between it and them are checked, and work without a network.

    Its links to other files of the checkout become their names: the built pages may lie anywhere.
    """
    if name == "readme":
        readme = Path(app.srcdir).parent.joinpath("README.md").read_text(encoding="utf-8")
        text[0] = re.sub(r"\[([^]]+)\]\((?!https?:|#|docs/)[^)]+\)", r"\1", readme).replace("](docs/", "](")
    else:
        text[0] = text[0].replace("](../README.md", "](readme.md")


def setup(app) -> None:
    app.connect("source-read", readme_inside)
