"""Layer responses: how much each layer's output varies (He et al. 2015, figure 7)."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.cli import checkpoints, images, machine, options
from fusedres.cli.bench import report
from fusedres.cli.errors import require, writing
from fusedres.cli.options import Commands, add_command, at_least
from fusedres.training import files

BATCH = 100
Responses = Mapping[str, float]


def layer_responses(net: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """The standard deviation of every batch norm's output, before ReLU and addition, in the net's order.

    Args:
        net: in evaluation mode.
        batches: of images [N, 3, H, W], normalised.
    """
    sums: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Tensor) -> None:
            values = out.detach().double()
            found = torch.stack([torch.tensor(float(values.numel())), values.sum(), values.square().sum()])
            sums[name] = sums.get(name, torch.zeros(3, dtype=torch.float64)) + found

        return hook

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    try:
        with torch.inference_mode():
            for x in batches:
                net(x)
    finally:
        for hook in hooks:
            hook.remove()
    deviations = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        deviations[name] = float((squares / count - mean.square()).clamp_min(0).sqrt())
    return deviations


class LayerResponses:
    """The experiment."""

    name = "responses"

    def add_parser(self, commands: Commands) -> argparse.ArgumentParser:
        parser = add_command(
            commands,
            self.name,
            help="how much each layer's output varies",
            description="The standard deviation of every batch norm's output, before ReLU and addition, on\n"
            "test images (figure 7): residual nets have smaller responses than plain ones, and deeper\n"
            "ones smaller than less deep ones. Writes responses.csv, responses.png, in the order of the\n"
            "net and sorted, and result.json.",
            example="fusedres experiment responses --checkpoint runs/20/model.safetensors \\\n"
            "    --checkpoint runs/56/model.safetensors --data test.npz --out responses",
        )
        checkpoints.add_source(parser, several=True)
        parser.add_argument(
            "--data", type=Path, required=True, metavar="PATH", help="an .npz or a folder of images"
        )
        parser.add_argument(
            "--images", type=at_least(1), default=1000, metavar="N", help="the first N (default: 1000)"
        )
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="takes everything")
        options.add_threads(parser)
        return parser

    def run(self, args: argparse.Namespace) -> int:
        require("matplotlib", f"experiment {self.name}")
        options.check_folder(args.out)
        data = images.find(args.data, "--data").first(args.images)
        found: dict[str, Responses] = {}
        with options.threads(args.threads):
            for trained in checkpoints.load_several(args):
                batches = data.batches(BATCH, trained.name, trained.format, trained.normalisation)
                label = trained.name if trained.name not in found else f"{trained.name} ({trained.source})"
                found[label] = layer_responses(trained.net, (x for x, _ in batches))
                print(
                    f"{label:<12}{len(found[label]):>4} layers, standard deviation {_mean(found[label]):.3f} "
                    "on average"
                )
        print("Figure 7 of the paper has curves alone: ResNet-110 below 56 below 20, and plain nets above.")
        _write(args, found)
        return 0


EXPERIMENT = LayerResponses()


def _mean(responses: Responses) -> float:
    return fmean(responses.values())


def _write(args: argparse.Namespace, found: Mapping[str, Responses]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    table, picture, result = (args.out / name for name in ("responses.csv", "responses.png", "result.json"))
    with writing(table), files.atomic(table) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["net", "layer", "std"])
        for label, responses in found.items():
            writer.writerows([label, layer, std] for layer, std in responses.items())
    with writing(picture):
        plot(picture, found)
    content = {
        "command": args.command_line,
        "versions": machine.versions(),
        "machine": machine.facts(torch.device("cpu")),
        "images": args.images,
        "mean": {label: _mean(responses) for label, responses in found.items()},
    }
    with writing(result):
        report.write_json(content, result)
    print(f"wrote {picture}, {table}, {result}")


def plot(path: Path, found: Mapping[str, Responses]) -> None:
    """Figure 7: the responses in the order of the net, and sorted by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (unsorted, by_size) = pyplot.subplots(2, 1, figsize=(7, 6), layout="constrained")
    for label, responses in found.items():
        values = list(responses.values())
        unsorted.plot(values, label=label, linewidth=1.5)
        by_size.plot(sorted(values, reverse=True), label=label, linewidth=1.5)
    unsorted.set_xlabel("layer")
    by_size.set_xlabel("layer, sorted by magnitude")
    for axis in (unsorted, by_size):
        axis.set_ylabel("std")
        axis.grid(alpha=0.3)
        axis.legend()
    with files.atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
