"""How many kernels the eager backend starts on a GPU, where each takes some microseconds however little it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcurlora_ext.operator.backends import eager

# Operations that only allocate, or ask about types.
WITHOUT_KERNEL = {"empty", "new_empty", "promote_types", "_unsafe_view"}


class Kernels(TorchDispatchMode):
    """Counts the operations that compute or copy: each is at least one kernel on a GPU. Views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name not in WITHOUT_KERNEL:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("S", "n", "transform"), [(6, 3, "dft"), (7, 2, "dft"), (6, 1, "dft"), (6, 3, "dct")])
def test_a_layer_that_trains_its_core_starts_few_kernels(
    make_case: Callable[..., Any], S: int, n: int, transform: str, dtype: torch.dtype
) -> None:
    case = make_case(S=S, n=n, c=2, r=2, leading=(5,), transform=transform).to(dtype)
    needs = [True, False, False, False, True, False]
    step(case, needs)  # builds the constants
    with Kernels() as forward:
        y, h = eager.forward(case.x, case.weight, case.bias, case.factors)
    with Kernels() as backward:
        eager.backward(y, None, h, case.weight, case.factors, needs)
    assert forward.names.count("addmm") == 1  # the base product with its bias: the mode sees what runs
    assert len(forward.names) <= 12, forward.names
    assert len(backward.names) <= 16, backward.names


def step(case: Any, needs: list[bool]) -> tuple[Tensor, ...]:
    y, h = eager.forward(case.x, case.weight, case.bias, case.factors)
    return eager.backward(y, None, h, case.weight, case.factors, needs)
