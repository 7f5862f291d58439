"""Parameters that FSDP2 spread over processes (DTensors), told by their method so that nothing has to be imported."""

from __future__ import annotations

from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered, for which every process has to ask; any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def sharded_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter that is spread over processes, None where there is none."""
    return next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None)


def refuse_sharded(model: nn.Module, instead: str) -> None:
    """Raises ValueError where a parameter is spread over processes; ``instead`` says what to do."""
    name = sharded_parameter(model)
    if name is not None:
        raise ValueError(f"{name} is sharded over several processes; {instead}")
