"""Builds kernels for the CPU emulation of CUDA: g++ with ASan and UBSan, one Python extension.

Python itself has no ASan, so the module loads only where environment() is set from the start:

    env $(python tests/emulation/build.py --env) pytest tests/emulation
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
OWN = [HERE / f"{name}.cpp" for name in ("module", "emulation", "memory", "tensor_core")]
HEADERS = ["cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "crt/host_config.h"]
JOBS = 2
SKIPPED = 77  # exit status where nothing can be built, as automake has it

FLAGS = [
    *("-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    "-fno-strict-aliasing",  # values move as words, which nvcc allows
    "-fno-thread-jumps",  # a barrier stays one place in the code, which is how two are told apart
]


@functools.cache
def cuda_headers() -> Path | None:
    """The folder of cuda_bf16.h: nvcc's, CUDA_HOME's, or that of the pip packages."""
    homes = []
    if shutil.which("nvcc"):  # which may be a script in front of the one that knows its home
        plan = subprocess.run(["nvcc", "--dryrun", "-E", "x.cu"], capture_output=True, text=True).stderr
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)]
    if "CUDA_HOME" in os.environ:
        homes.append(Path(os.environ["CUDA_HOME"]))
    if spec := importlib.util.find_spec("nvidia"):
        for nvidia in spec.submodule_search_locations or []:
            homes += [*sorted(Path(nvidia).glob("cu[0-9]*")), Path(nvidia) / "cuda_runtime"]
    for home in homes:
        for include in (home / "include", home / "targets" / "x86_64-linux" / "include"):
            if all((include / name).exists() for name in HEADERS):
                return include.resolve()
    return None


@functools.cache
def library(name: str) -> str:
    """Where g++ has a library, or "" if it has none."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return str(Path(found).resolve()) if os.path.isabs(found) else ""


@functools.cache
def unavailable() -> str:
    """Why nothing can be built here, or ""."""
    if not CUDA.is_dir():
        return "needs the source tree"
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "needs Linux on x86-64"
    if shutil.which("g++") is None:
        return "needs g++"
    if not library("libasan.so") or not library("libubsan.so"):
        return "needs g++'s libasan and libubsan"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "needs Python's headers"
    if cuda_headers() is None:
        return "needs CUDA's headers: nvcc on PATH, CUDA_HOME, or the packages nvidia-cuda-runtime and -crt"
    return ""


def environment() -> dict[str, str]:
    """What must be set before Python starts, for a module to be loaded."""
    return {
        # libstdc++ too: ASan looks for what throws exceptions when it starts, and never again
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",  # tensors are small: waiting for a second thread took most of the time
    }


def is_set() -> bool:
    """Whether this process was started with environment()."""
    return hasattr(ctypes.CDLL(None), "__asan_init")


def includes() -> list[str]:
    import pybind11

    own = [f"-I{folder}" for folder in (ROOT / "csrc", CUDA, HERE)]
    others = [pybind11.get_include(), sysconfig.get_path("include"), str(cuda_headers())]
    return own + [word for folder in others for word in ("-isystem", folder)]


def gxx(words: Sequence[str], target: Path) -> None:
    """Runs g++ into a file that appears when it is whole: it may be interrupted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(["g++", *words, "-o", str(unfinished)], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"g++ can't build {target.stem}:\n{done.stderr}")
    unfinished.replace(target)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process after the other builds into ``folder``: the next finds what it would have built."""
    import fcntl  # Linux has it

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(*parts: str | bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode() if isinstance(part, str) else part)
        hashed.update(b"\0")
    return hashed.hexdigest()[:16]


def with_headers(source: Path) -> list[Path]:
    """A source and those of our headers that it includes, in whatever way."""
    found, to_read = {source: None}, [source]
    while to_read:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', to_read.pop().read_text(), re.MULTILINE):
            for folder in (ROOT / "csrc", CUDA, HERE):
                header = folder / name
                if header.exists() and header not in found:
                    found[header] = None
                    to_read.append(header)
    return sorted(found)


def build(
    name: str, sources: Iterable[Path], definitions: Sequence[str] = (), folder: Path | None = None
) -> Path:
    """The extension module `name` of these sources and the emulation's own; built if it isn't yet."""
    if reason := unavailable():
        raise RuntimeError(reason)
    folder = folder or ROOT / "build" / "emulation"
    flags = [*FLAGS, *(f"-D{d}" for d in (*definitions, f"FUSEDRES_MODULE={name}")), *includes()]
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout

    def compiled(source: Path) -> Path:
        read = (path.read_bytes() for path in with_headers(source))
        target = folder / f"{source.stem}-{digest(compiler, *flags, *read)}.o"
        if not target.exists():
            gxx([*flags, "-c", str(source)], target)
        return target

    unique = dict.fromkeys(path.resolve() for path in (*sources, *OWN))
    with alone(folder):
        with ThreadPoolExecutor(JOBS) as pool:
            objects = [str(path) for path in pool.map(compiled, unique)]
        target = folder / digest(*objects) / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not target.exists():
            gxx(["-shared", "-fsanitize=address,undefined", *objects], target)
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    if sys.argv[1:] != ["--env"]:
        raise SystemExit(__doc__)
    if why_not := unavailable():
        print(f"the emulated CUDA kernels are not tested: {why_not}", file=sys.stderr)
        raise SystemExit(SKIPPED)
    print(*(f"{name}={value}" for name, value in environment().items()))
