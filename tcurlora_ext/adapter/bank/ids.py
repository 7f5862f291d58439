"""The adapters that a batch asks for: names or handles, one per sample or one per token."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

BASE = -1
Ids = Sequence[str | int] | Tensor
E = TypeVar("E", bound=Hashable)


class Owners(Generic[E]):
    """Which of a batch's adapters has each sample or token.

    Args:
        ids: Names or handles, -1 for the base: one per sample, a sequence or a tensor (N,); or one per token, a tensor
            (N, ...) in the shape of x without its last dimension.
        find: From names or handles to their adapters.

    Attributes:
        adapters: The different adapters, in the order in which they come first; a tensor's in ascending order.
        shape: The shape of the ids.
        of_ids: The index of each id's adapter among the adapters, -1 for the base: (ids,) int64 on the CPU.

    Raises:
        TypeError: ``ids`` is one name, or a tensor of another kind than whole numbers.
    """

    def __init__(self, ids: Ids, find: Callable[[Iterable[str | int]], list[E]]) -> None:
        self.adapters: list[E] = []
        if isinstance(ids, Tensor):
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise TypeError(f"ids are {ids.dtype}, expected whole numbers, the handles that add returns")
            values, inverse = torch.unique(ids.detach().cpu().flatten(), return_inverse=True)
            self.shape = tuple(ids.shape) or (1,)
            self.of_ids = self._indices(values.tolist(), find)[inverse]
            return
        if isinstance(ids, str):
            raise TypeError(f"ids is {ids!r}, expected a list: one name or handle for each sample of the batch")
        listed = list(ids)
        self.shape = (len(listed),)
        self.of_ids = self._indices(listed, find)

    def _indices(self, values: Sequence[str | int], find: Callable[[Iterable[str | int]], list[E]]) -> Tensor:
        asked = [value for value in dict.fromkeys(values) if value != BASE]
        # Two ids may mean one adapter: its name and its handle.
        indices: dict[E, int] = {}
        known: dict[str | int, int] = {BASE: BASE}
        for value, found in zip(asked, find(asked), strict=True):
            known[value] = indices.setdefault(found, len(indices))
        self.adapters = list(indices)
        return torch.tensor([known[value] for value in values], dtype=torch.int64, device="cpu")

    def of_tokens(self, leading: tuple[int, ...], name: str) -> tuple[Tensor, int]:
        """The owners of the tokens of a layer's input.

        Args:
            leading: The shape of the input without its last dimension.
            name: The layer, for the message.

        Returns:
            Owners (runs,), and the number of consecutive tokens of which each is the owner.

        Raises:
            ValueError: The ids do not fit that shape.
        """
        rows, samples = (leading or (1,))[0], self.shape[0]
        tokens = torch.Size(leading).numel()
        whole = rows % samples == 0 if samples else rows == 0
        if len(self.shape) == 1 and whole:
            return self.of_ids, tokens // max(samples, 1)
        if leading == self.shape or leading == (len(self.of_ids),):
            return self.of_ids, 1
        if len(leading) == len(self.shape) > 1 and leading[1:] == self.shape[1:] and whole:
            repeated = self.of_ids.view(self.shape).repeat_interleave(rows // max(samples, 1), 0)
            return repeated.flatten(), 1
        if len(self.shape) == 1:
            raise ValueError(
                f"{name} gets {rows} rows, the first dimension of its input {(*leading, '...')}, for {samples} ids: "
                f"expected {samples} rows or a multiple of it (beams, windows), each id's rows one after the other"
            )
        raise ValueError(
            f"{name} gets tokens of shape {leading} for ids of shape {self.shape}: expected one id per token"
        )
