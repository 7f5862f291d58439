"""The methods by name, found in the files of this folder, and names with options."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .base import Method, Unset

# In the order of tables; others follow by name.
_FIRST = ("head", "decoder", "full", "lora", "tcur", "tcur-learned")
# Options of which zero, and anything below it, would leave nothing to train.
_POSITIVE = ("rank", "alpha", "scale", "width", "batches", "step", "initial")
# What several methods share; every other file of this folder is a method.
_SHARED = ("base", "by_peft", "configuring", "registry", "wrapping")


def _found() -> dict[str, Method]:
    package, folder = __name__.rpartition(".")[0], str(Path(__file__).parent)
    names = [info.name for info in pkgutil.iter_modules([folder]) if info.name not in _SHARED]
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    methods = {module.METHOD.name: module.METHOD for module in modules}
    order = (*_FIRST, *sorted(set(methods) - set(_FIRST)))
    return {name: methods[name] for name in order}


METHODS: dict[str, Method] = _found()
# Those that run where none is named.
STANDARD = tuple(name for name, method in METHODS.items() if method.standard)


def get_methods(names: str | Sequence[str], given: Mapping[str, Any] | None = None) -> list[Method]:
    """Methods by their names, as a sequence or in one string with commas; "all" for the standard ones.

    A name may be followed by options of the method, ``lora:rank=1`` or ``tcur-learned:rank=4:bits=1``: one method then
    runs several times side by side.

    Args:
        names: The names.
        given: Values of options that a method needs, by the option's name, for methods that are not given one.

    Raises:
        ValueError: A name or an option is unknown, a value is not of the option's type, or a method is given twice.
    """
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    wanted = list(STANDARD) if wanted == ["all"] else wanted
    unknown = [name for name in wanted if name.partition(":")[0] not in METHODS]
    repeated = [name for index, name in enumerate(wanted) if name in wanted[:index]]
    if unknown or repeated or not wanted:
        found = ",".join(dict.fromkeys(unknown or repeated))
        times = " more than once" if repeated and not unknown else ""
        raise ValueError(f"method: found '{found}'{times}, expected each once of {', '.join(METHODS)} (or 'all')")
    methods = [_with_options(name, given or {}) for name in wanted]
    twice = [method.name for method in methods if sum(other.folder == method.folder for other in methods) > 1]
    if twice:
        raise ValueError(f"method: found {twice[0]} more than once, expected other options in each")
    return methods


def _with_options(text: str, given: Mapping[str, Any]) -> Method:
    name, *parts = text.split(":")
    method = METHODS[name]
    own: dict[str, Any] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if option not in method.options or not equals:
            raise ValueError(
                f"method: found '{part}' after {name}, expected OPTION=VALUE with one of "
                f"{', '.join(method.options) or 'no option: it has none'}"
            )
        own[option] = _value(name, option, value, method.options[option])
    shown = [f"{option}={Path(v).stem if isinstance(v, str) else str(v).lower()}" for option, v in own.items()]
    for option in (option for option, default in method.options.items() if default is None and option not in own):
        if given.get(option) is None:
            raise ValueError(f"method: {name} needs {option}, as in {name}:{option}=FILE")
        own[option] = str(given[option])
    return replace(method, name=":".join([name, *shown]), own=own)


def _value(method: str, option: str, text: str, default: Any) -> Any:
    kind = default.kind if isinstance(default, Unset) else str if default is None else type(default)
    if kind is str:
        return text
    expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
    expected += " above 0" if option in _POSITIVE else ""
    try:
        value = {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = None
    if value is None or (option in _POSITIVE and not 0 < value < math.inf):
        raise ValueError(f"method: {method}: {option} is '{text}', expected {expected}")
    return value


def learning_rate(method: Method, given: Mapping[str, float]) -> float:
    """The peak learning rate of a method: given for its full name, or for its name without options, or its own.

    Args:
        method: The method.
        given: Rates by name.
    """
    return given.get(method.name, given.get(method.base, method.lr))
