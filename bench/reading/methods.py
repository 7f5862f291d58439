"""The table of a run of several methods: Dice over seeds, and the paired difference to LoRA of rank 8."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from ..rows import Row

COLUMNS = ("method", "seed", "trained_numbers", "dice", "hd95_mm", "warm_up_steps", "adapter_bytes", "seconds")
RIVAL = "lora"
RANK = re.compile(r"\br=\d+")
# What a method is called in tables; others by their name in options.
TITLES = {
    "head": "output head alone",
    "norms": "affine parameters of norms",
    "full": "full fine-tuning",
    "lora": "LoRA r=8",
    "lora:rank=1": "LoRA r=1",
    "lora:init=adapter": "LoRA r=8, A and B begun on the other cases",
    "bitfit": "biases of the encoder",
    "ssf": "scales and shifts of features",
    "adapter": "bottleneck adapters",
    "decoder": "decoder and head",
    "adalora": "AdaLoRA r=8",
    "pissa": "PiSSA r=8",
    "dora": "DoRA r=8",
    "vera": "VeRA r=256",
    "psoft": "PSOFT r=32",
    "unilora": "Uni-LoRA, one vector of 2,304",
    "lora-xs": "LoRA-XS r=8",
    "lora-sb": "LoRA-SB r=8",
    "lora-pt": "LoRA-PT r=8",
    "hyps": "HyPS r=8",
    "cps": "CPS r=8",
    "curlora": "CURLoRA r=8",
    "tcur": "paper's stacks r=8",
    "tcur:norms=true": "paper's stacks r=8, norms trained",
    "tcur:orthonormal=true": "paper's stacks r=8, orthonormal",
    "tcur-light:rank=8": "a core for each layer, columns and rows r=8",
    "tcur-light": "a core for each layer, columns and rows r=32",
    "tcur-learned": "learned r=8",
    "tcur-learned:rank=4": "learned r=4",
    "tcur-learned:rows_only=true": "rows learned, columns of the weights, r=8",
    "tcur-learned:change=adapter": "learned r=8 from full fine-tuning on the same cases",
}


def title(method: str) -> str:
    """A method in words.

    Args:
        method: Its name in options.
    """
    if method in TITLES:
        return TITLES[method]
    if ", " in method:  # of a run of other steps
        name, _, rest = method.partition(", ")
        return f"{title(name)}, {rest}"
    base, _, options = method.partition(":")
    given = dict(option.split("=", 1) for option in options.split(":") if "=" in option)
    if base == "tcur-carried":
        origin = given.get("factors", "carried")
        return f"carried{'' if origin == 'carried' else f' from {origin}'} r={given.get('rank', '8')}"
    name = TITLES.get(base, base)
    if "rank" in given and RANK.search(name):
        name = RANK.sub(f"r={given.pop('rank')}", name)
    words = {
        "bits": "{} bits an entry", "warm_up": "{} steps of warm-up", "rank": "r={}", "width": "width {}",
        "alpha": "alpha {}",
    }  # fmt: skip
    parts = [words[option].format(value) for option, value in given.items() if option in words]
    return ", ".join([name, *parts]).replace(", 1 bits an", ", 1 bit an")


def methods_table(rows: Sequence[Row]) -> list[list[str]]:
    """One line per method: what it trains and stores, Dice (mean and standard deviation over seeds), and differences.

    The difference to LoRA of rank 8 is taken seed by seed, which have the same windows and head; its mean and standard
    deviation are in points of Dice.

    Args:
        rows: One per method and seed, of a run's metrics.csv.
    """
    header = [
        "form", "trained parameters beside the head", "file, KB", "warm-up, steps", "seeds", "Dice %", "minus LoRA r=8",
    ]  # fmt: skip
    runs: dict[str, dict[str, Row]] = {}
    for row in rows:
        runs.setdefault(row["method"], {})[row["seed"]] = row
    head = float(next(iter(runs["head"].values()))["trained_numbers"]) if "head" in runs else 0
    lines = [header]
    for method, seeds in runs.items():
        first = next(iter(seeds.values()))
        dice = [100 * float(row["dice"]) for row in seeds.values()]
        trained = round(float(first["trained_numbers"]) - head)
        size = statistics.mean(float(row["adapter_bytes"]) for row in seeds.values()) / 1e3
        lines.append([
            title(method), f"{trained:,}", f"{size:,.1f}", f"{int(first['warm_up_steps']) or ''}",
            str(len(seeds)),
            _with_spread(dice), "" if method == RIVAL else _difference(seeds, runs.get(RIVAL, {})),
        ])  # fmt: skip
    return lines


def _difference(own: dict[str, Row], rival: dict[str, Row]) -> str:
    shared = [seed for seed in own if seed in rival]
    if not shared:
        return ""
    return _with_spread([100 * (float(own[s]["dice"]) - float(rival[s]["dice"])) for s in shared], "+.2f")


def _with_spread(values: Sequence[float], form: str = ".1f") -> str:
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form.removeprefix('+'))}"
