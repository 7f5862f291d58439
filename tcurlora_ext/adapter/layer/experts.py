"""The experts of a layer in one 3-D parameter, as transformers 5 has them, with the slices of a stack.

The forward pass of the experts stays the model's own. What it does with the parameter comes here by PyTorch's
``__torch_function__``: the product of the tokens of expert e with ``weight[e]``, of sorted tokens with all weights
(``grouped_mm``), or of each token with the weight chosen for it (``bmm``). The tokens of expert e get slice e.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.stack.slices import LayerSlices

from .parameter import HeldParameter, TCURParameter

_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")


class HeldExperts(HeldParameter):
    """A 3-D parameter with the weights of all experts, as a layer without an adapter.

    Args:
        parameter: (experts, out, in), or (experts, in, out) where ``transposed``.
        transposed: Whether the experts compute ``x W`` in place of ``x W^T``, as those of gpt-oss.
    """

    def __init__(self, parameter: nn.Parameter, transposed: bool) -> None:
        super().__init__(parameter, len(parameter))
        self.transposed = transposed

    @property
    def features(self) -> tuple[int, int]:
        _, *sides = self.weight.shape
        return (sides[1], sides[0]) if self.transposed else (sides[0], sides[1])

    def as_matrix(self, stored: Tensor) -> Tensor:
        """The parameter as a matrix (experts*out, in), or such a matrix in the parameter's form.

        Args:
            stored: (experts, out, in) or (experts, in, out), or the matrix.
        """
        if stored.dim() == 3:
            return self.slices_of(stored, len(stored)).flatten(0, 1)
        weights = stored.unflatten(0, (self.slices, -1))
        return weights.transpose(1, 2) if self.transposed else weights

    def slices_of(self, stored: Tensor, slices: int) -> Tensor:
        weights = stored.transpose(1, 2) if self.transposed else stored
        return weights if slices == len(stored) else weights.flatten(0, 1).unflatten(0, (slices, -1))


class AsWeights(ABC):
    """A layer that is, to the experts' forward pass, the parameter that it holds.

    It can be indexed by an expert or by the experts of all tokens, transposed, and multiplied. Anything else is refused
    by name. A subclass is a module whose ``training`` says whether dropout applies.

    Attributes:
        training: As of any module.
    """

    training: bool

    @property
    @abstractmethod
    def held(self) -> HeldExperts:
        """What holds the weights: W, or W + dW where that is merged."""

    @abstractmethod
    def active_slices(self) -> list[LayerSlices]:
        """The slices of each adapter that is to be computed; a call of the layer is noted."""

    dtype = property(lambda self: self.held.weight.dtype)
    device = property(lambda self: self.held.weight.device)
    shape = property(lambda self: self.held.weight.shape)

    def data_ptr(self) -> int:
        """The address of the weights, by which transformers chooses a kernel."""
        address: int = self.held.weight.data_ptr()
        return address

    def transpose(self, first: int, second: int) -> ExpertWeights:
        """The weights with their last two dimensions exchanged; other dimensions are refused."""
        return ExpertWeights(self).transpose(first, second)

    def __getitem__(self, index: Any) -> ExpertWeight | ChosenWeights:
        return ExpertWeights(self)[index]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _call(
            func, tuple(ExpertWeights(arg) if isinstance(arg, AsWeights) else arg for arg in args), kwargs or {}
        )

    # -- what the views compute ---------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # an expert has another number of tokens each time
    def of_one(self, x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        """``x (W + dW)^T + bias`` for an expert.

        Args:
            x: (tokens, in).
            weight: W (out, in).
            bias: (out,) or None.
            expert: Its index.
        """
        active = self.active_slices()
        if not active:
            return nn.functional.linear(x, weight, bias)
        own, *others = active
        result = own.stack.adapt(x, weight, bias, own.first_slice + expert, 1, self.training)
        for slices in others:
            delta = slices.stack.delta(x, slices.first_slice + expert, 1, self.training)
            result = result + delta.to(result.dtype)
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # an expert has another number of tokens each time
    def of_all(self, x: Tensor, ends: Callable[[], Sequence[int]], base: Callable[[Tensor], Tensor]) -> Tensor:
        """The product of sorted tokens with all weights, by the model's own function for it, with the adapters.

        Args:
            x: (tokens, in), those of expert 0 first.
            ends: How many tokens the experts up to each one have. Tokens after the last end have no expert.
            base: The product with the base weights, (tokens, in) -> (tokens, out).

        Returns:
            (tokens, out).
        """
        active = self.active_slices()
        if not active:
            return base(x)
        at = ends()
        if active[0].stack.rides and not self.held.weight.requires_grad:
            own = active.pop(0)
            result = base(self._by_expert(x, at, partial(_changed, own, self.training), x))
        else:
            result = base(x)
        for slices in active:
            result = result + self._by_expert(x, at, partial(_delta, slices, self.training), None).to(result.dtype)
        return result

    def _by_expert(
        self, x: Tensor, ends: Sequence[int], compute: Callable[[Tensor, int], Tensor], rest: Tensor | None
    ) -> Tensor:
        """A function of the tokens of each expert and the expert's index; ``rest`` for tokens without one, or zeros."""
        parts, start = [], 0
        for expert, end in enumerate(ends):
            if end > start:
                parts.append(compute(x[start:end], expert).to(x.dtype))
                start = end
        if start < len(x) or not parts:
            parts.append(x.new_zeros(len(x) - start, self.held.features[0]) if rest is None else rest[start:])
        return torch.cat(parts)


