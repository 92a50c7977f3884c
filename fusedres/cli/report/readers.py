"""Result files, each told by its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedres.cli.report.data import (
    EAGER,
    FUSED,
    Comparison,
    LayerTime,
    OpTime,
    Quantised,
    Results,
    Side,
    Source,
    threads_title,
)
from fusedres.plan import Conv, traffic
from fusedres.plan.conv import PEAK

Record = dict[str, Any]
# of gpu_check: peers, and the parts that time this package and eager PyTorch
_PEERS = ("jax",)
_PARTS = {"training step": "train", "inference": "inference"}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
PEER = "peer"
_NANO = 1e-9
_BUSY = 1.5  # processes that run or wait, for each core: a sweep itself makes one


def role_of(name: str) -> str:
    """By the name that results give an implementation."""
    if name == EAGER:
        return EAGER
    return FUSED if name == FUSED or name in ("auto", "triton", "cuda", "cpu", "int8") else PEER


def _versions(record: Record) -> list[str]:
    versions = record["versions"]
    names = ("fusedres", "torch", "torchvision", "triton")
    return [f"{name} {versions[name]}" for name in names if versions.get(name)]


def bench(data: Record, path: Path, into: Results) -> None:
    """``fusedres bench --json``."""
    _add_bench(data, path, into)
    into.sources.append(Source(path, "fusedres bench", data["date"][:10], data["command"]))


def scaling(lines: Sequence[Record], path: Path, into: Results) -> None:
    """``benchmarks/scaling.py``: a line of ``fusedres bench`` for each point, or why there is none."""
    busy: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            if "left_out" in line:
                _left_out(line, into)
            else:
                _add_bench(line, path, into, line["sweep"])
                if line["load_before"] > _BUSY * line["cores"]:
                    busy.append(line["machine"]["device_name"])
        except (KeyError, TypeError, AttributeError) as error:
            into.problems.append(f"{path}: point {number} can't be read ({type(error).__name__}: {error})")
    for name in dict.fromkeys(busy):
        into.machine(name).notes.append(
            f"Of {path.name} {busy.count(name)} of {len(lines)} points were measured while the machine had "
            "other work: their times are too long, on both sides."
        )
    dates = sorted(str(line.get("date", ""))[:10] for line in lines)
    into.sources.append(Source(path, "scaling", dates[-1], "python benchmarks/scaling.py"))


def _left_out(line: Record, into: Results) -> None:
    point = line["point"]
    size = f", {point['image-size']} px" if "image-size" in point else ""
    machine = into.machine(line["machine"]["device_name"])
    machine.notes.append(
        f"By {line['sweep']} {point['model']}, batch {point['batch']}{size}, {point['mode']}, and what is "
        f"larger was not measured: {line['left_out']}."
    )


def _add_bench(data: Record, path: Path, into: Results, sweep: str = "") -> None:
    settings, facts = data["settings"], data["machine"]
    on_cpu = settings["device"] == "cpu"
    found = []
    for entry in data["results"]:
        sides = tuple(_bench_side(name, side) for name, side in entry["implementations"].items())
        found.append(
            Comparison(
                entry["mode"],
                settings["model"],
                settings["batch"],
                settings["dtype"],
                settings["image_size"],
                facts["threads"] if on_cpu else None,
                sides,
                path,
                data["date"],
                sweep,
            )
        )
    machine = into.machine(facts["device_name"])
    machine.comparisons += found
    threads = threads_title(facts["threads"]) if on_cpu and not sweep else None
    machine.say(threads, *_versions(data), data["date"][:10])


def _bench_side(name: str, side: Record) -> Side:
    ms = side["ms"]
    return Side(
        name,
        side["images_per_second"],
        side["ratio_to_eager"],
        role_of(name),
        (ms["median"], ms["min"], ms["max"]),
        side.get("peak_bytes"),
        side.get("startup_s"),
        side.get("description", ""),
    )


def quantize(data: Record, path: Path, into: Results) -> None:
    """``fusedres quantize --json``, with its speed."""
    settings, speed, predictions = data["settings"], data["speed"], data["predictions"]
    if speed is None:
        raise ValueError("it has no speed to show")
    agree = (predictions["agree"], predictions["images"]) if predictions else None
    found = Quantised(
        settings["model"],
        speed["batch"],
        settings["dtype"],
        speed["before"]["images_per_second"],
        speed["after"]["images_per_second"],
        data["weights_bytes"]["before"],
        data["weights_bytes"]["after"],
        agree,
        path,
    )
    machine = into.machine(data["machine"]["device_name"])
    machine.quantised.append(found)
    machine.say(threads_title(data["machine"]["threads"]), *_versions(data), data["date"][:10])
    into.sources.append(Source(path, "fusedres quantize", data["date"][:10], data["command"]))


def pytest_benchmark(data: Record, path: Path, into: Results) -> None:
    """pytest-benchmark's file of ``pytest benchmarks``: groups of times that were taken in turns."""
    groups: dict[str, dict[str, Record]] = {}
    for entry in data["benchmarks"]:
        groups.setdefault(entry["group"], {})[entry["extra_info"]["implementation"]] = entry
    found: list[OpTime] = []
    machine, date = None, str(data.get("datetime", ""))[:10]
    for group, entries in groups.items():
        if FUSED not in entries or EAGER not in entries:
            continue
        info = entries[FUSED]["extra_info"]
        seconds = {name: entry["stats"]["median"] for name, entry in entries.items()}
        ratios = {name: seconds[EAGER] / time for name, time in seconds.items() if name != EAGER}
        # what bounds a product of matrices is no bandwidth
        gbps = None if info["flop"] else info["bytes"] / seconds[FUSED] * _NANO
        ratio = ratios.pop(FUSED)
        found.append(OpTime(group, ratio, gbps, path, tuple(ratios.items()), info["share_of_roofline"]))
        machine = into.machine(info["device"])
        machine.say(threads_title(info["threads"]), *_versions(info), date)
    if machine is None:
        raise ValueError("no group of it has a fused and an eager time")
    machine.ops += found
    into.sources.append(Source(path, "pytest-benchmark", date, "pytest benchmarks --benchmark-only"))


