"""Tables for the terminal and for text files, laid out by rich, which is imported only where a table is made."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE = 10_000  # characters; no line of a table or a message is longer, so none is broken


def terminal() -> Console:
    """A console on standard output. Where that is a file or a pipe, no line is broken, however long it is."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def rich_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,), **look: Any
) -> Table:
    """A table for a terminal, where cells are wrapped to its width.

    Args:
        header: The columns' headings.
        rows: The cells, as many in a row as there are headings. Square brackets in them are text, not markup.
        left: The columns that are aligned left; the others are aligned right.
        look: Further arguments of :class:`rich.table.Table`, such as ``title``. Without ``box`` there are no lines.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(**{"box": None, "padding": (0, 2, 0, 0), "pad_edge": False, "header_style": "bold"} | look)
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def file_size(count: int) -> str:
    """A number of bytes in MB, or in KB below 1 MB."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} KB"


def shortened(text: str, width: int) -> str:
    """A text of at most ``width`` characters, cut in its middle: the ends of names tell them apart."""
    if len(text) <= width:
        return text
    end = (2 * width) // 3
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def folded(name: str, width: int, lines: int = 1000) -> list[str]:
    """A name in up to ``lines`` lines of ``width`` characters; a longer one is cut.

    A line ends before a colon where it can, else behind an underscore or before a hyphen or equals sign.
    """
    parts = re.findall(rf".{{1,{width}}}(?:$|(?=:))|.{{1,{width}}}(?:(?<=_)|(?=[=-]))|.{{1,{width}}}", name)
    if len(parts) > lines:
        parts = re.findall(rf".{{1,{width}}}", shortened(name, lines * width))
    return parts


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The same table as text, the same on every terminal: no colours, no line broken, no line break at the end.

    Args:
        header: The columns' headings.
        rows: The cells, as many in a row as there are headings.
        left: The columns that are aligned left; the others are aligned right.
    """
    from rich.console import Console

    console = Console(file=io.StringIO(), width=_WIDE, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(rich_table(header, rows, left))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
