"""PEFT's own tests pass for this method.

They come from the source distribution of the installed version, are unpacked into a temporary folder and run there with
our cases in the place of theirs. Nothing of PEFT's code lies in this project.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tcurlora_ext

pytestmark = pytest.mark.slow

VERSION = importlib.metadata.version("peft")

# Imported at the top of PEFT's tests, used by none of those that run here.
STUBS = {
    "datasets": "def load_dataset(*_, **__):\n    raise OSError('these tests run without data sets')\n",
    "diffusers": "class StableDiffusionPipeline:\n    pass\n",
}

CASES = '''
"""Our cases, in the form that each of PEFT's test files has its own in."""
import dataclasses
import pathlib
from tcurlora_ext.integrations.peft import TcurLoraConfig

HERE = pathlib.Path(__file__).parent


def models(kind):
    return sorted(str(path) for path in HERE.joinpath(kind).iterdir())


@dataclasses.dataclass
class WithFactors(TcurLoraConfig):
    """For tests that load an adapter onto other random weights, which takes C and R in its file."""

    save_projection: bool = True


CUSTOM = [
    ("tCURLoRA one layer, regex", "MLP", TcurLoraConfig, {"target_modules": "lin0", "r": 2}),
    ("tCURLoRA two stacks", "MLP", TcurLoraConfig, {"target_modules": ["lin0", "lin1"], "r": 2}),
    (
        "tCURLoRA modules_to_save",
        "MLP",
        TcurLoraConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "r": (3, 2), "scale": 1.0},
    ),
    (
        "tCURLoRA indices only, dropout",
        "MLP",
        TcurLoraConfig,
        # Coupled slices: with one core a layer, FSDP with a trained bias computes the ordinary form before saving and
        # the riding form after loading, and the suite compares them more closely than they round.
        {
            "target_modules": ["lin0"],
            "split_fused": {"lin0": 4},
            "r": 2,
            "save_projection": False,
            "core_domain": "slice",
            "dropout": 0.1,
            "rank_stabilised": True,
        },
    ),
    (
        "tCURLoRA fused rows",
        "MLP",
        TcurLoraConfig,
        {"target_modules": ["lin0", "lin1"], "r": 1, "split_fused": {"lin0": 4, "lin1": 2}, "transform": "identity"},
    ),
    (
        "tCURLoRA budget, low frequencies",
        "MLP",
        TcurLoraConfig,
        {"target_modules": ["lin0", "lin1"], "budget": 20, "split_fused": {"lin0": 4}, "frequencies": 2},
    ),
    (
        "tCURLoRA transformers Conv1D, trainable tokens",
        "EmbConv1D",
        TcurLoraConfig,
        {"target_modules": ["conv1d"], "r": 1, "alpha": 4.0, "trainable_token_indices": {"emb": [0, 10]}},
    ),
]

TWO_ADAPTERS = [
    (
        f"tCURLoRA {name}",
        "tcurlora",
        TcurLoraConfig,
        {"target_modules": ["lin0"], "r": 2, "init_weights": False},
        {"target_modules": [second], "r": 2, "init_weights": False},
    )
    for name, second in (("Same", "lin0"), ("Different", "lin1"))
]


def by_stack(task):
    """One core per stack, and one per layer: the test of layers_to_transform expects fewer tensors for fewer layers."""
    common = {"task_type": task, "target_modules": None, "r": 2}
    return [(TcurLoraConfig, common | {"stack_by": "shape"}), (TcurLoraConfig, common | {"stack_by": "none"})]
