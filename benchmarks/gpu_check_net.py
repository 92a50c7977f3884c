"""The parts that run whole nets and the tests: correct, train, compile, graph."""

from __future__ import annotations

import contextlib
import copy
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_check_run import Check, Record
from torch import Tensor, nn

import fusedres
from fusedres import functional, kernels, ops
from fusedres.cli.bench import breakdown, eager, measure, workload
from fusedres.cli.bench import check as bench_check
from fusedres.cli.bench.workload import Step, Workload
from fusedres.functional import BatchNorm

ROOT = Path(__file__).resolve().parents[1]
_MOST_FAILURES = 20
_TEST = re.compile(r"^(\S+?::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_UNFINISHED = re.compile(r"^(\S+?::.*\S)\s*$")
_LEAST_MEMORY = 40 << 30  # bytes, for a batch of 256
_PROFILING = 12.0  # seconds, of one side
_MODELS = {True: "resnet18", False: "resnet50"}  # by tiny


def correct(check: Check) -> None:
    """The tests that need a GPU, the CUDA kernels' first."""
    if check.tiny:
        marked = ["-m", "gpu"] if check.device == "cuda" else []
        runs = {"tests": [*marked, "tests/test_global_avg_pool.py"]}
    else:
        marked = ["-m", "gpu", "tests", "-k"]
        runs = {"cuda": [*marked, "not triton"], "triton": [*marked, "triton"]}
    for name, arguments in runs.items():
        if name in kernels.unavailable():
            check.record(name, reason=kernels.unavailable()[name])
        else:
            _run_tests(check, name, arguments)


def _run_tests(check: Check, name: str, arguments: Sequence[str]) -> None:
    log = check.folder / f"correct-{name}.log"
    # -P: the installed package, not the checkout's without its compiled module; no addopts: those ask for
    # a plugin that a machine offline may lack
    command = [sys.executable, "-P", "-u", "-m", "pytest", "-o", "addopts=--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-v", "--tb=short", f"--maxfail={_MOST_FAILURES}", *arguments]
    start = time.monotonic()
    code: int | None = None
    with log.open("w") as output, contextlib.suppress(subprocess.TimeoutExpired):
        code = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=max(check.left(), 1)
        ).returncode
    facts = parse_tests(log.read_text(errors="replace"))
    error = None
    if code is None:
        error = f"out of time after {facts['passed']} tests passed"
    elif code:
        error = f"{facts['failed']} tests failed" if facts["failed"] else f"pytest: {facts['last_line']}"
    elif not facts["passed"]:
        error = "no test ran"
    check.record(
        name, ok=error is None, error=error, seconds=round(time.monotonic() - start, 1), exit=code, **facts
    )


