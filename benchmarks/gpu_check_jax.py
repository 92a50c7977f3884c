"""The part that measures the same net in plain JAX, where that is installed: a peer to be compared with.

The net is written as JAX's users write one (NHWC, one jit for the whole step, weights in fp32 that are cast);
its weights, keys and results are torchvision's, which the gate before its figures holds it to.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_check_net import _MODELS, _gate, _workload
from gpu_check_run import Check, Record, Results
from torch import Tensor, nn

from fusedres.cli.bench import check as bench_check
from fusedres.cli.bench import eager, workload
from fusedres.cli.bench.workload import Workload

_EPS, _MOMENTUM_OF_STATISTICS = 1e-5, 0.1
_PLATFORM = {"cuda": "gpu", "cpu": "cpu"}
_ENOUGH = 10.0  # seconds, to compile and time inference

Arrays = dict[str, Any]


def jax_nets(check: Check) -> None:
    """A training step and inference by JAX, with the weights and images of an eager net."""
    reason = _missing(check.device)
    if reason is not None:
        check.record("not measured", implementation="jax", reason=reason)
        return
    batch = _workload(check)
    model, _ = eager.build(_MODELS[check.tiny])
    model.to(batch.device).to(memory_format=torch.channels_last)
    workload.prepare(model, batch.images)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    expected = bench_check.reference(model, batch, "train")
    torch.backends.cudnn.allow_tf32 = tf32
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    baseline = bench_check.errors(bench_check.observe(model, batch, "train"), expected)
    model.load_state_dict(weights)
    parameters, running, images, labels = _given(model, batch)
    step = _training(parameters, running, images, labels, _name(batch))
    observed = _observed(*step(), batch)
    gate = _gate("jax", observed, expected, baseline, batch)
    check.record("first step", implementation="jax", served_by="XLA", **gate)
    if not gate["ok"]:
        return
    _record(check, "training step", step, batch)
    if check.left() > (0 if check.tiny else _ENOUGH):
        _record(check, "inference", _inference(parameters, running, images, _name(batch)), batch)


def _missing(device: str) -> str | None:
    if importlib.util.find_spec("jax") is None:
        return "JAX isn't installed"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is on the same GPU
    import jax

    platform = jax.default_backend()
    return None if platform == _PLATFORM[device] else f"JAX runs on {platform} only"


def _name(batch: Workload) -> str:
    return str(batch.dtype).removeprefix("torch.")


def _given(model: nn.Module, batch: Workload) -> tuple[Arrays, Arrays, Any, Any]:
    """Parameters, running statistics, images and labels as arrays; filters HWIO, images NHWC."""
    import jax.numpy as jnp

    def array(t: Tensor, name: str = "") -> Any:
        values = t.detach().float().cpu().numpy()
        order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(values.ndim)
        return jnp.asarray(values if order is None else values.transpose(order))

    parameters = {name: array(t) for name, t in model.named_parameters()}
    buffers = {name: array(t) for name, t in model.named_buffers() if "running" in name}
    images = jnp.asarray(batch.images.float().cpu().numpy().transpose(0, 2, 3, 1))
    return parameters, buffers, images, jnp.asarray(batch.labels.cpu().numpy())


def _conv(p: Arrays, name: str, x: Any, stride: int) -> Any:
    from jax import lax

    weight = p[f"{name}.weight"].astype(x.dtype)
    pad = (weight.shape[0] // 2,) * 2
    order = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, weight, (stride, stride), (pad, pad), dimension_numbers=order)


def _norm(p: Arrays, s: Arrays, name: str, x: Any, moved: Arrays | None) -> Any:
    """By the batch's statistics where ``moved`` takes the running ones that they give."""
    import jax.numpy as jnp
    from jax import lax

    wide = x.astype(jnp.float32)
    mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    if moved is not None:
        count, before = wide.size // wide.shape[-1], (mean, var)
        mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
        unbiased = var * count / (count - 1)
        for key, old, new in zip(("mean", "var"), before, (mean, unbiased), strict=True):
            moved[f"{name}.running_{key}"] = old + _MOMENTUM_OF_STATISTICS * (lax.stop_gradient(new) - old)
    scale = p[f"{name}.weight"] * lax.rsqrt(var + _EPS)
    return (wide * scale + (p[f"{name}.bias"] - mean * scale)).astype(x.dtype)


def _block(p: Arrays, s: Arrays, name: str, x: Any, stride: int, moved: Arrays | None) -> Any:
    """Two or three convolutions; a bottleneck has its stride in the 3x3 (v1.5)."""
    import jax

    bottleneck = f"{name}.conv3.weight" in p
    out = x
    for index in range(1, 4 if bottleneck else 3):
        own = stride if index == (2 if bottleneck else 1) else 1
        out = _norm(p, s, f"{name}.bn{index}", _conv(p, f"{name}.conv{index}", out, own), moved)
        out = jax.nn.relu(out) if f"{name}.conv{index + 1}.weight" in p else out
    if f"{name}.downsample.0.weight" in p:
        x = _norm(p, s, f"{name}.downsample.1", _conv(p, f"{name}.downsample.0", x, stride), moved)
    return jax.nn.relu(out + x)


