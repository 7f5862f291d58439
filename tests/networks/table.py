"""The table of docs/networks.md, written from what is found in the installed packages.

    python -m tests.networks.table

writes it, from the repository's root. The line above the table names the packages and their versions; a package that is
not installed has no rows.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from tcurlora_ext.adapter.model.coverage import CONVOLUTION, EXPERTS, Coverage
from tcurlora_ext.io.atomic import write_bytes

from .architecture import Architecture
from .checks import ARCHITECTURES, find

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
BEGIN, END = "<!-- networks: written by python -m tests.networks.table -->", "<!-- networks end -->"
HEADER = ("network", "class", "layers adapted", "share of their weights", "share of all weights", "left out")
Row = tuple[str, ...]


def row(architecture: Architecture) -> Row:
    """The cells of an architecture."""
    covers = find(architecture).covers
    return (
        architecture.name,
        f"`{architecture.symbol}`",
        _adapted(covers),
        f"{covers.share:.0%}",
        f"{covers.share_of_all:.0%}",
        left_out(covers),
    )


def _adapted(covers: Coverage) -> str:
    adapted = f"{len(covers.adapted_linear)} of {len(covers.linear)}"
    if covers.convolutions:
        return f"{len(covers.adapted)} of {len(covers.convolutions)} convolutions"
    if not covers.experts:
        return adapted
    return f"{adapted}; experts: {sum(part.slices > 0 for part in covers.experts)} of {len(covers.experts)}"


def left_out(covers: Coverage) -> str:
    """What is left out, by reason: linear layers by name, others as a share of all weights; embeddings are not said."""
    by_reason: dict[str, list[str]] = {}
    for group in covers.groups():
        convolution = group.kind == "convolution" and bool(covers.convolutions)
        if (group.kind == "linear" or convolution) and not group.slices:
            by_reason.setdefault(group.reason, []).append(f"`{group.name}`")
    said = [f"{reason}: {_some(names)}" for reason, names in by_reason.items()]
    every = sum(part.weights for part in covers.parts)
    for reason, called in ((CONVOLUTION, "convolutions"), (EXPERTS, "experts in one 3-D parameter")):
        weights = sum(part.weights for part in covers.parts if part.reason == reason)
        if weights:
            said.append(f"{called}: {weights / every:.0%} of all weights")
    return "; ".join(said)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read(page: str) -> tuple[dict[str, Row], dict[str, str]]:
    """The rows of a page's table by the name of their network, and the versions of the packages that it names."""
    table = page[page.index(BEGIN) : page.index(END)]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[2:]]
    return {cells[0]: cells for cells in rows}, dict(re.findall(r"(\w+) (\d[\w.+]*)[,.]", table.partition("\n|")[0]))


def section() -> str:
    """The table with its line of versions, between the two comments."""
    here = [one for one in ARCHITECTURES if not one.missing]
    versions = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys(one.package for one in here))
    lines = [HEADER, ("---", "---", "---:", "---:", "---:", "---"), *map(row, here)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{BEGIN}\n\nFound in {versions}.\n\n{table}\n\n{END}"


if __name__ == "__main__":
    text = PAGE.read_text()
    text = text[: text.index(BEGIN)] + section() + text[text.index(END) + len(END) :]
    write_bytes(PAGE, text.encode())
