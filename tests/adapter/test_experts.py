"""Experts in one 3-D parameter, as transformers 5 has them: the tokens of expert e get slice e of its stack."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.experts import TCURExperts
from tcurlora_ext.analysis.plan import plan, trace_calls
from tcurlora_ext.cli.merge import merged_state

transformers = pytest.importorskip("transformers", minversion="5")

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 4, "num_experts": 4, "moe_intermediate_size": 8},
    "GptOss": {"head_dim": 4, "num_local_experts": 4},
}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
TRANSFORMS = ("dft", "identity")
IDS = torch.arange(14).view(2, 7)


def network(kind: str = "Mixtral", implementation: str = "eager", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(TEXT | KINDS[kind] | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.set_experts_implementation(implementation)
    return model


def fill(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(0.3 * torch.randn(stack.slices, *stack.rank))
    return model


def adapted(kind: str = "Mixtral", implementation: str = "eager", **options: Any) -> nn.Module:
    return fill(tcur.inject(network(kind, implementation), tcur.TCURConfig(rank=2, **options)))


def experts_of(kind: str, implementation: str) -> nn.Module:
    """The experts of a layer alone, in float64."""
    model = network(kind, implementation, num_hidden_layers=1)
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    return nn.ModuleDict({"experts": experts}).double()


ROUTES = torch.tensor([[0, 1], [0, 3], [1, 3], [3, 0], [0, 1]])  # no token for expert 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_outputs_and_gradients_are_the_dense_ones(kind: str, implementation: str, transform: str) -> None:
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # grouped_mm takes no float64
    plain = experts_of(kind, implementation).to(dtype)
    config = tcur.TCURConfig(rank=(2, 3), transform=transform, target_modules=["gate_up_proj", "down_proj"])
    model = fill(tcur.inject(copy.deepcopy(plain), config))
    x = torch.randn(5, 16, dtype=dtype, requires_grad=True)
    shares = torch.rand(5, 2, dtype=dtype, requires_grad=True)
    stacks = list(tcur.stacks(model).values())
    wanted = [x, shares, *(stack.core for stack in stacks)]
    dense = {}
    for name, stack in tcur.stacks(model).items():
        own = stack.names[0].removesuffix("[0]")
        delta = stack.delta_weights()
        weight = plain.get_parameter(own).detach()
        assert stack.slices == 4, name
        dense[own.removeprefix("experts.")] = weight + (delta.transpose(1, 2) if kind == "GptOss" else delta)
    found = model.experts(x, ROUTES, shares)
    expected = torch.func.functional_call(plain.experts, dense, (x, ROUTES, shares))
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    assert_close(found, expected, **near)
    assert (found - plain.experts(x, ROUTES, shares)).norm() > 0.05 * found.norm()
    g = torch.randn_like(found)
    gradients = torch.autograd.grad(found, wanted, g)
    assert_close(gradients, torch.autograd.grad(expected, wanted, g), **near)
    if transform == "identity":  # every expert has a core of its own
        for gradient in gradients[2:]:
            assert [bool(part.any()) for part in gradient] == [True, True, False, True]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_tokens_at_all_are_no_error(implementation: str, transform: str) -> None:
    config = tcur.TCURConfig(rank=2, transform=transform, target_modules=["gate_up_proj"])
    model = tcur.inject(experts_of("Mixtral", implementation), config)
    model.float()
    none = torch.zeros(0, 16)
    assert model.experts(none, ROUTES[:0], none[:, :2]).shape == (0, 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_zero_cores_leave_the_output_bit_for_bit(kind: str, implementation: str, transform: str) -> None:
    plain = network(kind, implementation).to(torch.bfloat16 if kind == "Mixtral" else torch.float32)
    targets = r".*experts\.(gate_up|down)_proj"
    model = tcur.inject(copy.deepcopy(plain), tcur.TCURConfig(rank=2, transform=transform, target_modules=targets))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_tiny_mixtral_is_trained_saved_loaded_and_merged(transform: str, tmp_path: Path) -> None:
    plain = network(implementation="grouped_mm")
    model = tcur.inject(copy.deepcopy(plain), tcur.TCURConfig(rank=4, transform=transform)).train()
    frozen = copy.deepcopy(plain.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-2)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    tcur.save_adapter(model, tmp_path / "a.safetensors")
    loaded = tcur.load_adapter(copy.deepcopy(plain), tmp_path / "a.safetensors")
    with torch.no_grad():
        y = model.eval()(IDS).logits
        assert torch.equal(loaded.eval()(IDS).logits, y)
        tcur.merge(model)
        assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-5)
        tcur.unmerge(model)
        assert torch.equal(model(IDS).logits, y)
        merged = tcur.remove(tcur.merge(model))
        assert_close(merged(IDS).logits, y, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == list(frozen)
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    other = network()
    other.load_state_dict({name: value + 0.1 for name, value in frozen.items()})
    with pytest.raises(ValueError, match=r"trained on other base weights: .* slices of stack"):
        tcur.load_adapter(other, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj has 4 slices in the file, 3 in the model"):
        tcur.load_adapter(network(num_local_experts=3), tmp_path / "a.safetensors")


def test_the_experts_of_a_layer_are_a_stack_of_their_own() -> None:
    model = adapted()
    stacks = {stack.names[0]: stack.slices for stack in tcur.stacks(model).values() if "experts" in stack.names[0]}
    owners = [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert stacks == {f"{owner}.{own}[0]": 4 for owner in owners for own in ("gate_up_proj", "down_proj")}
    covers = tcur.summary(model).covers
    assert (len(covers.adapted_linear), len(covers.linear), len(covers.experts)) == (8, 9, 4)
    assert "and 4 of 4 parameters with all experts of a layer" in str(covers)
    assert all(isinstance(model.get_submodule(f"{owner}.down_proj"), TCURExperts) for owner in owners)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = adapted(implementation="grouped_mm").train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([stack.core.grad.clone() for stack in tcur.stacks(model).values()])
    assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("kind", "transform"), [("Mixtral", "dft"), ("GptOss", "identity")])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_and_bfloat16_are_near_float32(kind: str, implementation: str, transform: str) -> None:
    model = adapted(kind, implementation, transform=transform)
    expected = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(IDS, labels=IDS)
    found.loss.backward()
    assert all(bool(stack.core.grad.isfinite().all()) for stack in tcur.stacks(model).values())
    with torch.no_grad():
        short = copy.deepcopy(model).to(torch.bfloat16)(IDS).logits
    for logits in (found.logits, short):
        # Another expert for a token is no small change: some of them may be chosen anew after rounding.
        assert (logits.float() - expected).norm() < 0.3 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "transform"), [("eager", "dft"), ("grouped_mm", "identity")])
def test_a_compiled_model_computes_the_same(implementation: str, transform: str) -> None:
    torch._dynamo.reset()
    model = adapted(implementation=implementation, transform=transform)
    expected = model(IDS).logits
    gradients = torch.autograd.grad(expected.square().sum(), list(tcur.stacks(model).values())[-1].core)
    found = torch.compile(model, backend="aot_eager")(IDS).logits
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    again = torch.autograd.grad(found.square().sum(), list(tcur.stacks(model).values())[-1].core)
    assert_close(again, gradients, rtol=1e-3, atol=1e-3)


def test_it_is_copied_and_pickled() -> None:
    model = adapted(transform="identity")
    y = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, y)
        assert not other.load_state_dict(model.state_dict()).unexpected_keys
        assert all(stack.rides for stack in tcur.stacks(other).values() if "experts" in stack.names[0])


def test_dropout_is_of_the_adapter_alone() -> None:
    model = adapted(dropout=0.5)
    y = model(IDS).logits
    assert not torch.equal(model.train()(IDS).logits, y)
    assert torch.equal(model.eval()(IDS).logits, y)
    for stack in tcur.stacks(model).values():
        stack.core.data.zero_()
    assert_close(model.train()(IDS).logits, network()(IDS).logits)


def test_the_command_merges_and_plans_experts() -> None:
    model = adapted()
    plain = network()
    state, _ = merged_state(model, torch.float32)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    config = tcur.TCURConfig(rank=2)
    calls = trace_calls(network(), config, IDS)
    assert calls["model.layers.0.mlp.experts.down_proj"].tokens == 2 * IDS.numel()
    assert plan(network(), config, calls).tcur.trained == tcur.summary(model).trained


def test_a_learned_subspace_has_the_experts() -> None:
    model = network()
    config = tcur.TCURConfig.preset("learned", rank=2, target_modules=["experts.down_proj"])
    subspace = tcur.learn_factors(model, config, lambda _: model(IDS, labels=IDS).loss, steps=2)
    before = model(IDS).logits
    tcur.inject(model, config, subspace=subspace)
    assert torch.equal(model(IDS).logits, before)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_unknown_parameter_and_a_rank_above_its_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['experts.gate_proj'\] match none of the"):
        tcur.inject(network(), tcur.TCURConfig(rank=2, target_modules=["experts.gate_proj"]))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj.*rank"):
        tcur.inject(network(), tcur.TCURConfig(rank=17, target_modules=["experts.down_proj"]))


@pytest.mark.parametrize("named", [True, False])
def test_quantised_experts_are_refused_by_name_and_left_out_by_default(named: bool) -> None:
    model = network()
    for layer in model.model.layers:
        packed = nn.Parameter(torch.zeros(4, 48, 16, dtype=torch.uint8), requires_grad=False)
        layer.mlp.experts.gate_up_proj = packed
    if named:
        with pytest.raises(ValueError, match=r"experts\.gate_up_proj cannot be adapted: .*quantised.*uint8"):
            tcur.inject(model, tcur.TCURConfig(rank=2, target_modules=["experts.gate_up_proj"]))
        return
    covers = tcur.summary(tcur.inject(model, tcur.TCURConfig(rank=2))).covers
    reasons = {part.name: part.reason for part in covers.experts if not part.slices}
    assert set(reasons) == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)}
    assert all("quantised, torch.uint8" in reason for reason in reasons.values())


def uses(experts: nn.Module, what: str) -> Tensor:
    weight, x = experts.gate_up_proj, torch.randn(3, 16, dtype=torch.float64)
    if what == "einsum":
        return torch.einsum("ti,eoi->teo", x, weight)
    if what == "numel":
        return weight[0].numel()
    if what == "matmul":  # these experts compute x W^T
        return x @ weight[0]
    return weight.transpose(0, 1) if what == "transpose" else weight[:2]


@pytest.mark.parametrize("what", ["einsum", "numel", "matmul", "transpose", "slice"])
def test_a_forward_pass_that_would_leave_the_adapter_out_is_refused(what: str) -> None:
    config = tcur.TCURConfig(rank=2, target_modules=["gate_up_proj"])
    model = tcur.inject(experts_of("Mixtral", "eager"), config)
    with pytest.raises(
        (RuntimeError, TypeError, ValueError, AttributeError), match=rf"uses .*{what}.* which would leave"
    ):
        uses(model.experts, what)


def test_what_knows_rows_of_a_batch_or_layers_alone_refuses_experts(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj\[0\], a parameter that the module around it reads"):
        tcur.AdapterBank(model)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj is a parameter that the module around it reads"):
        tcur.to_lora(model, tmp_path / "lora")
    config = tcur.TCURConfig(rank=2, selection="activation")
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: its inputs cannot be measured"):
        tcur.calibrate(network(), config, [IDS])
