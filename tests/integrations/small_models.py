"""Small models of transformers with random weights (nothing is downloaded), their examples and their training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .entries import Entry

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
EXAMPLES, STEPS = 8, 12
Example = dict[str, Tensor]


def tokens(generator: torch.Generator, length: int = 7) -> Tensor:
    return torch.randint(3, 40, (length,), generator=generator)


def text(generator: torch.Generator) -> Example:
    ids = tokens(generator)
    return {"input_ids": ids, "labels": ids.clone()}


def labelled_text(generator: torch.Generator) -> Example:
    return {"input_ids": tokens(generator), "labels": torch.randint(2, (), generator=generator)}


def labelled_image(generator: torch.Generator) -> Example:
    image = torch.randn(3, 8, 8, generator=generator)
    return {"pixel_values": image, "labels": torch.randint(2, (), generator=generator)}


def pair(generator: torch.Generator) -> Example:
    return {"input_ids": tokens(generator), "pixel_values": torch.randn(3, 8, 8, generator=generator)}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **quiet))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, **HEADS))


def clip() -> nn.Module:
    words = TEXT | {"max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    return transformers.CLIPModel(
        transformers.CLIPConfig(projection_dim=8, text_config=words, vision_config=VISION | HEADS)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Example]]] = {
    "Llama": (llama, text),
    "GPT-2": (gpt2, text),
    "BERT": (bert, labelled_text),
    "ViT": (vit, labelled_image),
    "CLIP": (clip, pair),
}


def base(kind: str) -> nn.Module:
    """The same random weights every time, larger than the configurations' 0.02, so that blocks affect the output."""
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


def adapted(kind: str, entry: Entry, head: str | None = None) -> nn.Module:
    return entry.adapt(base(kind), head, rank=4)


def examples(kind: str) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    return [MODELS[kind][1](generator) for _ in range(EXAMPLES)]


def collate(batch: list[Example]) -> dict[str, Any]:
    stacked: dict[str, Any] = {name: torch.stack([one[name] for one in batch]) for name in batch[0]}
    return stacked if "labels" in stacked else stacked | {"return_loss": True}


def result(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The output of a model of this dtype for all examples."""
    batch = {n: v.to(dtype) if n == "pixel_values" else v for n, v in collate(examples(kind)).items()}
    with torch.no_grad():
        return model.eval()(**batch)


def loss(model: nn.Module, kind: str) -> float:
    return float(result(model, kind).loss)


def output(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    found = result(model, kind, dtype)
    return (found.logits if "logits" in found else torch.cat([found.text_embeds, found.image_embeds])).float()


def trainer(model: nn.Module, kind: str, folder: Path, **options: Any) -> Any:
    """A Trainer whose every step takes all examples of a process."""
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": EXAMPLES, "learning_rate": 0.02,
        "per_device_eval_batch_size": EXAMPLES, "lr_scheduler_type": "constant", "use_cpu": True, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**settings | options),
        data_collator=collate,
        train_dataset=examples(kind),
        eval_dataset=examples(kind),
    )


def train(model: nn.Module, kind: str, folder: Path, resume: bool = False, **options: Any) -> nn.Module:
    trainer(model, kind, folder, **options).train(resume_from_checkpoint=resume or None)
    return model


def cores(entry: Entry, model: nn.Module) -> dict[str, Tensor]:
    return {name: stack.core.detach() for name, stack in entry.stacks(model).items()}
