"""The CUDA kernels as nvcc compiles them for every architecture: registers, spills, 16-byte accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
REGISTERS = 65536  # of a multiprocessor

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
    pytest.mark.skipif(not CUDA.is_dir(), reason="needs the source tree"),
]


def compile_(source: Path, arch: str, folder: Path) -> tuple[str, str]:
    """ptxas's report, and the PTX."""
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", "-O3", f"-I{CUDA}", "-Xptxas", "-v", "-cubin"]
    report = subprocess.run(
        [
            "nvcc",
            *flags,
            code,
            "--keep",
            "--keep-dir",
            str(folder),
            "-o",
            str(folder / "a.cubin"),
            str(source),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    (ptx,) = folder.glob("*.ptx")
    return report, ptx.read_text()


def resources(report: str) -> dict[str, dict[str, int]]:
    """Kernel name -> stack, spills and registers, from ptxas -v."""
    kernels = {}
    for name, stack, stores, loads, registers in re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers",
        report,
    ):
        kernels[name] = {
            "stack": int(stack),
            "spill": int(stores) + int(loads),
            "registers": int(registers),
        }
    return kernels


def bodies(ptx: str) -> dict[str, tuple[str, str]]:
    """Kernel name -> its directives and its instructions."""
    found = re.findall(r"\.entry (\w+)\(.*?\n\)(.*?)\n\{(.*?)\n\}", ptx, re.DOTALL)
    return {name: (directives, body) for name, directives, body in found}


def resident_threads(directives: str) -> int:
    """Threads that the launch bounds want on a multiprocessor together."""
    (threads,) = re.findall(r"\.maxntid (\d+)", directives)
    blocks = re.findall(r"\.minnctapersm (\d+)", directives) or ["1"]
    return int(threads) * int(blocks[0])


def width(name: str) -> int:
    """How many values the kernel takes at a time: its template's first number, behind the type."""
    found = re.search(r"kernelI(?:f|6__half|13__nv_bfloat16)Li(\d+)E", name)
    return int(found[1]) if found else 1


def check_tensor_cores(body: str) -> None:
    """Tensors come and go 16 bytes at a time; what else is stored are a thread's two partial sums."""
    assert "mma.sync" in body
    copies = re.findall(r"cp\.async\.c[ga]\.shared\.global \[[^]]*\], \[[^]]*\], (\d+)", body)
    assert copies and set(copies) == {"16"}
    assert "ld.global" not in body
    stores = Counter(re.findall(r"st\.global\.(v\d)?", body))
    assert stores["v4"] and set(stores) <= {"v4", ""} and stores[""] <= 2, stores


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda p: p.stem)
def test_codegen(source, arch, tmp_path):
    report, ptx = compile_(source, arch, tmp_path)
    found, code = resources(report), bodies(ptx)
    assert len(found) == report.count("Compiling entry function"), "the report was not understood"
    assert found and found.keys() == code.keys()
    for name, used in found.items():
        directives, body = code[name]
        assert used["stack"] == 0 and used["spill"] == 0, (name, used)
        assert used["registers"] * resident_threads(directives) <= REGISTERS, (name, used)
        if "ConvTile" in name:
            check_tensor_cores(body)
            continue
        if width(name) == 1 and "cast_weights" not in name:
            continue
        assert re.search(r"ld\.global(\.nc)?(\.\w+)*\.v4", body), f"{name}: no 16-byte loads"
        stores = Counter(re.findall(r"st\.global\.(v\d)?", body))
        # activations are stored 16 bytes at a time; sums, and what is left of a weight, value by value
        if "partial" in name or "avg_pool_kernel" in name:
            continue
        assert stores["v4"], f"{name}: no 16-byte stores"
        if "bn_relu_maxpool_kernel" in name:
            assert stores["v2"] + stores[""] == 1, (name, stores)  # the index, half as wide
        elif "cast_weights" not in name:
            assert set(stores) == {"v4"}, (name, stores)


def test_the_report_parser_sees_a_spill(tmp_path):
    """A kernel that can't do without local memory is caught."""
    source = tmp_path / "bad.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) bad(float* p, int n) {\n"
        "  float a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[i] = p[i * 7];\n"
        "  for (int i = 0; i < n; ++i) a[(i * 13) & 63] += p[i];\n"
        "  for (int i = 0; i < 64; ++i) p[i] = a[i];\n"
        "}\n"
    )
    report, _ = compile_(source, "90a", tmp_path)
    assert next(iter(resources(report).values()))["stack"] > 0
