"""Adapted layers that the operator is compared with: LoRA in two orders, tCUR and CURLoRA with a dense dW.

Each class wraps a frozen ``nn.Linear``, or a convolution, by its matrix. Its ``delta_weight()`` is dW (out, in),
differentiable: the check before a measurement compares the layer's output with x (W + dW)^T + b.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, linear

from tcurlora_ext.adapter.layer.linear import TCURLinear
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.middle import BatchedMiddle


class LoRA(nn.Module):
    """LoRA of rank q without dropout: x W^T + b, then (x A^T) B^T. B is not zero, so that no product is trivial."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty_like(base.weight[:1]).repeat(rank, 1))
        self.up = nn.Parameter(torch.empty_like(base.weight[:, :1]).repeat(1, rank))
        randomise(self.down, self.up)

    def delta_weight(self) -> Tensor:
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.base.weight, self.base.bias) + linear(linear(x, self.down), self.up)


class ConvolutionLoRA(nn.Module):
    """LoRA of a convolution: A as kernels that move over the input as the layer does, then B as a 1x1 convolution."""

    def __init__(self, base: nn.Conv3d, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty_like(base.weight[:1]).repeat(rank, 1, 1, 1, 1))
        self.up = nn.Parameter(torch.empty_like(base.weight[:, :1, :1, :1, :1]).repeat(1, rank, 1, 1, 1))
        randomise(self.down, self.up)

    def delta_weight(self) -> Tensor:
        return self.up.flatten(1) @ self.down.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + conv3d(self.base._conv_forward(x, self.down, None), self.up)


class AdapterFirstLoRA(LoRA):
    """The cheapest order in PyTorch operations: the adapter with the bias first, then x W^T accumulated onto it."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        adapter = linear(linear(rows, self.down), self.up, self.base.bias)
        return torch.addmm(adapter, rows, self.base.weight.T).unflatten(0, x.shape[:-1])


def randomise(down: Tensor, up: Tensor) -> None:
    """Fill LoRA's A (rank, in...) and B (out, rank...); entries of B A are as large as a new ``nn.Linear``'s."""
    rank, in_features = down.flatten(1).shape
    with torch.no_grad():
        down.copy_(torch.randn_like(down, dtype=torch.float32) / math.sqrt(in_features))
        up.copy_(torch.randn_like(up, dtype=torch.float32) / math.sqrt(3 * rank))


class CURLoRA(nn.Module):
    """CURLoRA: W + C U R built in every forward pass, from an r x r core per layer and the layer's own C and R."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        columns, rows = (torch.randperm(size)[:rank] for size in (base.in_features, base.out_features))
        self.register_buffer("C", base.weight[:, columns].clone())
        self.register_buffer("R", base.weight[rows].clone())
        core = torch.randn(rank, rank, dtype=torch.float32, device=base.weight.device)
        self.core = nn.Parameter((core * math.sqrt(3 * base.in_features) / rank).to(base.weight.dtype))

    C: Tensor
    R: Tensor

    def delta_weight(self) -> Tensor:
        return self.C @ self.core @ self.R

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.base.weight + self.delta_weight(), self.base.bias)


class DenseTCUR(nn.Module):
    """tCUR whose dW is built from the folded factors in every forward pass and saved for the backward pass."""

    def __init__(self, layer: TCURLinear) -> None:
        super().__init__()
        self.layer = layer

    def delta_weight(self) -> Tensor:
        return self.layer.delta_weight()

    def forward(self, x: Tensor) -> Tensor:
        stack, layer = self.layer.stack, self.layer
        at = (layer.first_slice, layer.num_slices, stack.scale)
        delta = dense(Factors(stack.col, stack.core_fourier(), stack.row, *at))
        return linear(x, layer.weight + delta, layer.bias)


class TransientTCUR(DenseTCUR):
    """tCUR whose W + dW is built in the forward pass, freed, and built again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        stack, layer = self.layer.stack, self.layer
        at = (layer.first_slice, layer.num_slices, stack.scale)
        return _Transient.apply(x, stack.core_fourier(), layer.weight, layer.bias, stack.col, stack.row, at)


class StackTCUR(DenseTCUR):
    """tCUR that takes its slices from the dW of the whole stack, which :class:`StackDelta` builds once per step."""

    def __init__(self, layer: TCURLinear, shared: StackDelta) -> None:
        super().__init__(layer)
        object.__setattr__(self, "shared", shared)  # not a child module: all layers of the stack share it

    shared: StackDelta

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        delta = self.shared.get()[layer.first_slice : layer.first_slice + layer.num_slices].flatten(0, 1)
        return linear(x, layer.weight + delta, layer.bias)


class StackDelta:
    """C * U * R of a stack by FFTs along the slices, as it is defined; built once per forward pass."""

    def __init__(self, layer: TCURLinear) -> None:
        self.stack = layer.stack
        self.dtype = layer.weight.dtype
        self.built: Tensor | None = None

    def get(self) -> Tensor:
        """dW of every slice (S, out, in), in the dtype of the layers' weights."""
        if self.built is None:
            self.built = self.stack.delta_weights().to(self.dtype)
        return self.built

    def drop(self, *_: object) -> None:
        """A forward hook: frees dW after the pass; autograd holds on to what it saved."""
        self.built = None


def dense(factors: Factors) -> Tensor:
    """dW (num_slices*out, in) of a layer as col B_l row, in the dtype of col; differentiable in the core.

    B_l row is the middle product of row^T. Takes 2q*out*in FLOPs per slice beside those of the middle product.
    """
    inner = BatchedMiddle(factors, factors.col.dtype).forward(factors.row.T)  # (in, num_slices, q_c)
    return torch.einsum("oq,inq->noi", factors.col, inner).flatten(0, 1)


class _Transient(torch.autograd.Function):
    """y = x (W + dW)^T + b that saves x, not dW; dcore is computed from the whole gradient of the weight, g^T x."""

    @staticmethod
    def forward(ctx, x, core, weight, bias, col, row, at):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, core, weight, col, row)
        ctx.at = at
        return linear(x, weight + dense(Factors(col, core, row, *at)), bias)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, core, weight, col, row = ctx.saved_tensors
        with torch.enable_grad():
            leaf = core.detach().requires_grad_()
            delta = dense(Factors(col, leaf, row, *ctx.at))
        dx = g @ (weight + delta.detach()) if ctx.needs_input_grad[0] else None
        (dcore,) = torch.autograd.grad(delta, leaf, g.flatten(0, -2).T @ x.flatten(0, -2))
        return dx, dcore, None, None, None, None, None
