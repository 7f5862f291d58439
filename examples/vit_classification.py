"""Adapt transformers' ViT classifier to new images: by training its head alone, by LoRA and by tCUR.

    python examples/vit_classification.py                                  # scikit-learn's digits, nothing downloaded
    python examples/vit_classification.py --model google/vit-base-patch16-224-in21k --images FOLDER

FOLDER has one folder of images per class. Without it, the script first trains a small ViT on one half of the digits;
the new images are the other half, rotated by 90 degrees and inverted. It prints held-out accuracy before and after
training by each method, with the number of trained parameters, and then how the outputs of the adapter loaded from its
file, and of the merged model, differ from those of the trained model.
Needs transformers, peft and pillow, and scikit-learn for the digits.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import tcurlora_ext as tcur

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Samples = tuple[Tensor, Tensor]  # pixel values (N, 3, height, width) and labels (N)


def prepared(processor: ViTImageProcessor, images: list[Image.Image], labels: list[int]) -> Samples:
    """Images resized and normalised as in the model's pretraining, with their labels."""
    rgb = [image.convert("RGB") for image in images]
    return processor(rgb, return_tensors="pt")["pixel_values"], torch.tensor(labels)


def image_folder(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and class names of FOLDER/CLASS/IMAGE. Raises ValueError for a folder without this structure."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise ValueError(f"--images {folder}: found {len(classes)} folders in it, expected one per class, at least two")
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{folder / name}: found no images, expected some of {', '.join(SUFFIXES)}")
        files += found
        labels += [number] * len(found)
    return files, labels, classes


def split(samples: Samples) -> tuple[Samples, Samples]:
    """Split samples at random into two thirds for training and one third held out."""
    order = torch.randperm(len(samples[1]), generator=torch.Generator().manual_seed(0))
    held_out, kept = order.tensor_split([len(order) // 3])
    return (samples[0][kept], samples[1][kept]), (samples[0][held_out], samples[1][held_out])


def train(model: nn.Module, samples: Samples, steps: int, rate: float, batch: int) -> None:
    """Train the parameters that require a gradient by AdamW; every call draws the same batches."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(samples[1]), (batch,), generator=generator)
        model(samples[0][chosen].to(DEVICE), labels=samples[1][chosen].to(DEVICE)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def logits(model: nn.Module, samples: Samples) -> Tensor:
    """The logits (N, classes), on the CPU."""
    return torch.cat([model.eval()(part.to(DEVICE)).logits.cpu() for part in samples[0].split(64)])


def accuracy(model: nn.Module, samples: Samples) -> str:
    """The accuracy in per cent, as text."""
    return f"{100 * (logits(model, samples).argmax(-1) == samples[1]).float().mean().item():.1f}"


def small_base(old: Samples, steps: int, batch: int) -> ViTForImageClassification:
    """Train a small ViT on unchanged digits."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_labels=10, **sizes)).to(DEVICE)
    seen, held_out = split(old)
    train(model, seen, steps, 1e-3, batch)
    print(f"pretrained on {len(seen[1])} digits; accuracy on held-out digits: {accuracy(model, held_out)} %")
    return model


def main() -> None:
    """Prepare the base model and the images, adapt by each method, save, load, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a ViT on the hub or in a folder; needs --images")
    parser.add_argument("--images", type=Path, help="a folder with one folder of images per class; needs --model")
    parser.add_argument("--output", type=Path, default=Path("runs/vit"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    options = parser.parse_args()
    torch.manual_seed(0)
    if (options.model is None) != (options.images is None):
        parser.error("found one of --model and --images, expected both, or neither for the digits")
    if options.images is None:
        processor = ViTImageProcessor(size={"height": 8, "width": 8})
        values, labels = load_digits(return_X_y=True)
        grey = (values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        half = len(grey) // 2
        turned = 255 - np.rot90(grey[half:], axes=(1, 2))
        base = small_base(
            prepared(processor, [Image.fromarray(image) for image in grey[:half]], labels[:half].tolist()),
            options.pretrain_steps,
            options.batch,
        )
        base.save_pretrained(options.output / "base")
        processor.save_pretrained(options.output / "base")
        new = prepared(processor, [Image.fromarray(image) for image in turned], labels[half:].tolist())
    else:
        try:
            files, numbers, classes = image_folder(options.images)
            processor = AutoImageProcessor.from_pretrained(options.model)
            base = AutoModelForImageClassification.from_pretrained(  # with a new head for other classes
                options.model, id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True
            ).to(DEVICE)
            new = prepared(processor, [Image.open(file) for file in files], numbers)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    seen, held_out = split(new)

    head = copy.deepcopy(base).requires_grad_(False)
    head.classifier.requires_grad_(True)
    model = tcur.inject(copy.deepcopy(base), tcur.TCURConfig(rank=options.rank))
    tcur.unfreeze(model, "classifier")
    same_layers = [name for name, layer in model.named_modules() if isinstance(layer, tcur.TCURLinear)]
    lora_config = LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules=same_layers, modules_to_save=["classifier"]
    )
    lora = get_peft_model(copy.deepcopy(base), lora_config)
    table = Table("method", "trained parameters", "held-out accuracy, %")
    table.add_row("before", "0", accuracy(base, held_out))
    for name, adapted in {"head alone": head, "LoRA and head": lora, "tCUR and head": model}.items():
        train(adapted, seen, options.steps, options.rate, options.batch)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        table.add_row(name, f"{trained:,}", accuracy(adapted, held_out))

    tcur.save_adapter(model, options.output / "adapter.safetensors")  # cores, indices and the head
    loaded = copy.deepcopy(base)
    tcur.load_adapter(loaded, options.output / "adapter.safetensors")
    expected, found = logits(model, held_out), logits(loaded, held_out)
    tcur.remove(tcur.merge(loaded))  # in place, a plain ViT again
    loaded.save_pretrained(options.output / "merged")
    difference = (logits(loaded, held_out) - expected).norm() / expected.norm()
    Console().print(table)
    print(f"loaded equals trained: {torch.equal(found, expected)}; merged differs by {difference:.0e} of the logits")
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main()