def _changed(slices: LayerSlices, training: bool, x: Tensor, expert: int) -> Tensor:
    return slices.stack.changed_input(x, slices.first_slice + expert, training)


def _delta(slices: LayerSlices, training: bool, x: Tensor, expert: int) -> Tensor:
    return slices.stack.delta(x, slices.first_slice + expert, 1, training)


class TCURExperts(AsWeights, HeldExperts, TCURParameter):
    """The weights of all experts of a layer, with a t-CUR adapter. :func:`tcurlora_ext.inject` creates it."""

    @property
    def held(self) -> HeldExperts:
        return self

    def active_slices(self) -> list[LayerSlices]:
        self._note_call()
        if self.stack.rides and self.weight.requires_grad:
            self.stack.hold_columns()
        return [] if self.merged else [self.layer_slices]


class _View:
    """What a forward pass gets in place of a tensor of weights.

    Args:
        layer: The adapted layer.
        swapped: Whether the last two dimensions are those of the stored parameter in the other order.
    """

    def __init__(self, layer: AsWeights, swapped: bool = False) -> None:
        self.layer, self.swapped = layer, swapped

    @property
    def right(self) -> bool:
        """Whether the product is ``x W``, with W (in, out), and not ``x W^T``."""
        return self.layer.held.transposed != self.swapped

    @property
    def plain(self) -> Tensor:
        """The weights as they are stored; W + dW where merged."""
        weight: Tensor = self.layer.held.weight
        return weight.transpose(-2, -1) if self.swapped else weight

    dtype = property(lambda self: self.layer.dtype)
    device = property(lambda self: self.layer.device)
    shape = property(lambda self: self.plain.shape)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_refusal(name))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _call(func, args, kwargs or {})


class ExpertWeights(_View):
    """The weights of all experts."""

    def data_ptr(self) -> int:
        """The address of the weights."""
        return self.layer.data_ptr()

    def transpose(self, first: int, second: int) -> ExpertWeights:
        """The weights with their last two dimensions exchanged."""
        if {first % 3, second % 3} != {1, 2}:
            raise ValueError(_refusal(f"transpose({first}, {second})"))
        return ExpertWeights(self.layer, not self.swapped)

    def __getitem__(self, index: Any) -> ExpertWeight | ChosenWeights:
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
            return ExpertWeight(self.layer, self.swapped, int(index))
        if isinstance(index, Tensor) and index.dim() == 1 and index.dtype == torch.int64:
            return ChosenWeights(self.layer, self.swapped, index)
        raise TypeError(_refusal(f"indexing by a {type(index).__name__}"))

    def product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """``grouped_mm`` of sorted tokens (tokens, in) with all weights, by the function that was called."""
        x, _, *more = args
        offs = kwargs["offs"] if "offs" in kwargs else more[0]

        def base(seen: Tensor) -> Any:
            return func(seen, self.plain, *more, **kwargs)

        return self.layer.of_all(x, offs.tolist, base)


