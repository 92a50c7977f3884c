"""``fusedres info``: versions, devices, what was built, and which implementation each op has."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from fusedres import kernels, ops, plan
from fusedres.cli import machine
from fusedres.cli.options import DTYPES, Commands, add_command


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "info",
        help="versions, devices, and which implementation runs each op",
        description="Print versions, devices, what was built, and for each op and device which\n"
        "implementation serves it and why. FUSEDRES_BACKEND is honoured.",
        example="fusedres info --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything that the command prints."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "versions": machine.versions(),
        "platform": platform.platform(),
        "cpu": {
            "name": machine.cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": [
            {
                "name": torch.cuda.get_device_name(device),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
                "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
            }
            for device in devices[1:]
        ],
        "compiled_module": machine.compiled_module(),
        "backend": ops.forced_backend(),
        "unavailable": kernels.unavailable(),
        "environment": machine.environment(),
        "ops": [_served(op, device) for device in devices for op in plan.ALL_OPS],
    }


def _served(op: str, device: torch.device) -> dict[str, Any]:
    served = {}
    dtypes = {"int8": torch.int8} if op in plan.INT8_OPS else DTYPES
    for name, dtype in dtypes.items():
        try:
            implementation, reason, _ = ops.choice(op, device, dtype, ops.forced_backend())
        except RuntimeError as error:  # a forced backend that can't: a fact to show, not a failure
            implementation, reason = "none", str(error)
        served[name] = {"implementation": implementation, "reason": reason}
    return {"op": op, "device": str(device), "dtypes": served}


def render(facts: dict[str, Any]) -> str:
    lines = [f"{name:<14}{version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append(f"{'platform':<14}{facts['platform']}")
    cpu = facts["cpu"]
    lines.append(f"{'CPU':<14}{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['isa']}")
    for gpu in facts["gpus"]:
        gib = gpu["memory_bytes"] / 2**30
        lines.append(f"{'GPU':<14}{gpu['name']}, compute capability {gpu['capability']}, {gib:.0f} GiB")
    if not facts["gpus"]:
        lines.append(f"{'GPU':<14}none")
    lines.append(f"{'compiled':<14}{_compiled(facts['compiled_module'])}")
    lines += [f"{name:<14}unavailable: {why}" for name, why in facts["unavailable"].items()]
    lines.append(f"{'backend':<14}{facts['backend']}")
    lines += [f"{'environment':<14}{name}={value}" for name, value in facts["environment"].items()]
    for device in dict.fromkeys(entry["device"] for entry in facts["ops"]):
        lines += ["", f"ops on {device}"]
        lines += _table([entry for entry in facts["ops"] if entry["device"] == device])
    return "\n".join(lines)


def _compiled(module: dict[str, Any]) -> str:
    if not module["loads"]:
        return f"can't be loaded: {module['reason']}"
    cuda = ", ".join(map(str, module["cuda_archs"]))
    build = module["build"]
    by = ", ".join(
        part
        for part in (
            build["compiler"],
            f"nvcc {build['nvcc']}" if build["nvcc"] else "",
            "OpenMP" if build["openmp"] else "no OpenMP",
            build["type"],
        )
        if part
    )
    return (
        f"CPU kernels for {module['cpu_isa']}; CUDA kernels "
        + (f"for {cuda}" if cuda else f"not built ({module['cuda_reason']})")
        + f"; by {by}"
    )


def _table(entries: list[dict[str, Any]]) -> list[str]:
    """One line per op and per group of dtypes that are served alike."""
    lines = []
    for entry in entries:
        groups: dict[tuple[str, str], list[str]] = {}
        for dtype, choice in entry["dtypes"].items():
            groups.setdefault((choice["implementation"], choice["reason"]), []).append(dtype)
        for (implementation, reason), dtypes in groups.items():
            lines.append(f"  {entry['op']:<34}{implementation:<11}{' '.join(dtypes):<16}{reason}")
    return lines
