"""transformers' Trainer on adapted models, small and made from a configuration: nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur

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


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def base(kind: str) -> nn.Module:
    """The same random weights every time, larger than the configurations' 0.02, so that the blocks matter."""
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


def adapted(kind: str) -> nn.Module:
    return tcur.inject(base(kind), tcur.TCURConfig(rank=4))


def examples(kind: str) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    return [MODELS[kind][1](generator) for _ in range(EXAMPLES)]


def collate(batch: list[Example]) -> dict[str, Any]:
    stacked: dict[str, Any] = {name: torch.stack([one[name] for one in batch]) for name in batch[0]}
    return stacked if "labels" in stacked else stacked | {"return_loss": True}


def loss(model: nn.Module, kind: str) -> float:
    with torch.no_grad():
        return float(model.eval()(**collate(examples(kind))).loss)


def output(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        result = model.eval()(**collate(examples(kind)))
    return result.logits if "logits" in result else torch.cat([result.text_embeds, result.image_embeds])


def train(model: nn.Module, kind: str, folder: Path, resume: bool = False, **options: Any) -> nn.Module:
    """All examples in every step."""
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": EXAMPLES, "learning_rate": 0.02,
        "lr_scheduler_type": "constant", "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**settings | options)
    trainer = transformers.Trainer(model, arguments, data_collator=collate, train_dataset=examples(kind))
    trainer.train(resume_from_checkpoint=resume or None)
    return model


def cores(model: nn.Module) -> dict[str, Tensor]:
    return {name: stack.core.detach() for name, stack in tcur.stacks(model).items()}


CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def test_the_loss_falls_and_only_the_cores_change(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    before = loss(model, kind)
    train(model, kind, tmp_path)
    assert loss(model, kind) < 0.9 * before
    assert all(bool(core.any()) for core in cores(model).values())
    trained = model.state_dict()
    for name, value in base(kind).state_dict().items():
        assert torch.equal(trained[name], value), name


def test_gradient_checkpointing_trains_the_same_cores(kind: str, tmp_path: Path) -> None:
    plain, again = (train(adapted(kind), kind, tmp_path, max_steps=3, **o) for o in ({}, CHECKPOINTING))
    for name, core in cores(plain).items():
        assert_close(cores(again)[name], core, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_trains_float32_cores(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    before = loss(model, kind)
    train(model, kind, tmp_path, bf16=True, **CHECKPOINTING)
    assert loss(model, kind) < 0.9 * before
    assert {core.dtype for core in cores(model).values()} == {torch.float32}


def test_torch_compile_trains_the_same_cores(tmp_path: Path) -> None:
    plain = train(adapted("Llama"), "Llama", tmp_path, max_steps=2)
    compiled = train(adapted("Llama"), "Llama", tmp_path, max_steps=2, torch_compile=True)
    for name, core in cores(plain).items():
        assert_close(cores(compiled)[name], core, rtol=1e-3, atol=1e-4, msg=name)


def test_the_trainers_checkpoint_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = train(adapted("GPT-2"), "GPT-2", tmp_path / "whole", max_steps=4)
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(adapted("GPT-2"), "GPT-2", tmp_path / "parts", max_steps=2, **saving)
    resumed = train(adapted("GPT-2"), "GPT-2", tmp_path / "parts", resume=True, max_steps=4, **saving)
    for name, core in cores(whole).items():
        assert torch.equal(cores(resumed)[name], core), name


def test_trained_loaded_and_merged_agree(kind: str, tmp_path: Path) -> None:
    """docs/transformers.md states these tolerances."""
    model = train(adapted(kind), kind, tmp_path)
    found = output(model, kind)
    loaded = tcur.load_adapter(base(kind), tcur.save_adapter(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(output(loaded, kind), found)
    assert float((output(base(kind), kind) - found).norm() / found.norm()) > 0.01
    merged = output(tcur.remove(tcur.merge(loaded)), kind)
    assert float((merged - found).norm() / found.norm()) < 1e-5


@pytest.mark.filterwarnings("ignore:rounding to bfloat16")
def test_merged_in_bfloat16_agrees_as_far_as_bfloat16_goes(kind: str, tmp_path: Path) -> None:
    model = train(adapted(kind), kind, tmp_path).bfloat16()
    inputs = {n: v.bfloat16() if n == "pixel_values" else v for n, v in collate(examples(kind)).items()}

    def result() -> Tensor:
        with torch.no_grad():
            found = model.eval()(**inputs)
        return (found.logits if "logits" in found else torch.cat([found.text_embeds, found.image_embeds])).float()

    found = result()
    tcur.merge(model)
    assert float((result() - found).norm() / found.norm()) < 0.05


@pytest.mark.parametrize("kind", ["Llama", "GPT-2"])
def test_generation_is_the_same_trained_loaded_and_merged(kind: str, tmp_path: Path) -> None:
    model = train(adapted(kind), kind, tmp_path)
    loaded = tcur.load_adapter(base(kind), tcur.save_adapter(model, tmp_path / "adapter.safetensors"))
    merged = tcur.merge(copy.deepcopy(loaded))
    prompt = torch.stack([one["input_ids"][:3] for one in examples(kind)[:2]])

    def generate(from_: Any, **options: Any) -> Tensor:
        fixed = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
        return from_.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **fixed, **options)

    written = generate(model)
    assert written.shape == (2, 9)
    assert torch.equal(generate(model, use_cache=False), written)
    assert torch.equal(generate(loaded), written)
    assert torch.equal(generate(merged), written)
    assert not torch.equal(generate(base(kind)), written)