class ExpertWeight(_View):
    """The weight of one expert."""

    def __init__(self, layer: AsWeights, swapped: bool, expert: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(layer, swapped)
        self.expert, self.cast = expert, dtype

    @property
    def plain(self) -> Tensor:
        weight = super().plain[self.expert]
        return weight if self.cast is None else weight.to(self.cast)

    def float(self) -> ExpertWeight:
        """The weight in float32."""
        return ExpertWeight(self.layer, self.swapped, self.expert, torch.float32)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x (W + dW)^T + bias``, or ``x (W + dW)`` where W is (in, out).

        Args:
            x: (tokens, in).
            bias: (out,) or None.
        """
        return self.layer.of_one(x, self.plain.T if self.right else self.plain, bias, self.expert)


class ChosenWeights(_View):
    """The weights of the experts of all tokens, (tokens, out, in) or (tokens, in, out)."""

    def __init__(self, layer: AsWeights, swapped: bool, experts: Tensor) -> None:
        super().__init__(layer, swapped)
        self.experts = experts

    @property
    def plain(self) -> Tensor:
        return super().plain[self.experts]

    def product(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The product of every token with its weight.

        Args:
            x: (tokens, in).
            base: The product with the base weights, (tokens, in) -> (tokens, out).
        """
        order = self.experts.argsort(stable=True)
        back = order.argsort()

        def ends() -> list[int]:
            found: list[int] = self.experts.bincount(minlength=self.layer.shape[0]).cumsum(0).tolist()
            return found

        return self.layer.of_all(x[order], ends, lambda seen: base(seen[back])[order])[back]


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a forward pass gets for a function of such weights. Raises RuntimeError for one that is not known."""
    name = getattr(func, "__name__", str(func))
    views = list(_views(args))
    if len(views) == 1 and not any(isinstance(value, _View) for value in kwargs.values()):
        at, view = views[0]
        if isinstance(view, ExpertWeights) and name in _GROUPED and at == 1 and view.right:
            return view.product(func, args, kwargs)
        if isinstance(view, ExpertWeight) and name == "linear" and at == 1 and not view.right:
            return view.product(args[0], *args[2:], **kwargs)
        if isinstance(view, ExpertWeight) and name in ("matmul", "__matmul__") and at == 1 and view.right:
            return view.product(args[0])
        if isinstance(view, ChosenWeights) and name == "bmm" and not kwargs and at == (1 if view.right else 0):
            weights, dim = view.plain, 1 if view.right else 2

            def base(seen: Tensor) -> Tensor:
                columns = seen.unsqueeze(dim)
                return func(columns, weights).squeeze(dim) if view.right else func(weights, columns).squeeze(dim)

            return view.product(args[1 - at].squeeze(dim), base).unsqueeze(dim)
    raise RuntimeError(_refusal(name))  # after a TypeError, Python would go on to look for another operand of @


def _views(args: tuple[Any, ...]) -> Iterator[tuple[int, _View]]:
    return ((at, arg) for at, arg in enumerate(args) if isinstance(arg, _View))


def _refusal(found: str) -> str:
    return (
        f"the experts' forward pass uses {found} on an adapted weight, which would leave the adapter out; expected "
        "linear, matmul, bmm or grouped_mm: set the model's experts_implementation to 'eager', 'batched_mm' or "
        "'grouped_mm', or leave the experts out by exclude_modules"
    )
