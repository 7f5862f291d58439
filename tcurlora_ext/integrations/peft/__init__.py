"""tCURLoRA as a method of PEFT. Importing this package registers it under ``tcurlora``; see docs/peft.md."""

from .calibration import calibrate
from .config import TcurLoraConfig
from .hotswap import hotswap_adapter
from .layer import TcurLoraLinear
from .learning import learn_factors
from .model import TcurLoraModel
from .registration import register

__all__ = ["TcurLoraConfig", "TcurLoraLinear", "TcurLoraModel", "calibrate", "hotswap_adapter", "learn_factors"]

register()
