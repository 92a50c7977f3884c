"""What the compiler made of a Triton kernel, with no GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

# shared memory that one program can have, in KiB, by compute capability
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_for(
    arch: int,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    more: dict[tuple[int], Any] | None = None,
) -> Any:
    """Compile as the JIT would for 16-byte aligned tensors; ``more``: what else it knows of arguments."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    return triton_compile(
        ASTSource(kernel, signature, constants, aligned | (more or {})),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )


def usage(compiled: Any, directory: Path) -> dict[str, int]:
    """REG, STACK and LOCAL of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    shown = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
