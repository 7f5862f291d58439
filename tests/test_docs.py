"""README, docs and files for contributors: their Python runs, their links lead somewhere, and they say what is so."""

from __future__ import annotations

import re
import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tcurlora_ext as tcur

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOT_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PICTURES = sorted((ROOT / "docs" / "figures").glob("*.png"))
BLOCKS = {page.name: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S) for page in PAGES}


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_code_runs_block_after_block(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, code in enumerate(BLOCKS[page]):
        exec(compile(code, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, *ROOT_PAGES], ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [ROOT / "docs" / "architecture.md", ROOT / "docs" / "kernels.md", *ROOT_PAGES])
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Paths in backquotes, from the root or from the package: ``csrc/autograd.cpp``, ``adapter/layer/linear.py``."""
    folders = "|".join(path.name for base in (ROOT, ROOT / "tcurlora_ext") for path in base.iterdir() if path.is_dir())
    named = re.findall(rf"`((?:{folders})/[\w./]+)`", page.read_text())
    missing = [name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "tcurlora_ext"))]
    assert [name for name in missing if not name.startswith("build/")] == []


def test_the_readme_is_short_and_names_both_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 80
    for command in ("make demo", "make test"):
        assert any(line.strip().startswith(command) for line in lines)


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    versions = re.findall(r"^## (.+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == tcur.__version__


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_metadata_takes_version_and_licence_from_their_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tcurlora_ext.__version__"}
    assert "license" in project["project"]["dynamic"]
    assert 'setup(license="Apache-2.0"' in (ROOT / "setup.py").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_pictures_are_what_their_program_draws_and_small(tmp_path: Path) -> None:
    """The same names and sizes; bytes differ between versions of matplotlib."""
    runpy.run_path(str(ROOT / "docs" / "draw_figures.py"))["main"](tmp_path)
    assert [picture.name for picture in PICTURES] == sorted(picture.name for picture in tmp_path.iterdir())
    for picture in PICTURES:
        found, drawn = (path.read_bytes() for path in (picture, tmp_path / picture.name))
        assert struct.unpack(">II", found[16:24]) == struct.unpack(">II", drawn[16:24])
        assert len(found) < 100_000


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_workflow_runs_what_the_makefile_has() -> None:
    steps = _yaml(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == ["make test", "make test-all"]
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-2:] == commands


def test_hooks_and_issue_templates_are_whole() -> None:
    hooks = _yaml(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert {"ruff", "ruff-format", "mypy"} <= {hook["id"] for hook in hooks}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
    for name in ("bug", "feature"):
        form = _yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
        assert form["name"]
        assert form["description"]
        assert [part["attributes"]["label"] for part in form["body"]]
