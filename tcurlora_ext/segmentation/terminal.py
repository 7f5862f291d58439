"""What a run shows while it works: messages, and progress as a bar on a terminal and as lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

LINES = 10  # of progress, for a bar's worth of steps


class Display:
    """Messages and progress on a rich console, which flushes each line; without a console nothing is shown."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console if console is not None else Console(quiet=True)

    def say(self, text: str) -> None:
        """Print a message; square brackets in it are text, not markup."""
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """Show a bar for `total` steps, or where the console is no terminal a line after each tenth of them.

        The yielded function takes the steps done so far and the loss.
        """
        if not self.console.is_terminal:
            yield lambda step, loss: self._line(title, total, step, loss)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True, disable=self.console.quiet) as progress:
            task = progress.add_task(title, total=total, loss="-")
            yield lambda step, loss: progress.update(task, completed=step, loss=f"{loss:.3f}")

    def _line(self, title: str, total: int, step: int, loss: float) -> None:
        if step * LINES // total > (step - 1) * LINES // total:
            self.say(f"{title}: step {step} of {total}, loss {loss:.3f}")
