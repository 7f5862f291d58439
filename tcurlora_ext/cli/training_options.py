"""Options of training that several commands share, options from a file, and how an interrupted run goes on."""

from __future__ import annotations

import importlib
import inspect
import json
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, NewType, TypeVar, get_type_hints

import typer

from tcurlora_ext.cli.options import Words, words
from tcurlora_ext.io.records import read_json

Settings = TypeVar("Settings", bound=Any)
Command = TypeVar("Command", bound=Callable[..., None])
Weights = NewType("Weights", tuple[float, ...])
NOT_IN_A_FILE = ("config", "resume", "run")


def weights(text: str) -> Weights:
    """ "0.5,1,2": a number for each class."""
    try:
        return Weights(tuple(float(part) for part in text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"found '{text}', expected numbers with commas between, background first") from None


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the options of a file the defaults of a command, which its command line goes over.

    Raises:
        FileNotFoundError, ValueError: There is no such file, or it is neither YAML nor JSON of known options.
    """
    if path is None or ctx.resilient_parsing:
        return path
    content = _read(path)
    known = [param.name for param in ctx.command.params if param.name not in NOT_IN_A_FILE]
    named = {str(key): str(key).replace("-", "_") for key in content}
    unknown = [key for key, name in named.items() if name not in known]
    if unknown:
        raise ValueError(f"{path}: found {', '.join(unknown)}, expected options of {ctx.command.name} without their --")
    twice = [name for name, count in Counter(named.values()).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: found {', '.join(twice)} twice, expected each option once")
    ctx.default_map = {
        named[str(key)]: _as_text(named[str(key)], value) for key, value in content.items() if value is not None
    }
    return path


def _read(path: Path) -> Mapping[Any, Any]:
    if path.suffix == ".json":
        content = read_json(path)
    elif path.suffix in (".yaml", ".yml"):
        from tcurlora_ext.segmentation.packages import require_package

        require_package("yaml")
        yaml: Any = importlib.import_module("yaml")  # which has no types
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected options in YAML or JSON")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    else:
        raise ValueError(f"{path}: found the suffix '{path.suffix}', expected .yaml, .yml or .json")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected options with their values")
    return content


def _as_text(option: str, value: Any) -> Any:
    """A value of a file as it would stand on the command line."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return json.dumps(value) if option == "sizes" else ",".join(f"{key}={part}" for key, part in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _source(ctx: typer.Context, option: str) -> str:
    """Where an option's value is from: COMMANDLINE, DEFAULT_MAP (a file of options) or DEFAULT.

    By its name: which package has the enumeration depends on the version of Typer.
    """
    return getattr(ctx.get_parameter_source(option), "name", "DEFAULT")


def resumed(earlier: Settings, now: Settings, ctx: typer.Context, renamed: Mapping[str, str] | None = None) -> Settings:
    """The settings of an earlier run with those that the command line or a file of options gives now.

    Methods, training sets and learning rates are added to those that the run has.

    Args:
        earlier: Of the run.
        now: From the options, with defaults where none is given.
        ctx: Of the command.
        renamed: Names of options by the settings that they give, where these differ.
    """
    options = {field.name: (renamed or {}).get(field.name, field.name) for field in fields(now)}
    changes = {name: getattr(now, name) for name, option in options.items() if _source(ctx, option) != "DEFAULT"}
    for name in {"methods", "training_sets"} & set(changes):
        changes[name] = tuple(dict.fromkeys([*getattr(earlier, name), *changes[name]]))
    if isinstance(changes.get("lr"), dict):
        changes["lr"] = {**earlier.lr, **changes["lr"]}
    return replace(earlier, **changes)


def run_folder(ctx: typer.Context, run: Path | None, output: Path | None, resume: bool) -> tuple[Path, bool]:
    """The folder that a command writes to, and whether it takes the settings from there (`--resume DIR`)."""
    if run is None:
        if output is None:
            raise ValueError("output: found none, expected a folder for the run")
        if resume and _source(ctx, "output") == "DEFAULT" and not (output / "run.json").is_file():
            raise ValueError("resume: found no folder, expected that of the run: --resume DIR")
        return output, False
    if not resume:
        raise ValueError(f"found '{run}' without --resume, expected options alone, or --resume {run}")
    if output is not None and _source(ctx, "output") == "COMMANDLINE" and output != run:
        raise ValueError(f"output: found {output} beside --resume {run}, expected one of them")
    return run, True


def say_unused(ctx: typer.Context, settings: Any) -> None:
    """Say which options were given that do nothing without another one.

    Args:
        ctx: Of the command.
        settings: Of the run.
    """
    tunes, chooses = getattr(settings, "tune", False), settings.select == "best" or settings.patience > 0
    draws = settings.shots is not None or hasattr(settings, "training_sets")  # or tests over subjects
    for needed, there, names in (
        ("--tune", tunes, ("trials", "tune_over", "tune_folds")),
        ("--select best or --patience", chooses, ("select_fraction", "select_every", "subject_pattern")),
    ):
        given = [name for name in names if _source(ctx, name) != "DEFAULT"]
        if given == ["subject_pattern"] and (tunes or draws):
            continue
        if given and not there:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            typer.echo(f"warning: {options}: no effect without {needed}", err=True)
    unused = _rates_unused(ctx.params.get("lr"), getattr(settings, "methods", ()))
    if unused:
        options = ", ".join(f"--lr {name}" for name in unused)
        typer.echo(f"warning: {options}: no effect, as no such method runs", err=True)


def _rates_unused(rates: Any, methods: Sequence[str]) -> list[str]:
    """The names in --lr that nothing trains by: the head or decoder beside an adapter has the rate of that name."""
    from tcurlora_ext.segmentation.methods import METHODS, base_name

    bases = set(map(base_name, methods))
    if any(METHODS[name].adapter for name in bases if name in METHODS):
        bases |= {"head", "decoder"}
    return [name for name in rates if base_name(name) not in bases] if isinstance(rates, dict) else []


def with_options_of(other: Callable[..., None], but: Collection[str]) -> Callable[[Command], Command]:
    """Give a command that takes any keywords the options of another command, after its own.

    Args:
        other: The other command.
        but: Options that it does not get.
    """

    def decorate(command: Command) -> Command:
        own, theirs = (
            {name: part.replace(annotation=hints.get(name, part.annotation)) for name, part in parts.items()}
            for function in (command, other)
            for parts, hints in [
                (inspect.signature(function).parameters, get_type_hints(function, include_extras=True))
            ]
        )
        shown = [part for part in own.values() if part.kind is not inspect.Parameter.VAR_KEYWORD]
        shown += [part for name, part in theirs.items() if name not in own and name not in but]
        command.__annotations__ = {part.name: part.annotation for part in shown}
        vars(command)["__signature__"] = inspect.Signature(shown)
        return command

    return decorate


@contextmanager
def going_on(command: str, folder: Path) -> Iterator[None]:
    """Where Ctrl-C ends the block, say how the run goes on and leave with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder / "run.json").is_file():
            text = f"interrupted; it goes on with: tcurlora {command} --resume {shlex.quote(str(folder))}"
        else:
            text = "interrupted before anything was written"
        typer.echo(text, err=True)
        raise typer.Exit(130) from None


Run = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIR]", show_default=False, help="With --resume: the run folder, whose settings are taken."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted run: --resume DIR, or with --output and the same options again. More methods and "
        "seeds may be added.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True, callback=read_config, metavar="FILE",
        help="Options in a YAML or JSON file, by their names without --; the command line goes over them.",
    ),
]  # fmt: skip
Amp = Annotated[str, typer.Option(help="Precision of the forward pass: off (float32), bf16 or fp16.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder for prepared volumes, read from there one by one. Default: all stay in memory."),
]
Workers = Annotated[int, typer.Option(help="Processes that draw windows ahead; the result is the same for any number.")]
Augment = Annotated[str, typer.Option(help="Augmentation: none, intensity, or full (intensity, rotation and scaling).")]
Flips = Annotated[
    bool,
    typer.Option("--flips", help="Also flip windows along each axis; wrong where labels tell left from right."),
]
ClassWeights = Annotated[
    Weights | None,
    typer.Option(parser=weights, metavar="W,W,...", help="Weights of the classes in the loss, background first."),
]
Accumulate = Annotated[int, typer.Option(help="Batches whose mean gradient one optimizer step takes.")]
Select = Annotated[
    str, typer.Option(help="Weights to keep: of the last step, or of the best Dice on held-out training cases.")
]
Patience = Annotated[
    int, typer.Option(help="Stop after so many scores on held-out training cases without a better one; 0: never.")
]
SelectFraction = Annotated[
    float, typer.Option(help="Fraction of the training subjects to hold out for --select best and --patience.")
]
SelectEvery = Annotated[
    int | None, typer.Option(help="Steps between scores on held-out cases. Default: a tenth of the steps.")
]
SubjectPattern = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Its first group is the subject in a case's name; subjects are held out and drawn whole. Default: BIDS's "
        "sub-NAME, else every case is a subject.",
    ),
]
Logs = Annotated[
    Words | None, typer.Option("--log", parser=words, metavar="NAMES", help="Also write curves to tensorboard, mlflow.")
]
