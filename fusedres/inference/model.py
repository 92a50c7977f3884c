"""The optimised model: what stands between a caller's images and the programs that run."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusedres import ops
from fusedres.inference import graph, onednn
from fusedres.inference.layers import ConvBiasAct
from fusedres.inference.prepared import Prepared
from fusedres.inference.program import Choice, Program

# On a CPU a batch goes through the net in parts whose largest activation has so many bytes a thread: a part
# stays in the caches from one layer to the next, and in memory that the allocator keeps. From ResNet-50 in
# float32 and bfloat16 on two cores, where parts of three quarters to three times the size were as fast within
# 4%, and much smaller ones slower.
PART_BYTES_PER_THREAD = 8 << 20
# shapes that programs are kept for, and CUDA graphs, whose activations stay allocated
PROGRAMS, GRAPHS = 64, 8


class OptimizedResNet(nn.Module):
    """A trained net for inference alone, made by :func:`fusedres.optimize_for_inference`.

    Its parameters are the folded ones. What is made of them for a machine and a shape is made on first use
    and is no part of its state.

    Args:
        net: the folded graph.
        dtype: of the parameters, and computed in where the machine has convolutions of it.
        dtypes: those an input may have.
        cuda_graph: when a GPU replays a captured graph.

    Shapes:
        [N, C, H, W], channels_last or not -> [N, classes], in the input's dtype

    Raises:
        ValueError, TypeError: (by a call) the input is none of these, or on another device.
    """

    def __init__(
        self, net: fx.GraphModule, dtype: torch.dtype, dtypes: Iterable[torch.dtype], cuda_graph: graph.When
    ) -> None:
        super().__init__()
        self.net = net
        self.dtype, self.dtypes = dtype, tuple(dtypes)
        self.cuda_graph = cuda_graph
        super().train(False)
        self._forget()

    def _forget(self) -> None:
        """Drop what was made of the parameters."""
        # one for making programs, one for the list of them
        self._making, self._listing = threading.Lock(), threading.Lock()
        # by shape, backend and whether it is a graph; the last used at the end
        self._programs: OrderedDict[Any, Program | graph.Captured] = OrderedDict()
        self._prepared = Prepared()
        self._parameters_made_of = [*self.net.parameters(), *self.net.buffers()]
        self._version = self._parameters_version()
        stem = next(m for m in self.net.modules() if isinstance(m, ConvBiasAct))
        self._device, self._channels = stem.weight.device, stem.weight.shape[1] * stem.groups
        # values of the first activation, where a net is widest, that a pixel makes
        self._growth = stem.weight.shape[0] / math.prod(stem.stride)

    def _parameters_version(self) -> int:
        return sum(p._version for p in self._parameters_made_of)

    def __getstate__(self) -> dict[str, Any]:
        made = ("_making", "_listing", "_programs", "_prepared", "_parameters_made_of")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedResNet:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = next(self.net.parameters()).dtype
        self.dtypes = tuple(dict.fromkeys((*self.dtypes, self.dtype)))
        self._forget()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self._forget()
        return result

    def train(self, mode: bool = True) -> OptimizedResNet:
        if mode:
            raise RuntimeError("an optimised model can't be trained: train the one that it was made of")
        return self

    def choices(self, x: Tensor) -> list[Choice]:
        """What runs each layer for an input, which is computed to find out."""
        with torch.no_grad():
            part = x[: self._part(x)]
            self(part)
        found, why = self._found(self._key(part)), self._widened()
        choices = [] if found is None else found.choices
        return [c._replace(reason=f"{c.reason}; in float32: {why}") for c in choices] if why else choices

    def _widened(self) -> str | None:
        """Why 16 bits are computed in float32, which is up to ten times as fast; None if they aren't."""
        ours = self._device.type == "cpu" and ops.forced_backend() in ("auto", "cpu")
        if not ours or self.dtype.itemsize != 2 or onednn.unavailable(torch.float32):
            return None
        return onednn.unavailable(self.dtype)

    @property
    def _computed(self) -> torch.dtype:
        return torch.float32 if self._widened() else self.dtype

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        return x.shape, ops.forced_backend(), graph.pays(x, self.cuda_graph)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.net(x.to(self.dtype)).to(x.dtype)  # type: ignore[no-any-return]
        self._check(x)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        with torch.no_grad():
            size = self._part(x)
            out = [self._run(part) for part in (torch.split(x, size) if x.shape[0] > size else (x,))]
            return (out[0] if len(out) == 1 else torch.cat(out)).to(x.dtype)

    @property
    def measured(self) -> dict[torch.Size, dict[str, dict[str, float]]]:
        """Milliseconds of each way to run a layer that has several, by layer, on inputs of a shape.

        The fastest was chosen. A large batch goes through the net in parts: the shapes are theirs.
        """
        with self._listing:
            programs = list(self._programs.items())
        return {shape: made.measured for (shape, *_), made in programs if isinstance(made, Program)}

    def _run(self, x: Tensor) -> Tensor:
        x = x.to(self._computed, memory_format=torch.channels_last)
        version = self._parameters_version()
        if version != self._version:
            self._forget()
        key = self._key(x)
        program = self._found(key)
        if program is not None:
            return program(x)
        with self._making:
            program = self._found(key)
            if program is None:  # no other thread has made it meanwhile
                net = self.net
                if x.dtype != self.dtype:
                    net = self._prepared.of(net, x.dtype, lambda: copy.deepcopy(net).to(x.dtype))
                program, first = Program.made(net, x, self._prepared)
                self._keep(key, graph.Captured(program, x) if key[-1] else program)
                return first
        return program(x)

    def _found(self, key: tuple[Any, ...]) -> Program | graph.Captured | None:
        with self._listing:
            program = self._programs.get(key)
            if program is not None:
                self._programs.move_to_end(key)
            return program

    def _keep(self, key: tuple[Any, ...], program: Program | graph.Captured) -> None:
        """Instead of the one of its kind that wasn't used for longest, if there are too many."""
        with self._listing:
            self._programs[key] = program
            alike = [other for other in self._programs if other[-1] == key[-1]]
            if len(alike) > (GRAPHS if key[-1] else PROGRAMS):
                del self._programs[alike[0]]

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self._channels:
            raise ValueError(f"x must be [N, {self._channels}, H, W], got {list(x.shape)}")
        if x.dtype not in self.dtypes:
            allowed = " or ".join(map(str, self.dtypes))
            raise TypeError(
                f"x must be {allowed}, got {x.dtype}: convert it, or optimise the model for that dtype"
            )
        if x.device != self._device:
            raise ValueError(
                f"x must be on {self._device}, where the model is, got {x.device}: move one of them"
            )

    def _part(self, x: Tensor) -> int:
        """Images that go through the net at a time."""
        n, _, height, width = x.shape
        if x.device.type != "cpu" or n == 0:
            return max(1, n)
        largest = self._growth * height * width * self._computed.itemsize
        at_most = max(1, int(torch.get_num_threads() * PART_BYTES_PER_THREAD // max(1, largest)))
        return math.ceil(n / math.ceil(n / at_most))  # parts of one size, as far as they can be
