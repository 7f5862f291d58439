"""Adapt a causal language model to new text with PEFT and transformers' Trainer, by tCUR and for comparison by LoRA.

    python examples/llama_peft.py                                             # a small model, nothing downloaded
    python examples/llama_peft.py --model Qwen/Qwen2.5-0.5B --text NOTES.txt

Without --model, the script first trains a small byte-level Llama on the sources of Python's standard library. Without
--text, the new text is the C++ headers of PyTorch. It prints bits per byte on held-out new text before and after
training by each method, with the number of trained parameters, then the same for the tCUR adapter loaded from its
folder, and a text that the loaded model generates.
Needs transformers, accelerate and peft.
"""

from __future__ import annotations

import argparse
import math
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers import logging as transformers_logging

from tcurlora_ext.integrations.peft import TcurLoraConfig  # registers the method with PEFT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the device that Trainer uses, too
Window = dict[str, list[int]]


def read_files(files: Iterable[Path], limit: int) -> str:
    """The text of the files in shuffled order, up to `limit` characters."""
    order = sorted(files)
    random.Random(0).shuffle(order)
    text = ""
    while order and len(text) < limit:
        text += order.pop().read_text(encoding="utf-8", errors="replace")
    return text[:limit]


def windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[Window]:
    """Consecutive windows of `length` tokens; tokens that do not fill a last window are dropped."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    runs = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return [{"input_ids": run, "labels": run} for run in runs]


def train(model: nn.Module, data: list[Window], steps: int, rate: float, options: argparse.Namespace) -> None:
    """Train with transformers' Trainer; every call has the data in the same order."""
    arguments = TrainingArguments(
        str(options.output), max_steps=steps, per_device_train_batch_size=options.batch, learning_rate=rate,
        lr_scheduler_type="cosine", logging_steps=50, save_strategy="no", report_to=[], seed=0,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator).train()


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: list[Window], tokenizer: PreTrainedTokenizerBase) -> float:
    """The loss in bits per byte of text, which is comparable between tokenizers."""
    model.eval()
    bits, size = 0.0, 0
    for start in range(0, len(data), 16):
        ids = torch.tensor([window["input_ids"] for window in data[start : start + 16]], device=DEVICE)
        bits += model(input_ids=ids, labels=ids).loss.item() / math.log(2) * ids[:, 1:].numel()
        size += sum(len(text.encode()) for text in tokenizer.batch_decode(ids[:, 1:]))
    return bits / size


def small_base(folder: Path, options: argparse.Namespace) -> str:
    """Train a byte-level Llama on the standard library's sources and save it in the hub's format."""
    tokenizer = ByT5Tokenizer()  # one token per byte, no vocabulary file
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=4, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text = read_files(Path(sysconfig.get_path("stdlib")).glob("*.py"), options.characters)
    print(f"pretraining on {len(text):,} characters of Python")
    model = LlamaForCausalLM(config)
    train(model, windows(tokenizer, text, options.length), options.pretrain_steps, 3e-3, options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Prepare the base model and the text, adapt by each method, save, load, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model on the hub or in a folder")
    parser.add_argument("--text", type=Path, help="a text file to adapt to; its end is held out")
    parser.add_argument("--output", type=Path, default=Path("runs/llama"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of the adapters")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens per window")
    parser.add_argument("--characters", type=int, default=1_000_000, help="how much text to read")
    parser.add_argument("--pretrain-steps", type=int, default=500)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", default="  // The ")
    options = parser.parse_args()
    if options.text is not None and not options.text.is_file():
        parser.error(f"--text {options.text}: no such file")
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)

    name = options.model or small_base(options.output / "base", options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        parser.error(f"--model {name}: {error}")
    if options.text is None:
        text = read_files((Path(torch.__file__).parent / "include").rglob("*.h"), options.characters)
    else:
        text = options.text.read_text(encoding="utf-8", errors="replace")[: options.characters]
    data = windows(tokenizer, text, options.length)
    count = min(len(data) // 10, 512)
    if count == 0:
        parser.error(f"found {len(data)} windows of {options.length} tokens in the text, expected at least 10")
    new, held_out = data[:-count], data[-count:]

    configs: dict[str, PeftConfig] = {
        "LoRA": LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        "tCUR": TcurLoraConfig(r=options.rank, task_type="CAUSAL_LM"),
    }
    table = Table("method", "trained parameters", "held-out bits per byte")
    for method, config in configs.items():
        base = AutoModelForCausalLM.from_pretrained(name).to(DEVICE)
        if not table.rows:
            table.add_row("before", "0", f"{bits_per_byte(base, held_out, tokenizer):.3f}")
        model = get_peft_model(base, config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        train(model, new, options.steps, options.rate, options)
        after = bits_per_byte(model, held_out, tokenizer)
        table.add_row(method, f"{trained:,}", f"{after:.3f}")
        model.save_pretrained(options.output / method.lower())

    loaded = AutoPeftModelForCausalLM.from_pretrained(options.output / "tcur").to(DEVICE)  # onto the same base
    table.add_row("tCUR, loaded", "", f"{bits_per_byte(loaded, held_out, tokenizer):.3f}")
    prompt = tokenizer(options.prompt, return_tensors="pt", add_special_tokens=False).to(DEVICE)
    written = loaded.generate(**prompt, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    Console().print(table)
    print(f"it writes: {tokenizer.decode(written[0], skip_special_tokens=True)!r}")
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main()
