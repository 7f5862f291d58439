"""The experts of a layer in one 3-D parameter, as transformers 5 has them, with the slices of a stack.

The forward pass of the experts stays the model's own. What it does with the parameter comes here by PyTorch's
``__torch_function__``: the product of the tokens of expert e with ``weight[e]``, of sorted tokens with all weights
(``grouped_mm``), or of each token with the weight chosen for it (``bmm``). The tokens of expert e get slice e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

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


class TCURExperts(HeldExperts, TCURParameter):
    """The weights of all experts of a layer, with a t-CUR adapter. :func:`tcurlora_ext.inject` creates it.

    To the experts' forward pass it is the parameter: it can be indexed by an expert or by the experts of all tokens,
    transposed, and multiplied. Anything else is refused by name.
    """

    def _all(self) -> ExpertWeights:
        return ExpertWeights(self)

    dtype = property(lambda self: self.weight.dtype)
    device = property(lambda self: self.weight.device)
    shape = property(lambda self: self.weight.shape)

    def data_ptr(self) -> int:
        """The address of the weights, by which transformers chooses a kernel."""
        address: int = self.weight.data_ptr()
        return address

    def transpose(self, first: int, second: int) -> ExpertWeights:
        """The weights with their last two dimensions exchanged; other dimensions are refused."""
        return self._all().transpose(first, second)

    def __getitem__(self, index: Any) -> ExpertWeight | ChosenWeights:
        return self._all()[index]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _call(func, tuple(arg._all() if isinstance(arg, TCURExperts) else arg for arg in args), kwargs or {})

    # -- what the views compute ---------------------------------------------------------------------------------------

    def adapts(self) -> bool:
        """Whether the adapter is to be computed: not where it is merged. A call of the layer is noted."""
        if self.uncalled and not torch.compiler.is_compiling():
            self.uncalled = False
        if self.stack.rides and self.weight.requires_grad:
            self.stack.hold_columns()
        return not self.merged

    def around(self, x: Tensor, ends: Sequence[int], base: Callable[[Tensor], Tensor]) -> Tensor:
        """The product of sorted tokens with all weights, by the model's own function for it, with the adapter.

        Args:
            x: (tokens, in), those of expert 0 first.
            ends: How many tokens the experts up to each one have. Tokens after the last end have no expert.
            base: The product with the base weights, (tokens, in) -> (tokens, out).

        Returns:
            (tokens, out).
        """
        if self.stack.rides:
            return base(self._by_expert(x, ends, lambda part, e: self.stack.changed_input(part, e, self.training), x))
        result = base(x)
        delta = self._by_expert(x, ends, lambda part, e: self.stack.delta(part, e, 1, self.training), None)
        return result + delta.to(result.dtype)

    def _by_expert(
        self, x: Tensor, ends: Sequence[int], compute: Callable[[Tensor, int], Tensor], rest: Tensor | None
    ) -> Tensor:
        """A function of the tokens of each expert and the index of its slice; ``rest`` for tokens without one."""
        parts, start = [], 0
        for expert, end in enumerate(ends):
            if end > start:
                parts.append(compute(x[start:end], self.first_slice + expert).to(x.dtype))
                start = end
        if start < len(x) or not parts:
            zeros = x.new_zeros(len(x) - start, self.features[0])
            parts.append(zeros if rest is None else rest[start:])
        return torch.cat(parts)


class _View:
    """What a forward pass gets in place of a tensor of weights.

    Args:
        layer: The adapted layer.
        swapped: Whether the last two dimensions are those of the stored parameter in the other order.
    """

    def __init__(self, layer: TCURExperts, swapped: bool = False) -> None:
        self.layer, self.swapped = layer, swapped

    @property
    def right(self) -> bool:
        """Whether the product is ``x W``, with W (in, out), and not ``x W^T``."""
        return self.layer.transposed != self.swapped

    @property
    def plain(self) -> Tensor:
        """The weights as they are stored; W + dW where merged."""
        weight: Tensor = self.layer.weight
        return weight.transpose(-2, -1) if self.swapped else weight

    dtype = property(lambda self: self.layer.weight.dtype)
    device = property(lambda self: self.layer.weight.device)
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

        return self.layer.around(x, offs.tolist(), base) if self.layer.adapts() else base(x)


class ExpertWeight(_View):
    """The weight of one expert."""

    def __init__(self, layer: TCURExperts, swapped: bool, expert: int, dtype: torch.dtype | None = None) -> None:
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
        weight = self.plain.T if self.right else self.plain
        if not self.layer.adapts():
            return nn.functional.linear(x, weight, bias)
        layer = self.layer
        return layer.stack.adapt(x, weight, bias, layer.first_slice + self.expert, 1, layer.training)


class ChosenWeights(_View):
    """The weights of the experts of all tokens, (tokens, out, in) or (tokens, in, out)."""

    def __init__(self, layer: TCURExperts, swapped: bool, experts: Tensor) -> None:
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
        if not self.layer.adapts():
            return base(x)
        order = self.experts.argsort(stable=True)
        back = order.argsort()
        ends = self.experts.bincount(minlength=len(self.layer.weight)).cumsum(0).tolist()
        return self.layer.around(x[order], ends, lambda seen: base(seen[back])[order])[back]


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a forward pass gets for a function of such weights. Raises TypeError for one that is not known."""
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
    raise TypeError(_refusal(name))


def _views(args: tuple[Any, ...]) -> Iterator[tuple[int, _View]]:
    return ((at, arg) for at, arg in enumerate(args) if isinstance(arg, _View))


def _refusal(found: str) -> str:
    return (
        f"the experts' forward pass uses {found} on an adapted weight, which would leave the adapter out; expected "
        "linear, matmul, bmm or grouped_mm: set the model's experts_implementation to 'eager', 'batched_mm' or "
        "'grouped_mm', or leave the experts out by exclude_modules"
    )
