"""The CUDA sources as compilers see them, with no GPU: registers, stack and spills; includes; the glue's types."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ARCHITECTURES = ("80", "90", "100")
# Kernels of each source: three element types with the ranks 1, 2, 4, 8, 16, multiples of 4 and of 2, and any, and
# float64 with any; for the core's gradient also the sums of chunks, of two types into four.
RANKED = {"middle_forward": 3 * 8 + 1, "middle_backward": 3 * 8 + 1, "core_gradient": 3 * 8 + 1 + 2 * 4}
# The riding form's: four element types, with rows in runs of 16 bytes and in single elements; dh, and the chunks' sums.
KERNELS = {**RANKED, "riding_forward": 4 * 2, "riding_backward": 4 + 4}
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@pytest.fixture(scope="module")
def reports(nvcc: str, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ptxas reports of each source, all architectures in one call of nvcc and two calls at a time."""
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]

    def compile(source: Path) -> str:
        options = ["-std=c++17", "-O3", "-Xptxas=-v,-warn-spills,-warn-lmem-usage", *targets]
        command = [nvcc, *options, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    found = sorted(sources.glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        return {source.stem: said for source, said in zip(found, pool.map(compile, found), strict=True)}


def test_every_source_is_known(sources: Path) -> None:
    assert {source.stem for source in sources.glob("*.cu")} == set(KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_lives_in_registers(reports: dict[str, str], name: str) -> None:
    said = reports[name]
    for number in ARCHITECTURES:
        compiled = re.findall(rf"Compiling entry function '(\w+)' for 'sm_{number}'", said)
        assert len(set(compiled)) == KERNELS[name], f"sm_{number}: {len(set(compiled))} kernels"
    memory = MEMORY.findall(said)
    assert len(memory) >= KERNELS[name] * len(ARCHITECTURES)
    assert set(memory) == {("0", "0", "0")}, said[-4000:]
    assert "warning" not in said, said[-4000:]


@pytest.fixture(scope="module")
def bodies(nvcc: str, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Source -> mangled name of a kernel -> its PTX for sm_90."""
    folder = tmp_path_factory.mktemp("ptx")
    found = {}
    for name, number in KERNELS.items():
        output = folder / f"{name}.ptx"
        command = [nvcc, "-std=c++17", "-O3", "-arch=compute_90", "-ptx", str(sources / f"{name}.cu")]
        command += ["-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        texts = re.split(r"\.visible \.entry ", output.read_text())[1:]
        found[name] = {text.split("(")[0]: text for text in texts}
        assert len(found[name]) == number
    return found


def accesses(kernels: dict[str, str], known: str, operation: str) -> list[str]:
    """The forms of a bfloat16 kernel's loads or stores; ``known`` is the mangled class of csrc/cuda/tiles.h."""
    (body,) = [text for name, text in kernels.items() if f"I13__nv_bfloat16NS0_{known}" in name]
    return re.findall(rf"\b{operation}\.global\.(\S+)", body)


@pytest.mark.parametrize("name", ["middle_forward", "middle_backward"])
def test_rank_8_in_bfloat16_reads_words_of_16_bytes(bodies: dict[str, dict[str, str]], name: str) -> None:
    """The block of one token is 8 numbers of 2 bytes; two threads of 4 numbers each write one."""
    loads = accesses(bodies[name], "4RankILi8E", "ld")
    assert len(loads) >= 8
    assert {load.split(".")[0] for load in loads} == {"v4"}
    stores = accesses(bodies[name], "4RankILi8E", "st")
    assert len(stores) == 4  # the real and the imaginary part of two tokens
    assert set(stores) == {"v2.b32"}


@pytest.mark.parametrize("unit", [2, 4])
@pytest.mark.parametrize("name", sorted(RANKED))
def test_other_ranks_read_and_write_runs_of_their_multiple(
    bodies: dict[str, dict[str, str]], name: str, unit: int
) -> None:
    """As many elements as the general kernel (multiples of 1) with a half or a quarter of its accesses."""
    for operation in ("ld", "st") if name != "core_gradient" else ("ld",):  # its sums are written one by one
        runs, single = (accesses(bodies[name], f"11MultiplesOfILi{n}E", operation) for n in (unit, 1))
        assert len(runs) * unit == len(single) > 0
        if operation == "ld":
            assert {access.split(".")[0] for access in runs} == {f"v{unit}"}
        else:
            assert set(runs) == {"b32" if unit == 2 else "v2.b32"}


def test_rows_are_copied_in_words_of_16_bytes(bodies: dict[str, dict[str, str]]) -> None:
    """Four for each thread before it writes the first; the chosen entries are single elements."""
    (body,) = [text for name, text in bodies["riding_forward"].items() if "I13__nv_bfloat16Li8E" in name]
    accesses = {operation: re.findall(rf"\b{operation}\.global\.(\S+)", body) for operation in ("ld", "st")}
    assert sum(access.startswith("v4") for access in accesses["ld"]) == 4
    assert sum(access.startswith("v4") for access in accesses["st"]) == 4
    assert len([access for access in accesses["st"] if not access.startswith("v4")]) == 1


def included(source: Path) -> tuple[set[Path], set[str]]:
    """The project's files that a source reaches through its includes, and all other headers that they name."""
    files, others, waiting = set[Path](), set[str](), [source.resolve()]
    while waiting:
        file = waiting.pop()
        if file in files:
            continue
        files.add(file)
        for quote, name in re.findall(r'^\s*#\s*include\s*([<"])([^">]+)[">]', file.read_text(), re.MULTILINE):
            if quote == '"':
                waiting.append((file.parent / name).resolve())
            else:
                others.add(name)
    return files, others


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_no_kernel_reaches_a_header_of_torch(sources: Path, name: str) -> None:
    files, others = included(sources / f"{name}.cu")
    assert {"launch.h", "kernels.h", "tiles.h"} <= {file.name for file in files}
    assert "cuda_runtime.h" in others
    assert not [header for header in others if header.split("/")[0] in {"torch", "ATen", "c10", "caffe2", "pybind11"}]


@pytest.mark.parametrize("name", ["middle", "riding"])
def test_the_glue_fits_torch_and_the_kernels(
    compiler: str, cuda_headers: list[str], sources: Path, tmp_path: Path, name: str
) -> None:
    torch_folders = cpp_extension.include_paths()
    macros = Path("c10", "cuda", "impl", "cuda_cmake_macros.h")
    if not any((Path(folder) / macros).exists() for folder in torch_folders):  # a CPU build of torch leaves it out
        (tmp_path / macros).parent.mkdir(parents=True)
        (tmp_path / macros).write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    folders = [option for folder in (*torch_folders, tmp_path) for option in ("-isystem", str(folder))]
    # torch 2.6 to 2.14 ask for C++17 or C++20: the newer suits all.
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", *folders, *cuda_headers]
    done = subprocess.run([*command, str(sources / f"{name}.cpp")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr, done.stderr[-4000:]
