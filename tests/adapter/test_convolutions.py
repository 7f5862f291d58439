"""Adapted convolutions: they compute the dense definition, in every form, and behave as the layers they replace."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.convolution import CONVOLUTIONS, TCURConv, conv_matrix

Case = tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "1d": (nn.Conv1d, (6,), {"kernel_size": 3}),
    "2d stride": (nn.Conv2d, (7, 6), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "3d mixed": (nn.Conv3d, (5, 6, 4), {"kernel_size": (3, 1, 2), "dilation": (1, 2, 1), "padding": (1, 0, 2)}),
    "same": (nn.Conv2d, (7, 6), {"kernel_size": (3, 5), "padding": "same"}),
    "same, even": (nn.Conv2d, (7, 6), {"kernel_size": 4, "padding": "same"}),
    "circular": (nn.Conv2d, (7, 6), {"kernel_size": (3, 5), "padding": "same", "padding_mode": "circular"}),
    "reflect": (nn.Conv2d, (7, 6), {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect", "stride": 2}),
    "1x1": (nn.Conv2d, (5, 4), {"kernel_size": 1, "stride": 2, "bias": False}),
    "transposed 1d": (nn.ConvTranspose1d, (6,), {"kernel_size": 3, "stride": 2, "output_padding": 1}),
    "transposed 2d": (nn.ConvTranspose2d, (5, 6), {"kernel_size": 2, "stride": 2, "bias": False}),
    "transposed 3d": (nn.ConvTranspose3d, (4, 3, 4), {"kernel_size": 3, "stride": (2, 1, 2), "padding": 1}),
}
FORMS: dict[str, dict[str, Any]] = {
    "coupled": {}, "own cores": {"transform": "identity"}, "dct": {"transform": "dct"}, "raw": {"scale": 1.0},
    "trained factors": {"trainable": "all"}, "two frequencies": {"frequencies": 2},
}  # fmt: skip


def network(case: Case, layers: int = 3) -> nn.Sequential:
    """Layers of one shape, each applied to the same input: coupled slices of one stack."""
    torch.manual_seed(0)
    kind, _, options = case
    return nn.Sequential(*(kind(4, 4, **options) for _ in range(layers))).double()


def inputs(case: Case, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *case[1], dtype=torch.float64, requires_grad=True)


def adapted(case: Case, **options: Any) -> nn.Sequential:
    model = network(case)
    names = [str(index) for index in range(len(model))]
    tcur.inject(model, tcur.TCURConfig(rank=(3, 2), target_modules=names, **options))
    (stack,) = tcur.stacks(model).values()
    torch.manual_seed(1)
    with torch.no_grad():
        stack.core.normal_()
    return model


def dense(layer: TCURConv, plain: nn.Module, x: Tensor) -> Tensor:
    """The plain layer with the weight W + dW, dW from the definition; differentiable."""
    weight = plain.weight + conv_matrix(plain, layer.delta_weight())
    result: Tensor = functional_call(plain, {"weight": weight}, (x,))
    return result


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_output_and_gradients_are_those_of_the_dense_weight(case: Case, form: dict[str, Any]) -> None:
    model, plain = adapted(case, **form), network(case)
    (stack,) = tcur.stacks(model).values()
    assert stack.slices == len(model)
    for layer, base in zip(model, plain, strict=False):
        x = inputs(case)
        wanted = [x, *stack.parameters()]
        y, expected = layer(x), dense(layer, base, x)
        assert_close(y, expected, rtol=1e-10, atol=1e-11)
        g = torch.randn_like(y)
        found, right = torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g)
        assert_close(found, right, rtol=1e-9, atol=1e-10)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_random_shapes(data: st.DataObject) -> None:
    space = data.draw(st.integers(1, 3))
    transposed = data.draw(st.booleans())
    kind = CONVOLUTIONS[space - 1 + 3 * transposed]
    small = st.tuples(*[st.integers(1, 3)] * space)
    options = {"kernel_size": data.draw(small), "stride": data.draw(small), "dilation": data.draw(small)}
    if not transposed:
        options["padding"] = data.draw(st.tuples(*[st.integers(0, 2)] * space))
    ins, outs = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    plain = kind(ins, outs, **options, bias=data.draw(st.booleans())).double()
    out_features, in_features = conv_matrix(plain, plain.weight).shape
    rank = (data.draw(st.integers(1, in_features)), data.draw(st.integers(1, out_features)))
    layer = TCURConv.from_conv(plain, rank)
    with torch.no_grad():
        layer.stack.core.normal_()
    sides = data.draw(st.tuples(*[st.integers(7, 9)] * space))
    x = torch.randn(data.draw(st.integers(0, 2)), ins, *sides, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), dense(layer, plain, x)
    assert_close(y, expected, rtol=1e-10, atol=1e-11)
    found, right = (torch.autograd.grad(z.square().sum(), [x, layer.stack.core]) for z in (y, expected))
    assert_close(found, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_with_a_zero_core_the_output_is_that_of_the_base_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    plain = network(case, 1)[0].to(dtype)
    layer = TCURConv.from_conv(plain, (3, 2))
    assert isinstance(layer, type(plain))
    x = inputs(case).detach().to(dtype)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer(x[0]), plain(x[0]))
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("name", ["3d mixed", "transposed 3d"])
def test_merge_copies_pickles_and_states(name: str) -> None:
    case = CASES[name]
    model, x = adapted(case), inputs(case).detach()
    layer = model[1]
    y = layer(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied[1](x), y)
        assert type(copied[1]) is type(layer)
    other = adapted(case)
    other[1].weight.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[1](x), y)
    tcur.merge(model)
    assert_close(layer(x), y, rtol=1e-10, atol=1e-11)
    tcur.unmerge(model)
    assert torch.equal(layer(x), y)
    plain = tcur.remove(tcur.merge(model))
    assert type(plain[1]) is case[0]
    assert_close(plain[1](x), y, rtol=1e-10, atol=1e-11)


def test_a_transposed_convolution_takes_an_output_size() -> None:
    plain = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
    layer, x = TCURConv.from_conv(plain, 2), torch.randn(1, 4, 5, 5)
    assert torch.equal(layer(x, output_size=[10, 10]), plain(x, output_size=[10, 10]))
    layer.merge()
    assert torch.equal(layer(x, output_size=[10, 10]), plain(x, output_size=[10, 10]))


@pytest.mark.parametrize("samples", [(), (2,)])
def test_what_follows_may_change_the_output_in_place(samples: tuple[int, ...]) -> None:
    layer = adapted(CASES["2d stride"])[0]
    x = torch.randn(*samples, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(nn.ReLU(inplace=True)(layer(x)).square().sum(), [x, layer.stack.core])
    expected = torch.autograd.grad(torch.relu(layer(x)).square().sum(), [x, layer.stack.core])
    assert_close(found, expected)


def test_dropout_is_the_adapters_alone() -> None:
    layer = TCURConv.from_conv(nn.Conv2d(4, 4, 3), 4, dropout=0.5)
    base, x = copy.deepcopy(layer), torch.randn(2, 4, 6, 6, requires_grad=True)
    with torch.no_grad():
        layer.stack.core.normal_()
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    seen = nn.functional.dropout(x, 0.5)
    delta = nn.functional.conv2d(seen, layer.as_matrix(layer.delta_weight()))
    assert_close(y, base.eval()(x) + delta)
    gradients = [torch.autograd.grad(z.square().sum(), [x, layer.stack.core]) for z in (y, base(x) + delta)]
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.eval()(x), layer(x))


def test_autocast_checkpointing_vmap_and_channels_last() -> None:
    case = CASES["2d stride"]
    layer = adapted(case).float()[0]
    x = inputs(case).detach().float()
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short = layer(x)
        short.float().sum().backward()
    assert short.dtype == torch.bfloat16
    assert_close(short.float(), y, rtol=0.05, atol=0.2)
    y.square().sum().backward()
    expected, layer.stack.core.grad = layer.stack.core.grad, None
    layer(x).square().sum().backward()
    once, layer.stack.core.grad = layer.stack.core.grad, None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.stack.core.grad, once)
    assert not torch.equal(expected, once)  # it had autocast's gradient too
    assert_close(torch.func.vmap(layer)(x[None])[0], y)
    assert_close(layer(x.to(memory_format=torch.channels_last)), y)


@pytest.mark.parametrize("name", ["2d stride", "transposed 2d"])
def test_compiled_and_exported_it_computes_the_same(name: str) -> None:
    case = CASES[name]
    model, x = adapted(case).float(), inputs(case).detach().float()
    model = model[:1] if name == "2d stride" else model
    y = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), y)
    compiled(x).square().sum().backward()
    core = model[0].stack.core
    found, core.grad = core.grad, None
    model(x).square().sum().backward()
    assert_close(found, core.grad, rtol=1e-4, atol=1e-4)


def test_a_plain_copy_has_pytorch_operations_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, 2))
    tcur.inject(model, tcur.TCURConfig(rank=2, target_modules=["0", "1", "2"]))
    with torch.no_grad():
        for stack in tcur.stacks(model).values():
            stack.core.normal_()
    x = torch.randn(1, 4, 6, 6)
    program = torch.export.export(tcur.plain_copy(model), (x,))
    assert_close(program.module()(x), model(x))
    assert_close(tcur.plain_copy(model, merged=True)(x), model(x), rtol=1e-4, atol=1e-5)


def saved_for_backward(function: Any) -> int:
    """How many elements autograd saves, parameters and buffers of the layer not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def test_it_keeps_h_and_neither_input_nor_output() -> None:
    """A frozen convolution of PyTorch keeps its input, of which its own weight's gradient would need it."""
    plain = nn.Conv3d(16, 16, 3, padding=1)
    layer = TCURConv.from_conv(plain, 2)
    x = torch.randn(1, 16, 12, 12, 12, requires_grad=True)
    own = saved_for_backward(lambda: layer(x)) - plain.weight.numel()
    h = 2 * 12**3
    assert h <= own < h + 2500  # beside it the matrices of the adapter
    assert saved_for_backward(lambda: plain(x)) >= x.numel()


