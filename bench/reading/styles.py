"""How a variant looks in every figure: a colour of Okabe and Ito's for its family, a marker within the family."""

from __future__ import annotations

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
)  # fmt: skip
# Variant -> colour and marker. The forms drawn as curves have colours of their own.
STYLES = {
    "frozen": (BLACK, "o"),
    "lora": (ORANGE, "o"),
    "lora adapter first": (ORANGE, "s"),
    "lora compiled": (ORANGE, "^"),
    "peft lora": (YELLOW, "o"),
    "peft lora r=32": (YELLOW, "s"),
    "tcur eager": (VERMILLION, "s"),
    "tcur native": (VERMILLION, "o"),
    "tcur triton": (VERMILLION, "D"),
    "tcur compiled": (VERMILLION, "^"),
    "tcur dense layer": (BLUE, "o"),
    "tcur transient": (SKY, "o"),
    "tcur dense stack": (GREEN, "o"),
    "curlora dense": (PURPLE, "o"),
}


def style(variant: str) -> tuple[str, str]:
    """Colour and marker of a variant. ValueError for one that has none."""
    if variant not in STYLES:
        raise ValueError(f"found variant '{variant}', expected one with a style: {', '.join(STYLES)}")
    return STYLES[variant]


def style_order(variant: str) -> int:
    """The place of a variant where figures list them."""
    style(variant)
    return list(STYLES).index(variant)
