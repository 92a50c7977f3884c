"""The part that runs optimised nets: throughput, latency, and what was chosen for each convolution."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from gpu_check_run import Check, Record
from torch import Tensor, nn

import fusedres
from fusedres import autotune, kernels, plan
from fusedres.cli.bench import eager, measure, workload
from fusedres.cli.bench.workload import Step

_BACKENDS = {"int8": "auto"}
_MODELS = {True: "resnet18", False: "resnet50"}  # by tiny
_LEAST_MEMORY = 40 << 30  # bytes, for a batch of 256
_TOLERANCE = 2.0  # of eager's own error
_INT8_ERROR = 0.1  # of the logits, in the Euclidean norm
_CALIBRATION = 8  # images


def inference(check: Check) -> None:
    """Images a second of a large batch and milliseconds of one image, against the converted model."""
    _inference(check, ("auto", "triton", "int8"), (_large(check), 1))
    for key, measured in plan.MEASURED.items():
        if key.op in (*plan.CONV_BIAS_OPS, *plan.BLOCK_OPS, *plan.INT8_OPS):
            check.record(
                "choice", op=key.op, conv=list(key.conv), dtype=key.dtype, best=measured.best, us=measured.us
            )


def frozen(check: Check) -> None:
    """The same against torch.compile with freezing: by itself, since that may take long to compile."""
    _inference(check, ("auto", "compile"), (_large(check),))


def _inference(check: Check, names: Sequence[str], batches: Sequence[int]) -> None:
    device = torch.device(check.device)
    net, dtype = _MODELS[check.tiny], torch.float32 if check.tiny else torch.bfloat16
    model, origin = eager.build(net)
    model.to(device)
    size = 64 if check.tiny else 224
    workload.prepare(model, torch.randn(8, 3, size, size, device=device))
    model.eval()
    ours = getattr(fusedres, net)().to(device).eval()
    ours.load_state_dict(model.state_dict())
    for batch in batches:
        images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
        facts = {"model": net, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "eager": origin}
        _measure(check, names, model, ours, images, dtype, facts)


def _large(check: Check) -> int:
    if check.tiny:
        return 2
    return 256 if torch.cuda.get_device_properties(check.device).total_memory >= _LEAST_MEMORY else 64


@torch.inference_mode()
def _measure(
    check: Check,
    names: Sequence[str],
    model: nn.Module,
    ours: nn.Module,
    images: Tensor,
    dtype: torch.dtype,
    facts: Record,
) -> None:
    converted = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)
    expected = copy.deepcopy(model).double()(images[:8].double())
    given = images.to(dtype)
    allowed = _TOLERANCE * _error(converted(given[:8]), expected) + torch.finfo(dtype).eps
    steps: dict[str, Step] = {"eager": lambda: converted(given)}
    for name in names:
        if name == "triton" and (check.device == "cpu" or name in kernels.unavailable()):
            check.record(
                "not measured", implementation=name, reason=kernels.unavailable().get(name, "no GPU")
            )
            continue
        try:
            if name == "compile":
                side = _compiled(converted, given, check.tiny)
                steps[name], logits = (lambda side=side: side(given)), side(given)[:8]
            else:
                steps[name] = _side(ours, given, dtype, name)
                logits = _side_logits(ours, given[:8], dtype, name)
            error = _error(logits, expected)
        except Exception as failure:  # torch.compile needs a compiler, to begin with
            steps.pop(name, None)
            check.record("first call", ok=False, implementation=name, error=str(failure).strip()[:300])
            continue
        most = _INT8_ERROR if name == "int8" else allowed
        wrong = None if error <= most else f"relative error {error:.2e}, allowed {most:.2e}"
        check.record("first call", ok=wrong is None, implementation=name, relative_error=error, error=wrong)
    measure.release_free_memory(images.device)
    rounds, warmup = (2, 1) if check.tiny else (30, 5) if len(images) > 1 else (200, 20)
    samples = measure.interleave(steps, rounds, warmup, images.device, check.part)
    for name, step in steps.items():
        ms = samples[name].median_ms
        check.record(
            "inference",
            implementation=name,
            **facts,
            images_per_second=1e3 * len(images) / ms,
            ms={"median": ms, "min": min(samples[name].ms), "max": max(samples[name].ms)},
            ratio_to_eager=samples["eager"].median_ms / ms,
            peak_bytes=measure.peak_bytes(step, images.device),
        )


def _compiled(model: nn.Module, given: Tensor, tiny: bool) -> Any:
    """Its first call is done; tiny runs the logic, and needs no compiler."""
    from torch._inductor import config

    with config.patch(freezing=True):
        side = torch.compile(model, backend="aot_eager" if tiny else "inductor")
        side(given)
    return side


def _side(model: nn.Module, given: Tensor, dtype: torch.dtype, name: str) -> Step:
    optimised = _optimised(model, given, dtype, name)

    def step() -> Any:
        with fusedres.backend(_BACKENDS.get(name, name)):
            return optimised(given)

    step()
    return step


def _side_logits(model: nn.Module, given: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    return _side(model, given, dtype, name)()


def _optimised(model: nn.Module, given: Tensor, dtype: torch.dtype, name: str) -> nn.Module:
    if name == "int8":
        return _in_8_bits(model, dtype, given.shape[2], given.device)
    return fusedres.optimize_for_inference(model, dtype)


@functools.cache
def _in_8_bits(model: nn.Module, dtype: torch.dtype, size: int, device: torch.device) -> nn.Module:
    """Once for all batches."""
    calibration = torch.randn(_CALIBRATION, 3, size, size)
    return fusedres.quantize_for_inference(copy.deepcopy(model).cpu(), calibration, dtype).to(device)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def show_inference(records: list[Record]) -> list[str]:
    lines = []
    for record in records:
        if record["name"] == "inference":
            lines.append(
                f"{record['model']}, batch {record['batch']}, {record['implementation']}: "
                f"{record['images_per_second']:.0f} img/s, {record['ms']['median']:.2f} ms, "
                f"{record['ratio_to_eager']:.2f}x eager"
            )
        elif record["name"] == "not measured":
            lines.append(f"{record['implementation']}: not measured, {record['reason']}")
    for op in (*plan.CONV_BIAS_OPS, *plan.BLOCK_OPS, *plan.INT8_OPS):
        best = [record["best"] for record in records if record["name"] == "choice" and record["op"] == op]
        if best:
            lines.append(
                f"{op}: {len(best) - best.count(autotune.ATEN)} of {len(best)} shapes run by ours "
                f"({best.count('triton')} Triton, {best.count('cuda')} CUDA), the others by cuDNN's"
            )
    return lines
