"""The CUDA kernels as nvcc compiles them for every architecture: registers, spills, 16-byte accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
# 86 and 89 have the instructions of 80, and are left to `make codegen`
ARCHITECTURES = [
    "80",
    *(pytest.param(arch, marks=pytest.mark.codegen) for arch in ("86", "89")),
    "90a",
    "100",
    "120",
]
REGISTERS = 65536  # of a multiprocessor
# kernels that multiply on tensor cores
TENSOR_CORES = re.compile(
    r"(conv_fwd|conv_dgrad|conv_bias_act|bottleneck_infer|stem_conv|stem_pool|stem_wgrad_partial)_kernel"
)

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
    pytest.mark.skipif(not CUDA.is_dir(), reason="needs the source tree"),
]


def compile_(source: Path, arch: str, folder: Path) -> tuple[str, str]:
    """ptxas's report, and the PTX; the machine code is in a.cubin."""
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
        if TENSOR_CORES.search(name):
            continue  # see below
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

    convolutions = [name for name in found if TENSOR_CORES.search(name)]
    if not convolutions:
        return
    machine_code = disassembled(tmp_path / "a.cubin")
    for name in convolutions:
        instructions = Counter(machine_code[name])
        assert not [i for i in instructions if i.startswith(("STL", "LDL"))], name
        products = [i for i in instructions if i.startswith("HMMA.")]
        assert products and all(".F32" in i for i in products), (name, products)
        copies = [i for i in instructions if i.startswith("LDGSTS.")]
        # an image and the filters of a stem are rounded on their way into shared memory
        rounds = "stem_conv" in name or "stem_pool" in name
        assert bool(copies) != rounds and all(".128" in i for i in copies), (name, copies)
        stores = {i for i in instructions if i.startswith("STG.")}
        if "wgrad" in name:  # a reduction over rows: operands transposed, which 32-bit values can't be
            assert bool(instructions["LDSM.16.MT88.4"]) == ("IfE" not in name), name
            # sums of neighbours together, where they lie in neighbouring registers
            assert "STG.E.64" in stores and stores <= {"STG.E.64", "STG.E"}, (name, stores)
            continue
        assert instructions["LDSM.16.M88.4"], f"{name}: no ldmatrix of four matrices"
        # the output 16 bytes at a time; statistics of a column value by value
        assert "STG.E.128" in stores and stores <= {"STG.E.128", "STG.E"}, (name, stores)


def disassembled(cubin: Path) -> dict[str, list[str]]:
    """Kernel name -> its instructions' names, by the tool that comes with Triton."""
    bin_ = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin"
    text = subprocess.run(
        [bin_ / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    kernels: dict[str, list[str]] = {}
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            kernels[found[1]] = []
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            kernels[next(reversed(kernels))].append(found[1])
    return kernels


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
