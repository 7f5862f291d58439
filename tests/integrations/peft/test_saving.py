"""Adapters saved and loaded: the same output bit for bit, also in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNETR
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tcurlora_ext.integrations.peft import TcurLoraConfig

Same = Callable[[Tensor, Tensor], None]
Adapt = Callable[..., PeftModel]
MakeLlama = Callable[[], LlamaForCausalLM]

LOAD = """
import sys, torch
from peft import AutoPeftModelForCausalLM
{line}
folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
model = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter").eval()
with torch.no_grad():
    torch.save(model(torch.load(folder + "/tokens.pt")).logits, folder + "/logits.pt")
"""


def load_elsewhere(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", LOAD.format(line=line), str(folder), str(torch.get_num_threads())]
    return subprocess.run(arguments, capture_output=True, text=True)


def test_loaded_in_another_process_after_the_line_of_the_model_card(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same, tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    model = adapt(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    torch.save(tokens, tmp_path / "tokens.pt")

    card = (tmp_path / "adapter" / "README.md").read_text()
    line = card.rpartition("```python\n")[2].partition("\n")[0]
    done = load_elsewhere(tmp_path, line)
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(tmp_path / "logits.pt"), expected)

    assert "TCURLORA" in load_elsewhere(tmp_path, "").stderr  # without the line PEFT does not know the method

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert {p.requires_grad for name, p in loaded.named_parameters() if "tcurlora" in name} == {True}


@pytest.mark.parametrize("save_projection", [True, False, None])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_loaded_onto_the_same_base(
    make_llama: MakeLlama,
    tokens: Tensor,
    adapt: Adapt,
    assert_same: Same,
    tmp_path: Path,
    save_projection: bool | None,
    low_cpu_mem_usage: bool,
    safe_serialization: bool,
) -> None:
    model = adapt(make_llama(), save_projection=save_projection, selection="norm-sampled", seed=5)
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_same(loaded(tokens).logits, model(tokens).logits)
    assert not [name for name, tensor in loaded.state_dict().items() if tensor.is_meta]
    state = {name: tensor for name, tensor in model.state_dict().items() if "tcurlora" in name}
    for name, tensor in state.items():
        assert_same(loaded.state_dict()[name], tensor)


def test_the_checkpoint_holds_cores_indices_and_factors(make_llama: MakeLlama, adapt: Adapt, tmp_path: Path) -> None:
    model = adapt(make_llama(), rank_pattern={"down_proj": (3, 4)}, save_projection=True)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kinds = ("core", "rows", "columns", "col", "row", "scale")
    stacks = ("16x16", "8x16", "32x16", "16x32")
    assert set(saved) == {f"base_model.tcurlora_{kind}.{stack}" for kind in kinds for stack in stacks}
    shapes = {kind: tuple(saved[f"base_model.tcurlora_{kind}.16x32"].shape) for kind in kinds}
    assert shapes == {"core": (2, 3, 4), "rows": (4,), "columns": (3,), "col": (16, 6), "row": (8, 32), "scale": ()}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {"down_proj": [3, 4]}
    assert TcurLoraConfig.from_pretrained(tmp_path).rank_pattern == {"down_proj": (3, 4)}

    kinds = ("core", "rows", "columns", "scale", "fingerprint", "base_dtype")
    for save_projection in (False, None):
        model.peft_config["default"].save_projection = save_projection
        model.save_pretrained(tmp_path)
        small = load_file(tmp_path / "adapter_model.safetensors")
        assert set(small) == {f"base_model.tcurlora_{kind}.{stack}" for kind in kinds for stack in stacks}


def test_factors_that_another_loading_of_the_base_may_not_give_stay_in_the_file(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same, tmp_path: Path
) -> None:
    def has_factors(folder: Path) -> bool:
        return any("tcurlora_col." in key for key in load_file(folder / "adapter_model.safetensors"))

    adapt(make_llama(), save_projection=True).save_pretrained(tmp_path / "with")
    base = make_llama()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.q_proj.weight.mul_(1.1)
    elsewhere = PeftModel.from_pretrained(base, tmp_path / "with").eval()
    elsewhere.peft_config["default"].save_projection = None
    elsewhere.save_pretrained(tmp_path / "elsewhere")
    assert has_factors(tmp_path / "elsewhere")
    saved = load_file(tmp_path / "elsewhere" / "adapter_model.safetensors")
    assert not any(key.endswith("tcurlora_col.16x32") for key in saved)  # down_proj's weights are the same
    for layer in (fresh := make_llama()).model.layers:
        layer.self_attn.q_proj.weight.data.mul_(1.1)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "elsewhere").eval()
    assert_same(loaded(tokens).logits, elsewhere(tokens).logits)


def test_the_model_card_has_the_size_of_the_file(make_llama: MakeLlama, adapt: Adapt, tmp_path: Path) -> None:
    model = adapt(make_llama())
    for save_projection in (True, None):
        model.peft_config["default"].save_projection = save_projection
        model.save_pretrained(tmp_path)
        size = (tmp_path / "adapter_model.safetensors").stat().st_size
        assert (tmp_path / "README.md").read_text().count(" bytes") == 1
        assert f"`adapter_model.safetensors`: {size:,} bytes" in (tmp_path / "README.md").read_text()


def test_with_factors_it_loads_onto_other_base_weights_without_them_it_is_refused(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, tmp_path: Path
) -> None:
    def other() -> LlamaForCausalLM:
        model = make_llama()
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight[3, 4] += 0.01
        return model

    for save_projection in (True, False):
        adapt(make_llama(), save_projection=save_projection).save_pretrained(tmp_path / str(save_projection))
    PeftModel.from_pretrained(other(), tmp_path / "True")(tokens)
    with pytest.raises(ValueError, match=r"stack 16x16: trained on other base weights: 1 of 4 .*layers\.1.*q_proj"):
        PeftModel.from_pretrained(other(), tmp_path / "False")


def test_indices_alone_load_onto_the_same_base_in_half_precision(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, tmp_path: Path
) -> None:
    model = adapt(make_llama(), save_projection=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama().to(torch.bfloat16), tmp_path)
    torch.testing.assert_close(loaded(tokens).logits.float(), model(tokens).logits, rtol=0.05, atol=0.02)


def test_a_merged_model_saves_the_adapter_of_its_own_base(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same, tmp_path: Path
) -> None:
    model = adapt(make_llama(), save_projection=False)
    expected = model(tokens).logits
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(make_llama(), tmp_path).eval()(tokens).logits, expected)


def test_several_adapters_in_one_folder(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same, tmp_path: Path
) -> None:
    model = adapt(make_llama())
    model.add_adapter("second", TcurLoraConfig(r=3, init_weights=False))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "second", adapter_name="mine").eval()
    loaded.load_adapter(tmp_path, "other")
    for here, there in (("default", "other"), ("second", "mine")):
        model.set_adapter(here)
        loaded.set_adapter(there)
        assert_same(loaded(tokens).logits, model(tokens).logits)


def test_modules_to_save_and_biases_are_in_the_checkpoint(
    make_unetr: Callable[[], UNETR], adapt: Adapt, assert_same: Same, tmp_path: Path
) -> None:
    volume = torch.randn(1, 1, 16, 16, 16)
    model = adapt(make_unetr(), modules_to_save=["out"], bias="tcurlora_only")
    head = {name for name, p in model.named_parameters() if p.requires_grad and ".out." in name}
    assert head == {f"base_model.model.out.modules_to_save.default.conv.conv.{part}" for part in ("weight", "bias")}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(make_unetr(), tmp_path).eval()(volume), model(volume))


def test_a_core_of_another_shape_is_refused(make_llama: MakeLlama, adapt: Adapt, tmp_path: Path) -> None:
    adapt(make_llama()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    state["base_model.tcurlora_core.16x16"] = torch.zeros(4, 3, 3)
    save_file(state, path)
    with pytest.raises(RuntimeError, match=r"16x16.core: .*\[4, 3, 3\].*\[4, 2, 2\]"):
        PeftModel.from_pretrained(make_llama(), tmp_path)
