"""What is measured: layers, stacks, blocks and whole networks, by the sizes of the models they come from.

A case is a network, its number of tokens, the tubal rank and the mode, training or inference. A case that is only a
part of a model, one layer or one block of 32, has the stacks of the whole model: its layers multiply by the C and R of
all S slices, as they do in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from .names import (
    CURLORA,
    DENSE,
    OWN_CORE,
    PAPER_LORA,
    SMALL_LORA,
    STACK,
    TRANSIENT,
    kernel_variants,
    light_variants,
    operator_variants,
)

MODES = ("training", "inference")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Layer:
    """A linear layer: ``slices`` row blocks of ``out_features`` each, in a stack of ``stack`` slices of that shape."""

    name: str
    in_features: int
    out_features: int
    slices: int
    stack: int


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: What the results call it.
        network: "layer", "stack" (all layers of a stack, each on an input of its own), "encoder", "llama block",
            "unetr step", "convolution" or "convolution encoder".
        tokens: T, the number of rows of a layer's input; for a network, of the input of each of its layers; for
            convolutions the voxels of the input, a cube.
        layer: The layer, where ``network`` is "layer" or "stack".
        rank: The tubal rank r.
        mode: "training" or "inference".
        dtype: Of weights and activations.
        sweep: The growth curve that it is a point of ("tokens", "rank", "slices", "width"); "" for none.
        compiled: Whether the variants that go through torch.compile are measured: each compiles for half a minute.
        variants: Names of the variants that are measured beside the frozen network and LoRA; empty: all.
        light: Whether "all" includes adapters with a core for each layer, and what they are compared with.
    """

    name: str
    network: str
    tokens: int
    layer: Layer | None = None
    rank: int = 8
    mode: str = "training"
    dtype: str = "float32"
    sweep: str = ""
    compiled: bool = True
    variants: tuple[str, ...] = ()
    light: bool = False

    @property
    def id(self) -> str:
        """Name, rank, tokens, mode and dtype: what ``--cases`` matches."""
        return f"{self.name} r={self.rank} T={self.tokens} {self.mode} {self.dtype}"


# UNETR's ViT-B (arXiv 2501.02227): three stacks. Four crops of 128^3 in patches of 16^3 are 2,048 tokens.
UNETR = (
    Layer("unetr qkv", 768, 768, 3, 48),
    Layer("unetr out_proj", 768, 768, 1, 48),
    Layer("unetr linear1", 768, 3072, 1, 12),
    Layer("unetr linear2", 3072, 768, 1, 12),
)
# ViT-L/16 with a fused qkv: 24 blocks; eight images of 224^2 are 1,576 tokens.
VIT_L = (
    Layer("vit-l qkv", 1024, 1024, 3, 96),
    Layer("vit-l out_proj", 1024, 1024, 1, 96),
    Layer("vit-l linear1", 1024, 4096, 1, 24),
    Layer("vit-l linear2", 4096, 1024, 1, 24),
)
# 32 blocks each. Layers of one shape share a stack and cost the same, so they are one case.
LLAMA_7B = (
    Layer("llama-7b q,k,v,o", 4096, 4096, 1, 128),
    Layer("llama-7b gate,up", 4096, 11008, 1, 64),
    Layer("llama-7b down", 11008, 4096, 1, 32),
)
LLAMA_3_8B = (
    Layer("llama-3-8b q,o", 4096, 4096, 1, 64),
    Layer("llama-3-8b k,v", 4096, 1024, 1, 64),
    Layer("llama-3-8b gate,up", 4096, 14336, 1, 64),
    Layer("llama-3-8b down", 14336, 4096, 1, 32),
)
RANKS = (1, 4, 8, 16)
TINY = Layer("tiny", 16, 16, 1, 4)  # its arithmetic takes no time: what is left is the host's work for a call


def growth_variants() -> tuple[str, ...]:
    """What growth curves show: the operator by its fast backends, and two ways of building dW."""
    return (*kernel_variants(), DENSE, TRANSIENT)


def memory_variants() -> tuple[str, ...]:
    """What is compared in whole networks: LoRA of the paper's rank, the operator, and the variants that build dW."""
    return (PAPER_LORA, *operator_variants(), DENSE, STACK, CURLORA)


def of_layer(layer: Layer, tokens: int, **rest: object) -> Case:
    """The case of one layer; ``rest`` are further fields of :class:`Case`."""
    return replace(Case(layer.name, "layer", tokens, layer), **rest)  # type: ignore[arg-type]


