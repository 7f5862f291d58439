"""Which cases train and which validate: lists of `splits.json`, folds, or a random draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tcurlora_ext.io.records import read_json
from tcurlora_ext.segmentation.dataset.formats import FORMS, stem
from tcurlora_ext.segmentation.dataset.layouts.files import Case, Files, Layout, contents, short

FINAL = "splits_final.json"  # nnU-Net's


def listed_cases(path: Path, name: str, files: Files) -> tuple[Case, ...]:
    """The cases of one list of splits.json.

    Raises:
        FileNotFoundError, ValueError: The list is missing or has another form, or a case of it has no file.
    """
    return _cases_of(path, name, _list_of(path, read_json(path), name), files)


def _cases_of(path: Path, name: str, chosen: list[Any], files: Files) -> tuple[Case, ...]:
    if not chosen:
        raise ValueError(f"{path}: list '{name}' is empty, expected at least one case")
    strange = [value for value in chosen if not isinstance(value, (str, int))]
    if strange:
        raise ValueError(f"{path}: list '{name}' holds {short(strange[0])}, expected names of cases")
    names = [stem(Path(str(value)).name) for value in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: list '{name}' holds {len(names) - len(set(names))} cases twice, expected each once")
    return tuple(files.case(wanted, f"{path}, list '{name}',") for wanted in names)


def _list_of(path: Path, content: Any, name: str) -> list[Any]:
    """A list of splits.json by its full name ("train", "fold_0/train") or, where only one has it, by the last part."""
    form = '{"train": ["NAME", ...], "val": [...]}'
    if not isinstance(content, dict):
        folds = ""
        if isinstance(content, list) and content and isinstance(content[0], dict):
            folds = f" of {len(content)} objects (nnU-Net's form of folds)"
            form = f"{form}; of folds, expected {FINAL} and --fold"
        raise ValueError(f"{path}: found a {type(content).__name__}{folds}, expected an object with lists: {form}")
    lists: dict[str, Any] = {}
    for key, value in content.items():
        lists |= {f"{key}/{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    full = [name] if name in lists else [key for key in lists if key.rpartition("/")[2] == name]
    if len(full) > 1:
        raise ValueError(f"{path}: found the list '{name}' as {', '.join(full)}, expected one of these full names")
    if not full:
        known = [key for key, value in lists.items() if isinstance(value, list)]
        raise ValueError(f"{path}: found no list '{name}', expected one of {', '.join(known) or f'those in {form}'}")
    chosen = lists[full[0]]
    if not isinstance(chosen, list):
        raise ValueError(f"{path}: found {short(chosen)} as '{full[0]}', expected a list of names of cases")
    return chosen


def fold_cases(layout: Layout, fold: int) -> dict[str, tuple[Case, ...]]:
    """The lists "train" and "val" of a fold: of nnU-Net's splits_final.json, or by the keys "fold" of a data list.

    Raises:
        FileNotFoundError: The data set has neither.
        ValueError: It has no such fold, or the fold has no case for one of the lists.
    """
    path, numbers = layout.root / FINAL, layout.files.folds
    if numbers:
        path = layout.source
        known = sorted(set(numbers.values()))
        lists = {
            "train": [name for name, number in numbers.items() if number != fold],
            "val": [name for name, number in numbers.items() if number == fold],
        }
    elif path.is_file():
        content = read_json(path)
        known = list(range(len(content))) if isinstance(content, list) else []
        lists = content[fold] if fold in known else {}
        if not known or (fold in known and not _is_fold(lists)):
            form = '[{"train": ["NAME", ...], "val": [...]}, ...]'
            raise ValueError(f"{path}: found {short(lists or content)}, expected a list of folds: {form}")
    else:
        raise FileNotFoundError(
            f"{path}: no such file, nor has a list in {layout.source.name} the key 'fold'; expected one of the two for "
            f"fold {fold}"
        )
    if fold not in known:
        raise ValueError(f"fold: found {fold}, expected one of {', '.join(map(str, known))} as in {path}")
    return {name: _cases_of(path, f"fold {fold}/{name}", lists[name], layout.files) for name in ("train", "val")}


def _is_fold(lists: Any) -> bool:
    return isinstance(lists, dict) and all(isinstance(lists.get(name), list) for name in ("train", "val"))


def random_split(files: Files, fraction: float, seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """All cases that have a label, with a `fraction` of them drawn for validation; (training, validation)."""
    if not 0 < fraction < 1:
        raise ValueError(f"val-fraction: found {fraction}, expected a number between 0 and 1")
    place = files.label_source
    if len(files.labels) < 2:
        there = f" (the folder holds {contents(place)})" if place.is_dir() else ""
        raise ValueError(
            f"{place}: found {len(files.labels)} labels{there}, expected at least 2 to split into training and "
            f"validation, each {FORMS}"
        )
    cases = files.all_cases()
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(cases))
    count = min(max(1, round(fraction * len(cases))), len(cases) - 1)
    chosen = set(order[:count].tolist())
    return (
        tuple(case for index, case in enumerate(cases) if index not in chosen),
        tuple(case for index, case in enumerate(cases) if index in chosen),
    )
