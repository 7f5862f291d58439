"""``tcurlora doctor``: which packages and devices there are, and which backends work."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec

from tcurlora_ext.io.table import terminal
from tcurlora_ext.io.versions import version_of

PACKAGES = ("tcurlora_ext", "torch", "triton", "nvtx", "numpy", "safetensors", "monai", "peft", "transformers")
SEGMENTATION = ("monai", "einops", "nibabel", "nilearn", "scipy", "matplotlib", "jinja2", "pandas", "peft")


def doctor() -> None:
    """Show versions, devices and backends, and why a backend does not work. The exit code is 0 whatever is found.

    The first line says so where torch is a CUDA build and the extension has no CUDA kernels.
    """
    from rich.table import Table
    from rich.text import Text

    sections = {
        "versions": _versions(), "devices": _devices(), "extension": _extension(), "backends": _backends(),
        "extras": [_segmentation()],
    }  # fmt: skip
    table = Table.grid(padding=(0, 2, 0, 0))
    for title, lines in sections.items():
        table.add_row(Text(title, "bold"))
        for name, text in lines:
            table.add_row(Text(f"  {name}"), Text(text))
    warning = _without_cuda()
    if warning:
        terminal().print(Text(warning, "bold"))
    terminal().print(table)


def _without_cuda() -> str:
    """What is wrong where torch computes on GPUs and the extension does not; "" otherwise."""
    import torch

    from tcurlora_ext.operator.backends import missing

    reason = missing("native", "cuda") if torch.version.cuda else ""
    if not reason:
        return ""
    return (
        f"without CUDA kernels: torch {torch.__version__} is a CUDA build, but {reason}; with TCURLORA_BUILD=1 in the "
        "environment, an installation stops at what went wrong"
    )


def _version(package: str) -> str:
    missing = "found, but not installed as a package" if find_spec(package) else "not installed"
    return version_of(package) or missing


def _versions() -> list[tuple[str, str]]:
    import torch

    lines = [("python", f"{platform.python_version()} on {platform.platform()}")]
    lines += [(package, _version(package)) for package in PACKAGES]
    lines.append(("CUDA of torch", torch.version.cuda or "none: this torch is built for the CPU"))
    return lines


def _devices() -> list[tuple[str, str]]:
    import torch

    lines = [("cpu", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        reason = "torch sees none" if torch.version.cuda else "torch is built for the CPU"
        return [*lines, ("cuda", f"no device: {reason}")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        lines.append((f"cuda:{index}", f"{about.name}, capability {about.major}.{about.minor}, {memory:.1f} GiB"))
    return lines


def _extension() -> list[tuple[str, str]]:
    from tcurlora_ext.operator.backends import missing
    from tcurlora_ext.operator.backends.native import extension

    built = extension()
    if built is None:
        return [("built", f"no: {missing('native', 'cpu')}")]
    return [(name, value if isinstance(value, str) else ", ".join(value)) for name, value in built.build().items()]


def _backends() -> list[tuple[str, str]]:
    from tcurlora_ext.operator.backends import backends

    return [(name, f"{'works' if status else 'does not work'}: {status.reason}") for name, status in backends().items()]


def _segmentation() -> tuple[str, str]:
    missing = [package for package in SEGMENTATION if find_spec(package) is None]
    if not missing:
        return "segmentation", "installed"
    return "segmentation", f"without {', '.join(missing)}: pip install 'tcurlora_ext[segmentation]'"
