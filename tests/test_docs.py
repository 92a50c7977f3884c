"""The pages: every block of Python runs, errors and outputs are as written, links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import CHECKOUT, PAGES, Block, blocks

from fusedres import plan
from fusedres.cli import main

# README's and others' by name: test_swap.py runs them and looks at more than that they run
PYTHON = [block for block in blocks() if block.language == "python" and not block.name]
COMMANDS = [block for block in blocks() if block.language == "sh" and block.result is not None]


def where(block: Block) -> str:
    return block.where


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, and what torchrun says to the only process of a run."""
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def outcome(code: str) -> tuple[str, str]:
    """What a block prints, with the error that it ends with; and its first warning."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always", UserWarning)
        try:
            exec(compile(code, "the page", "exec"), {"__name__": "__main__"})
        except Exception as raised:
            print(f"{type(raised).__name__}: {raised}")
    told = [f"UserWarning: {w.message}\n" for w in caught if w.category is UserWarning]
    return printed.getvalue(), "".join(told[:1])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("block", PYTHON, ids=where)
def test_python(block: Block) -> None:
    for module in block.needs:
        pytest.importorskip(module, exc_type=ImportError)
    found, warning = outcome(block.code)
    if block.result is None:
        assert not re.search(r"^\w+Error: ", found, re.MULTILINE), found
        return
    if "Warning: " in block.result:
        found += warning
    assert [line.rstrip() for line in found.splitlines()] == block.result.splitlines()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("block", COMMANDS, ids=where)
def test_commands(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    for line in block.code.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "fusedres"
        with contextlib.suppress(SystemExit):
            main(arguments)
    captured = capsys.readouterr()
    assert captured.out + captured.err == block.result


def test_every_error_stands_behind_the_code_that_raises_it() -> None:
    behind = {block.result for block in blocks() if block.language in ("python", "sh")}
    texts = [block for block in blocks() if block.language == "text"]
    assert [block.where for block in texts if block.code not in behind] == []


@pytest.mark.parametrize(
    ("backend", "facts"),
    [
        ("triton", {}),
        ("cuda", {"device": "cuda", "capability": (7, 5)}),
        ("cuda", {"device": "cuda", "capability": (9, 0), "built_for": ("80-real",)}),
        ("cpu", {"dtype": "float64"}),
    ],
)
def test_reasons(backend: str, facts: dict[str, Any]) -> None:
    """The table of reasons has them as the rules give them."""
    problem = plan.Problem(**{"op": "bn_act", "device": "cpu", "dtype": "float32"} | facts)
    why = plan.refusal(backend, problem, {})
    assert why is not None
    table = (
        (CHECKOUT / "docs" / "troubleshooting.md").read_text().replace("built for 80,", "built for 80-real,")
    )
    assert f"`{why}`" in table.replace("compute capability ...", "compute capability 9.0")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, CHECKOUT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+://", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    readme = PAGES[0].read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []
