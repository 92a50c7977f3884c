"""Installs the package as users do: {PyTorch} x {with, without nvcc} x {with, without Triton}.

A source archive is made from the checkout, a wheel from it with and without nvcc, and for each cell a
virtual environment that gets PyTorch, then the wheel. In it the package has to say what it was built with,
to compute what PyTorch computes (tests/install_check.py), and `pip check` has to be content.

The exit status is 1 if a cell failed. A cell that can't be (no nvcc here, a PyTorch that can't be installed
or that brings no Triton) is a line of the table, not a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
CHECK = Path(__file__).with_name("install_check.py")
NVCC_VARIABLES = ("CUDA_HOME", "CUDA_PATH", "CUDACXX")
WAYS = ("with", "without")


class Failed(Exception):
    """A step of a cell that should have worked; its text says what came out."""


class Absent(Exception):
    """A cell that can't be on this machine; its text says why."""


@dataclass(frozen=True)
class Cell:
    torch: str
    nvcc: str
    triton: str


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        status: "ok", "FAILED" or "not there".
        seconds: all of it, without what cells share.
        detail: the implementations it has, or what went wrong.
    """

    status: str
    seconds: float
    detail: str


def run(*command: object, env: Mapping[str, str], cwd: Path) -> str:
    """The output of a command.

    Raises:
        Failed: with the end of what it printed.
    """
    done = subprocess.run(
        [str(part) for part in command],
        env=dict(env),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stdout.splitlines() if line.strip()][-8:]
        raise Failed(f"{Path(str(command[0])).name} {command[1]} ...: " + " | ".join(last))
    return done.stdout


def without_nvcc(env: Mapping[str, str], links: Path) -> dict[str, str]:
    """The environment as on a machine without nvcc.

    A folder of PATH that has it is replaced by one of links to everything else there.
    """
    path = []
    for number, folder in enumerate(env.get("PATH", "").split(os.pathsep)):
        if not shutil.which("nvcc", path=folder):
            path.append(folder)
            continue
        shadow = links / str(number)
        shadow.mkdir(parents=True)
        for file in Path(folder).iterdir():
            if file.name != "nvcc":
                (shadow / file.name).symlink_to(file)
        path.append(str(shadow))
    kept = {name: value for name, value in env.items() if name not in NVCC_VARIABLES}
    return kept | {"PATH": os.pathsep.join(path)}


def clean(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would bring other packages in, or another build."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "CMAKE_ARGS")
    return {k: v for k, v in env.items() if k not in dropped and not k.startswith("FUSEDRES_")}


class Matrix:
    """What cells share: a folder, the source archive, the wheels."""

    def __init__(self, folder: Path, pip: Sequence[str], keep: bool) -> None:
        self.folder, self.pip, self.keep = folder, pip, keep
        self.env = {"with": clean(os.environ)}
        self.env["without"] = without_nvcc(self.env["with"], folder / "links")
        self.wheels: dict[str, Path | Exception] = {}

    def python(self, name: str, *packages: str) -> Path:
        """A new virtual environment's."""
        folder = self.folder / name
        run(sys.executable, "-m", "venv", folder, env=self.env["with"], cwd=self.folder)
        python = folder / "bin" / "python"
        if packages:
            self.install(python, *packages)
        return python

    def install(self, python: Path, *packages: str) -> None:
        arguments = ("-m", "pip", "install", "-q", "--disable-pip-version-check", *self.pip, *packages)
        run(python, *arguments, env=self.env["with"], cwd=self.folder)

    def archive(self) -> Path:
        """The source archive, of a copy of the checkout: nothing of it is left there."""
        source = self.folder / "checkout"
        ignored = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "demo")
        shutil.copytree(CHECKOUT, source, ignore=ignored)
        tool = self.python("tool", "build")
        run(tool, "-m", "build", "--sdist", "--outdir", self.folder, source, env=self.env["with"], cwd=source)
        shutil.rmtree(source)
        (archive,) = self.folder.glob("fusedres-*.tar.gz")
        return archive

    def wheel(self, nvcc: str, archive: Path) -> Path:
        """The wheel that is built from the archive with or without nvcc; once for all cells."""
        if nvcc not in self.wheels:
            try:
                self.wheels[nvcc] = self._built(nvcc, archive)
            except (Failed, Absent) as error:
                self.wheels[nvcc] = error
        wheel = self.wheels[nvcc]
        if isinstance(wheel, Exception):
            raise wheel
        return wheel

    def _built(self, nvcc: str, archive: Path) -> Path:
        env = self.env[nvcc]
        if nvcc == "with":
            if not shutil.which("nvcc", path=env["PATH"]) and "CUDACXX" not in env:
                raise Absent("there is no nvcc on PATH")
            env = env | {"FUSEDRES_BUILD_CUDA": "1"}
        out = self.folder / f"wheel-{nvcc}"
        tool = self.folder / "tool" / "bin" / "python"
        arguments = ("-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", out, *self.pip, archive)
        run(tool, *arguments, env=env, cwd=self.folder)
        (wheel,) = out.glob("fusedres-*.whl")
        return wheel

    def cell(self, cell: Cell, archive: Path) -> str:
        """Make, check and remove one cell.

        Returns:
            What it has, in a few words.
        """
        wheel = self.wheel(cell.nvcc, archive)
        name = f"{cell.torch}-{cell.nvcc}-{cell.triton}"
        env = self.env[cell.nvcc]
        try:
            python = self.python(name)
            try:
                self.install(python, f"torch=={cell.torch}")
            except Failed as error:
                raise Absent(f"torch=={cell.torch} can't be installed: {error}") from error
            installed = run(python, "-m", "pip", "list", "--format=freeze", env=env, cwd=self.folder)
            has_triton = any(line.startswith("triton==") for line in installed.splitlines())
            if cell.triton == "with" and not has_triton:
                raise Absent("this PyTorch brings no Triton")
            self.install(python, str(wheel))
            if cell.triton == "without" and has_triton:  # after the wheel, with which pip would bring it back
                run(python, "-m", "pip", "uninstall", "-q", "-y", "triton", env=env, cwd=self.folder)
            self._pip_check(python, removed=cell.triton == "without" and has_triton)
            return run(
                python, "-I", CHECK, cell.torch, cell.nvcc, cell.triton, env=env, cwd=self.folder
            ).strip()
        finally:
            if not self.keep:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _pip_check(self, python: Path, removed: bool) -> None:
        try:
            run(python, "-m", "pip", "check", env=self.env["with"], cwd=self.folder)
        except Failed as error:
            said = str(error).partition(": ")[2].split(" | ")
            if not removed or not all("requires triton, which is not installed" in line for line in said):
                raise


