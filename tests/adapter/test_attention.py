"""``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, whose adapted projections are called in every mode."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.attention import TCURMultiheadAttention

FORMS: list[dict[str, Any]] = [
    {}, {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 10, "bias": False},
]  # fmt: skip


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, **options).double()


CONFIG = tcur.TCURConfig(rank=2, target_modules=r".*proj.*")


def adapted(plain: nn.Module, config: tcur.TCURConfig = CONFIG) -> tuple[nn.Module, nn.Module]:
    """A model with trained cores, and the plain model with W + dW."""
    model = tcur.inject(copy.deepcopy(plain), config)
    torch.manual_seed(1)
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(0.3 * torch.randn(stack.slices, *stack.rank))
    return model, tcur.remove(tcur.merge(copy.deepcopy(model)))


def masks(batched: bool, queries: int, keys: int) -> list[dict[str, Any]]:
    """Masks of all kinds, and none."""
    padding = torch.zeros(2, keys, dtype=torch.bool)
    padding[0, -1] = True
    padding = padding if batched else padding[0]
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    per_head = torch.randn(4 if batched else 2, queries, keys, dtype=torch.float64)
    return [
        {}, {"key_padding_mask": padding}, {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "key_padding_mask": padding}, {"attn_mask": per_head},
        {"attn_mask": per_head[0], "key_padding_mask": -2 * padding.double()},
    ]  # fmt: skip


@pytest.mark.parametrize("options", FORMS, ids=["plain", "added", "other_sizes"])
@pytest.mark.parametrize("training", [False, True])
def test_it_computes_what_the_plain_module_does_with_w_plus_dw(options: dict[str, Any], training: bool) -> None:
    plain = Attention(**options)
    for model, expected in ((tcur.inject(copy.deepcopy(plain), CONFIG), plain), adapted(plain)):
        model.train(training), expected.train(training)
        for batched, itself, need, average in itertools.product((True, False), repeat=4):
            if itself and "kdim" in options:
                continue
            queries, keys = (4, 4) if itself else (4, 5)
            leads = [((2, n) if "batch_first" in options else (n, 2)) if batched else (n,) for n in (queries, keys)]
            sizes = (8, options.get("kdim", 8), options.get("vdim", 8))
            query = torch.randn(*leads[0], 8, dtype=torch.float64)
            key, value = (torch.randn(*leads[1], size, dtype=torch.float64) for size in sizes[1:])
            given = (query, query, query) if itself else (query, key, value)
            for mask in masks(batched, queries, keys):
                named = {"need_weights": need, "average_attn_weights": average, **mask}
                with torch.no_grad():
                    assert_close(model.attention(*given, **named), expected.attention(*given, **named))


def test_gradients_are_those_of_the_dense_definition() -> None:
    model, _ = adapted(Attention(dropout=0.0))
    x = torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True)
    cores = [stack.core for stack in tcur.stacks(model).values()]
    found = torch.autograd.grad(model.attention(x, x, x)[0].square().sum(), [x, *cores])
    attention = model.attention
    dense = {
        "in_proj_weight": attention.in_proj_weight.weight + attention.in_proj_weight.delta_weight(),
        "out_proj.weight": attention.out_proj.weight + attention.out_proj.delta_weight(),
    }
    plain = nn.MultiheadAttention(8, 2).double()
    loss = torch.func.functional_call(plain, dense, (x, x, x))[0].square().sum()
    assert_close(found, torch.autograd.grad(loss, [x, *cores]))


class Encoder(nn.Module):
    """Blocks that PyTorch runs as one fused operator in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("target", [None, r".*linear1", r".*out_proj", r".*in_proj_weight"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_adapter_of_an_encoder_is_computed_in_eval_mode_without_gradients(target: str | None, padded: bool) -> None:
    """There the plain layers call no layer, and with padding they compute nested tensors."""
    plain = Encoder().eval()
    model, merged = adapted(plain, tcur.TCURConfig(rank=2, target_modules=target))
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool) if padded else None
    if padding is not None:
        padding[0, -2:] = True
    with torch.no_grad():
        expected = merged.train()(x, padding)
        found, before = model.eval()(x, padding), plain.train()(x, padding)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - before).norm() > 0.05 * before.norm()


def test_remove_makes_all_modules_what_they_were() -> None:
    plain = Encoder()
    model, _ = adapted(plain)
    assert isinstance(model.get_submodule("encoder.layers.0.self_attn"), TCURMultiheadAttention)
    tcur.remove(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    for before, after in zip(plain.modules(), model.modules(), strict=True):
        assert list(before._parameters) == list(after._parameters)
        assert vars(before).keys() == vars(after).keys()
        assert not after._load_state_dict_pre_hooks
    assert model.encoder.use_nested_tensor == plain.encoder.use_nested_tensor
    assert model.encoder.layers[0].activation_relu_or_gelu == plain.encoder.layers[0].activation_relu_or_gelu == 1


def test_its_state_has_the_names_of_the_plain_module_and_loads_from_it() -> None:
    plain = Encoder()
    model = tcur.inject(copy.deepcopy(plain), tcur.TCURConfig(rank=2))
    assert plain.state_dict().keys() <= model.state_dict().keys()
    other = {name: value + 0.1 * torch.randn_like(value) for name, value in plain.state_dict().items()}
    missing = model.load_state_dict(other, strict=False)
    assert not missing.unexpected_keys
    assert all("tcur_stacks" in name for name in missing.missing_keys)
    for name, value in other.items():
        assert torch.equal(model.state_dict()[name], value)


def test_it_is_copied_pickled_saved_and_loaded(tmp_path: Path) -> None:
    plain, x = Encoder().eval(), torch.randn(2, 5, 8)
    model, _ = adapted(plain, tcur.TCURConfig(rank=2))
    y = model.eval()(x)
    tcur.save_adapter(model, tmp_path / "a.safetensors")
    loaded = tcur.load_adapter(copy.deepcopy(plain), tmp_path / "a.safetensors")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(x), y)
        other.load_state_dict(model.state_dict())


def test_merging_and_unmerging_keep_the_output() -> None:
    model, merged = adapted(Encoder().eval(), tcur.TCURConfig(rank=2))
    x = torch.randn(2, 5, 8)
    y = model.eval()(x)
    tcur.merge(model)
    assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert_close(model(x), merged.train()(x))
    tcur.unmerge(model)
    assert torch.equal(model(x), y)


def test_a_subclass_and_a_nested_tensor_are_refused() -> None:
    class Other(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"attention": Other(8, 2)})
    with pytest.raises(ValueError, match=r"attention\.in_proj_weight cannot be adapted: Other, a subclass of nn"):
        tcur.inject(model, tcur.TCURConfig(rank=2, target_modules=["in_proj_weight"]))
    attention = adapted(Attention(batch_first=True))[0].attention
    nested = torch.nested.nested_tensor([torch.randn(3, 8).double()])
    with pytest.raises(ValueError, match="found a nested tensor, expected a padded one"):
        attention(nested, nested, nested)
    x = torch.randn(2, 4, 8).double()
    with pytest.raises(RuntimeError, match=r"attn_mask has shape \(3, 4\), expected \(4, 4\)"):
        attention(x, x, x, attn_mask=torch.zeros(3, 4).double())
    with pytest.raises(RuntimeError, match="is_causal is given, expected attn_mask"):
        attention(x, x, x, is_causal=True)
