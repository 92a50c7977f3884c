"""From files and folders to results; what can't be read becomes a line that says why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedres import __version__
from fusedres.cli.report import readers
from fusedres.cli.report.data import Results

SUFFIXES = (".json", ".jsonl")
_UNKNOWN = "no result of fusedres, gpu_check or pytest-benchmark"


class _Unreadable(Exception):
    """Why a file can't be shown."""


def load(paths: Sequence[Path]) -> Results:
    """Everything that can be shown of ``paths``, files or folders."""
    results = Results()
    lines: dict[Path, list[Any]] = {}
    for path in _files(paths, results):
        try:
            content = _content(path, results)
            if isinstance(content, list):
                lines[path] = content
            else:
                _document(content, path, results)
        except _Unreadable as problem:
            results.problems.append(f"{path}: {problem}")
    _lines(lines, results)
    for machine in results.machines.values():
        machine.leave_out_older()
    for name in [name for name, machine in results.machines.items() if machine.empty]:
        del results.machines[name]
    return results


def _files(paths: Sequence[Path], results: Results) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES)
            if not inside:
                results.problems.append(f"{path}: no result files in this folder (*.json, *.jsonl)")
            found |= dict.fromkeys(inside)
        elif path.exists():
            found[path] = None
        else:
            results.problems.append(f"{path}: there is no such file")
    return list(found)


def _content(path: Path, results: Results) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise _Unreadable(f"can't be read: {reason}") from error
    if not text.strip():
        raise _Unreadable("the file is empty")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        return _json_lines(text, path, results, error)
    if not isinstance(whole, dict):
        raise _Unreadable(_UNKNOWN)
    return [whole] if path.suffix == ".jsonl" else whole  # of one line


def _json_lines(text: str, path: Path, results: Results, error: json.JSONDecodeError) -> list[Any]:
    found, bad = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                bad.append(number)
    found = [line for line in found if isinstance(line, dict)]
    if path.suffix != ".jsonl" or not found:
        cut = error.pos >= len(text.rstrip()) - 1 or text.lstrip()[0] in "{["
        why = "cut short or damaged" if cut else "no JSON"
        raise _Unreadable(f"{why} at line {error.lineno}: {error.msg}")
    if bad:
        where = f"line {bad[0]} is" if len(bad) == 1 else f"lines {', '.join(map(str, bad))} are"
        results.problems.append(f"{path}: {where} cut short or damaged and left out")
    return found


def _document(content: Any, path: Path, results: Results) -> None:
    for keys, (kind, read) in readers.DOCUMENTS.items():
        if all(key in content for key in keys):
            _read(kind, content, lambda read=read: read(content, path, results))
            return
    if "command" in content and "versions" in content:
        raise _Unreadable(f"a result that a report doesn't show: {content['command']}")
    raise _Unreadable(_UNKNOWN)


def _read(kind: str, content: Any, read: Any) -> None:
    try:
        read()
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        versions = content.get("versions") if isinstance(content, dict) else None
        version = versions.get("fusedres") if isinstance(versions, dict) else None
        by = f", by fusedres {version}" if version and version != __version__ else ""
        missing = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise _Unreadable(
            f"a result of {kind}{by} that fusedres {__version__} can't read ({missing})"
        ) from error
    except ValueError as error:
        raise _Unreadable(f"a result of {kind}, but {error}") from error


def _lines(files: dict[Path, list[Any]], results: Results) -> None:
    # a line that names the device speaks for the files beside it
    devices = {
        path.parent: line["name"]
        for path, lines in files.items()
        for line in lines
        if line.get("what") == "device" and "name" in line
    }
    for path, lines in files.items():
        device = devices.get(path.parent, f"a machine that {path.parent.name or 'the folder'} doesn't name")
        first = lines[0]
        try:
            if any(line.get("part") == "header" for line in lines):
                _read("gpu_check", {}, lambda: readers.gpu_check(lines, path, results))  # noqa: B023
            elif {"c", "k", "r", "st", "h", "floor"} <= first.keys():
                _read("a layers file", {}, lambda: readers.layers(lines, path, results, device))  # noqa: B023
            elif any("sweep" in line for line in lines):
                _read("scaling", {}, lambda: readers.scaling(lines, path, results))  # noqa: B023
            elif any("img_s" in line or "what" in line for line in lines):
                _read("a peers file", {}, lambda: readers.peers(lines, path, results, device))  # noqa: B023
            else:
                raise _Unreadable(_UNKNOWN)
        except _Unreadable as problem:
            results.problems.append(f"{path}: {problem}")
