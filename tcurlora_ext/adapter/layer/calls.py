"""Whether an adapted layer has ever been called: an adapter in one that its parent does not call has no effect."""

from __future__ import annotations

import torch


class NotesCalls:
    """A layer whose forward pass calls :meth:`_note_call` first.

    Attributes:
        uncalled: Whether the layer has never been called, calls within torch.compile not counted.
    """

    uncalled = True

    def _note_call(self) -> None:
        if self.uncalled and not torch.compiler.is_compiling():
            self.uncalled = False
