"""Two processes that talk to each other by gloo, for tests of what is distributed."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

COUNT = 2
SECONDS = 300  # that a call may take, with the start of the processes on a busy machine


class TwoProcesses:
    """Calls functions in both at once; they are started by the first call, and again after a failure.

    Args:
        folder: of nobody else, where they find each other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, 0
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(rank, *arguments)`` gives in either process.

        Raises:
            RuntimeError: it failed there, with the traceback, or took too long.
        """
        if not self._processes:
            self._start()
        # by file: a test module has no name that another process could import it by
        call = pickle.dumps((inspect.getfile(function), function.__name__, arguments))
        results: dict[Connection, Any] = {}
        try:
            for connection in self._connections:
                connection.send_bytes(call)
            while len(results) < COUNT:
                ready = wait([c for c in self._connections if c not in results], SECONDS)
                if not ready:
                    raise RuntimeError(f"{function.__name__} took more than {SECONDS} s")
                for connection in ready:
                    outcome, result = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                    if outcome == "failed":
                        raise RuntimeError(f"in process {self._connections.index(connection)}:\n{result}")  # type: ignore[arg-type]
                    results[connection] = outcome, result  # type: ignore[index]
        except (RuntimeError, OSError, EOFError):
            self.end()
            raise
        for outcome, result in results.values():
            if outcome == "skipped":
                pytest.skip(result)
        return [results[connection][1] for connection in self._connections]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._started += 1
        store = self._folder / f"store{self._started}"
        for rank in range(COUNT):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def end(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []


def _serve(rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=COUNT, timeout=timedelta(seconds=SECONDS)
    )
    while True:
        try:
            file, name, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            result = ("done", getattr(_module(file), name)(rank, *arguments))
        except pytest.skip.Exception as skipped:
            result = ("skipped", str(skipped))
        except Exception:
            result = ("failed", traceback.format_exc())
        connection.send_bytes(pickle.dumps(result))


def _module(file: str) -> Any:
    name = f"in_two_processes_{Path(file).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