def gpu_check(lines: Sequence[Record], path: Path, into: Results) -> None:
    """The last run in a results.jsonl of ``benchmarks/gpu_check.py``."""
    starts = [index for index, line in enumerate(lines) if line["part"] == "header"]
    header, records = lines[starts[-1]], lines[starts[-1] + 1 :]
    name, tiny = header["machine"]["device_name"], header["tiny"]
    machine = into.machine(f"{name}, tiny shapes" if tiny else name)
    machine.tiny = tiny
    machine.say(*_versions(header), header["date"][:10])
    if tiny:
        machine.notes.append("Shapes are tiny: the check's logic was run, and no speed is shown by it.")
    runs: dict[tuple[Any, ...], list[Record]] = {}
    timed_layers, timed_ops, compared = [], [], []
    copies = [record["gbps"] for record in records if record["name"] == "copy"]
    if copies and header["device"] == "cuda":
        machine.bandwidth, machine.peak = 1e9 * copies[-1], PEAK["bfloat16"]
        machine.ceilings = "a copy measured there, arithmetic as measured on an H100"
    wrong = sum(not record.get("ok", True) for record in records)
    if wrong:
        machine.notes.append(f"{wrong} of {len(records)} records of {path.name} say that something is wrong.")
    for record in records:
        if record["name"] in ("training step", "inference"):
            # a peer in a part of its own stands beside those of the part that has no peers
            part = _PARTS[record["name"]] if record["implementation"] in _PEERS else record["part"]
            key = (part, record["name"], record["model"], record["batch"], record["dtype"])
            runs.setdefault(key, []).append(record)
        elif "floor_ms" in record and "ms" in record:
            timed_layers.append(_checked_layer(record))
        elif record.get("times_aten") and record.get("implementation") != "aten":
            shape = "x".join(map(str, record["shape"]))
            dtype = SHORT.get(record["dtype"], record["dtype"])
            variant = "" if record["variant"] == "none" else f", {record['variant']}"
            label = f"{record['name']}, {shape}{variant}, {dtype}, {record['implementation']}"
            timed_ops.append(OpTime(label, record["times_aten"], record["gbps"], path))
    for (_, name, net, batch, dtype), found in runs.items():
        mode = "train" if name == "training step" else "inference"
        sides = tuple(_checked_side(record) for record in found)
        short = SHORT.get(dtype, str(dtype))
        compared.append(Comparison(mode, net, batch, short, None, None, sides, path, header["date"]))
    machine.layers += timed_layers
    machine.ops += timed_ops
    machine.comparisons += compared
    into.sources.append(Source(path, "gpu_check", header["date"][:10], header["command"]))


def _checked_side(record: Record) -> Side:
    ms, name = record["ms"], record["implementation"]
    title = {"auto": FUSED}.get(name, name if role_of(name) != FUSED else f"fused, {name}")
    return Side(
        title,
        record["images_per_second"],
        record["ratio_to_eager"],
        role_of(name),
        (ms["median"], ms["min"], ms["max"]),
        record["peak_bytes"],
        description=str(record.get("served_by") or record.get("eager") or ""),
    )


