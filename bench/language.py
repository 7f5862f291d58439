"""A small language model adapted to new text: learned factors beside LoRA, by perplexity and trained parameters.

A Llama over bytes is pretrained on English, the docstrings of SciPy. What it is adapted to is program code, from
packages that are installed with the tests: 96 KiB of a package that it has not seen, scored on other files of it. The
subspace of the carried forms is learned on a mixture of three other texts. The learning rate of every form is the best
of three on yet another package.

    python -m tcurlora_ext.bench.language WORK RESULTS [--seeds 3]

A run that was stopped resumes when it is started again.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.io.records import read_csv, write_csv
from tcurlora_ext.io.tensors import read_weights
from tcurlora_ext.segmentation.networks import target_layers
from tcurlora_ext.segmentation.training import rise_and_cosine

from .devices import provenance
from .entry import run_command
from .reading.language import NEW

WINDOW, BATCH = 128, 8
PRETRAIN_STEPS, PRETRAIN_LR = 1500, 3e-3
STEPS, WARM_UP, FAMILY_STEPS = 100, 60, 240
RATES = (3e-3, 1e-2, 3e-2)
TRAIN_BYTES, TEST_BYTES, FAMILY_BYTES = 96 << 10, 64 << 10, 512 << 10
ENGLISH = "scipy"
# Text of a family: the package, the suffix of its files.
FAMILY = (("torch", ".h"), ("sympy", ".py"), ("numpy", ".pyi"))
CHOICE = "monai"
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": WINDOW, "tie_word_embeddings": True,
}  # fmt: skip

Step = Callable[[nn.Module], Tensor]
Adapt = Callable[[nn.Module, Step, int], None]


@dataclass(frozen=True)
class Text:
    """Bytes of some files to train on, and of others to score, (n,) uint8 each."""

    train: Tensor
    test: Tensor


def read_files(package: str, suffix: str) -> Iterator[str]:
    """The files of an installed package with this suffix, in an order that mixes its folders, the same each time."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed, whose files are the text")
    paths = sorted(Path(spec.submodule_search_locations[0]).rglob(f"*{suffix}"))
    for index in np.random.default_rng(0).permutation(len(paths)):
        yield paths[index].read_text(encoding="utf-8", errors="replace")


def docstrings(source: str) -> str:
    """All docstrings of a Python file, one after another."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(filter(None, found))


def first_bytes(parts: Iterator[str], count: int) -> Tensor:
    """The first bytes of texts one after another, (count,) uint8. ValueError where there are fewer."""
    taken = bytearray()
    while len(taken) < count:
        part = next(parts, None)
        if part is None:
            raise ValueError(f"found {len(taken):,} bytes of text, expected {count:,}")
        taken += part.encode()
    return torch.tensor(list(taken[:count]), dtype=torch.uint8)


def code_of(package: str) -> Text:
    """A package's Python code, without what is left of the last training file."""
    files = read_files(package, ".py")
    return Text(first_bytes(files, TRAIN_BYTES), first_bytes(files, TEST_BYTES))


def loss_step(text: Tensor, seed: int, batch: int = BATCH) -> Step:
    """A function that draws windows of a text and returns a model's mean loss in nats per byte."""
    rng = np.random.default_rng(seed)

    def step(model: nn.Module) -> Tensor:
        starts = torch.from_numpy(rng.integers(0, len(text) - WINDOW, batch))
        ids = text[starts[:, None] + torch.arange(WINDOW)].long()
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return step


def train(model: nn.Module, step: Step, steps: int, lr: float) -> None:
    """Adam on what requires gradients, over a linear rise in a twentieth of the steps and a half cosine to 0."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for index in range(steps):
        optimizer.param_groups[0]["lr"] = lr * rise_and_cosine(index, steps)
        optimizer.zero_grad()
        step(model).backward()
        optimizer.step()


@torch.no_grad()
def score(model: nn.Module, text: Tensor) -> float:
    """The mean loss in nats per byte over all whole windows of a text."""
    windows = text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW).long()
    losses = [float(model.eval()(input_ids=ids, labels=ids).loss) * len(ids) for ids in windows.split(64)]
    return sum(losses) / len(windows)


def new_model() -> nn.Module:
    """The language model with random weights, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES))


def base_model(path: Path) -> nn.Module:
    """The pretrained language model."""
    model = new_model()
    model.load_state_dict(read_weights(path), strict=False)  # the head is the embedding
    return model.requires_grad_(False)


def pretrain(path: Path, steps: int) -> None:
    """Train the language model on docstrings, and write its weights."""
    from safetensors.torch import save_model

    english = first_bytes(map(docstrings, read_files(ENGLISH, ".py")), 3 << 20)
    model = new_model()
    train(model, loss_step(english, 0, 2 * BATCH), steps, PRETRAIN_LR)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))


def family_subspace(base: Path, path: Path) -> None:
    """Learn a subspace on the texts of the family, which take turns, and write it."""
    texts = [first_bytes(read_files(package, suffix), FAMILY_BYTES) for package, suffix in FAMILY]
    steps = [loss_step(text, seed) for seed, text in enumerate(texts)]
    tcur.learn_factors(base_model(base), tcur.TCURConfig.preset("learned", rank=16), steps, FAMILY_STEPS).save(path)


def of_lora(rank: int, model: nn.Module, step: Step, seed: int) -> None:
    """PEFT's LoRA in the layers that the other forms adapt, with lora_alpha = rank."""
    from peft import LoraConfig, inject_adapter_in_model

    del step
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=target_layers(model)), model)


def of_config(config: tcur.TCURConfig, model: nn.Module, step: Step, seed: int) -> None:
    """Columns and rows of the weights."""
    del step, seed
    tcur.inject(model, config)


def of_learned(rank: int, model: nn.Module, step: Step, seed: int) -> None:
    """Factors learned on the text itself."""
    del seed
    subspace = tcur.learn_factors(model, tcur.TCURConfig.preset("learned", rank=rank), step, WARM_UP)
    tcur.inject(model, subspace=subspace)


def of_carried(path: Path, rank: int, model: nn.Module, step: Step, seed: int) -> None:
    """Factors learned on other texts."""
    del step, seed
    tcur.inject(model, tcur.TCURConfig.preset("learned", rank=rank), subspace=tcur.Subspace.load(path))


def of_full(model: nn.Module, step: Step, seed: int) -> None:
    """All weights."""
    del step, seed
    model.requires_grad_(True)


def forms(subspace: Path) -> dict[str, Adapt]:
    """How every form of the table adapts a model, by its name there."""
    light, paper = tcur.TCURConfig.preset("light", rank=8), tcur.TCURConfig.preset("paper")
    return {
        **{f"LoRA r={rank}": partial(of_lora, rank) for rank in (1, 2, 4, 8)},
        "paper's stacks r=8": partial(of_config, paper),
        "a core for each layer, columns and rows r=8": partial(of_config, light),
        "a core for each layer, columns and rows r=32": partial(of_config, tcur.TCURConfig.preset("light")),
        "learned r=8": partial(of_learned, 8),
        **{f"carried r={rank}": partial(of_carried, subspace, rank) for rank in (16, 8, 4)},
        "full fine-tuning": of_full,
    }


def run(base: Path, adapt: Adapt, text: Text, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Adapt the model to a text and score it on the text's other files."""
    model, step = base_model(base), loss_step(text.train, 1000 + seed)
    adapt(model, step, seed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if steps:
        train(model, step, steps, lr)
    loss = score(model, text.test)
    return {"lr": lr, "seed": seed, "steps": steps, "trained_parameters": trained, "loss": loss}


def compare(work: Path, seeds: int, steps: int, pretrain_steps: int) -> list[dict[str, Any]]:
    """One row per run: of the choice of learning rates, and of the table."""
    base, subspace, path = work / "base.safetensors", work / "family.safetensors", work / "runs.csv"
    if not base.is_file():
        pretrain(base, pretrain_steps)
    if not subspace.is_file():
        family_subspace(base, subspace)
    rows: list[dict[str, Any]] = [dict(row) for row in read_csv(path)] if path.is_file() else []
    known = {(row["text"], row["form"], float(row["lr"]), int(row["seed"])): row for row in rows}

    def once(name: str, form: str, adapt: Adapt, text: Text, taken: int, lr: float, seed: int) -> dict[str, Any]:
        at = (name, form, lr, seed)
        if at not in known:
            warm_up = WARM_UP if form.startswith("learned") else 0
            known[at] = {"text": name, "form": form, "warm_up_steps": warm_up} | run(base, adapt, text, taken, lr, seed)
            rows.append(known[at])
            write_csv(path, rows)
        return known[at]

    choice, new = code_of(CHOICE), code_of(NEW)
    once(NEW, "base, not adapted", of_nothing, new, 0, 0.0, 0)
    for form, adapt in forms(subspace).items():
        tried = [once(CHOICE, form, adapt, choice, steps, lr, 0) for lr in RATES]
        best = min(tried, key=lambda row: float(row["loss"]))
        for seed in range(seeds):
            row = once(NEW, form, adapt, new, steps, float(best["lr"]), seed)
        if form == "LoRA r=8":
            for seed in range(seeds):
                once(NEW, f"{form}, {steps + WARM_UP} steps", adapt, new, steps + WARM_UP, float(best["lr"]), seed)
        typer.echo(
            f"{form}: {int(row['trained_parameters']):,} trained parameters, {float(row['loss']):.4f} nats per byte"
        )
    return rows


def of_nothing(model: nn.Module, step: Step, seed: int) -> None:
    """Nothing is adapted."""
    del model, step, seed


def language(
    work: Annotated[
        Path, typer.Argument(metavar="WORK", help="Folder for the pretrained model, the subspace and runs.")
    ],
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Gets language.csv.")],
    seeds: Annotated[int, typer.Option(help="Runs per form.")] = 3,
    steps: Annotated[int, typer.Option(help="Of adapting.")] = STEPS,
    pretrain_steps: Annotated[int, typer.Option(help="Of pretraining.")] = PRETRAIN_STEPS,
) -> None:
    """Adapt a small language model to program code by learned factors, LoRA and the paper's stacks."""
    rows = compare(work, seeds, steps, pretrain_steps)
    origin = provenance(torch.device("cpu"))
    write_csv(results / "language.csv", [{**row, **origin} for row in rows])
    typer.echo(f"written to {results / 'language.csv'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(language, arguments, "python -m tcurlora_ext.bench.language")


if __name__ == "__main__":
    sys.exit(main())
