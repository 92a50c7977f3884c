"""What an installed package has to do, run by tests/install_matrix.py in a fresh environment.

    python install_check.py TORCH with|without with|without

checks that it was built with or without nvcc, found Triton or not, and computes what PyTorch computes.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.nn import Bottleneck


def must(fact: bool, message: str) -> None:
    if not fact:
        sys.exit(message)


def files_are_there() -> None:
    files = {str(file) for file in importlib.metadata.files("fusedres") or ()}
    for name in ("fusedres/py.typed", "fusedres/_C.pyi", "fusedres/training/recipes/imagenet-paper.yaml"):
        must(name in files, f"{name} isn't in the wheel")
    must(any(name.endswith("/LICENSE") for name in files), "the wheel has no licence")
    must(not any(name.startswith("tests") for name in files), "the wheel has tests")
    must(importlib.metadata.version("fusedres") == fusedres.__version__, "two versions")


def info_says(version: str, nvcc: str, triton: str) -> str:
    command = Path(sys.executable).with_name("fusedres")
    facts = json.loads(subprocess.check_output([command, "info", "--json"], text=True))
    module, versions = facts["compiled_module"], facts["versions"]
    must(module["loads"], f"the compiled module can't be loaded: {module.get('reason')}")
    must(versions["torch"].split("+")[0] == version.split("+")[0], f"torch is {versions['torch']}")
    must((versions["triton"] is not None) == (triton == "with"), f"triton is {versions['triton']}")
    must(bool(module["cuda_archs"]) == (nvcc == "with"), f"CUDA kernels: {module['cuda_archs']}")
    if nvcc == "without":
        must(module["cuda_reason"] == "no nvcc was found", module["cuda_reason"])
    served = {entry["op"]: entry["dtypes"]["fp32"]["implementation"] for entry in facts["ops"]}
    must(served["bn_act"] == "cpu", f"bn_act runs on {served['bn_act']}")
    have = [name for name in ("cpu", "cuda", "triton") if name not in facts["unavailable"]]
    return f"{', '.join(have)} ({module['cpu_isa']})"


def step(call, x: Tensor, module: nn.Module) -> list[Tensor]:
    """Output, gradients and buffers."""
    x = x.clone().requires_grad_()
    out = call(x)
    out.square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


def computes_the_same(device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64, 56, 56, device=device).to(memory_format=torch.channels_last)

    norm = nn.BatchNorm2d(64, device=device)
    twin = copy.deepcopy(norm)

    def bn_act(x: Tensor) -> Tensor:
        own = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return fusedres.functional.bn_act(x, *own, residual=x, training=True)

    ours, theirs = step(bn_act, x, norm), step(lambda x: F.relu(twin(x) + x), x, twin)
    for got, expected in zip(ours[:-1], theirs[:-1], strict=True):  # a function counts no batches
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    block = Bottleneck(64, 16).to(device)
    twin = copy.deepcopy(block)

    def eager(x: Tensor) -> Tensor:
        out = F.relu(twin.bn1(twin.conv1(x)))
        out = F.relu(twin.bn2(twin.conv2(out)))
        return F.relu(twin.bn3(twin.conv3(out)) + x)

    for got, expected in zip(step(block, x, block), step(eager, x, twin), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def main() -> None:
    files_are_there()
    have = info_says(*sys.argv[1:])
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        computes_the_same(device)
    print(have)


if __name__ == "__main__":
    main()
