"""Options that are more than one word: triples, mappings and lists, each with an error that names the option."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console


def console() -> Console:
    """The terminal; written elsewhere it is wide enough for a table to stay on its lines."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=120)


def floats(name: str, text: str) -> tuple[float, float, float]:
    """One positive number or three, comma separated."""
    try:
        values = [float(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(value > 0 for value in values):
        raise ValueError(f"{name}: found '{text}', expected one positive number or three with commas, X,Y,Z")
    x, y, z = values * 3 if len(values) == 1 else values
    return x, y, z


def triple(name: str, text: str) -> tuple[int, int, int]:
    """One positive whole number or three, comma separated."""
    values = floats(name, text)
    if any(value != int(value) for value in values):
        raise ValueError(f"{name}: found '{text}', expected whole numbers")
    x, y, z = (int(value) for value in values)
    return x, y, z


def mapping(name: str, text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: found '{text}', expected a JSON object ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: found '{text}', expected a JSON object")
    return content


def words(text: str | None) -> tuple[str, ...] | None:
    """Comma separated words."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


def rates(text: str | None, methods: tuple[str, ...]) -> dict[str, float]:
    """ "1e-3" for every method, or "tcur=1e-2,head=3e-2" for some."""
    if text is None:
        return {}
    try:
        if "=" not in text:
            return dict.fromkeys(methods, float(text))
        pairs = (part.split("=") for part in text.split(","))
        return {method.strip(): float(rate) for method, rate in pairs}
    except ValueError:
        raise ValueError(f"lr: found '{text}', expected a number, or method=number with commas between") from None
