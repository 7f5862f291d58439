"""What is distributed: sources in the sdist, modules in the wheel, and a wheel that works without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from it without the extension."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        env=os.environ | {"TCURLORA_BUILD": "0"}, check=True, capture_output=True,
    )  # fmt: skip
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def modules() -> set[str]:
    package = ROOT / "tcurlora_ext"  # rglob does not enter the folders that are links
    files = [path for folder in (package, package / "kernels", package / "bench") for path in folder.rglob("*.py")]
    return {str(path.relative_to(ROOT)) for path in files}


def test_the_sdist_holds_everything_that_is_built(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.is_file()}
    examples = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*.py")}
    assert len(sources) > 10
    assert len(examples) > 2
    assert names >= sources | modules() | examples | {"setup.py", "pyproject.toml", "CMakeLists.txt"}


def test_the_wheel_holds_every_module(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as file:
        names = set(file.namelist())
    assert {name for name in names if name.startswith("tcurlora_ext/") and name.endswith(".py")} == modules()
    assert "tcurlora_ext/py.typed" in names
    assert "tcurlora_ext/segmentation/report/report.html.j2" in names
    assert not [name for name in names if name.startswith("examples")]


def test_the_wheel_adapts_a_layer_without_the_extension(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(distributions[1]) as file:
        file.extractall(tmp_path)
    code = (
        # An editable installation of this package would lend its extension.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "import torch, tcurlora_ext as tcur; assert tcur.__file__.startswith(r'" + str(tmp_path) + "')\n"
        "layer = tcur.TCURLinear(8, 12, rank=2, slices=3); layer(torch.randn(5, 8)).sum().backward()\n"
        "assert layer.stack.core.grad.any(); print(tcur.backends()['native'].reason)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout
