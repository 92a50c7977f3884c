"""The figures of README and docs, out of the committed result files.

``python benchmarks/tables.py`` writes them between their marks, ``<!-- measured: NAME -->`` and
``<!-- end of measured -->``, and draws docs/bench.png (needs matplotlib). A test holds that no text would
change.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fusedres.cli.bench import plot
from fusedres.cli.report.data import net_title
from fusedres.cli.roofline import LEVELS, passes
from fusedres.plan.conv import BANDWIDTH, PEAK

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU = RESULTS / "epyc-zen5-2cores"
PEERS = RESULTS / "h100-peers"
PICTURED, PICTURE = ("resnet50-bf16", "inference-resnet50-16-bf16"), ROOT / "docs" / "bench.png"
PAGES = (ROOT / "README.md", ROOT / "docs" / "combining.md")
_BATCH = 256  # of the H100's table
_MARKED = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end of measured -->)", re.DOTALL)

TRAINED = ("resnet18-bf16", "resnet34-bf16", "resnet50-bf16", "resnet50-fp32", "resnet101-bf16")
SERVED = (
    "resnet50-16-bf16",
    "resnet50-16-fp32",
    "resnet50-1-bf16",
    "resnet50-1-fp32",
    "resnet18-16-bf16",
    "resnet18-1-bf16",
    "resnet152-16-bf16",
)

Row = Mapping[str, Any]


def _read(name: str) -> Row:
    return json.loads((CPU / f"{name}.json").read_text())  # type: ignore[no-any-return]


def _result(name: str) -> Row:
    (result,) = _read(name)["results"]
    return result  # type: ignore[no-any-return]


def _ms(side: Row) -> str:
    return f"{side['ms']['median']:.1f}"


def _ratio(side: Row) -> str:
    return f"{side['ratio_to_eager']:.2f}x"


def _table(head: str, rows: list[list[str]]) -> str:
    rule = "|".join(["---"] * (head.count("|") - 1))
    lines = [head, f"|{rule}|", *("| " + " | ".join(row) + " |" for row in rows)]
    return re.sub(r" {2,}\|", " |", "\n".join(lines))


def _prose(text: str) -> str:
    return textwrap.fill(text, 112, break_long_words=False, break_on_hyphens=False)


def training() -> str:
    rows = []
    for name in TRAINED:
        result, (net, dtype) = _result(name), name.split("-")
        fused, eager = (result["implementations"][side] for side in ("fused", "eager"))
        title = net_title(net) + (", fp32" if dtype == "fp32" else "")
        rows.append([title, _ms(eager), _ms(fused), _ratio(fused), f"{result['ceiling']:.2f}x"])
    compiled = _result("resnet50-bf16")["implementations"]["compile"]
    alone = sorted(
        _ratio(
            next(r for r in _read(f"{net}-bf16-batch1")["results"] if r["mode"] == "train")[
                "implementations"
            ]["fused"]
        )
        for net in ("resnet18", "resnet50")
    )
    text = _prose(
        f"`torch.compile` takes {_ms(compiled)} ms for ResNet-50 ({_ratio(compiled)}). The ceiling is the "
        "ratio with batch norm, ReLU and add for nothing: convolutions, which are PyTorch's on both sides, "
        "take most of a step on this processor. At batch 1 activations are so small that the very operators "
        f"of eager PyTorch run: ResNet-18 and 50 take its time ({' to '.join(dict.fromkeys(alone))})."
    )
    return f"{_table('| net, training step | eager, ms | fused, ms | ratio | ceiling |', rows)}\n\n{text}\n"


def _speed(net: str) -> Row:
    return _read(f"quantize-{net}")["speed"]  # type: ignore[no-any-return]


def inference() -> str:
    rows, starts = [], {"fused": [], "compile": []}
    for name in SERVED:
        sides = _result(f"inference-{name}")["implementations"]
        net, batch, dtype = name.split("-")
        eager, fused = sides["eager"], sides["fused"]
        row = [f"{net_title(net)}, {batch}, {dtype}", _ms(eager), _ms(fused), _ratio(fused)]
        row += [_ms(sides[peer]) if peer in sides else "" for peer in ("compile", "openvino", "onnxruntime")]
        quantised = (batch, dtype) == ("16", "bf16") and (CPU / f"quantize-{net}.json").exists()
        rows.append([*row, f"{_speed(net)['after']['median_ms']:.1f}" if quantised else ""])
        if net == "resnet50":
            for side, seconds in starts.items():
                seconds.append(sides[side]["startup_s"])
    before = [_speed(net)["before"]["median_ms"] for net in ("resnet50", "resnet18")]
    ratios = [
        _speed(net)["before"]["median_ms"] / _speed(net)["after"]["median_ms"]
        for net in ("resnet50", "resnet18")
    ]
    ours, theirs = ([min(seconds), max(seconds)] for seconds in starts.values())
    text = _prose(
        "Fused, `torch.compile` (with freezing) and the engines end in much the same matrix products here, "
        f"which is why they are level. The first answer of ResNet-50 comes after {ours[0]:.1f} to "
        f"{ours[1]:.1f} s, of `torch.compile` after {theirs[0]:.1f} to {theirs[1]:.1f} s. The column of 8 "
        "bits is by [`fusedres quantize`](docs/inference.md#in-8-bits), in turns with the net in bf16 "
        f"({before[0]:.1f} ms and {before[1]:.1f}): {ratios[0]:.2f}x and {ratios[1]:.2f}x. Nothing has been "
        "measured on a GPU yet."
    )
    head = "| trained net, batch, dtype | eager, ms | fused, ms | ratio | `torch.compile` "
    return f"{_table(head + '| OpenVINO | ONNX Runtime | 8 bits, ms |', rows)}\n\n{text}\n"


def h100() -> str:
    lines = [
        json.loads(line) for path in sorted(PEERS.glob("peers_*")) for line in path.read_text().splitlines()
    ]
    speeds = {(line["kind"], line["variant"]): line["img_s"] for line in lines if "img_s" in line}
    levels = {name: passes(name, "resnet50", _BATCH, 224, "bfloat16") for name in LEVELS}
    moved = {name: sum(each.work.bytes for each in found) / _BATCH / 1e6 for name, found in levels.items()}

    def measured(kind: str, variant: str) -> str:
        return f"{speeds[kind, variant]:,.0f}"

    def roof(level: str) -> str:
        seconds = sum(each.work.seconds(BANDWIDTH, PEAK["bfloat16"]) for each in levels[level])
        return f"{round(_BATCH / seconds, -2):,.0f}"

    rows = [
        ["eager, channels_last", measured("train", "eager_amp_cl")]
        + ["eager, channels_last", measured("infer", "eager_cl")],
        ["`torch.compile`", measured("train", "compile_amp_cl")]
        + ["`torch.compile`, freezing", measured("infer", "compile_freeze_cl")],
        ["JAX", measured("train", "jax_bf16_nhwc"), "JAX", measured("infer", "jax_bf16_nhwc")],
        ["roof: a block in one Function", roof("block")]
        + ["roof: each convolution in one pass", roof("conv")],
        ["roof: all that can be fused", roof("joint")]
        + ["roof: each block in one pass", roof("block-inference")],
    ]
    text = _prose(
        f"A roof counts each tensor as often as a pass has to read or write it: {moved['block']:.0f} MB an "
        f"image for a training step with block Functions, where eager PyTorch moves {moved['eager']:.0f} and "
        f"a compiler {moved['compile']:.0f}. `benchmarks/roofline.py` has every level, layer and pass, for "
        "any ResNet, batch, size and dtype."
    )
    return f"{_table('| training | img/s | inference | img/s |', rows)}\n\n{text}\n"


def compiling() -> str:
    sides = _result("resnet50-bf16")["implementations"]
    return (
        _prose(
            f"On the machine of the README's tables ResNet-50 trains in {_ms(sides['compile'])} ms by "
            f"`torch.compile` on the eager net, in {_ms(sides['fused'])} ms fused without compiling."
        )
        + "\n"
    )


MEASURED: Mapping[str, Callable[[], str]] = {
    "training": training,
    "inference": inference,
    "h100": h100,
    "compiling": compiling,
}


def written(page: str) -> str:
    """The text of a page with what is between its marks anew."""
    return _MARKED.sub(lambda found: f"{found[1]}{MEASURED[found[2]]()}{found[3]}", page)


def main() -> int:
    for page in PAGES:
        text = page.read_text()
        anew = written(text)
        page.write_text(anew)
        print(f"{page.relative_to(ROOT)}: {'changed' if anew != text else 'as it was'}")
    reports = [_read(name) for name in PICTURED]
    plot.write({**reports[0], "results": [one for each in reports for one in each["results"]]}, PICTURE)
    print(f"{PICTURE.relative_to(ROOT)}: drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
