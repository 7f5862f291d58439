"""What a run shows while it works: messages, and on a terminal progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


class Display:
    """Messages and progress bars on a rich console; without a console nothing is shown."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console if console is not None else Console(quiet=True)

    def say(self, text: str) -> None:
        """Print a message; square brackets in it are text, not markup."""
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """Show a bar for `total` steps. The yielded function updates it with the steps done so far and the loss."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        shown = self.console.is_terminal and not self.console.quiet
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as progress:
            task = progress.add_task(title, total=total, loss="-")
            yield lambda step, loss: progress.update(task, completed=step, loss=f"{loss:.3f}")
