"""gpu_check's install, its compute-sanitizer and JAX parts, and its figures: on a CPU, on small shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check_figures
import gpu_check_install
import gpu_check_jax
import gpu_check_sanitizer
import pytest
from gpu_check_run import Check


def check(part: str, folder: Path) -> Check:
    return Check(part, "cpu", True, folder, time.monotonic() + 120)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def without_package(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The check by a Python that doesn't find fusedres, and whose pip does nothing."""
    (tmp_path / "fusedres.py").write_text("raise ImportError('no such package')\n")
    (tmp_path / "pip.py").write_text("import sys; assert sys.argv[1] == 'install'\n")
    script = Path(gpu_check_install.__file__).with_name("gpu_check.py")
    command = [sys.executable, str(script), "--list", *arguments]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


def test_a_checkout_is_installed_offline_and_only_once(tmp_path):
    done = without_package(tmp_path)
    assert done.stdout.startswith("installing the checkout ... done, ")
    # begun again, and still not there
    assert done.stderr == "gpu_check: error: fusedres can't be imported: no such package\n"
    assert done.returncode == 1


def test_an_install_that_fails_says_why(monkeypatch, capsys):
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "building\n", "error: no cmake\n\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as stop:
        gpu_check_install.install_and_restart("gpu_check.py", [], ImportError("x"))
    assert str(stop.value).endswith("failed: error: no cmake")
    assert {"--no-index", "--no-build-isolation", "--no-deps"} <= set(asked[0])
    assert asked[0][-1] == str(gpu_check_install.ROOT)


SANITIZER = """#!/bin/sh
tool=$1
while case "$1" in --*) true;; *) false;; esac; do shift; done
if [ $tool = --tool=memcheck ]; then "$@" && echo "========= ERROR SUMMARY: 0 errors"; exit; fi
echo "========= Error: Race reported between Write access at bn_stats+0x10 [2 hazards]"
echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
exit 9
"""


def test_kernels_run_under_the_sanitizer(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpu_check_sanitizer.sanitizer(check("sanitizer", tmp_path))
    memory, races = records(tmp_path)
    assert (memory["ok"], memory["tool"], memory["faults"]) == (True, "memcheck", 0)
    assert (races["ok"], races["tool"], races["faults"]) == (False, "racecheck", 2)
    assert races["error"].startswith("Error: Race reported between Write access at bn_stats")
    shown = gpu_check_sanitizer.show_sanitizer([memory, races])
    assert shown == ["memcheck: 0 faults", "racecheck: 2 faults"]


def test_a_sanitizer_that_breaks_is_wrong(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\necho '========= Error: Target application terminated'\nexit 1\n")
    program.chmod(0o755)
    gpu_check_sanitizer._under(check("sanitizer", tmp_path), str(program), "memcheck")
    (record,) = records(tmp_path)
    assert not record["ok"] and record["faults"] is None and "terminated" in record["error"]


def test_without_a_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    gpu_check_sanitizer.sanitizer(check("sanitizer", tmp_path))
    (record,) = records(tmp_path)
    assert record["ok"] and record["reason"].startswith("compute-sanitizer is neither")


def test_without_jax(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check_jax.importlib.util, "find_spec", lambda name: None)
    gpu_check_jax.jax_nets(check("jax", tmp_path))
    (record,) = records(tmp_path)
    assert record["reason"] == "JAX isn't installed"


def test_the_net_in_jax_is_the_same(tmp_path):
    """Logits, loss, statistics and gradients are those of PyTorch's net in float64: the part's gate."""
    pytest.importorskip("jax")
    gpu_check_jax.jax_nets(check("jax", tmp_path))
    first, train, inference = records(tmp_path)
    assert first["ok"] and first["output_error"] < 1e-5 and first["gradient_error"] < 1e-4
    assert (train["name"], inference["name"]) == ("training step", "inference")


def test_nothing_to_draw(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    gpu_check_figures.figures(check("figures", tmp_path))
    (record,) = records(tmp_path)
    assert record["reason"] == "no part has measured anything"
