"""Builds the compiled module with CMake and ninja.

Environment: FUSEDRES_BUILD_CUDA=auto|1|0 (CUDA where nvcc is found, or fail without it, or never),
CMAKE_CUDA_ARCHITECTURES (a semicolon list), MAX_JOBS, CMAKE_ARGS.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One extension, built by CMake into the place setuptools expects it at."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("FUSEDRES_BUILD_CUDA", "auto")
        if cuda not in ("auto", "1", "0"):
            raise SystemExit(f"FUSEDRES_BUILD_CUDA must be auto, 1 or 0, got {cuda!r}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not jobs.isdecimal() or int(jobs) < 1:
            raise SystemExit(f"MAX_JOBS must be a whole number from 1 up, got {jobs!r}")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-G",
            "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFUSEDRES_BUILD_CUDA={cuda}",
        ]
        if "CMAKE_CUDA_ARCHITECTURES" in os.environ:
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['CMAKE_CUDA_ARCHITECTURES']}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run([*configure, str(SOURCE)], cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--parallel", jobs], cwd=build, check=True)


setup(ext_modules=[Extension("fusedres._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
