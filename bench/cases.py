"""What is measured: layers by the sizes of the networks they come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One adapted layer: ``slices`` row blocks of ``out_features`` each, in a stack of ``stack`` slices."""

    name: str
    in_features: int
    out_features: int
    slices: int
    stack: int
    rank: int
    tokens: int

    @property
    def width(self) -> int:
        """q, the rank of the LoRA whose products are as wide."""
        return self.rank * self.stack


# UNETR's ViT-B at rank 8 (arXiv 2501.02227): three stacks, two crops of 96^3 in patches of 16^3 are 432 tokens, four of
# 128^3 are 2,048.
UNETR = [
    Layer("unetr qkv", 768, 768, 3, 48, 8, 2048),
    Layer("unetr out_proj", 768, 768, 1, 48, 8, 2048),
    Layer("unetr linear1", 768, 3072, 1, 12, 8, 2048),
    Layer("unetr linear2", 3072, 768, 1, 12, 8, 2048),
]
TINY = Layer("tiny", 16, 16, 1, 4, 2, 4)
