"""Mixed batches: ``adapter_names=`` names an adapter for every row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .experts import TcurLoraExperts
from .layer import BASE, TcurLoraLinear


@contextmanager
def rows_for_adapters(tuner: BaseTuner, adapter_names: Sequence[str], num_beams: int | None) -> Iterator[None]:
    """Within this context every layer of the tuner gets ``adapter_names``, one per row ("__base__": no adapter).

    Beam search repeats the rows of a batch, except in the encoder of an encoder-decoder model. Raises ValueError in
    training mode, and for the name of an unknown adapter.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = set(adapter_names) - set(tuner.tcurlora_core) - {BASE}
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; expected "
            f"{', '.join(tuner.tcurlora_core)} or {BASE}"
        )
    if any(isinstance(module, TcurLoraExperts) for module in tuner.modules()):
        raise ValueError("cannot pass adapter_names: the experts' tokens are no rows of the batch any more")
    once = list(adapter_names)
    repeated = [name for name in once for _ in range(num_beams or 1)]
    in_encoder = {id(module) for module in _encoder_modules(tuner.model)}
    handles = []
    try:
        for module in tuner.modules():
            if isinstance(module, (TcurLoraLinear, AuxiliaryTrainingWrapper)):
                hook = partial(_pass_names, adapter_names=once if id(module) in in_encoder else repeated)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encoder_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of the model's encoder. Without one ``get_encoder`` returns the model itself: the result is empty."""
    encoder: Any = getattr(model, "get_encoder", lambda: None)()
    return list(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else []


def _pass_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    return args, kwargs | {"adapter_names": adapter_names}
