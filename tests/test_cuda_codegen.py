"""The CUDA kernels as nvcc compiles them for every architecture: registers, spills, 16-byte accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
# what a multiprocessor has: 65536 registers and at least 1536 threads
REGISTERS_FOR_FULL_OCCUPANCY = 65536 // 1536

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
    pytest.mark.skipif(not CUDA.is_dir(), reason="needs the source tree"),
]


def compile_(source: Path, arch: str, folder: Path) -> tuple[str, str]:
    """ptxas's report, and the PTX."""
    ptx = folder / f"{source.stem}_{arch}.ptx"
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["nvcc", "-std=c++17", "-O3", f"-I{source.parent}", str(source)]
    report = subprocess.run(
        [*flags, code, "-Xptxas", "-v", "-cubin", "-o", str(folder / "a.cubin")],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    subprocess.run([*flags, f"-arch=compute_{arch}", "-ptx", "-o", str(ptx)], check=True)
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


def bodies(ptx: str) -> dict[str, str]:
    return dict(re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", ptx, re.DOTALL))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda p: p.stem)
def test_codegen(source, arch, tmp_path):
    report, ptx = compile_(source, arch, tmp_path)
    found = resources(report)
    assert len(found) == report.count("Compiling entry function"), "the report was not understood"
    assert found
    for name, used in found.items():
        assert used["stack"] == 0 and used["spill"] == 0, (name, used)
    for name, body in bodies(ptx).items():
        if "pack" not in name:
            continue
        assert re.search(r"ld\.global(\.nc)?(\.\w+)*\.v4", body), f"{name}: no 16-byte loads"
        assert re.search(r"st\.global\.v4", body), f"{name}: no 16-byte stores"
        activations = body.count("st.global")
        assert activations == len(re.findall(r"st\.global\.v4", body)), f"{name}: narrow stores"


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