def forward(p: Arrays, s: Arrays, images: Any, dtype: str, moved: Arrays | None = None) -> Any:
    """Logits in float32 of [N, H, W, 3]."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    x = jax.nn.relu(_norm(p, s, "bn1", _conv(p, "conv1", images.astype(dtype), 2), moved))
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
    for stage in range(1, 5):
        index = 0
        while f"layer{stage}.{index}.conv1.weight" in p:
            stride = 2 if stage > 1 and index == 0 else 1
            x = _block(p, s, f"layer{stage}.{index}", x, stride, moved)
            index += 1
    features = x.astype(jnp.float32).mean((1, 2)).astype(dtype)
    logits = features @ p["fc.weight"].astype(dtype) + p["fc.bias"].astype(dtype)
    return logits.astype(jnp.float32)


def _loss(p: Arrays, s: Arrays, images: Any, labels: Any, dtype: str) -> tuple[Any, tuple[Any, Arrays]]:
    import jax
    import jax.numpy as jnp

    moved: Arrays = {}
    logits = forward(p, s, images, dtype, moved)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    return -chosen.mean(), (logits, moved)


def _training(p: Arrays, s: Arrays, images: Any, labels: Any, dtype: str) -> Callable[[], Any]:
    """A step of SGD with momentum, whose state is given to it and taken back.

    It returns the loss, and what else a gate wants: logits, the running statistics, and the momentum, which
    after the first step is the gradients.
    """
    import jax
    import jax.numpy as jnp

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, images: Any, labels: Any) -> Any:
        p, s, momentum = state
        of_weights = jax.value_and_grad(partial(_loss, dtype=dtype), has_aux=True)
        (loss, (logits, moved)), gradients = of_weights(p, s, images, labels)
        momentum = jax.tree.map(lambda m, g: workload.MOMENTUM * m + g, momentum, gradients)
        p = jax.tree.map(lambda w, m: w - workload.LEARNING_RATE * m, p, momentum)
        return (p, moved, momentum), (loss, logits)

    # copies: what is given away can't be used again
    state = jax.tree.map(jnp.copy, (p, s, jax.tree.map(jnp.zeros_like, p)))

    def step() -> Any:
        nonlocal state
        state, (loss, logits) = update(state, images, labels)
        return loss, logits, state[1], state[2]

    return step


def _observed(loss: Any, logits: Any, moved: Arrays, gradients: Arrays, batch: Workload) -> Any:
    """Outputs and gradients of a step as the gate wants them: tensors by torchvision's names."""

    def tensor(array: Any) -> Tensor:
        values = np.array(array, dtype=np.float32)
        order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(values.ndim)
        return torch.from_numpy(values if order is None else values.transpose(order)).to(batch.device)

    outputs = {"logits": tensor(logits).T, "loss": tensor(loss), **{n: tensor(t) for n, t in moved.items()}}
    # PyTorch's modules count their steps: one that prepared the net, and this one
    steps = {f"{name.rpartition('.')[0]}.num_batches_tracked" for name in moved}
    outputs |= {name: torch.tensor(2, device=batch.device) for name in steps}
    return outputs, {name: tensor(gradient) for name, gradient in gradients.items()}


def _inference(p: Arrays, s: Arrays, images: Any, dtype: str) -> Callable[[], Any]:
    import jax

    run = jax.jit(partial(forward, dtype=dtype))
    return lambda: run(p, s, images)


def _record(check: Check, name: str, step: Callable[[], Any], batch: Workload) -> None:
    import jax

    rounds, warmup = (1, 1) if check.tiny else (20, 3)
    times = []
    for index in range(warmup + rounds):
        start = time.perf_counter()
        jax.block_until_ready(step())
        if index >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    ms, n = statistics.median(times), len(batch.images)
    check.record(
        name,
        implementation="jax",
        served_by="XLA",
        model=_MODELS[check.tiny],
        batch=n,
        dtype=_name(batch),
        images_per_second=1e3 * n / ms,
        ms={"median": ms, "min": min(times), "max": max(times), "rounds": rounds},
        ratio_to_eager=_ratio(check, name, ms, n),
        peak_bytes=None,
    )


def _ratio(check: Check, name: str, ms: float, batch: int) -> float | None:
    """To eager PyTorch's time in an earlier part of the run."""
    same = [
        record["ms"]["median"]
        for record in Results(check.folder).latest()
        if (record["name"], record.get("implementation"), record.get("batch")) == (name, "eager", batch)
    ]
    return same[0] / ms if same else None


def show_jax(records: list[Record]) -> list[str]:
    lines = []
    for record in records:
        if record["name"] in ("training step", "inference"):
            ratio = f", {record['ratio_to_eager']:.2f}x eager" if record["ratio_to_eager"] else ""
            lines.append(f"{record['name']} by JAX: {record['images_per_second']:.1f} img/s{ratio}")
        elif record["name"] == "not measured":
            lines.append(f"not measured, {record['reason']}")
    return lines
