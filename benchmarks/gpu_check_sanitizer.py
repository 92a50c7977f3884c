"""The part that runs the CUDA kernels under NVIDIA's compute-sanitizer, where that is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gpu_check_cases import groups
from gpu_check_run import Check, Record

import fusedres
from fusedres import kernels as built
from fusedres import ops

RUN = "kernels"  # the name of what is run under it
TOOLS = ("memcheck", "racecheck")
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard).*")
_FAULT = re.compile(r"=+ (\S.*(?:Invalid|hazard|Uninitialized|error).*)", re.IGNORECASE)
_KERNELS = {"cuda": "cuda", "cpu": "reference"}
_ENOUGH = 10.0  # seconds, of a start


def sanitizer(check: Check) -> None:
    """Every CUDA kernel on small shapes: accesses out of bounds first, then races in shared memory."""
    program, name = _program(), _KERNELS[check.device]
    if program is None:
        check.record("not run", reason="compute-sanitizer is neither on PATH nor in CUDA_HOME")
        return
    if name in built.unavailable():
        check.record("not run", reason=built.unavailable()[name])
        return
    for tool in TOOLS:
        if check.left() < (0 if check.tiny else _ENOUGH):
            check.record("out of time", tool=tool)
            return
        _under(check, program, tool)


def _program() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def _under(check: Check, program: str, tool: str) -> None:
    script = Path(__file__).with_name("gpu_check.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [program, f"--tool={tool}", "--error-exitcode=9", "--print-limit=20"]
        command += [sys.executable, str(script), "--device", check.device, "--tiny", "--out", folder]
        command += ["--run", RUN]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=check.left()
            )
        except subprocess.TimeoutExpired:
            check.record("out of time", tool=tool)
            return
    (check.folder / f"sanitizer-{tool}.log").write_text(done.stdout)
    summaries = _SUMMARY.findall(done.stdout)
    faults = [fault.strip() for fault in _FAULT.findall(done.stdout) if "SUMMARY" not in fault]
    error = None
    if done.returncode or not summaries or int(summaries[-1]):
        said = [line for line in done.stdout.splitlines() if line.strip()]
        error = (faults or said[-1:] or [f"exit status {done.returncode}"])[0]
    count = int(summaries[-1]) if summaries else None
    check.record("kernels", ok=error is None, tool=tool, faults=count, exit=done.returncode, error=error)


def kernels(check: Check) -> None:
    """What runs under it: every op once, by the CUDA kernels alone."""
    name, device = _KERNELS[check.device], torch.device(check.device)
    for group in groups(check.device, tiny=True):
        for case in group():
            chosen = (ops.choice(op, device, case.chosen_by, name) for op in case.ops)
            if all(choice.implementation == name for choice in chosen):
                with fusedres.backend(name):
                    case.run()


def show_sanitizer(records: list[Record]) -> list[str]:
    lines = []
    for record in records:
        if record["name"] == "kernels":
            lines.append(f"{record['tool']}: {record['faults']} faults")
        else:
            lines.append(f"{record['name']}: {record.get('reason') or record['tool']}")
    return lines
