"""How the commands of this package that are started by ``python -m`` run: options by Typer, errors in one line.

Wrong input (ValueError, OSError) and a missing package end in one line on stderr and exit code 2, as those of the
command ``tcurlora`` do. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand


class _OneLineErrors(TyperCommand):
    """Turns the errors of wrong input into a message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read the output has closed the pipe: not an error of this command
        except (ValueError, OSError, ModuleNotFoundError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error


def run_command(command: Callable[..., None], arguments: Sequence[str] | None, name: str) -> int:
    """Run a function as a Typer command.

    Args:
        command: Its parameters are the options, its docstring is the help text.
        arguments: Those of the command line; None: those of this process.
        name: What the help text calls the command.

    Returns:
        The exit code: 0, 2 for wrong input, or what the command raised as :class:`typer.Exit`.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(cls=_OneLineErrors)(command)
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name=name)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    return 0
