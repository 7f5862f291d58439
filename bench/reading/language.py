"""The table of a language model that is adapted to new text, from language.csv."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..rows import Row

COLUMNS = ("text", "form", "lr", "seed", "steps", "warm_up_steps", "trained_parameters", "loss")
NEW = "networkx"  # the package whose code the forms are compared on; learning rates are chosen on another


def language_table(rows: Sequence[Row]) -> list[list[str]]:
    """One line per form: what trains, and perplexity per byte on the new text, mean and standard deviation over seeds.

    Args:
        rows: Of language.csv.
    """
    table = [["form", "trained parameters", "warm-up, steps", "learning rate", "seeds", "perplexity per byte"]]
    losses: dict[str, list[float]] = {}
    for row in rows:
        if row["text"] == NEW:
            losses.setdefault(row["form"], []).append(math.exp(float(row["loss"])))
    first = {row["form"]: row for row in reversed(rows) if row["text"] == NEW}
    for form, values in losses.items():
        row, spread = first[form], f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        table.append([
            form, f"{int(row['trained_parameters']):,}", f"{int(row['warm_up_steps']) or ''}",
            f"{float(row['lr']):g}" if float(row["lr"]) else "", str(len(values)),
            f"{statistics.mean(values):.3f}{spread}",
        ])  # fmt: skip
    return table
