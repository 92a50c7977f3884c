"""Bytes that Triton kernels load and store, counted in the interpreter from their own accesses."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts the bytes of activations that the kernels of each op move.

    An address counts once for every launch that loads it, and once for every time it is stored: what a
    launch loads twice comes out of a cache the second time. Activations are the 4D tensors that ops get
    and give; filters and their gradients, vectors and partial sums are none.
    """

    def __init__(self, filters: set[int]) -> None:
        """``filters``: addresses of tensors that are no activations."""
        super().__init__()
        self.filters = filters
        self.loaded: dict[str, int] = {}
        self.stored: dict[str, int] = {}
        self._loads: list[np.ndarray] = []
        self._launches: list[np.ndarray] = []
        self._stores: list[np.ndarray] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fusedres":
            return func(*args, **(kwargs or {}))
        self._launches, self._stores = [], []
        out = func(*args, **(kwargs or {}))
        given = args if func._opname == "conv_wgrad" else (args, out)
        tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor) and self._is_activation(t)]
        unique = {t.data_ptr(): t for t in tensors}.values()
        for moved, counted in ((self._launches, self.loaded), (self._stores, self.stored)):
            for addresses in moved:
                for t in unique:
                    end = t.data_ptr() + t.numel() * t.element_size()
                    inside = np.count_nonzero((addresses >= t.data_ptr()) & (addresses < end))
                    counted[func._opname] = counted.get(func._opname, 0) + int(inside) * t.element_size()
        return out

    def _is_activation(self, t: Tensor) -> bool:
        return t.dim() == 4 and t.numel() > 0 and t.data_ptr() not in self.filters

    def __enter__(self) -> Traffic:
        from triton.runtime import interpreter

        self._patches = contextlib.ExitStack()
        builder = interpreter.interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._loads.append(ptrs.data[np.asarray(mask.data, dtype=bool)].astype(np.int64).ravel())
            return load(ptrs, mask, *rest)

        def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._stores.append(ptrs.data[np.asarray(mask.data, dtype=bool)].astype(np.int64).ravel())
            return store(ptrs, value, mask, *rest)

        launch = interpreter.GridExecutor.__call__

        def counted_launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._loads = []
            launch(executor, *args, **kwargs)
            self._launches.append(np.unique(np.concatenate([np.empty(0, np.int64), *self._loads])))

        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        interpreter.GridExecutor.__call__ = counted_launch

        def restore() -> None:
            del builder.create_masked_load, builder.create_masked_store
            interpreter.GridExecutor.__call__ = launch

        self._patches.callback(restore)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)