def test_it_keeps_its_input_where_h_is_larger() -> None:
    layer = TCURConv.from_conv(nn.Conv3d(1, 16, 3, padding=1), 8)
    x = torch.randn(1, 1, 12, 12, 12, requires_grad=True)
    assert saved_for_backward(lambda: layer(x)) < 3 * x.numel()
    expected = TCURConv.from_conv(nn.Conv3d(1, 16, 3, padding=1), 8)
    expected.load_state_dict(layer.state_dict())
    with torch.no_grad():
        layer.stack.core.normal_()
    y = layer(x)
    right = nn.functional.conv3d(x, layer.weight + layer.as_matrix(layer.delta_weight()), layer.bias, padding=1)
    found, wanted = (torch.autograd.grad(z.square().sum(), layer.stack.core)[0] for z in (y, right))
    assert_close(found, wanted, rtol=1e-3, atol=1e-2)


def test_a_trained_base_gets_its_gradients_too() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).double()
    plain = copy.deepcopy(model)
    tcur.inject(model, tcur.TCURConfig(rank=2, target_modules=["0", "1"], transform="identity"))
    tcur.unfreeze(model, ["0."])
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_close(model[0].weight.grad, plain[0].weight.grad)
    assert_close(model[0].bias.grad, plain[0].bias.grad)
    assert model[1].weight.grad is None