def parse_tests(output: str) -> Record:
    """Counts, failing tests and, for a run that didn't end, the test that it was in, of ``pytest -v``."""
    outcomes: dict[str, str] = {}
    lines = [line for line in output.splitlines() if line.strip()]
    for line in lines:
        match = _TEST.match(line)
        if match and outcomes.get(match[1]) not in ("FAILED", "ERROR"):
            outcomes[match[1]] = match[2]
    count = Counter(outcomes.values())
    last = lines[-1].strip() if lines else ""
    unfinished = _UNFINISHED.match(last)
    return {
        "passed": count["PASSED"],
        "failed": count["FAILED"] + count["ERROR"],
        "skipped": count["SKIPPED"],
        "failures": [test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")],
        "stopped_in": unfinished[1] if unfinished and not _TEST.match(last) else None,
        "last_line": last,
    }


def show_correct(records: list[Record]) -> list[str]:
    lines = []
    for record in records:
        if "passed" not in record:
            lines.append(f"{record['name']}: not run, {record['reason']}")
            continue
        counts = ", ".join(f"{record[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        lines.append(f"{record['name']}: {counts}")
        lines += [f"  failed: {test}" for test in record["failures"][:5]]
    return lines


def train(check: Check) -> None:
    """A training step by each implementation, against eager PyTorch."""
    forced = ["reference"] if check.device == "cpu" else ["cuda", "triton"]
    _train(check, [*forced, "auto", "eager"])


def compiled(check: Check) -> None:
    """The same against torch.compile: by itself, since that may take long to compile."""
    _train(check, ["auto", "eager", "compile"])


def _train(check: Check, names: Sequence[str]) -> None:
    batch = _workload(check)
    device = batch.device
    net = _MODELS[check.tiny]
    model, origin = eager.build(net)
    model.to(device).to(memory_format=torch.channels_last)
    workload.prepare(model, batch.images)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    expected = bench_check.reference(model, batch, "train")
    torch.backends.cudnn.allow_tf32 = tf32
    baseline = bench_check.errors(bench_check.observe(model, batch, "train"), expected)

    facts = {"model": net, "batch": len(batch.images), "dtype": str(batch.dtype).removeprefix("torch.")}
    steps: dict[str, Step] = {}
    gates: dict[str, Record] = {}
    for name in names:
        if name in kernels.unavailable():
            check.record("not measured", implementation=name, reason=kernels.unavailable()[name])
            continue
        try:
            side, backend = _side(name, net, model, weights, check.tiny)
            with fusedres.backend(backend):
                observed = bench_check.observe(side, batch, "train")
                gates[name] = _gate(name, observed, expected, baseline, batch)
                gates[name] |= {"served_by": _served_by(name, backend, batch)}
        except Exception as error:  # torch.compile needs a compiler, to begin with
            if device.type == "cuda":
                torch.cuda.synchronize()
            gates[name] = {"ok": False, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        check.record("first step", implementation=name, **gates[name])
        if gates[name]["ok"]:
            steps[name] = _under(backend, workload.training_step(side, batch))
    measure.release_free_memory(device)
    torch.backends.cudnn.benchmark = True  # for all alike; its trials fall into the warm-up
    rounds, warmup = (1, 1) if check.tiny else (30, 8)
    samples = measure.interleave(steps, rounds, warmup, device, check.part)
    for name, step in steps.items():
        ms = samples[name]
        check.record(
            "training step",
            implementation=name,
            served_by=gates[name]["served_by"],
            **facts,
            eager=origin,
            images_per_second=1e3 * len(batch.images) / ms.median_ms,
            ms={"median": ms.median_ms, "min": min(ms.ms), "max": max(ms.ms), "rounds": len(ms.ms)},
            ratio_to_eager=samples["eager"].median_ms / ms.median_ms if "eager" in samples else None,
            peak_bytes=measure.peak_bytes(step, device),
        )
    if check.part == "train":  # behind torch.compile operators' names say nothing
        _profile(check, steps, device)


def _profile(check: Check, steps: Mapping[str, Step], device: torch.device) -> None:
    """Where the time of a step goes, the sides that matter most first."""
    for name in reversed(steps):
        if check.left() < _PROFILING:
            check.record("out of time", implementation=name)
            return
        parts = breakdown.of(steps[name], device)
        check.record(
            "breakdown",
            implementation=name,
            fused_convolution_share=parts.fused_convolution_share,
            fused_norm_share=parts.fused_norm_share,
            ms=parts.ms,
        )


def _workload(check: Check) -> Workload:
    device = torch.device(check.device)
    if check.tiny:
        return workload.make(2, 64, torch.float32, torch.channels_last, device, 0)
    large = torch.cuda.get_device_properties(device).total_memory >= _LEAST_MEMORY
    return workload.make(256 if large else 64, 224, torch.bfloat16, torch.channels_last, device, 0)


def _side(
    name: str, net: str, eager_model: nn.Module, weights: dict[str, Tensor], tiny: bool
) -> tuple[nn.Module, str]:
    """A model with the weights and statistics that all begin with, and the backend to run it under."""
    eager_model.load_state_dict(weights)
    eager_model.train()
    if name == "eager":
        return eager_model, "auto"
    if name == "compile":
        # tiny runs the logic, and needs no compiler
        return torch.compile(copy.deepcopy(eager_model), backend="aot_eager" if tiny else "inductor"), "auto"
    model = getattr(fusedres, net)()
    model.load_state_dict(weights)
    device = next(eager_model.parameters()).device
    return model.to(device).to(memory_format=torch.channels_last).train(), name


def _under(backend: str, step: Step) -> Step:
    def run() -> None:
        with fusedres.backend(backend):
            step()

    return run


def _served_by(name: str, backend: str, batch: Workload) -> str:
    if name in ("eager", "compile"):
        return "aten"
    return ops.choice("bn_act", batch.device, batch.dtype, backend).implementation


def _gate(
    name: str,
    observed: tuple[dict[str, Tensor], dict[str, Tensor]],
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
    baseline: bench_check.Errors,
    batch: Workload,
) -> Record:
    """Loss, gradients and running statistics of a first step, as near to the truth as eager PyTorch's."""
    errors = bench_check.errors(observed, expected)
    # of torch.compile the errors are recorded, and no more asked
    failure = None if name == "compile" else bench_check.failure(errors, baseline, batch.dtype)
    (loss, norm), (true_loss, true_norm) = (_loss_and_norm(side) for side in (observed, expected))
    return {
        "ok": failure is None,
        "error": None if failure is None else str(failure),
        "loss": loss,
        "reference_loss": true_loss,
        "gradient_norm": norm,
        "reference_gradient_norm": true_norm,
        "output_error": errors.worst_output,
        "gradient_error": errors.worst_gradient,
    }


def _loss_and_norm(side: tuple[dict[str, Tensor], dict[str, Tensor]]) -> tuple[float, float]:
    outputs, gradients = side
    square = sum(gradient.double().square().sum().item() for gradient in gradients.values())
    return outputs["loss"].item(), square**0.5


def show_train(records: list[Record]) -> list[str]:
    lines = []
    for record in records:
        if record["name"] == "training step":
            ratio = record["ratio_to_eager"]
            lines.append(
                f"{record['model']}, batch {record['batch']}, {record['implementation']} "
                f"({record['served_by']}): {record['images_per_second']:.1f} img/s"
                f"{f', {ratio:.2f}x eager' if ratio else ''}, peak {record['peak_bytes'] / 2**20:,.0f} MiB"
            )
        elif record["name"] == "breakdown" and record["implementation"] != "eager":
            lines.append(
                f"{record['implementation']}: fused ops take {record['fused_convolution_share']:.0%} of the "
                f"convolutions' time, {record['fused_norm_share']:.0%} of batch norm's and ReLU's"
            )
        elif record["name"] == "not measured":
            lines.append(f"{record['implementation']}: not measured, {record['reason']}")
    return lines


def graph(check: Check) -> None:
    """Forward and backward of the fused ops in a CUDA graph: nothing synchronises, replays give the same."""
    names = ["reference"] if check.device == "cpu" else ["cuda", "triton"]
    for name in names:
        if name in kernels.unavailable():
            check.record("not captured", implementation=name, reason=kernels.unavailable()[name])
            continue
        with fusedres.backend(name):
            wrong = _replayed(check, exact=name != "triton")
        check.record(
            "graph",
            ok=not wrong,
            implementation=name,
            captured=check.device == "cuda",
            error=f"another result than by launches: {', '.join(wrong)}" if wrong else None,
        )


class _Block:
    """A stem and the end of a block with a projection, on inputs that stay in place."""

    def __init__(self, check: Check, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        n, c, size = (2, 8, 12) if check.tiny else (32, 64, 112)

        def activation(*shape: int) -> Tensor:
            values = torch.randn(*shape, device=check.device)
            return values.to(dtype, memory_format=torch.channels_last)

        self.x = activation(n, c, size, size).requires_grad_()
        self.branch = activation(n, c, size // 2, size // 2).requires_grad_()
        self.grad = activation(n, c, 1, 1)
        values = [torch.rand(c, device=check.device) + 0.5 for _ in range(6)]
        self.parameters = [value.requires_grad_() for value in values]
        self.buffers = [torch.zeros(c, device=check.device) for _ in range(6)]

    def restart(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()

    def step(self) -> tuple[Tensor, ...]:
        first, second, third = (
            (*self.parameters[2 * i : 2 * i + 2], *self.buffers[2 * i : 2 * i + 2]) for i in range(3)
        )
        z = functional.bn_relu_maxpool(self.x, *first, training=True)
        norm = BatchNorm(*third, training=True)
        z = functional.bn_act(z, *second, residual=self.branch, residual_norm=norm, training=True)
        pooled = functional.global_avg_pool(z)
        leaves = (self.x, self.branch, *self.parameters)
        return pooled.detach(), *torch.autograd.grad(pooled, leaves, self.grad)


_OUTPUTS = ("output", "dx", "dbranch", *(f"parameter {i}'s gradient" for i in range(6)))


def _replayed(check: Check, exact: bool) -> list[str]:
    """Names of what differs between launches and replays, on the input of the capture and on another.

    To the bit, if ``exact``: PyTorch's own max pool, which serves where an implementation has none, sums its
    gradient in any order.
    """
    block = _Block(check, torch.float32 if check.device == "cpu" else torch.bfloat16)
    inputs = [block.x.detach().clone(), block.x.detach().flip(0) * 2]
    expected = [_observe(block, value, block.step) for value in inputs]
    if check.device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up, as torch.cuda.graph asks for
            for _ in range(3):
                block.step()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            outputs = block.step()

        def run() -> tuple[Tensor, ...]:
            captured.replay()
            return outputs
    else:
        run = block.step
    wrong: list[str] = []
    for value, wanted in zip(inputs, expected, strict=True):
        found = _observe(block, value, run)
        names = (*_OUTPUTS, *(f"buffer {i}" for i in range(6)))
        wrong += [n for n, a, b in zip(names, found, wanted, strict=True) if not _same(a, b, exact)]
    return wrong


def _same(a: Tensor, b: Tensor, exact: bool) -> bool:
    if exact:
        return torch.equal(a, b)
    wide = b.float()
    return bool(torch.linalg.vector_norm(a.float() - wide) <= 0.01 * torch.linalg.vector_norm(wide))


def _observe(block: _Block, value: Tensor, run: Callable[[], Any]) -> list[Tensor]:
    """Copies of what a step gives on ``value``, and of the running statistics after it."""
    with torch.no_grad():
        block.x.copy_(value)
    block.restart()
    outputs = run()
    return [t.clone() for t in (*outputs, *block.buffers)]


def show_graph(records: list[Record]) -> list[str]:
    lines = []
    for record in records:
        if "reason" in record:
            said = f"not captured, {record['reason']}"
        else:
            runs = "two replays" if record["captured"] else "two runs, no GPU to capture on"
            said = f"{runs}, {'another result' if record['error'] else 'the same result as by launches'}"
        lines.append(f"{record['implementation']}: {said}")
    return lines
