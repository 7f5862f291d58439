"""Adapters that would do nothing are named: layers that are never called, and cores that no optimizer has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from tcurlora_ext.integrations.peft import TcurLoraConfig


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """Other tests of this process compile, after which calls leave no mark."""
    counters.clear()


class Net(nn.Module):
    """Calls the layers of its body up to ``called``, and reads the weights of those behind."""

    def __init__(self, called: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 2)
        self.called = called

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.body):
            assert isinstance(layer.weight, Tensor)
            x = torch.tanh(layer(x) if i < self.called else F.linear(x, layer.weight))
        return self.head(x)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def adapted(called: int = 3, **options: object) -> PeftModel:
    options = {"r": 2, "target_modules": r"body\.\d", "modules_to_save": ["head"]} | options
    return get_peft_model(Net(called), TcurLoraConfig(**options))  # type: ignore[arg-type]


def train(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    model.zero_grad()


def ends(folder: Path) -> dict[str, Callable[[PeftModel], object]]:
    return {
        "save": lambda model: model.save_pretrained(folder / "adapter"),
        "merge": lambda model: model.merge_adapter(),
        "unload": lambda model: model.merge_and_unload(),
    }


@pytest.mark.parametrize("called", [0, 2])
@pytest.mark.parametrize("end", ["save", "merge", "unload"])
def test_layers_that_are_never_called_are_named(called: int, end: str, tmp_path: Path) -> None:
    model = adapted(called)
    ends(tmp_path)["save"](model)
    names = {0: r"^body\.0, body\.1, body\.2 \(3 of 3", 2: r"^body\.2 \(1 of 3"}[called]
    message = names + r" adapted layers\) were never called; if their parents read the weight"
    with pytest.warns(UserWarning, match=message):
        model(X)
    model(X)
    with pytest.warns(UserWarning, match=message):
        ends(tmp_path)[end](model)


@pytest.mark.parametrize("end", ["save", "merge", "unload"])
def test_cores_that_no_optimizer_has_are_named(end: str, tmp_path: Path) -> None:
    some = adapted(stack_by="none")
    train(some, [next(iter(some.base_model.stacks("default").values())).core])
    with pytest.warns(UserWarning, match=r"the cores of body_1\w*, body_2\w* \(2 of 3 stacks\) are still zero: they"):
        ends(tmp_path)[end](some)
    head = adapted()
    train(head, head.base_model.model.head.parameters())
    with pytest.warns(UserWarning, match=r"\(1 of 1 stacks\) are still zero, while head\.weight has changed: they got"):
        ends(tmp_path)[end](head)


@pytest.mark.parametrize("end", ["save", "merge", "unload"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_that_runs_is_no_alarm(end: str, compiled: bool, tmp_path: Path) -> None:
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ends(tmp_path)["save"](model)  # before the first call
        run = torch.compile(model, backend="eager") if compiled else model
        with model.disable_adapter():
            model(X)
        train(run, [p for p in model.parameters() if p.requires_grad])
        ends(tmp_path)["save"](model)
        part = PeftModel.from_pretrained(Net(), tmp_path / "adapter", is_trainable=True)
        part.base_model.model.body[0](X)
        ends(tmp_path)[end](part)
        ends(tmp_path)[end](model)
