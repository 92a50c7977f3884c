"""What holds the house together: import direction, import cost, and a compiled module without torch."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typed_program

import fusedres
from fusedres import kernels

PACKAGE = Path(fusedres.__file__).parent

# each layer may import from those after it, and from itself
LAYERS = [
    "cli",
    "training",
    "_convert",
    "detection",
    "models",
    "_explain",
    "inference",
    "nn",
    "functional",
    "autotune",
    "_ownership",
    "ops",
    "kernels",
    "plan",
    "_C",
]
LEAVES = {"plan", "_C", "_version", "_ownership"}


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Layers of fusedres that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {layer_of(a.name) for a in node.names if a.name.startswith("fusedres.")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "fusedres":
                found |= {a.name for a in node.names}
            elif node.module.startswith("fusedres."):
                found.add(layer_of(node.module))
    return found


def files():
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__main__.py" and p.parent != PACKAGE / "..")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    if path == PACKAGE / "__init__.py":
        return
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in LEAVES:
        assert imports(path) <= {own, "kernels" if own == "plan" else own} - {"kernels"}
        return
    for target in imports(path) - {own, "_version", "__version__"}:
        if target not in LAYERS:  # a public name of fusedres/__init__: only the top may use those
            assert own in ("cli", "training"), f"{path} imports fusedres.{target}"
        else:
            assert LAYERS.index(target) > LAYERS.index(own), f"{own} must not import {target}"


def test_every_module_has_a_layer():
    names = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in files()}
    assert names - {"__init__", "_version"} <= set(LAYERS)


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, check=False
    )


def test_import_has_no_heavy_company_and_no_side_effects():
    heavy = ["torchvision", "timm", "triton", "matplotlib", "sklearn", "fusedres.cli", "fusedres.training"]
    code = f"""
import sys, torch
before = set(sys.modules)
import fusedres
print([m for m in {heavy} if m in sys.modules and m not in before])
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_import_takes_at_most_300_ms_over_torch():
    """The bound of the contract; the import itself takes a tenth of it."""
    code = "import time, torch; t = time.perf_counter(); import fusedres; print(time.perf_counter() - t)"
    assert min(float(python(code).stdout) for _ in range(3)) < 0.3


@pytest.mark.parametrize("missing", ["fusedres._C", "triton", "torchvision"])
def test_works_without(missing):
    """What is missing is named, and what stands in for it runs."""
    code = f"""
import sys, importlib.util
sys.modules[{missing!r}] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)
import torch, fusedres
from fusedres import kernels, ops
x = torch.randn(2, 3, 64, 64)
model = fusedres.resnet18()
model(x).sum().backward()
print(ops.choice("bn_act", x.device, x.dtype, "auto"), kernels.unavailable())
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    if missing == "fusedres._C":
        assert "implementation='aten'" in result.stdout and "can't be loaded" in result.stdout
    if missing == "triton":
        assert "triton is not installed" in result.stdout


def test_the_program_that_mypy_checks_runs():
    typed_program.main()


def stub() -> tuple[dict[str, tuple[list[str], str]], set[str]]:
    """Functions of the stub, each with the kinds of its parameters and of what it returns; attributes."""
    body = ast.parse((PACKAGE / "_C.pyi").read_text()).body
    functions = {
        node.name: ([ast.unparse(a.annotation) for a in node.args.args], ast.unparse(node.returns))
        for node in body
        if isinstance(node, ast.FunctionDef)
    }
    return functions, {node.target.id for node in body if isinstance(node, ast.AnnAssign)}


def plain(kind: str) -> str:
    """A kind without what pybind11 adds to it: ``typing.SupportsInt | typing.SupportsIndex`` is an int."""
    kind = re.sub(r"(collections\.abc\.)?Sequence", "list", kind)
    for protocol, of in (("Int", "int"), ("Float", "float")):
        kind = re.sub(rf"typing\.Supports{protocol}( \| typing\.SupportsIndex)?", of, kind)
    return kind


@pytest.mark.skipif("cpu" in kernels.unavailable(), reason="the compiled module is not built")
class TestCompiledModule:
    def test_links_no_torch(self):
        from fusedres import _C

        needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
        assert "libtorch" not in needed and "libc10" not in needed and "libcudart" not in needed
        assert b"at::Tensor" not in Path(_C.__file__).read_bytes()

    def test_loads_without_torch(self):
        """torch's OpenMP runtime is shared when torch is there, and not needed when it isn't."""
        from fusedres import _C

        code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
print(module.cpu_isa(), "torch" in sys.modules)
"""
        result = python(code)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()[1] == "False"

    def test_stub_has_every_name(self):
        from fusedres import _C

        functions, attributes = stub()
        built = {name for name in dir(_C) if not name.startswith("_")}
        missing = (functions.keys() | attributes) - built
        assert built <= functions.keys() | attributes
        assert missing == set() if _C.cuda_archs else all(name.startswith("cuda_") for name in missing)

    def test_stub_has_every_signature(self):
        """Parameters and what is returned, as pybind11 writes them above a docstring."""
        from fusedres import _C

        for name, (parameters, returned) in stub()[0].items():
            if hasattr(_C, name):
                said = re.match(r"\w+\((.*?)\) -> (\w+)", getattr(_C, name).__doc__)
                assert said is not None and said[2] == returned, name
                kinds = re.findall(r"arg\d+: (.+?)(?:, (?=arg)|$)", said[1])
                assert [plain(kind) for kind in kinds] == [plain(kind) for kind in parameters], name

    def test_refuses_what_it_would_misread(self):
        from fusedres import _C

        shape = ("float32", 1, 4, 4, False, 1)
        with pytest.raises(ValueError, match="x must not be null"):
            _C.cpu_bn_stats(*shape, 0, 0, 0, 1e-5, 8)
        with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got int8"):
            _C.cpu_bn_stats("int8", *shape[1:], 8, 0, 0, 1e-5, 8)
        with pytest.raises(ValueError, match="an activation must not be empty"):
            _C.cpu_bn_act("float32", 0, 4, 4, False, 1, 8, 8, 0, 0, True, 8)
        with pytest.raises(ValueError, match="no instruction set sse9"):
            _C.use_cpu_isa("sse9")

    def test_gil_is_released(self):
        """Another thread goes on while a kernel runs."""
        import threading

        import torch

        x = torch.zeros(16, 64, 112, 112).to(memory_format=torch.channels_last)
        ticks, calls, done = [], [], threading.Event()

        def tick():
            while not done.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0)

        thread = threading.Thread(target=tick)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        thread.start()
        for _ in range(20):
            start = time.perf_counter()
            torch.ops.fusedres.bn_stats(x, None, None, 1e-5)
            calls.append((start, time.perf_counter()))
        done.set()
        thread.join()
        torch.set_num_threads(threads)
        # away from both ends of a call, where Python runs anyway
        inside = [(start + (end - start) / 4, end - (end - start) / 4) for start, end in calls]
        assert any(start < t < end for start, end in inside for t in ticks)
