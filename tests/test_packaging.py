"""What is packed: source archive, wheel, one version everywhere; and the matrix of installs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import install_matrix
import pytest
from install_matrix import Absent, Cell, Failed, Matrix, Outcome

import fusedres
from fusedres.cli import main

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of the checkout that aren't for git or CI alone."""
    if not (CHECKOUT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a checkout")
    listed = subprocess.check_output(["git", "ls-files"], cwd=CHECKOUT, text=True).splitlines()
    return [name for name in listed if not name.startswith(".") and (CHECKOUT / name).exists()]


@pytest.fixture(scope="module")
def packed(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, where setuptools has packed it: dist/*.tar.gz, build/lib, *.dist-info."""
    pytest.importorskip("pybind11")
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, copy / name)
    commands = ("sdist", "build_py", "--build-lib", "build/lib", "dist_info")
    subprocess.run([sys.executable, "setup.py", "-q", *commands], cwd=copy, check=True, capture_output=True)
    return copy


def test_the_source_archive_has_every_file(packed: Path, tracked: list[str]) -> None:
    (path,) = packed.glob("dist/fusedres-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked) - names == set()


def test_a_wheel_has_the_package_and_its_data(packed: Path, tracked: list[str]) -> None:
    built = {str(file.relative_to(packed / "build/lib")) for file in (packed / "build/lib").rglob("*.*")}
    assert {name for name in tracked if name.startswith("fusedres/")} == built


def test_metadata(packed: Path) -> None:
    (info,) = packed.glob("*.dist-info")
    lines = (info / "METADATA").read_text().splitlines()
    assert f"Version: {fusedres.__version__}" in lines
    assert "License-File: LICENSE" in lines and (info / "licenses" / "LICENSE").exists()


def test_the_version_is_written_once(tracked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fusedres {fusedres.__version__}\n"
    code = [name for name in tracked if name.endswith((".py", ".toml", ".txt", ".cpp"))]
    own = re.compile(rf"""["']{re.escape(fusedres.__version__)}["']""")
    assert [name for name in code if own.search((CHECKOUT / name).read_text())] == ["fusedres/_version.py"]
    newest = re.search(r"^## \[(.+?)\]", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] in ("Unreleased", fusedres.__version__)


@pytest.mark.parametrize(("variable", "value"), [("FUSEDRES_BUILD_CUDA", "yes"), ("MAX_JOBS", "all")])
def test_what_a_build_refuses_is_on_the_page(packed: Path, variable: str, value: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=packed,
        env=os.environ | {variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and message.startswith(f"{variable} must be ")
    assert f"`{message}`" in (CHECKOUT / "docs" / "install.md").read_text()


def test_nvcc_is_hidden_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("nvcc", "compiler"):
        (folder / name).write_text("#!/bin/sh\necho here\n")
        (folder / name).chmod(0o755)
    env = {"PATH": os.pathsep.join([str(folder), "/usr/bin"]), "CUDA_HOME": "/cuda", "HOME": "/home"}
    hidden = install_matrix.without_nvcc(env, tmp_path / "links")
    assert hidden.keys() == {"PATH", "HOME"} and hidden["PATH"].endswith(f"{os.pathsep}/usr/bin")
    assert shutil.which("nvcc", path=hidden["PATH"].split(os.pathsep)[0]) is None
    assert subprocess.check_output(["compiler"], env=hidden, text=True) == "here\n"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [(Failed("no"), "FAILED", 1), (KeyError("no"), "FAILED", 1), (Absent("no"), "not there", 0)],
)
def test_every_cell_has_its_outcome(
    failure: Exception,
    status: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cell that fails doesn't keep the others from running; one that can't be is no failure."""

    def cell(self: Matrix, cell: Cell, archive: Path) -> str:
        if cell == Cell("1", "with", "with"):
            raise failure
        return "cpu"

    monkeypatch.setattr(Matrix, "archive", lambda self: tmp_path)
    monkeypatch.setattr(Matrix, "cell", cell)
    report = tmp_path / "report.json"
    arguments = ["--torch", "1", "2", "--folder", str(tmp_path), "--json", str(report)]
    assert install_matrix.main(arguments) == code
    entries = json.loads(report.read_text())
    assert [entry["status"] for entry in entries] == [status, *["ok"] * 7]
    assert capsys.readouterr().out.count("\n") == 9
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_cell_without_its_pytorch_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def install(self: Matrix, python: Path, *packages: str) -> None:
        raise Failed("no such release")

    monkeypatch.setattr(Matrix, "wheel", lambda self, nvcc, archive: tmp_path)
    monkeypatch.setattr(Matrix, "python", lambda self, name, *packages: tmp_path)
    monkeypatch.setattr(Matrix, "install", install)
    found = install_matrix.outcome(Matrix(tmp_path, [], keep=False), Cell("9.9", "with", "with"), tmp_path)
    assert found == Outcome("not there", found.seconds, "torch==9.9 can't be installed: no such release")
