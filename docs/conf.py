"""How Sphinx makes the site: the pages of this folder, and the reference from the docstrings of the package."""

from __future__ import annotations

import re

from sphinx.application import Sphinx
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from tcurlora_ext.cli.app import app as commands

project = "tcurlora_ext"
html_title = project
html_theme = "furo"
html_copy_source = False
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
highlight_language = "none"  # indented blocks are maths and commands
myst_heading_anchors = 3  # links to sections, as on GitHub
smartquotes_action = "D"  # dashes alone: quotes are often code

autodoc_member_order = "bysource"
autosummary_generate = False  # tables of links; the entries stand on the pages
maximum_signature_line_length = 110

# A name of this package that leads nowhere is an error; those of others have no pages here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!tcurlora_ext\b)\w+\..*"), ("py:class", "TaskType|PeftType|Rank|Tensor")]


def show_factories(
    app: Sphinx, kind: str, name: str, target: object, options: object, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Write defaults that a function makes so that the signature is Python, which is then laid out and linked."""
    return signature and signature.replace("<factory>", "..."), result


def add_command(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the command's options, as Typer writes them, behind the heading of their page."""
    if page == "reference/command":
        command = get_command(commands)
        text = get_docs_for_click(obj=command, ctx=Context(command), name="tcurlora").partition("\n")[2]
        source[0] += re.sub(r"(?<= )(?<!/ )--[a-z-]+", r"`\g<0>`", text)  # in a help text, an option is no dash


def link_files_of_the_root(app: Sphinx, *place: object) -> None:
    """Lead links to files of the root, which pages here include, to these pages; LICENSE has none and is downloaded."""
    content: list[str] = place[-1]  # type: ignore[assignment]
    text = content[0].replace("](LICENSE)", "](../LICENSE)")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = re.sub(rf"\]\((\.\./)?{name}", f"]({name.lower()}", text)
    content[0] = text


def setup(app: Sphinx) -> None:
    app.connect("include-read", link_files_of_the_root)  # of the file that is included
    app.connect("source-read", link_files_of_the_root)
    app.connect("autodoc-process-signature", show_factories)
    app.connect("source-read", add_command)
