"""How a variant looks in every figure: a colour of Okabe and Ito's palette per family, a marker within the family."""

from __future__ import annotations

from itertools import cycle

from ..names import (
    CURLORA,
    DENSE,
    FROZEN,
    LORA,
    OWN_CORE,
    PAPER_LORA,
    SMALL_LORA,
    STACK,
    TRANSIENT,
    light_variants,
    operator_variants,
)

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
)  # fmt: skip
# Of the operator by its backends, in the order in which those are registered; "^" is that of compiled variants.
MARKERS = "soDvP*X<>"

Style = tuple[str, str]


def styles() -> dict[str, Style]:
    """Variant -> colour and marker, in the order in which figures list them.

    Markers repeat where there are more backends than markers. Variants that are drawn as curves differ in colour.
    """
    return {
        FROZEN: (BLACK, "o"),
        LORA: (ORANGE, "o"),
        "lora adapter first": (ORANGE, "s"),
        "lora compiled": (ORANGE, "^"),
        "peft lora": (YELLOW, "o"),
        PAPER_LORA: (YELLOW, "s"),
        **{variant: (VERMILLION, marker) for variant, marker in zip(operator_variants(), cycle(MARKERS), strict=False)},
        "tcur compiled": (VERMILLION, "^"),
        DENSE: (BLUE, "o"),
        TRANSIENT: (SKY, "o"),
        STACK: (GREEN, "o"),
        CURLORA: (PURPLE, "o"),
        SMALL_LORA: (YELLOW, "^"),
        **{variant: (GREEN, marker) for variant, marker in zip(light_variants(), cycle("sD"), strict=False)},
        OWN_CORE: (SKY, "s"),
    }


def style(variant: str) -> Style:
    """Colour and marker of a variant. ValueError for one that has none."""
    known = styles()
    if variant not in known:
        raise ValueError(f"found variant '{variant}', expected one with a style: {', '.join(known)}")
    return known[variant]


def style_order(variant: str) -> int:
    """The place of a variant where figures list them. ValueError for one without a style."""
    style(variant)
    return list(styles()).index(variant)
