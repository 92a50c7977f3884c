"""The README and the pages of docs/: their blocks of code, with what stands in front of and behind each."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parents[1]
PAGES = (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md")))

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (.+?) -->\n$")


class Block(NamedTuple):
    """A block of a page.

    Args:
        page: its file.
        line: of the block's first, in the page.
        language: "python", "sh" or "text".
        code: what stands in it.
        note: the comment right above it: a name, or "needs" and modules; "" for none.
        result: the text block right below it, what comes of the code; None without.
    """

    page: Path
    line: int
    language: str
    code: str
    note: str
    result: str | None

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def needs(self) -> list[str]:
        """Modules that the code can't do without, beside ours and PyTorch."""
        named = self.note.removeprefix("needs ").split() if self.note.startswith("needs ") else []
        imported = [name for name in ("torchvision", "timm") if re.search(rf"\b{name}\b", self.code)]
        return named + imported

    @property
    def name(self) -> str:
        return "" if self.note.startswith("needs ") else self.note


def blocks() -> list[Block]:
    return [block for page in PAGES for block in _blocks(page)]


def _blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fences = list(_FENCE.finditer(text))
    assert 2 * len(fences) == len(re.findall("^```", text, re.MULTILINE)), (
        f"{page.name}: a block of no language"
    )
    found = []
    for fence, following in zip_longest(fences, fences[1:]):
        note = _COMMENT.search(text[: fence.start()])
        result = None
        if (
            following is not None
            and following[1] == "text"
            and not text[fence.end() : following.start()].strip()
        ):
            result = following[2]
        line = text[: fence.start()].count("\n") + 2
        found.append(Block(page, line, fence[1], fence[2], note[1] if note else "", result))
    return found


def named() -> dict[str, str]:
    """Python by the names in the comments above each block."""
    of = [(block.name, block.code) for block in blocks() if block.name]
    assert len(dict(of)) == len(of)
    return dict(of)
