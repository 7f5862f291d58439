"""Parameters that FSDP2 sharded over processes: DTensors, recognised by ``full_tensor`` without importing the class."""

from __future__ import annotations

from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, for which every process has to call this; any other tensor is returned as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def sharded_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter that is sharded over processes; None where no parameter is."""
    return next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None)


def refuse_sharded(model: nn.Module, instead: str) -> None:
    """Raise ValueError where a parameter is sharded over processes; ``instead`` tells the user what to do."""
    name = sharded_parameter(model)
    if name is not None:
        raise ValueError(f"{name} is sharded over several processes; {instead}")
