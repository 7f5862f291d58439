"""The command ``tcurlora`` and its one rule for errors.

A wrong value of an option, wrong input (ValueError, OSError) and a missing optional package end in one line on stderr
and exit code 2. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tcurlora_ext.cli.bench import bench
from tcurlora_ext.cli.compare import compare
from tcurlora_ext.cli.doctor import doctor
from tcurlora_ext.cli.evaluate import evaluate
from tcurlora_ext.cli.features import features
from tcurlora_ext.cli.finetune import finetune
from tcurlora_ext.cli.inspect import inspect
from tcurlora_ext.cli.learn_factors import learn_factors
from tcurlora_ext.cli.merge import merge
from tcurlora_ext.cli.plan import plan
from tcurlora_ext.cli.predict import predict
from tcurlora_ext.cli.pretrain import pretrain
from tcurlora_ext.cli.to_lora import to_lora
from tcurlora_ext.io.versions import version_of

PACKAGE = Path(__file__).parents[1]
_show_any = warnings.showwarning
EXTRA_HINT = "pip install 'tcurlora_ext["


class _Commands(TyperGroup):
    """Turns the errors that a user can cause, in any command, into a message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of a pipe has closed it, which is no error of this command
        except typer.BadParameter as error:
            message = error.format_message()
            error.message = _wrong_value(error) or error.message
            if error.param is not None and error.param.name and error.message:  # a missing option has no message
                message = f"{error.param.name.replace('_', '-')}: {error.message}"
        except (ValueError, OSError) as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if EXTRA_HINT not in str(error):
                raise
            message = str(error)
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2)


def _wrong_value(error: typer.BadParameter) -> str | None:
    """A value of another type in this command's words: newer versions of Typer do not show what was found."""
    details = getattr(error.__cause__, "errors", None)
    if details is None:
        return None
    (first, *_) = details()
    kind = {"int": "a whole number", "float": "a number"}.get(first["type"].partition("_")[0], first["msg"])
    return f"found '{first['input']}', expected {kind}"


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tcurlora {version_of('tcurlora_ext')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """tCURLoRA: adapt a frozen network by training a tiny core between columns and rows of its own weights."""


for _command, _summary in (
    (finetune, "Adapt a pretrained segmentation network by several methods."),
    (compare, "Compare methods over seeds and numbers of training subjects."),
    (pretrain, "Train a segmentation network from random weights."),
    (learn_factors, "Learn on some cases the factors of adapters to others."),
    (predict, "Write label maps of new scans by an adapted network."),
    (evaluate, "Score an adapted network, or label maps, on labelled cases."),
    (plan, "Count what an adapter costs on a model, from shapes alone."),
    (inspect, "Show which features an adapter selected, and its deltas."),
    (features, "Show what the features that an adapter chose do, with controls."),
    (merge, "Write the base model with the adapter merged."),
    (to_lora, "Write the adapter as a LoRA adapter, for engines that serve LoRA."),
    (bench, "Measure what the adapter costs on this machine, beside LoRA."),
    (doctor, "Show what is installed and which backends work."),
):
    app.command(short_help=_summary)(_command)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:  # fmt: skip
    """Show a warning of this package about a user's input in a line; others as Python does.

    The arguments are those of :func:`warnings.showwarning`.
    """
    if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
        typer.echo(f"warning: {message}", err=True)
    else:
        _show_any(message, category, filename, lineno, file, line)


# What torchao, which PEFT imports where it is installed, logs at its import whether or not it is used: kernels that
# this machine cannot load, and its own use of a function of PyTorch. Logger -> part of the message.
NOISE = {"torchao": "Failed to load ", "torch.utils._pytree": " is an Enum subclass "}


def is_no_noise(record: logging.LogRecord) -> bool:
    """Whether a log record is none of :data:`NOISE`; a filter of their loggers in the process of a command."""
    return record.name not in NOISE or NOISE[record.name] not in record.getMessage()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave the process with its exit code; ``arguments`` default to those of the process."""
    warnings.showwarning = show_warning
    for name in NOISE:
        logging.getLogger(name).addFilter(is_no_noise)
    app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="tcurlora")
