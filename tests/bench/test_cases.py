"""The registry: what is measured is what the models have."""

from __future__ import annotations

import torch
from monai.networks.nets import UNETR as Unetr
from torch import nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.model.targets import find_targets, group
from tcurlora_ext.bench.cases import LLAMA_3_8B, LLAMA_7B, SETS, UNETR, Layer, every, networks
from tcurlora_ext.bench.networks import _BUILDERS, build


def stacks_of(model: nn.Module) -> set[tuple[int, int, int, int]]:
    """(in, out, slices of a layer, slices of its stack) of what tCUR adapts by default."""
    found = set()
    for members in group(find_targets(model, TCURConfig()), TCURConfig()).values():
        height = sum(target.slices for target in members)
        found |= {(target.shape[1], target.shape[0], target.slices, height) for target in members}
    return found


def sizes(layers: tuple[Layer, ...]) -> set[tuple[int, int, int, int]]:
    return {(layer.in_features, layer.out_features, layer.slices, layer.stack) for layer in layers}


def test_unetrs_layers_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = Unetr(in_channels=1, out_channels=3, img_size=(128, 128, 128))
    assert sizes(UNETR) == stacks_of(model)


def test_llamas_layers_are_those_of_the_models() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    common = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 8}
    for layers, heads, wide in ((LLAMA_7B, 32, 11008), (LLAMA_3_8B, 8, 14336)):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=heads, intermediate_size=wide, **common))
        assert sizes(layers) == stacks_of(model)


def test_a_set_has_no_case_twice_and_every_case_has_a_network() -> None:
    for make in SETS.values():
        cases = make()
        assert len({(case.id, case.sweep, case.layer) for case in cases}) == len(cases) > 5
    assert {case.network for case in every()} == set(_BUILDERS)


def test_networks_have_the_layers_of_their_models_and_what_trains_beside() -> None:
    """Twelve blocks of qkv, out_proj, linear1 and linear2; q, k, v, o, gate, up and down of one block of 32."""
    built = {case.network: build(case, torch.device("meta")) for case in networks() if case.network != "stack"}
    found = {name: (len(network.targets), network.repeats) for name, network in built.items()}
    assert found == {"encoder": (48, 1), "llama block": (7, 32), "unetr step": (48, 1)}
    step = built["unetr step"]
    names = [name for name, _ in step.module.named_parameters()]
    for prefix in step.trained:
        assert any(name.startswith(prefix) for name in names), prefix
    assert not any(name.startswith(step.trained) for name in step.targets)
