"""Registration of the method with PEFT."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from .config import TcurLoraConfig, peft_type
from .model import TcurLoraModel


def register() -> None:
    """Register the method under ``tcurlora``; without effect if it is already registered."""
    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PeftType(peft_type()).lower(), config_cls=TcurLoraConfig, model_cls=TcurLoraModel)
