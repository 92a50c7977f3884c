"""Parts of a check, each in a process of its own: what a part gets, and how parts are run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
HEADER = "header"  # the part and name of a run's first line
END = "end"  # the name of a part's last line
_GRACE = 0.9  # of its time, after which a part begins nothing more
_AFTER_A_KILL = 10.0  # seconds to wait for a process to go


class Results:
    """JSON lines, each written at once; a run begins with a header."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"

    def add(self, part: str, name: str, **facts: object) -> None:
        entry = {"part": part, "name": name, **facts}
        finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def latest(self) -> list[Record]:
        """The lines of the last run, header included."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        starts = [index for index, line in enumerate(lines) if line["part"] == HEADER]
        return lines[starts[-1] :] if starts else lines


@dataclass(frozen=True)
class Check:
    """What a part gets.

    Args:
        part: its name.
        device: "cuda", or "cpu" for a run of the logic.
        tiny: small shapes.
        folder: of the results.
        deadline: time.monotonic() after which it should begin nothing more.
    """

    part: str
    device: str
    tiny: bool
    folder: Path
    deadline: float

    def record(self, name: str, *, ok: bool = True, **facts: object) -> None:
        """A line of the results; ``ok=False`` where something is wrong, with an ``error`` that says what."""
        Results(self.folder).add(self.part, name, ok=ok, **facts)

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Part:
    """A row of the table of parts.

    Args:
        run: does it, and records what it finds.
        seconds: its limit; then its process is killed.
        show: from its records to lines of the summary.
    """

    run: Callable[[Check], None]
    seconds: float
    show: Callable[[list[Record]], list[str]] = lambda records: []


def run_here(part: Part, check: Check) -> int:
    """Run a part in this process; its exit status, with the reason in the last line of its output."""
    try:
        part.run(check)
    except Exception as error:
        traceback.print_exc()
        message = next((line for line in str(error).splitlines() if line.strip()), "")
        print(f"{type(error).__name__}: {message}".rstrip(": "), file=sys.stderr, flush=True)
        return 1
    return 0


def deadline(limit: float) -> float:
    return time.monotonic() + _GRACE * limit


def run_parts(
    parts: Mapping[str, Part], command: Callable[[str, float], Sequence[str]], folder: Path, total: float
) -> None:
    """Run parts one after another, whatever becomes of each.

    Args:
        parts: name -> part, in order.
        command: from a part's name and limit in seconds to the command line that runs it.
        folder: of the results; a part's output goes to PART.log in it.
        total: seconds for all.
    """
    results, end = Results(folder), time.monotonic() + total
    for name, part in parts.items():
        start = time.monotonic()
        limit = min(part.seconds, end - start)
        print(f"{name} (up to {max(limit, 0):.0f} s) ... ", end="", flush=True)
        if limit < 1:
            error: str | None = f"not started: the {total:.0f} s for all parts were over"
        else:
            log = folder / f"{name}.log"
            error = _run(command(name, limit), log, limit)
            if not log.stat().st_size:
                log.unlink()
        seconds = time.monotonic() - start
        results.add(name, END, ok=error is None, seconds=round(seconds, 1), limit=limit, error=error)
        print(f"{error or 'done'}, {seconds:.1f} s", flush=True)


def _run(command: Sequence[str], log: Path, limit: float) -> str | None:
    """None, or what went wrong."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {limit:.0f} s"
        finally:
            _end(process)
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code > 0:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return said[-1] if said else f"exit status {code}"
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part: its process, and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # one that hangs in the driver can't be waited for
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_AFTER_A_KILL)
