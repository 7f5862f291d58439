"""What a stack holds, and how that is moved, saved, loaded and taken again from other base weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tcurlora_ext.adapter.options import GIVEN, LEARNED, WEIGHTS, StackOptions
from tcurlora_ext.maths import folding
from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.maths.selection import Selection, select
from tcurlora_ext.operator import flops

from .factors import LearnedFactors, TakenFactors, take_factors
from .layers import ReloadedLayers, StackLayers

# Rules that choose by more than the base weights: their rows and columns stay when other base weights are loaded.
KEPT_CHOICES = ("activation", GIVEN)


class StackState(nn.Module):
    """The core and the factors of a stack: the base class of :class:`tcurlora_ext.TCURStack`, which documents them.

    Where every slice has a core of its own, and C is not learned, C is ``W[:, columns] diag(gain)`` of the layers'
    frozen weights, or with ``orthonormal`` ``W[:, columns] gain``, a matrix for each slice. Their adapters then ride on
    the base product (:func:`tcurlora_ext.functional.tcur_riding`), and C is not held: ``col`` gathers it.
    """

    core: nn.Parameter
    row: Tensor
    gain: Tensor | None
    rows: Tensor
    columns: Tensor
    row_scores: list[float]
    column_scores: list[float]
    banked = False  # whether a bank of adapters was made for this stack: a batch of its adapters may be running
    batched = False  # whether such a batch has run in grad mode: a backward pass may compute its layers again

    def __init__(
        self,
        weights: Tensor,
        selection: Selection,
        options: StackOptions,
        names: Sequence[str] = (),
        learned: LearnedFactors | None = None,
    ) -> None:
        super().__init__()
        flops.register()
        self.options = options
        self.slices, self.out_features, _ = weights.shape
        self.names = list(names)
        self.holder = ""
        self.rides = False
        self.keeps_columns = (
            False  # whether col stays in the state also where the adapter rides, as PEFT's files have it
        )
        self.layers = StackLayers()
        self.reloaded = ReloadedLayers()
        # Rules return views of a ranking of all features; a tensor in a state_dict has to own its memory.
        self.register_buffer("rows", selection.rows.clone())
        self.register_buffer("columns", selection.columns.clone())
        self._keep_scores(selection)
        taken = take_factors(weights, selection, options, learned)
        self.scale = taken.scale
        wide = torch.promote_types(weights.dtype, torch.float32)
        shape = (self.blocks, taken.col.shape[1] // self.blocks, taken.row.shape[0] // self.blocks)
        self.core = nn.Parameter(torch.zeros(shape, dtype=wide, device=weights.device))
        # Only where the adapter may ride: it is in no state of PEFT's, and would stay on meta where that is loaded.
        gain = taken.gain.to(wide) if options.rides(self.slices) else None
        self.register_buffer("gain", gain, persistent=False)
        # ``col`` is a property of this class, and register_buffer refuses the name of one.
        for name, folded in (("col", taken.col), ("row", taken.row)):
            if options.trainable == "all":
                self._parameters[name] = nn.Parameter(folded.to(wide))
            else:
                self._buffers[name] = folded

    @property
    def blocks(self) -> int:
        """The number of the core's blocks, S, or fewer where it has only the lowest frequencies."""
        return self.options.blocks(self.slices)

    @property
    def normalised(self) -> bool:
        """Whether columns of C and rows of R have unit norm over all slices."""
        return self.options.normalised

    @property
    def C(self) -> Tensor:
        """The column factor (S, out, c), unfolded."""
        return folding.unfold_columns(self.col, self.slices, self.options.transform, self.blocks)

    @property
    def R(self) -> Tensor:
        """The row factor (S, r, in), unfolded."""
        return folding.unfold_rows(self.row, self.slices, self.options.transform, self.blocks)

    @property
    def selection(self) -> Selection:
        """The chosen rows and columns with their scores."""
        scores = (torch.tensor(s, dtype=torch.float64) for s in (self.row_scores, self.column_scores))
        return Selection(self.rows, self.columns, *scores)

    def _keep_scores(self, selection: Selection) -> None:
        self.row_scores, self.column_scores = selection.row_scores.tolist(), selection.column_scores.tolist()

    # -- columns: held, or those of the layers' weights ----------------------------------------------------------------

    @property
    def held_col(self) -> Tensor | None:
        """``col`` where the stack holds it; None where the layers' weights have it."""
        held = self._parameters.get("col")
        return self._buffers.get("col") if held is None else held

    @property
    def col(self) -> Tensor:
        """C in its folded form, of shape (out, c*S).

        It is a frozen buffer in the weights' dtype, or with ``trainable="all"`` a parameter of at least float32; see
        :mod:`tcurlora_ext.maths.folding`. A stack that ``rides`` gathers it from its layers' weights.

        Raises:
            ValueError: The stack rides on layers that are gone.
        """
        held = self.held_col
        return self._gathered_col() if held is None else held

    def _gain(self) -> Tensor:
        gain = self.gain
        assert gain is not None  # a stack that may ride has it
        return gain

    @torch.no_grad()
    def _gathered_col(self) -> Tensor:
        weights = self.layers.weights(self)
        if weights is None:
            raise ValueError(
                f"C is columns of the weights of {', '.join(self.names[:3]) or 'its layer'}, which are gone; keep the "
                "model, or save the adapter with include_factors=True"
            )
        taken, gain = self._taken(weights), self._gain()
        if torch.equal(taken.gain.to(gain), gain):
            return taken.col  # to the bit as it was taken
        chosen = torch.cat([weight[:, :, self.columns] for weight in weights]).double()
        C = chosen @ gain.double() if gain.dim() == 3 else chosen * gain.double()
        return folding.fold_columns(C, self.options.transform, self.blocks).to(weights[0].dtype).contiguous()

    @torch.no_grad()
    def ride(self) -> None:
        """Ride where C is, bit for bit, columns of the layers' own weights; let go of C unless ``keeps_columns``.

        It does nothing where slices share a core, the layers of a slice are not here or are convolutions, C trains, a
        feature was chosen twice, or C was stored with other weights.
        """
        held = self.held_col
        if held is None or held.is_meta or not self.options.rides(self.slices) or not self.layers.may_ride():
            return
        weights = self.layers.weights(self)
        if weights is None or weights[0].is_meta or len(set(self.columns.tolist())) < len(self.columns):
            return
        try:
            taken = self._taken(weights)
        except ValueError:  # C came with a file, and the columns here depend on each other
            return
        self.gain = taken.gain.to(self.core.device, torch.promote_types(self.core.dtype, torch.float32))
        self.rides = torch.equal(taken.col, held) and torch.equal(taken.row, self.row)
        if self.rides and not self.keeps_columns:
            del self._buffers["col"]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hold_columns(self) -> None:
        """Hold C as it is now: the layers compute the ordinary form from here on, whatever becomes of their weights."""
        if self.held_col is None:
            self._buffers["col"] = self._gathered_col()
        self.rides = False

    def riding(self, slice_index: int, dtype: torch.dtype) -> Riding:
        """The adapter of one slice in the riding form.

        Args:
            slice_index: The slice.
            dtype: That of the layer's input, into which R is converted.
        """
        core, row, gain = self.core, self.row, self._gain()  # once: a look-up in a module takes a microsecond
        row = row if row.dtype == dtype else row.to(dtype)
        gain = gain if gain.dtype == core.dtype else gain.to(core.dtype)
        if gain.dim() == 3:
            return Riding(self.columns, gain @ core, row, gain.new_ones(gain.shape[1]), slice_index, self.scale)
        return Riding(self.columns, core, row, gain, slice_index, self.scale)

    def among_columns(self, cores: Tensor, slice_index: int) -> Tensor:
        """Cores of one slice as :meth:`riding` has its own: between the chosen columns themselves, up to a factor each.

        Args:
            cores: (..., c, r).
            slice_index: The slice.
        """
        gain = self._gain()
        return gain[slice_index].to(cores.dtype) @ cores if gain.dim() == 3 else cores

    def _taken(self, weights: Tensor | Sequence[Tensor], selection: Selection | None = None) -> TakenFactors:
        """What :func:`take_factors` takes from these weights, with the stack's own R where that is learned."""
        learned = None
        if self.options.factors != WEIGHTS:
            # Only where C is not learned: a stack with both learned takes nothing from weights.
            learned = LearnedFactors(self.row.new_empty(0), self.R.double())
        taken = take_factors(weights, selection or self.selection, self.options, learned)
        return taken if learned is None else taken._replace(row=self.row)

    # -- module machinery ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in nn.Module, but parameters and gain stay at least float32 under ``.half()`` and ``.bfloat16()``."""
        trained = {id(p) for p in self.parameters()} | {id(p.grad) for p in self.parameters() if p.grad is not None}
        trained.add(id(self.gain))

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in trained and moved.is_floating_point() and moved.element_size() < 4:
                return tensor.to(moved.device)
            return moved

        super()._apply(wide, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = torch.tensor(self.scale, dtype=torch.float64)
        if self.held_col is None:
            destination[prefix + "gain"] = self._gain()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, unexpected_keys, _ = rest
        reloaded, self.reloaded = self.reloaded, ReloadedLayers()
        if not any(key.startswith(prefix) for key in state_dict):
            # A state_dict without adapter. The layers, registered before their stack, have loaded their weights by now.
            weights = reloaded.weights(self)
            if weights is not None and reloaded.changed:
                self.follow_base(torch.cat(weights))
            return
        rode = self.gain is not None and prefix + "gain" in state_dict and prefix + "col" not in state_dict
        if rode:
            self._gain().copy_(state_dict[prefix + "gain"])
            if self.held_col is not None and self.options.rides(self.slices) and self.layers.weights(self) is not None:
                del self._buffers["col"]
                self.rides = True
        elif prefix + "col" in state_dict:
            self.hold_columns()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if rode and self.rides and not self._rows_are_of_the_base():
            missing_keys.append(prefix + "col")
            warnings.warn(
                f"the state of {', '.join(self.names[:3])} was saved over other base weights, and leaves C to them; "
                "load those too, or use save_adapter(..., include_factors=True)",
                stacklevel=2,
            )
        for name in ("gain", "scale"):  # in a state, but neither parameter nor persistent buffer
            if prefix + name in unexpected_keys:
                unexpected_keys.remove(prefix + name)
        if prefix + "scale" in state_dict:
            self.scale = float(state_dict[prefix + "scale"])
        else:
            missing_keys.append(prefix + "scale")
        self.ride()

    @torch.no_grad()
    def _rows_are_of_the_base(self) -> bool:
        """Whether R is, up to the rounding of a shorter dtype, the chosen rows of the layers' weights.

        A learned R does not tell: then it is taken to be so.
        """
        weights = self.layers.weights(self)
        assert weights is not None
        row = self._taken(weights).row.double()
        return float((row - self.row).norm()) <= 0.02 * float(row.norm())

    @torch.no_grad()
    def is_of(self, weights: Tensor | Sequence[Tensor]) -> bool:
        """Whether C and R, as far as they are not learned, are bit for bit the chosen columns and rows of ``weights``.

        Args:
            weights: (S, out, in), or such tensors of some slices each, in order.
        """
        if self.options.factors == LEARNED:
            return True
        try:
            taken = self._taken(weights)
        except ValueError:  # columns that depend on each other, which cannot be made orthonormal
            return False
        own = self.held_col is None and torch.equal(taken.gain.to(self._gain()), self._gain())
        return (own or torch.equal(taken.col, self.col)) and torch.equal(taken.row, self.row)

    @torch.no_grad()
    def follow_base(self, weights: Tensor) -> None:
        """Choose rows and columns and take C and R again where the base weights changed and U is still zero.

        Indices that the caller gave, or that "activation" chose by calibration inputs, are kept, and only C and R are
        taken again. Learned factors stay, with a warning. A core that is not zero belongs to the weights it was trained
        on: then C and R stay, with a warning.

        Args:
            weights: The new base weights, (S, out, in).

        Warns:
            UserWarning: The core is not zero, or factors are learned.
        """
        if self.options.factors != WEIGHTS:
            warnings.warn(
                f"base weights of {', '.join(self.names[:3])}... changed under learned factors, which are still those "
                "learned on the weights before",
                stacklevel=2,
            )
        if self.is_of(weights):
            return
        if bool(self.core.any()):
            warnings.warn(
                f"base weights of {', '.join(self.names[:3])}... changed under a trained core; its factors are still "
                "those of the weights it was trained on",
                stacklevel=2,
            )
            return
        rule, chosen = self.options.selection, self.selection
        if rule not in KEPT_CHOICES:
            _, c, r = self.core.shape
            chosen = select(weights, c, r, rule, self.options.seed)
        if self.options.factors != WEIGHTS:
            chosen = chosen.without_rows()
        taken = self._taken(weights, chosen)
        if self.held_col is not None:
            self.col.copy_(taken.col)
        self.row.copy_(taken.row)
        if self.gain is not None:
            self.gain.copy_(taken.gain)
        self.rows.copy_(chosen.rows)
        self.columns.copy_(chosen.columns)
        self._keep_scores(chosen)
        if self.normalised:
            self.scale = taken.scale
        self.ride()

    def take_over(self, other: StackState) -> None:
        """Copy another stack into this one: core, factors, indices, scale, scores and options.

        Args:
            other: A stack of the same shapes and options.
        """
        self.load_state_dict(other.state_dict())
        self.options = other.options
        self._keep_scores(other.selection)
        self.ride()  # loading tried it with the options before