def quick() -> list[Case]:
    """What two cores measure in five minutes: UNETR's layers, its encoder, Llama's block, convolutions."""
    cases = [of_layer(layer, 2048) for layer in UNETR]
    cases += [of_layer(UNETR[1], 2048, mode="inference")]
    cases = [replace(case, compiled=(case.name, case.mode) == ("unetr out_proj", "training")) for case in cases]
    encoder, block = Case("unetr encoder", "encoder", 216), Case("llama-7b block", "llama block", 128)
    cases += [replace(case, compiled=False, variants=memory_variants()) for case in (encoder, block)]
    return [*cases, *convolutions()]


def convolutions() -> list[Case]:
    """A 3-D convolution and the encoder of a small DynUNet, adapted by the operator and by PEFT's LoRA."""
    cases = Case("conv3d 64 to 64", "convolution", 16**3), Case("dynunet encoder", "convolution encoder", 32**3)
    # No backend has kernels of its own for convolutions: one variant of the operator is all of them.
    names = (SMALL_LORA, PAPER_LORA, next(iter(operator_variants())))
    return [replace(case, compiled=False, variants=names) for case in cases]


def full() -> list[Case]:
    """Everything in float32 and bfloat16: meant for a GPU, hours on a CPU."""
    cases = []
    for dtype, mode in product(("float32", "bfloat16"), MODES):
        common = {"dtype": dtype, "mode": mode}
        cases += [of_layer(layer, 2048, rank=rank, **common) for layer in UNETR for rank in RANKS]
        cases += [of_layer(layer, 1576, **common) for layer in VIT_L]
        cases += [of_layer(layer, 2048, **common) for layer in (*LLAMA_7B, *LLAMA_3_8B)]
        cases += [replace(case, **common) for case in networks()]  # type: ignore[arg-type]
    cases += [of_layer(UNETR[1], tokens, mode=mode) for tokens in (1, 32, 512, 8192) for mode in MODES]
    cases += [of_layer(layer, 2048, dtype="float16") for layer in UNETR]
    return cases


def networks() -> list[Case]:
    """Whole stacks and networks: UNETR's stacks, its encoder on 4 crops of 128^3, a Llama block, a training step."""
    stacks = [Case(f"{layer.name} stack", "stack", 2048, layer) for layer in UNETR[1:]]
    encoder, block = Case("unetr encoder", "encoder", 2048), Case("llama-7b block", "llama block", 2048)
    return [*stacks, encoder, block, Case("unetr step", "unetr step", 512, compiled=False)]


def gpu() -> list[Case]:
    """The eight minutes of ``make gpu-bench``, in bfloat16: the cases with a target in docs/benchmarks.md first."""
    target = of_layer(LLAMA_3_8B[0], 8192, rank=4)  # q = 256
    encoder, step, block = Case("unetr encoder", "encoder", 2048), networks()[-1], networks()[-2]
    cases = [
        target,
        encoder,
        step,
        *(of_layer(layer, 2048) for layer in UNETR),
        block,
        replace(target, mode="inference"),
    ]
    return [replace(case, dtype="bfloat16", compiled=case in (target, encoder), light=True) for case in cases]


def growth() -> list[Case]:
    """UNETR's out_proj with one number varied at a time: tokens, rank, slices of the stack, width of the model."""
    middle = UNETR[1]
    cases = [
        of_layer(middle, tokens, mode=mode, sweep="tokens")
        for mode in MODES
        for tokens in (64, 128, 256, 384, 512, 1024, 2048, 4096)
    ]
    cases += [of_layer(middle, 2048, rank=rank, sweep="rank") for rank in (1, 2, 4, 8, 16)]
    cases += [of_layer(replace(middle, stack=slices), 2048, sweep="slices") for slices in (6, 12, 24, 48, 96)]
    for width in (256, 384, 768, 1536, 3072):
        cases.append(of_layer(replace(middle, in_features=width, out_features=width), 2048, sweep="width"))
    return [replace(case, compiled=False, variants=growth_variants()) for case in cases]


def riding() -> list[Case]:
    """Adapters with a core for each layer, beside the paper's stack and LoRA: layers, networks, and one new token."""
    encoder, block = Case("unetr encoder", "encoder", 512), Case("llama-7b block", "llama block", 512)
    cases = [*(of_layer(layer, 2048) for layer in UNETR), encoder, block]
    cases.append(Case("llama-7b block", "llama block", 1, mode="inference"))
    cases.append(replace(block, mode="inference"))
    names = (SMALL_LORA, PAPER_LORA, *operator_variants(), *light_variants(), OWN_CORE)
    return [replace(case, compiled=False, variants=names) for case in cases]


SETS = {"quick": quick, "full": full, "gpu": gpu, "growth": growth, "riding": riding}


def every() -> Iterator[Case]:
    """All cases of all sets, without repetition."""
    return iter(dict.fromkeys(case for make in SETS.values() for case in make()))
