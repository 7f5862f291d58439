"""The kernels to compile, with their configurations, sizes and GPUs. It does not import Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tcurlora_ext.kernels import configs

TABLES = {**configs.TABLES, "fallback": configs.FALLBACK, "unaligned": configs.UNALIGNED}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Spec:
    """One compilation; ``index`` is the configuration's index among those of the kernel in its table.

    T tokens, n slices of out x in, a stack of S slices, core blocks c x r; the fused kernels take ``whole`` slices in
    one tile. ``descriptors``: tiles through tensor descriptors.
    """

    table: str
    kernel: str
    index: int
    dtype: str
    capability: int
    descriptors: bool
    n: int = 3
    c: int = 8
    r: int = 8
    S: int = 48
    whole: int = 12
    out: int = 768
    in_: int = 768
    T: int = 2048
    precision: str = "ieee"
    transform: str = "dft"

    @property
    def name(self) -> str:
        form = "descriptors" if self.descriptors else "pointers"
        sizes = f"n{self.n}-c{self.c}r{self.r}-{self.transform}-{self.precision}"
        table = self.table.replace(" ", "-")
        return f"{self.kernel}-{table}-{self.index}-{self.dtype}-sm{self.capability}-{form}-{sizes}"

    @property
    def config(self) -> configs.Config:
        return TABLES[self.table].configs(self.kernel, DTYPES[self.dtype].itemsize)[self.index]


# Hopper's GPUs share one table, so one of them stands for it.
FORMS = ((80, False), (90, False), (90, True))


RIDING = ("ride", "ride_back")  # these load through pointers only


def _table(
    table: str, dtype: str, forms: tuple[tuple[int, bool], ...] = FORMS, only: tuple[str, ...] = configs.KERNELS,
    **sizes: object,
) -> Iterator[Spec]:  # fmt: skip
    itemsize = DTYPES[dtype].itemsize
    for kernel, size in TABLES[table].rules:
        if size != itemsize or kernel not in only:
            continue
        own = dict.fromkeys((capability, kernel not in RIDING and descriptors) for capability, descriptors in forms)
        for index in range(len(TABLES[table].configs(kernel, itemsize))):
            for capability, descriptors in own:
                yield Spec(table, kernel, index, dtype, capability, descriptors, **sizes)  # type: ignore[arg-type]


def specs() -> list[Spec]:
    """Every configuration of every table at UNETR's sizes for both GPUs, and sizes that need many registers."""
    desc = ((90, True),)
    odd = {"c": 3, "r": 5, "S": 7, "out": 513, "in_": 767, "T": 2047}
    pointers = ((80, False), (90, False))
    return [
        *_table("NVIDIA H200", "bfloat16"),
        *_table("fallback", "float16"),
        *_table("fallback", "float32", whole=6),
        *_table("unaligned", "bfloat16", pointers, **odd),
        *_table("unaligned", "float32", pointers, **odd),
        # One slice; small and odd ranks; DCT; float32 rounded to tf32.
        *_table("NVIDIA H200", "bfloat16", desc, n=1),
        *_table("NVIDIA H200", "float16", desc, c=1, r=1, whole=48),
        *_table("NVIDIA H200", "bfloat16", desc, c=5, r=3, whole=24),
        *_table("fallback", "bfloat16", ((80, False),), transform="dct"),
        *_table("fallback", "float32", desc, whole=6, precision="tf32"),
        # The widest c and r of the riding form.
        *_table("NVIDIA H200", "bfloat16", ((90, False),), RIDING, c=64, r=64),
        *_table("fallback", "float16", pointers, RIDING, c=64, r=64),
        *_table("fallback", "float32", pointers, RIDING, c=64, r=64),
        *_table("unaligned", "bfloat16", pointers, RIDING, **odd | {"c": 63, "r": 61}),
        *_table("unaligned", "float32", pointers, RIDING, **odd | {"c": 31, "r": 29}),
    ]
