"""Output files: refused before the work starts if they can't be written, and never half-written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raise OSError, with a reason, unless ``path`` can be created or replaced."""
    folder = path.absolute().parent
    if path.is_dir():
        raise IsADirectoryError(f"can't write {path}: it is a directory")
    if not folder.is_dir():
        raise FileNotFoundError(f"can't write {path}: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"can't write {path}: {folder} is not writable")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends without an error."""
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.stem}-", suffix=path.suffix, dir=path.absolute().parent
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp made it private
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # on the disk before it takes the name, should the machine stop
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
