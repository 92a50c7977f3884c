"""``fusedres report``: what the page says is what the files say, whatever else is among them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import fusedres
from fusedres.cli import main
from fusedres.cli.report import load
from fusedres.cli.report.style import DARK, LIGHT

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
EPYC = RESULTS / "epyc-zen5-2cores"
PEERS = RESULTS / "h100-peers"
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Elements with their attributes and text, and which of them are left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None], str | None]] = []  # and the figure it is in
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        figure = next((a.get("id") for name, a in self.open if name == "figure"), None)
        self.elements.append((tag, dict(attrs), figure))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        figure = next((a.get("id") for name, a in self.open if name == "figure"), None)
        self.elements.append((tag, dict(attrs), figure))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.text.setdefault(self.open[-1][0], []).append(data.strip())

    def marks(self, figure: str, tag: str = "rect") -> list[tuple[str, float]]:
        """Names and values of what is drawn."""
        return [
            (str(attrs["data-name"]), float(attrs["data-value"] or "nan"))
            for name, attrs, of in self.elements
            if name == tag and of and of.endswith(figure) and "data-value" in attrs
        ]

    @property
    def figures(self) -> list[str]:
        return [str(attrs["id"]) for tag, attrs, _ in self.elements if tag == "figure"]


def report(tmp_path: Path, *paths: Path, png: Path | None = None) -> Page:
    out = tmp_path / "report.html"
    more = ["--png", str(png)] if png else []
    assert main(["report", *map(str, paths), "--out", str(out), *more]) == 0
    return Page(out.read_text())


def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, *paths: Path) -> str:
    assert main(["report", *map(str, paths), "--out", str(tmp_path / "none.html")]) == 2
    assert not (tmp_path / "none.html").exists()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(tmp_path_factory.mktemp("report"), RESULTS)


def test_the_page_is_whole_and_asks_nothing_of_the_network(whole):
    assert not whole.open
    assert len(set(whole.figures)) == len(whole.figures)
    tags = {tag for tag, _, _ in whole.elements}
    assert not tags & {"script", "img", "iframe", "object", "audio", "video"}
    for _, attrs, _ in whole.elements:
        for name in ("src", "href", "action"):
            assert (attrs.get(name) or "data:,").startswith("data:")
    style = "".join(whole.text["style"])
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
        None,
    ) in whole.elements


def test_every_number_in_a_mark_is_finite(whole):
    for tag, attrs, _ in whole.elements:
        if tag in ("rect", "circle", "line", "text"):
            for name in ("x", "y", "width", "height", "cx", "cy", "x1", "x2", "y1", "y2"):
                if name in attrs:
                    value = float(attrs[name] or "nan")
                    assert value >= (0 if name in ("width", "height") else -1), (tag, attrs)


def test_speed_and_memory_are_those_of_bench(tmp_path):
    path = EPYC / "inference-resnet50-16-bf16.json"
    page = report(tmp_path, path)
    sides = read(path)["results"][0]["implementations"]
    ratios = {name: side["ratio_to_eager"] for name, side in sides.items()}
    assert dict(page.marks("speed-inference")) == pytest.approx(ratios, rel=1e-5)
    peaks = {name: side["peak_bytes"] / 2**20 for name, side in sides.items() if side["peak_bytes"]}
    assert dict(page.marks("memory-inference")) == pytest.approx(peaks, rel=1e-5)
    cells = page.text["td"]
    assert f"{sides['openvino']['images_per_second']:,.1f}" in cells
    assert sides["openvino"]["description"] in cells
    facts = " ".join(page.text["p"])
    assert "2 threads" in facts and "torch 2.14.1+cu130" in facts and read(path)["date"][:10] in facts
    assert "AMD EPYC" in page.text["h2"]


def test_eager_is_the_line_at_one_among_several_nets(whole):
    names = [name for name, _ in whole.marks("amd-epyc-speed-train")]
    assert "fused" in names and "eager" not in names
    assert "eager = 1" in whole.text["text"]


def test_eight_bits_are_those_of_quantize(tmp_path):
    path = EPYC / "quantize-resnet18.json"
    speed = read(path)["speed"]
    marks = dict(report(tmp_path, path).marks("quantised"))
    ratio = speed["after"]["images_per_second"] / speed["before"]["images_per_second"]
    assert marks == pytest.approx({"8 bits": ratio, "bf16": 1.0}, rel=1e-5)


def test_peers_are_shown_as_others(tmp_path):
    page = report(tmp_path, PEERS)
    assert "NVIDIA H100 80GB HBM3" in page.text["h2"]
    assert any(note.startswith("No figure of fusedres") for note in page.text["p"])
    lines = [
        json.loads(line) for path in PEERS.glob("peers_*.jsonl") for line in path.read_text().splitlines()
    ]
    speeds = {line["variant"]: line["img_s"] for line in lines if line.get("kind") == "train"}
    eager = speeds["eager_amp_cl"]
    marks = page.marks("speed-train")
    assert dict(marks[:6])["JAX"] == pytest.approx(speeds["jax_bf16_nhwc"] / eager, rel=1e-5)
    assert sorted(value for _, value in marks[:6]) == pytest.approx(
        sorted(speed / eager for speed in speeds.values()), rel=1e-5
    )
    classes = {attrs.get("class") for tag, attrs, figure in page.elements if tag == "rect" and figure}
    assert "fused" not in classes and {"peer", "eager", "roof"} <= classes


def test_layers_stand_beside_their_floors(tmp_path):
    page = report(tmp_path, PEERS)
    lines = [json.loads(line) for line in (PEERS / "layers_resnet50_b256.jsonl").read_text().splitlines()]
    for letter, direction in (("f", "forward"), ("d", "dgrad"), ("w", "wgrad")):
        times = [line[f"bf_{letter}"] for line in lines if line[f"bf_{letter}"]]
        assert [ms for _, ms in page.marks(f"layers-{direction}-bf16")] == pytest.approx(times)
        # the marks on the bars, in the bars' own scale
        of_figure = [
            (tag, attrs)
            for tag, attrs, figure in page.elements
            if figure == f"nvidia-h100-80gb-hbm3-layers-{direction}-bf16"
        ]
        bars = [attrs for tag, attrs in of_figure if tag == "rect" and "data-value" in attrs]
        floors = [float(attrs["x1"]) for tag, attrs in of_figure if attrs.get("class") == "floor"]
        start = float(bars[0]["x"])
        scale = max(float(bar["width"]) / float(bar["data-value"]) for bar in bars)  # one may be cut off
        floor = [line["floor"] for line in lines if line[f"bf_{letter}"]]
        assert [(x - start) / scale for x in floors] == pytest.approx(floor, rel=0.02, abs=1e-3)


def test_floors_of_the_layers_file_are_those_of_our_count():
    """Bytes and FLOP that the roofline is drawn with, against floors that others computed."""
    machine = load.load([PEERS]).machines["NVIDIA H100 80GB HBM3"]
    for layer in machine.layers:
        floor = 1e3 * max(layer.bytes / 2.93e12, layer.flop / 750e12)
        assert floor == pytest.approx(layer.floor_ms, rel=0.02), layer


def test_scaling_curves_come_of_runs_that_differ_in_one_thing(whole, tmp_path):
    depths = {18: "resnet18-bf16", 34: "resnet34-bf16", 50: "resnet50-bf16", 101: "resnet101-bf16"}
    found = whole.marks("training-time-by-depth-resnet-batch-16-bf16", "circle")
    expected = [
        1e3 / read(EPYC / f"{name}.json")["results"][0]["implementations"]["fused"]["images_per_second"]
        for name in depths.values()
    ]
    assert [value for name, value in found if name == "fused"] == pytest.approx(expected, rel=1e-5)
    # two batches make no curve, three do
    record = read(EPYC / "resnet50-bf16.json")
    for batch in (16, 32, 64):
        record["settings"]["batch"] = batch
        (tmp_path / f"{batch}.json").write_text(json.dumps(record))
    assert not any(
        "by-batch" in name for name in report(tmp_path, tmp_path / "16.json", tmp_path / "32.json").figures
    )
    page = report(tmp_path, tmp_path)
    assert len(page.marks("training-time-by-batch-resnet-50-bf16", "circle")) == 9


def sweep_lines(sweep: str, settings: list[dict[str, Any]], **facts: Any) -> list[str]:
    """Of a scaling file: one run with other settings, ever slower."""
    lines = []
    for index, changed in enumerate(settings, 1):
        record = read(EPYC / "resnet50-bf16.json") | {"sweep": sweep, "cores": 2, "load_before": 2.0 * index}
        record["settings"] |= changed
        record["machine"] |= facts
        for side in record["results"][0]["implementations"].values():
            side["images_per_second"] /= index
        lines.append(json.dumps(record) + "\n")
    return lines


def test_curves_of_a_scaling_file(tmp_path, capsys):
    sizes = [{"image_size": size} for size in (128, 224, 288)]
    cifar = [{"model": name, "image_size": 32, "batch": 64} for name in ("resnet20", "resnet1202")]
    lines = sweep_lines("size", sizes) + sweep_lines("cifar", cifar)
    lines.append('{"sweep": "batch", "settings": {}}\n')  # of another version
    point = {"model": "resnet50", "batch": 256, "mode": "train"}
    left_out = {"sweep": "batch", "left_out": "it would take about 40 GiB, and 12 are free", "point": point}
    lines.append(json.dumps(left_out | {"machine": {"device_name": "AMD EPYC"}, "date": "2026-12-01"}) + "\n")
    (tmp_path / "scaling.jsonl").write_text("".join(lines)[:-40] + "\n" + lines[-1])
    page = report(tmp_path, tmp_path / "scaling.jsonl", EPYC / "resnet50-bf16.json")
    sides = read(EPYC / "resnet50-bf16.json")["results"][0]["implementations"]
    by_size = page.marks("training-time-by-image-size-resnet-50-batch-16-bf16", "circle")
    speed = sides["fused"]["images_per_second"]
    assert [value for name, value in by_size if name == "fused"] == pytest.approx(
        [1e3 * index / speed for index in (1, 2, 3)], rel=1e-5
    )
    by_depth = page.marks("training-memory-by-depth-cifar-resnet-batch-64-bf16", "circle")
    assert [value for name, value in by_depth if name == "fused"] == pytest.approx(
        [sides["fused"]["peak_bytes"] / 2**20] * 2, rel=1e-5
    )
    # the points of curves are no bars of their own, nor do they take the place of a run by itself
    assert len(page.marks("speed-train")) == len(sides)
    assert any("batch 256, train, and what is larger was not measured" in text for text in page.text["p"])
    assert any("Of scaling.jsonl 3 of 7 points were measured while" in text for text in page.text["p"])
    err = capsys.readouterr().err
    assert "point 6 can't be read (KeyError: 'machine')" in err and "is cut short or damaged" in err


def test_a_later_run_of_the_same_takes_the_place_of_an_earlier(tmp_path):
    record = read(EPYC / "resnet50-fp32.json")
    (tmp_path / "old.json").write_text(json.dumps(record))
    record["date"] = "2027-01-01T00:00:00+00:00"
    record["results"][0]["implementations"]["fused"]["ratio_to_eager"] = 1.5
    (tmp_path / "new.json").write_text(json.dumps(record))
    page = report(tmp_path, tmp_path / "new.json", tmp_path / "old.json")
    assert dict(page.marks("speed-train"))["fused"] == 1.5
    assert any("old.json" in text for text in page.text["p"])


GPU_CHECK = [
    {"part": "header", "name": "header", "machine": {"device_name": "old run"}, "versions": {}, "tiny": False}
    | {"date": "2026-01-01", "command": "gpu_check"},
    {
        "part": "header",
        "name": "header",
        "command": "python benchmarks/gpu_check.py",
        "tiny": False,
        "device": "cuda",
    }
    | {"date": "2026-11-25T10:00:00+00:00", "machine": {"device_name": "NVIDIA X1"}}
    | {"versions": {"fusedres": fusedres.__version__, "torch": "2.11.0"}},
    {"part": "copy", "name": "copy", "ok": True, "gbps": 2000.0, "tensor_bytes": 1 << 30},
    *(
        {"part": "train", "name": "training step", "ok": True, "implementation": name, "served_by": "cuda"}
        | {"model": "resnet50", "batch": 256, "dtype": "bfloat16", "images_per_second": 4000.0 * ratio}
        | {
            "ms": {"median": 64 / ratio, "min": 63.0, "max": 65.0},
            "ratio_to_eager": ratio,
            "peak_bytes": 1 << 33,
        }
        for name, ratio in (("auto", 2.0), ("triton", 1.9), ("eager", 1.0))
    ),
    {"part": "convs", "name": "conv_fwd", "ok": True, "implementation": "triton", "dtype": "bfloat16"}
    | {"variant": "inner 3x3/1 64x56x56 -> 64", "count": 3, "batch": 256, "bytes": 205594624}
    | {"flop": 59190018048, "floor_ms": 0.1, "bound": "memory", "ms": 0.125, "plain_ms": 0.15},
    {"part": "ops", "name": "bn_forward", "ok": True, "implementation": "cuda", "variant": "plain"}
    | {"shape": [256, 64, 56, 56], "dtype": "bfloat16", "ms": 0.2, "gbps": 1800.0, "times_aten": 2.5},
    {"part": "ops", "name": "bn_act", "ok": False, "implementation": "cuda", "error": "wrong"},
]


def test_gpu_check(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in GPU_CHECK))
    page = report(tmp_path, path)
    assert page.text["h2"] == ["NVIDIA X1", "Files"]
    assert dict(page.marks("speed-train")) == {"fused": 2.0, "fused, triton": 1.9, "eager": 1.0}
    assert page.marks("layers-conv_fwd-bf16") == [("fused", 0.125), ("PyTorch", 0.15)]
    assert [value for _, value in page.marks("ops")] == [2.5]
    dots = [value for name, value in page.marks("roofline", "circle")]
    assert sorted(set(dots)) == pytest.approx([59190018048 / 0.15e-3, 59190018048 / 0.125e-3], rel=1e-5)
    assert "1 of 7 records of results.jsonl say that something is wrong." in page.text["p"]


def benchmark_entry(name: str, median: float) -> dict[str, Any]:
    info = {"implementation": name, "device": "AMD EPYC", "threads": 2, "bytes": 64_000_000, "flop": 0}
    info |= {"share_of_roofline": 0.5}
    versions = {"versions": {"fusedres": fusedres.__version__, "torch": "2.14.1"}}
    return {"group": "pool, fp32", "name": name, "stats": {"median": median}, "extra_info": info | versions}


def test_pytest_benchmark(tmp_path):
    path = tmp_path / "benchmark.json"
    times = {"fused": 0.01, "eager": 0.025, "eager_nchw": 0.05, "compile": 0.02}
    entries = [benchmark_entry(name, median) for name, median in times.items()]
    for name in ("fused", "eager"):
        entry = benchmark_entry(name, times[name]) | {"group": "block, fp32"}
        entry["extra_info"]["flop"] = 10**9
        entries.append(entry)
    path.write_text(json.dumps({"machine_info": {}, "datetime": "2026-11-25", "benchmarks": entries}))
    page = report(tmp_path, path)
    assert page.marks("ops") == [("fused", 2.5), ("compile", 1.25), ("fused", 2.5)]
    assert "eager_nchw 0.50×, compile 1.25×" in page.text["td"]
    assert page.text["td"].count("6.4") == 1  # GB/s, of what computes no product
    assert "50%" in page.text["td"]


# what is wrong with a file, its content, what is said
BAD = {
    "empty.json": ("", "the file is empty"),
    "cut.json": ('{"settings": {"model": "resnet50", ', "cut short or damaged at line 1"),
    "text.json": ("nothing here", "no JSON at line 1"),
    "list.json": ("[1, 2]", "no result of fusedres, gpu_check or pytest-benchmark"),
    "other.json": ('{"a": 1}', "no result of fusedres, gpu_check or pytest-benchmark"),
    "info.json": ('{"command": "fusedres eval x", "versions": {}}', "doesn't show: fusedres eval x"),
    "version.json": (
        '{"settings": {}, "machine": {}, "results": [], "versions": {"fusedres": "9.0"}}',
        f"bench, by fusedres 9.0 that fusedres {fusedres.__version__} can't read (no 'device')",
    ),
    "cut.jsonl": ('{"part": "hea', "cut short or damaged at line 1"),
    "binary.json": (b"\xff\xfe\x00", "it is no text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_and_the_rest_is_shown(name, tmp_path, capsys):
    content, said = BAD[name]
    bad = tmp_path / name
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in fails(capsys, tmp_path, bad)
    page = report(tmp_path, bad, EPYC / "resnet50-fp32.json")
    err = capsys.readouterr().err
    assert err.startswith("fusedres: warning: ") and said in err and err.count("\n") == 1
    assert any(said in text for text in page.text["p"]) and page.marks("speed-train")


def test_the_lines_before_a_cut_are_shown(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in GPU_CHECK)
    path.write_text(text[:-40])
    page = report(tmp_path, path)
    assert f"line {len(GPU_CHECK)} is cut short" in capsys.readouterr().err
    assert page.marks("speed-train")


def test_nothing_to_show(tmp_path, capsys):
    assert "there is no such file" in fails(capsys, tmp_path, tmp_path / "missing.json")
    assert "no result files in this folder" in fails(capsys, tmp_path, tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("")
    assert "(and 1 more)" in fails(capsys, tmp_path, tmp_path)


def test_text_from_files_is_escaped(tmp_path):
    record = read(EPYC / "resnet50-fp32.json")
    record["machine"]["device_name"] = "<script>alert(1)</script> & co"
    path = tmp_path / "x.json"
    path.write_text(json.dumps(record))
    page = report(tmp_path, path)
    assert "script" not in {tag for tag, _, _ in page.elements}
    assert "<script>alert(1)</script> & co" in page.text["h2"]


def test_pngs(tmp_path):
    pytest.importorskip("matplotlib")
    page = report(
        tmp_path, EPYC / "resnet50-bf16.json", EPYC / "quantize-resnet50.json", png=tmp_path / "png"
    )
    written = list((tmp_path / "png").iterdir())
    assert len(written) == len(page.figures)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_text_can_be_read_in_both_palettes(palette):
    """Contrast of WCAG 2.1, level AA."""
    for text in ("ink", "muted", "fused", "warn"):
        for ground in ("page", "paper"):
            lights = sorted((luminance(palette[text]), luminance(palette[ground])))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (text, ground)