'''

# file -> (a line of it, what is set before that line)
INJECTED = {
    "test_custom_models.py": [
        ("ALL_PEFT_CONFIG_CLASSES = ", "TEST_CASES[:] = tcurlora_cases.CUSTOM"),
        ("def _skip_tests_with", "ALL_PEFT_CONFIG_CLASSES[:] = [tcurlora_cases.WithFactors]"),
        ("def _skip_tests_with", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = tcurlora_cases.TWO_ADAPTERS"),
    ],
    "test_decoder_models.py": [
        ("def _skip_if_not_conv1d", "ALL_CONFIGS[:] = tcurlora_cases.by_stack('CAUSAL_LM')"),
        ("def _skip_if_not_conv1d", "PEFT_DECODER_MODELS_TO_TEST[:] = tcurlora_cases.models('decoders')"),
    ],
    "test_feature_extraction_models.py": [
        ("def skip_non_prompt", "ALL_CONFIGS[:] = tcurlora_cases.by_stack('FEATURE_EXTRACTION')"),
        ("def skip_non_prompt", "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = tcurlora_cases.models('encoders')"),
    ],
}


def fetch(folder: Path) -> Path | None:
    """The source distribution of the installed PEFT, fetched into a folder; None where no registry is reachable."""
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "peft"]
    done = subprocess.run(
        [sys.executable, *command, "--dest", str(folder), f"peft=={VERSION}"], capture_output=True, text=True
    )
    return next(folder.glob("peft-*.tar.gz"), None) if done.returncode == 0 else None


def unpack(archive: Path, folder: Path) -> None:
    """PEFT's tests as a package ``tests`` in the folder, with our cases, and the modules they import."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if re.fullmatch(r"peft-[^/]*/tests/[^/]*\.py", member.name):
                content = tar.extractfile(member)
                assert content is not None
                path = folder / "tests" / Path(member.name).name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content.read())
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "tcurlora_cases.py").write_text(CASES)
    for name, code in STUBS.items():
        (folder / f"{name}.py").write_text(code)
    for name, insertions in INJECTED.items():
        path = folder / "tests" / name
        text = path.read_text()
        for line, statement in insertions:
            assert text.count("\n" + line) == 1, f"{name} of peft {VERSION} has no single line {line!r}"
            text = text.replace("\n" + line, f"\nimport tcurlora_cases; {statement}\n{line}")
        path.write_text(text)


def save_tiny_models(folder: Path) -> None:
    """Save random models of transformers, of a few thousand parameters each, where our cases look for them."""
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped = tiny | {"num_key_value_heads": 2, "vocab_size": 64}
    conv1d = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    models = {
        "decoders/tiny-random-LlamaForCausalLM": LlamaForCausalLM(LlamaConfig(**grouped)),
        # Under another name than GPT-2's, whose Conv1D tests PEFT skips for most methods.
        "decoders/tiny-random-Conv1D": GPT2LMHeadModel(GPT2Config(**conv1d)),
        "encoders/tiny-random-BertModel": BertModel(BertConfig(vocab_size=64, **tiny)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)


def run(folder: Path, name: str, *arguments: str) -> tuple[dict[str, int], str]:
    """Run one of PEFT's test files without a network: counts by outcome ("passed", "failed", ...), and the output."""
    own = Path(tcurlora_ext.__file__).parents[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{folder}{os.pathsep}{own}"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/{name}", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout[-400:])}
    return counts, done.stdout + done.stderr


# Of the configurations in CASES the one by layer is for the test that needs it, the one by shape for all others.
BY_LAYER = "tcur and (config_kwargs0 and not layer_indexing or config_kwargs1 and layer_indexing)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upstream")
    archive = fetch(folder)
    if archive is None:
        pytest.skip(f"the source distribution of peft {VERSION}, with its tests, could not be downloaded")
    unpack(archive, folder)
    save_tiny_models(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "selected", "least"),
    [
        ("test_custom_models.py", "tcur", 300),
        ("test_decoder_models.py", BY_LAYER, 50),
        ("test_feature_extraction_models.py", BY_LAYER, 14),
    ],
    ids=["custom models", "decoders", "feature extraction"],
)
def test_suite(folder: Path, name: str, selected: str, least: int) -> None:
    counts, output = run(folder, name, "-k", selected)
    assert set(counts) <= {"passed", "skipped"}, output[-8000:]
    # A renamed test class or parameter would leave nothing to run, and nothing to fail.
    assert counts["passed"] >= least, output[-8000:]