def outcome(matrix: Matrix, cell: Cell, archive: Path) -> Outcome:
    start = time.monotonic()
    try:
        status, detail = "ok", matrix.cell(cell, archive)
    except Absent as error:
        status, detail = "not there", str(error)
    except Exception as error:  # whatever it is, the other cells go on
        status, detail = "FAILED", f"{type(error).__name__}: {error}"
    return Outcome(status, round(time.monotonic() - start, 1), detail)


def table(outcomes: Mapping[Cell, Outcome]) -> str:
    rows = [("torch", "nvcc", "triton", "status", "seconds", "")]
    rows += [(c.torch, c.nvcc, c.triton, o.status, f"{o.seconds:.0f}", o.detail) for c, o in outcomes.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=["2.14.1", "2.13.0"], metavar="VERSION")
    parser.add_argument("--nvcc", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--triton", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--pip", nargs="+", default=[], metavar="ARGUMENT", help="for every pip install")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there, too")
    parser.add_argument("--folder", type=Path, help="work in it, 6 GiB; else in a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave everything there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    folder = Path(tempfile.mkdtemp(prefix="install-", dir=args.folder))
    outcomes = {}
    try:
        matrix = Matrix(folder, args.pip, args.keep)
        archive = matrix.archive()
        for cell in (Cell(t, n, k) for t in args.torch for n in args.nvcc for k in args.triton):
            outcomes[cell] = outcome(matrix, cell, archive)
            print(f"{cell}: {outcomes[cell].status} {outcomes[cell].detail}", file=sys.stderr, flush=True)
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    print(table(outcomes))
    if args.json:
        entries = [asdict(cell) | asdict(of_cell) for cell, of_cell in outcomes.items()]
        args.json.write_text(json.dumps(entries, indent=2) + "\n")
    return int(any(o.status == "FAILED" for o in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