@pytest.mark.filterwarnings("ignore:target_modules has")
@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: nn.Conv2d(8, 8, 3, groups=2), "it has 2 groups, .* expected groups=1"),
        (lambda: type("Own", (nn.Conv2d,), {"forward": lambda self, x: x})(8, 8, 3), r"found a .*Own, expected Conv1d"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "its weight is made anew in each call"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(made: Any, reason: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), made(), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=f"1 cannot be adapted: {reason}"):
        tcur.load_adapter(model, _file_of_three(tmp_path))
    tcur.inject(model, tcur.TCURConfig(rank=2))
    covers = tcur.summary(model).covers
    assert [part.name for part in covers.adapted] == ["2"]
    assert covers.left_out[0].reason == "a stem"
    assert re.search(reason.replace("found a .*Own, expected Conv1d", "found a .*Own"), covers.left_out[1].reason)


def _file_of_three(folder: Path) -> Path:
    plain = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in "123"))
    tcur.inject(plain, tcur.TCURConfig(rank=2, target_modules=["1"]))
    return tcur.save_adapter(plain, folder / "a.safetensors")


@pytest.mark.parametrize("lazy", [lambda: nn.LazyConv2d(4, 1), lambda: nn.LazyLinear(4)], ids=["conv", "linear"])
def test_a_lazy_layer_is_named_until_it_has_its_weight(lazy: Any, tmp_path: Path) -> None:
    one = nn.Conv2d(4, 4, 1) if isinstance(lazy(), nn.Conv2d) else nn.Linear(4, 4)
    said = r"is a Lazy\w+, which has no weights before its first input; run a batch through"
    model, config = nn.Sequential(copy.deepcopy(one), lazy()), tcur.TCURConfig(rank=2, target_modules=["0"])
    for refused in (config, tcur.TCURConfig(rank=2)):
        with pytest.raises(ValueError, match=f"^1 {said} the model first"):
            tcur.inject(model, refused)
    file = tcur.save_adapter(tcur.inject(nn.Sequential(one), config), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"^1 {said} the model first"):
        tcur.load_adapter(model, file)
    made = TCURConv.from_conv if isinstance(one, nn.Conv2d) else tcur.TCURLinear.from_linear
    with pytest.raises(ValueError, match=f"^(conv|linear) {said} (conv|linear) first"):
        made(lazy(), 2)
    model(torch.randn(1, 4, 2, 4) if isinstance(one, nn.Linear) else torch.randn(1, 4, 2, 2))
    tcur.load_adapter(model, file)


def test_from_conv_refuses_groups() -> None:
    with pytest.raises(ValueError, match="it has 4 groups"):
        TCURConv.from_conv(nn.Conv1d(4, 4, 3, groups=4))


def test_subclasses_that_compute_the_same_stay_what_they_are() -> None:
    class Named(nn.Conv2d):
        pass

    layer = TCURConv.from_conv(Named(4, 4, 3), 2)
    assert isinstance(layer, Named)
    assert isinstance(layer.restore(Named), Named)


def test_a_rank_above_the_channels_is_refused_by_the_names_of_stack_and_layer() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"stack 8x8x3x3 \(1, ...\): rank \(c, r\) = \(9, 9\) does not fit 8 x 72"):
        tcur.inject(model, tcur.TCURConfig(rank=9, target_modules=["1"]))
