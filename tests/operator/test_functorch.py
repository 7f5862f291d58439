"""The operator under torch.func: vmap, grad, jvp and their compositions, against loops and the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jvp, vmap
from torch.testing import assert_close

from tcurlora_ext.operator.functional import tcur_linear

NAMES = ("x", "weight", "bias", "col", "core", "row")
CASES = [{"S": 1}, {"S": 6, "n": 3, "first": 1, "leading": (2, 3)}, {"S": 4, "transform": "dct", "bias": False}]
cases = pytest.mark.parametrize("options", CASES, ids=str)


def call(case: Any, **tensors: Tensor) -> Tensor:
    case = case.replaced(**tensors)
    return tcur_linear(
        *case.tensors, case.first_slice, case.num_slices, case.scale, backend=case.backend, transform=case.transform
    )


def of(case: Any) -> list[str]:
    return [name for name in NAMES if getattr(case, name) is not None]


@cases
@pytest.mark.filterwarnings("error")
def test_vmap_over_any_tensor_is_a_loop(make_case: Callable[..., Any], options: dict[str, Any]) -> None:
    case = make_case(**options)
    for name in of(case):
        batch = torch.stack([getattr(case, name) * factor for factor in (1.0, -2.0, 0.5)], 1)
        found = vmap(lambda t, name=name: call(case, **{name: t}), in_dims=1)(batch)
        assert_close(found, torch.stack([call(case, **{name: t}) for t in batch.unbind(1)]))
    every = {name: torch.stack([getattr(case, name)] * 2) for name in of(case)}
    assert_close(vmap(lambda tensors: call(case, **tensors))(every)[1], call(case))


@cases
def test_grad_is_that_of_autograd(make_case: Callable[..., Any], options: dict[str, Any]) -> None:
    case = make_case(**options)
    leaves = {name: getattr(case, name) for name in of(case)}
    found = grad(lambda tensors: call(case, **tensors).square().sum())(leaves)
    trained = case.training(*leaves)
    call(trained).square().sum().backward()
    for name in leaves:
        assert_close(found[name], getattr(trained, name).grad)


@cases
def test_jvp_and_hessian_are_those_of_the_definition(make_case: Callable[..., Any], options: dict[str, Any]) -> None:
    """For x and the weight, which the definition takes directly."""
    case = make_case(**options)
    for name in ("x", "weight"):
        at, along = getattr(case, name), torch.randn_like(getattr(case, name))
        assert_close(
            jvp(lambda t, name=name: call(case, **{name: t}), (at,), (along,)),
            jvp(lambda t, name=name: case.replaced(**{name: t}).reference(), (at,), (along,)),
        )
        assert_close(
            hessian(lambda t, name=name: call(case, **{name: t}).square().sum())(at),
            hessian(lambda t, name=name: case.replaced(**{name: t}).reference().square().sum())(at),
        )
    # y is linear in the core: a quadratic function's hessian gives its value back.
    f = lambda core: (call(case, core=core) - call(case, core=0 * core)).square().sum()  # noqa: E731
    core = case.core.flatten()
    curved = hessian(f)(case.core).reshape(core.numel(), core.numel())
    assert_close(0.5 * core @ curved @ core, f(case.core))


def test_gradients_of_every_example(make_case: Callable[..., Any]) -> None:
    case = make_case(S=5, n=2, leading=(4, 3))
    found = vmap(grad(lambda core, x: call(case, core=core, x=x).square().sum()), (None, 0))(case.core, case.x)
    for i, x in enumerate(case.x):
        one = case.replaced(x=x).training("core")
        call(one).square().sum().backward()
        assert_close(found[i], one.core.grad)


def test_autocast_is_that_of_nn_linear_there(make_case: Callable[..., Any]) -> None:
    """Under vmap, nn.Linear computes in float32 (PyTorch 2.13 on a CPU); the adapter's products do not."""
    case = make_case(S=4, out=16, in_=16, leading=(8,)).to(torch.float32)
    linear = nn.Linear(16, 16)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found, plain, expected = vmap(lambda x: call(case, x=x))(case.x), vmap(linear)(case.x), call(case)
    assert found.dtype == plain.dtype
    right = call(case)
    assert float((found - right).norm()) < 2 * float((expected - right).norm()) + 1e-3 * float(right.norm())


def test_slices_outside_the_stack_are_refused_there_too(make_case: Callable[..., Any]) -> None:
    case = make_case().replaced(first_slice=5)
    with pytest.raises(ValueError, match=r"slices 5\.\.5 asked for"):
        vmap(lambda x: call(case, x=x))(case.x)


def test_outside_torch_func_the_operator_is_called(make_case: Callable[..., Any]) -> None:
    """After a transform, calls have the operator's own backward again, which has no second derivative."""
    case = make_case().training("x", "core")
    vmap(lambda x: call(case, x=x))(case.x)
    (gradient,) = torch.autograd.grad(call(case).square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tcurlora|twice|once_differentiable"):
        torch.autograd.grad(gradient.square().sum(), case.core)
