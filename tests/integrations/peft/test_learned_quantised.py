"""Learned factors in PEFT on a quantised copy of the base on which they were learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tcurlora_ext.integrations.peft import TcurLoraConfig, learn_factors

from .test_quantised import KINDS, WIDTH, plain


def square(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).sin()
    return (model(x) - x.flip(0)).square().sum()


@pytest.fixture(params=KINDS)
def quantised(request: pytest.FixtureRequest) -> Callable[[], nn.Sequential]:
    return KINDS[request.param]


@pytest.mark.parametrize("factors", ["learned", "learned_rows"])
@pytest.mark.parametrize("save_projection", [True, False])
def test_on_a_quantised_copy_of_the_base(
    quantised: Callable[[], nn.Sequential], factors: str, save_projection: bool, tmp_path: Path
) -> None:
    config = TcurLoraConfig(
        r=2,
        target_modules=["0", "2"],
        factors=factors,
        save_projection=save_projection,
        stack_by="none",
        transform="identity",
    )
    config.subspace = learn_factors(plain(), config, square, steps=6)
    model = get_peft_model(quantised(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = float(square(model).detach())
    for _ in range(20):
        optimizer.zero_grad()
        square(model).backward()
        optimizer.step()
    assert float(square(model).detach()) < 0.95 * first
    model.save_pretrained(tmp_path)
    x = torch.randn(5, WIDTH)
    for low_cpu_mem_usage in (True, False):
        loaded = PeftModel.from_pretrained(
            quantised(), tmp_path, config=None if save_projection else config, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(loaded.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="is quantised, and its weight cannot train"):
        learn_factors(quantised(), config, square)
