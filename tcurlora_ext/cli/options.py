"""Options that several commands share, and parsers of the options whose text is more than one word or number.

A parser raises typer.BadParameter with what was found and what was expected; typer adds which option it was. Parsed
tuples have types of their own, because typer would read an option annotated as a tuple from several words.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, NewType

import typer

Triple = NewType("Triple", tuple[float, float, float])
WholeTriple = NewType("WholeTriple", tuple[int, int, int])
Words = NewType("Words", tuple[str, ...])
Mapping = NewType("Mapping", dict[int, int])


def triple(text: str) -> Triple:
    """ "2" or "1.5,1.5,3": one positive number for all three axes, or three."""
    try:
        values = [float(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(value > 0 for value in values):
        raise typer.BadParameter(f"found '{text}', expected one positive number or three with commas, X,Y,Z")
    x, y, z = values * 3 if len(values) == 1 else values
    return Triple((x, y, z))


def whole_triple(text: str) -> WholeTriple:
    """ "96" or "96,96,64": one positive whole number for all three axes, or three."""
    x, y, z = triple(text)
    if not all(value.is_integer() for value in (x, y, z)):
        raise typer.BadParameter(f"found '{text}', expected whole numbers")
    return WholeTriple((int(x), int(y), int(z)))


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"found '{text}', expected a JSON object ({error})") from error
    if not isinstance(content, dict):
        raise typer.BadParameter(f"found '{text}', expected a JSON object")
    return content


def words(text: str) -> Words:
    """Words with commas between them."""
    return Words(tuple(part.strip() for part in text.split(",")))


def mapping(text: str) -> Mapping:
    """ "4=3,255=1": label values and those that stand for them."""
    pairs = [part.split("=") for part in text.replace(" ", "").split(",")]
    if not all(len(pair) == 2 and all(value.isdecimal() for value in pair) for pair in pairs):
        raise typer.BadParameter(f"found '{text}', expected OLD=NEW with commas between, such as 4=3,255=1")
    found = {int(old): int(new) for old, new in pairs}
    if len(found) < len(pairs):
        raise typer.BadParameter(f"found '{text}', expected each old value once")
    return Mapping(found)


def learning_rates(text: str) -> float | dict[str, float]:
    """ "1e-3" for every method, or "tcur=1e-2,head=3e-2" for some of them."""
    try:
        if "=" not in text:
            return float(text)
        pairs = (part.split("=") for part in text.split(","))
        return {method.strip(): float(rate) for method, rate in pairs}
    except ValueError:
        raise typer.BadParameter(f"found '{text}', expected a number, or method=number with commas between") from None


def rank(text: str) -> int | tuple[int, int]:
    """ "8", or "4,8" for c = 4 columns and r = 8 rows."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) == 1:
        return values[0]
    if len(values) == 2:
        return values[0], values[1]
    raise typer.BadParameter(f"found '{text}', expected a positive whole number r, or c,r")


def named_rank(text: str) -> tuple[str, int | tuple[int, int]]:
    """ "linear1=4" or "linear1=4,8": a rank for the modules of a name."""
    name, _, number = text.rpartition("=")
    if not name:
        raise typer.BadParameter(f"found '{text}', expected NAME=R or NAME=C,R such as linear1=4")
    return name, rank(number)


def named_split(text: str) -> tuple[str, int]:
    """ "qkv=3": into how many slices the modules of a name are split."""
    name, _, count = text.partition("=")
    if not name or not count.isdigit():
        raise typer.BadParameter(f"found '{text}', expected NAME=N such as qkv=3")
    return name, int(count)


def regex(text: str) -> str:
    """A regular expression, checked and left as text."""
    try:
        re.compile(text)
    except re.error as error:
        raise typer.BadParameter(f"found '{text}', expected a regular expression ({error})") from None
    return text


def dtype(text: str) -> Any:
    """A floating-point dtype by its name in torch."""
    import torch

    known = ("float32", "bfloat16", "float16")
    if text not in known:
        raise typer.BadParameter(f"found '{text}', expected one of {', '.join(known)}")
    return getattr(torch, text)


# -- of finetune, learn-factors and pretrain --------------------------------------------------------------------------

AlsoTrain = Annotated[
    str | None,
    typer.Option(help="What trains beside an adapter: head or decoder. Default: head for vit, else decoder."),
]
PretrainedNetwork = Annotated[
    str | None,
    typer.Option(
        help="vit, unetr, swinunetr, dynunet or segresnet, where neither network.json nor the weights say it."
    ),
]
Window = Annotated[
    WholeTriple | None,
    typer.Option(parser=whole_triple, metavar="X,Y,Z", help="Window in voxels: one number or three."),
]

NetworkSizes = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=json_object,
        metavar="JSON",
        help="Sizes of the network that differ from its defaults, e.g. '{\"hidden_size\": 192}'.",
    ),
]
Spacing = Annotated[
    Triple | None,
    typer.Option(parser=triple, metavar="X,Y,Z", help="Voxel size in mm to resample to: one number or three."),
]
TrainList = Annotated[str, typer.Option(help="The list in splits.json to train on.")]
ValList = Annotated[str, typer.Option(help="The list in splits.json to validate on.")]
ValFraction = Annotated[
    float | None,
    typer.Option(help="Fraction of the cases held out at random where there is no splits.json. Default: 0.2."),
]
Labels = Annotated[
    Words | None,
    typer.Option(
        parser=words,
        metavar="NAMES",
        help="Class names with commas between, background first, where there is no dataset.json.",
    ),
]
Fold = Annotated[
    int | None,
    typer.Option(help="Train and validate on this fold of splits_final.json (nnU-Net) or of a data list's keys fold."),
]
MapLabels = Annotated[
    Mapping | None,
    typer.Option(
        parser=mapping,
        metavar="OLD=NEW,...",
        help="Values that stand for others in labels, as in 4=3,255=1; other values stay.",
    ),
]
Shots = Annotated[
    int | None,
    typer.Option(help="Train on so many subjects, drawn by --data-seed from the training cases. Default: on all."),
]
DataSeed = Annotated[
    int, typer.Option(help="Seed of the embedded subjects, of a random split and of the subjects that --shots draws.")
]
Batch = Annotated[int, typer.Option(help="Windows of one batch.")]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]

# -- of inspect, merge and to-lora ------------------------------------------------------------------------------------

Source = Annotated[Path, typer.Argument(help="Run folder of finetune, or an adapter file.")]
Method = Annotated[
    str | None, typer.Option(help="The run's method to take. Default: tcur, or else its only method of tCUR.")
]
Seed = Annotated[int, typer.Option(help="The run's seed to take.")]
BaseModel = Annotated[
    str | None, typer.Option(help="The model an adapter file belongs to, named as for `tcurlora plan`.")
]
Kwargs = Annotated[
    dict[str, Any] | None,
    typer.Option(parser=json_object, metavar="JSON", help="Sizes of a preset, or arguments of a function."),
]
Weights = Annotated[Path | None, typer.Option(help="The base weights for --model: safetensors, a file or a folder.")]
SubspaceFile = Annotated[
    Path | None,
    typer.Option("--subspace", help="The file of the subspace, for an adapter file that names it by digest alone."),
]
