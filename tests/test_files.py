"""Output files: whole, or as they were."""

from __future__ import annotations

import pytest

from fusedres.training import files


def test_a_file_takes_its_place_at_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.atomic(path) as temporary:
        temporary.write_text("new")
        written = temporary.stat().st_ino
        assert path.read_text() == "old"
    assert path.read_text() == "new" and path.stat().st_ino == written
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="no"), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise ValueError("no")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_files_that_can_not_be_written(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a directory"):
        files.check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        files.check_writable(tmp_path / "none" / "a")
    files.check_writable(tmp_path / "a")
