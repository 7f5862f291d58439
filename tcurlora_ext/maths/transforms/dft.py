"""The discrete Fourier transform along the slices, in real coordinates: the transform of the t-product.

The S blocks are frequency 0, then the real and the imaginary part of frequencies 1, 2, ..., then for even S frequency
S/2. The two parts of frequency k are coupled by its phase, which is exp(2 pi i k l / S) in slice l.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contract import Factors
from ..tproduct import self_conjugate_frequencies, tprod
from .base import CallShape, SliceTransform, phases_on, sum_over_blocks


class DFT(SliceTransform):
    """``"dft"``: one core for all slices, coupled by the t-product (the paper's form)."""

    name = "dft"
    title = "discrete Fourier transform, the t-product"
    has_kernels = True
    truncates = True

    def matrix(self, slices: int) -> Tensor:
        slot = torch.arange(slices, dtype=torch.float64)
        k = torch.arange(1, (slices + 1) // 2)
        # k*l mod S in integers: the angle stays exact for any S and l.
        angle = ((k[:, None] * torch.arange(slices)) % slices).double() * (2 * math.pi / slices)
        pairs = math.sqrt(2 / slices) * torch.stack([angle.cos(), -angle.sin()], 1).flatten(0, 1)
        ends = [torch.ones_like(slot), 1 - 2 * (slot % 2)][: 2 - slices % 2]
        ends = [end[None] / math.sqrt(slices) for end in ends]
        return torch.cat([ends[0], pairs, *ends[1:]])

    def norms(self, slices: int) -> Tensor:
        """The norms of the unnormalised DFT."""
        norms = torch.full((slices,), math.sqrt(slices / 2), dtype=torch.float64)
        norms[self.single_blocks(slices)] = math.sqrt(slices)
        return norms

    def column_signs(self, slices: int) -> Tensor:
        """-1 for the imaginary parts."""
        signs = torch.ones(slices, dtype=torch.float64)
        signs[2 : self.pair_blocks(slices).stop : 2] = -1
        return signs

    def single_blocks(self, slices: int) -> slice:
        """The self-conjugate frequencies: the first block, and for even S the last."""
        return slice(0, slices, slices - 1) if slices % 2 == 0 else slice(0, 1)

    def pair_blocks(self, slices: int) -> slice:
        return slice(1, 2 * ((slices + 1) // 2) - 1)

    def kept_blocks(self, slices: int, frequencies: int | None) -> int:
        """min(2K - 1, S) for the frequencies 0, 1, ..., K - 1."""
        return slices if frequencies is None else min(2 * frequencies - 1, slices)

    def phases(self, slices: int, first_slice: int, num_slices: int) -> tuple[Tensor, Tensor, Tensor]:
        layer = torch.arange(first_slice, first_slice + num_slices)
        alone = [torch.full((num_slices,), 1 / math.sqrt(slices), dtype=torch.float64)]
        if slices % 2 == 0:
            alone.append((1 - 2 * (layer % 2)).double() / math.sqrt(slices))
        k = torch.arange(1, (slices + 1) // 2)
        # k*l mod S in integers: the angle stays exact for any S and l.
        angle = ((layer[:, None] * k) % slices).double() * (2 * math.pi / slices)
        weight = math.sqrt(2 / slices)
        return torch.stack(alone, 1), weight * angle.cos(), weight * angle.sin()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The t-product."""
        return tprod(a, b)

    def product_at(self, a: Tensor, b: Tensor, layers: range) -> Tensor:
        slices = a.shape[0]
        return sum_over_blocks((a[(layer - torch.arange(slices)) % slices] for layer in layers), b)

    def spectrum(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The S//2 + 1 complex frequencies 0..S//2; one of a conjugate pair has weight 2."""
        slices = len(tensor)
        weights = torch.full((slices // 2 + 1,), 2.0, dtype=tensor.dtype, device=tensor.device)
        weights[self_conjugate_frequencies(slices)] = 1.0
        return torch.fft.rfft(tensor, dim=0, norm="ortho"), weights

    def inverse_spectrum(self, frequencies: Tensor, slices: int) -> Tensor:
        """The inverse DFT. ``frequencies`` may be the first few alone: missing ones are taken as zero."""
        return torch.fft.irfft(frequencies, n=slices, dim=0, norm="ortho")

    def product_energy(self, slices: int) -> int:
        """S^2: each of the two products brings a factor sqrt(S)."""
        return slices**2

    def call_shape(self, slices: int, num_slices: int, blocks: int) -> CallShape:
        if blocks == slices:
            return CallShape(1, slices, self.name)
        return CallShape(num_slices, blocks, self.name)

    def calls(
        self, col: Tensor, core: Tensor, row: Tensor, slices: int, first_slice: int, num_slices: int, scale: float
    ) -> list[Factors]:
        """One call for all slices, or one call per slice where the core has the lowest frequencies alone."""
        if core.shape[0] == slices:
            return [Factors(col, core, row, first_slice, num_slices, scale, self.name)]
        layers = range(first_slice, first_slice + num_slices)
        return [Factors(col, self.core_at(core, layer, slices), row, 0, 1, scale, self.name) for layer in layers]

    def core_at(self, core_fourier: Tensor, layer: int, slices: int) -> Tensor:
        """A core (F, c, r) for a stack of F slices, whose slice 0 then equals slice ``layer`` of the stack of S slices.

        ``core_fourier`` (F, c, r) has the F lowest of S blocks. The operator takes the number of slices from the number
        of blocks, F. So the blocks are multiplied here by the phases of slice ``layer`` of S, and by the ratio of the
        weights of S slices to those of F slices.
        """
        blocks = core_fourier.shape[0]
        single, cos, sin = phases_on(self, slices, layer, 1, core_fourier.device, core_fourier.dtype)
        pairs = (blocks - 1) // 2
        cos, sin = cos[0, :pairs], sin[0, :pairs]
        real, imaginary = core_fourier[1:].unflatten(0, (pairs, 2)).unbind(1)
        turned = torch.stack([cos * real - sin * imaginary, sin * real + cos * imaginary], 1).flatten(0, 1)
        # The operator multiplies by the weights of F slices, 1/sqrt(F) and sqrt(2/F): they are divided out here.
        return torch.cat([single[0, :1] * math.sqrt(blocks) * core_fourier[:1], turned * math.sqrt(blocks / 2)])