def _checked_layer(record: Record) -> LayerTime:
    ms = {FUSED: record["ms"], PEER: record["plain_ms"]}
    return LayerTime(
        record["variant"],
        record["name"],
        ms,
        record["floor_ms"],
        record["bytes"],
        record["flop"],
        record["count"],
        SHORT.get(record["dtype"], str(record["dtype"])),
    )


def peers(lines: Sequence[Record], path: Path, into: Results, device: str) -> None:
    """Throughput of other frameworks, a line for each."""
    machine = into.machine(device)
    machine.by_others = True
    runs: dict[tuple[str, str], list[Record]] = {}
    for line in lines:
        if line.get("what") == "copy_TBs":
            machine.bandwidth = 1e12 * line["value"]
        elif line.get("what") == "matmul_torch.bfloat16_TFLOPs":
            machine.peak = 1e12 * line["value"]
            machine.ceilings = "a copy and a matrix product measured there"
        elif line.get("what") == "device":
            machine.say(f"torch {line['torch']}", f"cuDNN {_cudnn(line['cudnn'])}")
        elif "img_s" in line:
            runs.setdefault((line["kind"], line["model"]), []).append(line)
            machine.say(f"JAX {line['jax']}" if "jax" in line else None)
    for (kind, net), found in runs.items():
        base = next((line for line in found if line["variant"] in ("eager_amp_cl", "eager_cl")), None)
        mode = "train" if kind == "train" else "inference"
        same = [c for c in machine.comparisons if (c.mode, c.net) == (mode, net)]
        earlier = same[0].sides if same else ()
        speed = (
            base["img_s"] if base else next((s.images_per_second for s in earlier if s.role == EAGER), None)
        )
        batch = (base or found[0])["batch"]
        sides = tuple(_peer(line, batch, speed) for line in found)
        if same:  # the same net in another file
            machine.comparisons.remove(same[0])
        all_sides = (*earlier, *sides)
        machine.comparisons.append(Comparison(mode, net, batch, "bf16", None, None, all_sides, path))
    into.sources.append(Source(path, "throughput of other frameworks", "", ""))


def _cudnn(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


_WORDS = {
    "cl": "",
    "nchw": "NCHW",
    "amp": "",
    "jax": "JAX",
    "bf16": "",
    "nhwc": "",
    "graph": "+ CUDA graph",
}
_WORDS |= {"freeze": "+ freezing", "compile": "torch.compile"}


def _peer(line: Record, batch: int, eager: float | None) -> Side:
    words = [_WORDS.get(word, word) for word in line["variant"].split("_")]
    name = " ".join(word for word in words if word)
    if line["batch"] != batch:
        name += f" (batch {line['batch']})"
    peak = line.get("peak_GiB")
    return Side(
        name,
        line["img_s"],
        line["img_s"] / eager if eager else None,
        EAGER if line["variant"] in ("eager_amp_cl", "eager_cl") else PEER,
        (line["ms"], line.get("lo"), line.get("hi")),
        None if peak is None else peak * 2**30,
        line.get("first_s"),
        line["variant"],
    )


_DIRECTIONS = {"f": "forward", "d": "dgrad", "w": "wgrad"}


def layers(lines: Sequence[Record], path: Path, into: Results, device: str) -> None:
    """cuDNN's time for each convolution of a net, a line for each."""
    machine = into.machine(device)
    machine.by_others = True
    for line in lines:
        conv = Conv(_BATCH, line["c"], line["h"], line["h"], line["k"], line["r"], line["st"])
        around = traffic.around(conv, "bfloat16")
        moved = sum(around[name].bytes for name in ("x", "weight", "y"))
        stride = f"/{conv.stride}" if conv.stride > 1 else ""
        label = f"{conv.side}×{conv.side}{stride}, {conv.channels} → {conv.filters}, {conv.height} px"
        for letter, direction in _DIRECTIONS.items():
            ms = line[f"bf_{letter}"]
            if ms:  # the first convolution has no dgrad
                machine.layers.append(
                    LayerTime(
                        label,
                        direction,
                        {PEER: ms},
                        line["floor"],
                        moved,
                        traffic.flop(conv),
                        line["cnt"],
                        "bf16",
                    )
                )
    machine.notes.append(f"Layers are of ResNet-50 at batch {_BATCH}, down to 14 px.")
    into.sources.append(Source(path, "times of cuDNN's convolutions", "", ""))


_BATCH = 256

# keys that a file must have -> its reader
Reader = Callable[[Any, Path, Results], None]
DOCUMENTS: Mapping[tuple[str, ...], tuple[str, Reader]] = {
    ("settings", "results", "machine"): ("fusedres bench", bench),
    ("settings", "weights_bytes", "speed"): ("fusedres quantize", quantize),
    ("benchmarks", "machine_info"): ("pytest-benchmark", pytest_benchmark),
}
