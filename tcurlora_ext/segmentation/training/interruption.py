"""Ctrl-C while a model trains: the step is finished and saved first."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType


class Interruption:
    """Notes a first Ctrl-C in place of raising KeyboardInterrupt at once; a second one raises it.

    Nothing changes outside the main thread, and where something else than Python's own handler is installed.

    Attributes:
        asked: Whether Ctrl-C has been pressed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._installed = False

    def __enter__(self) -> Interruption:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\ninterrupted: this step is finished and saved first; Ctrl-C again stops at once", file=sys.stderr)
