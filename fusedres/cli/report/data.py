"""What a report shows, whoever measured it: comparisons of whole nets, times of layers and of ops."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fusedres.models.build import CIFAR

FUSED, EAGER = "fused", "eager"


@dataclass(frozen=True)
class Side:
    """One implementation of a net's step.

    Args:
        name: short.
        images_per_second: by the median.
        ratio: of that to eager's; None without an eager side.
        role: "fused" for this package, "eager" for the baseline, "peer" for others.
        ms: median, least and most.
        peak_bytes: of memory.
        startup_s: to the first answer.
        description: what ran.
    """

    name: str
    images_per_second: float
    ratio: float | None
    role: str
    ms: tuple[float, float | None, float | None]
    peak_bytes: float | None = None
    startup_s: float | None = None
    description: str = ""


@dataclass(frozen=True)
class Comparison:
    """Implementations of one net, in the same run; a point of a curve where ``sweep`` names one."""

    mode: str  # "train" or "inference"
    net: str
    batch: int
    dtype: str
    image_size: int | None
    threads: int | None
    sides: tuple[Side, ...]
    file: Path
    date: str = ""
    sweep: str = ""

    @property
    def title(self) -> str:
        return f"{net_title(self.net)}, batch {self.batch}, {self.dtype}"


@dataclass(frozen=True)
class LayerTime:
    """A convolution in one direction.

    Args:
        label: its shape.
        direction: "forward", "dgrad" or "wgrad", or the name of an op.
        ms: of each who ran it, by role.
        floor_ms: the least time.
        bytes: that it has to move.
        flop: of the product.
        count: how often a net has it.
        dtype: of the activations.
    """

    label: str
    direction: str
    ms: dict[str, float]
    floor_ms: float
    bytes: int
    flop: int
    count: int
    dtype: str


@dataclass(frozen=True)
class OpTime:
    """An op or a block by itself.

    Args:
        label: with its shape.
        ratio: eager's time over its own.
        gbps: bytes a second.
        others: eager's time over that of other ways, by name.
        share: of its time, the least that bandwidth and arithmetic allow.
    """

    label: str
    ratio: float
    gbps: float | None
    file: Path
    others: tuple[tuple[str, float], ...] = ()
    share: float | None = None


@dataclass(frozen=True)
class Quantised:
    """A net in 8 bits beside what it was."""

    net: str
    batch: int
    dtype: str
    before: float  # images a second
    after: float
    bytes_before: int
    bytes_after: int
    agree: tuple[int, int] | None  # of so many images
    file: Path


@dataclass
class Machine:
    """All that was measured on one machine."""

    name: str
    facts: list[str] = field(default_factory=list)
    by_others: bool = False  # baselines of other frameworks, no figure of this package
    tiny: bool = False  # a run of the logic, whose times mean nothing
    comparisons: list[Comparison] = field(default_factory=list)
    layers: list[LayerTime] = field(default_factory=list)
    ops: list[OpTime] = field(default_factory=list)
    quantised: list[Quantised] = field(default_factory=list)
    bandwidth: float | None = None  # bytes a second of a copy
    peak: float | None = None  # FLOP a second of a matrix product in 16 bits
    ceilings: str = ""  # where both are from
    notes: list[str] = field(default_factory=list)

    def say(self, *facts: str | None) -> None:
        self.facts += [fact for fact in facts if fact and fact not in self.facts]

    def leave_out_older(self) -> None:
        """Of runs of the same net in the same way only the last is kept, and said so."""
        runs: dict[tuple[object, ...], list[Comparison]] = {}
        for each in self.comparisons:
            key = (each.mode, each.net, each.batch, each.dtype, each.image_size, each.threads, each.sweep)
            runs.setdefault(key, []).append(each)
        last = {key: max(found, key=lambda run: run.date).file for key, found in runs.items()}
        older = [each for key, found in runs.items() for each in found if each.file != last[key]]
        self.comparisons = [each for each in self.comparisons if each not in older]
        names = sorted({f"{each.file.name} ({each.mode})" for each in older})
        if names:
            self.notes.append(
                f"There is a later run of the same, so these are not shown: {', '.join(names)}."
            )

    @property
    def empty(self) -> bool:
        return not (self.comparisons or self.layers or self.ops or self.quantised)


@dataclass(frozen=True)
class Source:
    """A file that was read: what it is, and the command that wrote it."""

    path: Path
    kind: str
    date: str
    command: str


@dataclass
class Results:
    """Everything that was read, and what could not be."""

    machines: dict[str, Machine] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def machine(self, name: str) -> Machine:
        return self.machines.setdefault(name, Machine(name))


def threads_title(count: int | None) -> str | None:
    """ "2 threads"; None where they say nothing, as on a GPU."""
    return None if count is None else f"{count} thread{'s' * (count > 1)}"


def net_title(name: str) -> str:
    """ "ResNet-50" for "resnet50", "CIFAR ResNet-20" for "resnet20"."""
    title = f"ResNet-{name.removeprefix('resnet')}" if name.startswith("resnet") else name
    return f"CIFAR {title}" if name in CIFAR else title
