"""The site that Sphinx makes of docs/ and of the docstrings: it builds, and nothing public is left out of it."""

from __future__ import annotations

import inspect
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from docutils import nodes
from sphinx import addnodes
from typer.main import get_command

import tcurlora_ext as tcur
from tcurlora_ext.cli.app import app
from tcurlora_ext.integrations import peft
from tcurlora_ext.operator.backends.native import extension

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Entry:
    """What the reference says of a name."""

    parameter_list: str
    description: str
    parameters: set[str]


NO_ENTRY = Entry("", "", set())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of the site, and how the build went."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "--builder", "html"]
    return folder, subprocess.run([*command, ROOT / "docs", folder], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(built: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def entries(site: Path) -> dict[str, Entry]:
    """The entries of the reference pages by full name."""
    found = {}
    for file in (site / ".doctrees" / "reference").glob("*.doctree"):
        for entry in pickle.loads(file.read_bytes()).findall(addnodes.desc):
            content = entry[-1]
            for signature in entry.findall(addnodes.desc_signature):
                if signature.parent is entry and signature["ids"]:
                    parameters = next(iter(signature.findall(addnodes.desc_parameterlist)), None)
                    found[signature["ids"][0]] = Entry(
                        "" if parameters is None else parameters.astext(),
                        " ".join(child.astext() for child in content if isinstance(child, nodes.paragraph)),
                        set(_described(content)),
                    )
    return found


def _described(content: nodes.Element) -> Iterator[str]:
    """The parameters that the field list of an entry has a description for."""
    for fields in (child for child in content if isinstance(child, nodes.field_list)):
        for name, body in fields:
            if name.astext() == "Parameters":
                for paragraph in body.findall(nodes.paragraph):
                    parameter, _, description = paragraph.astext().partition(" \N{EN DASH} ")
                    if description.strip():
                        yield parameter.split(" ")[0].lstrip("*")


def _own(target: Any) -> bool:
    return getattr(target, "__module__", "").startswith("tcurlora_ext")


def _public() -> dict[str, Any]:
    """Every public function and class by the name that a user writes; modules stand for what they define."""
    found = {}
    for package in (tcur, peft):
        for name in package.__all__:
            target = getattr(package, name)
            if isinstance(target, ModuleType):
                for inner, defined in vars(target).items():
                    public = (inspect.isfunction(defined) or inspect.isclass(defined)) and not inner.startswith("_")
                    if public and defined.__module__ == target.__name__:
                        found[f"{package.__name__}.{name}.{inner}"] = defined
            else:
                found[f"{package.__name__}.{name}"] = target
    return found


def _methods(entries: dict[str, Entry]) -> Iterator[str]:
    """Public methods and properties that this package defines, of the class itself or of the base that has an entry."""
    for name, kind in _public().items():
        bases = kind.__mro__ if inspect.isclass(kind) else ()
        foreign = [base for base in bases if not _own(base)]
        for base in (base for base in bases if _own(base)):
            for inner, defined in vars(base).items():
                method = inspect.isfunction(defined) or isinstance(defined, (classmethod, staticmethod, property))
                overrides = any(hasattr(other, inner) for other in foreign) and inner != "forward"
                if method and not inner.startswith("_") and not overrides:
                    here, there = f"{name}.{inner}", f"{base.__module__}.{base.__qualname__}.{inner}"
                    yield here if here in entries else there


def _parameters(target: Any) -> set[str]:
    """The parameters of a function, or of a constructor that this package writes."""
    if inspect.isclass(target) and not _own(target.__init__):
        return set()
    names = set(inspect.signature(target).parameters) - {"self", "cls"}
    if inspect.isclass(target) and issubclass(target, peft.TcurLoraConfig):
        names &= set(vars(target)["__annotations__"])  # PEFT says what its own fields are
    return names


def _left_out(target: Any, parameter_list: str) -> set[str]:
    return {name for name in _parameters(target) if name not in parameter_list}


def _callables(entries: dict[str, Entry]) -> Iterator[tuple[str, Any]]:
    """Functions and methods that have an entry, and public classes."""
    public = _public()
    for name in entries:
        if name.startswith("tcurlora_ext."):
            with suppress(AttributeError):  # an attribute that only instances have
                target = pkgutil.resolve_name(name)
                if inspect.isroutine(target) or name in public:
                    yield name, target


def test_the_site_builds_without_a_warning(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert built[1].returncode == 0, built[1].stderr


def test_every_public_name_has_an_entry_with_a_signature_and_a_description(entries: dict[str, Entry]) -> None:
    names = _public()
    assert len(names) > 25
    assert [name for name in names if not entries.get(name, NO_ENTRY).description.strip()] == []
    assert [name for name, target in names.items() if _left_out(target, entries[name].parameter_list)] == []


def test_every_parameter_is_described(entries: dict[str, Entry]) -> None:
    targets = dict(_callables(entries))
    assert targets.keys() > _public().keys()
    undescribed = {name: _parameters(target) - entries[name].parameters for name, target in targets.items()}
    assert {name: names for name, names in undescribed.items() if names} == {}


def test_every_public_method_has_an_entry_with_a_description(entries: dict[str, Entry]) -> None:
    names = list(_methods(entries))
    assert "tcurlora_ext.TCURStack.core_slices" in names
    assert [name for name in names if not entries.get(name, NO_ENTRY).description.strip()] == []


@pytest.mark.skipif(extension() is None, reason="the operators of a batch of many adapters come from C++")
@pytest.mark.parametrize("operator", ["riding_many", "ride_many", "ride_many_backward", "gathered"])
def test_so_does_that_of_an_operator_of_many_adapters(operator: str) -> None:
    page = " ".join((ROOT / "docs" / "reference" / "operator.rst").read_text().split())
    schema = getattr(torch.ops.tcurlora, operator).default._schema
    assert str(schema) in page
    parameters = ", ".join(argument.name for argument in schema.arguments)
    assert f".. py:function:: torch.ops.tcurlora.{operator}({parameters})" in page


@pytest.mark.parametrize("operator", ["linear", "forward", "backward"])
def test_an_operators_entry_shows_the_schema_that_is_registered(operator: str) -> None:
    page = " ".join((ROOT / "docs" / "reference" / "operator.rst").read_text().split())
    schema = str(getattr(torch.ops.tcurlora, operator).default._schema)
    assert schema in page


def test_the_commands_page_lists_every_option(site: Path) -> None:
    page = (site / "reference" / "command.html").read_text()
    commands: Any = get_command(app)
    options = {
        option
        for command in commands.commands.values()
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in parameter.opts
    }
    assert len(options) > 40
    assert [option for option in options if f">{option}" not in page] == []


class _Links(HTMLParser):
    """The targets of a page's links and pictures, and the places within it that a link may lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value is not None and tag in ("a", "img"):
                self.targets.append(value)
            elif name == "id" and value is not None:
                self.places.add(value)


def test_links_within_the_site_lead_somewhere(site: Path) -> None:
    pages = {}
    for file in site.rglob("*.html"):
        pages[file.resolve()] = links = _Links()
        links.feed(file.read_text())
    broken, checked = [], 0
    for page, links in pages.items():
        for target in links.targets:
            path, _, place = target.partition("#")
            if "://" in path or path.startswith(("mailto:", "data:")):
                continue
            file = (page.parent / path).resolve() if path else page
            known = file.exists() and (not place or file not in pages or place in pages[file].places)
            checked += 1
            if not known:
                broken.append(f"{page.name}: {target}")
    assert checked > 1000
    assert broken == []


def test_links_to_files_beside_the_docs_bring_these_files(site: Path) -> None:
    brought = {file.name: file for file in (site / "_downloads").rglob("*.*") if file.is_file()}
    source = ROOT / "tests" / "integrations" / "peft" / "test_saving.py"
    assert brought[source.name].read_bytes() == source.read_bytes()
