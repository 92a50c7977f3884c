"""For a checkout that isn't installed: builds and installs it, offline, and begins the check again."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
OPTION = "--installed"  # that it was done, and the seconds that it took
LIMIT = 150.0  # seconds; nvcc compiles for every architecture


def install_and_restart(script: str, arguments: Sequence[str], error: ImportError) -> NoReturn:
    """``pip install`` the checkout with the tools that are there, then run the script again."""
    if OPTION in arguments or importlib.util.find_spec("torch") is None:
        _fail(f"fusedres can't be imported: {error}")
    print("installing the checkout ... ", end="", flush=True)
    start = time.monotonic()
    # offline: no build isolation, nothing from an index
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, str(ROOT)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        _fail(f"{' '.join(command)} took more than {LIMIT:.0f} s")
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        _fail(f"{' '.join(command)} failed: {said[-1] if said else f'exit status {done.returncode}'}")
    seconds = time.monotonic() - start
    print(f"done, {seconds:.1f} s", flush=True)
    os.execv(sys.executable, [sys.executable, script, *arguments, OPTION, f"{seconds:.1f}"])


def _fail(message: str) -> NoReturn:
    sys.exit(f"gpu_check: error: {message}")
