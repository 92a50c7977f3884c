"""How a command fails: one line on stderr and an exit status."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

FAILED = 1  # the run failed
USAGE = 2  # the command line can't be right
_NO_MEMORY = ("allocate memory", "out of memory", "overflow")


class CommandError(Exception):
    """A failure that the user can act on.

    Args:
        message: one line; what was wrong, what was needed.
        status: the exit status.
    """

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(first_line(message))
        self.status = status


def first_line(error: object) -> str:
    """The first line of a message that has any text, for errors that come with pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def require(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """Import an optional dependency, or say what it is for and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise CommandError(f"{purpose} needs {name}: pip install {name} ({first_line(error)})") from error


@contextlib.contextmanager
def out_of_memory(remedy: str) -> Iterator[None]:
    """Say what to try when memory runs out in the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        raise CommandError(f"out of memory, try {remedy}: {first_line(error)}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what keeps ``path`` from being written becomes a message."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"can't write {path}: {first_line(error)}") from error
